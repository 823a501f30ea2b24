"""Instructions that some host's KVM cannot emulate, executed here after it has given up.

Where KVM emulates ring 0 (kvm_pvm), kernels meet what its emulator lacks, although CPUID says that
the processor has it: there CPUID cannot hide what programs in ring 3 see anyway.  Each completion
costs about a millisecond, most of it the failing emulation.  So this is for instructions that a
kernel executes now and then; those that it executes all the time it should be told to leave alone
(Linux: `clearcpuid=smap,popcnt`).

`COMPLETIONS` is the table.  To add an instruction, write a function and its row.  emulate.py has
those that are executed in software on every host.

Left out: `cmpxchg16b`, which would not be atomic here (cpuid.py hides it); XSAVE and its kin, which
no kernel has got to on such a host; SSE and AVX instructions.
Source: Intel SDM vol. 2, the instruction's own page.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

from pyvmm import operands, x86, xstate
from pyvmm.emulate import CannotComplete, Cpu, or_undo
from pyvmm.light import Protocol
from pyvmm.x86 import CpuMode

CR0_TS, CR4_OSXSAVE, CR4_CET = 1 << 3, 1 << 18, 1 << 23
RFLAGS_ZF, RFLAGS_AC = 1 << 6, 1 << 18
RFLAGS_ARITHMETIC = 0x8D5  # CF, PF, AF, ZF, SF and OF
X87_EXCEPTIONS = 0x3F  # in the status word, and their masks in the control word
REPEAT = 0xF3  # a prefix that is a part of popcnt's opcode


class ExtendedState(Protocol):
    """The vCPU's x87, SSE and AVX registers, as an XSAVE area in the standard form, and XCR0."""

    def read(self) -> bytearray: ...

    def write(self, area: bytearray) -> None: ...

    def xcr0(self) -> int: ...


def complete(cpu: Cpu, extended: ExtendedState, code: bytes) -> bool:
    """Execute the instruction that `code`, the bytes at RIP, begins with, if it is in the table.

    Returns whether it was executed; when not, nothing has changed.
    """
    prefixes, rest = x86.split_prefixes(code, cpu.mode)
    for opcode, execute in COMPLETIONS:
        if rest.startswith(opcode) and or_undo(
            cpu, functools.partial(execute, cpu, extended, prefixes, rest)
        ):
            return True
    return False


# --- instructions: (cpu, extended state, prefixes, the rest of the bytes) ----------------------


def _xrstor(cpu: Cpu, extended: ExtendedState, prefixes: bytes, rest: bytes) -> None:
    """xrstor64."""
    at = operands.decode(cpu, prefixes, rest, 2)
    if at.reg & 7 != 5 or at.gva is None or at.size != 8:
        raise CannotComplete("another instruction of the group, or an area of 32-bit mode's form")
    if not cpu.sregs.cr4 & CR4_OSXSAVE or cpu.sregs.cr0 & CR0_TS or at.gva % xstate.ALIGNMENT:
        raise CannotComplete("#UD, #NM or #GP")
    xcr0 = extended.xcr0()
    rfbm = xstate.requested(xcr0, cpu.regs.rdx, cpu.regs.rax)
    state = extended.read()
    xstate.restore(state, cpu.read(at.gva, xstate.area_bytes(rfbm)), rfbm, xcr0)
    extended.write(state)
    cpu.advance(at.length)


def _popcnt(cpu: Cpu, extended: ExtendedState, prefixes: bytes, rest: bytes) -> None:
    if REPEAT not in prefixes:
        raise CannotComplete("jmpe, of another processor")
    at = operands.decode(cpu, prefixes, rest, 2)
    count = operands.read(cpu, at).bit_count()
    operands.write_register(cpu, at.reg, at.size, count)
    cpu.regs.rflags = cpu.regs.rflags & ~RFLAGS_ARITHMETIC | (0 if count else RFLAGS_ZF)
    cpu.advance(at.length)


def _clac_or_stac(cpu: Cpu, extended: ExtendedState, prefixes: bytes, rest: bytes) -> None:
    if cpu.mode is not CpuMode.LONG or cpu.cpl or prefixes:
        raise CannotComplete("#UD")
    cpu.regs.rflags = cpu.regs.rflags & ~RFLAGS_AC | (RFLAGS_AC if rest[2] == 0xCB else 0)
    cpu.advance(3)


def _reserved_nop(cpu: Cpu, extended: ExtendedState, prefixes: bytes, rest: bytes) -> None:
    """rdssp, which reads nothing while there are no shadow stacks; endbr64."""
    if cpu.sregs.cr4 & CR4_CET:
        raise CannotComplete("there may be one")
    cpu.advance(operands.decode(cpu, prefixes, rest, 2).length)


def _fwait(cpu: Cpu, extended: ExtendedState, prefixes: bytes, rest: bytes) -> None:
    """Nothing, unless an x87 exception is pending: then its #MF is left to the host."""
    control, status = struct.unpack_from("<HH", extended.read())
    if status & ~control & X87_EXCEPTIONS or cpu.sregs.cr0 & CR0_TS:
        raise CannotComplete("#MF or #NM")
    cpu.advance(len(prefixes) + 1)


COMPLETIONS: tuple[tuple[bytes, Callable[[Cpu, ExtendedState, bytes, bytes], None]], ...] = (
    (b"\x0f\xae", _xrstor),
    (b"\x0f\xb8", _popcnt),
    (b"\x0f\x01\xca", _clac_or_stac),
    (b"\x0f\x01\xcb", _clac_or_stac),
    (b"\x0f\x1e", _reserved_nop),
    (b"\x9b", _fwait),
)

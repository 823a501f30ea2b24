"""The few instructions that pyvmm executes itself, in software, on a vCPU that is not running.

There are two reasons to.  Some hosts cannot execute them: where KVM *emulates* ring 0, `int3` and
`int n` end in an emulation failure.  And a single-step over some of them goes wrong on the others,
because the step is made with the processor's trap flag: `int n`, `int3`, `syscall` and `sysret`
load another one and run away to where they lead, `pushf` and `syscall` show it to the guest, and
`mov ss` and `sti` (on some processors) hold it off for an instruction.  Executed here, each is
exactly one instruction, and the guest cannot tell.

`INSTRUCTIONS` is the table.  To add one, write a function and its row.  Whatever is unusual (a task
gate, a fault on the way, virtual-8086 mode) raises CannotComplete with nothing changed, and the
instruction is left to the host.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

from pyvmm import x86
from pyvmm.kvm import kvm_regs, kvm_segment, kvm_sregs
from pyvmm.x86 import CpuMode, linear_address

SHADOW_MOV_SS, SHADOW_STI = 1, 2  # KVM_X86_SHADOW_INT_*, the kernel's numbers


class CannotComplete(Exception):
    """Left to the host; the vCPU and memory are as they were."""


class Cpu:
    """A vCPU's state as the functions here see it: copies, written back by whoever made them."""

    def __init__(
        self,
        regs: kvm_regs,
        sregs: kvm_sregs,
        read: Callable[[int, int], bytes],
        write: Callable[[int, bytes], None],
        msr: Callable[[int], int],
        unmask_nmi: Callable[[], None],
        shadow: Callable[[int], None],
    ) -> None:
        """`read` and `write` take a GVA and may raise any Exception where nothing is mapped.

        `unmask_nmi`: `iret` lets the next NMI in.  `shadow`: holds interrupts off for one
        instruction (SHADOW_*).
        """
        self.regs, self.sregs = regs, sregs
        self.read, self.write, self.msr = read, write, msr
        self.unmask_nmi, self.shadow = unmask_nmi, shadow

    @property
    def mode(self) -> CpuMode:
        return x86.cpu_mode(self.sregs, self.regs.rflags)

    @property
    def pc(self) -> int:
        """CS base + RIP: where the next instruction is, as a GVA."""
        return linear_address(self.sregs.cs.base, self.regs.rip, self.mode)

    @property
    def cpl(self) -> int:
        return int(self.sregs.ss.dpl)

    def advance(self, count: int) -> None:
        """Move RIP by `count` bytes; it wraps at the width that the mode gives it."""
        bits = {CpuMode.LONG: 64, CpuMode.REAL: 16, CpuMode.V8086: 16}.get(self.mode, 32)
        self.regs.rip = self.regs.rip + count & (1 << bits) - 1

    def fetch(self, length: int = 15) -> bytes:
        """Up to `length` instruction bytes at RIP; fewer where the mapping ends."""
        return self.fetch_at(self.pc, length)

    def fetch_at(self, gva: int, length: int = 15) -> bytes:
        """The same at another GVA."""
        try:
            return self.read(gva, length)
        except Exception:
            pass
        try:  # the mapping can end with the page
            return self.read(gva, min(length, 4096 - gva % 4096))
        except Exception:
            return b""


def may_complete(code: bytes, mode: CpuMode) -> bool:
    """Whether `code` may begin with one of our instructions: told from the first byte of it."""
    return x86.skip_prefixes(code, mode)[:1] in _FIRST_BYTES


def complete(cpu: Cpu, code: bytes) -> bool:
    """Execute the instruction that `code`, the bytes at RIP, begins with, if it is one of ours.

    Returns whether it was executed; when not, nothing has changed.
    """
    prefixes, rest = x86.split_prefixes(code, cpu.mode)
    for opcode, execute in INSTRUCTIONS:
        if rest.startswith(opcode):
            return or_undo(cpu, functools.partial(execute, cpu, prefixes, rest))
    return False


def deliver_or_undo(cpu: Cpu, vector: int, *, external: bool = False) -> bool:
    """deliver(), or False with nothing changed where it would fault on the way."""
    return or_undo(cpu, lambda: deliver(cpu, vector, external))


def or_undo(cpu: Cpu, change: Callable[[], None]) -> bool:
    """Call `change`, which changes `cpu`; False, with `cpu` as it was, when it raises."""
    before = kvm_regs.from_buffer_copy(cpu.regs), kvm_sregs.from_buffer_copy(cpu.sregs)
    try:
        change()
        return True
    except Exception:  # a fault on the way: the host raises the right one
        cpu.regs, cpu.sregs = before
        return False


# --- instructions: (cpu, prefixes, the rest of the bytes) ---------------------------------------


def _int3(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    cpu.advance(len(prefixes) + 1)
    deliver(cpu, x86.VECTOR_BP)


def _int_n(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    cpu.advance(len(prefixes) + 2)
    deliver(cpu, rest[1])


def _pushf(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    if cpu.mode is CpuMode.V8086:
        raise CannotComplete("virtual-8086 mode: depends on IOPL")
    size = _operand_size(cpu, prefixes)
    if cpu.mode is CpuMode.LONG and size == 4:
        size = 8  # pushes have no 32-bit form in 64-bit mode
    cpu.advance(len(prefixes) + 1)
    _Stack(cpu, size).push(cpu.regs.rflags & ~(x86.RFLAGS_VM | x86.RFLAGS_RF)).store()


def _operand_size(cpu: Cpu, prefixes: bytes) -> int:
    """The operand size in bytes that the mode and the prefixes 66 and REX.W choose."""
    if cpu.mode is CpuMode.LONG and any(p & 0xF8 == 0x48 for p in prefixes[-1:]):
        return 8
    wide = bool(cpu.sregs.cs.l or (cpu.sregs.cs.db and cpu.mode is not CpuMode.REAL))
    return 4 if wide != (0x66 in prefixes) else 2


def _syscall(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    """Intel SDM vol. 2B, "SYSCALL"; only from 64-bit mode."""
    if cpu.mode is not CpuMode.LONG or not cpu.sregs.efer & x86.EFER_SCE:
        raise CannotComplete("#UD, or AMD's compatibility-mode variant")
    selector = cpu.msr(x86.MSR_STAR) >> 32 & 0xFFFC
    cpu.regs.rcx = cpu.regs.rip + len(prefixes) + 2
    cpu.regs.r11 = cpu.regs.rflags & ~x86.RFLAGS_RF
    cpu.regs.rip = cpu.msr(x86.MSR_LSTAR)
    cpu.regs.rflags &= ~(cpu.msr(x86.MSR_SYSCALL_MASK) | x86.RFLAGS_RF)
    cpu.regs.rflags |= x86.RFLAGS_FIXED
    cpu.sregs.cs = x86.flat_segment(selector, code=True, bits=64)
    cpu.sregs.ss = x86.flat_segment(selector + 8, code=False)


def _sysret(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    """Intel SDM vol. 2B, "SYSRET"; only to 64-bit mode.  It loads TF, and so ends a step."""
    to_64_bits = cpu.mode is CpuMode.LONG and _operand_size(cpu, prefixes) == 8
    if not to_64_bits or cpu.cpl > 0 or not cpu.sregs.efer & x86.EFER_SCE:
        raise CannotComplete("#UD, #GP, or to compatibility mode")
    if cpu.regs.rcx >> 47:
        raise CannotComplete("#GP, if it is not canonical")
    selector = cpu.msr(x86.MSR_STAR) >> 48 & 0xFFFF
    cpu.regs.rip = cpu.regs.rcx
    cpu.regs.rflags = cpu.regs.r11 & _RFLAGS_LOADABLE & ~x86.RFLAGS_RF | x86.RFLAGS_FIXED
    cpu.sregs.cs = x86.flat_segment(selector + 16 | 3, code=True, bits=64, dpl=3)
    cpu.sregs.ss = x86.flat_segment(selector + 8 | 3, code=False, dpl=3)


def _iret(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    """Intel SDM vol. 2A, "IRET/IRETD/IRETQ"."""
    mode, size = cpu.mode, _operand_size(cpu, prefixes)
    if mode in (CpuMode.V8086, CpuMode.COMPAT16, CpuMode.COMPAT32):
        raise CannotComplete("a mode in which no kernel runs")
    if mode is not CpuMode.REAL and (cpu.cpl > 0 or cpu.regs.rflags & x86.RFLAGS_NT):
        raise CannotComplete("IOPL matters, or a task return")
    stack = linear_address(cpu.sregs.ss.base, cpu.regs.rsp, mode)

    def word(n: int) -> int:
        return int.from_bytes(cpu.read(stack + n * size, size), "little")

    rip, cs, rflags = word(0), word(1), word(2)
    words = 5 if mode is CpuMode.LONG else 3
    if mode is CpuMode.REAL:
        cpu.sregs.cs.selector, cpu.sregs.cs.base = cs, cs << 4
    else:
        if rflags & x86.RFLAGS_VM and mode is not CpuMode.LONG:
            raise CannotComplete("into virtual-8086 mode")
        old_cpl, new_cpl = cpu.cpl, cs & 3
        target = _return_code_segment(cpu, cs)
        if new_cpl > old_cpl:
            words = 5
        if words == 5:
            rsp = word(3)
            cpu.sregs.ss = _return_stack_segment(cpu, word(4), new_cpl)
        cpu.sregs.cs = target
        if new_cpl > old_cpl:
            _forget_privileged_segments(cpu, new_cpl)
    if words == 5:
        cpu.regs.rsp = rsp
    else:
        _pop(cpu, words * size)
    cpu.regs.rip = rip
    kept = cpu.regs.rflags & ~0xFFFF if size == 2 else 0
    cpu.regs.rflags = kept | rflags & _RFLAGS_LOADABLE | x86.RFLAGS_FIXED
    cpu.unmask_nmi()


def _sti(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    if cpu.mode is CpuMode.V8086 or (cpu.mode is not CpuMode.REAL and cpu.cpl > 0):
        raise CannotComplete("IOPL matters")
    cpu.advance(len(prefixes) + 1)
    if not cpu.regs.rflags & x86.RFLAGS_IF:
        cpu.regs.rflags |= x86.RFLAGS_IF
        cpu.shadow(SHADOW_STI)


def _mov_ss(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    """mov ss, r16.  The processor holds debug traps off until after the next instruction."""
    modrm = rest[1]
    if modrm >> 3 & 7 != 2 or modrm >> 6 != 3:
        raise CannotComplete("another segment register, or from memory")
    number = modrm & 7
    if prefixes[-1:] and prefixes[-1] & 0xF1 == 0x41:  # REX.B
        number += 8
    _load_ss(cpu, getattr(cpu.regs, REGISTERS[number]) & 0xFFFF)
    cpu.advance(len(prefixes) + 2)


def _pop_ss(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    """The same from the stack; in 64-bit mode there is no such instruction."""
    if cpu.mode not in (CpuMode.REAL, CpuMode.PROTECTED16, CpuMode.PROTECTED32):
        raise CannotComplete("#UD, or a mode in which no kernel runs")
    stack = linear_address(cpu.sregs.ss.base, cpu.regs.rsp, cpu.mode)
    selector = int.from_bytes(cpu.read(stack, 2), "little")
    _pop(cpu, _operand_size(cpu, prefixes))
    _load_ss(cpu, selector)
    cpu.advance(len(prefixes) + 1)


def _pop(cpu: Cpu, count: int) -> None:
    """Move RSP by `count` bytes; the stack segment's size says how much of it."""
    width = 0xFFFFFFFF if cpu.sregs.ss.db and cpu.mode is not CpuMode.REAL else 0xFFFF
    cpu.regs.rsp = cpu.regs.rsp & ~width | (cpu.regs.rsp + count) & width


def _load_ss(cpu: Cpu, selector: int) -> None:
    if cpu.mode is CpuMode.REAL:
        cpu.sregs.ss.selector, cpu.sregs.ss.base = selector, selector << 4
    elif cpu.mode is CpuMode.V8086 or selector & 3 != cpu.cpl:
        raise CannotComplete("#GP, or virtual-8086 mode")
    else:
        cpu.sregs.ss = _return_stack_segment(cpu, selector, cpu.cpl)
    cpu.shadow(SHADOW_MOV_SS)


REGISTERS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{n}" for n in range(8, 16)),
)

_RFLAGS_LOADABLE = 0x3F7FD7 & ~x86.RFLAGS_VM


def _return_code_segment(cpu: Cpu, selector: int) -> kvm_segment:
    segment = load_descriptor(cpu, selector)
    if not (segment.s and segment.type & 8 and segment.present) or selector & 3 < cpu.cpl:
        raise CannotComplete("#GP or #NP: a bad return code segment")
    if not segment.type & 4 and segment.dpl != selector & 3:
        raise CannotComplete("#GP: a code segment of another privilege level")
    segment.dpl, segment.selector = selector & 3, selector
    return segment


def _return_stack_segment(cpu: Cpu, selector: int, new_cpl: int) -> kvm_segment:
    if not selector & ~3 and new_cpl != 3 and cpu.mode is CpuMode.LONG:
        return x86.flat_segment(selector, code=False, dpl=new_cpl)  # null is fine there
    segment = load_descriptor(cpu, selector)
    if segment.dpl != new_cpl or not segment.present or segment.type & 0xA != 2 or not segment.s:
        raise CannotComplete("#GP or #SS: a bad return stack segment")
    return segment


def _forget_privileged_segments(cpu: Cpu, new_cpl: int) -> None:
    """A return to an outer level must not leave inner data segments usable."""
    for name in ("ds", "es", "fs", "gs"):
        segment = getattr(cpu.sregs, name)
        if segment.selector & ~3 and segment.dpl < new_cpl:
            segment.selector, segment.base, segment.unusable, segment.present = 0, 0, 1, 0


def _hlt(cpu: Cpu, prefixes: bytes, rest: bytes) -> None:
    """Only ever a step over it, whose trap ends the halt on a processor, too."""
    if cpu.mode is CpuMode.V8086 or (cpu.mode is not CpuMode.REAL and cpu.cpl > 0):
        raise CannotComplete("#GP")
    cpu.advance(len(prefixes) + 1)


INSTRUCTIONS: tuple[tuple[bytes, Callable[[Cpu, bytes, bytes], None]], ...] = (
    (b"\xcc", _int3),
    (b"\xcd", _int_n),
    (b"\x9c", _pushf),
    (b"\x0f\x05", _syscall),
    (b"\x0f\x07", _sysret),
    (b"\xcf", _iret),
    (b"\xfb", _sti),
    (b"\x8e", _mov_ss),
    (b"\x17", _pop_ss),
    (b"\xf4", _hlt),
)
_FIRST_BYTES = {opcode[:1] for opcode, _ in INSTRUCTIONS}


# --- interrupt delivery ------------------------------------------------------------------------


class _Stack:
    """Pushes that are kept until store(), so that a fault on the way leaves nothing behind."""

    def __init__(
        self, cpu: Cpu, size: int, rsp: int | None = None, base: int | None = None
    ) -> None:
        self._cpu, self._size = cpu, size
        self._rsp = cpu.regs.rsp if rsp is None else rsp
        self._base = cpu.sregs.ss.base if base is None else base
        self._pushed = b""

    def push(self, *values: int) -> _Stack:
        for value in values:
            mask = (1 << 8 * self._size) - 1
            self._pushed = (value & mask).to_bytes(self._size, "little") + self._pushed
        return self

    def store(self) -> None:
        """Write what was pushed, and RSP."""
        cpu = self._cpu
        rsp = self._rsp - len(self._pushed)
        if cpu.mode is CpuMode.LONG:
            rsp &= 0xFFFFFFFFFFFFFFFF
        else:  # the stack segment's size says how much of RSP moves
            width = 0xFFFFFFFF if cpu.sregs.ss.db else 0xFFFF
            rsp = self._rsp & ~width | rsp & width
        cpu.write(linear_address(self._base, rsp, cpu.mode), self._pushed)
        cpu.regs.rsp = rsp


def deliver(cpu: Cpu, vector: int, external: bool = False) -> None:
    """Deliver software interrupt `vector` through the guest's IDT or IVT, RIP being the return
    address already; or an `external` one, for which every gate is good.

    Intel SDM vol. 3A, "Interrupt and Exception Handling"; vol. 1, "Interrupts in Real-Address
    Mode".  Raises CannotComplete, or what Cpu.read and Cpu.write raise.
    """
    mode = cpu.mode
    if mode is CpuMode.REAL:
        _deliver_real(cpu, vector)
    elif mode is CpuMode.V8086:
        raise CannotComplete("virtual-8086 mode")
    elif cpu.sregs.efer & x86.EFER_LMA:
        _deliver_long(cpu, vector, external)
    else:
        _deliver_protected(cpu, vector, external)
    cpu.regs.rflags &= ~(x86.RFLAGS_TF | x86.RFLAGS_NT | x86.RFLAGS_RF | x86.RFLAGS_VM)


def _deliver_real(cpu: Cpu, vector: int) -> None:
    _check_limit(cpu, 4 * vector + 3)
    offset, selector = struct.unpack("<HH", cpu.read(cpu.sregs.idt.base + 4 * vector, 4))
    stack = _Stack(cpu, 2).push(cpu.regs.rflags, cpu.sregs.cs.selector, cpu.regs.rip)
    stack.store()
    cpu.sregs.cs.selector, cpu.sregs.cs.base = selector, selector << 4
    cpu.regs.rip = offset
    cpu.regs.rflags &= ~x86.RFLAGS_IF


def _deliver_long(cpu: Cpu, vector: int, external: bool) -> None:
    _check_limit(cpu, 16 * vector + 15)
    low, high, _ = struct.unpack("<QII", cpu.read(cpu.sregs.idt.base + 16 * vector, 16))
    kind = _check_gate(cpu, low, external)
    selector = low >> 16 & 0xFFFF
    target = _load_code_segment(cpu, selector)
    if not target.l:
        raise CannotComplete("#GP: the handler is not 64-bit code")
    ist = low >> 32 & 7
    rsp = cpu.regs.rsp
    if ist:
        rsp = _read_u64(cpu, cpu.sregs.tr.base + 0x24 + 8 * (ist - 1))
    elif target.dpl != cpu.cpl:
        rsp = _read_u64(cpu, cpu.sregs.tr.base + 4 + 8 * target.dpl)
    old = cpu.regs
    frame = (cpu.sregs.ss.selector, old.rsp, old.rflags, cpu.sregs.cs.selector, old.rip)
    if target.dpl != cpu.cpl:
        # The processor loads a null selector whose RPL is the new CPL; usable all the same.
        cpu.sregs.ss = x86.flat_segment(target.dpl, code=False, dpl=target.dpl)
    cpu.sregs.cs = target
    _Stack(cpu, 8, rsp & ~0xF, 0).push(*frame).store()
    _enter_handler(cpu, kind, low & 0xFFFF | low >> 32 & 0xFFFF0000 | high << 32)


def _deliver_protected(cpu: Cpu, vector: int, external: bool) -> None:
    _check_limit(cpu, 8 * vector + 7)
    gate = _read_u64(cpu, cpu.sregs.idt.base + 8 * vector)
    kind = _check_gate(cpu, gate, external)
    target = _load_code_segment(cpu, gate >> 16 & 0xFFFF)
    old, old_cs, old_ss = cpu.regs, cpu.sregs.cs.selector, cpu.sregs.ss.selector
    size = 2 if kind in (x86.TYPE_INTERRUPT_GATE16, x86.TYPE_TRAP_GATE16) else 4
    frame: tuple[int, ...] = (old.rflags, old_cs, old.rip)
    if target.dpl != cpu.cpl:
        if cpu.sregs.tr.type | 2 != x86.TYPE_TSS32_BUSY:
            raise CannotComplete("a 16-bit TSS")
        esp, ss = struct.unpack("<IH", cpu.read(cpu.sregs.tr.base + 4 + 8 * target.dpl, 6))
        frame = (old_ss, old.rsp, *frame)
        stack_segment = load_descriptor(cpu, ss)
        if not stack_segment.present or stack_segment.dpl != target.dpl:
            raise CannotComplete("#TS: the TSS names a bad stack segment")
        cpu.sregs.ss = stack_segment
        stack = _Stack(cpu, size, esp, stack_segment.base)
    else:
        stack = _Stack(cpu, size)
    stack.push(*frame).store()
    cpu.sregs.cs = target
    _enter_handler(cpu, kind, gate & 0xFFFF | (gate >> 32 & 0xFFFF0000 if size == 4 else 0))


def _enter_handler(cpu: Cpu, kind: int, offset: int) -> None:
    cpu.regs.rip = offset
    if kind in (x86.TYPE_INTERRUPT_GATE, x86.TYPE_INTERRUPT_GATE16):
        cpu.regs.rflags &= ~x86.RFLAGS_IF


def _check_limit(cpu: Cpu, last_byte: int) -> None:
    if last_byte > cpu.sregs.idt.limit:
        raise CannotComplete("#GP: beyond the IDT's limit")


def _check_gate(cpu: Cpu, gate: int, external: bool) -> int:
    """The type of an interrupt or trap gate; one that this privilege level, or no program, uses."""
    kind, dpl, present = gate >> 40 & 0x1F, gate >> 45 & 3, gate >> 47 & 1
    gates = [x86.TYPE_INTERRUPT_GATE, x86.TYPE_TRAP_GATE]
    if not cpu.sregs.efer & x86.EFER_LMA:
        gates += [x86.TYPE_INTERRUPT_GATE16, x86.TYPE_TRAP_GATE16]
    if kind not in gates or not present or (dpl < cpu.cpl and not external):
        raise CannotComplete("#GP or #NP, or a task gate")
    return kind


def _load_code_segment(cpu: Cpu, selector: int) -> kvm_segment:
    segment = load_descriptor(cpu, selector)
    is_code = segment.s and segment.type & 8
    if not (is_code and segment.present) or segment.dpl > cpu.cpl:
        raise CannotComplete("#GP or #NP: a bad code segment")
    if segment.type & 4:  # conforming: the privilege level stays
        segment.dpl = cpu.cpl
    segment.selector = selector & ~3 | segment.dpl
    return segment


def load_descriptor(cpu: Cpu, selector: int) -> kvm_segment:
    """The segment that `selector` names in the GDT."""
    if selector & 4 or not selector & ~3 or (selector | 7) > cpu.sregs.gdt.limit:
        raise CannotComplete("in the LDT, null, or beyond the GDT's limit")
    raw = _read_u64(cpu, cpu.sregs.gdt.base + (selector & ~7))
    limit = raw & 0xFFFF | raw >> 32 & 0xF0000
    return kvm_segment(
        base=raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000,
        limit=limit << 12 | 0xFFF if raw >> 55 & 1 else limit,
        selector=selector,
        type=raw >> 40 & 0xF,
        s=raw >> 44 & 1,
        dpl=raw >> 45 & 3,
        present=raw >> 47 & 1,
        avl=raw >> 52 & 1,
        l=raw >> 53 & 1,
        db=raw >> 54 & 1,
        g=raw >> 55 & 1,
    )


def _read_u64(cpu: Cpu, gva: int) -> int:
    return int.from_bytes(cpu.read(gva, 8), "little")

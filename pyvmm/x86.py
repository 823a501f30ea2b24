"""The processor's own numbers: flag bits, segments, selectors, exception vectors, MSRs.

Source: Intel SDM vol. 3A, "System Architecture Overview" and "Protected-Mode Memory Management",
unless a line says otherwise.
"""

from __future__ import annotations

from enum import Enum

from pyvmm.kvm import kvm_segment, kvm_sregs

CR0_PE = 1 << 0  # protected mode
CR0_MP = 1 << 1
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31  # paging

CR4_PAE = 1 << 5
CR4_OSFXSR = 1 << 9  # the OS saves SSE state: without it, SSE instructions are #UD
CR4_OSXMMEXCPT = 1 << 10

EFER_SCE = 1 << 0  # syscall and sysret exist
EFER_LME = 1 << 8  # long mode wanted
EFER_LMA = 1 << 10  # long mode active
EFER_NXE = 1 << 11

RFLAGS_FIXED = 1 << 1  # always 1
RFLAGS_TF = 1 << 8  # trap after the next instruction
RFLAGS_IF = 1 << 9  # interrupts enabled
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16  # no instruction breakpoint on the next instruction
RFLAGS_VM = 1 << 17  # virtual-8086 mode

# The one-byte instructions that leave a guest: what a debugger plants in its code.
HLT, INT3 = 0xF4, 0xCC

DR6_BS = 1 << 14  # the trap is a single step
DR6_HITS = 0xF  # bit n: DRn matched

VECTOR_DB, VECTOR_NMI, VECTOR_BP, VECTOR_UD, VECTOR_DF = 1, 2, 3, 6, 8
VECTOR_TS, VECTOR_NP, VECTOR_SS, VECTOR_GP, VECTOR_PF = 10, 11, 12, 13, 14
VECTOR_AC, VECTOR_CP = 17, 21
VECTORS_WITH_ERROR_CODE = frozenset(
    {VECTOR_DF, VECTOR_TS, VECTOR_NP, VECTOR_SS, VECTOR_GP, VECTOR_PF, VECTOR_AC, VECTOR_CP}
)

MSR_EFER = 0xC0000080
MSR_STAR = 0xC0000081  # syscall: selectors
MSR_LSTAR = 0xC0000082  # syscall: RIP in 64-bit mode
MSR_SYSCALL_MASK = 0xC0000084  # syscall: the RFLAGS bits to clear
MSR_KERNEL_GS_BASE = 0xC0000102

# Types of code and data segments and of gates (SDM vol. 3A, "Segment Descriptors").
TYPE_CODE = 0xB  # execute, read, accessed
TYPE_DATA = 0x3  # read, write, accessed
TYPE_TSS32_BUSY = 0xB
TYPE_INTERRUPT_GATE16, TYPE_TRAP_GATE16 = 0x6, 0x7
TYPE_INTERRUPT_GATE, TYPE_TRAP_GATE = 0xE, 0xF

_PREFIXES = b"\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65"  # all but LOCK
_PREFIXES_LONG = _PREFIXES + bytes(range(0x40, 0x50))  # REX
_MAX_INSTRUCTION = 15  # bytes (SDM vol. 2A, "Instruction Format")


class CpuMode(Enum):
    """How the processor reads code at CS:RIP; the value is what people call it."""

    REAL = "16-bit real mode"
    V8086 = "virtual-8086 mode"
    PROTECTED16 = "16-bit protected mode"
    PROTECTED32 = "32-bit protected mode"
    COMPAT16 = "16-bit compatibility mode"
    COMPAT32 = "32-bit compatibility mode"
    LONG = "64-bit mode"


def cpu_mode(sregs: kvm_sregs, rflags: int = 0) -> CpuMode:
    """The mode that CR0, EFER, RFLAGS and CS put the processor in."""
    if not sregs.cr0 & CR0_PE:
        return CpuMode.REAL
    if rflags & RFLAGS_VM:
        return CpuMode.V8086
    if sregs.efer & EFER_LMA:
        if sregs.cs.l:
            return CpuMode.LONG
        return CpuMode.COMPAT32 if sregs.cs.db else CpuMode.COMPAT16
    return CpuMode.PROTECTED32 if sregs.cs.db else CpuMode.PROTECTED16


def linear_address(segment_base: int, offset: int, mode: CpuMode) -> int:
    """The GVA of `offset` in a segment; outside of 64-bit mode they are 32 bits wide."""
    if mode is CpuMode.LONG:
        return offset & 0xFFFFFFFFFFFFFFFF  # CS, DS, ES and SS have base 0 there
    return (segment_base + offset) & 0xFFFFFFFF


def flat_segment(selector: int, *, code: bool, bits: int = 32, dpl: int = 0) -> kvm_segment:
    """A segment of base 0 that spans 4 GiB (`bits` 32 or 64) or 64 KiB (`bits` 16)."""
    return kvm_segment(
        base=0,
        limit=0xFFFF if bits == 16 else 0xFFFFFFFF,
        selector=selector,
        type=TYPE_CODE if code else TYPE_DATA,
        present=1,
        dpl=dpl,
        s=1,
        db=bits == 32 or (bits == 64 and not code),
        l=bits == 64 and code,
        g=bits != 16,
    )


def descriptor(segment: kvm_segment) -> int:
    """The 8-byte GDT entry of a segment, as the number that is stored little-endian."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return int(
        (limit & 0xFFFF)
        | (segment.base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def split_prefixes(code: bytes, mode: CpuMode) -> tuple[bytes, bytes]:
    """Split instruction bytes into (prefixes incl. REX, the rest).  LOCK counts as no prefix."""
    rest = skip_prefixes(code, mode)
    return code[: len(code) - len(rest)], rest


def skip_prefixes(code: bytes, mode: CpuMode) -> bytes:
    """The rest alone."""
    prefixes = _PREFIXES_LONG if mode is CpuMode.LONG else _PREFIXES
    return code[:_MAX_INSTRUCTION].lstrip(prefixes) + code[_MAX_INSTRUCTION:]


def int3_length(code: bytes, mode: CpuMode) -> int | None:
    """The length in bytes of the int3 that `code` begins with; None when it is anything else.

    `CC` with any prefixes is an int3.  `CD 03` is `INT n` and not one: it never raises a BPT exit
    (SDM vol. 3C, "Information for VM Exits Due to Vectored Events": software exception against
    software interrupt).
    """
    prefixes, rest = split_prefixes(code, mode)
    if rest[:1] == b"\xcc" and len(prefixes) < _MAX_INSTRUCTION:
        return len(prefixes) + 1
    return None

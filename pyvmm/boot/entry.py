"""The state in which a guest's first instruction finds the processor, for each Mode.

Long mode needs structures in guest memory, which lie where no PC keeps anything else:

    0x1000  page tables: the first 4 GiB mapped one to one, in 2 MiB pages
    0x7000  GDT: null, 64-bit code 0x08, data 0x10, 32-bit code 0x18, or as the protocol has it
    0x80000 the initial stack grows down from here, 4 KiB further down for each further vCPU

Protected mode gets the same GDT and stack.  In all modes interrupts are off, and vCPU n finds n in
EDI.  A boot protocol may say what is in other registers.

Source: Intel SDM vol. 3A, "Processor Management and Initialization".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pyvmm import handles, kvm, x86
from pyvmm.boot.image import GIB, MIB, Mode, Selectors, real_mode_entry
from pyvmm.memory import GuestMemory

PAGE_TABLES_GPA, GDT_GPA, STACK_TOP = 0x1000, 0x7000, 0x80000
STACK_BYTES = 0x1000  # a vCPU, where there are several
REAL_MODE_STACK_TOP, REAL_MODE_STACK_BYTES = 0x7C00, 0x400
LOWEST_STACK, LOWEST_REAL_MODE_STACK = 0x8000, 0x1000

# What an image must not overlap, as check_fits() takes it: GPA, bytes, name.
RESERVED = {
    Mode.LONG: [(PAGE_TABLES_GPA, 0x7000, "the boot page tables and GDT")],
    Mode.PROTECTED: [(GDT_GPA, 0x1000, "the boot GDT")],
    Mode.REAL: [],
}

_DEFAULT_SELECTORS = Selectors()
_TSS_LIMIT = 0x67  # of a TSS without an I/O bitmap

_PRESENT_WRITABLE, _LARGE_PAGE = 0x3, 0x80


def identity_map(gpa: int) -> bytes:
    """Page tables for GPA `gpa` that map the first 4 GiB one to one: PML4, PDPT, 4 directories."""
    pdpt, directories = gpa + 0x1000, gpa + 0x2000
    pml4 = struct.pack("<Q", pdpt | _PRESENT_WRITABLE).ljust(0x1000, b"\0")
    entries = [directories + 0x1000 * n | _PRESENT_WRITABLE for n in range(4)]
    pages = range(_PRESENT_WRITABLE | _LARGE_PAGE, 4 * GIB, 2 * MIB)
    return pml4 + struct.pack("<4Q", *entries).ljust(0x1000, b"\0") + struct.pack("<2048Q", *pages)


def check_stacks(mode: Mode, cpus: int) -> None:
    """Raise ValueError unless there is room for the initial stack of each vCPU."""
    room = (STACK_TOP - LOWEST_STACK) // STACK_BYTES
    if mode is Mode.REAL:
        room = (REAL_MODE_STACK_TOP - LOWEST_REAL_MODE_STACK) // REAL_MODE_STACK_BYTES
    if cpus > room:
        raise ValueError(f"{cpus} vCPUs: in {mode.value} mode there are stacks for {room}")


def write_boot_structures(
    memory: GuestMemory, mode: Mode, selectors: Selectors = _DEFAULT_SELECTORS
) -> None:
    """Put the page tables and the GDT that `mode` needs into guest memory."""
    if mode is Mode.REAL:
        return
    for segment in (
        x86.flat_segment(selectors.code64, code=True, bits=64),
        x86.flat_segment(selectors.data, code=False),
        x86.flat_segment(selectors.code32, code=True),
    ):
        memory.write(GDT_GPA + segment.selector, struct.pack("<Q", x86.descriptor(segment)))
    if mode is Mode.LONG:
        memory.write(PAGE_TABLES_GPA, identity_map(PAGE_TABLES_GPA))


def set_entry_state(
    vcpu: handles.VcpuHandle,
    vcpu_id: int,
    mode: Mode,
    entry: int,
    registers: Iterable[tuple[str, int]] = (),
    selectors: Selectors = _DEFAULT_SELECTORS,
) -> None:
    """Set the registers of a new vCPU so that it starts at GPA `entry` in `mode`.

    `registers` are those that the boot protocol fills: name in kvm_regs or kvm_sregs, and value.
    """
    regs = kvm.kvm_regs(rflags=x86.RFLAGS_FIXED, rip=entry, rdi=vcpu_id)
    regs.rsp = STACK_TOP - STACK_BYTES * vcpu_id
    sregs = vcpu.get(kvm.kvm_sregs)
    if mode is Mode.REAL:
        selector, regs.rip = real_mode_entry(entry)
        sregs.cs.selector, sregs.cs.base = selector, selector << 4
        regs.rsp = REAL_MODE_STACK_TOP - REAL_MODE_STACK_BYTES * vcpu_id
    else:
        sregs.gdt.base, sregs.gdt.limit = GDT_GPA, 4 * 8 - 1
        sregs.idt.base = sregs.idt.limit = 0
        data = x86.flat_segment(selectors.data, code=False)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.cs = x86.flat_segment(selectors.code32, code=True)
        sregs.tr.type, sregs.tr.limit = x86.TYPE_TSS32_BUSY, _TSS_LIMIT  # not a 16-bit TSS
        # Compilers emit SSE instructions, also for kernels that never asked for them.
        sregs.cr0 = x86.CR0_PE | x86.CR0_MP | x86.CR0_ET | x86.CR0_NE  # caches on: no CD, no NW
        sregs.cr4 |= x86.CR4_OSFXSR | x86.CR4_OSXMMEXCPT
    if mode is Mode.LONG:
        sregs.cs = x86.flat_segment(selectors.code64, code=True, bits=64)
        sregs.cr3 = PAGE_TABLES_GPA
        sregs.cr4 |= x86.CR4_PAE
        sregs.cr0 |= x86.CR0_PG
        sregs.efer |= x86.EFER_LME | x86.EFER_LMA
    for name, value in registers:
        setattr(regs if hasattr(regs, name) else sregs, name, value)
    vcpu.set(sregs)
    vcpu.set(regs)

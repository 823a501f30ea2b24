"""A Linux kernel in guest memory: its symbols, where it runs, and its memory by its own addresses.

The page tables are the kernel's own (init_top_pgt), not those that a vCPU happens to use: while a
program runs, those may have next to nothing of the kernel (page-table isolation).

Source: Linux, Documentation/arch/x86/x86_64/mm.rst; arch/x86/boot/compressed/kaslr.c.
"""

from __future__ import annotations

import re
from functools import cached_property

from pyvmm.errors import GuestMemoryError
from pyvmm.kvm import kvm_sregs
from pyvmm.linux import kallsyms
from pyvmm.linux.kallsyms import IMAGE_ALIGNMENT, KERNEL_HALF, Kallsyms
from pyvmm.mappings import mappings
from pyvmm.memory import GuestMemory, MemorySlot, VirtualMemory
from pyvmm.paging import (
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    EFER_LME,
    EFER_NXE,
    PagingMode,
    PagingRegisters,
    TranslationFault,
    paging_mode,
)
from pyvmm.symbols import Symbols

_BANNER = re.compile(b"Linux version ")  # linux_banner begins with it
_PREF_ADDRESS = 0x258  # in boot_params: the GPA that the kernel is linked for
_DEFAULT_PREF_ADDRESS = 16 << 20  # CONFIG_PHYSICAL_START, of nearly every kernel
_KERNEL_MODES = (PagingMode.LEVEL4, PagingMode.LEVEL5)
_MAX_RANGES, _MAX_ENTRIES = 64, 1 << 16  # text, data, what is between; and then modules
_QUICK_BYTES = 128 << 20
_CODE = "tTwW"  # nm's letters for code


class LinuxError(Exception):
    """What is asked for cannot be found: a message of one line."""


def find(memory: GuestMemory, sregs: kvm_sregs) -> Kernel:
    """The Linux kernel in guest memory; `sregs` are a vCPU's.  Raises LinuxError if there is none.

    It is looked for where the vCPU's page tables have it, and then everywhere.
    """
    everywhere = [(slot, 0, slot.size) for slot in memory.slots]
    for parts in (_mapped(memory, sregs), everywhere):
        patience = kallsyms.Patience()
        for slot, begin, end in parts:
            table = kallsyms.find(slot.pages, begin, end, patience)
            if table is not None:
                return Kernel(memory, slot, table, sregs.cr4)
    raise LinuxError("no symbol table of a 64-bit Linux kernel in memory (not unpacked yet?)")


def find_moved_base(memory: GuestMemory, sregs: kvm_sregs) -> int | None:
    """Where the kernel begins, if that is not where nearly every kernel is linked for.

    Only for who cannot wait: the rest of memory is not looked at.
    """
    left, patience = _QUICK_BYTES, kallsyms.Patience()
    for slot, begin, end in _mapped(memory, sregs):
        end = min(end, begin + left)
        left -= end - begin
        base = kallsyms.find_base(slot.pages, begin, end, patience)
        if base is not None:
            return base if base != KERNEL_HALF + _DEFAULT_PREF_ADDRESS else None
    return None


def _mapped(memory: GuestMemory, sregs: kvm_sregs) -> list[tuple[MemorySlot, int, int]]:
    """What a vCPU's page tables map where the kernel is: parts of slots, by their offsets."""
    registers = PagingRegisters.of(sregs)
    if paging_mode(sregs.cr0, sregs.cr4, sregs.efer) not in _KERNEL_MODES:
        return []
    found = mappings(
        memory.read,
        registers,
        start_gva=KERNEL_HALF,
        max_ranges=_MAX_RANGES,
        max_entries=_MAX_ENTRIES,
    )
    parts = []
    for mapping in found.ranges:
        for slot in memory.slots:
            begin, end = mapping.gpa - slot.gpa, mapping.gpa + mapping.length - slot.gpa
            if begin < slot.size and end > 0:
                parts.append((slot, max(0, begin), min(end, slot.size)))
    return parts


class Kernel:
    """One kernel, as it is found; a reset or kexec replaces it."""

    def __init__(self, memory: GuestMemory, slot: MemorySlot, table: Kallsyms, cr4: int) -> None:
        """`slot` is where `table` was found."""
        self.base = table.base
        self.symbols = table.symbols
        self._memory, self._slot, self._cr4 = memory, slot, cr4
        self._gvas = {symbol.name: symbol.gva for symbol in reversed(table.symbols)}

    def gva(self, name: str) -> int:
        """Where a symbol is.  Raises LinuxError if the kernel has no such name."""
        try:
            return self._gvas[name]
        except KeyError:
            raise LinuxError(f"the kernel has no symbol {name}") from None

    def code(self) -> Symbols:
        """The names of functions."""
        # In the kernel's order the best of several names of one address is the first one.
        return Symbols((s.gva, s.name if s.kind in _CODE else "") for s in reversed(self.symbols))

    @cached_property
    def gpa(self) -> int:
        """Where the kernel's first page is in guest-physical memory.  Raises LinuxError."""
        offset = self.gva("linux_banner") - self.base
        for match in _BANNER.finditer(self._slot.pages):
            begin = match.start() - offset
            if begin >= 0 and begin % IMAGE_ALIGNMENT == 0:
                return self._slot.gpa + begin
        raise LinuxError("the kernel's banner is not in memory")

    @property
    def link_base(self) -> int:
        """The address that the kernel was linked for.  Raises LinuxError."""
        gpa = self.gpa + self.gva("boot_params") - self.base + _PREF_ADDRESS
        preferred = int.from_bytes(self._memory.read(gpa, 8), "little")
        return KERNEL_HALF + (preferred or _DEFAULT_PREF_ADDRESS)

    def read(self, gva: int, length: int) -> bytes:
        """`length` bytes of kernel memory.  Raises LinuxError where nothing is mapped."""
        sregs = kvm_sregs()
        sregs.cr0, sregs.efer = CR0_PG, EFER_LME | EFER_NXE
        sregs.cr4 = CR4_PAE | self._cr4 & CR4_LA57
        sregs.cr3 = self.gpa + self.gva("init_top_pgt") - self.base
        try:
            return VirtualMemory(self._memory, sregs).read(gva, length)
        except (TranslationFault, GuestMemoryError) as error:
            raise LinuxError(str(error)) from None

    def number(self, gva: int, length: int = 8) -> int:
        """An unsigned integer in kernel memory.  Raises LinuxError."""
        return int.from_bytes(self.read(gva, length), "little")

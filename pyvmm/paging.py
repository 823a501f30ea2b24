"""Paging: from a guest virtual address (gva) to a guest physical address (gpa), in software.

The processor walks the guest's page tables by itself; a debugger has to do it again, because it is
handed guest virtual addresses and can read only guest physical memory. This module is that walk, as
pure functions: the page tables come from a callback `read_physical(gpa, length) -> bytes`, which
raises `GuestMemoryError` where there is no RAM, and the rest comes from the control registers.
Nothing here knows of KVM.

Source: Intel SDM vol. 3A, chapter "Paging". Each level of each mode is one row in `layout_of`; the
walk itself is one loop that knows no mode.

Left out on purpose: permission checks (a debugger reads and writes as CPL 0 and ignores write
protection, SMEP, SMAP and protection keys; what the tables permit is reported, not enforced),
accessed and dirty bits (looking must not change the guest), the TLB (memory is the truth here, a
processor may still use an older translation), and linear-address masking (LAM).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum

from pyvmm.errors import GuestMemoryError
from pyvmm.light import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pyvmm.kvm import kvm_sregs

ReadPhysical = Callable[[int, int], bytes]

# The control bits that choose a paging mode. SDM vol. 3A, "Control Registers" and "Extended Feature
# Enable Register".
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
EFER_LME = 1 << 8
EFER_NXE = 1 << 11

# The bits of a paging-structure entry. SDM vol. 3A, the tables of section "4-Level Paging and
# 5-Level Paging".
ENTRY_P = 1 << 0  # present
ENTRY_RW = 1 << 1  # writes allowed
ENTRY_US = 1 << 2  # user-mode accesses allowed
ENTRY_PS = 1 << 7  # "page size": the entry maps a large page. In a PTE this bit is PAT
ENTRY_XD = 1 << 63  # execute-disable

GVA32_MASK = (1 << 32) - 1


def _bits(high: int, low: int) -> int:
    """A mask with the bits high..low set, as the SDM writes "bits 29:13"; 0 when high < low."""
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


ADDRESS_MASK = _bits(51, 12)  # where an entry of any format holds a physical address


class PagingMode(Enum):
    """How gvas are translated. SDM vol. 3A, "Four Paging Modes" (and none)."""

    NONE = "no paging"
    BITS32 = "32-bit paging"
    PAE = "PAE paging"
    LEVEL4 = "4-level paging"
    LEVEL5 = "5-level paging"


class PagingRegisters(NamedTuple):
    """The registers that decide a translation, as in `kvm_sregs`.

    `maxphyaddr` is the width of physical addresses in bits (CPUID 80000008H:EAX[7:0]); address bits
    above it are reserved in every entry. The default, the architectural limit, finds no such fault.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    maxphyaddr: int = 52

    @classmethod
    def of(cls, sregs: kvm_sregs) -> PagingRegisters:
        """Those of a vCPU."""
        return cls(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)


class FaultReason(Enum):
    """Why a gva has no gpa."""

    NON_CANONICAL = "the address is not canonical"
    TOO_WIDE = "outside of 64-bit mode addresses have 32 bits"
    NOT_PRESENT = "not present"
    RESERVED = "a reserved bit is set"
    NOT_RAM = "the page table is outside guest RAM"


class Fault(NamedTuple):
    """Where a walk ended without a gpa; `level` is "" and `entry_gpa` None before the first one."""

    reason: FaultReason
    level: str = ""
    entry_gpa: int | None = None

    def __str__(self) -> str:
        if self.entry_gpa is None:
            return self.reason.value
        return f"{self.level} at {self.entry_gpa:#x}: {self.reason.value}"


class TranslationFault(Exception):
    """`find_page` found no gpa for `gva`; `fault` says at which level and why."""

    def __init__(self, gva: int, fault: Fault) -> None:
        super().__init__(f"guest virtual address {gva:#x}: {fault}")
        self.gva = gva
        self.fault = fault


class Permissions(NamedTuple):
    """What all levels together allow. Supervisor reads are always allowed.

    A supervisor's writes to a page that is not `writable` still succeed while CR0.WP is clear.
    """

    writable: bool
    user: bool
    no_execute: bool

    def __str__(self) -> str:
        """Like `rwxu`, with a dash for what is missing."""
        return (
            "r"
            + ("w" if self.writable else "-")
            + ("-" if self.no_execute else "x")
            + ("u" if self.user else "-")
        )


class WalkStep(NamedTuple):
    """One entry that a walk visited: `name` is PML5E, PML4E, PDPTE, PDE or PTE.

    `entry_gpa` is where the entry lies, `value` its 4 or 8 bytes as a number, and `flags` the
    SDM's names of the flags that are set in it (none when it is not present: the processor then
    ignores all other bits).
    """

    name: str
    entry_gpa: int
    value: int
    flags: tuple[str, ...]


class Walk(NamedTuple):
    """A translation with all of its steps: either `gpa` or `fault` is None.

    `gva` is the address that was really translated: without 64-bit paging only its low 32 bits
    count. `page_bytes` is the size of the page that holds `gpa`, or 0; `permissions` is what the
    visited levels allow, also when a fault cut the walk short.
    """

    mode: PagingMode
    gva: int
    steps: tuple[WalkStep, ...]
    gpa: int | None
    page_bytes: int
    permissions: Permissions
    fault: Fault | None


class Level(NamedTuple):
    """One level of a paging mode: a row of the SDM's tables of entry formats.

    The index into the table is the `index_bits` bits of the gva from bit `shift` up, so an entry
    covers 2**shift bytes. The reserved masks are the bits that must be 0 in an entry that refers
    to a table, and in one that maps a page.
    """

    name: str
    shift: int
    index_bits: int
    table_reserved: int = 0
    page_reserved: int = 0
    large_page: bool = False  # ENTRY_PS chooses between a page and the next table
    pse36: bool = False  # a 4 MiB page: gpa bits 39:32 are in bits 20:13 of the entry
    has_rights: bool = True  # False: the entry has no R/W, U/S and XD bits

    def maps_page(self, entry: int) -> bool:
        """Whether a present entry of this level ends the walk. A PTE always does."""
        return self.shift == 12 or (self.large_page and entry & ENTRY_PS != 0)

    def page_gpa(self, entry: int) -> int:
        """The gpa of the page that `entry` maps."""
        gpa = entry & ADDRESS_MASK & -(1 << self.shift)
        if self.pse36:
            gpa |= (entry >> 13 & 0xFF) << 32
        return gpa


class Layout(NamedTuple):
    """A paging mode with everything a walk needs to know of it.

    `entry_bytes` and `entry_format`, as `struct` knows it, are the size and layout of an entry.
    """

    mode: PagingMode
    entry_bytes: int
    entry_format: str
    root_gpa: int
    levels: tuple[Level, ...]

    @property
    def gva_bits(self) -> int:
        """How many low bits of a gva are translated."""
        return self.levels[0].shift + self.levels[0].index_bits


# R/W, U/S and the *inverse* of XD are kept in one number, because then a level takes permissions
# away with one AND, whatever they are.
ALL_RIGHTS = ENTRY_RW | ENTRY_US | ENTRY_XD


def permissions_of(rights: int) -> Permissions:
    return Permissions(
        writable=rights & ENTRY_RW != 0,
        user=rights & ENTRY_US != 0,
        no_execute=rights & ENTRY_XD == 0,
    )


def paging_mode(cr0: int, cr4: int, efer: int) -> PagingMode:
    """The paging mode that these control registers select (SDM vol. 3A, "Four Paging Modes")."""
    if not cr0 & CR0_PG:
        return PagingMode.NONE
    if not cr4 & CR4_PAE:
        return PagingMode.BITS32
    if not efer & EFER_LME:
        return PagingMode.PAE
    return PagingMode.LEVEL5 if cr4 & CR4_LA57 else PagingMode.LEVEL4


def gva_end(registers: PagingRegisters) -> int:
    """Behind the last gva that a program can use: 32 bits wide outside of 64-bit mode.

    `find_page` and `walk` take higher ones, too, and let them wrap around; who does not want that
    looks here, and may use FaultReason.TOO_WIDE.
    """
    mode = paging_mode(registers.cr0, registers.cr4, registers.efer)
    return 1 << (64 if mode in (PagingMode.LEVEL4, PagingMode.LEVEL5) else 32)


@functools.lru_cache(maxsize=64)  # a debugger asks with the same registers thousands of times
def layout_of(registers: PagingRegisters) -> Layout:
    """The levels of the paging mode in use, top first. SDM vol. 3A, one section a mode."""
    mode = paging_mode(registers.cr0, registers.cr4, registers.efer)
    if mode is PagingMode.BITS32:
        return _layout_bits32(registers)
    no_xd = 0 if registers.efer & EFER_NXE else ENTRY_XD
    if mode is PagingMode.PAE:
        # Bits 62:52 are ignored in 4-level paging, but reserved here.
        high = no_xd | _bits(62, registers.maxphyaddr)
        # The processor keeps the four PDPTEs in registers that MOV to CR3 loads. They are read
        # from memory here: a guest that changed them without reloading CR3 sees the old ones.
        # They have no R/W, U/S and XD bits: the bits at these places are reserved. So is the one
        # where others have A, but QEMU's SVM sets it, and the guest runs on.
        pdpte_reserved = _bits(63, registers.maxphyaddr) | _bits(8, 6) | _bits(2, 1)
        levels: tuple[Level, ...] = (
            Level("PDPTE", 30, 2, table_reserved=pdpte_reserved, has_rights=False),
            Level("PDE", 21, 9, high, high | _bits(20, 13), large_page=True),
            Level("PTE", 12, 9, page_reserved=high),
        )
        return Layout(mode, 8, "<Q", registers.cr3 & _bits(31, 5), levels)

    high = no_xd | _bits(51, registers.maxphyaddr)
    levels = (
        Level("PML5E", 48, 9, table_reserved=high | ENTRY_PS),
        Level("PML4E", 39, 9, table_reserved=high | ENTRY_PS),
        Level("PDPTE", 30, 9, high, high | _bits(29, 13), large_page=True),
        Level("PDE", 21, 9, high, high | _bits(20, 13), large_page=True),
        Level("PTE", 12, 9, page_reserved=high),
    )
    if mode is PagingMode.LEVEL4:
        levels = levels[1:]
    return Layout(mode, 8, "<Q", registers.cr3 & ADDRESS_MASK, levels)


def _layout_bits32(registers: PagingRegisters) -> Layout:
    """32-bit paging: two levels of 4-byte entries, which have no XD bit and few reserved ones.

    With CR4.PSE a PDE can map 4 MiB, and PSE-36 places that page anywhere below 2**M, where M is
    the smaller of 40 and MAXPHYADDR. Without CR4.PSE the PS bit is ignored.
    """
    pse = registers.cr4 & CR4_PSE != 0
    page_reserved = _bits(21, min(40, registers.maxphyaddr) - 19)
    levels = (
        Level("PDE", 22, 10, page_reserved=page_reserved, large_page=pse, pse36=pse),
        Level("PTE", 12, 10),
    )
    return Layout(PagingMode.BITS32, 4, "<I", registers.cr3 & _bits(31, 12), levels)


def sign_extend(gva: int, bits: int) -> int:
    """The canonical 64-bit address whose low `bits` bits are those of `gva`."""
    sign = 1 << (bits - 1)
    return ((gva & ((sign << 1) - 1)) ^ sign) - sign & (1 << 64) - 1


_Visited = tuple[Level, int, int]  # entry_gpa, entry


def _descend(
    read_physical: ReadPhysical, layout: Layout, gva: int
) -> tuple[list[_Visited], Fault | None]:
    """Follow `gva` down the tables: each entry read, and the fault.

    Without a fault the last entry maps the page.
    """
    visited: list[_Visited] = []
    if layout.gva_bits > 32 and gva != sign_extend(gva, layout.gva_bits):
        return visited, Fault(FaultReason.NON_CANONICAL)
    table_gpa = layout.root_gpa
    for level in layout.levels:
        index = gva >> level.shift & (1 << level.index_bits) - 1
        entry_gpa = table_gpa + index * layout.entry_bytes
        try:
            entry = int.from_bytes(read_physical(entry_gpa, layout.entry_bytes), "little")
        except GuestMemoryError:
            return visited, Fault(FaultReason.NOT_RAM, level.name, entry_gpa)
        visited.append((level, entry_gpa, entry))
        if not entry & ENTRY_P:
            return visited, Fault(FaultReason.NOT_PRESENT, level.name, entry_gpa)
        maps_page = level.maps_page(entry)
        if entry & (level.page_reserved if maps_page else level.table_reserved):
            return visited, Fault(FaultReason.RESERVED, level.name, entry_gpa)
        if maps_page:
            break
        table_gpa = entry & ADDRESS_MASK
    return visited, None


class Page(NamedTuple):
    """Where the gvas of one page lead, and the entries that say so."""

    gpa: int
    page_bytes: int
    entries: tuple[tuple[int, bytes], ...]  # the gpa and the bytes of each


_UNPAGED = Page(0, GVA32_MASK + 1, ())


def find_page(read_physical: ReadPhysical, registers: PagingRegisters, gva: int) -> Page:
    """The page that `gva` lies in, as CPL 0 and without regard to write protection.

    Its gpa need not be RAM: a page can map a device. Without paging all 4 GiB count as one page.
    Where gvas have 32 bits, a higher `gva` wraps around.

    Raises TranslationFault when nothing is mapped at `gva`.
    """
    if not registers.cr0 & CR0_PG:
        return _UNPAGED
    layout = layout_of(registers)
    if layout.gva_bits == 32:
        gva &= GVA32_MASK
    visited, fault = _descend(read_physical, layout, gva)
    if fault is not None:
        raise TranslationFault(gva, fault)
    size = layout.entry_bytes
    entries = tuple((entry_gpa, entry.to_bytes(size, "little")) for _, entry_gpa, entry in visited)
    level, _, entry = visited[-1]
    return Page(level.page_gpa(entry), 1 << level.shift, entries)


def walk(read_physical: ReadPhysical, registers: PagingRegisters, gva: int) -> Walk:
    """Translate `gva` and report every level on the way; a fault is part of the result.

    A table that lies outside RAM ends the walk before its entry is read: there is no step for it.
    """
    mode = paging_mode(registers.cr0, registers.cr4, registers.efer)
    if mode is PagingMode.NONE:
        gva &= GVA32_MASK
        return Walk(mode, gva, (), gva, 1 << 32, permissions_of(ALL_RIGHTS), None)
    layout = layout_of(registers)
    if layout.gva_bits == 32:
        gva &= GVA32_MASK
    visited, fault = _descend(read_physical, layout, gva)

    rights = ALL_RIGHTS
    for level, _, entry in visited:
        if entry & ENTRY_P and level.has_rights:
            rights &= entry ^ ENTRY_XD
    steps = tuple(
        WalkStep(level.name, entry_gpa, entry, _flag_names(level, entry))
        for level, entry_gpa, entry in visited
    )
    if fault is not None:
        return Walk(mode, gva, steps, None, 0, permissions_of(rights), fault)
    level, _, entry = visited[-1]
    page_bytes = 1 << level.shift
    gpa = level.page_gpa(entry) + (gva & (page_bytes - 1))
    return Walk(mode, gva, steps, gpa, page_bytes, permissions_of(rights), None)


_RIGHTS_FLAGS = (("RW", ENTRY_RW), ("US", ENTRY_US), ("XD", ENTRY_XD))
_CACHE_FLAGS = (("PWT", 1 << 3), ("PCD", 1 << 4))
_PAGE_FLAGS = (("D", 1 << 6), ("G", 1 << 8))


def _flag_names(level: Level, entry: int) -> tuple[str, ...]:
    """The SDM's names of the flags set in `entry`; bits that the processor ignores have none."""
    if not entry & ENTRY_P:
        return ()
    flags: tuple[tuple[str, int], ...] = (("P", ENTRY_P), *_CACHE_FLAGS)
    if level.has_rights:
        flags = (("P", ENTRY_P), *_RIGHTS_FLAGS, *_CACHE_FLAGS, ("A", 1 << 5))
    if level.maps_page(entry):
        # Bit 7 is PS, so PAT moves to bit 12, except in a PTE, which needs no PS.
        large = (("PS", ENTRY_PS), ("PAT", 1 << 12))
        flags += _PAGE_FLAGS + (large if level.shift > 12 else (("PAT", 1 << 7),))
    return tuple(name for name, bit in flags if entry & bit)

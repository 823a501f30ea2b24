"""Page-table walks over made-up guest memory: no KVM."""

from __future__ import annotations

import random
import struct

import pytest

from pyvmm.boot.entry import identity_map
from pyvmm.errors import GuestMemoryError
from pyvmm.mappings import MappedRange, mappings
from pyvmm.paging import (
    Fault,
    FaultReason,
    PagingMode,
    PagingRegisters,
    Permissions,
    ReadPhysical,
    TranslationFault,
    Walk,
    find_page,
    paging_mode,
    walk,
)

PE, PG = 1 << 0, 1 << 31
PSE, PAE, LA57 = 1 << 4, 1 << 5, 1 << 12
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11

P, RW, US, PS, XD = 1 << 0, 1 << 1, 1 << 2, 1 << 7, 1 << 63
ALL = P | RW | US

ROOT = 0x1000  # every test's top-level table

RWXU = Permissions(writable=True, user=True, no_execute=False)


class Memory:
    """Guest RAM from gpa 0 on, with the 4- or 8-byte entries written by `entry`."""

    def __init__(self, size: int = 0x10000) -> None:
        self.ram = bytearray(size)
        self.reads = 0

    def read(self, gpa: int, length: int) -> bytes:
        self.reads += 1
        if not 0 <= gpa <= len(self.ram) - length:
            raise GuestMemoryError(gpa, length)
        return bytes(self.ram[gpa : gpa + length])

    def entry(self, table_gpa: int, index: int, value: int, entry_bytes: int = 8) -> None:
        gpa = table_gpa + index * entry_bytes
        self.ram[gpa : gpa + entry_bytes] = value.to_bytes(entry_bytes, "little")


def translate(read: ReadPhysical, regs: PagingRegisters, gva: int) -> int:
    """The gpa, by the page that `gva` lies in."""
    page = find_page(read, regs, gva)
    return page.gpa + gva % page.page_bytes


def registers(mode: PagingMode, *, nxe: bool = True, maxphyaddr: int = 52) -> PagingRegisters:
    """Control registers for `mode`, with the tables at ROOT."""
    cr0 = PE | (0 if mode is PagingMode.NONE else PG)
    cr4 = {
        PagingMode.NONE: 0,
        PagingMode.BITS32: PSE,
        PagingMode.PAE: PAE,
        PagingMode.LEVEL4: PAE,
        PagingMode.LEVEL5: PAE | LA57,
    }[mode]
    efer = LME | LMA if mode in (PagingMode.LEVEL4, PagingMode.LEVEL5) else 0
    return PagingRegisters(cr0, ROOT, cr4, efer | (NXE if nxe else 0), maxphyaddr)


LEVEL4 = registers(PagingMode.LEVEL4)


def chain(memory: Memory, mode: PagingMode, *entries: tuple[int, int]) -> None:
    """Write one (index, value) a level; tables follow ROOT page by page, linked by their entries.

    Each value but the last gets the gpa of the next table added.
    """
    entry_bytes = 4 if mode is PagingMode.BITS32 else 8
    for depth, (index, value) in enumerate(entries):
        table_gpa = ROOT + depth * 0x1000
        link = table_gpa + 0x1000 if depth < len(entries) - 1 else 0
        memory.entry(table_gpa, index, value | link, entry_bytes)


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "mode"),
    [
        (PE, 0, 0, PagingMode.NONE),
        (PE, PAE | LA57, LME, PagingMode.NONE),  # all prepared, paging not yet on
        (PE | PG, 0, 0, PagingMode.BITS32),
        (PE | PG, PSE, NXE, PagingMode.BITS32),
        (PE | PG, PAE, 0, PagingMode.PAE),
        (PE | PG, PAE | LA57, NXE, PagingMode.PAE),  # LA57 counts in long mode only
        (PE | PG, PAE, LME | LMA, PagingMode.LEVEL4),
        (PE | PG, PAE | LA57, LME | LMA, PagingMode.LEVEL5),
    ],
)
def test_paging_mode_is_told_from_the_control_registers(cr0, cr4, efer, mode):
    assert paging_mode(cr0, cr4, efer) is mode


# mode, the (index, value) of each level, gva, gpa, page size, names of the levels
TRANSLATIONS = [
    pytest.param(
        PagingMode.BITS32,
        [(0x001, ALL), (0x002, ALL | 0xABCD_E000)],
        0x0040_2123,
        0xABCD_E123,
        0x1000,
        "PDE PTE",
        id="32-bit, 4 KiB page",
    ),
    pytest.param(
        PagingMode.BITS32,
        [(0x3FF, ALL | PS | 0xFFC0_0000)],
        0xFFC1_2345,
        0xFFC1_2345,
        0x40_0000,
        "PDE",
        id="32-bit, 4 MiB page",
    ),
    pytest.param(
        PagingMode.BITS32,
        [(0x001, ALL | PS | 0x0080_0000 | 0xA5 << 13)],
        0x0040_0010,
        0xA5_0080_0010,
        0x40_0000,
        "PDE",
        id="32-bit, 4 MiB page above 4 GiB (PSE-36)",
    ),
    pytest.param(
        PagingMode.PAE,
        [(3, P), (0x1FF, ALL), (0x1FF, ALL | 0xF_FFFF_FFFF_F000)],
        0xFFFF_FFFF,
        0xF_FFFF_FFFF_FFFF,
        0x1000,
        "PDPTE PDE PTE",
        id="PAE, 4 KiB page at the end of everything",
    ),
    pytest.param(
        PagingMode.PAE,
        [(1, P), (1, ALL | PS | 0x1_2340_0000)],
        0x4020_0000 + 0x1F_FFFF,
        0x1_2340_0000 + 0x1F_FFFF,
        0x20_0000,
        "PDPTE PDE",
        id="PAE, 2 MiB page",
    ),
    pytest.param(
        PagingMode.LEVEL4,
        [(1, ALL), (2, ALL), (3, ALL), (4, ALL | 0x7_7000)],
        (1 << 39) + (2 << 30) + (3 << 21) + (4 << 12) + 5,
        0x7_7005,
        0x1000,
        "PML4E PDPTE PDE PTE",
        id="4-level, 4 KiB page",
    ),
    pytest.param(
        PagingMode.LEVEL4,
        [(0x1FF, ALL), (0x1FE, ALL), (0, ALL | PS | 1 << 12 | 0x20_0000)],  # with the PAT bit
        0xFFFF_FFFF_8000_1234,
        0x20_1234,
        0x20_0000,
        "PML4E PDPTE PDE",
        id="4-level, 2 MiB page where Linux is linked",
    ),
    pytest.param(
        PagingMode.LEVEL4,
        [(0x100, ALL), (0, ALL | PS | 0x40_4000_0000)],
        0xFFFF_8000_3FFF_FFFF,
        0x40_4000_0000 + 0x3FFF_FFFF,
        0x4000_0000,
        "PML4E PDPTE",
        id="4-level, 1 GiB page at the first canonical address of the upper half",
    ),
    pytest.param(
        PagingMode.LEVEL5,
        [(0x0FF, ALL), (0x1FF, ALL), (0x1FF, ALL), (0x1FF, ALL), (0x1FF, ALL | 0x9000)],
        0x00FF_FFFF_FFFF_FFFF,
        0x9FFF,
        0x1000,
        "PML5E PML4E PDPTE PDE PTE",
        id="5-level, 4 KiB page at the last canonical address of the lower half",
    ),
    pytest.param(
        PagingMode.LEVEL5,
        [(0x100, ALL), (0, ALL), (0, ALL | PS)],
        0xFF00_0000_0000_0001,
        1,
        0x4000_0000,
        "PML5E PML4E PDPTE",
        id="5-level, 1 GiB page",
    ),
]


@pytest.mark.parametrize(("mode", "entries", "gva", "gpa", "page_bytes", "names"), TRANSLATIONS)
def test_each_mode_and_page_size_translates(mode, entries, gva, gpa, page_bytes, names):
    memory = Memory()
    chain(memory, mode, *entries)

    result = walk(memory.read, registers(mode), gva)

    assert result.gpa == gpa
    assert result.fault is None
    assert result.page_bytes == page_bytes
    assert result.permissions == RWXU
    assert " ".join(step.name for step in result.steps) == names
    page = find_page(memory.read, registers(mode), gva)
    assert (page.gpa, page.page_bytes) == (gpa - gpa % page_bytes, page_bytes)
    assert len(page.entries) == len(result.steps)


@pytest.mark.parametrize(("mode", "entries", "gva", "gpa", "page_bytes", "names"), TRANSLATIONS)
def test_each_level_not_present_is_named(mode, entries, gva, gpa, page_bytes, names):
    for depth, name in enumerate(names.split()):
        memory = Memory()
        cut = [*entries[:depth], (entries[depth][0], entries[depth][1] & ~P)]
        chain(memory, mode, *cut)

        result = walk(memory.read, registers(mode), gva)

        assert result.gpa is None
        assert result.page_bytes == 0
        assert result.fault is not None
        assert (result.fault.reason, result.fault.level) == (FaultReason.NOT_PRESENT, name)
        assert [step.name for step in result.steps] == names.split()[: depth + 1]
        assert result.steps[-1].flags == ()
        with pytest.raises(TranslationFault) as caught:
            translate(memory.read, registers(mode), gva)
        assert caught.value.fault == result.fault


@pytest.mark.parametrize(("mode", "entries", "gva", "gpa", "page_bytes", "names"), TRANSLATIONS)
def test_a_mapped_page_is_listed(mode, entries, gva, gpa, page_bytes, names):
    memory = Memory()
    chain(memory, mode, *entries)
    offset = gva % page_bytes
    page = MappedRange(gva - offset, gpa - offset, page_bytes, page_bytes, RWXU)

    found = mappings(memory.read, registers(mode))

    assert found.ranges == (page,)
    assert found.next_gva is None


def test_without_paging_the_gva_is_the_gpa():
    memory = Memory()
    off = registers(PagingMode.NONE)
    assert walk(memory.read, off, 0x1234) == Walk(
        PagingMode.NONE, 0x1234, (), 0x1234, 1 << 32, RWXU, None
    )
    assert find_page(memory.read, off, 0x1234) == (0, 1 << 32, ())
    assert mappings(memory.read, off).ranges == (MappedRange(0, 0, 1 << 32, 1 << 32, RWXU),)
    assert memory.reads == 0


@pytest.mark.parametrize("mode", [PagingMode.NONE, PagingMode.BITS32, PagingMode.PAE])
@pytest.mark.parametrize("high", [1 << 32, 0xFFFF_FFFF_0000_0000])
def test_a_32_bit_gva_wraps_around(mode, high):
    memory = Memory()
    if mode is PagingMode.BITS32:
        chain(memory, mode, (0, ALL), (0x10, ALL | 0x1_0000))
    elif mode is PagingMode.PAE:
        chain(memory, mode, (0, P), (0, ALL), (0x10, ALL | 0x1_0000))
    assert translate(memory.read, registers(mode), high | 0x1_0008) == 0x1_0008
    assert walk(memory.read, registers(mode), high | 0x1_0008).gva == 0x1_0008


@pytest.mark.parametrize(
    ("mode", "gva"),
    [
        (PagingMode.LEVEL4, 0x0000_8000_0000_0000),
        (PagingMode.LEVEL4, 0xFFFF_7FFF_FFFF_FFFF),
        (PagingMode.LEVEL4, 0xFEFF_8000_0000_0000),
        (PagingMode.LEVEL4, 0xFF00_0000_0000_0000),
        (PagingMode.LEVEL5, 0x0100_0000_0000_0000),
        (PagingMode.LEVEL5, 0xFEFF_FFFF_FFFF_FFFF),
        (PagingMode.LEVEL4, 1 << 64),
        (PagingMode.LEVEL5, -1),
    ],
)
def test_a_non_canonical_gva_is_a_fault_without_any_step(mode, gva):
    memory = Memory()
    result = walk(memory.read, registers(mode), gva)
    assert result.fault == Fault(FaultReason.NON_CANONICAL)
    assert result.steps == ()
    with pytest.raises(TranslationFault, match="not canonical"):
        translate(memory.read, registers(mode), gva)
    assert memory.reads == 0


def test_a_canonical_gva_of_5_levels_is_not_one_of_4():
    memory = Memory()
    chain(memory, PagingMode.LEVEL5, (1, ALL), (0, ALL), (0, ALL | PS))
    gva = 1 << 48
    assert translate(memory.read, registers(PagingMode.LEVEL5), gva) == 0
    with pytest.raises(TranslationFault, match="not canonical"):
        translate(memory.read, LEVEL4, gva)


L4, L5 = PagingMode.LEVEL4, PagingMode.LEVEL5
RESERVED = [
    # mode, chain of values (index 0 at each level), the level that faults, keywords of registers()
    (L4, [ALL | PS], "PML4E", {}),
    (L5, [ALL | PS], "PML5E", {}),
    (L5, [ALL, ALL | PS], "PML4E", {}),
    (L4, [ALL, ALL | PS | 1 << 13], "PDPTE", {}),
    (L4, [ALL, ALL | PS | 1 << 29], "PDPTE", {}),
    (L4, [ALL, ALL, ALL | PS | 1 << 13], "PDE", {}),
    (L4, [ALL, ALL, ALL | PS | 1 << 20], "PDE", {}),
    (L4, [ALL | XD], "PML4E", {"nxe": False}),
    (L4, [ALL, ALL, ALL, ALL | XD], "PTE", {"nxe": False}),
    (L4, [ALL | 1 << 40], "PML4E", {"maxphyaddr": 40}),
    (L4, [ALL, ALL, ALL, ALL | 1 << 51], "PTE", {"maxphyaddr": 51}),
    (PagingMode.PAE, [P | RW], "PDPTE", {}),
    (PagingMode.PAE, [P | US], "PDPTE", {}),
    (PagingMode.PAE, [P | 1 << 6], "PDPTE", {}),
    (PagingMode.PAE, [P | PS], "PDPTE", {}),
    (PagingMode.PAE, [P | XD], "PDPTE", {}),
    (PagingMode.PAE, [P, ALL | PS | 1 << 13], "PDE", {}),
    (PagingMode.PAE, [P, ALL | 1 << 52], "PDE", {}),
    (PagingMode.PAE, [P, ALL, ALL | 1 << 62], "PTE", {}),
    (PagingMode.PAE, [P, ALL, ALL | XD], "PTE", {"nxe": False}),
    (PagingMode.PAE, [P, ALL, ALL | 1 << 36], "PTE", {"maxphyaddr": 36}),
    (PagingMode.BITS32, [ALL | PS | 1 << 21], "PDE", {}),
    (PagingMode.BITS32, [ALL | PS | 1 << 17], "PDE", {"maxphyaddr": 36}),
    (PagingMode.BITS32, [ALL | PS | 1 << 13], "PDE", {"maxphyaddr": 32}),
]


@pytest.mark.parametrize(("mode", "values", "level", "keywords"), RESERVED)
def test_a_reserved_bit_is_a_fault_of_its_level(mode, values, level, keywords):
    memory = Memory()
    chain(memory, mode, *((0, value) for value in values))
    result = walk(memory.read, registers(mode, **keywords), 0)
    assert result.fault is not None
    assert (result.fault.reason, result.fault.level) == (FaultReason.RESERVED, level)
    assert mappings(memory.read, registers(mode, **keywords)).ranges == ()


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        (L4, [ALL | 0x7FF << 52, ALL, ALL, ALL | 0x7FF << 52]),  # ignored, and protection keys
        (L4, [ALL, ALL | PS | 1 << 12]),  # PAT
        (PagingMode.BITS32, [ALL, ALL | 1 << 7]),  # PAT in a PTE, not PS
        (PagingMode.BITS32, [ALL | PS | 0xFF << 13]),
        (PagingMode.PAE, [P | 1 << 5, ALL | PS]),  # A in a PDPTE, by QEMU
    ],
)
def test_bits_that_are_ignored_or_mean_something_else_are_no_fault(mode, values):
    memory = Memory()
    chain(memory, mode, *((0, value) for value in values))
    assert walk(memory.read, registers(mode), 0).fault is None


def test_without_cr4_pse_a_pde_with_ps_set_refers_to_a_table():
    memory = Memory()
    chain(memory, PagingMode.BITS32, (0, ALL | PS), (0, ALL | 0x5000))
    off = PagingRegisters(PE | PG, ROOT, 0, 0)
    assert translate(memory.read, off, 0x10) == 0x5010


def test_cr3_bits_that_are_no_address_are_ignored():
    memory = Memory()
    chain(memory, L4, (0, ALL), (0, ALL | PS))
    pcid_and_noflush = LEVEL4._replace(cr3=ROOT | 0xFFF | 1 << 63)
    assert translate(memory.read, pcid_and_noflush, 7) == 7

    memory = Memory()
    memory.entry(ROOT + 0x20, 0, P | 0x2000)  # PAE's four entries need no page of their own
    memory.entry(0x2000, 0, ALL | PS)
    pae = registers(PagingMode.PAE)._replace(cr3=ROOT + 0x20 | 0x1F)
    assert translate(memory.read, pae, 7) == 7


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ((ALL, ALL, ALL, ALL), "rwxu"),
        ((P | US, ALL, ALL, ALL), "r-xu"),
        ((ALL, ALL, P | RW, ALL), "rwx-"),
        ((ALL, ALL | XD, ALL, ALL), "rw-u"),
        ((P | RW, P | US, P, P | XD), "r---"),
    ],
)
def test_a_permission_must_be_given_by_every_level(bits, text):
    memory = Memory()
    chain(memory, L4, *((0, value) for value in bits))
    assert str(walk(memory.read, LEVEL4, 0).permissions) == text
    assert [str(found.permissions) for found in mappings(memory.read, LEVEL4).ranges] == [text]
    # The debugger reads and writes as CPL 0, whatever the tables permit.
    assert translate(memory.read, LEVEL4, 0) == 0


def test_pae_top_level_entries_take_no_permission_away():
    memory = Memory()
    chain(memory, PagingMode.PAE, (0, P), (0, ALL), (0, ALL))
    assert walk(memory.read, registers(PagingMode.PAE), 0).permissions == RWXU


def test_each_step_shows_where_the_entry_is_and_which_flags_it_has():
    memory = Memory()
    chain(memory, L4, (1, P | RW | 1 << 5), (0, ALL | XD), (2, 0x1FF | 1 << 12 | 0x40_0000))
    steps = walk(memory.read, LEVEL4, (1 << 39) + (2 << 21)).steps
    assert [(s.entry_gpa, s.value) for s in steps] == [
        (0x1008, 0x2023),
        (0x2000, 0x8000_0000_0000_3007),
        (0x3010, 0x40_11FF),
    ]
    assert [" ".join(s.flags) for s in steps] == [
        "P RW A",
        "P RW US XD",
        "P RW US PWT PCD A D G PS PAT",
    ]


def test_bit_7_of_a_pte_is_shown_as_pat_and_not_as_ps():
    memory = Memory()
    chain(memory, L4, (0, ALL), (0, ALL), (0, ALL), (0, P | 1 << 7))
    assert walk(memory.read, LEVEL4, 0).steps[-1].flags == ("P", "PAT")


def test_pae_top_level_entries_show_only_the_flags_they_have():
    memory = Memory()
    chain(memory, PagingMode.PAE, (0, P | 1 << 3 | 1 << 9), (0, 0))
    assert walk(memory.read, registers(PagingMode.PAE), 0).steps[0].flags == ("P", "PWT")


@pytest.mark.parametrize("link", [0x10_0000, 0xF_FFFF_FFFF_F000])
def test_a_table_outside_ram_is_a_fault_and_not_an_exception_of_the_reader(link):
    memory = Memory()
    memory.entry(ROOT, 0, ALL | link)
    result = walk(memory.read, LEVEL4, 0)
    assert result.fault == Fault(FaultReason.NOT_RAM, "PDPTE", link)
    assert [step.name for step in result.steps] == ["PML4E"]
    assert str(result.fault) == f"PDPTE at {link:#x}: the page table is outside guest RAM"
    with pytest.raises(TranslationFault, match="outside guest RAM"):
        translate(memory.read, LEVEL4, 0)
    assert mappings(memory.read, LEVEL4).ranges == ()


def test_the_result_may_be_outside_ram_because_devices_are_mapped_too():
    memory = Memory()
    chain(memory, L4, (0, ALL), (0, ALL), (0, ALL), (0, ALL | 0xFEE0_0000))
    assert translate(memory.read, LEVEL4, 0x20) == 0xFEE0_0020


def test_looking_does_not_change_page_tables():
    memory = Memory()
    chain(memory, L4, (0, ALL), (0, ALL), (0, ALL), (0, ALL))
    before = bytes(memory.ram)
    walk(memory.read, LEVEL4, 0)
    mappings(memory.read, LEVEL4)
    assert bytes(memory.ram) == before  # no accessed or dirty bit


# --- mappings --------------------------------------------------------------------------------


def level4_table(memory: Memory, pages: dict[int, int]) -> None:
    """Four levels of tables from ROOT on; `pages` are the PTEs of the lowest 2 MiB, by index."""
    chain(memory, L4, (0, ALL), (0, ALL), (0, ALL), (0, 0))
    for index, value in pages.items():
        memory.entry(0x4000, index, value)


def test_pages_in_a_row_are_one_range():
    memory = Memory()
    level4_table(memory, {i: ALL | 0x8000 + i * 0x1000 for i in range(5)})
    assert mappings(memory.read, LEVEL4).ranges == (MappedRange(0, 0x8000, 0x5000, 0x1000, RWXU),)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param({2: ALL | 0x9000}, id="hole in the gvas"),
        pytest.param({1: ALL | 0xA000}, id="hole in the gpas"),
        pytest.param({1: ALL | 0x8000}, id="same gpa again"),
        pytest.param({1: ALL | 0x7000}, id="descending gpas"),
        pytest.param({1: P | RW | 0x9000}, id="other permissions"),
    ],
)
def test_pages_that_differ_start_a_new_range(second):
    memory = Memory()
    level4_table(memory, {0: ALL | 0x8000} | second)
    found = mappings(memory.read, LEVEL4).ranges
    assert [(r.gva, r.length) for r in found] == [(0, 0x1000), (min(second) << 12, 0x1000)]


def test_pages_of_different_sizes_start_a_new_range():
    memory = Memory()
    level4_table(memory, {i: ALL | i << 12 for i in range(512)})
    memory.entry(0x3000, 1, ALL | PS | 0x20_0000)
    found = mappings(memory.read, LEVEL4).ranges
    assert [(r.gva, r.length, r.page_bytes) for r in found] == [
        (0, 0x20_0000, 0x1000),
        (0x20_0000, 0x20_0000, 0x20_0000),
    ]


def test_a_range_goes_on_over_the_end_of_a_table_but_not_over_the_non_canonical_hole():
    memory = Memory()
    chain(memory, L4, (0, ALL), (0x1FF, ALL | PS | 0x1FF << 30))
    memory.entry(ROOT, 1, ALL | 0x3000)
    memory.entry(0x3000, 0, ALL | PS | 0x200 << 30)
    # The last GiB below the hole and the first above it are in a row on paper only.
    memory.entry(ROOT, 0xFF, ALL | 0x4000)
    memory.entry(0x4000, 0x1FF, ALL | PS | 1 << 30)
    memory.entry(ROOT, 0x100, ALL | 0x5000)
    memory.entry(0x5000, 0, ALL | PS | 2 << 30)
    found = mappings(memory.read, LEVEL4).ranges
    assert [(r.gva, r.length >> 30) for r in found] == [
        (0x1FF << 30, 2),
        (0x7FFF_C000_0000, 1),
        (0xFFFF_8000_0000_0000, 1),
    ]


def test_a_pml4_that_maps_itself_ends_after_the_ranges_asked_for():
    memory = Memory()
    memory.entry(ROOT, 0x1FF, P | RW | ROOT)
    # Through itself the one entry is PML4E, PDPTE, PDE and PTE: only the last page is mapped.
    assert mappings(memory.read, LEVEL4).ranges[0].gva == 0xFFFF_FFFF_FFFF_F000

    for index in range(512):
        memory.entry(ROOT, index, ALL | ROOT)  # 2**36 pages, all of them gpa ROOT
    memory.reads = 0
    found = mappings(memory.read, LEVEL4, max_ranges=100)
    assert len(found.ranges) == 100
    assert found.next_gva == 100 * 0x1000
    assert memory.reads == 4


def test_tables_that_map_nothing_but_themselves_end_after_the_entries_asked_for():
    memory = Memory()
    memory.entry(ROOT, 0, 0)
    for index in range(512):
        # The last level ends at a page directory's reserved bits, so no page is ever found.
        memory.entry(ROOT, index, ALL | 0x2000)
        memory.entry(0x2000, index, ALL | 0x3000)
        memory.entry(0x3000, index, ALL | 0x4000)
    found = mappings(memory.read, LEVEL4, max_entries=512 * 50)
    assert found.ranges == ()
    assert memory.reads == 50
    assert found.next_gva == 47 << 21  # three tables on the way down, then 47 empty ones


def test_asking_again_from_next_gva_finds_all_that_is_mapped():
    memory = Memory()
    chain(memory, L4, (0, ALL), (0, ALL), (0, ALL), (0, 0))
    memory.entry(0x3000, 1, ALL | 0x5000)
    memory.entry(0x3000, 2, ALL | PS | 0x40_0000)
    for index in range(0, 512, 3):
        memory.entry(0x4000, index, ALL | 0x8000)
        memory.entry(0x5000, index, ALL | 0x8000)
    everything = mappings(memory.read, LEVEL4)
    assert everything.next_gva is None
    for limits in ({"max_ranges": 50}, {"max_entries": 4 * 512}, {"max_ranges": 1}):
        found: list[MappedRange] = []
        gva: int | None = 0
        while gva is not None:
            part = mappings(memory.read, LEVEL4, start_gva=gva, **limits)
            found += part.ranges
            assert part.next_gva is None or part.next_gva > gva
            gva = part.next_gva
        assert tuple(found) == everything.ranges


def random_tables(seed: int, mode: PagingMode) -> Memory:
    """Sixteen pages of random entries, most of which refer to these pages."""
    rng = random.Random(seed)
    memory = Memory()
    entry_bytes = 4 if mode is PagingMode.BITS32 else 8
    for gpa in range(0, len(memory.ram), entry_bytes):
        value = rng.randrange(16) << 12 | rng.choice((0, 0, P, P, ALL, ALL | 1 << 5, P | RW))
        if rng.random() < 0.1:
            value ^= 1 << rng.randrange(entry_bytes * 8)
        if rng.random() < 0.2:
            value |= PS
        if rng.random() < 0.02:
            value = rng.getrandbits(entry_bytes * 8)
        memory.entry(0, gpa // entry_bytes, value, entry_bytes)
    return memory


@pytest.mark.parametrize("mode", list(PagingMode))
@pytest.mark.parametrize("seed", range(4))
def test_random_page_tables_never_crash_and_all_functions_agree(mode, seed):
    memory = random_tables(seed, mode)
    regs = registers(mode, nxe=seed % 2 == 0)
    found = mappings(memory.read, regs, max_ranges=300, max_entries=1 << 14)
    for mapping in found.ranges:
        for gva in (mapping.gva, mapping.gva + mapping.length - 1):
            result = walk(memory.read, regs, gva)
            assert result.fault is None
            assert result.gpa == mapping.gpa + gva - mapping.gva
            assert result.permissions == mapping.permissions
            assert result.page_bytes == mapping.page_bytes
    rng = random.Random(seed)
    for _ in range(300):
        gva = rng.getrandbits(rng.choice((32, 47, 64)))
        result = walk(memory.read, regs, gva)
        assert (result.gpa is None) == (result.fault is not None)
        if result.gpa is None:
            with pytest.raises(TranslationFault):
                translate(memory.read, regs, gva)
        else:
            assert translate(memory.read, regs, gva) == result.gpa
            assert find_page(memory.read, regs, gva).page_bytes == result.page_bytes


# --- the page tables with which a guest starts -------------------------------------------------


@pytest.mark.parametrize("base_gpa", [0x1000, 0xA000, 0xFFFF_F000_0000])
def test_identity_map_maps_the_first_4_gib_and_nothing_else(base_gpa):
    tables = identity_map(base_gpa)
    assert len(tables) == 6 * 4096

    def read(gpa: int, length: int) -> bytes:
        if not base_gpa <= gpa <= base_gpa + len(tables) - length:
            raise GuestMemoryError(gpa, length)
        return tables[gpa - base_gpa : gpa - base_gpa + length]

    regs = LEVEL4._replace(cr3=base_gpa, efer=LME | LMA)
    (mapping,) = mappings(read, regs).ranges
    assert (mapping.gva, mapping.gpa, mapping.length) == (0, 0, 1 << 32)
    assert mapping.page_bytes == 0x20_0000
    assert str(mapping.permissions) == "rwx-"
    assert translate(read, regs, 0xFFFF_FFFF) == 0xFFFF_FFFF
    with pytest.raises(TranslationFault):
        translate(read, regs, 1 << 32)


def test_identity_map_is_linked_by_physical_addresses():
    tables = identity_map(0x5000)
    entries = struct.unpack("<3072Q", tables)
    assert entries[0] == 0x6003
    assert entries[512:517] == (0x7003, 0x8003, 0x9003, 0xA003, 0)
    assert entries[1024:1026] == (0x83, 0x20_0083)
    assert entries[-1] == 0xFFE0_0083

"""From GVA to GPA on real vCPUs: pyvmm, KVM_TRANSLATE and the guest's own loads must agree.

For each paging mode a guest's page tables map a few pages to unusual places, a different mark lies
at each GPA, and three walkers are asked where a GVA leads: vm.translate(), KVM_TRANSLATE, and the
processor, which loads from it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pyvmm import exits, kvm
from pyvmm.cpustate import Register
from pyvmm.errors import GuestMemoryError
from pyvmm.lab import CODE, RAM, LabMode
from pyvmm.paging import PagingMode, TranslationFault
from pyvmm.x86 import CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, VECTOR_PF
from tests.support import COUNT_FOREVER, MMIO_GPA, MMIO_GVA, Bench

pytestmark = pytest.mark.kvm

CR4_PSE, CR4_LA57 = 1 << 4, 1 << 12
PRESENT, LARGE = 0x3, 0x80
TABLES = 0x10_0000  # GPA of the page tables that the tests build
MARKED = 0x14_0000  # GPA of pages with a mark of their own
TARGETS = [MARKED + 0x1000 * n for n in (3, 0, 5, 2)]  # where the four small pages lead

# Loads, with the address in RSI, EBX preset: what the guest sees at a GVA.
LOAD = b"\x8b\x1e"  # mov ebx, [rsi], or [esi] in 32-bit code


class Tables:
    """Builds page tables, entry by entry: `width` bytes each."""

    def __init__(self, bench: Bench, width: int) -> None:
        self.bench, self.width = bench, width
        self._next = TABLES

    def new(self) -> int:
        """The GPA of an empty table."""
        gpa, self._next = self._next, self._next + 0x1000
        return gpa

    def set(self, table: int, index: int, entry: int) -> None:
        self.bench.write(table + index * self.width, entry.to_bytes(self.width, "little"))


class Layout:
    """A paging mode: how GVAs are cut up, and which control bits switch it on."""

    def __init__(
        self, mode: PagingMode, shifts: list[int], width: int, cr4: int, gvas: list[int]
    ) -> None:
        self.mode, self.shifts, self.width, self.cr4 = mode, shifts, width, cr4
        self.gvas = gvas  # each of a small page, in different tables

    @property
    def long(self) -> bool:
        return self.mode in (PagingMode.LEVEL4, PagingMode.LEVEL5)

    @property
    def large_bits(self) -> int:
        return 22 if self.mode is PagingMode.BITS32 else 21

    def index(self, gva: int, shift: int) -> int:
        if self.mode is PagingMode.PAE and shift == 30:
            return gva >> 30 & 3
        return gva >> shift & (1023 if self.width == 4 else 511)

    def build(self, bench: Bench) -> int:
        """Make the tables; returns CR3.  The first large page maps itself: there the code lies."""
        tables = Tables(bench, self.width)
        known: dict[tuple[int, int], int] = {}
        root = tables.new()

        def table_for(gva: int, last_shift: int) -> int:
            table = root
            for shift in self.shifts[: self.shifts.index(last_shift)]:
                place = table, self.index(gva, shift)
                if place not in known:
                    known[place] = tables.new()
                    # The entries of PAE's first table have no writable bit.
                    bits = 1 if self.mode is PagingMode.PAE and shift == 30 else PRESENT
                    tables.set(*place, known[place] | bits)
                table = known[place]
            return table

        large = self.large_bits
        tables.set(table_for(0, large), 0, PRESENT | LARGE)
        for gva, gpa in zip(self.gvas, TARGETS, strict=True):
            tables.set(table_for(gva, 12), self.index(gva, 12), gpa | PRESENT)
        return root


LAYOUTS = [
    Layout(
        PagingMode.BITS32, [22, 12], 4, CR4_PSE,
        [0x40_0000, 0x7FFF_F000, 0x8000_0000, 0xFFFF_F000],
    ),
    Layout(
        PagingMode.PAE, [30, 21, 12], 8, CR4_PAE,
        [0x40_0000, 0x7FFF_F000, 0x8000_0000, 0xFFFF_F000],
    ),
    Layout(
        PagingMode.LEVEL4, [39, 30, 21, 12], 8, CR4_PAE,
        [0x40_0000, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000],
    ),
    Layout(
        PagingMode.LEVEL5, [48, 39, 30, 21, 12], 8, CR4_PAE | CR4_LA57,
        [0x40_0000, 0xFF_FFFF_FFFF_F000, 0xFF00_0000_0000_0000, 0xFFFF_FFFF_FFFF_F000],
    ),
]  # fmt: skip


def guest_has_la57(bench: Bench) -> bool:
    """Whether the CPUID that the guest gets has 5-level paging (SDM vol. 2A, "CPUID", leaf 7)."""
    cpuid = bench.vm._cpuid
    return any(
        entry.function == 7 and entry.index == 0 and entry.ecx >> 16 & 1
        for entry in cpuid.entries[: cpuid.header.nent]
    )


@contextmanager
def paged(layout: Layout, code: bytes = LOAD) -> Iterator[Bench | None]:
    """A guest at `code` with this paging, or None where the host does not take the mode."""
    with Bench(code, LabMode.LONG if layout.long else LabMode.PROTECTED) as bench:
        for number in range(8):
            mark = struct.pack("<I", 0xABC0_0000 + number)
            bench.write(MARKED + 0x1000 * number, mark * 1024)
        # Not in the middle of an address space: 5-level paging is chosen before paging is on.
        sregs = bench.cpu.get(kvm.kvm_sregs)
        sregs.cr3 = layout.build(bench)
        sregs.cr4 = sregs.cr4 & ~CR4_PAE | layout.cr4
        sregs.cr0 |= CR0_PG
        if not layout.long:
            sregs.efer &= ~(EFER_LME | EFER_LMA)
        try:
            bench.cpu.set(sregs)
        except OSError as refused:
            assert refused.errno == errno.EINVAL
            assert layout.mode is PagingMode.LEVEL5 and not guest_has_la57(bench)
            yield None
            return
        if not bench.cpu.get(kvm.kvm_sregs).cr0 & CR0_PG:
            # A host without paging outside of long mode ignores the bit (and gives a guest that
            # sets it #GP).  Then that is what everybody must say.
            assert not layout.long
            for gva in layout.gvas:
                assert bench.vm.translate(0, gva) == gva == kvm_translate(bench, gva)
            yield None
            return
        yield bench


def kvm_translate(bench: Bench, gva: int) -> int | None:
    """KVM's own opinion of where a GVA leads; None: nowhere."""
    answer = kvm.kvm_translation(linear_address=gva)
    bench.cpu.ioctl(kvm.KVM_TRANSLATE, answer)
    return int(answer.physical_address) if answer.valid else None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.mode.name)
def test_gva_leads_where_kvm_and_the_guest_say(layout: Layout) -> None:
    for gva, gpa in zip(layout.gvas, TARGETS, strict=True):
        for offset in (0, 0x120, 0xFFC):
            with paged(layout) as bench:
                if bench is None:
                    return
                assert bench.vm.translate(0, gva + offset) == gpa + offset
                assert kvm_translate(bench, gva + offset) == gpa + offset
                bench.vm.set_register(0, Register.RSI, gva + offset)
                assert bench.enter() == exits.Hlt(False)
                seen = bench.vm.get_register(0, Register.RBX) & 0xFFFF_FFFF
                assert seen == 0xABC0_0000 + (gpa - MARKED) // 0x1000, "what the guest loads"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.mode.name)
def test_large_page_leads_to_itself(layout: Layout) -> None:
    with paged(layout) as bench:
        if bench is None:
            return
        for gva in (0, CODE, MARKED + 0x1234, RAM - 1, (1 << layout.large_bits) - 1):
            assert bench.vm.translate(0, gva) == gva
            assert kvm_translate(bench, gva) == gva


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.mode.name)
def test_unmapped_gva_faults_in_pyvmm_in_kvm_and_in_the_guest(layout: Layout) -> None:
    absent = layout.gvas[0] + 0x1000
    with paged(layout) as bench:
        if bench is None:
            return
        for gva in (absent, layout.gvas[1] - 0x1000, layout.gvas[2] + 0x20_0000):
            with pytest.raises(TranslationFault):
                bench.vm.translate(0, gva)
            assert kvm_translate(bench, gva) is None
        with pytest.raises(TranslationFault):
            bench.vm.read_virtual(0, absent - 2, 4)
        bench.vm.set_register(0, Register.RSI, absent)
        assert isinstance(bench.enter(), exits.Hlt)
        if layout.long:  # the laboratory's handlers are for the mode it was made in
            assert bench.delivered_vector() == VECTOR_PF
            assert bench.vm.get_register(0, Register.CR2) == absent
            assert bench._pushed(0) == 0, "not present, a read, by the supervisor"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.mode.name)
def test_reads_and_writes_go_over_page_boundaries(layout: Layout) -> None:
    with paged(layout) as bench:
        if bench is None:
            return
        # The last large page's end and what follows is unmapped in all; inside pages all is fine.
        gva = layout.gvas[0]
        bench.vm.write_virtual(0, gva + 0xFFE, b"\x11\x22")
        assert bench.memory.read(TARGETS[0] + 0xFFE, 2) == b"\x11\x22"
        with pytest.raises(TranslationFault):
            bench.vm.write_virtual(0, gva + 0xFFF, b"\x77\x88")
        assert bench.vm.read_virtual(0, gva + 0xFFF, 1) == b"\x22", "all or nothing"


def test_adjacent_gvas_in_scattered_pages_read_as_one() -> None:
    layout = Layout(
        PagingMode.LEVEL4, [39, 30, 21, 12], 8, CR4_PAE,
        [0x40_0000, 0x40_1000, 0x40_2000, 0x40_3000],
    )  # fmt: skip
    with paged(layout) as bench:
        assert bench is not None
        data = bytes(range(256)) * 48  # three pages
        bench.vm.write_virtual(0, 0x40_0800, data)
        assert bench.vm.read_virtual(0, 0x40_0800, len(data)) == data
        assert bench.memory.read(TARGETS[0] + 0x800, 0x800) == data[:0x800]
        assert bench.memory.read(TARGETS[1], 0x1000) == data[0x800:0x1800]
        bench.vm.set_register(0, Register.RSI, 0x40_0FFE)
        assert bench.enter() == exits.Hlt(False)
        across = int.from_bytes(data[0x7FE:0x802], "little")
        assert bench.vm.get_register(0, Register.RBX) == across


@pytest.mark.parametrize("mode", [LabMode.REAL, LabMode.PROTECTED])
def test_without_paging_gva_is_gpa(mode: LabMode) -> None:
    with Bench(LOAD, mode) as bench:
        for gva in (0, 0x1234, CODE, RAM - 1, RAM, 0xFFFF_FFFF):
            assert bench.vm.translate(0, gva) == gva
            assert kvm_translate(bench, gva) == gva
        with pytest.raises(GuestMemoryError):
            bench.vm.read_virtual(0, RAM - 1, 2)
        assert bench.vm.read_virtual(0, CODE, 2) == LOAD


def test_gva_of_a_device_translates_but_cannot_be_read() -> None:
    with Bench(LOAD) as bench:
        assert bench.vm.translate(0, MMIO_GVA + 0x123) == MMIO_GPA + 0x123
        assert kvm_translate(bench, MMIO_GVA + 0x123) == MMIO_GPA + 0x123
        with pytest.raises(GuestMemoryError):
            bench.vm.read_virtual(0, MMIO_GVA, 1)
        with pytest.raises(GuestMemoryError):
            bench.vm.write_virtual(0, MMIO_GVA - 1, b"ab")
        assert bench.memory.read(RAM - 1, 1) == b"\0", "all or nothing"


def test_translation_follows_a_guest_that_switches_its_page_tables() -> None:
    """mov cr3, rax; hlt: from then on pyvmm sees the new tables."""
    layout = LAYOUTS[2]
    with Bench(b"\x0f\x22\xd8") as bench:
        gva = layout.gvas[2]
        with pytest.raises(TranslationFault):
            bench.vm.translate(0, gva)
        bench.vm.set_register(0, Register.RAX, layout.build(bench))
        assert bench.enter() == exits.Hlt(False)
        assert bench.vm.translate(0, gva) == TARGETS[2]
        assert kvm_translate(bench, gva) == TARGETS[2]


def test_non_canonical_gva_leads_nowhere() -> None:
    with Bench(LOAD) as bench:
        for gva in (1 << 47, 0x8000_0000_0000_0000, 0xFFFF_0000_0000_0000):
            with pytest.raises(TranslationFault):
                bench.vm.translate(0, gva)


def test_translation_at_a_user_programs_rip_works_as_for_the_kernel() -> None:
    with Bench(LOAD, LabMode.USER) as bench:
        assert bench.vm.translate(0, CODE) == CODE == kvm_translate(bench, CODE)
        assert bench.vm.get_register(0, Register.CS) & 3 == 3


def test_each_vcpu_is_translated_with_its_own_tables() -> None:
    with Bench(COUNT_FOREVER, cpus=2) as bench:
        layout = LAYOUTS[2]
        bench.vm.set_register(1, Register.CR3, layout.build(bench))
        assert bench.vm.translate(1, layout.gvas[2]) == TARGETS[2]
        with pytest.raises(TranslationFault):
            bench.vm.translate(0, layout.gvas[2])
        bench.start_all()
        bench.park(0, 1)
        assert bench.vm.read_virtual(0, CODE, 5) == bench.vm.read_virtual(1, CODE, 5)

"""Guest RAM: slots, bounds, and what lies outside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import cast

import pytest

from pyvmm import handles, kvm, paging
from pyvmm.errors import GuestMemoryError
from pyvmm.memory import GuestMemory, VirtualMemory

PAGE = 4096


class AnyVm:
    """A VM that takes every memory slot: what is tested here is ours, not the kernel's."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, int, int, int, int]] = []

    def set_memory_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.slots.append((slot, gpa, size, hva, flags))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """16 pages at 0, and 4 at 1 MiB."""
    memory = GuestMemory(cast(handles.VmHandle, AnyVm()))
    memory.add_slot(0, 16 * PAGE)
    memory.add_slot(0x100000, 4 * PAGE)
    yield memory
    memory.close()


def test_ram_starts_as_zeros(memory: GuestMemory) -> None:
    assert memory.read(0x100000, 4 * PAGE) == bytes(4 * PAGE)


def test_what_is_written_reads_back(memory: GuestMemory) -> None:
    memory.write(0x100FFE, b"over a page boundary")
    assert memory.read(0x100FFE, 20) == b"over a page boundary"
    assert memory.read(0x100FFC, 2) == b"\0\0"


@pytest.mark.parametrize("gpa", [0, 1 << 32])
def test_ram_lies_where_kvm_can_use_huge_pages(gpa: int) -> None:
    vm = AnyVm()
    memory = GuestMemory(cast(handles.VmHandle, vm))
    memory.add_slot(gpa, 1 << 30)
    ((_, _, _, hva, _),) = vm.slots
    assert (hva - gpa) % (2 << 20) == 0
    memory.close()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_all_kinds_of_bytes_can_be_written(memory: GuestMemory, kind: type) -> None:
    memory.write(0, kind(b"abc"))
    assert memory.read(0, 3) == b"abc"


def test_reads_are_copies(memory: GuestMemory) -> None:
    before = memory.read(0, 4)
    memory.write(0, b"\xff" * 4)
    assert before == bytes(4)


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (16 * PAGE, 1),
        (16 * PAGE - 1, 2),
        (0xFFFFF, 1),
        (0xFFFFF, 2),
        (0x104000, 1),
        (0x103FFF, 2),
        (-1, 1),
        (-1, 2),
        (1 << 64, 1),
        (0, 1 << 64),
    ],
)
def test_outside_of_ram_nothing_is_read_or_written(
    memory: GuestMemory, gpa: int, length: int
) -> None:
    with pytest.raises(GuestMemoryError) as error:
        memory.read(gpa, length)
    assert (error.value.gpa, error.value.length) == (gpa, length)
    if length < PAGE:
        before = memory.read(0, 16 * PAGE), memory.read(0x100000, 4 * PAGE)
        with pytest.raises(GuestMemoryError, match="not guest RAM"):
            memory.write(gpa, b"x" * length)
        assert (memory.read(0, 16 * PAGE), memory.read(0x100000, 4 * PAGE)) == before


def test_the_last_byte_is_ram(memory: GuestMemory) -> None:
    memory.write(0x103FFF, b"x")
    assert memory.read(0x103FFF, 1) == b"x"


@pytest.mark.parametrize(
    ("gpa", "size"), [(1, PAGE), (PAGE, 100), (0x200000, 0), (-PAGE, PAGE), (0x200000, -PAGE)]
)
def test_slots_are_whole_pages(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        memory.add_slot(gpa, size)
    assert len(memory.slots) == 2


@pytest.mark.parametrize("gpa", [0x100000 - PAGE, 0x100000, 0x103000, 0xFF000])
def test_slots_do_not_overlap(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        memory.add_slot(gpa, 2 * PAGE)


def test_slots_may_touch(memory: GuestMemory) -> None:
    memory.add_slot(0x104000, PAGE)
    memory.add_slot(0x100000 - PAGE, PAGE)


def test_kvm_is_told_of_each_slot_and_of_read_only_ones() -> None:
    vm = AnyVm()
    memory = GuestMemory(cast(handles.VmHandle, vm))
    memory.add_slot(0, PAGE)
    memory.add_slot(0x10000, 2 * PAGE, readonly=True)
    memory.close()
    assert [(s, gpa, size, flags) for s, gpa, size, _, flags in vm.slots] == [
        (0, 0, PAGE, 0),
        (1, 0x10000, 2 * PAGE, kvm.KVM_MEM_READONLY),
    ]
    assert all(hva % PAGE == 0 and hva for *_, hva, _ in vm.slots)


def test_a_slot_that_kvm_refuses_leaves_nothing_behind() -> None:
    class NoVm(AnyVm):
        def set_memory_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
            raise kvm.KvmError(22, "KVM_SET_USER_MEMORY_REGION: Invalid argument")

    memory = GuestMemory(cast(handles.VmHandle, NoVm()))
    with pytest.raises(kvm.KvmError):
        memory.add_slot(0, PAGE)
    assert memory.slots == []
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)


def test_closing_twice_is_fine(memory: GuestMemory) -> None:
    memory.close()
    memory.close()
    assert memory.slots == []


# --- by GVA --------------------------------------------------------------------------------------

ROOT, TABLE = 0x1000, 0x2000  # 32-bit paging: a directory and one table, for GVA 0 to 4 MiB


def paged(memory: GuestMemory, pages: dict[int, int]) -> VirtualMemory:
    """Memory in which each page of `pages` (GVA) is mapped to its value (GPA)."""
    memory.write(ROOT, (TABLE | 3).to_bytes(4, "little"))
    for gva, gpa in pages.items():
        memory.write(TABLE + 4 * (gva >> 12), (gpa | 3).to_bytes(4, "little"))
    return VirtualMemory(memory, kvm.kvm_sregs(cr0=1 << 31 | 1, cr3=ROOT))


def test_without_paging_a_gva_is_a_gpa(memory: GuestMemory) -> None:
    memory.write(0x100010, b"here")
    virtual = VirtualMemory(memory, kvm.kvm_sregs(cr0=1))
    assert virtual.read(0x100010, 4) == b"here"
    assert virtual.translate(0x100010) == 0x100010


def test_pages_that_are_apart_read_as_one(memory: GuestMemory) -> None:
    virtual = paged(memory, {0x8000: 0x5000, 0x9000: 0x4000})
    memory.write(0x5FFE, b"ab")
    memory.write(0x4000, b"cd")
    assert virtual.read(0x8FFE, 4) == b"abcd"
    assert list(virtual.pieces(0x8FFE, 4)) == [(0x5FFE, 2), (0x4000, 2)]
    virtual.write(0x8FFE, b"wxyz")
    assert (memory.read(0x5FFE, 2), memory.read(0x4000, 2)) == (b"wx", b"yz")


def test_a_page_that_the_guest_remaps_is_read_where_it_is_now(memory: GuestMemory) -> None:
    virtual = paged(memory, {0x8000: 0x5000})
    memory.write(0x5000, b"old")
    memory.write(0x4000, b"new")
    assert virtual.read(0x8000, 3) == b"old"
    paged(memory, {0x8000: 0x4000})
    assert virtual.read(0x8000, 3) == b"new"
    memory.write(ROOT, bytes(4))  # the table itself is gone
    with pytest.raises(paging.TranslationFault):
        virtual.read(0x8000, 3)


def test_more_pages_than_are_remembered_are_found(memory: GuestMemory) -> None:
    virtual = paged(memory, {n << 12: 0x5000 for n in range(200)})
    memory.write(0x5000, b"here")
    assert all(virtual.read(n << 12, 4) == b"here" for _ in range(2) for n in range(200))


def test_a_write_that_runs_into_an_unmapped_page_writes_nothing(memory: GuestMemory) -> None:
    virtual = paged(memory, {0x8000: 0x5000})
    with pytest.raises(paging.TranslationFault):
        virtual.write(0x8FFE, b"abcd")
    assert memory.read(0x5FFE, 2) == b"\0\0"


def test_a_write_that_runs_out_of_ram_writes_nothing(memory: GuestMemory) -> None:
    virtual = paged(memory, {0x8000: 0x5000, 0x9000: 0x700000})
    assert virtual.translate(0x9123) == 0x700123  # mapped, but no RAM
    with pytest.raises(GuestMemoryError):
        virtual.write(0x8FFE, b"abcd")
    assert memory.read(0x5FFE, 2) == b"\0\0"


def test_random_reads_and_writes_agree_with_a_bytearray(memory: GuestMemory) -> None:
    chance = random.Random(1)
    pages = {n << 12: (4 + chance.randrange(12)) << 12 for n in range(8)}
    virtual, model = paged(memory, pages), bytearray(16 * PAGE)
    model[:] = memory.read(0, 16 * PAGE)
    for _ in range(300):
        gva = chance.randrange(8 * PAGE)
        data = chance.randbytes(chance.randrange(min(6000, 8 * PAGE - gva)))
        virtual.write(gva, data)
        for n, byte in enumerate(data):
            model[pages[gva + n & ~0xFFF] | (gva + n & 0xFFF)] = byte
        assert memory.read(0, 16 * PAGE) == model


@pytest.mark.kvm
def test_the_kernel_refuses_nothing_that_add_slot_allows() -> None:
    system = handles.SystemHandle()
    vm = system.create_vm()
    memory = GuestMemory(vm)
    try:
        memory.add_slot(0, 64 << 20)
        memory.add_slot(4 << 30, 1 << 30)
        memory.write((5 << 30) - 4, b"last")
        assert memory.read((5 << 30) - 4, 4) == b"last"
    finally:
        vm.close()
        memory.close()
        system.close()

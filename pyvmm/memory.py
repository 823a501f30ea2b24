"""Guest RAM: memory slots, GPA to HVA, and bounds-checked reads and writes.

A memory slot is a range of guest-physical addresses (GPA) that KVM backs with a range of ours
(host virtual addresses, HVA).  The pages are anonymous and untouched ones cost nothing, so a large
guest is cheap.  Addresses outside of all slots are not RAM: a guest's access to one is an MMIO
exit, and a read or write of one here raises GuestMemoryError.

VirtualMemory is the same RAM by guest virtual address (GVA), through a vCPU's page tables; the walk
itself is in paging.py.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator

from pyvmm import handles, kvm
from pyvmm.errors import GuestMemoryError
from pyvmm.light import NamedTuple

PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 << 20  # what one entry of the processor's second-level page tables can map
_PAGES_KEPT = 64  # translations that a VirtualMemory remembers
_MAP_NORESERVE = 0x4000  # <asm-generic/mman.h>; not in every Python's mmap module


class MemorySlot(NamedTuple):
    """One memory slot; `size` in bytes, `readonly` for the guest (we may always write)."""

    number: int
    gpa: int
    size: int
    readonly: bool
    pages: mmap.mmap

    @property
    def end(self) -> int:
        """The first GPA after the slot."""
        return self.gpa + self.size


class GuestMemory:
    """The memory slots of one VM.

    Slots are added before the vCPUs run and stay until close(): unmapping pages under a slot is
    accepted by the kernel and kills the guest's next access, so there is no remove().
    """

    def __init__(self, vm: handles.VmHandle) -> None:
        self._vm = vm
        self.slots: list[MemorySlot] = []

    def add_slot(self, gpa: int, size: int, *, readonly: bool = False) -> MemorySlot:
        """Give the guest `size` bytes of zeroed RAM at `gpa`, both multiples of 4096.

        Guest writes to a `readonly` slot become MMIO exits, as to a ROM.
        Raises ValueError for odd or overlapping ranges, OSError when the host has no memory.
        """
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or gpa < 0:
            raise ValueError(f"memory slot {gpa:#x}+{size:#x} is not made of whole pages")
        for slot in self.slots:
            if gpa < slot.end and slot.gpa < gpa + size:
                raise ValueError(f"memory slot {gpa:#x}+{size:#x} overlaps {slot.gpa:#x}")
        pages, hva = _map(gpa, size)
        slot = MemorySlot(len(self.slots), gpa, size, readonly, pages)
        try:
            kvm_flags = kvm.KVM_MEM_READONLY if readonly else 0
            self._vm.set_memory_slot(slot.number, gpa, size, hva, kvm_flags)
        except OSError:
            pages.close()
            raise
        self.slots.append(slot)
        return slot

    def find(self, gpa: int, length: int = 1) -> MemorySlot:
        """The slot that holds all of [gpa, gpa + length).  Raises GuestMemoryError."""
        for slot in self.slots:
            if slot.gpa <= gpa and gpa + length <= slot.end:
                return slot
        raise GuestMemoryError(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        """Copy `length` bytes out of guest RAM.  Raises GuestMemoryError."""
        slot = self.find(gpa, length)
        offset = gpa - slot.gpa
        return slot.pages[offset : offset + length]

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into guest RAM.  All of it, or GuestMemoryError and nothing."""
        slot = self.find(gpa, len(data))
        offset = gpa - slot.gpa
        slot.pages[offset : offset + len(data)] = bytes(data)

    def clear(self) -> None:
        """Make all of it zeros again, as after add_slot()."""
        for slot in self.slots:
            slot.pages.madvise(mmap.MADV_DONTNEED)  # of private pages: the kernel forgets them

    def close(self) -> None:
        """Unmap the pages.  The VM must be closed before: KVM would walk them."""
        for slot in self.slots:
            slot.pages.close()
        self.slots.clear()


def _map(gpa: int, size: int) -> tuple[mmap.mmap, int]:
    """New pages for a slot at `gpa`, and their HVA.

    KVM can use huge pages only where a GPA and its HVA are equally far from the beginning of one.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, size, flags=flags)
    too_far = (_hva(pages) - gpa) % HUGE_PAGE_SIZE
    if too_far and size >= HUGE_PAGE_SIZE:  # a Linux before 6.7 does not look at it by itself
        pages.close()
        # Each mapping is placed below the one before, if there is no gap above that it fits into:
        # so one of about this size, but for what it is too far, makes the next come out right.
        with mmap.mmap(-1, too_far + size + -size % HUGE_PAGE_SIZE, flags=flags):
            pages = mmap.mmap(-1, size, flags=flags)
    return pages, _hva(pages)


def _hva(pages: mmap.mmap) -> int:
    # from_buffer pins the mapping; the pin goes with the temporary, the address stays valid for as
    # long as `pages` is not closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


class Unchanged:
    """Tells whether places in guest RAM still hold what they held."""

    def __init__(self, memory: GuestMemory, places: Iterable[tuple[int, bytes]]) -> None:
        """`places`: GPAs and the bytes that were there.  Raises GuestMemoryError."""
        self._where: list[tuple[mmap.mmap, int, int]] = []
        self._held: list[bytes] = []
        for gpa, data in places:
            slot = memory.find(gpa, len(data))
            offset = gpa - slot.gpa
            self._where.append((slot.pages, offset, offset + len(data)))
            self._held.append(data)

    def holds(self) -> bool:
        """Whether nothing has changed.  Not after memory.close()."""
        return [pages[start:end] for pages, start, end in self._where] == self._held


class VirtualMemory:
    """Guest memory by GVA, as a vCPU with these `sregs` sees it at CPL 0; writable or not."""

    def __init__(self, memory: GuestMemory, sregs: kvm.kvm_sregs) -> None:
        # Only debugging needs the page walk: a guest that merely runs must not wait for its import.
        from pyvmm import paging

        self._memory = memory
        self._paging = paging
        self._registers = paging.PagingRegisters.of(sregs)
        self.gva_end = paging.gva_end(self._registers)  # what is higher wraps around
        # By gva >> 12: GPA and size of the page, good as long as the entries say the same.
        self._pages: dict[int, tuple[int, int, Unchanged]] = {}

    def _locate(self, gva: int) -> tuple[int, int]:
        """The GPA behind `gva` and how many bytes from there on belong to the same page.

        To look at the same entries again is a fifth of the work of a walk, and stepping asks for
        the same pages again and again.
        """
        known = self._pages.get(gva >> 12)
        if known is None or not known[2].holds():
            if len(self._pages) >= _PAGES_KEPT:
                self._pages.clear()
            page = self._paging.find_page(self._memory.read, self._registers, gva)
            known = page.gpa, page.page_bytes, Unchanged(self._memory, page.entries)
            self._pages[gva >> 12] = known
        gpa, page_bytes, _ = known
        offset = gva & (page_bytes - 1)
        return gpa + offset, page_bytes - offset

    def translate(self, gva: int) -> int:
        """The GPA behind `gva`.  Raises paging.TranslationFault."""
        return self._locate(gva)[0]

    def entries(self, gva: int) -> tuple[tuple[int, bytes], ...]:
        """The page-table entries, by GPA, that say where `gva` is; or the one by which it is not.

        Of that one 4 bytes, which hold its present bit.  Empty where no table is in memory.
        """
        try:
            return self._paging.find_page(self._memory.read, self._registers, gva).entries
        except self._paging.TranslationFault as error:
            gpa = error.fault.entry_gpa
        try:
            return () if gpa is None else ((gpa, self._memory.read(gpa, 4)),)
        except GuestMemoryError:
            return ()

    def pieces(self, gva: int, length: int) -> Iterator[tuple[int, int]]:
        """(gpa, bytes) for each physically contiguous piece of [gva, gva + length).

        Raises paging.TranslationFault where nothing is mapped, after the pieces before it.
        """
        while length > 0:
            gpa, in_page = self._locate(gva)
            piece = min(in_page, length)
            yield gpa, piece
            gva, length = gva + piece, length - piece

    def read(self, gva: int, length: int) -> bytes:
        """`length` bytes at `gva`.  Raises paging.TranslationFault or GuestMemoryError."""
        if 0 < length <= PAGE_SIZE - gva % PAGE_SIZE:
            return self._memory.read(self.translate(gva), length)
        return b"".join(self._memory.read(gpa, size) for gpa, size in self.pieces(gva, length))

    def write(self, gva: int, data: bytes) -> None:
        """Write all of `data` at `gva`, or nothing.  Raises as read() does."""
        pieces = list(self.pieces(gva, len(data)))
        for gpa, size in pieces:
            self._memory.find(gpa, size)
        offset = 0
        for gpa, size in pieces:
            self._memory.write(gpa, data[offset : offset + size])
            offset += size

"""What a guest's page tables map, from some gva on: paging.py's walk, through whole tables.

Page tables are the guest's data and may be anything: a search is bounded, and can be continued.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pyvmm.errors import GuestMemoryError
from pyvmm.light import NamedTuple
from pyvmm.paging import (
    ADDRESS_MASK,
    ALL_RIGHTS,
    CR0_PG,
    ENTRY_P,
    ENTRY_XD,
    GVA32_MASK,
    Layout,
    Level,
    PagingRegisters,
    Permissions,
    ReadPhysical,
    layout_of,
    permissions_of,
    sign_extend,
)


class MappedRange(NamedTuple):
    """`length` bytes of gvas in a row that map to as many gpas in a row, all in the same way."""

    gva: int
    gpa: int
    length: int
    page_bytes: int
    permissions: Permissions


class Mappings(NamedTuple):
    """What `mappings` found. `next_gva` is where it gave up, or None: then the list is complete."""

    ranges: tuple[MappedRange, ...]
    next_gva: int | None


def mappings(
    read_physical: ReadPhysical,
    registers: PagingRegisters,
    *,
    start_gva: int = 0,
    max_ranges: int = 4096,
    max_entries: int = 1 << 20,
) -> Mappings:
    """Everything that is mapped at or above `start_gva`, in ranges as long as possible.

    Page tables are the guest's data and may be anything. A table that contains itself (a common
    trick, and a legal one) maps up to 2**48 bytes in 4 KiB pages, so the search ends after
    `max_ranges` ranges or `max_entries` visited entries, present or not; `next_gva` then says from
    where on to ask again. Entries with reserved bits set, and tables outside RAM, map nothing.
    """
    if not registers.cr0 & CR0_PG:
        everything = MappedRange(0, 0, 1 << 32, 1 << 32, permissions_of(ALL_RIGHTS))
        return Mappings((everything,) if start_gva <= GVA32_MASK else (), None)

    ranges: list[MappedRange] = []
    first: _Page | None = None  # the first page of the range that is being put together, and
    length = 0  # its length so far

    def close_range() -> None:
        if first is not None:
            gva, gpa, page_bytes, rights = first
            ranges.append(MappedRange(gva, gpa, length, page_bytes, permissions_of(rights)))

    next_gva = None
    try:
        for page in _pages(read_physical, layout_of(registers), start_gva, max_entries):
            gva, gpa, page_bytes, rights = page
            if first == (gva - length, gpa - length, page_bytes, rights):
                length += page_bytes
                continue
            close_range()
            first = None
            if len(ranges) == max_ranges:
                next_gva = gva
                break
            first, length = page, page_bytes
    except _EntriesSpentError as spent:
        next_gva = max(start_gva, spent.gva)
    close_range()
    return Mappings(tuple(ranges), next_gva)


_Page = tuple[int, int, int, int]  # gva, gpa, page_bytes, rights


class _EntriesSpentError(Exception):
    """`_pages` may visit no more entries; the table for `gva` is the first that it did not read."""

    def __init__(self, gva: int) -> None:
        self.gva = gva


def _pages(
    read_physical: ReadPhysical, layout: Layout, start_gva: int, max_entries: int
) -> Iterator[_Page]:
    """Yield each page that is mapped above `start_gva`, in order of gva.

    Raises _EntriesSpentError before the table that would exceed `max_entries`.
    """
    entries_left = max_entries

    def table(depth: int, table_gpa: int, table_gva: int, table_rights: int) -> Iterator[_Page]:
        nonlocal entries_left
        level = layout.levels[depth]
        span = 1 << level.shift
        entries_left -= 1 << level.index_bits
        if entries_left < 0:
            raise _EntriesSpentError(table_gva)
        for index, entry, maps_page in _present_entries(read_physical, layout, level, table_gpa):
            gva = table_gva + index * span
            if depth == 0 and layout.gva_bits > 32:
                gva = sign_extend(gva, layout.gva_bits)
            if gva + span <= start_gva:
                continue
            rights = table_rights & (entry ^ ENTRY_XD) if level.has_rights else table_rights
            if maps_page:
                yield gva, level.page_gpa(entry), span, rights
            else:
                yield from table(depth + 1, entry & ADDRESS_MASK, gva, rights)

    return table(0, layout.root_gpa, 0, ALL_RIGHTS)


def _present_entries(
    read_physical: ReadPhysical, layout: Layout, level: Level, table_gpa: int
) -> Iterator[tuple[int, int, bool]]:
    """(index, entry, maps a page) of each entry of a table that a walk could pass.

    None if the table is not in RAM. The table is read as a whole: it is never larger than a page.
    """
    count = 1 << level.index_bits
    try:
        table = read_physical(table_gpa, count * layout.entry_bytes)
    except GuestMemoryError:
        return
    for index, (entry,) in enumerate(struct.iter_unpack(layout.entry_format, table)):
        if entry & ENTRY_P:
            maps_page = level.maps_page(entry)
            if not entry & (level.page_reserved if maps_page else level.table_reserved):
                yield index, entry, maps_page

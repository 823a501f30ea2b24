"""The symbol table that a Linux kernel carries in its own memory (kallsyms), found and unpacked.

A kernel that can print a call trace has the names of its functions, and most have those of its
variables, too (CONFIG_KALLSYMS_ALL).  The tables lie in .rodata in one of two orders; the one in
brackets is not everywhere:

    before Linux 6.4: offsets, relative_base, num_syms, names, markers, [seqs_of_names],
                      token_table, token_index
    since Linux 6.4:  num_syms, names, markers, token_table, token_index,
                      offsets, relative_base, seqs_of_names

A name is a length and so many bytes, each the number of a token: of one of 256 strings.  Characters
are tokens of their own, so the token table can be told by its ten digits in a row, and the index
behind it, which says where each token begins, proves it.  relative_base is told by what it is, the
address of the kernel's first page, and the place where it is by num_syms, names and markers, which
must fit together.  Addresses are as the kernel runs: one that moved itself (KASLR) has corrected
relative_base.

Left out: 32-bit kernels, Linux before 5.0, and what is in modules.
Source: Linux, scripts/kallsyms.c, write_src(), and kernel/kallsyms.c, kallsyms_sym_address().
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from itertools import chain

from pyvmm.light import NamedTuple

KERNEL_HALF = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map: no kernel is linked below

_TOKENS = 256
_INDEX = struct.Struct(f"<{_TOKENS}H")
# Searched for by a regular expression: find() of a string with zeros takes ten times as long.
_DIGITS = re.compile(b"".join(b"%d\0" % digit for digit in range(10)))
_MAX_TOKEN_TABLE_BYTES = 1 << 16  # the index has 16 bits
_ALIGNMENT = 8  # of each table
_MARKER_STEP = 256  # markers: where in the names every 256th one begins
_MAX_TABLES_BYTES = 16 << 20  # a distribution's kernel has 5 MiB
_PAGE_BYTES = 4096

Pages = mmap.mmap | bytes


class Symbol(NamedTuple):
    """One symbol; `kind` is nm's letter, in upper case if it is a global one."""

    gva: int
    kind: str
    name: str


class Kallsyms(NamedTuple):
    """The symbols in order of address, and where the kernel's image begins."""

    base: int
    symbols: list[Symbol]


class _Place(NamedTuple):
    """Where the names and the offsets of `total` symbols may be, and what relative_base says."""

    names_at: int
    offsets_at: int
    total: int
    base: int


def find(pages: Pages) -> Kallsyms | None:
    """The symbol table in these pages of guest memory: the first one that is whole.

    (A kernel that unpacked itself may have left remains of a copy, uncorrected, behind its own.)
    """
    for match in _DIGITS.finditer(pages):
        found = _unpack(pages, match.start())
        if found is not None:
            return found
    return None


def _unpack(pages: Pages, digits: int) -> Kallsyms | None:
    """The symbols, if the digits at this offset are those of a token table."""
    # The tokens are in the order of their numbers, which for characters are their codes.
    after = _TOKENS - ord("0")
    rest = pages[digits : digits + _MAX_TOKEN_TABLE_BYTES].split(b"\0", after)
    if len(rest) <= after:
        return None
    index = _aligned(digits + sum(len(token) + 1 for token in rest[:after]))
    index_end = index + _INDEX.size
    if index_end > len(pages):
        return None
    starts = _INDEX.unpack(pages[index:index_end])
    table = digits - starts[ord("0")]
    tokens = pages[max(0, table) : index].split(b"\0")[:_TOKENS]
    if table < 0 or _starts(tokens) != list(starts):
        return None
    strings = [token.decode("ascii", "replace") for token in tokens]
    places = chain(_places_before(pages, table), _places_behind(pages, table, index_end))
    for place in places:
        names = _names(pages[place.names_at : table], strings, place.total)
        if names is not None:
            return Kallsyms(
                place.base,
                [
                    Symbol(gva, name[:1], name[1:])
                    for gva, name in zip(_addresses(pages, place), names, strict=True)
                ],
            )
    return None


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _starts(tokens: list[bytes]) -> list[int]:
    """Where each token begins in their table."""
    starts, at = [], 0
    for token in tokens:
        starts.append(at)
        at += len(token) + 1
    return starts


def _places_before(pages: Pages, table: int) -> Iterator[_Place]:
    """By the old order: offsets, relative_base, num_syms and names, all before the token table."""
    low = max(0, table - _MAX_TABLES_BYTES)
    at = pages.rfind(_BASE_END, low, table)
    while at >= 0:
        base, base_at = _base(pages, at)
        if base is not None:
            count, zero = struct.unpack("<II", pages[base_at + 8 : base_at + 16])
            offsets_at = base_at - _aligned(4 * count)
            if not zero and offsets_at >= 0 and base_at + 2 * count < table:
                yield _Place(base_at + 16, offsets_at, count, base)
        at = pages.rfind(_BASE_END, low, at + len(_BASE_END) - 1)


def _places_behind(pages: Pages, table: int, begin: int) -> Iterator[_Place]:
    """By the new order: num_syms and names before the token table, the others behind its index."""
    low, high = max(0, table - _MAX_TABLES_BYTES), begin + _MAX_TABLES_BYTES
    at = pages.find(_BASE_END, begin, high)
    while at >= 0:
        base, base_at = _base(pages, at)
        if base is not None:
            most = (base_at - begin) // 4
            for count in (most, most - 1):  # the offsets may end 4 bytes before relative_base
                num_syms_at = pages.rfind(struct.pack("<II", count, 0), low, table)
                if num_syms_at >= 0:
                    yield _Place(num_syms_at + 8, begin, count, base)
        at = pages.find(_BASE_END, at + 1, high)


_BASE_END = KERNEL_HALF.to_bytes(8, "little")[4:]  # the upper half of what relative_base can be


def _base(pages: Pages, end_at: int) -> tuple[int | None, int]:
    """What may be relative_base, or None, and its place, if _BASE_END is at this offset."""
    base_at = end_at - len(_BASE_END)
    base = int.from_bytes(pages[max(0, base_at) : base_at + 8], "little")
    sound = base_at >= 0 and base_at % _ALIGNMENT == 0 and base % _PAGE_BYTES == 0
    return (base if sound and base >= KERNEL_HALF else None), base_at


def _names(data: bytes, tokens: list[str], count: int) -> list[str] | None:
    """`count` names, each with its kind before it, if there are so many and then their markers."""
    names, markers, at = [], [], 0
    for number in range(count):
        if number % _MARKER_STEP == 0:
            markers.append(at)
        if at + 1 >= len(data):
            return None
        length = data[at]
        at += 1
        if length & 0x80:  # two bytes, of seven bits each
            length = length & 0x7F | data[at] << 7
            at += 1
        names.append("".join([tokens[token] for token in data[at : at + length]]))
        at += length
    expected = struct.pack(f"<{len(markers)}I", *markers)
    return names if data[_aligned(at) :].startswith(expected) else None


def _addresses(pages: Pages, place: _Place) -> list[int]:
    size = 4 * place.total
    offsets = memoryview(pages[place.offsets_at : place.offsets_at + size]).cast("i")
    base = place.base
    if place.total and min(offsets) < 0:  # CONFIG_KALLSYMS_ABSOLUTE_PERCPU
        return [offset if offset >= 0 else base - 1 - offset for offset in offsets]
    return [base + offset for offset in offsets]

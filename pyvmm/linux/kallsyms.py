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
address of the kernel's beginning, and the place where it is by num_syms, names and markers, which
must fit together.  Addresses are as the kernel runs: one that moved itself (KASLR) has corrected
relative_base.

A guest's memory can be full of what looks like these tables: see Patience.

Left out: 32-bit kernels, Linux before 5.0, and what is in modules.
Source: Linux, scripts/kallsyms.c, write_src(), and kernel/kallsyms.c, kallsyms_sym_address().
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from collections.abc import Iterator
from itertools import chain

from pyvmm.light import NamedTuple

KERNEL_HALF = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map: no kernel is linked below
IMAGE_ALIGNMENT = 2 << 20  # MIN_KERNEL_ALIGN, of the image's beginning: its GVA and its GPA

_TOKENS = 256
_INDEX = struct.Struct(f"<{_TOKENS}H")
# Searched for by a regular expression: find() of a string with zeros takes ten times as long.
_DIGITS = re.compile(b"".join(b"%d\0" % digit for digit in range(10)))
_MAX_TOKEN_TABLE_BYTES = 1 << 16  # the index has 16 bits
_ALIGNMENT = 8  # of each table
_MARKER_STEP = 256  # markers: where in the names every 256th one begins
_MAX_TABLES_BYTES = 16 << 20  # a distribution's kernel has 5 MiB
_MAX_SYMBOLS = 1 << 20  # ... 200,000 symbols,
_MAX_CHARACTERS = 64 << 20  # ... and 5 million characters
_MAX_NAME_BYTES = 512  # KSYM_NAME_LEN
_MAX_BASE_ENDS = 4096  # to look at from one token table on: relative_base is one of the first
# What ten digits in a row take of a Patience; and what a token table does, or a relative_base.
_DIGITS_COST, _TABLE_COST = 4, 256
_PATIENCE = 64 * _TABLE_COST

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


class Patience:
    """How much more to look at before giving up, in searches that belong together.

    A kernel needs very little of it, and without it a guest could keep us busy for hours: each of
    millions of values that may be relative_base has a search through 16 MiB.
    """

    def __init__(self) -> None:
        self._left = _PATIENCE

    def take(self, cost: int) -> bool:
        """Whether to look at one thing more, which costs so much."""
        self._left -= cost
        return self._left >= 0


class _Place(NamedTuple):
    """Where the names and the offsets of `total` symbols may be, and what relative_base says."""

    names_at: int
    offsets_at: int
    total: int
    base: int


def find(
    pages: Pages, begin: int = 0, end: int = sys.maxsize, patience: Patience | None = None
) -> Kallsyms | None:
    """The symbol table in these pages of guest memory: the first one that is whole.

    (A kernel that unpacked itself may have left remains of a copy, uncorrected, behind its own.)
    """
    for tokens, table, place in _places(pages, begin, end, patience or Patience()):
        names = _names(pages[place.names_at : table], tokens, place.total)
        if names is not None:
            gvas = _addresses(pages, place)
            symbols = [Symbol(v, name[:1], name[1:]) for v, name in zip(gvas, names, strict=True)]
            return Kallsyms(place.base, symbols)
    return None


def find_base(pages: Pages, begin: int, end: int, patience: Patience) -> int | None:
    """Only where the image begins, without the proof that the names are: in a tenth of the time."""
    return next((place.base for _, _, place in _places(pages, begin, end, patience)), None)


def _places(
    pages: Pages, begin: int, end: int, patience: Patience
) -> Iterator[tuple[list[str], int, _Place]]:
    """The tokens, the place of their table, and where the other tables may be."""
    for match in _DIGITS.finditer(pages, begin, min(end, len(pages))):
        if not patience.take(_DIGITS_COST):
            return
        found = _token_table(pages, match.start())
        if found is not None and patience.take(_TABLE_COST):
            tokens, table, index_end = found
            for place in chain(
                _places_before(pages, table, patience),
                _places_behind(pages, table, index_end, patience),
            ):
                yield tokens, table, place


def _token_table(pages: Pages, digits: int) -> tuple[list[str], int, int] | None:
    """The tokens, where their table begins, and where its index ends, if it has these digits."""
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
    return [token.decode("ascii", "replace") for token in tokens], table, index_end


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _starts(tokens: list[bytes]) -> list[int]:
    """Where each token begins in their table."""
    starts, at = [], 0
    for token in tokens:
        starts.append(at)
        at += len(token) + 1
    return starts


def _places_before(pages: Pages, table: int, patience: Patience) -> Iterator[_Place]:
    """By the old order: offsets, relative_base, num_syms and names, all before the token table."""
    low = max(0, table - _MAX_TABLES_BYTES)
    high = table
    for _ in range(_MAX_BASE_ENDS):
        at = pages.rfind(_BASE_END, low, high)
        if at < 0:
            return
        high = at + len(_BASE_END) - 1
        base, base_at = _base(pages, at)
        if base is not None:
            count, zero = struct.unpack("<II", pages[base_at + 8 : base_at + 16])
            offsets_at = base_at - _aligned(4 * count)
            fits = offsets_at >= 0 and base_at + 2 * count < table
            if 0 < count <= _MAX_SYMBOLS and not zero and fits:
                if not patience.take(_TABLE_COST):
                    return
                yield _Place(base_at + 16, offsets_at, count, base)


def _places_behind(pages: Pages, table: int, begin: int, patience: Patience) -> Iterator[_Place]:
    """By the new order: num_syms and names before the token table, the others behind its index."""
    low, high = max(0, table - _MAX_TABLES_BYTES), begin + _MAX_TABLES_BYTES
    at = begin - 1
    for _ in range(_MAX_BASE_ENDS):
        at = pages.find(_BASE_END, at + 1, high)
        if at < 0:
            return
        base, base_at = _base(pages, at)
        if base is not None:
            if not patience.take(_TABLE_COST):
                return
            most = (base_at - begin) // 4
            for count in (most, most - 1):  # the offsets may end 4 bytes before relative_base
                if not 0 < count <= _MAX_SYMBOLS:
                    continue
                num_syms_at = pages.rfind(struct.pack("<II", count, 0), low, table)
                if num_syms_at >= 0:
                    yield _Place(num_syms_at + 8, begin, count, base)


_BASE_END = KERNEL_HALF.to_bytes(8, "little")[4:]  # the upper half of what relative_base can be


def _base(pages: Pages, end_at: int) -> tuple[int | None, int]:
    """What may be relative_base, or None, and its place, if _BASE_END is at this offset."""
    base_at = end_at - len(_BASE_END)
    base = int.from_bytes(pages[max(0, base_at) : base_at + 8], "little")
    sound = base_at >= 0 and base_at % _ALIGNMENT == 0 and base % IMAGE_ALIGNMENT == 0
    return (base if sound and base >= KERNEL_HALF else None), base_at


def _names(data: bytes, tokens: list[str], total: int) -> list[str] | None:
    """`total` names, each with its kind before it, if there are so many and then their markers."""
    names, markers, at, left = [], [], 0, _MAX_CHARACTERS
    for number in range(total):
        if number % _MARKER_STEP == 0:
            markers.append(at)
        if at + 1 >= len(data):
            return None
        length = data[at]
        at += 1
        if length & 0x80:  # two bytes, of seven bits each
            length = length & 0x7F | data[at] << 7
            at += 1
        if length > _MAX_NAME_BYTES:
            return None
        names.append("".join([tokens[token] for token in data[at : at + length]]))
        left -= len(names[-1])
        if left < 0:
            return None
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

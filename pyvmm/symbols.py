"""The names of a kernel's functions, from the symbol table of its ELF file.

    Symbols.from_elf("guests/multiboot.elf").name(0x10033a)     # "get_char+0x8"

A symbol table has more than functions: variables, constants, files.  Only what lies in sections
with code counts: functions, and the labels of assembly sources, which have no type.

Left out: line numbers (`addr2line -e kernel.elf ADDRESS` knows them), names of C++ and Rust made
readable (`c++filt`), and addresses other than those the file was linked for: of a kernel that is
linked high, code that runs at its physical address before paging is on has no name.
Source: System V ABI ("gABI"), chapter "Object Files", "Sections" and "Symbol Table".
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from pyvmm.boot.elf import EI_CLASS, EI_DATA, ELFCLASS32, ELFCLASS64, ELFDATA2LSB, MAGIC
from pyvmm.x86 import linear_address

if TYPE_CHECKING:
    from pyvmm.emulate import Cpu

SHT_SYMTAB = 2
SHF_ALLOC, SHF_EXECINSTR = 2, 4
STB_LOCAL = 0  # a symbol's binding: the upper half of st_info
STT_NOTYPE, STT_FUNC = 0, 2  # its type: the lower half

MAX_NAME = 1000  # bytes; what compilers make of generic types is long, but shorter than this


class Symbols:
    """Names of places in a kernel's code, to be asked for any address."""

    def __init__(self, places: Iterable[tuple[int, str]]) -> None:
        """`places` are (gva, name), the name empty where named code ends.

        Of several names of one address the last one counts.
        """
        names = dict(places)
        self._gvas = sorted(names)
        self._names = [names[gva] for gva in self._gvas]

    def __bool__(self) -> bool:
        """Whether there is any name."""
        return any(self._names)

    @classmethod
    def from_elf(cls, path: str | os.PathLike[str]) -> Symbols:
        """The symbols in an ELF32 or ELF64 file; a file without a symbol table has no names.

        Raises OSError, and ValueError with a message of one line for what is no sound ELF file.
        """
        with open(path, "rb") as file:
            try:
                return cls(_places(file))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_map(cls, path: str | os.PathLike[str]) -> Symbols:
        """The symbols in a System.map, or what nm prints: "address type name" lines.

        Raises OSError, and ValueError with a message of one line for anything else.
        """
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_MAP)
        if len(text) == _MAX_MAP:  # some files never end
            raise ValueError(f"{os.fspath(path)}: too long for a System.map")
        return cls(_places_in_map(os.fspath(path), text.splitlines()))

    def gva(self, name: str) -> int | None:
        """Where the code with this name begins; None if there is none."""
        return self._gvas[self._names.index(name)] if name in self._names else None

    def moved(self, distance: int) -> Symbols:
        """The same names, so many bytes higher."""
        gvas = [gva + distance for gva in self._gvas]
        return Symbols(zip(gvas, self._names, strict=True))

    def name(self, gva: int) -> str | None:
        """`function` or `function+0x12`; None outside of all code that has names."""
        index = bisect_right(self._gvas, gva) - 1
        if index < 0 or not self._names[index]:
            return None
        offset = gva - self._gvas[index]
        return f"{self._names[index]}+{offset:#x}" if offset else self._names[index]


def find_elf(image: str | os.PathLike[str]) -> str | None:
    """The ELF file with an image's symbols: itself, or the .elf beside a .bin.  Raises OSError."""
    path = os.path.realpath(image)
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return path
    beside = os.path.splitext(path)[0] + ".elf"
    return beside if os.path.isfile(beside) else None


def elf_bits(path: str | os.PathLike[str]) -> int | None:
    """32 or 64 for an ELF file of that class; None for any other, or none."""
    try:
        with open(path, "rb") as file:
            ident = file.read(EI_CLASS + 1)
    except OSError:
        return None
    return {MAGIC + bytes([ELFCLASS32]): 32, MAGIC + bytes([ELFCLASS64]): 64}.get(ident)


def where(cpu: Cpu, state: str, symbols: Symbols) -> str:
    """Where a vCPU is, in words; `state` is what VM.run_state() says of it."""
    if state == "not started":
        return state
    gva = linear_address(cpu.sregs.cs.base, cpu.regs.rip, cpu.mode)
    if state == "halted":
        gva -= 1  # RIP is behind the hlt, which may be the last instruction of a function
    place = f"at {symbols.name(gva) or hex(gva)}"
    return f"halted {place}" if state == "halted" else place


class _Class(NamedTuple):
    """The structs of a format.  A symbol's value is read apart, to have one order in both.

    file_header: e_shoff, e_shentsize, e_shnum.  section_header: as in `_Section`.
    symbol: st_name, st_info, st_shndx.  symbol_value: st_value.
    """

    file_header: Struct
    section_header: Struct
    symbol: Struct
    symbol_value: Struct


_CLASSES = {
    ELFCLASS32: _Class(
        Struct("<32x I 10x HH 2x"), Struct("<4x IIIIII 12x"), Struct("<I 8x BxH"), Struct("<4xI8x")
    ),
    ELFCLASS64: _Class(
        Struct("<40x Q 10x HH 2x"), Struct("<4x IQQQQI 20x"), Struct("<IBxH 16x"), Struct("<8xQ8x")
    ),
}


# nm(1): text and weak; undefined, or of unknown type; and what can be without an address.
_CODE_TYPES, _NO_TYPES, _UNDEFINED = "tTwW", "U?", ("U", "w", "v")


_MAX_MAP = 64 << 20  # characters; a kernel's has some 10 million


def _places_in_map(path: str, lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Names of code, and "" where something else begins."""
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) > 1 and words[0] in _UNDEFINED:  # nm knows no address
            continue
        try:
            gva, kind, name = int(words[0], 16), words[1], words[2]
        except (ValueError, IndexError):
            raise ValueError(f"{path}:{number}: not a line of a System.map") from None
        if kind not in _NO_TYPES:
            yield gva, name[:MAX_NAME] if kind in _CODE_TYPES else ""


class _Section(NamedTuple):
    """What a section header says that matters here, with the gABI's names (without their `sh_`)."""

    type: int
    flags: int
    addr: int
    offset: int
    size: int
    link: int


def _places(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """What Symbols wants: where each code section ends, then the symbols, the best ones last."""
    elf_class = _class_of(file)
    sections = _sections(file, elf_class)
    wanted = SHF_ALLOC | SHF_EXECINSTR
    code = {n for n, section in enumerate(sections) if section.flags & wanted == wanted}
    for index in code:
        yield sections[index].addr + sections[index].size, ""

    table = next((section for section in sections if section.type == SHT_SYMTAB), None)
    if table is None:
        return
    if table.link >= len(sections):
        raise ValueError("a symbol table without its names; damaged?")
    strings = _read(file, sections[table.link].offset, sections[table.link].size)
    size = elf_class.symbol.size
    entries = _read(file, table.offset, table.size // size * size)
    symbols = []
    for (name, info, shndx), (gva,) in zip(
        elf_class.symbol.iter_unpack(entries),
        elf_class.symbol_value.iter_unpack(entries),
        strict=True,
    ):
        kind, binding = info & 15, info >> 4
        text = strings[name : name + MAX_NAME].split(b"\0", 1)[0]
        if text and shndx in code and kind in (STT_NOTYPE, STT_FUNC):
            symbols.append((kind == STT_FUNC, binding != STB_LOCAL, gva, text))
    symbols.sort(key=lambda symbol: symbol[:2])  # a function's name counts more than a label's
    for _, _, gva, text in symbols:
        yield gva, text.decode(errors="replace")


def _class_of(file: BinaryIO) -> _Class:
    ident = file.read(EI_DATA + 1)
    if ident[: len(MAGIC)] != MAGIC:
        raise ValueError("not an ELF file")
    elf_class = _CLASSES.get(ident[EI_CLASS]) if len(ident) > EI_DATA else None
    if elf_class is None or ident[EI_DATA] != ELFDATA2LSB:
        raise ValueError("neither ELF32 nor ELF64 for x86; damaged?")
    return elf_class


def _sections(file: BinaryIO, elf_class: _Class) -> list[_Section]:
    header = elf_class.file_header
    offset, size, count = header.unpack(_read(file, 0, header.size))
    if count and size != elf_class.section_header.size:
        raise ValueError(f"section headers of {size} bytes; damaged?")
    table = _read(file, offset, size * count)
    return [_Section._make(fields) for fields in elf_class.section_header.iter_unpack(table)]


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes of the file; raises ValueError, before any allocation, if it is shorter."""
    if offset + size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"there are no {size} bytes at {offset:#x}; truncated?")
    file.seek(offset)
    return file.read(size)

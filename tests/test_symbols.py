"""The names of a kernel's functions: which symbols count, and what damaged files do."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from pyvmm.symbols import Symbols, find_elf, where
from pyvmm.x86 import CpuMode
from tests.conftest import GUESTS

CODE, DATA = 0xFFFF_8000_0010_0000, 0xFFFF_8000_0020_0000  # GVA of the sections
CODE_SIZE = 0x100
LOCAL, GLOBAL = 0, 1
NOTYPE, OBJECT, FUNC, FILE = 0, 1, 2, 4
IN_CODE, IN_DATA, ABSOLUTE = 1, 2, 0xFFF1


class Symbol(NamedTuple):
    """A row of the symbol table."""

    name: str
    value: int
    kind: int = FUNC
    binding: int = GLOBAL
    section: int = IN_CODE


def elf_file(*symbols: Symbol, bits: int = 64) -> bytes:
    """An ELF file with a section of code, one of data, and a symbol table."""
    strings, entries = b"\0", b"\0" * (24 if bits == 64 else 16)
    for symbol in symbols:
        info = symbol.binding << 4 | symbol.kind
        fields = len(strings), info, symbol.section, symbol.value
        if bits == 64:
            entries += struct.pack("<IBxHQQ", *fields, 0)
        else:
            name, info, section, value = fields
            entries += struct.pack("<IIIBxH", name, value & 0xFFFF_FFFF, 0, info, section)
        strings += symbol.name.encode() + b"\0"
    header_size, word = (64, "Q") if bits == 64 else (52, "I")
    mask = (1 << bits) - 1

    def section(type: int, flags: int, gva: int, offset: int, size: int, link: int = 0) -> bytes:
        fields = 0, type, flags, gva & mask, offset, size, link, 0, 0, 0
        return struct.pack(f"<II{word * 4}II{word * 2}", *fields)

    entries_at = header_size + len(strings)
    sections = (
        section(0, 0, 0, 0, 0),
        section(1, 6, CODE, 0, CODE_SIZE),  # PROGBITS; ALLOC, EXECINSTR
        section(1, 3, DATA, 0, 0x1000),  # ALLOC, WRITE
        section(2, 0, 0, entries_at, len(entries), link=4),  # SYMTAB
        section(3, 0, 0, header_size, len(strings)),  # STRTAB
    )
    ident = b"\x7fELF" + bytes((bits // 32, 1, 1)) + bytes(9)
    fields = 2, 62, 1, 0, 0, entries_at + len(entries), 0, header_size, 0, 0
    header = struct.pack(f"<HHI{word * 3}IHHH", *fields)
    header += struct.pack("<HHH", len(sections[0]), len(sections), 0)
    return ident + header + strings + entries + b"".join(sections)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernel.elf"


def symbols_of(path: Path, *symbols: Symbol, bits: int = 64) -> Symbols:
    path.write_bytes(elf_file(*symbols, bits=bits))
    return Symbols.from_elf(path)


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    ("offset", "name"),
    [
        (-1, None),
        (0x00, None),  # code, but before the first function
        (0x10, "main"),
        (0x11, "main+0x1"),
        (0x22, "main+0x12"),
        (0x7F, "main+0x6f"),
        (0x80, "print"),
        (0xFF, "print+0x7f"),
        (0x100, None),  # the end of the code
        (1 << 40, None),
    ],
)
def test_an_address_has_the_name_of_the_function_and_its_distance(
    path: Path, bits: int, offset: int, name: str | None
) -> None:
    code = CODE & ((1 << bits) - 1)
    symbols = symbols_of(path, Symbol("print", CODE + 0x80), Symbol("main", CODE + 0x10), bits=bits)
    assert symbols.name(code + offset) == name


@pytest.mark.parametrize(
    "other",
    [
        Symbol("SIZE", CODE + 8, NOTYPE, LOCAL, ABSOLUTE),
        Symbol("variable", CODE + 8, OBJECT, GLOBAL, IN_DATA),
        Symbol("label_in_data", CODE + 8, NOTYPE, GLOBAL, IN_DATA),
        Symbol("table", CODE + 8, OBJECT, GLOBAL, IN_CODE),
        Symbol("main.c", CODE + 8, FILE, LOCAL, ABSOLUTE),
        Symbol("undefined", CODE + 8, FUNC, GLOBAL, 0),
        Symbol("", CODE + 8),
    ],
    ids=lambda symbol: symbol.name or "nameless",
)
def test_only_functions_and_labels_in_code_count(path: Path, other: Symbol) -> None:
    assert symbols_of(path, Symbol("main", CODE), other).name(CODE + 8) == "main+0x8"


def test_a_label_inside_of_a_function_is_the_nearer_name(path: Path) -> None:
    symbols = symbols_of(path, Symbol("main", CODE), Symbol("again", CODE + 8, NOTYPE, LOCAL))
    assert symbols.name(CODE + 9) == "again+0x1"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Symbol("f", CODE, FUNC, LOCAL), Symbol("_text", CODE, NOTYPE, GLOBAL)),
        (Symbol("f", CODE, FUNC, GLOBAL), Symbol("alias", CODE, FUNC, LOCAL)),
        (Symbol("start", CODE, NOTYPE, GLOBAL), Symbol("first", CODE, NOTYPE, LOCAL)),
    ],
)
def test_of_several_names_a_function_s_counts_and_then_a_global_one(
    path: Path, order: int, better: Symbol, worse: Symbol
) -> None:
    assert symbols_of(path, *(better, worse)[::order]).name(CODE) == better.name


def test_a_function_where_another_section_ends_is_found() -> None:
    assert Symbols([(0x100, "f"), (0x200, ""), (0x200, "g")]).name(0x201) == "g+0x1"


def test_names_are_text_whatever_the_bytes_are(path: Path) -> None:
    path.write_bytes(elf_file(Symbol("main", CODE)).replace(b"main", b"m\xff\nn"))
    assert Symbols.from_elf(path).name(CODE) == "m\ufffd\nn"


def test_names_can_be_moved_and_asked_for_their_address() -> None:
    symbols = Symbols([(0x100, "f"), (0x200, ""), (0x300, "g")])
    assert (symbols.gva("g"), symbols.gva("h")) == (0x300, None)
    moved = symbols.moved(0x1000)
    assert [moved.name(gva) for gva in (0x101, 0x1101, 0x1200)] == [None, "f+0x1", None]
    assert symbols and not Symbols([(0x100, "")])


@pytest.mark.parametrize(
    ("guest", "entry"),
    [("hello", 0x10_0000), ("hello32", 0x10_0000), ("hello16", 0x7C00), ("loops", 0x10_0000)],
)
def test_the_guests_have_symbols(guest: str, entry: int) -> None:
    symbols = Symbols.from_elf(GUESTS / f"{guest}.elf")
    assert symbols.name(entry) == "_start"
    assert symbols.name(entry + 1) == "_start+0x1"
    assert symbols.name(entry - 1) is None


# --- where a vCPU is ---------------------------------------------------------------------------

PLACES = Symbols([(0x7C00, "boot"), (0x7C10, "fail"), (0x7C20, "")])


@pytest.mark.parametrize(
    ("state", "mode", "cs_base", "rip", "place"),
    [
        ("running", CpuMode.LONG, 0, 0x7C01, "at boot+0x1"),
        ("running", CpuMode.REAL, 0x7C00, 0x12, "at fail+0x2"),
        ("running", CpuMode.LONG, 0, 0xDEAD_0000, "at 0xdead0000"),
        ("not started", CpuMode.REAL, 0xFFFF_0000, 0xFFF0, "not started"),
        # The function ends with its hlt: RIP is already in the next one.
        ("halted", CpuMode.PROTECTED32, 0, 0x7C10, "halted at boot+0xf"),
    ],
)
def test_where_a_vcpu_is(state: str, mode: CpuMode, cs_base: int, rip: int, place: str) -> None:
    cpu: Any = SimpleNamespace(
        mode=mode,
        regs=SimpleNamespace(rip=rip),
        sregs=SimpleNamespace(cs=SimpleNamespace(base=cs_base)),
    )
    assert where(cpu, state, PLACES) == place


# --- files -------------------------------------------------------------------------------------


def test_a_stripped_file_has_no_names(path: Path) -> None:
    contents = bytearray(elf_file(Symbol("main", CODE)))
    contents[40:48], contents[58:62] = bytes(8), bytes(4)  # e_shoff; e_shentsize, e_shnum
    path.write_bytes(contents)
    assert Symbols.from_elf(path).name(CODE) is None


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not an ELF file"),
        (b"\xf4" * 100, "not an ELF file"),
        (b"\x7fELF", "neither ELF32 nor ELF64"),
        (b"\x7fELF\x03\x01" + bytes(100), "neither ELF32 nor ELF64"),
        (b"\x7fELF\x02\x02" + bytes(100), "neither ELF32 nor ELF64"),
        (b"\x7fELF\x02\x01", "truncated"),
        (elf_file(Symbol("main", CODE))[:-1], "truncated"),
    ],
)
def test_what_is_no_sound_elf_file_is_an_error_of_one_line(
    path: Path, contents: bytes, message: str
) -> None:
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        Symbols.from_elf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Symbols.from_elf(tmp_path / "missing.elf")


@pytest.mark.parametrize("bits", [32, 64])
def test_damaged_files_are_an_error_or_have_other_names(path: Path, bits: int) -> None:
    sound = elf_file(*(Symbol(f"f{n}", CODE + 8 * n) for n in range(8)), bits=bits)
    rng = random.Random(1)
    for _ in range(200):
        contents = bytearray(sound)
        for _ in range(rng.randrange(1, 6)):
            contents[rng.randrange(4, len(contents))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        path.write_bytes(contents[: rng.choice((len(contents), rng.randrange(len(contents))))])
        try:
            symbols = Symbols.from_elf(path)
        except ValueError:
            continue
        for offset in range(0, CODE_SIZE, 16):
            assert symbols.name(CODE + offset) != ""


# --- which file --------------------------------------------------------------------------------


def test_an_elf_image_has_its_own_symbols(path: Path) -> None:
    path.write_bytes(elf_file())
    assert find_elf(path) == str(path.resolve())


def test_a_flat_image_has_those_of_the_elf_file_beside_it(path: Path) -> None:
    flat = path.with_suffix(".bin")
    flat.write_bytes(b"\xf4")
    assert find_elf(flat) is None
    path.write_bytes(elf_file())
    assert find_elf(flat) == str(path.resolve())


# --- System.map ----------------------------------------------------------------------------------


def test_a_system_map_names_code_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "System.map"
    path.write_text(
        "0000000000001000 T start\n"
        "0000000000001010 t helper\n"
        "0000000000001020 W weak\n"
        "0000000000000000 U undefined\n"
        "                 U undefined too\n"
        "                 w weak and undefined\n"
        "                 v\tweak_object\n"
        "0000000000002000 D variable\n"
    )
    symbols = Symbols.from_map(path)
    named = [symbols.name(gva) for gva in (0xFFF, 0x1000, 0x1018, 0x1020, 0x2000, 0x9000)]
    assert named == [None, "start", "helper+0x8", "weak", None, None]


@pytest.mark.parametrize(
    "text", ["hello\n", "10 T\n", "xyz T name\n", "1000 T start\n\nrest\n", "1000\n", "U\n"]
)
def test_what_is_no_system_map_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "System.map"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"System\.map:\d: not a line of a System\.map"):
        Symbols.from_map(path)

"""The images in guests/ are what their sources say.

The images are checked in, so that running one needs no assembler.  Here they are built again, into
a temporary directory, and compared in what a VMM loads: the bytes, the address they go to and the
entry point.  Whether the guests do what they should is tested elsewhere, on a real /dev/kvm.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

GUESTS = Path(__file__).resolve().parent.parent / "guests"
ASSEMBLY = sorted(source.stem for source in GUESTS.glob("*.S"))
C = sorted(source.stem for source in GUESTS.glob("*.c"))
REAL_MODE = {"hello16"}
PROTECTED_MODE = {"hello32"}
MULTIBOOT = ["multiboot", "smp"]

# Labels that other tests and the documentation set breakpoints on.
LABELS = {
    "hello": {"_start", "next_char", "putc", "done", "message"},
    "hello16": {"_start", "putc", "done"},
    "hello32": {"_start", "putc", "done"},
    "counter": {"_start", "counter"},
    "int3": {"the_int3", "after_int3", "bp_handler", "done"},
    "exceptions": {"cause_de", "cause_ud", "cause_gp", "cause_pf", "handle"},
    "ring3": {"enter_user", "user", "user_hlt", "system_call", "gp_handler"},
    "paging": {"load_cr3", "new_tables", "pml4", "small_page"},
    "triplefault": {"crash"},
    "mmio": {"stores", "load1", "load2", "load4", "load8"},
    "sse": {"source", "copy"},
    "exit": {"_start"},
    "loops": {"main", "outer", "inner", "inner_add", "after_add", "total"},
    "cloops": {"main", "outer", "inner", "total"},
    "smp": {"start64", "trampoline", "ap", "bsp", "count", "timer_handler", "counter", "ticks"},
    "multiboot": {"start64", "kernel_main", "run", "page_fault", "serial_irq", "ticks"},
}


@dataclass(frozen=True)
class Segment:
    """One PT_LOAD: `content` goes to `gpa`, followed by zeros up to `size` bytes."""

    gpa: int
    size: int
    content: bytes


@dataclass(frozen=True)
class Elf:
    """What this test wants to know of an ELF file."""

    bits: int
    entry: int
    segments: tuple[Segment, ...]
    sections: dict[str, bytes]
    symbols: frozenset[str]


def read_elf(path: Path) -> Elf:
    """Reads an x86 ELF file.  Source: System V ABI, "Object Files" and "Program Loading"."""
    data = path.read_bytes()
    assert data[:4] == b"\x7fELF", f"{path} is not an ELF file"
    wide = data[4] == 2
    header = struct.unpack_from("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH", data, 16)
    _, _, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = header

    segments = []
    for n in range(phnum):
        at = phoff + n * phentsize
        if wide:
            kind, _, offset, _, gpa, filesz, memsz = struct.unpack_from("<IIQQQQQ", data, at)
        else:
            kind, offset, _, gpa, filesz, memsz = struct.unpack_from("<IIIIII", data, at)
        if kind == 1:  # PT_LOAD
            segments.append(Segment(gpa, memsz, data[offset : offset + filesz]))

    sections: dict[str, bytes] = {}
    headers = [
        struct.unpack_from("<IIQQQQ" if wide else "<IIIIII", data, shoff + n * shentsize)
        for n in range(shnum)
    ]
    names = headers[shstrndx][4]
    for name, kind, _, _, offset, size in headers:
        if kind != 8:  # SHT_NOBITS has no content in the file
            sections[c_string(data, names + name)] = data[offset : offset + size]

    symbol_size = 24 if wide else 16
    table = sections.get(".symtab", b"")
    symbols = frozenset(
        c_string(sections[".strtab"], struct.unpack_from("<I", table, at)[0])
        for at in range(0, len(table), symbol_size)
    )
    return Elf(64 if wide else 32, entry, tuple(segments), sections, symbols)


def c_string(data: bytes, offset: int) -> str:
    """The string at `offset` bytes into `data`, up to its zero byte."""
    return data[offset : data.index(b"\0", offset)].decode()


def build(sources: Path, out: Path, target: str) -> None:
    """Runs make in the directory `sources`; the images go to `out`."""
    make = shutil.which("make")
    assert make, "there is an assembler, but no make (both are needed to build the guests)"
    result = subprocess.run(
        [make, "-C", str(sources), f"OUT={out}", target],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the assembly guests, built now from their sources."""
    if shutil.which("as") is None:
        pytest.skip("no assembler")
    out = tmp_path_factory.mktemp("guests")
    build(GUESTS, out, "asm")
    return out


@pytest.fixture(scope="module")
def recompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all guests, also those in C, built now from their sources."""
    if shutil.which("as") is None:
        pytest.skip("no assembler")
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("guests")
    build(GUESTS, out, "all")
    return out


def test_every_source_has_its_images_checked_in_and_every_image_its_source() -> None:
    expected = set(ASSEMBLY + C)
    assert expected == set(LABELS)
    assert expected == {image.stem for image in GUESTS.glob("*.bin")}
    assert expected == {image.stem for image in GUESTS.glob("*.elf")}


def test_readme_has_a_row_for_every_guest() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (GUESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(ASSEMBLY + C)


@pytest.mark.parametrize("name", ASSEMBLY + C)
def test_elf_and_flat_image_load_the_same_bytes(name: str) -> None:
    elf = read_elf(GUESTS / f"{name}.elf")
    (segment,) = elf.segments
    assert segment.content == (GUESTS / f"{name}.bin").read_bytes()
    assert segment.gpa == (0x7C00 if name in REAL_MODE else 0x100000)
    assert elf.entry == segment.gpa  # a flat image is entered at its first byte
    assert elf.bits == (32 if name in REAL_MODE | PROTECTED_MODE else 64)


@pytest.mark.parametrize("name", MULTIBOOT)
@pytest.mark.parametrize("suffix", ["elf", "bin"])
def test_multiboot_header_says_what_to_load_where(name: str, suffix: str) -> None:
    data = (GUESTS / f"{name}.{suffix}").read_bytes()
    (segment,) = read_elf(GUESTS / f"{name}.elf").segments
    offset = data.index(struct.pack("<I", 0x1BADB002), 0, 8192)  # in the first 8 KiB
    magic, flags, checksum, header, load, load_end, bss_end, entry = struct.unpack_from(
        "<8I", data, offset
    )
    assert offset % 4 == 0
    assert (magic + flags + checksum) % (1 << 32) == 0
    assert (load, load_end) == (segment.gpa, segment.gpa + len(segment.content))
    assert (entry, bss_end) == (segment.gpa, segment.gpa + segment.size)
    image = offset - (header - load)  # where in the file the bytes for `load` are
    assert data[image : image + len(segment.content)] == segment.content


@pytest.mark.parametrize("name", ASSEMBLY + C)
def test_elf_has_line_numbers_and_the_labels_to_break_at(name: str) -> None:
    elf = read_elf(GUESTS / f"{name}.elf")
    assert ".debug_line" in elf.sections
    assert LABELS[name] <= elf.symbols


@pytest.mark.parametrize("name", ASSEMBLY + C)
def test_images_hold_no_path_of_the_machine_that_built_them(name: str) -> None:
    for image in (GUESTS / f"{name}.elf", GUESTS / f"{name}.bin"):
        # At the start of a string or of a word in it: line numbers are encoded with slashes, too.
        assert not re.findall(rb"[\0 =](?:/[\w.+-]{2,}){2,}", image.read_bytes())


@pytest.mark.parametrize("name", ASSEMBLY)
def test_rebuilt_guest_loads_what_the_checked_in_one_loads(name: str, rebuilt: Path) -> None:
    assert (rebuilt / f"{name}.bin").read_bytes() == (GUESTS / f"{name}.bin").read_bytes()
    new, old = read_elf(rebuilt / f"{name}.elf"), read_elf(GUESTS / f"{name}.elf")
    assert (new.bits, new.entry, new.segments) == (old.bits, old.entry, old.segments)
    assert LABELS[name] <= new.symbols


@pytest.mark.parametrize("name", C)
def test_recompiled_guest_loads_where_the_checked_in_one_loads(name: str, recompiled: Path) -> None:
    new, old = read_elf(recompiled / f"{name}.elf"), read_elf(GUESTS / f"{name}.elf")
    assert (new.bits, new.entry) == (old.bits, old.entry)
    assert [s.gpa for s in new.segments] == [s.gpa for s in old.segments]
    assert LABELS[name] <= new.symbols
    # Another version of the compiler may choose other instructions.  It writes into .comment
    # which one it is.
    if new.sections[".comment"] == old.sections[".comment"]:
        assert new.segments == old.segments


def test_building_elsewhere_gives_the_same_files(rebuilt: Path, tmp_path: Path) -> None:
    sources = tmp_path / "another-place"
    sources.mkdir()
    for source in GUESTS.iterdir():
        if source.suffix in {".S", ".inc", ".ld"} or source.name == "Makefile":
            shutil.copy(source, sources)
    build(sources, sources, "asm")
    for name in ASSEMBLY:
        for image in (f"{name}.elf", f"{name}.bin"):
            assert (sources / image).read_bytes() == (rebuilt / image).read_bytes(), image

"""Static ELF executables, as linkers write them: ELF64 for x86-64 and ELF32 for i386.

An ELF file names its segments (PT_LOAD program headers) with two addresses each: the virtual one
that the code was linked for, and the physical one where the bytes are to be loaded. They differ in
a kernel that is linked high and turns on paging by itself. There is no paging of the guest's own
yet when it is loaded, so the physical address is what counts here. An ELF64 guest is entered in
long mode, an ELF32 guest in protected mode.

Left out: relocation, so position-independent and dynamically linked programs are refused, and
symbols, which are the debugger's business.

Source: System V ABI ("gABI"), chapters "Object Files" and "Program Loading"; its AMD64 and Intel386
supplements for the machine numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

from pyvmm.boot.image import Image, ImageError, LoadOptions, Mode, Segment, check_entry
from pyvmm.light import NamedTuple

MAGIC = b"\x7fELF"

# e_ident: the indices of the class and data bytes, and their values.
EI_CLASS, EI_DATA = 4, 5
ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1

EM_386, EM_X86_64 = 3, 62
_MACHINES = {8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "s390", 40: "ARM", 183: "AArch64"}
_MACHINES |= {243: "RISC-V", 258: "LoongArch"}

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
_NOT_EXECUTABLE = {
    ET_REL: "an object file; link it to an executable first",
    ET_DYN: "position-independent, and pyvmm does not relocate; link it with -static -no-pie",
    ET_CORE: "a core dump, not a program",
}

PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4

# A kernel has around ten. With 0xFFFF (PN_XNUM) the real number would be in the section headers.
MAX_PROGRAM_HEADERS = 256


class _Class(NamedTuple):
    """How the 32-bit and the 64-bit format differ: what each header looks like, and what it means.

    The structs yield the fields of `_FileHeader` and `ProgramHeader` and skip all others. So one
    order fits both formats, although the program header's p_flags is in a different place.
    """

    kind: str
    mode: Mode
    machine: int
    machine_name: str
    file_header: struct.Struct
    program_header: struct.Struct
    address_bits: int


_CLASSES = {
    ELFCLASS32: _Class(
        kind="ELF32",
        mode=Mode.PROTECTED,
        machine=EM_386,
        machine_name="i386",
        file_header=struct.Struct("<16x HH 4x II 10x HH 6x"),
        program_header=struct.Struct("<I IIIII 8x"),
        address_bits=32,
    ),
    ELFCLASS64: _Class(
        kind="ELF64",
        mode=Mode.LONG,
        machine=EM_X86_64,
        machine_name="x86-64",
        file_header=struct.Struct("<16x HH 4x QQ 14x HH 6x"),
        program_header=struct.Struct("<I 4x QQQQQ 8x"),
        address_bits=64,
    ),
}


class ProgramHeader(NamedTuple):
    """What a program header says that matters here, with the gABI's names (without their `p_`)."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


class _FileHeader(NamedTuple):
    """What the ELF header says that matters here, with the gABI's names (without their `e_`)."""

    type: int
    machine: int
    entry: int
    phoff: int
    phentsize: int
    phnum: int


def recognise(contents: bytes) -> bool:
    """Whether the file starts with ELF's magic number. A damaged ELF file is one, too."""
    return contents[: len(MAGIC)] == MAGIC


def load(name: str, contents: bytes, options: LoadOptions) -> Image:
    """The image of a static executable. Raises ImageError for every other or damaged ELF file."""
    elf_class = _class_of(name, contents)
    file_header = _file_header(name, contents, elf_class)
    headers = _program_headers(name, contents, elf_class, file_header)
    loads = [header for header in headers if header.type == PT_LOAD and header.memsz]
    if not loads:
        raise ImageError(f"{name}: nothing to load (no PT_LOAD segment); is it linked?")
    loads.sort(key=lambda header: header.paddr)
    _check_no_overlap(name, loads)
    _check_options(name, elf_class, loads, options)

    view = memoryview(contents)
    segments = tuple(
        Segment(header.paddr, view[header.offset : header.offset + header.filesz], header.memsz)
        for header in loads
    )
    entry = options.entry
    if entry is None:
        entry = _physical_entry(file_header.entry, loads)
    image = Image(name, elf_class.kind, elf_class.mode, entry, segments)
    check_entry(image)
    return image


def program_headers(name: str, contents: bytes) -> list[ProgramHeader]:
    """The program header table of a static executable. Raises ImageError for every other file."""
    elf_class = _class_of(name, contents)
    return _program_headers(name, contents, elf_class, _file_header(name, contents, elf_class))


def _class_of(name: str, contents: bytes) -> _Class:
    """The format of the file by e_ident: only little-endian ELF32 and ELF64 go on."""
    if len(contents) <= EI_DATA:
        raise ImageError(f"{name}: truncated in its ELF header; copy or build it again")
    elf_class = _CLASSES.get(contents[EI_CLASS])
    if elf_class is None:
        raise ImageError(f"{name}: neither ELF32 nor ELF64 (class {contents[EI_CLASS]}); damaged?")
    if contents[EI_DATA] != ELFDATA2LSB:
        raise ImageError(f"{name}: not little-endian, so not for x86; build it for x86-64 or i386")
    return elf_class


def _file_header(name: str, contents: bytes, elf_class: _Class) -> _FileHeader:
    """Read the ELF header; raise ImageError unless it is a static executable for x86."""
    if len(contents) < elf_class.file_header.size:
        raise ImageError(f"{name}: truncated in its ELF header; copy or build it again")
    header = _FileHeader(*elf_class.file_header.unpack_from(contents))
    if header.machine != elf_class.machine:
        raise ImageError(f"{name}: {_wrong_machine(header.machine, elf_class)}")
    if header.type != ET_EXEC:
        what = _NOT_EXECUTABLE.get(header.type, f"not an executable (e_type {header.type})")
        raise ImageError(f"{name}: {what}")
    if header.phnum > MAX_PROGRAM_HEADERS:
        raise ImageError(
            f"{name}: {header.phnum} program headers are not believable (at most "
            f"{MAX_PROGRAM_HEADERS}); the file seems damaged, build it again"
        )
    if header.phnum and header.phentsize != elf_class.program_header.size:
        raise ImageError(
            f"{name}: program headers of {header.phentsize} bytes instead of "
            f"{elf_class.program_header.size}; the file seems damaged, build it again"
        )
    return header


def _wrong_machine(machine: int, elf_class: _Class) -> str:
    if machine == EM_X86_64:
        return "x86-64 code in an ELF32 file (x32); build it as ELF64 (-m64) or for i386 (-m32)"
    if machine == EM_386:
        return "i386 code in an ELF64 file; build it as ELF32 (-m32)"
    found = _MACHINES.get(machine, f"machine {machine}")
    return f"built for {found}, not for {elf_class.machine_name}; use a compiler for x86-64 or i386"


def _program_headers(
    name: str, contents: bytes, elf_class: _Class, file_header: _FileHeader
) -> list[ProgramHeader]:
    """Read the program header table; raise ImageError where it contradicts itself or the file."""
    entry_bytes = elf_class.program_header.size
    if file_header.phoff + file_header.phnum * entry_bytes > len(contents):
        raise ImageError(f"{name}: truncated in its program headers; copy or build it again")
    headers = []
    for index in range(file_header.phnum):
        offset = file_header.phoff + index * entry_bytes
        header = ProgramHeader(*elf_class.program_header.unpack_from(contents, offset))
        if header.type == PT_INTERP:
            raise ImageError(
                f"{name}: a dynamically linked program for an operating system; "
                "link it with -static -nostdlib"
            )
        if header.type == PT_LOAD:
            _check_load(f"{name}: segment {index}", len(contents), elf_class, header)
        headers.append(header)
    return headers


def _check_load(where: str, file_bytes: int, elf_class: _Class, header: ProgramHeader) -> None:
    """Raise ImageError unless the segment's bytes are in the file and its addresses exist."""
    if header.offset + header.filesz > file_bytes:
        raise ImageError(
            f"{where} ends at byte {header.offset + header.filesz} of a file of {file_bytes}; "
            "it is truncated, copy or build it again"
        )
    if header.filesz > header.memsz:
        raise ImageError(
            f"{where} has more bytes in the file ({header.filesz}) than in memory "
            f"({header.memsz}); the file seems damaged, build it again"
        )
    if header.paddr + header.memsz > 1 << elf_class.address_bits:
        raise ImageError(
            f"{where} ({header.memsz} bytes at {header.paddr:#x}) ends beyond "
            f"{elf_class.address_bits}-bit addresses; link it elsewhere"
        )


def _check_no_overlap(name: str, loads: Sequence[ProgramHeader]) -> None:
    """Raise ImageError if two segments, which are sorted by physical address, share a byte."""
    for lower, upper in pairwise(loads):
        if lower.paddr + lower.memsz > upper.paddr:
            raise ImageError(
                f"{name}: the segments at {lower.paddr:#x}..{lower.paddr + lower.memsz:#x} and "
                f"{upper.paddr:#x}..{upper.paddr + upper.memsz:#x} overlap; "
                "check the physical addresses (AT()) in the linker script"
            )


def _check_options(
    name: str, elf_class: _Class, loads: Sequence[ProgramHeader], options: LoadOptions
) -> None:
    """Raise ImageError if the user asks for what the file contradicts. Only --entry can differ."""
    if options.mode not in (None, elf_class.mode):
        raise ImageError(
            f"{name}: an {elf_class.kind} file starts in {elf_class.mode.value} mode; leave out "
            "--mode, or make it a flat binary (objcopy -O binary)"
        )
    if options.load not in (None, loads[0].paddr):
        raise ImageError(
            f"{name}: an ELF file says itself where it is loaded ({loads[0].paddr:#x}); leave out "
            "--load, or make it a flat binary (objcopy -O binary)"
        )


def _physical_entry(entry: int, loads: Sequence[ProgramHeader]) -> int:
    """Where the code at e_entry is when the guest starts, as a gpa.

    The gABI makes e_entry a virtual address. A kernel that is linked high has it there, but starts
    without the paging that would make it valid, so the address is moved along with its segment,
    from p_vaddr to p_paddr (its first code must then not depend on where it runs). Some such
    kernels, Linux for one, write the physical address into e_entry instead: an address in no
    segment's virtual range stays as it is.
    """
    for header in loads:
        if header.vaddr <= entry < header.vaddr + header.memsz:
            return entry - header.vaddr + header.paddr
    return entry

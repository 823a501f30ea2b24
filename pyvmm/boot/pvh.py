"""PVH: how an ELF file of a kernel, such as Linux's `vmlinux`, is entered without a boot sector.

A note in the ELF file names the entry point, a 32-bit physical address. The kernel starts there in
protected mode, also from an ELF64 file, and EBX holds the address of the start info: the command
line, the initrd, a map of the memory and the ACPI tables. The file is loaded as `elf` does it.
Xen defined it; QEMU, Firecracker and Cloud Hypervisor have it, too.

Left out: modules other than the initrd, which is what Linux takes the first one for.

Source: Xen, docs/misc/pvh.pandoc, and in xen/include/public: arch-x86/hvm/start_info.h, and
elfnote.h for the note's number. Notes: System V ABI ("gABI"), "Note Section".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from pyvmm import x86
from pyvmm.boot import elf
from pyvmm.boot.image import (
    GIB,
    Image,
    ImageError,
    LoadOptions,
    Mode,
    RamRanges,
    Segment,
    check_fits,
)
from pyvmm.boot.layout import (
    INFORMATION_BYTES,
    INFORMATION_GPA,
    RSDP_GPA,
    Area,
    memory_map,
    place_initrd,
)

NOTE_OWNER, PHYS32_ENTRY = b"Xen\0", 18  # XEN_ELFNOTE_PHYS32_ENTRY

START_MAGIC, START_VERSION = 0x336EC578, 1
# magic, version, flags, nr_modules; modlist, cmdline, rsdp and memmap _paddr; memmap_entries.
_START_INFO = struct.Struct("<IIII QQQQ I4x")
_MODULE = struct.Struct("<QQQ8x")  # paddr, size, cmdline_paddr
_MEMORY_RANGE = struct.Struct("<QQI4x")
INITRD_END_GPA = 2 * GIB  # which is what 64-bit Linux allows a boot loader

MAX_NOTES_BYTES = 1 << 16  # a kernel has a few hundred
_NOTE_HEADER = struct.Struct("<III")  # bytes of the name, bytes of the descriptor, type


def recognise(contents: bytes) -> bool:
    """Whether it is an ELF file with the note. A damaged ELF file is left to `elf`."""
    return elf.recognise(contents) and _entry(contents) is not None


def _entry(contents: bytes) -> int | None:
    """The entry point that the note names."""
    try:
        headers = elf.program_headers("", contents)
    except ImageError:
        return None
    for header in headers:
        if header.type == elf.PT_NOTE:
            for owner, kind, descriptor in _notes(contents, header.offset, header.filesz):
                if (owner, kind) == (NOTE_OWNER, PHYS32_ENTRY) and len(descriptor) in (4, 8):
                    return int.from_bytes(descriptor, "little")
    return None


def _notes(contents: bytes, start: int, size: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and descriptor of each note, as far as they are whole."""
    view = memoryview(contents)[start : start + min(size, MAX_NOTES_BYTES)]
    at = 0
    while at + _NOTE_HEADER.size <= len(view):
        name_bytes, descriptor_bytes, kind = _NOTE_HEADER.unpack_from(view, at)
        name_at = at + _NOTE_HEADER.size
        descriptor_at = name_at + -(-name_bytes // 4) * 4
        at = descriptor_at + -(-descriptor_bytes // 4) * 4
        if descriptor_at + descriptor_bytes > len(view):
            return
        name = bytes(view[name_at : name_at + name_bytes])
        yield name, kind, bytes(view[descriptor_at : descriptor_at + descriptor_bytes])


def load(name: str, contents: bytes, options: LoadOptions) -> Image:
    """The image of a kernel with a PVH entry. Raises ImageError when it is damaged."""
    if options.mode not in (None, Mode.PROTECTED):
        raise ImageError(
            f"{name}: a kernel with a PVH entry starts in {Mode.PROTECTED.value} mode; "
            "leave out --mode"
        )
    entry = _entry(contents) if options.entry is None else options.entry
    image = elf.load(name, contents, LoadOptions(load=options.load, entry=entry))
    return image._replace(
        kind=f"PVH {image.kind}",
        mode=Mode.PROTECTED,
        expects_pc=True,
        is_linux=True,
        registers=(("rbx", INFORMATION_GPA), ("cr0", x86.CR0_PE | x86.CR0_ET), ("cr4", 0)),
        finish=finish,
    )


def finish(image: Image, ram_ranges: RamRanges) -> Image:
    """Add the initrd and the start info. Raises ImageError when they have no room."""
    check_fits(image, ram_ranges, [])
    initrd = place_initrd(image, ram_ranges, image.segments[-1].end_gpa, INITRD_END_GPA)
    information = _start_info(image, initrd, ram_ranges)
    if len(information) > INFORMATION_BYTES:
        raise ImageError(
            f"{image.name}: the command line and what else the kernel is told have "
            f"{len(information)} bytes of at most {INFORMATION_BYTES}; make it shorter"
        )
    segment = Segment(INFORMATION_GPA, information, len(information), "PVH start info")
    check_fits(image, ram_ranges, [(segment.gpa, segment.size, f"the {segment.what}")])
    extra = (segment,) if initrd is None else (segment, initrd)
    return image._replace(segments=(*image.segments, *extra))


def _start_info(image: Image, initrd: Segment | None, ram_ranges: RamRanges) -> bytes:
    """The start info, for INFORMATION_GPA, with all that it points to behind it."""
    area = Area(INFORMATION_GPA + _START_INFO.size)
    modules = b"" if initrd is None else _MODULE.pack(initrd.gpa, initrd.size, 0)
    ranges = memory_map(ram_ranges)
    information = _START_INFO.pack(
        START_MAGIC,
        START_VERSION,
        0,  # flags
        len(modules) // _MODULE.size,
        area.add(modules, alignment=8),
        area.add(os.fsencode(image.append) + b"\0"),
        RSDP_GPA,
        area.add(b"".join(_MEMORY_RANGE.pack(*line) for line in ranges), alignment=8),
        len(ranges),
    )
    return information + area.data

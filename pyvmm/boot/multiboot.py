"""Multiboot 1: the protocol of GRUB and of QEMU's `-kernel`, for kernels that switch modes alone.

A multiboot kernel has a header of three numbers or more in its first 8 KiB. It is an ELF file,
which is loaded as `elf` does it, or any other file whose header says itself where it goes (the
"a.out kludge"). It starts in 32-bit protected mode, also from an ELF64 file. EAX holds a magic
number and EBX the address of the boot information: how much memory there is and where, the command
line, and the modules, which are files that the boot loader puts into memory for the kernel.

The information lies at INFORMATION_GPA, where a kernel that takes all memory after itself for free
does not overwrite it, and the modules in whole pages after the kernel.

A kernel may recommend a video mode. There is one screen, the text screen, and the information
describes it: the specification lets a boot loader choose text when graphics were asked for.

Left out of the information: what there is not (a boot device, drives, APM, VBE), and the kernel's
section headers, which debuggers read from the file.

Source: The Multiboot Specification version 0.6.96, "OS image format", "Machine state" and "Boot
information format".
"""

from __future__ import annotations

import os
import struct

from pyvmm.boot import elf
from pyvmm.boot.image import (
    KIB,
    MIB,
    Image,
    ImageError,
    LoadOptions,
    Mode,
    RamRanges,
    Segment,
    check_entry,
    check_fits,
)
from pyvmm.boot.layout import EBDA_GPA, Area, memory_map
from pyvmm.devices.vga import COLUMNS, ROWS, TEXT_GPA

HEADER_MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH_BYTES = 8192  # the header is in these first bytes of the file, as a whole

_HEADER = struct.Struct("<3I")  # magic, flags, checksum
_ADDRESSES = struct.Struct("<5I")  # header, load, load_end, bss_end and entry address

# Flags of the header: bits 0 to 15 are requirements, the others offers.
ALIGN_MODULES, WANT_MEMORY, WANT_VIDEO = 1 << 0, 1 << 1, 1 << 2
HAS_ADDRESSES = 1 << 16
REQUIREMENTS, KNOWN_REQUIREMENTS = 0xFFFF, ALIGN_MODULES | WANT_MEMORY | WANT_VIDEO

INFORMATION_GPA, INFORMATION_BYTES = 0x9000, 0x7000
MODULE_ALIGNMENT = 4096
BOOT_LOADER_NAME = b"pyvmm\0"

# Flags of the information: which of its fields are valid.
HAS_MEMORY, HAS_COMMAND_LINE, HAS_MODULES = 1 << 0, 1 << 2, 1 << 3
HAS_MEMORY_MAP, HAS_LOADER_NAME, HAS_FRAMEBUFFER = 1 << 6, 1 << 9, 1 << 12
INFORMATION_FLAGS = (
    HAS_MEMORY | HAS_COMMAND_LINE | HAS_MODULES | HAS_MEMORY_MAP | HAS_LOADER_NAME | HAS_FRAMEBUFFER
)
FRAMEBUFFER_TEXT = 2

# flags, mem_lower, mem_upper; cmdline, mods_count, mods_addr; mmap_length, mmap_addr;
# boot_loader_name; the framebuffer's addr; pitch, width, height; bpp, type.  Others are not valid.
_INFORMATION = struct.Struct("<III 4x III 16x II 12x I 20x Q III BB 6x")
_MODULE = struct.Struct("<III4x")  # mod_start, mod_end, string
_MEMORY_RANGE = struct.Struct("<IQQI")  # size of the rest, base_addr, length, type


def recognise(contents: bytes) -> bool:
    """Whether there is a multiboot header, by its magic number and its checksum."""
    return _find_header(contents) is not None


def _find_header(contents: bytes) -> int | None:
    """The offset of the multiboot header in the file, a multiple of 4."""
    magic = HEADER_MAGIC.to_bytes(4, "little")
    window = contents[:SEARCH_BYTES]
    offset = window.find(magic)
    while 0 <= offset <= len(window) - _HEADER.size:
        if offset % 4 == 0 and sum(_HEADER.unpack_from(window, offset)) % (1 << 32) == 0:
            return offset
        offset = window.find(magic, offset + 1)
    return None


def load(name: str, contents: bytes, options: LoadOptions) -> Image:
    """The image of a multiboot kernel. Raises ImageError when it is damaged or asks too much."""
    offset = _find_header(contents)
    assert offset is not None  # recognise() said so
    _, flags, _ = _HEADER.unpack_from(contents, offset)
    unknown = flags & REQUIREMENTS & ~KNOWN_REQUIREMENTS
    if unknown:
        raise ImageError(
            f"{name}: the multiboot header requires {unknown:#x} of its boot loader, which are "
            "flags without a meaning in multiboot 1; clear them"
        )
    if flags & HAS_ADDRESSES:
        image = _load_by_addresses(name, contents, offset, options)
    elif elf.recognise(contents):
        image = elf.load(name, contents, LoadOptions(entry=options.entry))
    else:
        raise ImageError(
            f"{name}: a multiboot header without addresses in a file that is not ELF; link the "
            f"kernel as ELF, or set flag {HAS_ADDRESSES:#x} and give the addresses in the header"
        )
    image = image._replace(
        kind=f"multiboot {image.kind}",
        mode=Mode.PROTECTED,
        expects_pc=True,
        registers=(("rax", LOADER_MAGIC), ("rbx", INFORMATION_GPA)),
        finish=finish,
    )
    _check_options(image, options)
    _check_reach(image)
    return image


def _load_by_addresses(name: str, contents: bytes, offset: int, options: LoadOptions) -> Image:
    """The image of a file, of whatever format, by the addresses in its header at `offset`."""
    if offset + _HEADER.size + _ADDRESSES.size > min(len(contents), SEARCH_BYTES):
        raise ImageError(f"{name}: truncated in its multiboot header; copy or build it again")
    header_gpa, load_gpa, load_end_gpa, bss_end_gpa, entry = _ADDRESSES.unpack_from(
        contents, offset + _HEADER.size
    )
    start = offset - (header_gpa - load_gpa)  # in the file
    if not 0 <= start <= offset:
        raise ImageError(
            f"{name}: the multiboot header says that it is loaded at {header_gpa:#x} and the image "
            f"from {load_gpa:#x} on, but it is at byte {offset} of the file; correct its addresses"
        )
    file_end_gpa = load_gpa + len(contents) - start
    load_end_gpa = load_end_gpa or file_end_gpa
    end_gpa = bss_end_gpa or load_end_gpa
    if load_end_gpa > file_end_gpa:
        raise ImageError(
            f"{name}: {load_end_gpa - file_end_gpa} bytes are missing up to the multiboot header's "
            f"load_end_addr ({load_end_gpa:#x}); it is truncated, copy or build it again"
        )
    if not load_gpa < load_end_gpa <= end_gpa:
        raise ImageError(
            f"{name}: the multiboot header's load_addr ({load_gpa:#x}), end of what is loaded "
            f"({load_end_gpa:#x}) and bss_end_addr ({end_gpa:#x}) are not in this order; "
            "correct them"
        )
    data = memoryview(contents)[start : start + load_end_gpa - load_gpa]
    image = Image(
        name,
        "flat binary",
        Mode.PROTECTED,
        entry if options.entry is None else options.entry,
        (Segment(load_gpa, data, end_gpa - load_gpa),),
    )
    check_entry(image)
    return image


def _check_options(image: Image, options: LoadOptions) -> None:
    """Raise ImageError if the user asks for what the protocol or the file contradicts."""
    if options.mode not in (None, image.mode):
        raise ImageError(
            f"{image.name}: a multiboot kernel starts in {image.mode.value} mode; leave out --mode"
        )
    lowest_gpa = image.segments[0].gpa
    if options.load not in (None, lowest_gpa):
        raise ImageError(
            f"{image.name}: a multiboot kernel says itself where it is loaded ({lowest_gpa:#x}); "
            "leave out --load"
        )


def _check_reach(image: Image) -> None:
    """Raise ImageError unless 32 bits can hold each address, and that after the last segment."""
    highest = image.segments[-1]
    if highest.end_gpa >= image.mode.reach_bytes:
        raise ImageError(
            f"{image.name}: the {highest.what} at {highest.gpa:#x}..{highest.end_gpa:#x} ends "
            "beyond the 32-bit addresses of multiboot; link the kernel lower"
        )


def finish(image: Image, ram_ranges: RamRanges) -> Image:
    """Add the modules and the boot information. Raises ImageError when they have no room."""
    modules = _place_modules(image)
    image = image._replace(segments=(*image.segments, *modules))
    _check_reach(image)
    information = _information(image, modules, ram_ranges)
    if len(information) > INFORMATION_BYTES:
        raise ImageError(
            f"{image.name}: the multiboot information has {len(information)} bytes of at most "
            f"{INFORMATION_BYTES}; give a shorter command line, or fewer modules"
        )
    segment = Segment(INFORMATION_GPA, information, len(information), "multiboot information")
    check_fits(image, ram_ranges, [(segment.gpa, segment.size, f"the {segment.what}")])
    return image._replace(segments=(*image.segments, segment))


def _place_modules(image: Image) -> tuple[Segment, ...]:
    """The modules as segments, each in pages of its own, after the kernel and above 1 MiB."""
    area_gpa = max(MIB, image.segments[-1].end_gpa)
    segments = []
    for name, _, contents in image.modules:
        gpa = -(-area_gpa // MODULE_ALIGNMENT) * MODULE_ALIGNMENT
        segments.append(Segment(gpa, contents, len(contents), f"module {name}"))
        area_gpa = segments[-1].end_gpa
    return tuple(segments)


def _information(image: Image, modules: tuple[Segment, ...], ram_ranges: RamRanges) -> bytes:
    """The boot information, for INFORMATION_GPA, with all that it points to behind it."""
    area = Area(INFORMATION_GPA + _INFORMATION.size)
    ranges = b"".join(
        _MEMORY_RANGE.pack(_MEMORY_RANGE.size - 4, *line) for line in memory_map(ram_ranges)
    )
    module_table = b"".join(
        _MODULE.pack(segment.gpa, segment.end_gpa, area.add(_c_string(module.string)))
        for segment, module in zip(modules, image.modules, strict=True)
    )
    command_line = f"{image.name} {image.append}" if image.append else image.name
    information = _INFORMATION.pack(
        INFORMATION_FLAGS,
        EBDA_GPA // KIB,  # memory from 0 on, in KiB
        (ram_ranges[0][1] - MIB) // KIB,  # memory from 1 MiB on
        area.add(_c_string(command_line)),
        len(modules),
        area.add(module_table),
        len(ranges),
        area.add(ranges),
        area.add(BOOT_LOADER_NAME),
        TEXT_GPA,
        COLUMNS * 2,  # bytes in a line
        COLUMNS,
        ROWS,
        16,  # bits in a cell
        FRAMEBUFFER_TEXT,
    )
    return information + area.data


def _c_string(text: str) -> bytes:
    return os.fsencode(text) + b"\0"

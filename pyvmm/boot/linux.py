"""The Linux/x86 boot protocol: a bzImage, as `make` in a Linux tree and distributions leave it.

The file is a boot sector and 16-bit setup code, which are left out here, and behind them the
kernel: code that unpacks itself. What the kernel wants is in the setup header, in the boot sector.
The boot loader copies that into the boot parameters ("zero page") and fills in the rest: where the
command line and the initrd are, a map of the memory, the text screen, the ACPI tables. RSI points
to the boot parameters.

A 64-bit kernel is entered in long mode, 0x200 bytes after its beginning, and one that has no such
entry in protected mode, at its beginning. `--mode protected` asks for that one.

The kernel goes to the address it prefers. One that is loaded lower moves up to there before it
looks at the memory map, whatever it says of itself, and higher there is no more room. The initrd
goes as high as it may. Nothing of all this is above 4 GiB, even if the kernel allows that.

Left out: the 16-bit entry, which calls a BIOS; zImages; versions before 2.06 (Linux 2.6.22), where
a kernel does not say how long its command line may be; EFI; setup_data, such as random seeds.

Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst; screen_info is in
include/uapi/linux/screen_info.h.
"""

from __future__ import annotations

import os
import struct

from pyvmm.boot.image import (
    MIB,
    Image,
    ImageError,
    LoadOptions,
    Mode,
    RamRanges,
    Segment,
    Selectors,
    check_entry,
    check_fits,
)
from pyvmm.boot.layout import (
    INFORMATION_BYTES,
    INFORMATION_GPA,
    RSDP_GPA,
    memory_map,
    place_initrd,
)
from pyvmm.devices.vga import COLUMNS, ROWS
from pyvmm.light import NamedTuple

SECTOR_BYTES, DEFAULT_SETUP_SECTORS, PARAGRAPH_BYTES = 512, 4, 16
OLDEST_VERSION, VERSION_WITH_XLOADFLAGS = 0x0206, 0x020C
LOADED_HIGH = 1 << 0  # in loadflags: a bzImage
XLF_KERNEL_64 = 1 << 0  # in xloadflags
ENTRY64_OFFSET = 0x200
LOADER_WITHOUT_ID, NORMAL_VIDEO_MODE = 0xFF, 0xFFFF

# Offsets in the boot sector, and in the boot parameters, where the header has the same place.
BOOT_FLAG, JUMP_LENGTH, HEADER_MAGIC, VERSION = 0x1FE, 0x201, 0x202, 0x206
VIDEO_MODE, LOADER_TYPE, CODE32_START = 0x1FA, 0x210, 0x214
RAMDISK_IMAGE, RAMDISK_SIZE, COMMAND_LINE_POINTER = 0x218, 0x21C, 0x228
SETUP_HEADER, SETUP_HEADER_END_MIN, SETUP_HEADER_END_MAX = 0x1F1, 0x23C, 0x290

# And in the boot parameters alone.
BOOT_PARAMETERS_BYTES = 4096
ACPI_RSDP_ADDRESS, E820_ENTRIES, E820_TABLE = 0x070, 0x1E8, 0x2D0
_E820_ENTRY = struct.Struct("<QQI")
# screen_info, at 0: orig_x, orig_y; video_mode, cols; lines, isVGA, and the height of a character.
_SCREEN = struct.Struct("<BB 4x BB 6x BBH")
TEXT_MODE, IS_VGA, CHARACTER_LINES = 3, 1, 16

# __BOOT_CS is 0x10 at both entries, and __BOOT_DS 0x18.
_SELECTORS = {
    Mode.LONG: Selectors(code64=0x10, data=0x18, code32=0x08),
    Mode.PROTECTED: Selectors(code32=0x10, data=0x18, code64=0x08),
}


class _SetupHeader(NamedTuple):
    """What the kernel says that matters here, with the protocol's names."""

    setup_sects: int
    syssize: int
    version: int
    loadflags: int
    initrd_addr_max: int
    xloadflags: int
    cmdline_size: int
    pref_address: int
    init_size: int


_HEADER = struct.Struct("<B 2x I 14x H 9x B 26x I 6x H I 28x Q I")


def recognise(contents: bytes) -> bool:
    """Whether the file begins with a boot sector that has the setup header's magic numbers."""
    return (
        contents[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa"
        and contents[HEADER_MAGIC : HEADER_MAGIC + 4] == b"HdrS"
    )


def load(name: str, contents: bytes, options: LoadOptions) -> Image:
    """The image of a bzImage. Raises ImageError when it is damaged or too old.

    Its segments are the boot parameters, with nothing in them but the setup header, and the kernel.
    """
    _check_version(name, contents)
    parameters = _with_setup_header(name, contents)
    header = _read_header(parameters)
    if not header.loadflags & LOADED_HIGH:
        raise ImageError(f"{name}: a zImage, which is loaded below 1 MiB; build a bzImage")
    start = SECTOR_BYTES * (1 + (header.setup_sects or DEFAULT_SETUP_SECTORS))
    end = start + header.syssize * PARAGRAPH_BYTES
    # The size is in paragraphs; not every build fills the last one (memtest86+).
    if not start < end < len(contents) + PARAGRAPH_BYTES:
        raise ImageError(
            f"{name}: {end} bytes according to its setup header, and a file of {len(contents)}; "
            "it is truncated or damaged, copy or build it again"
        )
    gpa = max(header.pref_address, MIB)
    size = max(end - start, header.init_size)
    mode = _choose_mode(name, header, options)
    image = Image(
        name,
        f"Linux {_version(header.version)}",
        mode,
        gpa + (ENTRY64_OFFSET if mode is Mode.LONG else 0),
        (
            Segment(INFORMATION_GPA, parameters, INFORMATION_BYTES, "boot parameters"),
            Segment(gpa, memoryview(contents)[start:end], size, "kernel"),
        ),
        expects_pc=True,
        is_linux=True,
        registers=(("rsi", INFORMATION_GPA),),
        selectors=_SELECTORS[mode],
        finish=finish,
    )
    check_entry(image)
    return image


def _check_version(name: str, contents: bytes) -> None:
    version = int.from_bytes(contents[VERSION : VERSION + 2], "little")
    if len(contents) < SETUP_HEADER_END_MIN:
        raise ImageError(f"{name}: truncated in its Linux setup header; copy or build it again")
    if version < OLDEST_VERSION:
        raise ImageError(
            f"{name}: a Linux kernel with boot protocol {_version(version)}; pyvmm boots "
            f"{_version(OLDEST_VERSION)} (Linux 2.6.22) and later"
        )


def _version(number: int) -> str:
    return f"{number >> 8}.{number & 0xFF:02}"


def _with_setup_header(name: str, contents: bytes) -> bytes:
    """Boot parameters that are zeros but for the setup header.

    The header says how long it is, and later fields than its version has are zeros like that.
    """
    end = HEADER_MAGIC + contents[JUMP_LENGTH]
    if not SETUP_HEADER_END_MIN <= end <= SETUP_HEADER_END_MAX:
        raise ImageError(
            f"{name}: a Linux setup header that ends at byte {end:#x}, not in "
            f"{SETUP_HEADER_END_MIN:#x}..{SETUP_HEADER_END_MAX:#x}; the file seems damaged, copy "
            "or build it again"
        )
    if len(contents) < end:
        raise ImageError(f"{name}: truncated in its Linux setup header; copy or build it again")
    parameters = bytearray(BOOT_PARAMETERS_BYTES)
    parameters[SETUP_HEADER:end] = contents[SETUP_HEADER:end]
    return bytes(parameters)


def _read_header(parameters: bytes | memoryview) -> _SetupHeader:
    return _SetupHeader(*_HEADER.unpack_from(parameters, SETUP_HEADER))


def _choose_mode(name: str, header: _SetupHeader, options: LoadOptions) -> Mode:
    """The mode to enter the kernel in. Raises ImageError if the user asks for what it cannot."""
    has_64 = header.version >= VERSION_WITH_XLOADFLAGS and header.xloadflags & XLF_KERNEL_64
    mode = Mode.LONG if has_64 else Mode.PROTECTED
    if options.mode not in (None, mode, Mode.PROTECTED):
        entries = "long or protected" if has_64 else "protected"
        raise ImageError(f"{name}: this Linux kernel starts in {entries} mode; leave out --mode")
    if options.load is not None or options.entry is not None:
        raise ImageError(
            f"{name}: a Linux kernel says itself where it is loaded and entered; leave out --load "
            "and --entry"
        )
    return options.mode or mode


def finish(image: Image, ram_ranges: RamRanges) -> Image:
    """Place the initrd and fill in the boot parameters.

    Raises ImageError when something has no room.
    """
    check_fits(image, ram_ranges, [])
    parameters, kernel = image.segments
    header = _read_header(parameters.data)
    initrd = place_initrd(image, ram_ranges, kernel.end_gpa, header.initrd_addr_max + 1)
    parameters = parameters._replace(data=_parameters(image, header, initrd, ram_ranges))
    extra = () if initrd is None else (initrd,)
    return image._replace(segments=(parameters, kernel, *extra))


def _parameters(
    image: Image,
    header: _SetupHeader,
    initrd: Segment | None,
    ram_ranges: RamRanges,
) -> bytes:
    """The boot parameters, for INFORMATION_GPA, with the command line behind them."""
    command_line = os.fsencode(image.append)
    most = min(header.cmdline_size, INFORMATION_BYTES - BOOT_PARAMETERS_BYTES - 1)
    if len(command_line) > most:
        raise ImageError(
            f"{image.name}: the command line has {len(command_line)} bytes, and this kernel takes "
            f"{most}; make it shorter"
        )
    parameters = bytearray(image.segments[0].data)
    ranges = memory_map(ram_ranges)
    for offset, form, value in (
        (VIDEO_MODE, "<H", NORMAL_VIDEO_MODE),
        (LOADER_TYPE, "<B", LOADER_WITHOUT_ID),
        (CODE32_START, "<I", image.segments[1].gpa),
        (RAMDISK_IMAGE, "<I", 0 if initrd is None else initrd.gpa),
        (RAMDISK_SIZE, "<I", 0 if initrd is None else initrd.size),
        (COMMAND_LINE_POINTER, "<I", INFORMATION_GPA + BOOT_PARAMETERS_BYTES),
        (ACPI_RSDP_ADDRESS, "<Q", RSDP_GPA),
        (E820_ENTRIES, "<B", len(ranges)),
    ):
        struct.pack_into(form, parameters, offset, value)
    _SCREEN.pack_into(parameters, 0, 0, 0, TEXT_MODE, COLUMNS, ROWS, IS_VGA, CHARACTER_LINES)
    for number, line in enumerate(ranges):
        _E820_ENTRY.pack_into(parameters, E820_TABLE + _E820_ENTRY.size * number, *line)
    return bytes(parameters) + command_line + b"\0"

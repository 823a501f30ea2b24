"""Where a PC's memory holds what, for boot protocols and for the tables that kernels look for.

The first megabyte of every PC, and so of a guest that expects one:

    0x00000  real mode's interrupt vectors, and at 0x400 the BIOS data area
    0x09000  what the boot protocol tells the guest, and points a register to
    0x9FC00  the extended BIOS data area (EBDA): the end of "base memory"
    0xA0000  the screen
    0xE0000  the firmware, and the tables that it leaves: see tables.py

Below 640 KiB a guest also finds what entry.py puts there. Above 1 MiB there is nothing but RAM, up
to the hole for devices below 4 GiB.

Source: ACPI specification, "System Address Map Interfaces", for the map; the rest is PC tradition.
"""

from __future__ import annotations

from pyvmm.boot.image import GIB, MIB, Image, ImageError, RamRanges, Segment
from pyvmm.light import NamedTuple

BIOS_DATA_GPA, BIOS_DATA_BYTES = 0x400, 0x100
# Low, where a kernel that takes all memory after itself for free does not overwrite it.
INFORMATION_GPA, INFORMATION_BYTES = 0x9000, 0x7000
EBDA_GPA, EBDA_BYTES = 0x9_FC00, 0x400
FIRMWARE_GPA, FIRMWARE_BYTES = 0xE_0000, 0x2_0000
RSDP_GPA = FIRMWARE_GPA  # the pointer to the ACPI tables, which follow it
IOAPIC_GPA, LOCAL_APIC_GPA = 0xFEC0_0000, 0xFEE0_0000

MMIO_HOLE = 3 * GIB, GIB  # GPA, bytes: RAM that would lie here continues at 4 GiB

# What an image must not overlap in a PC, as check_fits() takes it: GPA, bytes, name.
RESERVED = [
    (0, BIOS_DATA_GPA + BIOS_DATA_BYTES, "the BIOS data area"),
    (EBDA_GPA, MIB - EBDA_GPA, "the screen and the firmware"),
]

# Kinds of memory, with the numbers that all boot protocols share.
AVAILABLE, UNAVAILABLE = 1, 2


class MemoryRange(NamedTuple):
    """A line of the memory map: `size` bytes from `gpa` on, AVAILABLE or UNAVAILABLE."""

    gpa: int
    size: int
    kind: int


def ram_ranges(memory: int) -> list[tuple[int, int]]:
    """Where `memory` bytes of RAM lie: (gpa, bytes), around the hole for devices."""
    hole, hole_size = MMIO_HOLE
    if memory <= hole:
        return [(0, memory)]
    return [(0, hole), (hole + hole_size, memory - hole)]


def memory_map(ram_ranges: RamRanges) -> list[MemoryRange]:
    """What a PC's firmware would say about this RAM, which begins at 0 with at least 1 MiB.

    As on every PC, no line speaks of the screen and of the hole for devices.
    """
    (_, low_bytes), *high = ram_ranges
    ranges = [
        MemoryRange(0, EBDA_GPA, AVAILABLE),
        MemoryRange(EBDA_GPA, EBDA_BYTES, UNAVAILABLE),
        MemoryRange(FIRMWARE_GPA, FIRMWARE_BYTES, UNAVAILABLE),
        MemoryRange(MIB, low_bytes - MIB, AVAILABLE),
        *(MemoryRange(gpa, size, AVAILABLE) for gpa, size in high),
    ]
    return [line for line in ranges if line.size]


class Area:
    """Bytes for guest memory from `gpa` on, laid out one piece after the other."""

    def __init__(self, gpa: int) -> None:
        self.gpa = gpa
        self.data = bytearray()

    def add(self, piece: bytes, alignment: int = 4) -> int:
        """Append `piece` at the next multiple of `alignment`; the gpa that it gets."""
        self.data += bytes(-(self.gpa + len(self.data)) % alignment)
        gpa = self.gpa + len(self.data)
        self.data += piece
        return gpa


PAGE_BYTES = 4096


def place_initrd(
    image: Image, ram_ranges: RamRanges, lowest_gpa: int, end_gpa: int
) -> Segment | None:
    """The initrd of `image` as high as there is RAM below `end_gpa`, in pages of its own.

    None where there is none. `lowest_gpa`: what a kernel needs for itself ends here.
    Raises ImageError when it does not fit between.
    """
    if image.initrd is None:
        return None
    (_, low_bytes), *_ = ram_ranges
    size = len(image.initrd.contents)
    gpa = (min(low_bytes, end_gpa) - size) // PAGE_BYTES * PAGE_BYTES
    segment = Segment(gpa, image.initrd.contents, size, f"initrd {image.initrd.name}")
    if gpa >= lowest_gpa:
        return segment
    needed_gpa = -(-lowest_gpa // PAGE_BYTES) * PAGE_BYTES + -(-size // PAGE_BYTES) * PAGE_BYTES
    raise ImageError(
        f"{image.name}: the {segment.what} ({size} bytes) does not fit between the kernel's end "
        f"at {lowest_gpa:#x} and {min(low_bytes, end_gpa):#x}; "
        + (
            f"it needs -m {-(-needed_gpa // MIB)}M"
            if low_bytes < needed_gpa <= end_gpa
            else "this kernel cannot use more: make the initrd smaller"
        )
    )

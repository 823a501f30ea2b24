"""What a loader makes of a file: an `Image`, which says where bytes go and where execution starts.

Every boot protocol (one file each, listed in `pyvmm.boot`) turns the contents of a file into an
`Image`; whoever builds the machine lets the protocol add what depends on the guest's memory with
`finish_image`, checks the result with `check_fits`, copies the segments and sets the registers that
`Mode` stands for. So loaders know nothing of KVM, and no input can make them allocate more than the
file's own size: memory that starts as zeros (bss) is a number here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from pyvmm.light import NamedTuple

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


class Mode(Enum):
    """The processor mode in which a guest starts; the values are those of `--mode`."""

    REAL = "real"
    PROTECTED = "protected"
    LONG = "long"

    @property
    def reach_bytes(self) -> int:
        """How many bytes of guest physical memory, from 0 on, the guest's first code can reach.

        In real mode an address is segment * 16 + offset, 1 MiB (and a little, with A20 on, that is
        not worth a special case). In protected mode it has 32 bits. In long mode it is what the
        page tables map that the guest starts with: the first 4 GiB.
        """
        return MIB if self is Mode.REAL else 4 * GIB


class ImageError(Exception):
    """The image cannot be used: one line that names the file, what is wrong and what to do."""


class Segment(NamedTuple):
    """`size` bytes of guest memory from `gpa` on: `data` first, and zeros after it.

    `what` is what error messages call it.
    """

    gpa: int
    data: bytes | memoryview
    size: int
    what: str = "segment"

    @property
    def end_gpa(self) -> int:
        """The gpa after the last byte."""
        return self.gpa + self.size


class Module(NamedTuple):
    """A file that is put into memory for the guest: `--module 'FILE args'`, or `--initrd FILE`.

    `name` is the file as error messages show it, `string` what the user wrote, for the guest.
    """

    name: str
    string: str
    contents: bytes


# The guest's memory as (gpa, bytes), in order and not overlapping.
RamRanges = Sequence[tuple[int, int]]


class Selectors(NamedTuple):
    """Where the GDT that a guest starts with has which segment: three of 0x08, 0x10 and 0x18."""

    code64: int = 0x08
    data: int = 0x10
    code32: int = 0x18


class Image(NamedTuple):
    """A guest to start: its `segments`, which do not overlap, and the gpa of its first instruction.

    `kind` is the boot protocol in words ("ELF64"), `name` the file as error messages show it.
    `append`, `modules` and `initrd` are what the user wants the guest to get besides.

    `expects_pc` is whether the protocol promises the machine that a PC's boot loader leaves behind:
    with interrupt controllers and the tables that describe them, and with one processor running,
    which starts the others. `is_linux` is whether the protocol is one of Linux's. `registers` are
    what the first processor finds in registers, by their names in `kvm_regs`, or `kvm_sregs`
    ("cr4"); `selectors` say the same of the segment registers, and of the GDT. `finish` is the
    protocol's part of `finish_image`.
    """

    name: str
    kind: str
    mode: Mode
    entry: int
    segments: tuple[Segment, ...]
    append: str = ""
    modules: tuple[Module, ...] = ()
    expects_pc: bool = False
    is_linux: bool = False
    registers: tuple[tuple[str, int], ...] = ()
    finish: Callable[[Image, RamRanges], Image] | None = None
    initrd: Module | None = None
    selectors: Selectors = Selectors()


class LoadOptions(NamedTuple):
    """What the user asked for, `None` where nothing: `--mode`, `--load GPA` and `--entry GPA`."""

    mode: Mode | None = None
    load: int | None = None
    entry: int | None = None


def finish_image(image: Image, ram_ranges: RamRanges) -> Image:
    """The image with all that its boot protocol puts into a guest with this memory.

    Modules and a description of the machine become segments. Most protocols have neither, and the
    image comes back as it is. Raises ImageError when something has no room.
    """
    return image if image.finish is None else image.finish(image, ram_ranges)


def real_mode_entry(entry_gpa: int) -> tuple[int, int]:
    """The (CS selector, IP) with which real mode executes the instruction at `entry_gpa`.

    Any gpa has 4096 such pairs. This one keeps IP equal to the low 16 bits of the address and puts
    the rest in CS: below 64 KiB CS is 0, and above it code that was linked for its 64 KiB block
    finds its labels.

    Raises ValueError when real mode cannot reach the address (it is 1 MiB or higher).
    """
    if not 0 <= entry_gpa < MIB:
        raise ValueError(f"{entry_gpa:#x} is not a real-mode address")
    return entry_gpa >> 4 & 0xF000, entry_gpa & 0xFFFF


def check_entry(image: Image) -> None:
    """Raise ImageError unless the entry point is in a segment and where `image.mode` reaches it."""
    if not any(segment.gpa <= image.entry < segment.end_gpa for segment in image.segments):
        places = ", ".join(f"{s.gpa:#x}..{s.end_gpa:#x}" for s in image.segments[:4])
        more = ", ..." if len(image.segments) > 4 else ""
        raise ImageError(
            f"{image.name}: the entry point {image.entry:#x} is outside the image, which is loaded "
            f"at {places}{more}; give --entry a physical address in there"
        )
    if image.entry >= image.mode.reach_bytes:
        raise ImageError(
            f"{image.name}: the entry point {image.entry:#x} cannot be reached in "
            f"{image.mode.value} mode, which starts with addresses below "
            f"{image.mode.reach_bytes:#x}; link or load it lower"
        )


def check_fits(
    image: Image,
    ram_ranges: RamRanges,
    reserved: Sequence[tuple[int, int, str]],
) -> None:
    """Raise ImageError unless every segment lies in guest RAM and clear of what is reserved.

    `reserved` are (gpa, bytes, what) with `what` in words ("the boot page tables"): parts of RAM
    that pyvmm fills itself, and holes in it, such as the MMIO hole.
    """
    for segment in image.segments:
        for gpa, size, what in reserved:
            if segment.gpa < gpa + size and gpa < segment.end_gpa:
                raise ImageError(
                    f"{_place(image, segment)} overlaps {what} at {gpa:#x}..{gpa + size:#x}; "
                    "load or link it elsewhere"
                )
    outside = [s for s in image.segments if not _is_ram(s.gpa, s.end_gpa, ram_ranges)]
    if not outside:
        return
    segment = max(outside, key=lambda s: s.end_gpa)
    ram = ", ".join(f"{gpa:#x}..{gpa + size:#x}" for gpa, size in ram_ranges) or "none"
    raise ImageError(
        f"{_place(image, segment)} is not in guest memory ({ram}); "
        + _advice(segment, ram_ranges, reserved)
    )


def _place(image: Image, segment: Segment) -> str:
    return f"{image.name}: the {segment.what} at {segment.gpa:#x}..{segment.end_gpa:#x}"


def _is_ram(start_gpa: int, end_gpa: int, ram_ranges: RamRanges) -> bool:
    """Whether every byte is RAM, which may be several ranges that touch."""
    for gpa, size in ram_ranges:
        if gpa <= start_gpa < gpa + size:
            start_gpa = min(end_gpa, gpa + size)
    return start_gpa == end_gpa


_LARGEST_ADVICE_BYTES = 1 << 40  # nobody is served by "it needs -m 17592186044416M"


def _advice(
    segment: Segment,
    ram_ranges: RamRanges,
    reserved: Sequence[tuple[int, int, str]],
) -> str:
    """What to do about a segment outside RAM: how large -m must be, where that can help."""
    if segment.end_gpa > _LARGEST_ADVICE_BYTES:
        return (
            "no -m is large enough: link it with physical load addresses "
            "(AT() in a linker script), or load it lower"
        )
    if segment.end_gpa <= max((gpa + size for gpa, size in ram_ranges), default=0):
        return "there is a hole in guest memory: load or link it elsewhere"
    # Addresses below the segment's end that more memory would not fill: -m counts RAM only.
    holes = sum(
        size
        for gpa, size, _ in reserved
        if gpa < segment.end_gpa and not any(r < gpa + size and gpa < r + n for r, n in ram_ranges)
    )
    needed_mib = -(-(segment.end_gpa - holes) // MIB)
    return f"it needs -m {needed_mib}M"

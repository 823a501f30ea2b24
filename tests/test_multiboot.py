"""Multiboot 1: which files are taken for it, where they go, and what the kernel is told."""

from __future__ import annotations

import random
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.boot import (
    Image,
    ImageError,
    LoadOptions,
    Mode,
    Module,
    Segment,
    check_fits,
    finish_image,
    multiboot,
    read_image,
)
from pyvmm.boot.layout import RESERVED
from tests.test_boot_images import CODE, EM_X86_64, elf_file, error_of, load_segment

MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
ADDRESSES, VIDEO = 1 << 16, 1 << 2

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RAM = [(0, 64 * MIB)]
LARGE_RAM = [(0, 3 * GIB), (4 * GIB, 1 * GIB)]


def header(*fields: int, flags: int = 3, checksum: int = 0) -> bytes:
    """A multiboot header; `checksum` is by how much its sum is wrong."""
    checksum = checksum - MAGIC - flags & 0xFFFF_FFFF
    return struct.pack(f"<{3 + len(fields)}I", MAGIC, flags, checksum, *fields)


def kernel(*segments: dict[str, int], bits: int = 32, flags: int = 3, **changes: int) -> bytes:
    """An ELF file as elf_file() makes it, with a multiboot header where its code begins."""
    contents = elf_file(*(segments or [load_segment()]), bits=bits, **changes)
    return contents[:0x1000] + header(flags=flags).ljust(len(CODE), b"\0")


def flat_kernel(
    *,
    before: int = 0,
    header_gpa: int = 0x10_0000,
    load_gpa: int = 0x10_0000,
    load_end_gpa: int = 0,
    bss_end_gpa: int = 0,
    entry: int = 0x10_0020,
    flags: int = 3,
) -> bytes:
    """A file with `before` bytes, a multiboot header with addresses, and CODE."""
    addresses = (header_gpa, load_gpa, load_end_gpa, bss_end_gpa, entry)
    return bytes(before) + header(*addresses, flags=flags | ADDRESSES) + CODE


FLAT_BYTES = len(flat_kernel())


@pytest.fixture
def image_file(tmp_path: Path):
    """A function that writes bytes to a file and returns its path."""

    def write(contents: bytes, name: str = "kernel") -> Path:
        path = tmp_path / name
        path.write_bytes(contents)
        return path

    return write


# --- which files -----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, 0x1000, 8192 - 12])
def test_a_header_in_the_first_8_kib_makes_a_multiboot_kernel(offset: int) -> None:
    assert multiboot.recognise(bytes(offset) + header() + bytes(100))
    assert multiboot.recognise(bytes(offset) + header())


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\x7fELF",
        header()[:11],
        bytes(8192 - 8) + header(),
        bytes(8192) + header(),
        bytes(2) + header(),
        header(checksum=1),
        struct.pack("<3I", LOADER_MAGIC, 0, -LOADER_MAGIC & 0xFFFF_FFFF),
    ],
    ids=["empty", "short", "truncated", "at the edge", "late", "odd", "wrong sum", "wrong magic"],
)
def test_other_files_are_not_multiboot_kernels(contents: bytes) -> None:
    assert not multiboot.recognise(contents)


def test_a_magic_number_that_is_no_header_does_not_hide_the_header(image_file) -> None:
    decoy = header(checksum=1) + bytes(2) + header() + bytes(2)
    assert not multiboot.recognise(decoy)
    assert multiboot.recognise(decoy + header())


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_file_without_a_header_is_started_as_an_elf_file(image_file, bits: int) -> None:
    image = read_image(image_file(elf_file(load_segment(), bits=bits)))
    assert image.kind == f"ELF{bits}"
    assert not image.expects_pc
    assert image.registers == ()


# --- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_kernel_is_loaded_as_elf_and_entered_in_protected_mode(image_file, bits) -> None:
    contents = kernel(load_segment(vaddr=0xC020_0000), bits=bits, entry=0xC020_0010)
    path = image_file(contents)
    image = read_image(path)
    assert image[:5] == (
        str(path),
        f"multiboot ELF{bits}",
        Mode.PROTECTED,
        0x20_0010,
        (Segment(0x20_0000, contents[0x1000:], 0x1000),),
    )
    assert image.expects_pc
    assert dict(image.registers)["rax"] == LOADER_MAGIC


@pytest.mark.parametrize(
    ("contents", "segment"),
    [
        pytest.param(flat_kernel(), (0x10_0000, 0, FLAT_BYTES, FLAT_BYTES), id="whole file"),
        pytest.param(
            flat_kernel(load_end_gpa=0x10_0040), (0x10_0000, 0, 0x40, 0x40), id="load_end_addr"
        ),
        pytest.param(
            flat_kernel(bss_end_gpa=0x11_0000), (0x10_0000, 0, FLAT_BYTES, 0x1_0000), id="bss"
        ),
        pytest.param(
            flat_kernel(load_end_gpa=0x10_0040, bss_end_gpa=0x10_0080),
            (0x10_0000, 0, 0x40, 0x80),
            id="load_end_addr and bss",
        ),
        pytest.param(
            flat_kernel(before=0x100),
            (0x10_0000, 0x100, FLAT_BYTES, FLAT_BYTES),
            id="bytes in the file before the header are not loaded",
        ),
        pytest.param(
            flat_kernel(before=0x100, header_gpa=0x10_0040),
            (0x10_0000, 0xC0, FLAT_BYTES + 0x40, FLAT_BYTES + 0x40),
            id="some of them are",
        ),
    ],
)
def test_the_addresses_in_the_header_say_what_is_loaded_where(
    image_file, contents: bytes, segment: tuple[int, int, int, int]
) -> None:
    gpa, start, length, size = segment
    image = read_image(image_file(contents))
    assert image.segments == (Segment(gpa, contents[start : start + length], size),)
    assert (image.kind, image.mode) == ("multiboot flat binary", Mode.PROTECTED)
    assert image.entry == 0x10_0020


def test_the_addresses_in_the_header_go_before_those_of_an_elf_file(image_file) -> None:
    elf_part = elf_file(load_segment(), bits=32)[:0x1000]
    contents = elf_part + flat_kernel(load_end_gpa=0x10_0040)
    assert read_image(image_file(contents)).segments[0].gpa == 0x10_0000


@pytest.mark.parametrize("contents", [kernel(entry=0), flat_kernel(entry=0)], ids=["ELF", "flat"])
def test_entry_option_overrides_the_file(image_file, contents: bytes) -> None:
    path = image_file(contents)
    assert "entry point 0x0 is outside the image" in error_of(path)
    gpa = 0x10_0000 if contents[:4] == header()[:4] else 0x20_0000
    assert read_image(path, entry=gpa + 4).entry == gpa + 4


def test_options_that_agree_with_the_kernel_are_fine(image_file) -> None:
    path = image_file(kernel())
    assert read_image(path, mode=Mode.PROTECTED, load=0x20_0000) == read_image(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": Mode.LONG}, "a multiboot kernel starts in protected mode; leave out --mode"),
        ({"mode": Mode.REAL}, "leave out --mode"),
        ({"load": 0x10_0000}, "where it is loaded (0x200000); leave out --load"),
    ],
)
def test_options_that_contradict_the_kernel_are_an_error(image_file, options, message) -> None:
    assert message in error_of(image_file(kernel()), **options)


@pytest.mark.parametrize("video", [(0, 1024, 768, 32), (0, 0, 0, 0), (1, 80, 25, 0)])
def test_a_kernel_that_recommends_a_video_mode_gets_the_text_screen(video) -> None:
    contents = header(0, 0, 0, 0, 0, *video, flags=VIDEO).ljust(len(CODE), b"\0")
    contents = elf_file(load_segment(), bits=32)[:0x1000] + contents
    image = multiboot.load("kernel", contents, LoadOptions())
    assert told(image).framebuffer == (0xB_8000, 160, 80, 25, 16, 2)


BAD_KERNELS = {
    "requirement 3": (kernel(flags=0xB), "requires 0x8 of its boot loader"),
    "all requirements": (kernel(flags=0xFFFF), "requires 0xfff8 of its boot loader"),
    "neither ELF nor addresses": (header() + CODE, "without addresses in a file that is not ELF"),
    "damaged ELF": (kernel(phnum=0), "nothing to load"),
    "x86-64 code in ELF32": (kernel(machine=EM_X86_64), "x86-64 code in an ELF32 file"),
    "ELF segment above 4 GiB": (
        kernel(load_segment(), load_segment(paddr=4 * GIB), bits=64),
        "0x100000000..0x100001000 ends beyond the 32-bit addresses",
    ),
    "half of the addresses": (flat_kernel()[:31], "truncated in its multiboot header"),
    "addresses at the edge": (flat_kernel(before=8192 - 28), "truncated in its multiboot header"),
    "header before the image": (
        flat_kernel(header_gpa=0xF_FFFC),
        "is loaded at 0xffffc and the image from 0x100000 on",
    ),
    "image begins before the file": (
        flat_kernel(before=0x40, header_gpa=0x10_0044),
        "but it is at byte 64 of the file",
    ),
    "code is missing": (
        flat_kernel(load_end_gpa=0x10_0000 + FLAT_BYTES + 1),
        "1 bytes are missing up to the multiboot header's load_end_addr (0x100085)",
    ),
    "load_end_addr before load_addr": (flat_kernel(load_end_gpa=0x10_0000), "not in this order"),
    "bss_end_addr in the code": (flat_kernel(bss_end_gpa=0x10_0080), "not in this order"),
    "entry outside": (flat_kernel(entry=0x20_0000), "entry point 0x200000 is outside the image"),
    "ends beyond 4 GiB": (
        flat_kernel(header_gpa=0xFFFF_FFF0, load_gpa=0xFFFF_FFF0, entry=0xFFFF_FFF0),
        "ends beyond the 32-bit addresses",
    ),
}


@pytest.mark.parametrize("what", BAD_KERNELS)
def test_a_bad_multiboot_kernel_is_one_clear_line(image_file, what: str) -> None:
    contents, message = BAD_KERNELS[what]
    assert message in error_of(image_file(contents))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("good", [kernel(), kernel(bits=64), flat_kernel(before=0x40)])
def test_a_mutated_multiboot_kernel_is_an_image_or_an_image_error(good: bytes, seed: int) -> None:
    """No other exception, and nothing allocated for what the header claims."""
    rng = random.Random(seed)
    at = good.index(header()[:4])
    outcomes = []
    tracemalloc.start()
    for _ in range(200):
        mutant = bytearray(good)
        flags = rng.choice((3, 7, ADDRESSES, ADDRESSES, ADDRESSES | 3, rng.getrandbits(32)))
        edge = (0, 1, 0xF_FFFF, 0x10_0000, 0x10_0040, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
        fields = [rng.choice((*edge, rng.getrandbits(32))) for _ in range(5)]
        if rng.random() < 0.5:  # only one of them is wrong
            good_fields = (0x10_0000, 0x10_0000, 0, 0x10_1000, 0x10_0000)
            wrong = rng.randrange(5)
            fields = [fields[n] if n == wrong else good_fields[n] for n in range(5)]
        mutant[at : at + 32] = header(*fields, flags=flags)
        size = rng.choice((len(good), len(good), rng.randrange(at + 12, at + 40)))
        contents = bytes(mutant[:size])
        assert multiboot.recognise(contents)
        try:
            image = multiboot.load("kernel", contents, LoadOptions())
            finished = finish_image(image._replace(append="x"), RAM)
        except ImageError as error:
            outcomes.append(str(error))
            continue
        outcomes.append("")
        assert any(s.gpa <= image.entry < s.end_gpa for s in image.segments)
        placed = sorted(finished.segments)
        assert all(a.end_gpa <= b.gpa for a, b in pairwise(placed))
        assert all(len(s.data) <= s.size and s.end_gpa <= RAM[0][1] for s in placed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert all("\n" not in text for text in outcomes)
    assert "" in outcomes
    assert len(set(outcomes)) > 5


# --- what the kernel is told -----------------------------------------------------------------


class Told(NamedTuple):
    """The boot information as a kernel reads it, with its pointers followed."""

    flags: int
    lower_kib: int
    upper_kib: int
    command_line: bytes
    modules: list[tuple[int, bytes, bytes]]  # gpa, contents, string
    memory_map: list[tuple[int, int, int]]  # gpa, size, kind
    loader: bytes
    framebuffer: tuple[int, ...]


def told(image: Image, ram: list[tuple[int, int]] = RAM) -> Told:
    """What the kernel `image` reads at EBX in a machine with this memory."""
    finished = finish_image(image, ram)
    check_fits(finished, ram, RESERVED)
    memory = bytearray(max(s.gpa + len(s.data) for s in finished.segments))
    for segment in finished.segments:
        memory[segment.gpa : segment.gpa + len(segment.data)] = segment.data

    def text(gpa: int) -> bytes:
        return bytes(memory[gpa : memory.index(0, gpa)])

    ebx = dict(finished.registers)["rbx"]
    words = struct.unpack_from("<22I", memory, ebx)
    modules = []
    for index in range(words[5]):
        start, end, string, zero = struct.unpack_from("<4I", memory, words[6] + 16 * index)
        assert zero == 0
        modules.append((start, bytes(memory[start:end]), text(string)))
    memory_map = []
    at = words[12]
    while at < words[12] + words[11]:
        size, *line = struct.unpack_from("<IQQI", memory, at)
        memory_map.append(tuple(line))
        at += size + 4
    assert at == words[12] + words[11]
    return Told(
        flags=words[0],
        lower_kib=words[1],
        upper_kib=words[2],
        command_line=text(words[4]),
        modules=modules,
        memory_map=memory_map,
        loader=text(words[16]),
        framebuffer=struct.unpack_from("<QIIIBB", memory, ebx + 88),
    )


def test_a_kernel_is_told_its_memory_and_its_boot_loader(image_file) -> None:
    path = image_file(kernel())
    facts = told(read_image(path))
    assert facts.flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 12
    assert (facts.lower_kib, facts.upper_kib) == (639, 63 * KIB)
    assert facts.memory_map == [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x400, 2),
        (0xE_0000, 0x2_0000, 2),
        (MIB, 63 * MIB, 1),
    ]
    assert facts.command_line == str(path).encode()
    assert facts.modules == []
    assert facts.loader == b"pyvmm"


def test_memory_above_the_hole_for_devices_is_only_in_the_memory_map(image_file) -> None:
    facts = told(read_image(image_file(kernel())), LARGE_RAM)
    assert facts.upper_kib == 3 * MIB - KIB
    assert facts.memory_map[-2:] == [(MIB, 3 * GIB - MIB, 1), (4 * GIB, GIB, 1)]


def test_the_smallest_machine_has_nothing_above_1_mib(image_file) -> None:
    contents = flat_kernel(header_gpa=0x1_0000, load_gpa=0x1_0000, entry=0x1_0020)
    facts = told(read_image(image_file(contents)), [(0, MIB)])
    assert facts.upper_kib == 0
    assert [gpa for gpa, _, _ in facts.memory_map] == [0, 0x9_FC00, 0xE_0000]


def test_the_command_line_is_the_image_and_what_the_user_appends(image_file) -> None:
    path = image_file(kernel())
    image = read_image(path, append="console=ttyS0  π")
    assert told(image).command_line == f"{path} console=ttyS0  π".encode()


def test_modules_are_in_pages_of_their_own_after_the_kernel(image_file) -> None:
    first, second = image_file(b"x" * 5000, "first"), image_file(b"y", "second")
    image = read_image(image_file(kernel()), modules=[f"{first} a=1 b", str(second)])
    assert image.modules == (
        Module(str(first), f"{first} a=1 b", b"x" * 5000),
        Module(str(second), str(second), b"y"),
    )
    assert told(image).modules == [
        (0x20_1000, b"x" * 5000, f"{first} a=1 b".encode()),
        (0x20_3000, b"y", str(second).encode()),
    ]


def test_modules_of_a_kernel_below_1_mib_are_above_it(image_file) -> None:
    contents = flat_kernel(header_gpa=0x1_0000, load_gpa=0x1_0000, entry=0x1_0020)
    image = read_image(image_file(contents), modules=[str(image_file(b"x", "module"))])
    assert [gpa for gpa, _, _ in told(image).modules] == [MIB]


def test_modules_that_do_not_fit_are_told_how_much_memory_they_need(image_file) -> None:
    module = image_file(bytes(3 * MIB), "module")
    image = read_image(image_file(kernel()), modules=[str(module)])
    told(image, [(0, 6 * MIB)])
    with pytest.raises(ImageError) as caught:
        finish_image(image, [(0, 5 * MIB)])
    assert str(caught.value) == (
        f"{image.name}: the module {module} at 0x201000..0x501000 is not in guest memory "
        "(0x0..0x500000); it needs -m 6M"
    )


def test_modules_beyond_32_bit_addresses_are_an_error(image_file) -> None:
    contents = flat_kernel(header_gpa=0xFFFF_E000, load_gpa=0xFFFF_E000, entry=0xFFFF_E020)
    image = read_image(image_file(contents), modules=[str(image_file(b"x", "module"))])
    with pytest.raises(ImageError, match=r"module .* ends beyond the 32-bit addresses"):
        finish_image(image._replace(modules=image.modules * 2), RAM)


def test_a_kernel_where_the_boot_information_goes_is_an_error(image_file) -> None:
    contents = flat_kernel(header_gpa=0x9000, load_gpa=0x9000, entry=0x9020)
    with pytest.raises(ImageError, match="overlaps the multiboot information at 0x9000"):
        finish_image(read_image(image_file(contents)), RAM)


def test_a_command_line_that_is_too_long_is_an_error(image_file) -> None:
    image = read_image(image_file(kernel()), append="x" * 0x7000)
    with pytest.raises(ImageError, match="give a shorter command line"):
        finish_image(image, RAM)
    told(image._replace(append="x" * 0x6000))


def test_a_module_that_cannot_be_read_is_one_clear_line(image_file, tmp_path: Path) -> None:
    path = image_file(kernel())
    cases = {
        f"{tmp_path}/none args": f"{tmp_path}/none: no such file; give the path of a module",
        str(image_file(b"", "empty")): f"{tmp_path}/empty: the file is empty; build the module",
        str(tmp_path): f"{tmp_path}: a directory; give the path of a module in it",
        "": ": no such file; give the path of a module",
        "two\nlines": "'two\\nlines': no such file",
    }
    for string, message in cases.items():
        with pytest.raises(ImageError) as caught:
            read_image(path, modules=[string])
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [elf_file(load_segment()), CODE], ids=["ELF", "flat"])
def test_modules_for_a_guest_that_cannot_be_told_of_them_are_an_error(image_file, contents) -> None:
    path, module = image_file(contents), image_file(b"x", "module")
    assert "only a multiboot kernel can" in error_of(path, modules=[str(module)])
    assert read_image(path, append="kept for other ways").append == "kept for other ways"


def test_other_images_need_no_finishing(image_file) -> None:
    image = read_image(image_file(CODE))
    assert finish_image(image, RAM) is image

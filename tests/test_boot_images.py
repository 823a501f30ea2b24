"""From files to images: flat binaries, ELF files, and everything that is neither."""

from __future__ import annotations

import os
import random
import socket
import struct
import tracemalloc
from pathlib import Path

import pytest

from pyvmm import boot
from pyvmm.boot import (
    Image,
    ImageError,
    Mode,
    Segment,
    check_fits,
    read_image,
    real_mode_entry,
)

EM_386, EM_ARM, EM_X86_64, EM_AARCH64 = 3, 40, 62, 183
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4

CODE = bytes(range(100))


def load_segment(**changes: int) -> dict[str, int]:
    """A PT_LOAD of CODE at 0x200000 with 0x1000 bytes in memory; `changes` are p_ fields."""
    fields = {"type": PT_LOAD, "offset": 0x1000, "vaddr": 0x20_0000, "paddr": 0x20_0000}
    fields |= {"filesz": len(CODE), "memsz": 0x1000, "flags": 5, "align": 0x1000}
    return fields | changes


def elf_file(*segments: dict[str, int], bits: int = 64, **changes: int) -> bytes:
    """An ELF executable with CODE at file offset 0x1000; `changes` are e_ fields."""
    header_bytes, entry_bytes = (64, 56) if bits == 64 else (52, 32)
    fields = {
        "ei_class": 2 if bits == 64 else 1,
        "ei_data": 1,
        "type": ET_EXEC,
        "machine": EM_X86_64 if bits == 64 else EM_386,
        "entry": 0x20_0000,
        "phoff": header_bytes,
        "phentsize": entry_bytes,
        "phnum": len(segments),
    } | changes
    header = b"\x7fELF" + bytes([fields["ei_class"], fields["ei_data"], 1]) + bytes(9)
    header += struct.pack("<HHI", fields["type"], fields["machine"], 1)
    header += struct.pack("<QQQ" if bits == 64 else "<III", fields["entry"], fields["phoff"], 0)
    header += struct.pack("<IHHH", 0, header_bytes, fields["phentsize"], fields["phnum"])
    header += bytes(6)  # no section headers
    assert len(header) == header_bytes
    names = ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align")
    if bits == 64:
        names = ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align")
    for segment in segments:
        values = [segment[name] for name in names]
        header += struct.pack("<IIQQQQQQ" if bits == 64 else "<8I", *values)
    return header.ljust(0x1000, b"\0") + CODE


@pytest.fixture
def image_file(tmp_path):
    """A function that writes bytes to a file and returns its path."""

    def write(contents: bytes) -> Path:
        path = tmp_path / "guest.img"
        path.write_bytes(contents)
        return path

    return write


def error_of(path, **options) -> str:
    """The message of the ImageError for `path`, which must be a line that names the file."""
    with pytest.raises(ImageError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


# --- flat binaries ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode", "load", "entry"),
    [
        ({}, Mode.LONG, 0x100000, 0x100000),
        ({"mode": Mode.LONG}, Mode.LONG, 0x100000, 0x100000),
        ({"mode": Mode.PROTECTED}, Mode.PROTECTED, 0x100000, 0x100000),
        ({"mode": Mode.REAL}, Mode.REAL, 0x7C00, 0x7C00),
        ({"load": 0x20_0000}, Mode.LONG, 0x20_0000, 0x20_0000),
        ({"entry": 0x10_0010}, Mode.LONG, 0x100000, 0x10_0010),
        ({"mode": Mode.REAL, "load": 0}, Mode.REAL, 0, 0),
        ({"mode": Mode.REAL, "load": 0xF_FF9C, "entry": 0xF_FFF0}, Mode.REAL, 0xF_FF9C, 0xF_FFF0),
        ({"load": (1 << 32) - 100}, Mode.LONG, (1 << 32) - 100, (1 << 32) - 100),
    ],
)
def test_a_flat_binary_goes_where_the_options_say(image_file, options, mode, load, entry):
    path = image_file(CODE)
    assert read_image(path, **options) == Image(
        str(path), "flat binary", mode, entry, (Segment(load, CODE, len(CODE)),)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": Mode.REAL, "load": 0xF_FFF0}, "do not fit below 0x100000"),
        ({"mode": Mode.PROTECTED, "load": 0xFFFF_FFF0}, "do not fit below 0x100000000"),
        ({"mode": Mode.LONG, "load": 0xFFFF_FFF0}, "do not fit below 0x100000000"),
        ({"load": -1}, "do not fit below"),
        ({"entry": 0x0F_FFFF}, "entry point 0xfffff is outside the image"),
        ({"entry": 0x10_0000 + len(CODE)}, "outside the image"),
        ({"entry": -1}, "outside the image"),
    ],
)
def test_a_flat_binary_that_cannot_be_reached_is_an_error(image_file, options, message):
    assert message in error_of(image_file(CODE), **options)


def test_a_file_shorter_than_elfs_magic_number_is_a_flat_binary(image_file):
    assert read_image(image_file(b"\xf4")).kind == "flat binary"
    assert read_image(image_file(b"\x7fEL")).kind == "flat binary"


@pytest.mark.parametrize(
    ("gpa", "cs", "ip"),
    [
        (0, 0, 0),
        (0x7C00, 0, 0x7C00),
        (0xFFFF, 0, 0xFFFF),
        (0x1_0000, 0x1000, 0),
        (0x2_0100, 0x2000, 0x100),
        (0xF_FFF0, 0xF000, 0xFFF0),  # the reset vector, as PCs have it
    ],
)
def test_real_mode_starts_at_the_gpa_with_ip_its_low_16_bits(gpa, cs, ip):
    assert real_mode_entry(gpa) == (cs, ip)
    assert cs * 16 + ip == gpa


@pytest.mark.parametrize("gpa", [-1, 0x10_0000])
def test_real_mode_cannot_start_above_1_mib(gpa):
    with pytest.raises(ValueError, match="not a real-mode address"):
        real_mode_entry(gpa)


# --- ELF -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "kind", "mode"), [(64, "ELF64", Mode.LONG), (32, "ELF32", Mode.PROTECTED)]
)
def test_an_elf_file_is_loaded_by_physical_address(image_file, bits, kind, mode):
    segments = [
        load_segment(),
        load_segment(type=PT_NOTE, paddr=0, memsz=0),  # not loaded
        load_segment(vaddr=0x20_2000, paddr=0x10_0000, offset=0x1010, filesz=16, memsz=16),
    ]
    path = image_file(elf_file(*segments, bits=bits))
    assert read_image(path) == Image(
        str(path),
        kind,
        mode,
        0x20_0000,
        (Segment(0x10_0000, CODE[16:32], 16), Segment(0x20_0000, CODE, 0x1000)),
    )


def test_segments_are_views_and_bss_is_only_a_number(image_file):
    contents = elf_file(load_segment(memsz=1 << 63, paddr=0, vaddr=0), entry=0)
    path = image_file(contents)
    tracemalloc.start()
    image = read_image(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image.segments[0].size == 1 << 63
    assert len(image.segments[0].data) == len(CODE)
    assert peak < 1 << 20
    with pytest.raises(ImageError, match="is not in guest memory"):
        check_fits(image, [(0, 64 << 20)], [])


@pytest.mark.parametrize(
    ("segments", "e_entry", "entry"),
    [
        pytest.param([load_segment()], 0x20_0010, 0x20_0010, id="not linked high"),
        pytest.param(
            [load_segment(vaddr=0xFFFF_FFFF_8020_0000)],
            0xFFFF_FFFF_8020_0010,
            0x20_0010,
            id="linked high, virtual e_entry as the ABI says",
        ),
        pytest.param(
            [load_segment(vaddr=0xFFFF_FFFF_8020_0000)],
            0x20_0010,
            0x20_0010,
            id="linked high, physical e_entry as Linux does it",
        ),
        pytest.param(
            [
                load_segment(),
                load_segment(vaddr=0xFFFF_FFFF_8030_0000, paddr=0x30_0000),
            ],
            0x20_0010,
            0x20_0010,
            id="a low segment with the entry beside a high one",
        ),
        pytest.param(
            [load_segment(vaddr=0x30_0000), load_segment(vaddr=0x20_0000, paddr=0x40_0000)],
            0x20_0010,
            0x40_0010,
            id="virtual goes before physical",
        ),
    ],
)
def test_the_entry_point_is_made_physical(image_file, segments, e_entry, entry):
    path = image_file(elf_file(*segments, entry=e_entry))
    assert read_image(path).entry == entry


def test_entry_option_overrides_the_file_and_is_physical(image_file):
    path = image_file(elf_file(load_segment(vaddr=0xFFFF_FFFF_8020_0000), entry=0x1234))
    assert "0x1234 is outside the image" in error_of(path)
    assert read_image(path, entry=0x20_0020).entry == 0x20_0020
    assert "outside the image" in error_of(path, entry=0xFFFF_FFFF_8020_0000)


def test_options_that_agree_with_the_elf_file_are_fine(image_file):
    path = image_file(elf_file(load_segment()))
    assert read_image(path, mode=Mode.LONG, load=0x20_0000) == read_image(path)


@pytest.mark.parametrize(
    ("contents", "options", "message"),
    [
        (elf_file(load_segment()), {"mode": Mode.REAL}, "ELF64 file starts in long mode"),
        (elf_file(load_segment()), {"mode": Mode.PROTECTED}, "leave out --mode"),
        (elf_file(load_segment(), bits=32), {"mode": Mode.LONG}, "starts in protected mode"),
        (elf_file(load_segment()), {"load": 0x10_0000}, "loaded (0x200000); leave out --load"),
    ],
)
def test_options_that_contradict_the_elf_file_are_an_error(image_file, contents, options, message):
    assert message in error_of(image_file(contents), **options)


GOOD = elf_file(load_segment())
BAD_ELF = {
    "only the magic number": (b"\x7fELF", "truncated in its ELF header"),
    "half an ELF header": (GOOD[:40], "truncated in its ELF header"),
    "half an ELF32 header": (elf_file(bits=32)[:51], "truncated in its ELF header"),
    "half a program header": (GOOD[:100], "truncated in its program headers"),
    "no code": (GOOD[:0x1010], "ends at byte 4196 of a file of 4112; it is truncated"),
    "unknown class": (elf_file(load_segment(), ei_class=3), "neither ELF32 nor ELF64 (class 3)"),
    "big-endian": (elf_file(load_segment(), ei_data=2), "not little-endian"),
    "ARM": (elf_file(load_segment(), bits=32, machine=EM_ARM), "built for ARM, not for i386"),
    "AArch64": (elf_file(load_segment(), machine=EM_AARCH64), "built for AArch64, not for x86-64"),
    "unknown machine": (elf_file(load_segment(), machine=999), "built for machine 999"),
    "x32": (elf_file(load_segment(), bits=32, machine=EM_X86_64), "ELF32 file (x32)"),
    "i386 in ELF64": (elf_file(load_segment(), machine=EM_386), "i386 code in an ELF64 file"),
    "object file": (elf_file(type=ET_REL), "an object file; link it"),
    "static-pie": (elf_file(load_segment(), type=ET_DYN), "-static -no-pie"),
    "core dump": (elf_file(load_segment(), type=ET_CORE), "a core dump"),
    "unknown type": (elf_file(load_segment(), type=0xFE00), "not an executable (e_type 65024)"),
    "dynamically linked": (
        elf_file(load_segment(type=PT_INTERP), load_segment()),
        "dynamically linked",
    ),
    "no program headers": (elf_file(), "nothing to load"),
    "no PT_LOAD": (elf_file(load_segment(type=PT_NOTE)), "nothing to load"),
    "only an empty PT_LOAD": (elf_file(load_segment(filesz=0, memsz=0)), "nothing to load"),
    "absurd phnum": (elf_file(load_segment(), phnum=0xFFFF), "65535 program headers"),
    "phnum beyond the file": (elf_file(load_segment(), phnum=200), "in its program headers"),
    "phoff beyond the file": (elf_file(load_segment(), phoff=1 << 63), "in its program headers"),
    "wrong phentsize": (elf_file(load_segment(), phentsize=32), "32 bytes instead of 56"),
    "filesz over memsz": (elf_file(load_segment(memsz=99)), "file (100) than in memory (99)"),
    "offset beyond the file": (elf_file(load_segment(offset=1 << 63)), "it is truncated"),
    "offset wraps": (elf_file(load_segment(offset=(1 << 64) - 50)), "it is truncated"),
    "end beyond 2**64": (elf_file(load_segment(paddr=(1 << 64) - 1)), "beyond 64-bit addresses"),
    "end beyond 2**32": (
        elf_file(load_segment(paddr=0xFFFF_F800), bits=32),
        "ends beyond 32-bit addresses",
    ),
    "overlap": (
        elf_file(load_segment(), load_segment(paddr=0x20_0FFF)),
        "segments at 0x200000..0x201000 and 0x200fff..0x201fff overlap",
    ),
    "same address twice": (elf_file(load_segment(), load_segment()), "overlap"),
    "entry outside": (elf_file(load_segment(), entry=0), "entry point 0x0 is outside the image"),
    "entry unreachable": (
        elf_file(load_segment(paddr=1 << 32), entry=0x20_0000),
        "entry point 0x100000000 cannot be reached in long mode",
    ),
}


@pytest.mark.parametrize("what", BAD_ELF)
def test_a_bad_elf_file_is_one_clear_line(image_file, what):
    contents, message = BAD_ELF[what]
    assert message in error_of(image_file(contents))


def test_a_segment_up_to_the_last_address_is_not_out_of_range(image_file):
    high = load_segment(paddr=(1 << 64) - 0x1000)
    image = read_image(image_file(elf_file(load_segment(), high)))
    assert image.segments[1].end_gpa == 1 << 64


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("seed", range(8))
def test_a_mutated_elf_file_is_an_image_or_an_image_error(bits, seed):
    """No other exception, and nothing allocated for what the headers claim."""
    rng = random.Random(seed)
    good = elf_file(
        load_segment(),
        load_segment(paddr=0x30_0000, vaddr=0x30_0000, memsz=100),
        load_segment(type=PT_NOTE),
        bits=bits,
    )
    headers = 64 + 3 * 56
    elf = next(protocol for protocol in boot.PROTOCOLS if protocol.recognise(good))
    messages = []
    tracemalloc.start()
    for _ in range(400):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            value = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            first = rng.randrange(4, headers)
            for offset in range(first, min(headers, first + rng.choice((1, 1, 2, 4, 8)))):
                mutant[offset] = value
        contents = bytes(mutant[: rng.choice((len(mutant), len(mutant), rng.randrange(4, 300)))])
        try:
            image = elf.load("guest.elf", contents, boot.LoadOptions())
        except ImageError as error:
            messages.append(str(error))
            continue
        assert any(s.gpa <= image.entry < s.end_gpa for s in image.segments)
        end = 0
        for segment in image.segments:
            assert end <= segment.gpa
            assert len(segment.data) <= segment.size
            end = segment.end_gpa
        assert end <= 1 << bits
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert all(text.startswith("guest.elf: ") and "\n" not in text for text in messages)
    assert 0 < len(messages) < 400  # both outcomes were tried


# --- files that cannot be read ---------------------------------------------------------------


def test_a_missing_file(tmp_path):
    assert "no such file" in error_of(tmp_path / "nothing.bin")
    assert "cannot be read: Not a directory" in error_of(Path(__file__) / "nothing.bin")


def test_a_directory(tmp_path):
    assert "a directory" in error_of(tmp_path)


def test_an_empty_file(image_file):
    assert "the file is empty" in error_of(image_file(b""))


def test_a_fifo_does_not_wait_for_its_writer(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert "a pipe, socket or device" in error_of(path)


def test_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        assert "a pipe, socket or device" in error_of("s")


def test_a_device():
    assert "a pipe, socket or device" in error_of("/dev/zero")


def test_a_symbolic_link_to_itself(tmp_path):
    path = tmp_path / "loop"
    path.symlink_to(path)
    assert "cannot be read" in error_of(path)


def test_a_file_without_read_permission(image_file, tmp_path):
    path = image_file(CODE)
    path.chmod(0)
    uid = os.geteuid()
    if uid == 0:  # root may read everything
        os.seteuid(65534)
    try:
        assert "permission denied" in error_of(path)
    finally:
        os.seteuid(uid)


def test_a_disk_image_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(boot.MAX_IMAGE_BYTES + 1)
    assert "too many for a guest image" in error_of(path)


def test_file_names_that_would_garble_the_message_are_quoted(tmp_path):
    for name in ("two\nlines", "esc\x1b[2J", os.fsdecode(b"\xff")):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value) == (
            f"{str(tmp_path / name)!r}: no such file; give the path of a guest image"
        )
        str(caught.value).encode()
    with pytest.raises(ImageError, match="not a file name"):
        read_image("null\0byte")


# --- does it fit? ----------------------------------------------------------------------------

MIB = 1 << 20
TABLES = (0x1000, 0x7000, "the boot page tables")
HOLE = (3 << 30, 1 << 30, "the MMIO hole")
SMALL_RAM = [(0, 64 * MIB)]
LARGE_RAM = [(0, 3 << 30), (4 << 30, 1 << 30)]


def image_at(*places: tuple[int, int]) -> Image:
    """An image with segments of (gpa, size)."""
    segments = tuple(Segment(gpa, b"", size) for gpa, size in places)
    return Image("guest.elf", "ELF64", Mode.LONG, places[0][0], segments)


@pytest.mark.parametrize(
    ("places", "ram"),
    [
        ([(0x10_0000, 0x1000)], SMALL_RAM),
        ([(0x8000, 0x1000), (0, 0x1000)], SMALL_RAM),  # around the page tables
        ([(63 * MIB, MIB)], SMALL_RAM),
        ([((3 << 30) - 1, 1), (4 << 30, 1 << 30)], LARGE_RAM),
        ([(0x10_0000, 2 * MIB)], [(0, 2 * MIB), (2 * MIB, 2 * MIB)]),  # slots that touch
    ],
)
def test_an_image_inside_ram_fits(places, ram):
    check_fits(image_at(*places), ram, [TABLES, HOLE])


@pytest.mark.parametrize(
    ("places", "ram", "message"),
    [
        ([(0x7C00, 512)], SMALL_RAM, "0x7c00..0x7e00 overlaps the boot page tables at 0x1000"),
        ([(0, 1 << 20)], SMALL_RAM, "overlaps the boot page tables"),
        ([(0xFEE0_0000, 16)], SMALL_RAM, "overlaps the MMIO hole at 0xc0000000..0x100000000"),
        ([(63 * MIB, MIB + 1)], SMALL_RAM, "not in guest memory (0x0..0x4000000); it needs -m 65M"),
        ([(65 * MIB, 1)], SMALL_RAM, "it needs -m 66M"),
        ([(65 * MIB, 1), (MIB, 1), (80 * MIB, MIB)], SMALL_RAM, "it needs -m 81M"),
        ([(5 << 30, 1)], SMALL_RAM, "it needs -m 4097M"),  # the hole takes none of it
        ([(5 << 30, 1)], LARGE_RAM, "it needs -m 4097M"),
        ([(0xFFFF_FFFF_8000_0000, 1)], SMALL_RAM, "no -m is large enough: link it with physical"),
        ([(4 << 30, 1 << 63)], SMALL_RAM, "no -m is large enough"),
    ],
)
def test_an_image_that_does_not_fit_is_told_what_to_do(places, ram, message):
    with pytest.raises(ImageError) as caught:
        check_fits(image_at(*places), ram, [TABLES, HOLE])
    assert message in str(caught.value)
    assert str(caught.value).startswith("guest.elf: the segment at ")
    assert "\n" not in str(caught.value)


def test_a_hole_in_ram_that_nobody_named_is_an_error_too():
    with pytest.raises(ImageError, match="there is a hole in guest memory"):
        check_fits(image_at((3 << 30, 1)), LARGE_RAM, [])

"""Linux kernels: bzImages and PVH, where they and their initrd go, and what the kernel is told.

The kernels here are made up: headers as Linux has them, and no code.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm import Machine, StopReason, kvm
from pyvmm.boot import Image, ImageError, Mode, check_fits, finish_image, linux, pvh, read_image
from pyvmm.boot.entry import GDT_GPA, RESERVED, set_entry_state, write_boot_structures
from pyvmm.boot.layout import RESERVED as PC_RESERVED
from pyvmm.boot.tables import RSDP_GPA
from tests.test_boot_images import CODE, PT_NOTE, elf_file, error_of, load_segment

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RAM = [(0, 64 * MIB)]
LARGE_RAM = [(0, 3 * GIB), (4 * GIB, 1 * GIB)]
MAP = [(0, 0x9_FC00, 1), (0x9_FC00, 0x400, 2), (0xE_0000, 0x2_0000, 2), (MIB, 63 * MIB, 1)]

KERNEL = bytes(range(256)) * 16


def bzimage(*, kernel: bytes = KERNEL, end: int = 0x26C, after: bytes = b"", **changes: int):
    """A bzImage; `end` is where its setup header ends, and `changes` are fields of it."""
    fields = {
        "setup_sects": 3,
        "root_flags": 1,
        "syssize": -(-len(kernel) // 16),
        "boot_flag": 0xAA55,
        "jump": 0xEB | (end - 0x202 & 0xFF) << 8,
        "header": int.from_bytes(b"HdrS", "little"),
        "version": 0x020F,
        "type_of_loader": 0,
        "loadflags": 1,
        "code32_start": MIB,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 2 * MIB,
        "relocatable_kernel": 1,
        "xloadflags": 0x7F,
        "cmdline_size": 2047,
        "pref_address": 16 * MIB,
        "init_size": 8 * MIB,
    } | changes
    setup = bytearray(512 * (1 + (fields["setup_sects"] or 4)))
    setup[0x1E0:0x1F1] = b"\xff" * 0x11  # the sentinel, and what must not be copied either
    for name, value in fields.items():
        offset, form = FIELDS[name]
        if offset < end:
            struct.pack_into(form, setup, offset, value)
    setup[end : end + 64] = b"\x90" * 64  # setup code
    return bytes(setup) + kernel + bytes(-len(kernel) % 16) + after


FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "root_flags": (0x1F2, "<H"),
    "syssize": (0x1F4, "<I"),
    "vid_mode": (0x1FA, "<H"),
    "boot_flag": (0x1FE, "<H"),
    "jump": (0x200, "<H"),
    "header": (0x202, "<I"),
    "version": (0x206, "<H"),
    "type_of_loader": (0x210, "<B"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "ramdisk_image": (0x218, "<I"),
    "ramdisk_size": (0x21C, "<I"),
    "cmd_line_ptr": (0x228, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}


def note(owner: bytes, kind: int, descriptor: bytes) -> bytes:
    """An ELF note."""
    owner, padded = owner + b"\0", (lambda data: data + bytes(-len(data) % 4))
    header = struct.pack("<III", len(owner), len(descriptor), kind)
    return header + padded(owner) + padded(descriptor)


def vmlinux(
    *segments: dict[str, int], notes: bytes | None = None, bits: int = 64, **changes: int
) -> bytes:
    """An ELF file as elf_file() makes it, with a PVH note behind its code."""
    if notes is None:
        entry = struct.pack("<Q" if bits == 64 else "<I", 0x20_0010)
        notes = note(b"GNU", 3, b"build id") + note(b"Xen", 6, b"linux\0") + note(b"Xen", 18, entry)
    at = 0x1000 + len(CODE)
    noted = load_segment(type=PT_NOTE, offset=at, filesz=len(notes), paddr=0, memsz=0)
    return elf_file(*(segments or [load_segment()]), noted, bits=bits, **changes) + notes


@pytest.fixture
def image_file(tmp_path: Path):
    """A function that writes bytes to a file and returns its path."""

    def write(contents: bytes, name: str = "kernel") -> Path:
        path = tmp_path / name
        path.write_bytes(contents)
        return path

    return write


def finish_error(image: Image, ram: list[tuple[int, int]] = RAM) -> str:
    """The message, a line that names the kernel, with which `image` does not fit this memory."""
    with pytest.raises(ImageError) as caught:
        finish_image(image, ram)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{image.name}: ")
    return message


def memory_of(image: Image, ram: list[tuple[int, int]]) -> tuple[bytearray, Image]:
    """What is in memory when the finished `image` is loaded, up to its last byte, and itself."""
    finished = finish_image(image, ram)
    check_fits(finished, ram, RESERVED[image.mode] + PC_RESERVED)
    placed = sorted(finished.segments)
    assert all(a.end_gpa <= b.gpa for a, b in pairwise(placed))
    memory = bytearray(max(s.gpa + len(s.data) for s in placed))
    for segment in placed:
        memory[segment.gpa : segment.gpa + len(segment.data)] = segment.data
    return memory, finished


def text(memory: bytearray, gpa: int) -> bytes:
    return bytes(memory[gpa : memory.index(0, gpa)])


# --- which files -----------------------------------------------------------------------------


def test_a_bzimage_and_an_elf_file_with_a_pvh_note_are_linux_kernels(image_file) -> None:
    assert read_image(image_file(bzimage())).kind == "Linux 2.15"
    assert read_image(image_file(vmlinux())).kind == "PVH ELF64"
    assert read_image(image_file(vmlinux(bits=32))).kind == "PVH ELF32"


def test_what_cpuid_tells_is_made_true_for_linux_kernels_only(image_file) -> None:
    assert read_image(image_file(bzimage())).is_linux
    assert read_image(image_file(vmlinux())).is_linux
    assert not read_image(image_file(elf_file(load_segment()))).is_linux


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        bzimage()[:0x205],
        bzimage(boot_flag=0xAA54),
        bzimage(header=0),
        b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa",
        elf_file(load_segment()),
        vmlinux(notes=note(b"Xen", 17, bytes(8))),
        vmlinux(notes=note(b"xen", 18, bytes(8))),
        vmlinux(notes=note(b"Xen", 18, bytes(6))),
        vmlinux()[:-1],
        vmlinux(phnum=0),
        b"\x7fELF",
    ],
)
def test_other_files_are_not(contents: bytes) -> None:
    assert not linux.recognise(contents)
    assert not pvh.recognise(contents)


def test_many_and_damaged_notes_take_no_time() -> None:
    endless = struct.pack("<III", 0, 0, 0) * 200_000
    assert not pvh.recognise(vmlinux(notes=endless))
    assert not pvh.recognise(vmlinux(notes=struct.pack("<III", 0xFFFF_FFFF, 0xFFFF_FFFF, 18) * 2))


# --- a bzImage -------------------------------------------------------------------------------


class Told(NamedTuple):
    """The boot parameters as a kernel reads them, with their pointers followed."""

    header: dict[str, int]
    command_line: bytes
    initrd: bytes
    e820: list[tuple[int, int, int]]
    rsdp_gpa: int
    screen: tuple[int, ...]
    kernel_gpa: int
    page: bytes


def told(image: Image, ram: list[tuple[int, int]] = RAM) -> Told:
    """What the kernel `image` reads at RSI in a machine with this memory."""
    memory, finished = memory_of(image, ram)
    page = bytes(memory[dict(finished.registers)["rsi"] :][:4096])
    header = {name: struct.unpack_from(form, page, at)[0] for name, (at, form) in FIELDS.items()}
    kernel_gpa = header["code32_start"]
    assert memory[kernel_gpa : kernel_gpa + len(KERNEL)] == KERNEL
    assert finished.entry == kernel_gpa + (0x200 if image.mode is Mode.LONG else 0)
    start, size = header["ramdisk_image"], header["ramdisk_size"]
    assert bool(start) == bool(size)
    return Told(
        header,
        text(memory, header["cmd_line_ptr"]),
        bytes(memory[start : start + size]),
        [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])],
        struct.unpack_from("<Q", page, 0x70)[0],
        (page[6], page[7], page[14], page[15], page[16]),
        kernel_gpa,
        page,
    )


def test_a_kernel_is_told_what_the_machine_is(image_file) -> None:
    facts = told(read_image(image_file(bzimage()), append="console=ttyS0  π"))
    assert facts.command_line == "console=ttyS0  π".encode()
    assert facts.e820 == MAP
    assert facts.rsdp_gpa == RSDP_GPA
    assert facts.screen == (3, 80, 25, 1, 16)
    assert facts.header["type_of_loader"] == 0xFF
    assert facts.header["vid_mode"] == 0xFFFF
    assert facts.initrd == b""


def test_memory_above_the_hole_for_devices_is_in_the_map(image_file) -> None:
    facts = told(read_image(image_file(bzimage())), LARGE_RAM)
    assert facts.e820[-2:] == [(MIB, 3 * GIB - MIB, 1), (4 * GIB, GIB, 1)]


def test_the_setup_header_and_nothing_else_is_copied_from_the_file(image_file) -> None:
    contents = bzimage(end=0x26C)
    page = told(read_image(image_file(contents))).page
    assert page[0x1F1:0x1FA] == contents[0x1F1:0x1FA]
    assert page[0x22C:0x26C] == contents[0x22C:0x26C]
    assert page[0x26C:0x2D0] == bytes(0x2D0 - 0x26C)
    assert page[0x1E9:0x1F1] == bytes(8)  # with the sentinel: this was no careless copy
    assert page[0x2D0 + 20 * 4 :] == bytes(4096 - 0x2D0 - 20 * 4)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, Mode.LONG),
        ({"version": 0x020C}, Mode.LONG),
        ({"xloadflags": 0x7E}, Mode.PROTECTED),
        ({"version": 0x020B}, Mode.PROTECTED),  # the field was padding then
        ({"version": 0x0206, "end": 0x23C}, Mode.PROTECTED),
    ],
)
def test_a_kernel_is_entered_in_long_mode_if_it_has_that_entry(image_file, changes, mode) -> None:
    image = read_image(image_file(bzimage(**changes)))
    assert image.mode is mode
    assert image.expects_pc
    told(image)


def test_the_32_bit_entry_can_be_asked_for(image_file) -> None:
    path = image_file(bzimage())
    assert read_image(path, mode=Mode.PROTECTED).mode is Mode.PROTECTED
    assert read_image(path, mode=Mode.LONG) == read_image(path)
    told(read_image(path, mode=Mode.PROTECTED))


@pytest.mark.parametrize(
    ("changes", "gpa"),
    [
        pytest.param({}, 16 * MIB, id="where it prefers"),
        pytest.param({"relocatable_kernel": 0}, 16 * MIB, id="not relocatable"),
        pytest.param({"pref_address": 0x1000}, MIB, id="never where a PC has its own structures"),
        pytest.param({"end": 0x23C, "version": 0x0206}, MIB, id="a version without preference"),
    ],
)
def test_where_a_kernel_is_loaded(image_file, changes, gpa: int) -> None:
    assert told(read_image(image_file(bzimage(**changes)))).kernel_gpa == gpa


def test_only_the_kernel_is_loaded_and_not_the_signature_behind_it(image_file) -> None:
    image = read_image(image_file(bzimage(after=b"signature")))
    assert image.segments[1].data == KERNEL


def test_old_kernels_without_a_number_of_setup_sectors_have_four(image_file) -> None:
    told(read_image(image_file(bzimage(setup_sects=0))))


def test_the_last_paragraph_of_a_kernel_need_not_be_full(image_file) -> None:
    """memtest86+ is built so."""
    read_image(image_file(bzimage()[:-15]))


def test_a_kernel_that_needs_more_memory_is_told_how_much(image_file) -> None:
    image = read_image(image_file(bzimage(init_size=40 * MIB)))
    told(image, [(0, 56 * MIB)])
    assert finish_error(image, [(0, 55 * MIB)]).endswith(
        "the kernel at 0x1000000..0x3800000 is not in guest memory (0x0..0x3700000); "
        "it needs -m 56M"
    )


BAD_BZIMAGES = {
    "half a header": (bzimage()[:0x230], "truncated in its Linux setup header"),
    "header cut short": (bzimage()[:0x26B], "truncated in its Linux setup header"),
    "only the setup code": (bzimage()[:2048], "6144 bytes according to its setup header, and a f"),
    "half a kernel": (bzimage()[:-16], "and a file of 6128; it is truncated or damaged"),
    "no kernel": (bzimage(syssize=0), "2048 bytes according to its setup header"),
    "absurd size": (bzimage(syssize=0xFFFF_FFFF), "truncated or damaged"),
    "too many sectors": (bzimage(setup_sects=255)[:6144], "truncated or damaged"),
    "version 2.05": (bzimage(version=0x0205, end=0x235), "boot protocol 2.05; pyvmm boots 2.06"),
    "short header": (bzimage(end=0x23B), "setup header that ends at byte 0x23b, not in"),
    "long header": (bzimage(end=0x291), "setup header that ends at byte 0x291, not in"),
    "zImage": (bzimage(loadflags=0), "a zImage"),
    "absurd address": (
        bzimage(pref_address=1 << 40),
        "entry point 0x10000000200 cannot be reached in long mode",
    ),
    "no 64-bit entry": (bzimage(kernel=bytes(0x200), init_size=0), "is outside the image"),
}


@pytest.mark.parametrize("what", BAD_BZIMAGES)
def test_a_bad_bzimage_is_one_clear_line(image_file, what: str) -> None:
    contents, message = BAD_BZIMAGES[what]
    assert message in error_of(image_file(contents))


@pytest.mark.parametrize(
    ("contents", "options", "message"),
    [
        (bzimage(), {"mode": Mode.REAL}, "starts in long or protected mode; leave out --mode"),
        (bzimage(xloadflags=0), {"mode": Mode.LONG}, "starts in protected mode; leave out --mode"),
        (bzimage(), {"load": MIB}, "leave out --load and --entry"),
        (bzimage(), {"entry": MIB}, "leave out --load and --entry"),
        (vmlinux(), {"mode": Mode.LONG}, "PVH entry starts in protected mode; leave out --mode"),
        (vmlinux(), {"load": MIB}, "where it is loaded (0x200000); leave out --load"),
        (vmlinux(), {"entry": MIB}, "the entry point 0x100000 is outside the image"),
    ],
)
def test_options_that_contradict_the_kernel_are_an_error(
    image_file, contents, options, message
) -> None:
    assert message in error_of(image_file(contents), **options)


HEADER_PROGRAM = """\
#include <stddef.h>
#include <stdio.h>
#include <asm/bootparam.h>
#define PRINT(name) printf("%s %zu\\n", #name, offsetof(struct boot_params, name));
int main(void) {{ {prints} }}
"""


@pytest.mark.process
def test_the_offsets_here_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    """Of this file, whose tests compare them with linux.py's."""
    compiler = shutil.which("cc")
    offsets = {f"hdr.{name}": offset for name, (offset, _) in FIELDS.items()}
    offsets |= {"acpi_rsdp_addr": 0x70, "e820_entries": 0x1E8, "e820_table": 0x2D0}
    offsets |= {"e820_table[1]": 0x2D0 + 20, "edd_mbr_sig_buffer": 0x290}
    offsets |= {
        "screen_info.orig_video_mode": 6,
        "screen_info.orig_video_cols": 7,
        "screen_info.orig_video_lines": 14,
        "screen_info.orig_video_isVGA": 15,
        "screen_info.orig_video_points": 16,
    }
    source, program = tmp_path / "offsets.c", tmp_path / "offsets"
    source.write_text(HEADER_PROGRAM.format(prints=" ".join(f"PRINT({n})" for n in offsets)))
    if compiler is None or subprocess.run([compiler, source, "-o", program]).returncode:
        pytest.skip("no C compiler, or no kernel headers")
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert dict(line.split() for line in printed.splitlines()) == {
        name: str(offset) for name, offset in offsets.items()
    }


# --- its command line and its initrd ---------------------------------------------------------


def test_a_command_line_as_long_as_the_kernel_takes(image_file) -> None:
    path = image_file(bzimage(cmdline_size=100))
    assert told(read_image(path, append="x" * 100)).command_line == b"x" * 100
    assert "has 101 bytes, and this kernel takes 100; make it shorter" in finish_error(
        read_image(path, append="x" * 101)
    )


def test_a_command_line_is_not_longer_than_its_place(image_file) -> None:
    path = image_file(bzimage(cmdline_size=0xFFFF_FFFF))
    told(read_image(path, append="x" * 0x5FFF))
    assert "this kernel takes 24575" in finish_error(read_image(path, append="x" * 0x6000))


@pytest.mark.parametrize("make", [bzimage, vmlinux])
@pytest.mark.parametrize(
    ("size", "ram", "gpa"),
    [
        (1, RAM, 64 * MIB - 4096),
        (4096, RAM, 64 * MIB - 4096),
        (4097, RAM, 64 * MIB - 8192),
        (5000, LARGE_RAM, 2 * GIB - 8192),
    ],
)
def test_the_initrd_is_as_high_as_it_may_be(image_file, make, size: int, ram, gpa: int) -> None:
    initrd = image_file(b"i" * size, "initrd")
    image = read_image(image_file(make()), initrd=initrd)
    segment = finish_image(image, ram).segments[-1]
    assert (segment.gpa, segment.data, segment.size) == (gpa, b"i" * size, size)


def test_a_kernel_is_told_of_its_initrd(image_file) -> None:
    image = read_image(image_file(bzimage()), initrd=image_file(b"root", "initrd"))
    facts = told(image)
    assert facts.initrd == b"root"
    assert facts.header["ramdisk_image"] == 64 * MIB - 4096


def test_initrd_addr_max_is_the_last_byte_that_the_kernel_reaches(image_file) -> None:
    contents = bzimage(initrd_addr_max=0x2FF_FFFF)
    image = read_image(image_file(contents), initrd=image_file(b"i" * 4096, "initrd"))
    assert told(image).header["ramdisk_image"] == 0x2FF_F000


def test_an_initrd_that_does_not_fit_is_told_how_much_memory_it_needs(image_file) -> None:
    initrd = image_file(bytes(3 * MIB), "initrd")
    image = read_image(image_file(bzimage(init_size=8 * MIB + 1)), initrd=initrd)
    assert finish_error(image, [(0, 27 * MIB)]) == (
        f"{image.name}: the initrd {initrd} (3145728 bytes) does not fit between the kernel's end "
        "at 0x1800001 and 0x1b00000; it needs -m 28M"
    )
    told(image, [(0, 28 * MIB)])


def test_an_initrd_too_large_for_the_kernel_is_an_error_that_no_memory_helps(image_file) -> None:
    contents = bzimage(initrd_addr_max=26 * MIB - 1)
    image = read_image(image_file(contents), initrd=image_file(bytes(3 * MIB), "initrd"))
    message = finish_error(image)
    assert "between the kernel's end at 0x1800000 and 0x1a00000" in message
    assert message.endswith("this kernel cannot use more: make the initrd smaller")


@pytest.mark.parametrize("contents", [elf_file(load_segment()), CODE], ids=["ELF", "flat"])
def test_an_initrd_for_a_guest_that_is_not_linux_is_an_error(image_file, contents: bytes) -> None:
    path, initrd = image_file(contents), image_file(b"x", "initrd")
    assert "cannot be given an initrd; only a Linux kernel can" in error_of(path, initrd=initrd)


@pytest.mark.parametrize("make", [bzimage, vmlinux])
def test_modules_for_linux_are_an_error(image_file, make) -> None:
    path, module = image_file(make()), image_file(b"x", "module")
    assert "only a multiboot kernel can" in error_of(path, modules=[str(module)])


def test_an_initrd_that_cannot_be_read_is_one_clear_line(image_file, tmp_path: Path) -> None:
    path = image_file(bzimage())
    cases = {
        str(tmp_path / "none"): f"{tmp_path}/none: no such file; give the path of a Linux initrd",
        str(
            image_file(b"", "empty")
        ): f"{tmp_path}/empty: the file is empty; build the Linux initrd",
        str(tmp_path): f"{tmp_path}: a directory",
        "two\nlines": "'two\\nlines': no such file",
        "with args": "with args: no such file",  # unlike a module's
    }
    for initrd, message in cases.items():
        with pytest.raises(ImageError) as caught:
            read_image(path, initrd=initrd)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


# --- PVH -------------------------------------------------------------------------------------


class StartInfo(NamedTuple):
    """The start info as a kernel reads it, with its pointers followed."""

    words: tuple[int, ...]  # magic, version, flags
    command_line: bytes
    modules: list[tuple[int, bytes]]
    memory_map: list[tuple[int, int, int]]
    rsdp_gpa: int


def start_info(image: Image, ram: list[tuple[int, int]] = RAM) -> StartInfo:
    """What the kernel `image` reads at EBX in a machine with this memory."""
    memory, finished = memory_of(image, ram)
    ebx = dict(finished.registers)["rbx"]
    words = struct.unpack_from("<IIII QQQQ II", memory, ebx)
    _, _, _, module_count, modules_gpa, command_line, rsdp, map_gpa, map_count, zero = words
    assert zero == 0
    modules = []
    for n in range(module_count):
        gpa, size, string, zero = struct.unpack_from("<4Q", memory, modules_gpa + 32 * n)
        assert (string, zero) == (0, 0)
        modules.append((gpa, bytes(memory[gpa : gpa + size])))
    lines = [struct.unpack_from("<QQII", memory, map_gpa + 24 * n) for n in range(map_count)]
    assert all(line[3] == 0 for line in lines)
    memory_map = [line[:3] for line in lines]
    return StartInfo(words[:3], text(memory, command_line), modules, memory_map, rsdp)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_pvh_kernel_starts_at_its_note_in_protected_mode(image_file, bits: int) -> None:
    image = read_image(image_file(vmlinux(bits=bits, entry=0)))
    assert (image.mode, image.entry) == (Mode.PROTECTED, 0x20_0010)
    assert image.expects_pc
    assert dict(image.registers) == {"rbx": 0x9000, "cr0": 0x11, "cr4": 0}
    assert [(s.gpa, s.size) for s in image.segments] == [(0x20_0000, 0x1000)]
    assert read_image(image_file(vmlinux(bits=bits)), entry=0x20_0020).entry == 0x20_0020


def test_a_pvh_kernel_is_told_what_the_machine_is(image_file) -> None:
    image = read_image(image_file(vmlinux()), append="console=ttyS0  π")
    assert start_info(image) == StartInfo(
        (0x336EC578, 1, 0), "console=ttyS0  π".encode(), [], MAP, RSDP_GPA
    )
    assert start_info(image, LARGE_RAM).memory_map[-1] == (4 * GIB, GIB, 1)


def test_a_pvh_kernel_is_told_of_its_initrd(image_file) -> None:
    image = read_image(image_file(vmlinux()), initrd=image_file(b"root", "initrd"))
    assert start_info(image).modules == [(64 * MIB - 4096, b"root")]


def test_a_pvh_kernel_that_does_not_fit_is_one_clear_line(image_file) -> None:
    path = image_file(vmlinux())
    image = read_image(path, append="x" * 0x7000)
    assert "make it shorter" in finish_error(image)
    assert "it needs -m 3M" in finish_error(read_image(path), [(0, 2 * MIB)])
    image = read_image(path, initrd=image_file(bytes(MIB), "initrd"))
    assert "it needs -m 4M" in finish_error(image, [(0, 3 * MIB)])
    low = load_segment(vaddr=0x9000, paddr=0x9000)
    image = read_image(image_file(vmlinux(low)), entry=0x9000)
    assert "overlaps the PVH start info" in finish_error(image)


def test_a_damaged_pvh_kernel_is_an_elf_file_with_an_error(image_file) -> None:
    assert "truncated in its program headers" in error_of(image_file(vmlinux(phnum=100)))
    assert "outside the image" in error_of(image_file(vmlinux(load_segment(paddr=0x30_0000))))


# --- mutations -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("good", [bzimage(), vmlinux(), vmlinux(bits=32)])
def test_a_mutated_kernel_is_an_image_or_an_image_error(good: bytes, seed: int) -> None:
    """No other exception, and nothing allocated for what the headers claim."""
    rng = random.Random(seed)
    protocol = linux if linux.recognise(good) else pvh
    window = range(0x1F1, 0x270) if protocol is linux else range(4, 64 + 2 * 56)
    if protocol is pvh and rng.random() < 0.5:
        window = range(0x1000 + len(CODE), len(good))
    from pyvmm.boot import LoadOptions, Module

    outcomes = []
    tracemalloc.start()
    for _ in range(300):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            value = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            first = rng.choice(window)
            for offset in range(first, min(window.stop, first + rng.choice((1, 1, 2, 4, 8)))):
                mutant[offset] = value
        contents = bytes(mutant[: rng.choice((len(mutant), len(mutant), rng.randrange(len(good))))])
        if not protocol.recognise(contents):
            continue
        try:
            image = protocol.load("kernel", contents, LoadOptions())
            image = image._replace(append="x", initrd=Module("initrd", "", b"i" * 5000))
            finished = finish_image(image, RAM)
            check_fits(finished, RAM, RESERVED[finished.mode] + PC_RESERVED)
        except ImageError as error:
            outcomes.append(str(error))
            continue
        outcomes.append("")
        assert any(s.gpa <= finished.entry < s.end_gpa for s in finished.segments)
        placed = sorted(finished.segments, key=lambda s: s.gpa)
        assert all(a.end_gpa <= b.gpa for a, b in pairwise(placed))
        assert all(len(s.data) <= s.size and s.end_gpa <= RAM[0][1] for s in placed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert all("\n" not in text for text in outcomes)
    assert "" in outcomes
    assert any(outcomes)


# --- the processor at the entry --------------------------------------------------------------


class Vcpu:
    """A vCPU that keeps what it is given; it begins with zeros."""

    def __init__(self) -> None:
        self.state = {kvm.kvm_regs: kvm.kvm_regs(), kvm.kvm_sregs: kvm.kvm_sregs()}

    def get(self, kind: type) -> kvm.kvm_sregs:
        return self.state[kind]

    def set(self, value) -> None:
        self.state[type(value)] = value


class Memory:
    """Takes what is written to the GDT."""

    def __init__(self) -> None:
        self.gdt = bytearray(32)

    def write(self, gpa: int, data: bytes) -> None:
        if gpa >= GDT_GPA:
            self.gdt[gpa - GDT_GPA : gpa - GDT_GPA + len(data)] = data


@pytest.mark.parametrize(
    ("contents", "mode", "cs", "data"),
    [
        (bzimage(), None, 0x10, 0x18),  # __BOOT_CS and __BOOT_DS of the boot protocol
        (bzimage(), Mode.PROTECTED, 0x10, 0x18),
        (vmlinux(), None, 0x18, 0x10),
        (elf_file(load_segment()), None, 0x08, 0x10),
    ],
    ids=["64-bit", "32-bit", "PVH", "ELF64"],
)
def test_the_segments_at_the_entry_are_those_of_the_gdt(image_file, contents, mode, cs, data):
    image = read_image(image_file(contents), mode=mode)
    memory, vcpu = Memory(), Vcpu()
    write_boot_structures(memory, image.mode, image.selectors)
    set_entry_state(vcpu, 0, image.mode, image.entry, image.registers, image.selectors)
    sregs = vcpu.state[kvm.kvm_sregs]
    assert sregs.cs.selector == cs
    assert {sregs.ds.selector, sregs.es.selector, sregs.ss.selector} == {data}
    descriptors = struct.unpack("<4Q", memory.gdt)
    long = image.mode is Mode.LONG
    assert descriptors[cs // 8] == (0x00AF_9B00_0000_FFFF if long else 0x00CF_9B00_0000_FFFF)
    assert descriptors[data // 8] == 0x00CF_9300_0000_FFFF
    assert descriptors[0] == 0


def test_a_protocol_can_fill_control_registers_too(image_file) -> None:
    vcpu = Vcpu()
    image = read_image(image_file(vmlinux()))
    set_entry_state(vcpu, 0, image.mode, image.entry, image.registers, image.selectors)
    sregs, regs = vcpu.state[kvm.kvm_sregs], vcpu.state[kvm.kvm_regs]
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x11, 0, 0)  # as PVH says: PE, and ET, always 1
    assert (sregs.tr.type, sregs.tr.base, sregs.tr.limit) == (0xB, 0, 0x67)
    assert (regs.rbx, regs.rip) == (0x9000, 0x20_0010)


# --- entered for real ------------------------------------------------------------------------

# What prints the string at ESI on the debug console, and ends.
PRINT = bytes.fromhex(
    "ac 84c0 7404"  # 1: lodsb; test al, al; je 2f
    "e6e9 ebf7 f4"  # out 0xe9, al; jmp 1b; 2: hlt
)
PRINT_COMMAND_LINE = bytes.fromhex("8bb628020000") + PRINT  # mov esi, [rsi + 0x228]
ENTRY64 = bytes.fromhex(
    "b818000000 8ed8 8ed0"  # mov eax, 0x18; mov ds, eax; mov ss, eax
    "6a10 488d0503000000 50 48cb"  # push 0x10; lea rax, [rip + 3]; push rax; lretq
)
ENTRY32 = bytes.fromhex(
    "b818000000 8ed8 8ed0"  # the same
    "6a10 e800000000 58 83c006 50 cb"  # push 0x10; call 1f; 1: pop eax; add eax, 6; push eax; lret
)
SPEAKING_KERNEL = (ENTRY32 + PRINT_COMMAND_LINE).ljust(0x200, b"\xf4") + (
    ENTRY64 + PRINT_COMMAND_LINE
)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", [Mode.LONG, Mode.PROTECTED])
def test_a_bzimage_finds_segments_and_its_command_line(image_file, mode: Mode) -> None:
    path = image_file(bzimage(kernel=SPEAKING_KERNEL))
    with Machine(read_image(path, mode=mode, append="root=none")) as machine:
        assert machine.run(timeout=30).reason is StopReason.HALTED
        assert machine.output == b"root=none"


@pytest.mark.kvm
@pytest.mark.parametrize("bits", [32, 64])
def test_a_pvh_kernel_finds_its_command_line(image_file, bits: int) -> None:
    code = bytes.fromhex("8b7318") + PRINT  # mov esi, [ebx + 24]
    contents = vmlinux(bits=bits)
    contents = contents[:0x1010] + code + contents[0x1010 + len(code) :]
    with Machine(read_image(image_file(contents), append="root=none")) as machine:
        assert machine.run(timeout=30).reason is StopReason.HALTED
        assert machine.output == b"root=none"

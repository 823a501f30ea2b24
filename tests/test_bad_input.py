"""Images, numbers and guests that are wrong: one clear line, the right status, no traceback."""

from __future__ import annotations

import os
import random
import struct
import sys
from pathlib import Path

import pytest

from pyvmm import ImageError, Machine, Mode, StopReason, read_image
from pyvmm.cli import main
from tests.conftest import GUESTS, open_fds
from tests.test_command_line import one_line, pyvmm, without_power_over_permissions

pytestmark = pytest.mark.process

HELLO, HELLO_ELF = GUESTS / "hello.bin", GUESTS / "hello.elf"


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """For main() in this process: pytest's stand-in for stdin has no descriptor."""
    monkeypatch.setattr(sys, "stdin", None)


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which main() refuses `arguments`, with status 2."""
    before = open_fds()
    try:
        status = main([*map(str, arguments)])
    except SystemExit as exit:  # argparse's way
        status = int(str(exit.code))
    captured = capfd.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("pyvmm: ")
    assert open_fds() == before
    return lines[0]


# --- files ---------------------------------------------------------------------------------------


def test_a_missing_image(capfd: pytest.CaptureFixture[str]) -> None:
    assert "/nonexistent.bin: no such file" in refused(capfd, "/nonexistent.bin")


def test_an_empty_image(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "empty" in refused(capfd, tmp_path / "empty")


def test_a_directory(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "directory" in refused(capfd, tmp_path)


def test_a_fifo_is_refused_and_not_waited_for(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "pipe" in refused(capfd, tmp_path / "fifo")


def test_a_device(capfd: pytest.CaptureFixture[str]) -> None:
    assert "device" in refused(capfd, "/dev/zero")


def test_a_dangling_symbolic_link_and_a_loop(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(capfd, tmp_path / "dangling")
    refused(capfd, tmp_path / "loop")


def test_an_unreadable_image(tmp_path: Path) -> None:
    image = tmp_path / "secret.bin"
    image.write_bytes(b"\xf4")
    image.chmod(0)
    result = pyvmm(image, preexec_fn=without_power_over_permissions)
    assert "permission denied" in one_line(result)
    assert result.returncode == 2


def test_names_that_break_lines_or_encodings_stay_on_one_line(tmp_path: Path) -> None:
    for name in (b"two\nlines", b"not-\xff-utf8", "schön".encode()):
        result = pyvmm(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        assert "no such file" in one_line(result)
        assert result.returncode == 2


@pytest.mark.kvm
def test_an_image_larger_than_memory(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(b"\xf4")
    os.truncate(large, 8 << 20)
    assert "-m 9M" in refused(capfd, large, "-m", "4M")
    assert main([str(large), "-m", "9M"]) == 0


@pytest.mark.parametrize("length", [1, 4, 16, 63, 64, 100, 120])
def test_a_truncated_elf_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, length: int
) -> None:
    truncated = tmp_path / "truncated.elf"
    truncated.write_bytes(HELLO_ELF.read_bytes()[:length])
    if length < 4:
        return  # not even the magic number: a flat binary of three bytes
    assert "truncated" in refused(capfd, truncated)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        *("0", "1", "5000", "-1", "-64M", "64X", "1E", "", "M", "64MM", "1.5G", "nan", "0x", "1M1"),
        *("1048577", "1025K1", "lots", " ", "64M\n64M", "9" * 5000),
    ],
)
def test_odd_memory_sizes_are_usage_errors(capfd: pytest.CaptureFixture[str], size: str) -> None:
    refused(capfd, HELLO, "-m", size)


@pytest.mark.kvm
@pytest.mark.parametrize("size", ["100000G", "1000T", "8388608T", "99999999999T", "9" * 4000])
def test_more_memory_than_any_machine_has_is_one_line(size: str) -> None:
    result = pyvmm(HELLO, "-m", size)
    one_line(result)
    assert result.returncode in (2, 4)


@pytest.mark.kvm
@pytest.mark.parametrize("cpus", ["0", "-1", "100000", "1.5", "two", "", "9" * 5000])
def test_odd_numbers_of_vcpus_are_usage_errors(
    capfd: pytest.CaptureFixture[str], cpus: str
) -> None:
    refused(capfd, HELLO, "-c", cpus, "--irqchip", "off")


@pytest.mark.kvm
@pytest.mark.parametrize(
    "options",
    [
        ("--load", "0x4000000"),  # the end of RAM
        ("--load", "0x3ffffff"),
        ("--load", "0xc0000000"),
        ("--load", "0xfffffff0"),
        ("--load", "0x1000"),  # the boot page tables
        ("--load", "0x7ff8"),  # the boot GDT
        ("--load", "0x7000", "--mode", "protected"),
        ("--load", "0xfff00", "--mode", "real", "--entry", "0x200000"),
        ("--load", "0x100000", "--mode", "real"),
        ("--load", "-1"),
        ("--load", "0x10000000000000000"),
        ("--load", "here"),
        ("--load", ""),
        ("--entry", "0"),
        ("--entry", "0xfffff"),
        ("--entry", "0x100040"),  # behind the last byte
        ("--entry", "-5"),
        ("--mode", "virtual"),
        ("--mode", ""),
        ("--timeout", "0"),
        ("--timeout", "-1"),
        ("--timeout", "soon"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--nonsense",),
        ("another.bin",),
        ("-m",),
    ],
    ids=" ".join,
)
def test_odd_options_are_usage_errors(
    capfd: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    refused(capfd, HELLO, *options)


def test_no_image_at_all(capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd)


@pytest.mark.parametrize("options", [("--mode", "real"), ("--load", "0x200000")])
def test_options_that_contradict_an_elf_file(
    capfd: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    refused(capfd, HELLO_ELF, *options)


@pytest.mark.kvm
@pytest.mark.parametrize(
    "options",
    [{"cpus": 0}, {"cpus": -1}, {"memory": 0}, {"memory": 1 << 20 | 1}, {"memory": -4096}],
)
def test_the_library_refuses_impossible_numbers(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Machine(HELLO, **options)  # type: ignore[arg-type]


@pytest.mark.kvm
@pytest.mark.parametrize("memory", [1 << 46, 1 << 62, 1 << 70])
def test_the_library_refuses_too_much_memory(memory: int) -> None:
    with pytest.raises((ValueError, OSError)):
        Machine(HELLO, memory=memory)


# --- damaged and random guests -------------------------------------------------------------------


def run_whatever(image: object, *, mode: Mode | None = None) -> StopReason | None:
    """Load and run what may be anything; the reason why it stopped, None when it was refused."""
    try:
        loaded = read_image(image, mode=mode)  # type: ignore[arg-type]
        with Machine(loaded, memory=16 << 20, output=lambda data: None) as machine:
            stop = machine.run(timeout=0.1, max_exits=300)
    except ImageError as error:
        assert len(str(error).splitlines()) == 1
        return None
    assert stop.reason is not StopReason.FAILED, (stop.message, stop.report)
    if stop.reason is StopReason.CRASHED:
        assert "rip 0x" in stop.report and "bytes at rip" in stop.report
    return stop.reason


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["hello.elf", "hello32.elf", "exceptions.elf"])
def test_a_damaged_elf_file_is_refused_or_runs_but_never_breaks_pyvmm(
    tmp_path: Path, name: str
) -> None:
    chance = random.Random(name)
    original = (GUESTS / name).read_bytes()
    damaged = tmp_path / name
    outcomes = set()
    for _ in range(60):
        contents = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            # Mostly in the headers, where a byte means something to the loader.
            end = len(contents) if chance.random() < 0.3 else 64 + 4 * 56
            position = chance.randrange(4, end)
            contents[position] = chance.choice((0, 0xFF, 0x7F, 0x80, chance.randrange(256)))
        if chance.random() < 0.2:
            del contents[chance.randrange(len(contents)) :]
        damaged.write_bytes(contents or b"\x7f")
        outcomes.add(run_whatever(damaged))
    assert None in outcomes and len(outcomes) > 1  # some are refused, some run


@pytest.mark.kvm
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_random_bytes_as_a_guest_end_in_some_way_but_never_break_pyvmm(
    tmp_path: Path, mode: Mode
) -> None:
    chance = random.Random(mode.value)
    for number in range(40):
        guest = tmp_path / f"{number}.bin"
        guest.write_bytes(chance.randbytes(chance.choice((1, 2, 15, 200, 4096))))
        try:
            assert run_whatever(guest, mode=mode) is not None
        except AssertionError:
            print(f"the guest: {guest.read_bytes()[:64].hex(' ')}")
            raise


@pytest.mark.kvm
@pytest.mark.parametrize("number", range(3))
def test_random_bytes_on_the_command_line_give_a_documented_status(
    tmp_path: Path, number: int
) -> None:
    guest = tmp_path / "random.bin"
    guest.write_bytes(random.Random(number).randbytes(500))
    result = pyvmm(guest, "--timeout", "0.3", "-c", "2", "--irqchip", "off")
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode in (0, 6, 124) or result.returncode % 2 == 1
    assert result.returncode in (0,) or result.stderr.startswith("pyvmm: ") or not result.stderr


@pytest.mark.kvm
@pytest.mark.parametrize(
    "code",
    [
        pytest.param("ebfe", id="spins"),
        pytest.param("fbf4ebfd", id="halts with interrupts on"),
        pytest.param("48 31 e4 50", id="pushes below zero"),
        pytest.param("48b80000000000000080 ffe0", id="jumps to a non-canonical address"),
        pytest.param("b8000000f0 ffe0", id="jumps to MMIO"),
        pytest.param("b80000e0fe ffe0", id="jumps to the local APIC"),
        pytest.param("0f01c1", id="vmcall"),
        pytest.param("0f01d9", id="vmmcall"),
        pytest.param("0f0b", id="ud2"),
        pytest.param("cd80", id="int 0x80 without an IDT"),
        pytest.param("b9ffffffff 0f32", id="rdmsr of one that is not"),
        pytest.param("31c0 0f22c0", id="leaves protected mode from 64-bit mode"),
        pytest.param("0f22d8", id="loads CR3 with garbage"),
        pytest.param("66ea", id="an instruction that does not end"),
        pytest.param("f0" * 20, id="nothing but prefixes"),
        pytest.param("bf000000f0 b900100000 f3 48ab f4", id="fills MMIO"),
        pytest.param("be000000f0 bf00001000 b900010000 f3a4 f4", id="copies MMIO over itself"),
        pytest.param("66baf803 be00001000 b900100000 f36e f4", id="rep outsb"),
        pytest.param("66baf803 bf00002000 b900100000 f36c f4", id="rep insb"),
        pytest.param("66baf803 bf000000f0 b910000000 f36d f4", id="rep insd to MMIO"),
        pytest.param("0f3f", id="an unknown opcode"),
        pytest.param("66bafeff ef ed f4", id="a port access over the end"),
    ],
)
def test_a_guest_that_does_odd_things_breaks_only_itself(tmp_path: Path, code: str) -> None:
    guest = tmp_path / "odd.bin"
    guest.write_bytes(bytes.fromhex(code))
    assert run_whatever(guest) is not None


def test_an_elf_file_with_a_segment_of_huge_bss_costs_no_memory(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    contents = bytearray(HELLO_ELF.read_bytes())
    phoff = struct.unpack_from("<Q", contents, 32)[0]
    phentsize, phnum = struct.unpack_from("<HH", contents, 54)
    for index in range(phnum):
        struct.pack_into("<Q", contents, phoff + index * phentsize + 40, 1 << 45)
    huge = tmp_path / "huge.elf"
    huge.write_bytes(contents)
    refused(capfd, huge)

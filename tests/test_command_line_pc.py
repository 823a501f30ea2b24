"""The options of `python3 -m pyvmm` for kernels that expect a PC, as a user sees them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.conftest import GUESTS
from tests.test_command_line import ENVIRONMENT, PATIENCE, Terminal, flat, one_line, pyvmm, started

pytestmark = [pytest.mark.process, pytest.mark.kvm]

SMALL_DISK = "disk.img"  # in the working directory
MULTIBOOT, SMP = GUESTS / "multiboot.elf", GUESTS / "smp.elf"

# Real mode.  "RDY" on the screen; wait for the make code of the key A; "A" below; cli; hlt.
SHOW_AND_WAIT_FOR_A = bytes.fromhex(
    "b800b8 8ec0 26c70600005207 26c70602004407 26c70604005907"
    "e464 a801 74fa e460 3c1e 75f4 26c706a0004107 fa f4"
)


def test_a_multiboot_kernel_gets_its_command_line_and_modules(tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"the module's contents")
    result = pyvmm(MULTIBOOT, "--append", "test", "--module", f"{module} two words")
    assert (result.returncode, result.stderr) == (0, "")
    assert "boot loader: pyvmm\n" in result.stdout
    assert f"command line: {MULTIBOOT} test\n" in result.stdout
    assert re.search(rf"^module: 0x\w+ to 0x\w+, {module} two words$", result.stdout, re.M)
    assert result.stdout.endswith("test: ok\n")


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_processors_are_started_by_the_guest(cpus: int) -> None:
    result = pyvmm(SMP, "-c", cpus)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"processors: {cpus:#x}\n" in result.stdout
    assert result.stdout.endswith("smp: ok\n")


def answered(answers: list[bytes], *arguments: object) -> tuple[int, bytes]:
    """Run the multiboot kernel and answer its prompts; its status and output."""
    with started(MULTIBOOT, *arguments) as process:
        assert process.stdin is not None and process.stdout is not None
        seen = b""
        for answer in answers:  # not before: a driver empties the receiver when it starts
            while not seen.endswith(b"> "):
                byte = os.read(process.stdout.fileno(), 1)
                assert byte, seen
                seen += byte
            process.stdin.write(answer)
            process.stdin.flush()
            seen += b"|"
        status = process.wait(PATIENCE)
        return status, seen + process.stdout.read()


def test_a_reset_boots_again_and_no_reboot_ends_with_0() -> None:
    status, output = answered([b"reboot\n", b"off\n"])
    assert (status, output.count(b"multiboot: hello\n")) == (0, 2)
    status, output = answered([b"reboot\n"], "--no-reboot")
    assert (status, output.count(b"multiboot: hello\n")) == (0, 1)


def test_a_kernel_that_has_crashed_by_its_own_account_gives_its_status() -> None:
    status, output = answered([b"crash\n"])
    assert status % 2 == 1
    assert b"panic: page fault" in output


def test_the_screen_is_printed_when_the_guest_ends(tmp_path: Path) -> None:
    code = SHOW_AND_WAIT_FOR_A.replace(bytes.fromhex("e464 a801 74fa e460 3c1e 75f4"), b"")
    result = pyvmm(flat(tmp_path, code), "--mode", "real", "--screen")
    assert (result.stdout, result.stderr, result.returncode) == ("RDY\nA\n", "", 0)


def test_on_a_terminal_the_screen_is_live_and_keys_are_typed_on_the_keyboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TERM", "xterm")
    guest = flat(tmp_path, SHOW_AND_WAIT_FOR_A)
    with Terminal(guest, "--mode", "real", "--screen") as terminal:
        terminal.read_until(b"RDY")
        terminal.type(b"a")
        assert terminal.ended() == (0, "")
        shown = terminal.read_until(b"RDY\r\nA\r\n")  # after the live screen has gone
        assert terminal.attributes() == terminal.before
    assert b"\x1b[?1049l" in shown


def test_a_live_screen_is_taken_down_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TERM", "xterm")
    guest = flat(tmp_path, SHOW_AND_WAIT_FOR_A)
    with Terminal(guest, "--mode", "real", "--screen") as terminal:
        terminal.read_until(b"RDY")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ended()[0] == 143
        terminal.read_until(b"\x1b[?1049l")
        assert terminal.attributes() == terminal.before


def test_a_kernel_without_a_driver_does_not_mind_virtio_devices(tmp_path: Path) -> None:
    disk = tmp_path / SMALL_DISK
    disk.write_bytes(bytes(512))
    result = pyvmm(
        MULTIBOOT, "--append", "test", "--disk", disk, "--disk", f"{MULTIBOOT.parent}/none,ro"
    )
    assert result.returncode == 2  # the second one does not exist, and the first is closed
    result = pyvmm(MULTIBOOT, "--append", "test", "--disk", disk, "--console", "virtio")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("test: ok\n")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((MULTIBOOT, "--module", "no/such/file x"), "no/such/file"),
        ((GUESTS / "hello.bin", "--module", GUESTS / "hello.bin"), "only a multiboot kernel"),
        ((MULTIBOOT, "-c", 2, "--irqchip", "off"), "irqchip"),
        ((MULTIBOOT, "-m", "1M"), "not in guest memory"),
        ((MULTIBOOT, "--mode", "long"), "--mode"),
        ((MULTIBOOT, "--irqchip", "maybe"), "--irqchip"),
        ((MULTIBOOT, "--append", "x" * 40_000), "shorter command line"),
        ((MULTIBOOT, "--initrd", MULTIBOOT), "only a Linux kernel"),
        ((MULTIBOOT, "--disk", "no/such/disk"), "no/such/disk: No such file"),
        ((MULTIBOOT, "--disk", "/dev/null"), "neither a file nor a block device"),
        ((MULTIBOOT, "--disk", MULTIBOOT), "sectors of 512"),
        ((MULTIBOOT, "--disk", SMALL_DISK, "--disk", SMALL_DISK), "another VM uses this disk"),
        ((MULTIBOOT, "--disk", SMALL_DISK, "--irqchip", "off"), "irqchip"),
        ((MULTIBOOT, *["--disk", SMALL_DISK + ",ro"] * 9), "at most 8 virtio devices"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(
    arguments: tuple[object, ...], what: str, tmp_path: Path
) -> None:
    (tmp_path / SMALL_DISK).write_bytes(bytes(512))
    result = pyvmm(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert what in one_line(result)

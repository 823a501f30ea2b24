"""`python3 -m pyvmm`, as a user sees it: what is printed where, and the exit status."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.boot.linux import ENTRY64_OFFSET
from pyvmm.hostprobe import FINDINGS, host
from pyvmm.version import VERSION
from tests.conftest import GUESTS, REPOSITORY
from tests.test_linux_boot_images import bzimage

pytestmark = pytest.mark.process

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
COMMAND = (sys.executable, "-m", "pyvmm")
PATIENCE = 50  # seconds: never reached unless there is a bug

# Guests of a few bytes, 64-bit code.
PRINT_FOREVER = bytes.fromhex("66baf803 b078 ee ebfd")  # mov dx,COM1; mov al,'x'; 1: out; jmp 1b
PRINT_AND_SPIN = bytes.fromhex("66baf803 b078 ee ebfe")
ECHO_UNTIL_Q = bytes.fromhex("66bafd03 ec a801 74f7 66baf803 ec ee 3c71 75ed f4")
# Twice: print 'x', then look at the time stamp counter until 10^9 ticks have gone by.  Then hlt.
PRINT_SLOWLY = bytes.fromhex(
    "b902000000  66baf803 b078 ee  0f31 48c1e220 4809d0 4889c3"
    "0f31 48c1e220 4809d0 4829d8 483d00ca9a3b 72ec  ffc9 75d1 f4"
)


def pyvmm(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run pyvmm to its end."""
    options = {"stdin": subprocess.DEVNULL, "timeout": PATIENCE, **options}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        errors="replace",
        **options,
    )


@contextlib.contextmanager
def started(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """pyvmm in the background, with pipes unless `options` say otherwise; killed at the end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process: subprocess.Popen[bytes] = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, **{**pipes, **options}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def flat(tmp_path: Path, code: bytes) -> Path:
    """A guest made of `code`."""
    path = tmp_path / "guest.bin"
    path.write_bytes(code)
    return path


def without_power_over_permissions() -> None:
    """In a child: root, too, is refused what the file's mode refuses."""
    drop_from_bounding_set = 24  # prctl(2), PR_CAPBSET_DROP
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr, which begins with `pyvmm: `."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pyvmm: ")
    return lines[0]


# --- guests --------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_hello_prints_and_ends_from_any_working_directory(tmp_path: Path) -> None:
    for directory in (REPOSITORY, tmp_path, Path("/")):
        result = pyvmm(GUESTS / "hello.bin", cwd=directory)
        assert (result.stdout, result.stderr, result.returncode) == (
            "Hello from long mode!\n",
            "",
            0,
        )


EXPECTED: list[tuple[str, list[str], str, int]] = [
    ("hello", [], r"Hello from long mode!\n", 0),
    ("hello16", ["--mode", "real"], r"Hello from real mode!\n", 0),
    ("hello32", ["--mode", "protected"], r"Hello from protected mode!\n", 0),
    ("exit", [], "", 85),
    ("mmio", [], r"loads: 0xff 0xffff 0xffffffff 0xffffffffffffffff\n", 0),
    ("sse", [], r"SSE works: OK\n", 0),
    ("loops", [], r"total is 0x23\n", 0),
    ("cloops", [], "", 71),
    (
        "int3",
        [],
        r"int3 at (0x[0-9a-f]+), handler saw (0x[0-9a-f]+)\nback from the handler\n",
        0,
    ),
    (
        "exceptions",
        [],
        r"#DE.* vector 0x0 .*\n#UD.* vector 0x6 .*\n#GP.* vector 0xd error code 0xfff8 .*\n"
        r"#PF.* vector 0xe error code 0x2 .* CR2 0x100000000\nall handled\n",
        0,
    ),
    (
        "paging",
        [],
        r"4 KiB page: stored (0x\w+) at 0xffff8\w+, found \1 at 0x\w+\n"
        r"2 MiB page: stored (0x\w+) at 0xffff8\w+, found \2 at 0x\w+\n",
        0,
    ),
    (
        "ring3",
        [],
        r"ring 0: hello\nring 3: hello, by way of a system call\nring 3: CS says 3, now I try hlt\n"
        r"ring 0: #GP at 0x\w+ with CS 0x1b, the end\n",
        0,
    ),
    ("smp", ["-c", "2"], r"smp: starting (.*\n)+processors: 0x2\n(.*\n)+smp: ok\n", 0),
    ("multiboot", ["--append", "test"], r"multiboot: hello\n(.*\n)+test: ok\n", 0),
]


@pytest.mark.kvm
@pytest.mark.parametrize("suffix", [".bin", ".elf"])
@pytest.mark.parametrize(("guest", "options", "output", "status"), EXPECTED)
def test_each_guest_does_what_its_readme_says(
    guest: str, options: list[str], output: str, status: int, suffix: str
) -> None:
    if suffix == ".elf":
        if guest == "hello16":
            return  # ELF knows no real mode
        options = [] if "--mode" in options else options
    result = pyvmm(GUESTS / (guest + suffix), *options)
    found = re.fullmatch(output, result.stdout)
    assert found, result.stdout
    assert (result.stderr, result.returncode) == ("", status)
    if guest == "int3":
        assert int(found[2], 0) == int(found[1], 0) + 1


def test_the_table_above_has_every_guest() -> None:
    tested = {guest for guest, *_ in EXPECTED} | {"counter", "triplefault"}
    assert tested == {path.stem for path in GUESTS.glob("*.bin")}


@pytest.mark.kvm
def test_output_of_a_traced_guest_is_the_same() -> None:
    assert pyvmm(GUESTS / "exceptions.bin", "--trace").stdout == (
        pyvmm(GUESTS / "exceptions.bin").stdout
    )


# --- statuses ------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_a_crash_is_named_with_registers_and_bytes_and_status_6() -> None:
    result = pyvmm(GUESTS / "triplefault.bin")
    assert result.returncode == 6
    assert "SHUTDOWN" in result.stderr.splitlines()[0]
    assert result.stderr.startswith("pyvmm: ")
    if host().crash_registers:
        assert re.search(r"rip 0x0*100007\b", result.stderr)
        assert re.search(r"bytes at rip: 0f 0b\b", result.stderr)  # ud2
    for name in ("rax", "r15", "cs ", "cr2", "cr3", "idt", "triple fault"):
        assert name in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.kvm
def test_a_jump_to_where_nothing_is_mapped_is_a_crash_of_the_guest(tmp_path: Path) -> None:
    # Near the end of a page, where fewer than 16 bytes could be shown of it.
    for target in (0x2_0000_FFF8, 0x2_0000_FFF0, 0x2_0000_F000):
        code = b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0"  # mov rax; jmp rax
        result = pyvmm(flat(tmp_path, code))
        assert "Traceback" not in result.stderr, result.stderr
        assert result.returncode == 6, result.stderr
        assert "bytes at rip: not readable" in result.stderr


@pytest.mark.kvm
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_timeout_shows_the_registers_of_each_vcpu_and_gives_124(cpus: int) -> None:
    result = pyvmm(GUESTS / "counter.bin", "-c", cpus, "--irqchip", "off", "--timeout", "0.2")
    assert (result.returncode, result.stdout) == (124, "")
    assert result.stderr.startswith("pyvmm: ")
    assert len(re.findall(r"^vCPU (\d), \w+:$", result.stderr, re.M)) == cpus
    assert len(re.findall(r"\brip 0x0*10000\w\b", result.stderr)) == cpus
    assert len(re.findall(r"^bytes at rip: ", result.stderr, re.M)) == cpus


@pytest.mark.kvm
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_guest_that_never_ends(
    tmp_path: Path, number: signal.Signals, status: int, cpus: int
) -> None:
    with started(flat(tmp_path, PRINT_AND_SPIN), "-c", cpus, "--irqchip", "off") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
        assert process.stderr is not None and process.stderr.read() == b""


@pytest.mark.kvm
def test_a_signal_that_comes_just_before_the_guest_runs_is_not_lost(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pyvmm import cli, console\n"
        "enter = console.RawTerminal.__enter__\n"
        "def signalled(self):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return enter(self)\n"
        "console.RawTerminal.__enter__ = signalled\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, GUESTS / "counter.bin", "--timeout", "2"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 143


def test_without_dev_kvm_it_says_what_to_do_and_gives_4() -> None:
    line = one_line(result := pyvmm(GUESTS / "hello.bin", "--device", "/nonexistent/kvm"))
    assert result.returncode == 4
    assert "/nonexistent/kvm" in line and "kvm_intel" in line
    line = one_line(result := pyvmm("--probe", "--device", "/nonexistent/kvm"))
    assert result.returncode == 4 and "/nonexistent/kvm" in line


def test_without_permission_it_says_what_to_do_and_gives_4(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(0o000)
    result = pyvmm(
        GUESTS / "hello.bin",
        "--device",
        device,
        preexec_fn=without_power_over_permissions,
    )
    line = one_line(result)
    assert result.returncode == 4
    assert str(device) in line and "permission" in line and "group" in line


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/", str(GUESTS / "hello.bin")])
def test_a_device_that_is_no_kvm_gives_4(device: str) -> None:
    result = pyvmm(GUESTS / "hello.bin", "--device", device)
    assert "KVM" in one_line(result) or device in one_line(result)
    assert result.returncode == 4


# --- output that cannot go anywhere --------------------------------------------------------------


@pytest.mark.kvm
def test_output_to_a_reader_that_left_ends_the_guest(tmp_path: Path) -> None:
    guest = flat(tmp_path, PRINT_FOREVER)
    with started(guest, "--timeout", PATIENCE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.wait(PATIENCE) == 4
        error = process.stderr.read().decode()
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1 and error.startswith("pyvmm: ")


@pytest.mark.kvm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_output_to_a_reader_that_never_reads_does_not_outlive_a_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    with started(flat(tmp_path, PRINT_FOREVER)) as process:
        assert process.stdout is not None
        wait_until_full(process.stdout.fileno())
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number


@pytest.mark.kvm
def test_output_to_a_reader_that_never_reads_does_not_outlive_a_timeout(tmp_path: Path) -> None:
    with started(flat(tmp_path, PRINT_FOREVER), "--timeout", "1") as process:
        assert process.wait(PATIENCE) == 124


def wait_until_full(fd: int) -> None:
    """Until a pipe that nobody reads takes no more."""
    size = fcntl.fcntl(fd, 1032)  # F_GETPIPE_SZ, in Python's fcntl from 3.10 on only
    deadline = time.monotonic() + PATIENCE
    waiting = b""
    while int.from_bytes(waiting, "little") < size - 8192:
        assert time.monotonic() < deadline, "the guest does not print"
        time.sleep(0.02)
        waiting = fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")
    time.sleep(0.3)  # for the writer to find it full


@pytest.mark.kvm
def test_a_slow_reader_gets_all_that_was_printed_before_the_guest_ended(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ: one page, which the first byte occupies
    try:
        with started(flat(tmp_path, PRINT_SLOWLY), stdout=writing) as process:
            os.close(writing)
            time.sleep(2.5)  # meanwhile the guest prints twice and ends
            with open(reading, "rb", closefd=False) as file:
                assert file.read() == b"xx"
            assert process.wait(PATIENCE) == 0
    finally:
        os.close(reading)


@pytest.mark.kvm
def test_stdout_that_is_closed_is_one_clear_line() -> None:
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, str(GUESTS / "hello.bin")],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode in (0, 4)  # it may also run on, and print nowhere
    assert len(result.stderr.splitlines()) == (1 if result.returncode else 0)


@pytest.mark.kvm
def test_a_trace_to_a_reader_that_left_does_not_look_like_the_guest_s_own_status() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [*COMMAND, GUESTS / "hello.bin", "--trace"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writing,
        timeout=PATIENCE,
    )
    os.close(writing)
    assert result.returncode == 4


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("triplefault.bin",), 6), (("counter.bin", "--timeout", "0.1"), 124), (("nosuch.bin",), 2)],
)
def test_a_report_that_nobody_reads_changes_no_status(
    arguments: tuple[str, ...], status: int
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    image, *options = arguments
    result = subprocess.run(
        [*COMMAND, GUESTS / image, *options],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writing,
        timeout=PATIENCE,
    )
    os.close(writing)
    assert result.returncode == status


# --- input ---------------------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("options", [(), ("--trace",)])
def test_input_reaches_com1_all_of_it_and_in_order(tmp_path: Path, options: tuple[str]) -> None:
    text = "".join(chr(ord("A") + n % 26) for n in range(100)) + "q"
    arguments = (flat(tmp_path, ECHO_UNTIL_Q), *options, "--timeout", PATIENCE)
    result = pyvmm(*arguments, input=text, stdin=None)
    assert (result.stdout, result.returncode) == (text, 0)


@pytest.mark.kvm
@pytest.mark.parametrize("how", ["<&-", "</dev/null", "0>/dev/null"])
def test_without_input_a_guest_runs_all_the_same(how: str) -> None:
    # The last is what nohup does to a terminal: a stdin that cannot be read.
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {how}', "sh", *COMMAND, str(GUESTS / "hello.bin")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("Hello from long mode!\n", "", 0)


@pytest.mark.kvm
def test_a_stdin_that_cannot_be_read_does_not_end_a_guest_that_takes_its_time() -> None:
    for path, flags in (("/dev/null", os.O_WRONLY),):
        stdin = os.open(path, flags)
        try:
            result = pyvmm(GUESTS / "counter.bin", "--timeout", "0.2", stdin=stdin)
        finally:
            os.close(stdin)
        assert result.returncode == 124, result.stderr


# --- with a terminal -----------------------------------------------------------------------------


START_IN_BACKGROUND = """
import os, subprocess, sys
sys.exit(subprocess.run(sys.argv[1:], preexec_fn=os.setpgrp).returncode)
"""


class Terminal:
    """A pseudo-terminal, and pyvmm in it."""

    def __init__(
        self,
        *arguments: object,
        controlling: bool = True,
        background: bool = False,
        ignore: int = 0,
    ) -> None:
        """`background`: it is a job that another process, which has the terminal, has started."""
        self.master, self.slave = pty.openpty()
        starter = (sys.executable, "-c", START_IN_BACKGROUND) if background else ()
        self.before = self.attributes()

        def in_child() -> None:
            os.setsid()
            if controlling:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if ignore:
                signal.signal(ignore, signal.SIG_IGN)

        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [*starter, *COMMAND, *map(str, arguments)],
            env=ENVIRONMENT,
            stdin=self.slave,
            stdout=self.slave,
            stderr=subprocess.PIPE,
            preexec_fn=in_child,
        )

    def attributes(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def read_until(self, end: bytes) -> bytes:
        """What appears on the terminal, up to `end`."""
        seen = b""
        deadline = time.monotonic() + PATIENCE
        while not seen.endswith(end):
            over = (
                self.process.poll() is not None and not select.select([self.master], [], [], 0)[0]
            )
            assert not over and time.monotonic() < deadline, f"only {seen!r} appeared"
            if select.select([self.master], [], [], 0.2)[0]:
                seen += os.read(self.master, 1)
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self) -> tuple[int, str]:
        """Wait for the end: its status and stderr."""
        assert self.process.stderr is not None
        status = self.process.wait(PATIENCE)
        return status, self.process.stderr.read().decode()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.mark.kvm
def test_keystrokes_reach_com1_one_by_one_and_the_terminal_is_restored(tmp_path: Path) -> None:
    with Terminal(flat(tmp_path, b"\x66\xba\xf8\x03\xb0>\xee" + ECHO_UNTIL_Q)) as terminal:
        terminal.read_until(b">")
        assert terminal.attributes() != terminal.before
        terminal.type(b"a")  # no newline: it comes at once, and only the guest echoes it
        assert terminal.read_until(b"a") == b"a"
        terminal.type(b"\x04\x7f\x1b[A")  # ^D, backspace and arrows are the guest's
        assert terminal.read_until(b"[A") == b"\x04\x7f\x1b[A"
        terminal.type(b"q")
        assert terminal.ended() == (0, "")
        assert terminal.attributes() == terminal.before


@pytest.mark.kvm
def test_keys_for_another_job_of_the_terminal_do_not_stop_the_vm(tmp_path: Path) -> None:
    """`pyvmm ... --gdb 1234 &`, and then gdb: to read its keys would stop the whole process."""
    guest = flat(tmp_path, PRINT_AND_SPIN)
    with Terminal(guest, "--timeout", "1.5", background=True) as terminal:
        terminal.read_until(b"x")
        terminal.type(b"for somebody else\n")
        assert terminal.ended()[0] == 124


@pytest.mark.kvm
def test_control_c_in_a_terminal_ends_the_guest(tmp_path: Path) -> None:
    with Terminal(flat(tmp_path, PRINT_AND_SPIN)) as terminal:
        terminal.read_until(b"x")
        terminal.type(b"\x03")
        assert terminal.ended() == (130, "")
        assert terminal.attributes() == terminal.before


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("code", "options", "status"),
    [
        (PRINT_AND_SPIN[:-2] + b"\x0f\x0b", [], 6),
        (PRINT_AND_SPIN, ["--timeout", "1.5"], 124),
        (PRINT_AND_SPIN[:-2] + b"\xe6\xf4", [], (ord("x") << 1 | 1) & 0xFF),
    ],
    ids=["crash", "timeout", "debug-exit"],
)
def test_the_terminal_is_restored_whatever_the_end(
    tmp_path: Path, code: bytes, options: list[str], status: int
) -> None:
    with Terminal(flat(tmp_path, code), *options) as terminal:
        terminal.read_until(b"x")
        assert terminal.ended()[0] == status
        assert terminal.attributes() == terminal.before


@pytest.mark.kvm
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT], ids=lambda n: n.name
)
def test_the_terminal_is_restored_when_a_signal_ends_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Terminal(flat(tmp_path, PRINT_AND_SPIN)) as terminal:
        terminal.read_until(b"x")
        terminal.process.send_signal(number)
        assert terminal.ended()[0] in (128 + number, -number)
        assert terminal.attributes() == terminal.before


@pytest.mark.kvm
def test_a_terminal_that_is_not_ours_to_control_is_input_all_the_same() -> None:
    # As under setsid(1), or with a terminal that another program made for us.
    with Terminal(GUESTS / "hello.bin", controlling=False) as terminal:
        terminal.read_until(b"Hello from long mode!")
        assert terminal.ended() == (0, "")
        assert terminal.attributes() == terminal.before


@pytest.mark.kvm
def test_a_terminal_that_goes_away_leaves_no_traceback(tmp_path: Path) -> None:
    with Terminal(
        flat(tmp_path, PRINT_AND_SPIN), "--timeout", "2", ignore=signal.SIGHUP
    ) as terminal:
        terminal.read_until(b"x")
        os.close(terminal.slave)
        os.close(terminal.master)
        status, error = terminal.ended()
        assert "Traceback" not in error, error
        assert status in (4, 124)


@pytest.mark.kvm
def test_control_a_x_leaves_with_status_0(tmp_path: Path) -> None:
    with Terminal(flat(tmp_path, PRINT_AND_SPIN)) as terminal:
        terminal.read_until(b"x")
        terminal.type(b"\x01")
        terminal.type(b"x")  # in a read of its own
        assert terminal.ended() == (0, "")
        assert terminal.attributes() == terminal.before


@pytest.mark.kvm
def test_a_guest_that_takes_no_key_can_be_left_all_the_same(tmp_path: Path) -> None:
    with Terminal(flat(tmp_path, PRINT_AND_SPIN)) as terminal:
        terminal.read_until(b"x")
        terminal.type(b"much more than a serial port has room for" * 10)
        terminal.type(b"\x01x")
        assert terminal.ended() == (0, "")


@pytest.mark.kvm
def test_control_a_twice_sends_one_and_h_helps(tmp_path: Path) -> None:
    with Terminal(flat(tmp_path, b"\x66\xba\xf8\x03\xb0>\xee" + ECHO_UNTIL_Q)) as terminal:
        terminal.read_until(b">")
        terminal.type(b"a\x01\x01b\x01zc")  # Ctrl-A z is nothing
        assert terminal.read_until(b"c") == b"a\x01bc"
        terminal.type(b"\x01h")
        assert b"Ctrl-A Ctrl-A" in terminal.read_until(b"this help\r")
        terminal.type(b"q")
        assert terminal.ended() == (0, "")


@pytest.mark.kvm
def test_from_a_pipe_control_a_is_a_key_like_any_other(tmp_path: Path) -> None:
    with started(flat(tmp_path, ECHO_UNTIL_Q)) as process:
        out, _ = process.communicate(b"\x01xq", PATIENCE)
    assert (process.returncode, out) == (0, b"\x01xq")


@pytest.mark.kvm
def test_a_linux_guest_gets_control_c(tmp_path: Path) -> None:
    kernel = tmp_path / "bzImage"
    entry = bytes(ENTRY64_OFFSET) + b"\x66\xba\xf8\x03\xb0>\xee" + ECHO_UNTIL_Q
    kernel.write_bytes(bzimage(kernel=entry))
    with Terminal(kernel) as terminal:
        terminal.read_until(b">")
        keys = b"\x03\x1a\x1c\x13\x11\r\n!"
        terminal.type(keys)
        assert terminal.read_until(b"!") == keys, "and its output is not changed either"
        terminal.type(b"\x01x")
        assert terminal.ended() == (0, "")
        assert terminal.attributes() == terminal.before


# --- --trace -------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_a_trace_reads_like_strace_and_ends_in_a_table() -> None:
    result = pyvmm(GUESTS / "hello.bin", "--trace")
    assert (result.returncode, result.stdout) == (0, "Hello from long mode!\n")
    lines = result.stderr.splitlines()
    exits = [line for line in lines if line.startswith("vcpu0 ")]
    text = "Hello from long mode!\n"
    assert len(exits) == 2 * len(text) + 1
    assert re.fullmatch(r"vcpu0 0x1000\w\w in 0x3fd -> 0x60 '`'", exits[0])
    assert re.fullmatch(r"vcpu0 0x1000\w\w out 0x3f8 <- 0x48 'H'", exits[1])
    assert re.fullmatch(r"vcpu0 0x1000\w\w out 0x3f8 <- 0xa", exits[-2])
    assert re.match(r"vcpu0 0x1000\w\w hlt\b", exits[-1])
    table = lines[len(exits) :]
    assert re.search(r"exits.*kind", table[0])
    counts = {line.split()[-2:][-1]: line for line in table[1:]}
    assert re.match(rf"\s*{len(exits)}\s", counts["total"])
    assert any(re.match(rf"\s*{len(text)}\s.*\bin 0x3fd$", line) for line in table)
    assert any(re.match(rf"\s*{len(text)}\s.*\bout 0x3f8$", line) for line in table)


@pytest.mark.kvm
def test_a_trace_shows_memory_accesses_with_width_address_and_value() -> None:
    lines = pyvmm(GUESTS / "mmio.bin", "--trace").stderr
    for bits in (8, 16, 32, 64):
        ones = (1 << bits) - 1
        assert re.search(rf"^vcpu0 0x\w+ mmio read{bits} 0xf000\w+ -> {ones:#x}$", lines, re.M)
        assert re.search(rf"^vcpu0 0x\w+ mmio write{bits} 0xf000\w+ <- 0x\w+", lines, re.M)


@pytest.mark.kvm
def test_a_trace_names_the_exit_that_ended_the_guest() -> None:
    result = pyvmm(GUESTS / "triplefault.bin", "--trace")
    assert result.returncode == 6
    where = "100007" if host().crash_registers else "[0-9a-f]+"
    assert re.search(rf"^vcpu0 0x{where} shutdown", result.stderr, re.M)


@pytest.mark.kvm
def test_a_trace_tells_vcpus_apart() -> None:
    lines = pyvmm(
        GUESTS / "hello.bin", "-c", "2", "--irqchip", "off", "--trace"
    ).stderr.splitlines()
    for vcpu in ("vcpu0 ", "vcpu1 "):
        assert sum(line.startswith(vcpu) for line in lines) == 2 * 22 + 1


# --- sizes, modes, addresses ---------------------------------------------------------------------

OUT_OF_RAM = b"\x8a\x04\x25"  # mov al, [disp32]
EXIT_WITH_AL = b"\xe6\xf4"


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("size", "last_gpa"),
    [
        ("2M", 0x1FFFFF),
        ("2m", 0x1FFFFF),
        ("2048K", 0x1FFFFF),
        ("2MiB", 0x1FFFFF),
        ("2097152", 0x1FFFFF),
        ("0x200000", 0x1FFFFF),
        (None, 0x3FFFFFF),
        ("1G", 0x3FFFFFFF),
    ],
)
def test_memory_is_as_large_as_asked_for(tmp_path: Path, size: str | None, last_gpa: int) -> None:
    options = () if size is None else ("-m", size)
    for gpa, value in ((last_gpa, 0), (last_gpa + 1, 0xFF)):
        code = OUT_OF_RAM + gpa.to_bytes(4, "little") + EXIT_WITH_AL
        result = pyvmm(flat(tmp_path, code), *options)
        assert (result.stderr, result.returncode) == ("", (value << 1 | 1) & 0xFF), hex(gpa)


@pytest.mark.kvm
def test_memory_over_3_gib_goes_on_at_4_gib() -> None:
    assert pyvmm(GUESTS / "hello.bin", "-m", "6G").returncode == 0


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["real", "protected", "long"])
@pytest.mark.parametrize(("load", "entry"), [(None, None), (0x20000, None), (0x20000, 0x20004)])
def test_a_flat_binary_is_loaded_and_entered_where_asked_in_each_mode(
    tmp_path: Path, mode: str, load: int | None, entry: int | None
) -> None:
    # mov al, 3; out 0xf4, al; and the same with 5: two-byte instructions that are the same in all.
    code = b"\xb0\x03\xe6\xf4" + b"\xb0\x05\xe6\xf4"
    options: list[object] = ["--mode", mode]
    options += ["--load", hex(load)] if load is not None else []
    options += ["--entry", entry] if entry is not None else []
    result = pyvmm(flat(tmp_path, code), *options)
    assert (result.stderr, result.returncode) == ("", 7 if entry is None else 11)


@pytest.mark.kvm
@pytest.mark.parametrize(("mode", "answer"), [("real", 1), ("protected", 2), ("long", 3)])
def test_the_processor_is_in_the_mode_that_was_asked_for(
    tmp_path: Path, mode: str, answer: int
) -> None:
    code = bytes.fromhex(
        "b8 0000 b101"  # 16 bits: mov ax, 0; mov cl, 1.  Else: mov eax, 0x01b10000
        "84c9 750c"  # test cl, cl; jnz the end (CL is 0 at the start in all modes)
        "b103 31c0 40 90 84c0 7402 b102"  # mov cl, 3; 32 bits only: inc eax, so mov cl, 2
        "88c8 e6f4"  # the end: mov al, cl; out 0xf4, al
    )
    result = pyvmm(flat(tmp_path, code), "--mode", mode)
    assert (result.stderr, result.returncode) == ("", answer << 1 | 1)


@pytest.mark.kvm
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_each_vcpu_runs_the_guest(cpus: int) -> None:
    result = pyvmm(GUESTS / "hello.bin", "-c", cpus, "--irqchip", "off")
    assert result.returncode == 0
    assert sorted(result.stdout) == sorted("Hello from long mode!\n" * cpus)


@pytest.mark.kvm
def test_many_vcpus_get_a_stack_each_or_are_refused(tmp_path: Path) -> None:
    guest = flat(tmp_path, b"\x50\x58\xf4")  # push rax; pop rax; hlt
    for cpus in (64, 130):
        result = pyvmm(guest, "-c", cpus, "--irqchip", "off")
        assert result.returncode in (0, 2), result.stderr
        if result.returncode:
            one_line(result)


# --- --probe, --help, and what a plain run does not load -----------------------------------------


@pytest.mark.kvm
def test_the_probe_prints_a_table_in_plain_words() -> None:
    result = pyvmm("--probe")
    assert (result.returncode, result.stderr) == (0, "")
    rows = result.stdout.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [finding.name for finding in FINDINGS]
    for row in rows:
        assert re.search(r"  (yes|NO ) +\S", row)


@pytest.mark.kvm
def test_the_probe_as_json_says_the_same() -> None:
    result = pyvmm("--probe", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    findings = json.loads(result.stdout)["findings"]
    assert list(findings) == [finding.name for finding in FINDINGS]
    table = pyvmm("--probe").stdout.splitlines()[1:]
    assert {row.split()[0]: "  yes  " in row for row in table} == findings


@pytest.mark.kvm
def test_a_finding_can_be_required() -> None:
    findings = json.loads(pyvmm("--probe", "--json").stdout)["findings"]
    present = [name for name, found in findings.items() if found]
    assert "long-mode" in present
    assert pyvmm("--probe", "--require", ",".join(present)).returncode == 0
    for name in [name for name, found in findings.items() if not found][:1]:
        result = pyvmm("--probe", "--require", f"long-mode,{name}")
        assert result.returncode not in (0, 2)
        assert name in one_line(result)


@pytest.mark.kvm
def test_requiring_an_unknown_finding_is_a_usage_error_that_lists_them() -> None:
    result = pyvmm("--probe", "--require", "warp-drive")
    assert result.returncode == 2
    line = one_line(result)
    assert "warp-drive" in line and "long-mode" in line


def test_help_shows_examples_and_the_exit_statuses() -> None:
    result = pyvmm("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for word in ("--timeout", "--mode", "-c", "-m", "124", "130/143", "hello.bin", "--probe"):
        assert word in result.stdout


def test_the_version() -> None:
    result = pyvmm("--version")
    assert (result.returncode, result.stdout) == (0, f"pyvmm {VERSION}\n")


@pytest.mark.kvm
def test_a_guest_that_merely_runs_pays_for_no_probe_and_no_page_walk() -> None:
    script = (
        "import sys\n"
        "from pyvmm.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, GUESTS / "hello.bin"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (result.stdout, result.returncode) == ("Hello from long mode!\n", 0)
    loaded = set(result.stderr.split())
    unneeded = "hostprobe lab paging probereport report trace debug rsp stub registers session"
    assert loaded & {f"pyvmm.{name}" for name in unneeded.split()} == set()
    assert loaded & {"socket", "json", "selectors", "subprocess", "tempfile"} == set()

"""pyvmm.testing: the fixture for tests of kernels, and what a failing test shows."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from pyvmm import ImageError, StopReason, read_image
from pyvmm.testing import Guest
from tests.conftest import GUESTS, REPOSITORY
from tests.support import PATIENCE

pytest_plugins = ["pytester", "pyvmm.testing"]
pytestmark = pytest.mark.kvm

MULTIBOOT, HELLO = GUESTS / "multiboot.elf", GUESTS / "hello.bin"
COUNTER, TRIPLE_FAULT = GUESTS / "counter.bin", GUESTS / "triplefault.bin"

Boot = Callable[..., Guest]

# Guests of a few bytes, 64-bit code.  mov dx, COM1; then for each byte: mov al, byte; out dx, al
SPIN, HALT = b"\xeb\xfe", b"\xf4"


def printing(text: bytes, then: bytes = SPIN) -> bytes:
    """Code that prints `text`, and goes on with `then`."""
    return b"\x66\xba\xf8\x03" + b"".join(b"\xb0%c\xee" % byte for byte in text) + then


@pytest.fixture
def code(boot: Boot, tmp_path: Path) -> Callable[[bytes], Guest]:
    """A function that boots code."""

    def boot_code(code: bytes) -> Guest:
        path = tmp_path / "guest.bin"
        path.write_bytes(code)
        return boot(path)

    return boot_code


# --- wait_for ----------------------------------------------------------------------------------


def test_a_text_is_waited_for_and_all_before_it_returned(boot: Boot) -> None:
    guest = boot(HELLO)
    assert guest.wait_for("from", PATIENCE) == "Hello from"
    assert guest.wait_for("mode", PATIENCE) == " long mode"
    assert guest.wait(PATIENCE).reason is StopReason.HALTED
    assert guest.output == "Hello from long mode!\n"


def test_what_was_found_is_not_found_again(code: Callable[[bytes], Guest]) -> None:
    guest = code(printing(b"> a> b", HALT))
    assert [guest.wait_for("> ", PATIENCE) for _ in range(2)] == ["> ", "a> "]
    with pytest.raises(AssertionError, match="did not print '> ' before it ended: all vCPUs"):
        guest.wait_for("> ", PATIENCE)


def test_a_regular_expression_sees_complete_lines_without_their_ends(
    code: Callable[[bytes], Guest],
) -> None:
    guest = code(printing(b"> ticks: 4711\r\nof 9\n"))
    guest.wait_for("> ", PATIENCE)
    assert guest.wait_for(re.compile(r"^ticks: (\d+)$"), PATIENCE)[1] == "4711"
    assert guest.wait_for(re.compile(r"\d+"), PATIENCE).string == "of 9"


def test_the_last_line_is_complete_when_the_guest_ends(code: Callable[[bytes], Guest]) -> None:
    guest = code(printing(b"status 42", HALT))
    assert guest.wait_for(re.compile(r"status (\d+)"), PATIENCE)[1] == "42"


def test_a_line_that_may_get_longer_is_not_searched(code: Callable[[bytes], Guest]) -> None:
    guest = code(printing(b"status 4"))
    with pytest.raises(AssertionError, match=r"'status \(\\\\d\+\)' within 0\.3 s"):
        guest.wait_for(re.compile(r"status (\d+)"), timeout=0.3)
    assert guest.wait_for("status", PATIENCE) == "status"  # a text is found in it


def test_a_text_that_never_comes_is_a_failure_and_the_guest_can_go_on(boot: Boot) -> None:
    guest = boot(MULTIBOOT)
    with pytest.raises(
        AssertionError, match=r"multiboot\.elf did not print 'login:' within 0\.5 s"
    ):
        guest.wait_for("login:", timeout=0.5)
    guest.wait_for("> ", PATIENCE)


def test_a_guest_that_ends_too_early_is_a_failure_at_once(boot: Boot) -> None:
    with pytest.raises(AssertionError, match="before it ended: vCPU 0: "):
        boot(TRIPLE_FAULT).wait_for("login:", timeout=1e6)


# --- wait, type --------------------------------------------------------------------------------


def test_a_guest_that_does_not_end_is_a_failure(boot: Boot) -> None:
    with pytest.raises(AssertionError, match=r"counter\.bin did not end within 0\.05 s"):
        boot(COUNTER).wait(timeout=0.05)


def test_what_is_typed_reaches_the_guest_and_it_stands_still_between_waits(boot: Boot) -> None:
    guest = boot(MULTIBOOT, cpus=2, append="some words")
    assert "command line: " in guest.wait_for("some words\n", PATIENCE)
    guest.wait_for("> ", PATIENCE)
    before = guest.machine.registers()
    guest.type("exit 21\n")
    assert guest.machine.registers() == before
    stop = guest.wait(PATIENCE)
    assert (stop.reason, stop.status) == (StopReason.DEBUG_EXIT, 43)
    assert guest.wait(PATIENCE) == stop


def test_more_is_typed_than_the_uart_holds(boot: Boot) -> None:
    guest = boot(MULTIBOOT)
    guest.wait_for("> ", PATIENCE)
    for n in range(3):
        guest.type(f"{n}" * 70 + "\n")
    guest.type("off\n")
    assert guest.wait(PATIENCE).reason is StopReason.POWERED_OFF
    assert guest.output.count("no such command") == 3


def test_a_guest_that_reads_nothing_cannot_be_sent_everything(boot: Boot) -> None:
    guest = boot(COUNTER)
    with pytest.raises(BufferError, match="does not read what is typed"):
        guest.type("x" * 1_000_000)
    with pytest.raises(BufferError):
        guest.type("y")


def test_two_guests_in_one_test(boot: Boot) -> None:
    first, second = boot(MULTIBOOT), boot(HELLO)
    first.wait_for("> ", PATIENCE)
    assert second.wait(PATIENCE).status == 0
    first.type("off\n")
    assert first.wait(PATIENCE).reason is StopReason.POWERED_OFF


def test_a_guest_without_the_fixture() -> None:
    with Guest(HELLO) as guest:
        assert guest.wait(PATIENCE).status == 0
    guest.close()
    assert guest.describe().splitlines() == [
        "it printed:",
        "Hello from long mode!",
        "it ended: all vCPUs are halted with interrupts off",
    ]


def test_an_image_that_was_read_can_be_booted(boot: Boot, tmp_path: Path) -> None:
    module = tmp_path / "initrd"
    module.write_bytes(b"files")
    guest = boot(read_image(MULTIBOOT, modules=[f"{module} now"]), append="test", memory=8 << 20)
    assert guest.wait(PATIENCE).reason is StopReason.POWERED_OFF
    assert re.search(r"command line: .* test\n.* 7168 KiB from 1 MiB\n", guest.output)
    assert f"{module} now\n" in guest.output


def test_what_cannot_be_booted_leaves_nothing_behind(boot: Boot, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        boot(tmp_path / "missing.elf")
    with pytest.raises(ValueError, match="at least one vCPU"):
        boot(HELLO, cpus=0)


# --- the time ----------------------------------------------------------------------------------


def test_timeouts_are_scaled(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_TIMEOUT_SCALE", "0.5")
    with pytest.raises(AssertionError, match=r"did not end within 0\.05 s"):
        boot(COUNTER).wait(timeout=0.1)


@pytest.mark.parametrize("scale", ["fast", "", "0", "-1", "inf", "nan"])
def test_a_scale_must_be_a_factor(boot: Boot, monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    monkeypatch.setenv("PYVMM_TIMEOUT_SCALE", scale)
    with pytest.raises(ValueError, match=r"PYVMM_TIMEOUT_SCALE=.* is no factor: write 5"):
        boot(HELLO).wait()


@contextlib.contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """As pytest-timeout does it: an exception in the main thread, wherever it is."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the time of the test is up")

    left = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_a_time_limit_of_the_test_leaves_a_guest_that_can_be_looked_at(boot: Boot) -> None:
    guest = boot(COUNTER)
    with pytest.raises(AssertionError):
        guest.wait(timeout=0.01)  # it runs
    with pytest.raises(TimeoutError), alarm_after(0.2):
        guest.wait(timeout=1e6)
    assert re.search(r"^it printed nothing\nit has not ended\nvCPU 0: at ", guest.describe())


# --- what a failing test shows -----------------------------------------------------------------


def test_the_description_has_the_last_lines_and_nothing_that_moves_the_cursor(
    code: Callable[[bytes], Guest],
) -> None:
    text = b"".join(b"line %d\r\n" % n for n in range(32)) + b"\x1b[2J\xff\n"
    guest = code(printing(text, HALT))
    assert guest.describe() == "it printed nothing\nit has not run"
    guest.wait(PATIENCE)
    lines = guest.describe().splitlines()
    assert lines[:2] == ["its last 30 lines of output:", "line 3"]
    assert lines[29:33] == [
        "line 31",
        "\\x1b[2J\ufffd",
        "it ended: all vCPUs are halted with interrupts off",
        f"vCPU 0: halted at {0x10_0000 + len(printing(text, b'')):#x}",
    ]


def test_the_description_says_where_each_vcpu_is(boot: Boot) -> None:
    guest = boot(MULTIBOOT, cpus=2)
    guest.wait_for("> ", PATIENCE)
    with pytest.raises(AssertionError):
        guest.wait(timeout=0.2)
    text = guest.describe()
    assert re.search(
        r"^it has not ended\nvCPU 0: (halted )?at [a-z]\w+(\+0x\w+)?\nvCPU 1: not started\n",
        text,
        re.M,
    )  # without "+0x", it was at the first byte of its timer's handler
    assert re.search(r"^rip 0x", text, re.M)


def test_symbols_can_be_elsewhere_or_broken(boot: Boot, tmp_path: Path) -> None:
    image = tmp_path / "kernel.bin"
    shutil.copyfile(HELLO, image)
    for symbols, expected in (
        (None, r"^vCPU 0: halted at 0x10\w+$"),
        (GUESTS / "hello.elf", r"^vCPU 0: halted at done"),
        (image, r"^no symbols: .*kernel\.bin: not an ELF file\nvCPU 0: halted at 0x10"),
        (tmp_path / "missing", r"^no symbols: .*No such file"),
    ):
        guest = boot(image, symbols=symbols)
        guest.wait(PATIENCE)
        assert re.search(expected, guest.describe(), re.M)


def run(pytester: pytest.Pytester, test: str, *arguments: str) -> pytest.RunResult:
    """Run a file with these tests, which have the fixture `boot` and the paths of guests."""
    pytester.makepyfile(
        f"""
        import pytest
        pytest_plugins = ["pyvmm.testing"]
        MULTIBOOT, HELLO = {str(MULTIBOOT)!r}, {str(HELLO)!r}
        TRIPLE_FAULT = {str(TRIPLE_FAULT)!r}
        """
        + test
    )
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


@pytest.mark.process
def test_a_wait_in_vain_is_reported_with_output_place_and_registers(
    pytester: pytest.Pytester,
) -> None:
    result = run(
        pytester,
        """
        def test_login(boot):
            guest = boot(MULTIBOOT, cpus=2)
            guest.wait_for("> ")
            guest.wait_for("login:", timeout=0.5)
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>*guest.wait_for("login:", timeout=0.5)',
            "E*AssertionError: *multiboot.elf did not print 'login:' within 0.5 s",
            "*-- guest *multiboot.elf --*",
            "it printed:",
            "multiboot: hello",
            "> ",
            "it has not ended",
            "vCPU 0: *at *",
            "vCPU 1: not started",
            "rip 0x*64-bit mode",
        ]
    )
    result.stdout.no_fnmatch_line("*testing.py*")  # the failure is in the test


@pytest.mark.process
@pytest.mark.parametrize(
    "test",
    [
        "def test(boot): assert boot(TRIPLE_FAULT).wait().status == 0",
        """
        @pytest.fixture
        def shell(boot):
            guest = boot(TRIPLE_FAULT)
            guest.wait_for("login:")
            yield guest

        def test(shell): pass
        """,
    ],
    ids=["in the test", "in a fixture"],
)
def test_a_crash_is_reported_wherever_it_makes_the_test_fail(
    pytester: pytest.Pytester, test: str
) -> None:
    result = run(pytester, test)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "*-- guest *triplefault.bin --*",
            "it printed nothing",
            "it ended: vCPU 0: *",
            "vCPU 0: *",
            "rip 0x*",
            "bytes at rip: *",
        ]
    )
    assert len(re.findall(r"^bytes at rip:", result.stdout.str(), re.M)) == 1


@pytest.mark.process
def test_only_failures_are_reported_and_only_about_their_own_guests(
    pytester: pytest.Pytester,
) -> None:
    result = run(
        pytester,
        """
        def test_good(boot):
            assert boot(HELLO).wait().status == 0

        def test_bad(boot):
            boot(TRIPLE_FAULT), boot(MULTIBOOT)
            assert False

        def test_without():
            assert False
        """,
        "-rA",
    )
    result.assert_outcomes(passed=1, failed=2)
    sections = re.findall(r"^-+ guest \S*/(\S+) -+$", result.stdout.str(), re.M)
    assert sections == ["triplefault.bin", "multiboot.elf"]
    assert result.stdout.str().count("it has not run") == 2


# --- the guide ---------------------------------------------------------------------------------


def blocks(mark: str) -> list[str]:
    """The code in the guide that has this mark in front."""
    guide = (REPOSITORY / "docs" / "testing-kernels.md").read_text(encoding="utf-8")
    return re.findall(rf"<!-- {mark} -->\n```\w+\n(.*?)```", guide, re.S)


@pytest.mark.process
def test_the_example_of_the_guide(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    [example] = blocks("example")
    path = pytester.makepyfile(example)
    monkeypatch.chdir(REPOSITORY)
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", f"--rootdir={path.parent}", path
    )
    result.assert_outcomes(passed=example.count("\ndef test_"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("kernel", "statuses"),
    [
        pytest.param(MULTIBOOT.read_bytes(), [0, 0, 1], id="powers off"),
        pytest.param(b"\xb0\x10\xe6\xf4", [0, 33, 0], id="writes 0x10 to debug-exit"),
    ],
)
def test_the_recipes_of_the_guide(tmp_path: Path, kernel: bytes, statuses: list[int]) -> None:
    (tmp_path / "kernel.elf").write_bytes(kernel)
    (tmp_path / "python3").symlink_to(sys.executable)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    found = [
        subprocess.run(
            ["sh", "-e", "-c", recipe],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE,
        ).returncode
        for recipe in blocks("recipe")
    ]
    assert found == statuses

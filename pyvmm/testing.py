"""Tests for kernels, with pytest: boot one, wait for what it prints and for its end.

    pytest_plugins = ["pyvmm.testing"]

    def test_boots(boot):
        guest = boot("kernel.elf", cpus=2, append="test")
        guest.wait_for("test: ok")
        assert guest.wait().status == 0

The guest runs only while the test waits for something.  In between its vCPUs are suspended, so
that registers and memory (`guest.machine`) can be looked at, and nothing happens behind the test's
back.  When the test fails, pytest's report shows what the guest has printed and where its vCPUs
were.  docs/testing-kernels.md is the guide.

Left out: guests that talk to each other, because only one runs at a time.  Nothing in pyvmm imports
this module: it needs pytest, which who uses it has.  (PYTEST_DONT_REWRITE: nothing that it asserts
is about a kernel; and a test may import Guest before pytest gets here.)
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import pytest

from pyvmm.boot import Image, read_image
from pyvmm.machine import Machine
from pyvmm.stop import Stop, StopReason
from pyvmm.symbols import Symbols, find_elf, where

if TYPE_CHECKING:
    import pluggy

DEFAULT_TIMEOUT = 10.0  # seconds
_LINES_SHOWN, _BYTES_SHOWN = 30, 10_000  # of the guest's output, in a failure's report

_GUESTS = pytest.StashKey[list["Guest"]]()  # of a test: those that its failure would be about


def timeout_scale() -> float:
    """By how much all timeouts are multiplied: PYVMM_TIMEOUT_SCALE, for slow (emulated) hosts.

    Raises ValueError if it is set to anything but a factor.
    """
    text = os.environ.get("PYVMM_TIMEOUT_SCALE", "1")
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < math.inf:
        raise ValueError(f"PYVMM_TIMEOUT_SCALE={text!r} is no factor: write 5 or 0.5")
    return scale


class Guest:
    """A kernel under test.  A context manager; the fixture `boot` makes and closes it.

    `machine` is its Machine.  Use it from one thread, the test's.
    """

    def __init__(
        self,
        image: Image | str | os.PathLike[str],
        *,
        append: str = "",
        symbols: str | os.PathLike[str] | None = None,
        **machine: Any,
    ) -> None:
        """Load a kernel (a path, or what read_image() returned); it does not run yet.

        `append` is its command line.  `symbols` is the ELF file with the names of its functions:
        by default the image, or the .elf beside it.  All else is for Machine: `cpus`, `memory`,
        `irqchip`, `reboot`.  Raises what read_image() and Machine raise.
        """
        kernel = image if isinstance(image, Image) else read_image(image)
        if append:
            kernel = kernel._replace(append=append)
        self.name = kernel.name
        self._image = os.path.realpath(kernel.name)
        self._symbols = None if symbols is None else os.path.realpath(symbols)
        self._lock = threading.Lock()
        self._output = bytearray()  # guarded by _lock
        self._search: _TextSearch | _LineSearch | None = None  # guarded by _lock
        self._seen = 0  # bytes of the output that wait_for() is past
        self._closed = False
        self._input, self._typed = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.machine = Machine(kernel, output=self._print, **machine)
        except BaseException:
            self._close_input()
            raise
        self.machine.connect_input(self._input)

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the guest and free everything; closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.machine.close()
        finally:
            self._close_input()

    def _close_input(self) -> None:
        os.close(self._input)
        os.close(self._typed)

    # --- what tests do ---------------------------------------------------------------------------

    @overload
    def wait_for(self, wanted: str, timeout: float = DEFAULT_TIMEOUT) -> str: ...
    @overload
    def wait_for(
        self, wanted: re.Pattern[str], timeout: float = DEFAULT_TIMEOUT
    ) -> re.Match[str]: ...

    def wait_for(
        self, wanted: str | re.Pattern[str], timeout: float = DEFAULT_TIMEOUT
    ) -> str | re.Match[str]:
        """Let the guest run until it prints `wanted`, behind what the last wait_for() found.

        A text is found anywhere; the result is all that was printed up to its end.  A regular
        expression (re.compile) is searched for in each line when it is complete, without its line
        end; the result is its Match.  `timeout` in seconds.
        Raises AssertionError when the guest does not print it in time, or ends before.
        """
        __tracebackhide__ = True
        search: _TextSearch | _LineSearch
        if isinstance(wanted, str):
            what, search = wanted, _TextSearch(wanted, self._seen)
        else:
            what, search = wanted.pattern, _LineSearch(wanted, self._seen)
        with self._lock:
            self._search = search
            search.look(self._output)  # it may be there already
        seconds = timeout * timeout_scale()
        stop = self._run(seconds, lambda: search.found is not None)
        with self._lock:
            self._search = None
            if isinstance(search, _LineSearch) and stop is not None and stop.final:
                search.look(self._output + b"\n")  # the last line will not get longer
        if search.found is not None:
            self._seen = search.position
            return search.found
        assert stop is not None
        when = f"before it ended: {stop.message}" if stop.final else f"within {seconds:g} s"
        raise AssertionError(f"{self.name} did not print {what!r} {when}")

    def type(self, text: str) -> None:
        """Send `text` to COM1; the guest receives it while the test waits for something.

        As with a real UART, what comes before the guest has set it up may be lost.
        Raises BufferError when there is much (64 KiB) that the guest has not read.
        """
        data = text.encode()
        try:
            taken = os.write(self._typed, data)
        except BlockingIOError:
            taken = 0
        if taken < len(data):
            raise BufferError(f"{self.name} does not read what is typed; the buffer is full")

    def wait(self, timeout: float = DEFAULT_TIMEOUT) -> Stop:
        """Let the guest run until it ends; `.status` is the exit status that pyvmm would have.

        `timeout` in seconds.  Raises AssertionError when the guest does not end in time.
        """
        __tracebackhide__ = True
        seconds = timeout * timeout_scale()
        stop = self._run(seconds, lambda: False)
        assert stop is not None
        if not stop.final:
            raise AssertionError(f"{self.name} did not end within {seconds:g} s")
        return stop

    @property
    def output(self) -> str:
        """All that the guest has printed so far."""
        with self._lock:
            return self._output.decode(errors="replace")

    def _run(self, seconds: float, done: Callable[[], bool]) -> Stop | None:
        """Let the guest run until `done()`, its end, or the time limit; None: it need not run."""
        deadline = time.monotonic() + seconds
        stop = None
        while not done() and (stop is None or stop.reason is StopReason.INTERRUPTED):
            try:
                stop = self.machine.run(max(0.0, deadline - time.monotonic()))
            except BaseException:  # ^C, or a time limit of pytest's: nobody has suspended it
                with contextlib.suppress(RuntimeError):
                    self.machine.run(timeout=0)
                raise
        return stop

    def _print(self, data: bytes) -> None:
        """Called with the guest's output, on any thread."""
        with self._lock:
            self._output += data
            if self._search is not None and self._search.look(self._output):
                self._search = None
                self.machine.interrupt()

    # --- after a failure -------------------------------------------------------------------------

    def describe(self) -> str:
        """What the guest printed last, whether it ended, and where its vCPUs are: for a person."""
        stop = self.machine.ended
        end = "it has not ended" if stop is None else f"it ended: {stop.message}"
        parts = [*self._last_lines(), end if self.machine.threads else "it has not run"]
        try:
            parts += self._vcpus()
        except Exception as error:  # the report is of what went wrong before
            parts.append(f"its vCPUs cannot be looked at: {error}")
        return "\n".join(parts)

    def _last_lines(self) -> list[str]:
        with self._lock:
            text = self._output[-_BYTES_SHOWN:].decode(errors="replace")
            more = len(self._output) > _BYTES_SHOWN
        lines = text.splitlines()
        if not lines:
            return ["it printed nothing"]
        more = more or len(lines) > _LINES_SHOWN
        title = f"its last {_LINES_SHOWN} lines of output:" if more else "it printed:"
        return [title, *map(_printable, lines[-_LINES_SHOWN:])]

    def _vcpus(self) -> list[str]:
        """Where they are, what is known of a crash, and their registers."""
        stop, machine, parts = self.machine.ended, self.machine, []
        if not self._closed:
            symbols = Symbols(())
            try:
                elf = self._symbols or find_elf(self._image)
                if elf is not None:
                    symbols = Symbols.from_elf(elf)
            except (OSError, ValueError) as error:
                parts.append(f"no symbols: {error}")
            for vcpu_id in sorted(machine.threads):
                place = where(machine.vm.cpu(vcpu_id), machine.vm.run_state(vcpu_id), symbols)
                parts.append(f"vCPU {vcpu_id}: {place}")
        if stop is not None and stop.report:
            parts.append(stop.report)
        alone_and_told = machine.cpus == 1 and stop is not None and stop.exit is not None
        if machine.threads and not self._closed and not alone_and_told:
            parts.append(machine.describe_vcpus())
        return parts


class _TextSearch:
    """Looks for a text in output that grows, at no byte twice."""

    def __init__(self, wanted: str, start: int) -> None:
        self.position = start  # behind what was found
        self.found: str | None = None
        self._wanted = wanted.encode()
        self._start = self._looked_at = start

    def look(self, output: bytearray) -> bool:
        """Whether it is there."""
        at = output.find(self._wanted, self._looked_at)
        if at < 0:
            self._looked_at = max(self._start, len(output) - len(self._wanted) + 1)
            return False
        self.position = at + len(self._wanted)
        self.found = output[self._start : self.position].decode(errors="replace")
        return True


class _LineSearch:
    """Looks for a regular expression in complete lines of output that grows, in each once."""

    def __init__(self, wanted: re.Pattern[str], start: int) -> None:
        self.position = start  # behind the last line that was looked at
        self.found: re.Match[str] | None = None
        self._wanted = wanted

    def look(self, output: bytearray) -> bool:
        """Whether it is there."""
        while self.found is None and (end := output.find(b"\n", self.position)) >= 0:
            line = output[self.position : end].decode(errors="replace").rstrip("\r")
            self.found = self._wanted.search(line)
            self.position = end + 1
        return self.found is not None


def _printable(line: str) -> str:
    """A line that does to a terminal nothing but appear on it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


# --- the plugin --------------------------------------------------------------------------------


@pytest.fixture
def boot(request: pytest.FixtureRequest) -> Iterator[Callable[..., Guest]]:
    """A function that boots a kernel: boot(image, ...) -> Guest, see there.  Ends all of them."""
    guests = request.node.stash[_GUESTS] = []
    with contextlib.ExitStack() as stack:

        def boot(image: Image | str | os.PathLike[str], **options: Any) -> Guest:
            guest = stack.enter_context(Guest(image, **options))
            guests.append(guest)
            return guest

        yield boot
        guests.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pluggy.Result[pytest.TestReport], None]:
    """Add to the report of a test that failed what there is to say of its guests."""
    report = (yield).get_result()
    for guest in item.stash.get(_GUESTS, []) if report.failed else []:
        report.sections.append((f"guest {guest.name}", guest.describe()))

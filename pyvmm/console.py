"""The terminal side: guest output to a file descriptor, keystrokes from one.

Output goes out at once and whole.  A reader that does not read (a full pipe) makes the guest wait,
but never the end of the VM: the wait ends when close() is called.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from types import TracebackType

from pyvmm.waiting import in_background

# A pipe that poll() calls writable takes at least this much without blocking (pipe(7)).
_CHUNK = select.PIPE_BUF


class Output:
    """Writes guest output to `fd`; called from any thread."""

    def __init__(self, fd: int) -> None:
        self._given = fd
        self._fd = _without_waiting(fd)
        self._closing, self._close = os.pipe2(os.O_CLOEXEC)
        self._lock = threading.Lock()  # one writer at a time
        self._poll = select.poll()  # guarded by _lock
        self._poll.register(self._fd, select.POLLOUT)
        self._poll.register(self._closing, select.POLLIN)

    def __call__(self, data: bytes) -> None:
        """Write all of `data`.  Raises OSError when nobody can ever read it (a closed pipe)."""
        view = memoryview(data)
        with self._lock:
            while view:
                if any(fd == self._closing for fd, _ in self._poll.poll()):
                    return
                with contextlib.suppress(BlockingIOError):  # ^S, since it was polled
                    view = view[os.write(self._fd, view[:_CHUNK]) :]

    def stop(self) -> None:
        """Let a writer that waits give up; from now on output is dropped."""
        os.write(self._close, b"x")

    def close(self) -> None:
        """Free what is ours; the descriptor that was given stays open."""
        if self._fd != self._given:
            os.close(self._fd)
        os.close(self._closing)
        os.close(self._close)


def _without_waiting(fd: int) -> int:
    """The same terminal, opened anew so that a write to it never waits; else `fd` as it is.

    Where output is stopped with ^S after poll() has called it writable, a write would wait for ^Q.
    (The flag O_NONBLOCK cannot be set on `fd` itself: others, as the shell, share it.)
    """
    try:
        return os.open(os.ttyname(fd), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no terminal, or one without a name here
        return fd


class KeptOutput:
    """Output to print later, of which only the end is kept: a live screen has the terminal now."""

    _BYTES = 1 << 16

    def __init__(self, output: Output) -> None:
        self._output = output
        self._kept = bytearray()

    def __call__(self, data: bytes) -> None:
        """Keep `data`."""
        self._kept += data
        del self._kept[: -self._BYTES]

    def print(self) -> None:
        """Print what is kept."""
        self._output(bytes(self._kept))
        self._kept.clear()


class EscapeKeys:
    """What is typed on a terminal, without what is meant for us: Ctrl-A and one more key.

    It is read also while the guest takes nothing, so that a guest that hangs can be left.
    """

    _ROOM = 4096  # bytes that wait for the guest
    _HELP = (
        b"\r\nCtrl-A x        end the VM and leave\r\n"
        b"Ctrl-A Ctrl-A   send Ctrl-A to the guest\r\n"
        b"Ctrl-A h        this help\r\n"
    )

    def __init__(self, leave: Callable[[], None], show: Callable[[bytes], None]) -> None:
        """`show` prints on the terminal."""
        self._leave, self._show = leave, show
        self._escaped = False  # the last key was Ctrl-A
        self._waiting = bytearray()

    def room(self) -> int:
        """How many bytes receive() can be given now."""
        return self._ROOM - len(self._waiting)

    def receive(self, data: bytes) -> None:
        """Sort out what was typed.  Another key than those in the help does nothing."""
        for key in data:
            if self._escaped:
                self._escaped = False
                if key in b"xX":
                    self._leave()
                elif key in b"hH?":
                    self._show(self._HELP)
                elif key == _CONTROL_A:
                    self._waiting.append(key)
            elif key == _CONTROL_A:
                self._escaped = True
            else:
                self._waiting.append(key)

    def take(self, room: int) -> bytes:
        """At most `room` bytes for the guest."""
        taken = bytes(self._waiting[:room])
        del self._waiting[:room]
        return taken


_CONTROL_A = 1


class RawTerminal:
    """While open, keystrokes come one by one and are not echoed; ^C still interrupts.

    With `raw` it does not: keys and output are as the guest's own terminal driver wants them.
    A context manager that always restores the terminal.  Does nothing where `fd` is no terminal,
    or where we are in the background: changing a terminal from there would stop the process.
    """

    def __init__(self, fd: int, *, raw: bool = False) -> None:
        self._fd, self._raw = fd, raw
        self._saved: list[object] | None = None

    def __enter__(self) -> RawTerminal:
        if self._fd >= 0 and os.isatty(self._fd) and not in_background(self._fd):
            import termios
            import tty

            self._saved = termios.tcgetattr(self._fd)
            change = tty.setraw if self._raw else tty.setcbreak
            change(self._fd, termios.TCSADRAIN)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None and not in_background(self._fd):  # else the shell has done it
            import termios

            with contextlib.suppress(termios.error):  # it may have gone
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]

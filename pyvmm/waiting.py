"""What a machine's run() waits for: that somebody wakes it, and input for the guest."""

from __future__ import annotations

import contextlib
import os
import select

from pyvmm.light import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyvmm.console import EscapeKeys
    from pyvmm.devices.ps2 import Ps2

_BACKGROUND_SECONDS = 0.5  # until it is looked again whether the terminal is ours
_KEYS = 64  # bytes to read from a terminal at a time: the sequence of a key is not torn apart


class Receiver(Protocol):
    """A device that input can go to."""

    def room(self) -> int:
        """How many bytes it can take now."""

    def receive(self, data: bytes) -> int:
        """Take some."""


def in_background(fd: int) -> bool:
    """Whether the terminal `fd` is another job's now.

    To change or paint it would disturb that one; to read from it would stop this process.
    """
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # not our controlling terminal: nobody else's jobs are there
        return False


class Typist:
    """Types what a terminal sends on a guest's keyboard."""

    def __init__(self, keyboard: Ps2) -> None:
        self._keyboard = keyboard

    def room(self) -> int:
        """See Receiver: a keyboard that is full forgets keys, as keyboards do."""
        return _KEYS

    def receive(self, data: bytes) -> int:
        """See Receiver."""
        self._keyboard.type_bytes(data)
        return len(data)


class Waiter:
    """The thread that called run() waits here; any other, and a signal handler, can wake it."""

    def __init__(self) -> None:
        self._wake, self.wakeup_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._receiver: Receiver | None = None
        self._input: int | None = None
        self._escape: EscapeKeys | None = None

    def connect(self, fd: int, receiver: Receiver, escape: EscapeKeys | None) -> None:
        """Give what can be read from `fd` to `receiver`, but for what `escape` keeps."""
        self._input, self._receiver, self._escape = fd, receiver, escape

    def wake(self) -> None:
        """End the wait that is, or else the next one."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake up anyway
            os.write(self.wakeup_fd, b"\0")

    def wait(self, seconds: float | None) -> None:
        """Wait at most so long, and give the guest what input there is for it."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        room = self._pass_on()
        if self._input is not None and room:
            if not in_background(self._input):
                poll.register(self._input, select.POLLIN)
            elif seconds is None or seconds > _BACKGROUND_SECONDS:
                seconds = _BACKGROUND_SECONDS
        ready = [fd for fd, _ in poll.poll(None if seconds is None else max(1, seconds * 1000))]
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._input is not None and self._input in ready:
            self._read(self._input, room)

    def _pass_on(self) -> int:
        """Give the guest what it has room for; returns how many bytes of input may be read now."""
        if self._receiver is None:
            return 0
        room = self._receiver.room()
        if self._escape is None:
            return room
        if keys := self._escape.take(room):
            self._receiver.receive(keys)
        return self._escape.room()

    def _read(self, fd: int, room: int) -> None:
        try:
            data = os.read(fd, room)
        except OSError:  # not open for reading, or the terminal is gone
            data = b""
        if not data:
            self._input = None
        elif self._escape is not None:
            self._escape.receive(data)
        elif self._receiver is not None:
            self._receiver.receive(data)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._wake < 0

    def close(self) -> None:
        """Free the pipe; the input stays open."""
        os.close(self._wake)
        os.close(self.wakeup_fd)
        self._wake = self.wakeup_fd = -1

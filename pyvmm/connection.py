"""One debugger's connection: bytes from its socket to the stub, and replies back.

Nothing here waits: what cannot be sent at once is kept, and the server reads no more until it is
gone, because the debugger has to take its replies first.
"""

from __future__ import annotations

import os
import select
import socket
import sys

from pyvmm.debugtarget import MachineTarget
from pyvmm.rsp import Event, Link
from pyvmm.stub import Stub, console_output
from pyvmm.target import SIGINT, StopReport

# Bytes to receive at a time.  For a buffer of 128 KiB or more malloc() would map and unmap pages at
# each packet, which takes longer than to answer a small one.
CHUNK = 1 << 14


class Connection:
    """One debugger: its socket, link and stub."""

    def __init__(self, sock: socket.socket | StdioSocket, target: MachineTarget) -> None:
        self.socket = sock
        sock.setblocking(False)
        self.link, self.stub = Link(), Stub(target)
        self._target = target
        self.unsent = b""  # what could not be sent at once
        self.blocked = False  # the server waits until that can be sent, and reads nothing
        self._interrupted = False  # by a ^C that has not stopped the guest yet
        self._may_go_on = False  # the debugger was told of a stop from which it may go on by itself

    @property
    def waits_for(self) -> int:
        """The descriptor that must be ready before anything can be done."""
        if self.blocked and isinstance(self.socket, StdioSocket):
            return self.socket.output
        return self.socket.fileno()

    def receive(self) -> bytes | None:
        """What has arrived; None when the debugger has gone."""
        try:
            return self.socket.recv(CHUNK) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None

    def handle(self, data: bytes) -> None:
        """Answer what is complete of what has arrived.

        A ^C that comes while the guest is stopped is kept until it runs again (GDB manual,
        "Interrupts"): a debugger that goes on from stops by itself, because a condition is false,
        could otherwise hardly be interrupted.  Not before the guest has run at all, where gdb can
        be told to send one, nor after another ^C has stopped it.
        """
        previous: bytes | Event | None = None
        for event in self.link.receive(data):
            if isinstance(event, bytes):
                if self.link.acks and event == previous:
                    continue  # sent again, because we were slow to start: one answer is enough
                reply = self.stub.handle(event)
                for text in self.stub.take_console():
                    self.send_reply(text)
                self.send_reply(reply)
                if event[:1] == b"Z" and reply is not None and reply[:1] == b"E":
                    # gdb before 15 does not show why.
                    print(f"gdb: {self._target.last_error}", file=sys.stderr)
                if self.link.acks:
                    self.link.acks = not self.stub.no_ack_mode
            elif event is Event.INTERRUPT:
                self._interrupted = self.stub.owes_reply or self._may_go_on
            else:
                self.send_reply(self.stub.reject(event.value))
            previous = event
            if self._interrupted and self.stub.owes_reply:
                self._interrupted = not self._target.interrupt()

    def send_reply(self, reply: bytes | None) -> None:
        """Queue a reply, if there is one, for flush()."""
        if reply is not None:
            self.link.send(reply)

    def send_stop(self, report: StopReport) -> None:
        """Queue the reply that tells of a stop, and before it what the user is to read."""
        for text in console_output(report.message):
            self.send_reply(text)
        self.send_reply(self.stub.stop_reply(report))
        self._may_go_on = report.signal != SIGINT

    def flush(self) -> bool:
        """Send without waiting; True when nothing is left (or nobody is there to take it)."""
        data = self.unsent + self.link.take_output()
        try:
            while data:
                data = data[self.socket.send(data) :]
        except BlockingIOError:
            pass
        except OSError:
            data = b""
        self.unsent = data
        return not data


class StdioSocket:
    """stdin and stdout where a socket is expected: `target remote | pyvmm --gdb stdio`.

    Their mode is not ours to change (a parent shares them), so what would block is asked before.
    """

    def __init__(self) -> None:
        self._in, self.output = os.dup(0), os.dup(1)
        self._poll = select.poll()
        self._poll.register(self.output, select.POLLOUT)

    def fileno(self) -> int:
        """What is read from."""
        return self._in

    def setblocking(self, blocking: bool) -> None:
        """It never blocks."""

    def recv(self, size: int) -> bytes:
        """See socket.recv."""
        return os.read(self._in, size)

    def send(self, data: bytes) -> int:
        """See socket.send."""
        if not self._poll.poll(0):
            raise BlockingIOError
        return os.write(self.output, data[: select.PIPE_BUF])  # so much has room (pipe(7))

    def close(self) -> None:
        """Give back the descriptors; the originals stay open."""
        os.close(self._in)
        os.close(self.output)

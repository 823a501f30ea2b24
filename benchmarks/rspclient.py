"""The debugger's side of the GDB protocol, as little of it as a measurement needs.

One socket, no delay of small packets, and the same code for each stub.  As gdb does, it asks for a
connection without acknowledgements, and sends them to a stub that knows none.  What it does not
understand (run lengths, escapes, notifications) no reply that is measured contains.

Source: Debugging with GDB, appendix "GDB Remote Serial Protocol".
"""

from __future__ import annotations

import socket
from types import TracebackType

_TIMEOUT = 60.0  # seconds for one reply
RCX, RIP = 2, 16  # register numbers, the same in all stubs' x86-64 descriptions


def framed(payload: bytes) -> bytes:
    """A packet as it is transmitted."""
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def escaped(data: bytes) -> bytes:
    """Binary data as it stands in a payload."""
    for special in b"}#$*":  # the one that escapes the others comes first
        data = data.replace(bytes((special,)), bytes((0x7D, special ^ 0x20)))
    return data


def escaped_to_fit(data: bytes, room: int) -> tuple[bytes, int]:
    """As much of `data`, escaped, as has room in so many bytes; and how much that is."""
    length = min(len(data), room)
    # To leave a byte out makes it shorter by one, or by two.
    length -= max(0, len(escaped(data[:length])) - room)
    return escaped(data[:length]), length


class RspClient:
    """A debugger that is attached to a stub.  A context manager: leaving it ends the connection."""

    def __init__(self, port: int) -> None:
        """Attach at `port` of 127.0.0.1.  The guest is stopped from then on."""
        self._socket = socket.create_connection(("127.0.0.1", port), _TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._acks = True
        # Kept: to have a large buffer made for each recv() costs more than a small reply.
        self._buffer = memoryview(bytearray(1 << 18))
        self._received = bytearray()
        self.features = self.ask(b"qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+")
        self._acks = self.ask(b"QStartNoAckMode") != b"OK"
        # A stub may leave registers out of `g` until its client has read what they are.
        self.ask(b"qXfer:features:read:target.xml:0,ffb")
        self.ask(b"?")

    def __enter__(self) -> RspClient:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    @property
    def packet_size(self) -> int:
        """The longest packet that the stub takes or sends, in bytes as transmitted."""
        sizes = [word[11:] for word in self.features.split(b";") if word[:11] == b"PacketSize="]
        return int(sizes[0], 16)

    def send(self, payload: bytes) -> None:
        """Send a packet; its reply, if it has one, is for receive()."""
        self._socket.sendall(framed(payload))

    def receive(self) -> bytes:
        """The payload of the next packet.  Raises EOFError when the stub is gone."""
        received = self._received
        end = -1
        searched = 0
        while end < 0 or len(received) < end + 3:
            count = self._socket.recv_into(self._buffer)
            if count == 0:
                raise EOFError("the stub has closed the connection")
            received += self._buffer[:count]
            end = received.find(b"#", searched)
            searched = len(received) if end < 0 else end
        payload = bytes(received[received.index(b"$") + 1 : end])
        del received[: end + 3]
        if self._acks:
            self._socket.sendall(b"+")
        return payload

    def ask(self, payload: bytes) -> bytes:
        """The reply to a packet."""
        self.send(payload)
        return self.receive()

    def ask_framed(self, packet: bytes) -> bytes:
        """The reply to a packet that framed() has made: nothing is left to do but send it."""
        self._socket.sendall(packet)
        return self.receive()

    def command(self, payload: bytes) -> None:
        """Send a packet whose reply must be OK.  Raises RuntimeError."""
        reply = self.ask(payload)
        if reply != b"OK":
            raise RuntimeError(f"{payload!r} was answered with {reply!r}")

    def run(self, payload: bytes) -> None:
        """Let the guest run until it stops by itself.  Raises RuntimeError if not with SIGTRAP."""
        reply = self.ask(payload)
        if not reply.startswith((b"T05", b"S05")):
            raise RuntimeError(f"{payload!r} ended with {reply!r}")

    def interrupt(self) -> None:
        """Stop the guest, as ^C does.  Raises RuntimeError if it stops for another reason."""
        self._socket.sendall(b"\x03")
        reply = self.receive()
        if not reply.startswith((b"T02", b"S02")):
            raise RuntimeError(f"^C was answered with {reply!r}")

    def register(self, number: int) -> int:
        """A 64-bit register, one of the first 17.  By `g`: QEMU answers `p` with old values."""
        digits = self.ask(b"g")[16 * number : 16 * number + 16]
        return int.from_bytes(bytes.fromhex(digits.decode()), "little")

    def set_register(self, number: int, value: int) -> None:
        """Write a 64-bit register.  `g` comes first, as gdb does it: else QEMU forgets it again."""
        self.ask(b"g")
        self.command(b"P%x=%b" % (number, value.to_bytes(8, "little").hex().encode()))

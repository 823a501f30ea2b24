"""The GDB Remote Serial Protocol as bytes <-> packets: no socket, no packet's meaning.

    $ payload # checksum        a packet; two hex digits, the sum of the payload's bytes mod 256
    +  -                        acknowledgement, request to send again (until QStartNoAckMode)
    0x03                        interrupt, only between packets

In a payload `}` escapes the next byte (XOR 0x20), and `*` repeats the byte before it. `Decoder`
turns received bytes into events. `Link` adds what both sides must remember: whether packets are
acknowledged, and the last frame, in case the peer asks for it again. The caller moves the bytes:

    link.receive(sock.recv(65536))
    while (event := link.next_event()) is not None:
        ...  # answer with link.send(reply)
    sock.sendall(link.take_output())

A payload can be 128 KiB, and the speed of reading guest memory is decided here. So nothing loops
over bytes in Python: every pass is one call that scans or copies in C.

Left out: notifications (`%`), which only non-stop mode needs.

Source: Debugging with GDB, appendix "GDB Remote Serial Protocol", sections "Overview" and
"Packet Acknowledgment".
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from enum import Enum
from typing import NamedTuple

# The longest payload in bytes as transmitted (escaped, run-length encoded), in both directions.
# 64 KiB of memory in hex. Each packet costs a round trip and a pass through the stub, so this size
# decides how fast memory is read.
PACKET_SIZE = 0x20000

_RUN = 98  # one byte and the most repeats that a count can express, ord("~") - 29
_LONG_RUN = 4 * _RUN  # to find shorter ones costs more time than a fast connection saves
_WORTH_COMPRESSING = 4096  # bytes; below, the round trip costs the time, not the bytes

_INTERESTING = re.compile(rb"[$+\-\x03]")  # what can begin between packets; the rest is noise
_ESCAPED = re.compile(rb"}(.?)", re.DOTALL)
_REPEATED = re.compile(rb"(.)((?:\*.)+)", re.DOTALL)
# Long runs of a byte. That the pattern begins with the run, spelled out, lets both searches skip.
_RUNS = [(run, re.compile(run + b"%b*" % run[:1])) for run in (b"0" * _LONG_RUN, bytes(_LONG_RUN))]
# The two digits at the end of a packet, in upper, lower and mixed case.
_DIGITS = b"0123456789abcdefABCDEF"
_CHECKSUM_OF = {bytes(two): int(bytes(two), 16) for two in itertools.product(_DIGITS, repeat=2)}


class Event(Enum):
    """What arrived, if it was not a packet."""

    ACK = "+"
    NACK = "-"
    INTERRUPT = "0x03"
    BAD_CHECKSUM = "bad checksum"
    TOO_LONG = "packet too long"
    MALFORMED = "malformed escape or run length"


class Packet(NamedTuple):
    """A packet with the right checksum; `payload` is decoded."""

    payload: bytes


class _MalformedError(Exception):
    """A payload whose checksum is right and whose encoding is not."""


class _TooLongError(Exception):
    """A payload that run-length decoding makes longer than PACKET_SIZE."""


def checksum(data: bytes) -> int:
    """The sum of all bytes modulo 256.

    sum() makes a Python integer of each byte. The low half of an Adler-32 is the sum of the bytes
    plus one, modulo 65521, and 256 bytes cannot reach that modulus: so the Adler-32 of each 256
    bytes gives the same number at five times the speed (the high halves vanish modulo 256).
    """
    if len(data) <= 256:
        return (zlib.adler32(data) - 1) & 0xFF
    whole = len(data) // 256
    parts = struct.unpack_from("256s" * whole, data)  # slices, made in one go
    rest = zlib.adler32(data[256 * whole :])
    return (sum(map(zlib.adler32, parts)) + rest - whole - 1) & 0xFF


def escape(data: bytes) -> bytes:
    """Escape the bytes that mean something to the framing: `}` first, it begins the others."""
    return (
        data.replace(b"}", b"}]")
        .replace(b"#", b"}\x03")
        .replace(b"$", b"}\x04")
        .replace(b"*", b"}\x0a")
    )


def compress(escaped: bytes) -> bytes:
    """Run-length encode long runs of `0` and NUL, what unused memory looks like in hex and binary.

    Neither byte is ever the second half of an escape, so it does not matter to the peer whether
    it expands before or after it unescapes: clients differ.
    """
    for long_run, runs in _RUNS:
        if long_run in escaped:
            escaped = runs.sub(_compress_run, escaped)
    return escaped


def _compress_run(match: re.Match[bytes]) -> bytes:
    """98 zeros become `0*~`; what is left of the run is sent as it is.

    So no other count is used, and none of those that the protocol forbids because they look like
    framing (`#`, `$`, `+`, `-`).
    """
    whole, rest = divmod(len(match[0]), _RUN)
    byte = match[0][:1]
    return (byte + b"*~") * whole + byte * rest


def encode(payload: bytes) -> bytes:
    """A payload as a frame, ready to be sent: escaped, and compressed where it pays."""
    data = escape(payload)
    if len(data) >= _WORTH_COMPRESSING:
        data = compress(data)
    return b"".join((b"$", data, b"#%02x" % checksum(data)))  # `%` would copy `data` twice


def escaped_length(payload: bytes) -> int:
    """Bytes that `payload` takes in a frame, not counting what run lengths save."""
    return len(payload) + sum(map(payload.count, b"}#$*"))


def _expand_run(match: re.Match[bytes]) -> bytes:
    """`0* ` is four zeros: the count byte is the number of repeats plus 29."""
    byte, counts = match[1], match[2][1::2]
    if not all(ord(" ") <= count <= ord("~") for count in counts):
        raise _MalformedError
    return byte * (1 + sum(counts) - 29 * len(counts))


def _unescape(data: bytes) -> bytes:
    """`}` and a byte become that byte XOR 0x20."""
    first, *pieces = data.split(b"}")
    if not all(pieces):  # an escaped `}` is a piece without bytes: rare, and done one by one
        return _ESCAPED.sub(_unescape_byte, data)
    return first + b"".join([_XORED[piece[0]] + piece[1:] for piece in pieces])


def _unescape_byte(match: re.Match[bytes]) -> bytes:
    if not match[1]:
        raise _MalformedError
    return _XORED[match[1][0]]


_XORED = [bytes((byte ^ 0x20,)) for byte in range(256)]


def _decode(data: bytes) -> bytes:
    """Undo run lengths, then escapes: the order in which gdb itself decodes."""
    if b"*" in data:
        if data.startswith(b"*"):
            raise _MalformedError
        data = _REPEATED.sub(_expand_run, data)
        if b"*" in data:  # the last byte: a repeat without a count
            raise _MalformedError
        if len(data) > PACKET_SIZE:
            raise _TooLongError
    if b"}" in data:
        data = _unescape(data)
    return data


class Decoder:
    """Received bytes in, events out; keeps what is not yet complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 1  # neither `#` nor a further `$` before this offset in the buffer
        self._skipping = False  # the packet is too long: its bytes are thrown away

    def receive(self, data: bytes) -> None:
        """Take bytes in, in pieces of any size."""
        self._buffer += data

    def next_event(self) -> Packet | Event | None:
        """The next event, or None until more bytes are received."""
        buffer = self._buffer
        while buffer:
            if self._skipping or buffer[0] == _DOLLAR:
                return self._next_packet()
            start = _INTERESTING.search(buffer)
            del buffer[: start.start() if start else len(buffer)]
            if buffer and buffer[0] != _DOLLAR:
                byte = buffer[0]
                del buffer[:1]
                return _EVENT_OF_BYTE[byte]
        return None

    def _next_packet(self) -> Packet | Event | None:
        """Decode the packet at the start of the buffer, if all of it is there.

        A `$` inside a packet begins a new one: `$` is always escaped, so the peer gave the first
        one up. No event tells of it: an answer would be taken for the answer to the second.
        """
        buffer = self._buffer
        end = buffer.find(b"#", self._searched)
        start = buffer.rfind(b"$", self._searched, None if end < 0 else end)
        if start >= 0:
            self._drop(start)
            return self._next_packet()
        if end < 0:
            if self._skipping or len(buffer) > 1 + PACKET_SIZE:
                self._skipping = True
                buffer.clear()
            self._searched = len(buffer)
            return None
        if len(buffer) < end + 3:
            self._searched = end
            return None
        frame = bytes(buffer[: end + 3])
        too_long = self._skipping or end > 1 + PACKET_SIZE
        self._drop(end + 3)
        if too_long:
            return Event.TOO_LONG
        payload = frame[1:end]
        if _CHECKSUM_OF.get(frame[end + 1 :]) != checksum(payload):
            return Event.BAD_CHECKSUM
        if b"*" not in payload and b"}" not in payload:  # nothing to decode
            return Packet(payload)
        try:
            return Packet(_decode(payload))
        except _MalformedError:
            return Event.MALFORMED
        except _TooLongError:
            return Event.TOO_LONG

    def _drop(self, count: int) -> None:
        """Forget the first `count` bytes; what follows is looked at afresh."""
        del self._buffer[:count]
        self._searched = 1
        self._skipping = False


_DOLLAR = ord("$")
_EVENT_OF_BYTE = {ord("+"): Event.ACK, ord("-"): Event.NACK, 0x03: Event.INTERRUPT}


class Link:
    """One side of a connection: a Decoder, acknowledgements and the last frame sent.

    acks: each good packet is acknowledged with `+`, a bad checksum answered with `-`,
          and `-` from the peer sends the last frame again
    no acks (set `acks` to False once QStartNoAckMode is answered): neither side sends them;
          a bad checksum is an event like any other, because nobody will send again
    """

    def __init__(self) -> None:
        self.acks = True
        self._decoder = Decoder()
        self.receive = self._decoder.receive  # takes received bytes in
        self._output: list[bytes] = []
        self._last_frame = b""
        self._resend = False

    def next_event(self) -> Packet | Event | None:
        """The next event that needs an answer, or None until more bytes are received.

        A Packet wants the reply of its handler (if it has one), INTERRUPT stops the guest, and
        BAD_CHECKSUM, TOO_LONG and MALFORMED want an error reply: none of them is met with silence.
        """
        while (event := self._decoder.next_event()) is not None:
            if event is Event.ACK:
                continue
            if event is Event.NACK:
                self._resend = self.acks
                continue
            if event is Event.INTERRUPT or not self.acks:
                return event
            if event is Event.BAD_CHECKSUM:
                self._output.append(b"-")
                continue
            self._output.append(b"+")  # also if it is malformed: to send it again would not help
            return event
        return None

    def send(self, payload: bytes) -> None:
        """Queue a packet."""
        self._last_frame = encode(payload)
        self._resend = False
        self._output.append(self._last_frame)

    def take_output(self) -> bytes:
        """The bytes to be sent to the peer now; empty if there are none.

        However many `-` came in, the last frame is sent again once: else a few bytes from the peer
        could queue gigabytes.
        """
        if self._resend:
            self._resend = False
            self._output.append(self._last_frame)
        data = b"".join(self._output)
        self._output.clear()
        return data

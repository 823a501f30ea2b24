"""The GDB Remote Serial Protocol as bytes <-> packets: no socket, no packet's meaning.

    $ payload # checksum        a packet; two hex digits, the sum of the payload's bytes mod 256
    +  -                        acknowledgement, request to send again (until QStartNoAckMode)
    0x03                        interrupt, only between packets

In a payload `}` escapes the next byte (XOR 0x20), and `*` repeats the byte before it. `Decoder`
turns received bytes into events: the payload of a packet, decoded, or an Event. `Link` adds what
both sides must remember: whether packets are acknowledged, and the last frame, in case the peer
asks for it again. The caller moves the bytes:

    for event in link.receive(sock.recv(65536)):
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
from collections.abc import Iterator
from enum import Enum

# The longest payload in bytes as transmitted (escaped, run-length encoded), in both directions.
# 64 KiB of memory in hex. Each packet costs a round trip and a pass through the stub, so this size
# decides how fast memory is read.
PACKET_SIZE = 0x20000

_RUN = 98  # one byte and the most repeats that a count can express, ord("~") - 29
_LONG_RUN = 4 * _RUN  # to find shorter ones costs more time than a fast connection saves
_WORTH_COMPRESSING = 4096  # bytes; below, the round trip costs the time, not the bytes

# What received bytes are made of; all between is noise. A `$` inside a packet begins a new one: it
# is always escaped, so the peer gave the first one up. No event tells of it: an answer would be
# taken for the answer to the second.
_TOKEN = re.compile(
    rb"\$([^#$]*)#(..)"  # a packet: payload and checksum
    rb"|\$([^#$]*)(#.?)?\Z"  # one that goes on in what has not arrived yet
    rb"|\$[^#$]*"  # one that was given up
    rb"|[+\-\x03]",
    re.DOTALL,
)
_ESCAPED = re.compile(rb"}(.?)", re.DOTALL)
_REPEATED = re.compile(rb"(.)((?:\*.)+)", re.DOTALL)
# Long runs of a byte. That the pattern begins with the run, spelled out, lets both searches skip.
_RUNS = [(run, re.compile(run + b"%b*" % run[:1])) for run in (b"0" * _LONG_RUN, bytes(_LONG_RUN))]
# What ends a packet, by its checksum; and the checksum by its two digits, in either case.
_DIGITS = b"0123456789abcdefABCDEF"
_END = [b"#%02x" % number for number in range(256)]
_CHECKSUM_OF = {bytes(two): int(bytes(two), 16) for two in itertools.product(_DIGITS, repeat=2)}


class Event(Enum):
    """What arrived, if it was not a packet."""

    ACK = "+"
    NACK = "-"
    INTERRUPT = "0x03"
    BAD_CHECKSUM = "bad checksum"
    TOO_LONG = "packet too long"
    MALFORMED = "malformed escape or run length"


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
    return b"".join((b"$", data, _END[checksum(data)]))  # `%` would copy `data` twice


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


def _payload(data: bytes, digits: bytes) -> bytes | Event:
    """The payload of a packet, decoded, or what is wrong with it."""
    if len(data) > PACKET_SIZE:
        return Event.TOO_LONG
    if _CHECKSUM_OF.get(digits) != checksum(data):
        return Event.BAD_CHECKSUM
    if b"*" not in data and b"}" not in data:  # nothing to decode
        return data
    try:
        return _decode(data)
    except _MalformedError:
        return Event.MALFORMED
    except _TooLongError:
        return Event.TOO_LONG


_EVENT_OF_BYTE = {b"+": Event.ACK, b"-": Event.NACK, b"\x03": Event.INTERRUPT}


class Decoder:
    """Received bytes in, events out; keeps what is not yet complete."""

    def __init__(self) -> None:
        self._kept = bytearray()  # the packet of which not all has arrived, from its `$` on
        self._skipping = False  # it is too long: its payload is thrown away

    def receive(self, data: bytes) -> list[bytes | Event]:
        """Take bytes in, in pieces of any size; return the events that they complete."""
        if self._kept:
            seen = len(self._kept)
            self._kept += data
            # Not to look at all of a long packet again with each piece of it.
            end = self._kept.find(b"#", max(0, seen - 2))
            if end < 0 and len(self._kept) <= 1 + PACKET_SIZE:
                return []
            data = bytes(self._kept)
            self._kept.clear()
        events: list[bytes | Event] = []
        position = 0
        while position < len(data) and (token := _TOKEN.search(data, position)):
            position = token.end()
            payload, digits, beginning, end_mark = token.groups()
            if beginning is not None:
                self._keep(beginning, end_mark or b"")
                continue
            if payload is not None:
                events.append(Event.TOO_LONG if self._skipping else _payload(payload, digits))
            elif token[0] in _EVENT_OF_BYTE:
                events.append(_EVENT_OF_BYTE[token[0]])
            self._skipping = False
        return events

    def _keep(self, beginning: bytes, end_mark: bytes) -> None:
        if len(beginning) > PACKET_SIZE:
            self._skipping = True
        if self._skipping:
            beginning = b""
        self._kept += b"$" + beginning + end_mark


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
        self._output: list[bytes] = []
        self._last_frame = b""
        self._resend = False

    def receive(self, data: bytes) -> Iterator[bytes | Event]:
        """Take received bytes in; yield the events that need an answer.

        A payload wants the reply of its handler (if it has one), INTERRUPT stops the guest, and
        BAD_CHECKSUM, TOO_LONG and MALFORMED want an error reply: none of them is met with silence.
        The caller may change `acks` between two events.
        """
        for event in self._decoder.receive(data):
            if isinstance(event, bytes):
                if self.acks:
                    self._output.append(b"+")
                yield event
            elif event is Event.NACK:
                self._resend = self.acks
            elif event is Event.BAD_CHECKSUM and self.acks:
                self._output.append(b"-")  # it will come again
            elif event is not Event.ACK:
                # Also if it is malformed: to send it again would not help.
                if self.acks and event is not Event.INTERRUPT:
                    self._output.append(b"+")
                yield event

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

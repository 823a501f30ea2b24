"""The codec of the GDB remote protocol: bytes <-> packets, at every split of the byte stream."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from pyvmm import rsp
from pyvmm.rsp import PACKET_SIZE, Decoder, Event, Link, checksum, encode

Events = list[bytes | Event]


def frame(data: bytes) -> bytes:
    """A frame around data that is already encoded."""
    return b"$%b#%02x" % (data, sum(data) % 256)


def decode(pieces: Iterable[bytes]) -> Events:
    decoder = Decoder()
    return [event for piece in pieces for event in decoder.receive(piece)]


STREAMS: dict[str, tuple[bytes, Sequence[bytes | Event]]] = {
    "nothing": (b"", []),
    "a packet": (b"$m0,4#fd", [b"m0,4"]),
    "an empty packet": (b"$#00", [b""]),
    "upper-case checksum digits": (frame(b"m0,4").upper().replace(b"M", b"m"), [b"m0,4"]),
    "an acknowledged conversation": (
        b"+$?#3f+$g#67-",
        [Event.ACK, b"?", Event.ACK, b"g", Event.NACK],
    ),
    "^C before, between and after packets": (
        b"\x03$?#3f\x03\x03$g#67\x03",
        [
            *(Event.INTERRUPT, b"?", Event.INTERRUPT, Event.INTERRUPT),
            *(b"g", Event.INTERRUPT),
        ],
    ),
    "0x03 inside a packet is data": (frame(b"X0,1:\x03"), [b"X0,1:\x03"]),
    "+ and - inside a packet are data": (frame(b"X0,2:+-"), [b"X0,2:+-"]),
    "noise between packets": (b"\r\n hello#00$?#3fx%", [b"?"]),
    "a wrong checksum": (b"$?#40$?#3f", [Event.BAD_CHECKSUM, b"?"]),
    "a checksum that is no number": (b"$?#+f$?#3f", [Event.BAD_CHECKSUM, b"?"]),
    "a packet given up for another": (b"$m0,$m1,$?#3f", [b"?"]),
    "escapes": (frame(b"X:}\x03}\x04}]}\x0a"), [b"X:#$}*"]),
    "any byte may be escaped": (frame(b"}A}\x20"), [b"a\x00"]),
    "an escaped escape": (frame(b"}}x"), [b"]x"]),
    "an escape of nothing": (frame(b"X:}"), [Event.MALFORMED]),
    "a run": (frame(b"0* 1"), [b"00001"]),
    "the longest run": (frame(b"0*~"), [b"0" * 98]),
    "a run of a run": (frame(b"0*~* 1"), [b"0" * 101 + b"1"]),
    "a run whose count is a star": (frame(b"0**1"), [b"0" * 14 + b"1"]),
    "a run of nothing": (frame(b"*~"), [Event.MALFORMED]),
    "a run without a count": (frame(b"a0*"), [Event.MALFORMED]),
    "a run with another's count missing": (frame(b"a* b*"), [Event.MALFORMED]),
    "a run with a count too small": (frame(b"0*\x1f"), [Event.MALFORMED]),
    "a run with a count too large": (frame(b"0*\x7f"), [Event.MALFORMED]),
    "a run that is escaped": (frame(b"}\x03* "), [b"#\x03\x03\x03"]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_events_are_the_same_at_every_split_of_the_stream(name: str) -> None:
    stream, expected = STREAMS[name]
    assert decode([stream]) == expected
    assert decode(stream[i : i + 1] for i in range(len(stream))) == expected
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1):
            pieces = [stream[:first], stream[first:second], stream[second:]]
            assert decode(pieces) == expected, pieces


def test_a_conversation_of_everything_is_the_same_in_random_pieces() -> None:
    chance = random.Random(1)
    for _ in range(200):
        chosen = chance.sample(sorted(STREAMS), len(STREAMS))
        stream = b"".join(STREAMS[name][0] for name in chosen)
        expected = [event for name in chosen for event in STREAMS[name][1]]
        assert decode(random_pieces(chance, stream, 20)) == expected


def random_pieces(chance: random.Random, data: bytes, longest: int) -> Iterable[bytes]:
    while data:
        length = chance.randint(1, longest)
        yield data[:length]
        data = data[length:]


def test_checksum_is_the_sum_of_all_bytes() -> None:
    chance = random.Random(2)
    lengths = [*range(600), 65521, 65536, 131072]
    for data in (*(b"\xff" * length for length in lengths), *map(chance.randbytes, lengths)):
        assert checksum(data) == sum(data) % 256


def random_payloads(chance: random.Random) -> Iterable[bytes]:
    """Bytes of every kind that the codec treats differently, and long runs of them."""
    for _ in range(300):
        yield b"".join(
            chance.choice(
                (b"0", b"\x00", b"#", b"$", b"}", b"*", b"~", b"\x03", chance.randbytes(1))
            )
            * chance.choice((1, 1, 1, 2, 3, 4, 97, 98, 99, 391, 392, 500))
            for _ in range(chance.randint(0, 60))
        )


def test_what_is_encoded_decodes_to_the_same() -> None:
    chance = random.Random(3)
    for payload in random_payloads(chance):
        assert decode([encode(payload)]) == [payload]
        assert decode(random_pieces(chance, encode(payload), 1000)) == [payload]


def test_every_byte_can_be_sent() -> None:
    everything = bytes(range(256)) * 2
    assert decode([encode(everything)]) == [everything]


def test_framing_bytes_never_appear_inside_a_frame() -> None:
    for payload in random_payloads(random.Random(4)):
        inside = rsp.escape(payload)
        assert not set(inside) & set(b"#$*")
        assert len(inside) == rsp.escaped_length(payload)


@pytest.mark.parametrize("byte", [b"0", b"\x00"])
def test_run_lengths_never_use_a_forbidden_count(byte: bytes) -> None:
    for length in (1, 98, 391, 392, 393, 489, 490, 491, 999):
        data = rsp.compress(b"a" + byte * length + b"b")
        stars = [at for at, char in enumerate(data) if char == ord("*")]
        assert all(data[at + 1] == ord("~") for at in stars)
        assert bool(stars) == (length >= 392)
        assert decode([frame(data)]) == [b"a" + byte * length + b"b"]


def test_unused_memory_is_sent_compressed_and_a_small_packet_is_not() -> None:
    assert len(encode(b"0" * PACKET_SIZE)) < 5000
    assert len(encode(b"b" + bytes(PACKET_SIZE // 2))) < 5000
    assert encode(b"0" * 1000) == frame(b"0" * 1000)


def test_a_packet_of_the_largest_size_is_taken() -> None:
    payload = b"M" * PACKET_SIZE
    assert decode([frame(payload)]) == [payload]
    assert decode([frame(payload)[:70000], frame(payload)[70000:]]) == [payload]


@pytest.mark.parametrize("excess", [1, PACKET_SIZE, 10 * PACKET_SIZE])
@pytest.mark.parametrize("piece", [1 << 30, 65536, 999])
def test_a_larger_packet_is_refused_and_not_kept(excess: int, piece: int) -> None:
    stream = frame(b"M" * (PACKET_SIZE + excess)) + b"$?#3f"
    decoder = Decoder()
    events: Events = []
    for at in range(0, len(stream), piece):
        events += decoder.receive(stream[at : at + piece])
        assert len(decoder._kept) <= len(b"$#0") + PACKET_SIZE
    assert events == [Event.TOO_LONG, b"?"]


def test_a_larger_packet_that_never_ends_is_given_up_for_the_next() -> None:
    assert decode([b"$" + b"M" * (2 * PACKET_SIZE), b"MMM", b"M$?#3f"]) == [b"?"]
    assert decode([b"$" + b"M" * (2 * PACKET_SIZE), b"MMM#", b"0", b"0"]) == [Event.TOO_LONG]


def test_a_run_length_bomb_is_refused() -> None:
    assert decode([frame(b"0" + b"*~" * (PACKET_SIZE // 4))]) == [Event.TOO_LONG]


# ---- Link ----


def talk(link: Link, data: bytes) -> tuple[Events, bytes]:
    """What comes out of a link for these bytes: events, and bytes for the peer."""
    return list(link.receive(data)), link.take_output()


def linked(*, acks: bool, sent: Sequence[bytes] = ()) -> Link:
    link = Link()
    link.acks = acks
    for payload in sent:
        link.send(payload)
    link.take_output()
    return link


def test_a_good_packet_is_acknowledged() -> None:
    assert talk(linked(acks=True), b"+$?#3f+") == ([b"?"], b"+")


def test_a_bad_checksum_asks_for_the_packet_again() -> None:
    assert talk(linked(acks=True), b"$?#00") == ([], b"-")


def test_a_packet_that_cannot_be_decoded_is_answered_and_not_asked_for_again() -> None:
    assert talk(linked(acks=True), frame(b"}")) == ([Event.MALFORMED], b"+")


def test_an_interrupt_is_not_acknowledged() -> None:
    assert talk(linked(acks=True), b"\x03") == ([Event.INTERRUPT], b"")


def test_the_last_frame_is_sent_again_on_request() -> None:
    assert talk(linked(acks=True, sent=[b"E01", b"OK"]), b"-") == ([], b"$OK#9a")


def test_a_flood_of_requests_sends_the_last_frame_once() -> None:
    assert talk(linked(acks=True, sent=[b"OK"]), b"-" * 1000) == ([], b"$OK#9a")


def test_a_request_before_anything_was_sent_sends_nothing() -> None:
    assert talk(linked(acks=True), b"-") == ([], b"")


def test_a_new_reply_makes_an_old_request_void() -> None:
    link = linked(acks=True, sent=[b"OK"])
    for event in link.receive(b"-$?#3f"):
        assert event == b"?"
        link.send(b"S05")
    assert link.take_output() == b"+$S05#b8"


def test_without_acks_nothing_is_acknowledged_or_sent_again() -> None:
    assert talk(linked(acks=False, sent=[b"OK"]), b"+-$?#3f") == ([b"?"], b"")


def test_without_acks_a_bad_checksum_must_be_answered() -> None:
    assert talk(linked(acks=False), b"$?#00") == ([Event.BAD_CHECKSUM], b"")


def test_acks_end_between_two_packets_that_came_together() -> None:
    link = linked(acks=True)
    events = link.receive(frame(b"QStartNoAckMode") + b"+" + frame(b"?"))
    assert next(events) == b"QStartNoAckMode"
    link.send(b"OK")
    link.acks = False
    assert list(events) == [b"?"]
    assert link.take_output() == b"+$OK#9a"

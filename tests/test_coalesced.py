"""The reader of the coalesced ring, on a ring in plain memory that is filled as the kernel does."""

from __future__ import annotations

import mmap
import random
import struct
import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from pyvmm import handles, kvm
from pyvmm.coalesced import CoalescedPorts

RING = kvm.KVM_COALESCED_MMIO_PAGE_OFFSET * mmap.PAGESIZE
CAPACITY = (mmap.PAGESIZE - 8) // 24  # KVM_COALESCED_MMIO_MAX in <linux/kvm.h>


class Ring:
    """The kernel's side: a map like a vCPU's, and a VM that notes what is to be collected."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 3 * mmap.PAGESIZE)
        self.zones: list[tuple[int, int, bool]] = []

    def coalesce(self, address: int, size: int, *, pio: bool) -> None:
        self.zones.append((address, size, pio))

    def reader(self, sinks: dict[int, Callable[[bytes], None]]) -> CoalescedPorts:
        return CoalescedPorts(cast(handles.VmHandle, self), self.map, sinks)

    @property
    def first(self) -> int:
        return int(struct.unpack_from("<I", self.map, RING)[0])

    @property
    def last(self) -> int:
        return int(struct.unpack_from("<I", self.map, RING + 4)[0])

    def start_at(self, index: int) -> None:
        struct.pack_into("<II", self.map, RING, index, index)

    def put(self, port: int, value: int) -> bool:
        """What coalesced_mmio_write() does; False when the ring is full and the guest exits."""
        last = self.last
        if (last + 1) % CAPACITY == self.first:
            return False
        entry = struct.pack("<QII8s", port, 1, 1, bytes((value,)).ljust(8, b"\xee"))
        self.map[RING + 8 + 24 * last : RING + 8 + 24 * (last + 1)] = entry
        struct.pack_into("<I", self.map, RING + 4, (last + 1) % CAPACITY)
        return True


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.map.close()  # raises when the reader left a view of it


def test_each_port_is_registered_as_one_byte_of_port_space(ring: Ring) -> None:
    reader = ring.reader({0x3F8: print, 0xE9: print})
    reader.start()
    reader.start()
    reader.close()
    assert ring.zones == [(0x3F8, 1, True), (0xE9, 1, True)]


def test_nothing_in_the_ring_calls_nobody(ring: Ring) -> None:
    got: list[bytes] = []
    reader = ring.reader({0x3F8: got.append})
    reader.drain()
    reader.close()
    assert got == []


def test_bytes_come_out_in_order_and_in_one_call(ring: Ring) -> None:
    got: list[bytes] = []
    reader = ring.reader({0x3F8: got.append})
    for byte in b"Hello":
        assert ring.put(0x3F8, byte)
    reader.drain()
    assert got == [b"Hello"]
    assert ring.first == ring.last == 5
    reader.drain()
    assert got == [b"Hello"]
    reader.close()


@pytest.mark.parametrize("start", [CAPACITY - 1, CAPACITY - 3, CAPACITY - 5, 0])
def test_the_end_of_the_ring_is_followed_by_its_start(ring: Ring, start: int) -> None:
    got: list[bytes] = []
    reader = ring.reader({0x3F8: got.append})
    ring.start_at(start)
    for byte in b"wrap!":
        assert ring.put(0x3F8, byte)
    reader.drain()
    assert b"".join(got) == b"wrap!"
    assert ring.first == ring.last == (start + 5) % CAPACITY
    reader.close()


def test_a_full_ring_is_emptied(ring: Ring) -> None:
    got: list[bytes] = []
    reader = ring.reader({0x3F8: got.append})
    ring.start_at(100)
    written = bytearray()
    while ring.put(0x3F8, len(written) & 0xFF):
        written.append(len(written) & 0xFF)
    assert len(written) == CAPACITY - 1
    reader.drain()
    assert b"".join(got) == written
    reader.close()


def test_the_order_among_ports_is_kept(ring: Ring) -> None:
    got: list[tuple[str, bytes]] = []
    reader = ring.reader(
        {
            0x3F8: lambda data: got.append(("COM1", data)),
            0xE9: lambda data: got.append(("debug console", data)),
        }
    )
    for port, byte in ((0x3F8, 1), (0x3F8, 2), (0xE9, 3), (0x3F8, 4), (0xE9, 5), (0xE9, 6)):
        ring.put(port, byte)
    reader.drain()
    reader.close()
    assert got == [
        ("COM1", b"\1\2"),
        ("debug console", b"\3"),
        ("COM1", b"\4"),
        ("debug console", b"\5\6"),
    ]


def test_any_sequence_of_writes_and_drains_loses_nothing(ring: Ring) -> None:
    chance = random.Random(2)
    got: list[tuple[int, int]] = []
    reader = ring.reader(
        {port: lambda data, port=port: got.extend((port, b) for b in data) for port in (1, 2, 3)}  # type: ignore[misc]
    )
    written: list[tuple[int, int]] = []
    for _ in range(3000):
        port, value = chance.randrange(1, 4), chance.randrange(256)
        if not ring.put(port, value):
            reader.drain()
            assert ring.put(port, value)
        written.append((port, value))
        if chance.random() < 0.02:
            reader.drain()
    reader.drain()
    reader.close()
    assert got == written


def test_a_sink_that_fails_does_not_make_the_same_bytes_come_again(ring: Ring) -> None:
    calls: list[bytes] = []

    def sink(data: bytes) -> None:
        calls.append(data)
        raise BrokenPipeError

    reader = ring.reader({0x3F8: sink})
    ring.put(0x3F8, ord("x"))
    with pytest.raises(BrokenPipeError):
        reader.drain()
    reader.drain()
    reader.close()
    assert calls == [b"x"]


def test_who_drains_an_empty_ring_waits_for_the_one_who_is_still_printing(ring: Ring) -> None:
    # Otherwise a vCPU whose exit prints directly, or ends the VM, overtakes the main thread,
    # which has taken older bytes out of the ring and not printed them yet.
    printing, go_on, drained = threading.Event(), threading.Event(), threading.Event()

    def slow(data: bytes) -> None:
        printing.set()
        go_on.wait(10)

    reader = ring.reader({0x3F8: slow})
    ring.put(0x3F8, ord("x"))
    first = threading.Thread(target=reader.drain)
    first.start()
    assert printing.wait(10)

    def second_drain() -> None:
        reader.drain()
        drained.set()

    second = threading.Thread(target=second_drain)
    second.start()
    try:
        assert not drained.wait(0.2), "drain() returned while older bytes were not printed"
    finally:
        go_on.set()
        first.join(10)
        second.join(10)
        reader.close()

"""Split virtqueues: what a driver offers, what it gets back, and what it must not do."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator

import pytest

from pyvmm.devices.virtqueue import Chain, QueueError, Virtqueue, fill, split, total
from pyvmm.memory import GuestMemory
from tests.virtio_driver import (
    DESCRIPTOR,
    FAR_GPA,
    FAR_RAM,
    INDIRECT,
    NEXT,
    RAM,
    WRITE,
    Areas,
    guest_memory,
)

GPA, SIZE = 0x10000, 8
HUGE = 0xFFFF_FFFF


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory() as memory:
        yield memory


class Interrupts:
    """Counts the notifications of a queue."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def interrupts() -> Interrupts:
    return Interrupts()


@pytest.fixture
def queue(memory: GuestMemory, interrupts: Interrupts) -> Iterator[Virtqueue]:
    queue = Virtqueue(memory, 256, interrupts)
    yield queue
    queue.disable()


@pytest.fixture
def areas(memory: GuestMemory, queue: Virtqueue) -> Areas:
    """The driver's side of `queue`, which is ready."""
    areas = Areas(memory, GPA, SIZE)
    areas.connect(queue)
    return areas


def read(chain: Chain) -> bytes:
    return b"".join(chain.readable)


# --- what is offered ---------------------------------------------------------------------------


def test_an_empty_queue_has_no_chain(queue: Virtqueue, areas: Areas) -> None:
    assert list(queue.chains()) == []


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_has_what_the_driver_put_into_it(
    queue: Virtqueue, areas: Areas, indirect: bool
) -> None:
    head = areas.offer([b"one ", b"and two"], [3, 4], indirect=indirect)
    (chain,) = queue.chains()
    assert (chain.head, read(chain)) == (head, b"one and two")
    assert [len(buffer) for buffer in chain.writable] == [3, 4]


def test_what_the_device_writes_is_in_the_guest_s_memory(queue: Virtqueue, areas: Areas) -> None:
    head = areas.offer([], [3, 4])
    (chain,) = queue.chains()
    assert fill(chain.writable, b"abcdefghi") == 7
    queue.push(chain, 7)
    assert areas.take() == [(head, 7)]
    assert areas.written(head) == b"abcdefg"


def test_buffers_may_be_in_any_slot_up_to_its_last_byte(
    queue: Virtqueue, areas: Areas, memory: GuestMemory
) -> None:
    memory.write(FAR_GPA + FAR_RAM - 4, b"last")
    areas.describe(0, FAR_GPA + FAR_RAM - 4, 4, NEXT, 1)
    areas.describe(1, RAM - 1, 1)
    areas.offer_head(0)
    (chain,) = queue.chains()
    assert read(chain) == b"last\0"


def test_the_queue_may_be_in_any_slot(queue: Virtqueue, memory: GuestMemory) -> None:
    areas = Areas(memory, FAR_GPA, SIZE)
    areas.connect(queue)
    areas.offer([b"far"])
    assert [read(chain) for chain in queue.chains()] == [b"far"]


def test_an_indirect_table_may_follow_descriptors(queue: Virtqueue, areas: Areas) -> None:
    table = areas.buffer(DESCRIPTOR.pack(areas.buffer(b"in the table"), 12, 0, 0))
    areas.describe(3, areas.buffer(b"before, "), 8, NEXT, 5)
    areas.describe(5, table, 16, INDIRECT | WRITE)  # where WRITE is to be ignored
    areas.offer_head(3)
    (chain,) = queue.chains()
    assert (read(chain), chain.writable) == (b"before, in the table", [])


def test_a_chain_may_be_as_long_as_the_queue(queue: Virtqueue, areas: Areas) -> None:
    for indirect in (False, True):
        areas.offer([b"x"] * SIZE, indirect=indirect)
        (chain,) = queue.chains()
        assert read(chain) == b"x" * SIZE
        queue.push(chain, 0)


def test_the_indices_go_round(queue: Virtqueue, areas: Areas) -> None:
    """They are free-running, and have 16 bits."""
    for number in range(0, 0x1_0000 + 40, 4):
        areas.forget_buffers()
        offered = [areas.offer([struct.pack("<I", number + n)]) for n in range(4)]
        for n, chain in enumerate(queue.chains()):
            assert read(chain) == struct.pack("<I", number + n)
            queue.push(chain, number + n)
        assert areas.take() == [(head, number + n) for n, head in enumerate(offered)]


def test_chains_that_are_offered_meanwhile_are_seen(queue: Virtqueue, areas: Areas) -> None:
    areas.offer([b"1"])
    seen = []
    for chain in queue.chains():
        seen.append(read(chain))
        if len(seen) < 20:
            areas.offer([b"%d" % (len(seen) + 1)])
        queue.push(chain, 0)
    assert seen == [b"%d" % n for n in range(1, 21)]


def test_a_queue_that_is_disabled_hands_out_no_more(queue: Virtqueue, areas: Areas) -> None:
    areas.offer([b"1"])
    areas.offer([b"2"])
    for chain in queue.chains():
        assert read(chain) == b"1"
        queue.ready = False


def test_a_queue_begins_anew_when_it_is_enabled_again(
    queue: Virtqueue, memory: GuestMemory
) -> None:
    for text in (b"first", b"second"):
        memory.write(GPA, bytes(0x4000))
        areas = Areas(memory, GPA, SIZE)
        areas.connect(queue)
        areas.offer([text])
        assert [read(chain) for chain in queue.chains()] == [text]
        queue.disable()


# --- notifications -----------------------------------------------------------------------------


def test_the_driver_need_not_notify_while_the_device_works(queue: Virtqueue, areas: Areas) -> None:
    areas.offer([b"1"])
    flags = [areas.number(areas.used, 2)]
    for chain in queue.chains():
        flags.append(areas.number(areas.used, 2))
        queue.push(chain, 0)
    flags.append(areas.number(areas.used, 2))
    assert flags == [0, 1, 0]


def test_one_notification_tells_of_all_that_was_returned(
    queue: Virtqueue, areas: Areas, interrupts: Interrupts
) -> None:
    for _ in range(3):
        areas.offer([b"1"])
    for chain in queue.chains():
        queue.push(chain, 0)
    queue.notify()
    assert interrupts.count == 1
    queue.notify()  # nothing new
    assert interrupts.count == 1


def test_a_driver_that_wants_no_notification_gets_none(
    queue: Virtqueue, areas: Areas, interrupts: Interrupts
) -> None:
    areas.put(areas.available, 2, 1)
    areas.offer([b"1"])
    for chain in queue.chains():
        queue.push(chain, 0)
    queue.notify()
    assert interrupts.count == 0


# --- what a driver must not do -----------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 512, 1 << 16, HUGE])
def test_a_queue_of_an_impossible_size_is_refused(
    queue: Virtqueue, areas: Areas, size: int
) -> None:
    queue.disable()
    queue.driver_size = size
    with pytest.raises(QueueError):
        queue.enable()


@pytest.mark.parametrize(
    "area, gpa",
    [
        ("descriptor_gpa", GPA + 8),
        ("driver_gpa", GPA + 1),
        ("device_gpa", GPA + 2),
        *(
            (area, gpa)
            for area in ("descriptor_gpa", "driver_gpa", "device_gpa")
            for gpa in (
                RAM,
                RAM - 16,
                0xD000_0000,
                FAR_GPA - 16,
                FAR_GPA + FAR_RAM - 16,
                2**64 - 16,
            )
        ),
    ],
)
def test_a_queue_that_is_not_in_memory_is_refused(
    queue: Virtqueue, areas: Areas, area: str, gpa: int
) -> None:
    queue.disable()
    setattr(queue, area, gpa)
    with pytest.raises(QueueError):
        queue.enable()
    assert not queue.ready


def test_memory_that_the_guest_cannot_write_is_no_place_for_buffers(
    queue: Virtqueue, memory: GuestMemory
) -> None:
    memory.add_slot(0x20_0000, 0x1000, readonly=True)
    areas = Areas(memory, GPA, SIZE)
    areas.connect(queue)
    areas.describe(0, 0x20_0000, 16, WRITE)
    areas.offer_head(0)
    with pytest.raises(QueueError):
        list(queue.chains())


Table = list[tuple[int, int, int, int]]  # GPA, bytes, flags, next

OK = (0x8000, 4, 0, 0)
AT_TABLE = 0x9000  # where an indirect table is

BROKEN: dict[str, tuple[Table, Table]] = {  # descriptors from 0 on, and the indirect table
    "a loop": ([(0x8000, 4, NEXT, 1), (0x8000, 4, NEXT, 0)], []),
    "a loop of one": ([(0x8000, 4, NEXT, 0)], []),
    "no such descriptor": ([(0x8000, 4, NEXT, SIZE)], []),
    "the last possible next": ([(0x8000, 4, NEXT, 0xFFFF)], []),
    "outside of memory": ([(0xD000_0000, 4, 0, 0)], []),
    "over the end of memory": ([(RAM - 2, 4, 0, 0)], []),
    "over the end of the address space": ([(2**64 - 1, 4, WRITE, 0)], []),
    "larger than memory": ([(0, HUGE, WRITE, 0)], []),
    "between two slots": ([(FAR_GPA - 2, 4, WRITE, 0)], []),
    "an empty buffer": ([(0x8000, 0, 0, 0)], []),
    "readable behind writable": ([(0x8000, 4, WRITE | NEXT, 1), OK], []),
    "indirect with next": ([(AT_TABLE, 16, INDIRECT | NEXT, 1), OK], [OK]),
    "indirect in indirect": ([(AT_TABLE, 16, INDIRECT, 0)], [(AT_TABLE, 16, INDIRECT, 0)]),
    "an empty indirect table": ([(AT_TABLE, 0, INDIRECT, 0)], [OK]),
    "an indirect table of odd size": ([(AT_TABLE, 24, INDIRECT, 0)], [OK]),
    "an indirect table outside of memory": ([(RAM, 16, INDIRECT, 0)], []),
    "a loop in an indirect table": (
        [(AT_TABLE, 32, INDIRECT, 0)],
        [(0x8000, 4, NEXT, 1), (0x8000, 4, NEXT, 0)],
    ),
    "no such descriptor in the indirect table": (
        [(AT_TABLE, 16, INDIRECT, 0)],
        [(0x8000, 4, NEXT, 1)],
    ),
    "more in an indirect table than the queue is long": (
        [(AT_TABLE, 16 * (SIZE + 1), INDIRECT, 0)],
        [(0x8000, 4, NEXT, n + 1) for n in range(SIZE)] + [OK],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_chain_that_cannot_be_is_an_error(
    queue: Virtqueue, areas: Areas, memory: GuestMemory, name: str
) -> None:
    descriptors, table = BROKEN[name]
    for index, descriptor in enumerate(descriptors):
        areas.describe(index, *descriptor)
    memory.write(AT_TABLE, b"".join(DESCRIPTOR.pack(*entry) for entry in table))
    areas.offer_head(0)
    with pytest.raises(QueueError):
        list(queue.chains())


@pytest.mark.parametrize("head", [SIZE, 0x7FFF, 0xFFFF])
def test_a_chain_that_begins_nowhere_is_an_error(queue: Virtqueue, areas: Areas, head: int) -> None:
    areas.offer_head(head)
    with pytest.raises(QueueError):
        list(queue.chains())


@pytest.mark.parametrize("index", [SIZE + 1, 0x8000, 0xFFFF])
def test_more_chains_than_the_queue_holds_are_an_error(
    queue: Virtqueue, areas: Areas, index: int
) -> None:
    areas.put(areas.available + 2, 2, index)
    with pytest.raises(QueueError):
        list(queue.chains())


def test_a_chain_of_more_bytes_than_the_driver_can_be_told_is_an_error(
    queue: Virtqueue, areas: Areas, memory: GuestMemory
) -> None:
    big = 3 << 29
    memory.add_slot(1 << 33, big)  # its pages are never touched
    areas.connect(queue)
    for index in range(3):
        areas.describe(index, 1 << 33, big, WRITE | (NEXT if index < 2 else 0), index + 1)
    areas.offer_head(0)
    with pytest.raises(QueueError):
        list(queue.chains())
    queue.disable()


def test_a_queue_that_the_driver_describes_anew_while_it_is_enabled_stays_within_bounds(
    queue: Virtqueue, areas: Areas
) -> None:
    """Other vCPUs can write the registers at any time."""
    done = threading.Event()

    def another_vcpu() -> None:
        random_numbers = random.Random(1)
        while not done.is_set():
            queue.driver_size = random_numbers.choice([1, 2, 8, 256, HUGE])
            queue.descriptor_gpa = random_numbers.choice([GPA, RAM - 32, 0])

    thread = threading.Thread(target=another_vcpu)
    thread.start()
    try:
        for _ in range(300):
            queue.disable()
            try:
                queue.enable()
                for _chain in queue.chains():
                    pass
            except QueueError:
                pass
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("seed", range(20))
def test_nonsense_in_the_queue_raises_nothing_but_queue_errors(
    queue: Virtqueue, areas: Areas, memory: GuestMemory, seed: int
) -> None:
    """Whatever is in there: each buffer lies in guest memory, and there is an end to it."""
    random_numbers = random.Random(seed)
    addresses = [0, 16, 0x8000, GPA, GPA + 4, RAM - 1, RAM, FAR_GPA, FAR_GPA - 1, 2**64 - 1]

    def descriptor() -> bytes:
        return DESCRIPTOR.pack(
            random_numbers.choice([*addresses, random_numbers.getrandbits(64)]),
            random_numbers.choice([0, 1, 16, 32, 128, 4096, RAM, HUGE]),
            random_numbers.choice([0, 0, NEXT, WRITE, WRITE, NEXT | WRITE, INDIRECT, 7, 0xFFFF]),
            random_numbers.choice([0, 1, 2, 7, 8, 0xFFFF]),
        )

    chains = 0
    for _ in range(200):
        memory.write(GPA, b"".join(descriptor() for _ in range(SIZE)))
        memory.write(0x8000, b"".join(descriptor() for _ in range(8)))
        if random_numbers.random() < 0.2:  # anything, in the rings, too
            memory.write(GPA, random_numbers.randbytes(0x200))
        else:
            areas.offer_head(random_numbers.randrange(SIZE + 1))
        try:
            for chain in queue.chains():
                chains += 1
                assert 0 < len(chain.readable) + len(chain.writable) <= SIZE
                assert total([*chain.readable, *chain.writable]) < 1 << 32
                fill(chain.writable, bytes(100))  # may well be the queue itself
                queue.push(chain, total(chain.writable))
            queue.notify()
        except QueueError:
            queue.disable()
            memory.write(GPA, bytes(0x200))
            areas = Areas(memory, GPA, SIZE)
            areas.connect(queue)
    assert chains


# --- buffers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffers, size, first, rest",
    [
        ([], 4, [], []),
        (["abcd"], 0, [], ["abcd"]),
        (["abcd"], 4, ["abcd"], []),
        (["abcd"], 9, ["abcd"], []),
        (["abcd", "ef"], 4, ["abcd"], ["ef"]),
        (["ab", "cdef", "g"], 3, ["ab", "c"], ["def", "g"]),
    ],
)
def test_buffers_can_be_split_anywhere(
    buffers: list[str], size: int, first: list[str], rest: list[str]
) -> None:
    views = [memoryview(buffer.encode()) for buffer in buffers]
    found = split(views, size)
    assert [[bytes(view).decode() for view in part] for part in found] == [first, rest]


@pytest.mark.parametrize("sizes", [[], [3], [1, 2], [2, 9], [1, 1]])
def test_buffers_take_what_they_have_room_for(sizes: list[int]) -> None:
    room = [bytearray(size) for size in sizes]
    assert fill([memoryview(buffer) for buffer in room], b"abc") == min(3, sum(sizes))
    assert b"".join(room) == b"abc"[: sum(sizes)].ljust(sum(sizes), b"\0")

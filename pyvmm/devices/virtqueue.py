"""A split virtqueue: how a driver in the guest and a device pass buffers to each other.

Three areas in guest memory, placed by the driver:

    descriptor table   buffers (GPA, bytes, flags, next); `next` makes chains of them
    available ring     the chains that the driver offers, each by its first descriptor
    used ring          the chains that the device has done with

Each ring has an index that counts modulo 65536 and that only its owner moves.  Nothing else is
passed: what a chain means is the device's affair.

The guest is not trusted.  All that it says is read once and checked, and whatever breaks a rule
raises QueueError.  Buffers are memoryviews of guest RAM, so no device can reach beyond it.

Left out: packed queues, and VIRTIO_F_EVENT_IDX: Linux's drivers of the devices that we have switch
interrupts off and on as a whole, and for that the rings' flags are enough.
Source: Virtual I/O Device (VIRTIO) Version 1.2, "Split Virtqueues".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence

from pyvmm.light import NamedTuple
from pyvmm.memory import GuestMemory

VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT = 1, 2, 4
VIRTQ_AVAIL_F_NO_INTERRUPT = 1  # set by the driver: do not interrupt me
VIRTQ_USED_F_NO_NOTIFY = 1  # set by the device: do not notify me

_DESCRIPTOR = struct.Struct("<QIHH")
_FLAGS, _INDEX, _RING = 0, 1, 2  # where they are in a ring, in units of 16 bits
_MAX_CHAIN_BYTES = (1 << 32) - 1  # what the used ring can tell

Buffers = Sequence[memoryview]


class QueueError(Exception):
    """The driver broke the rules of a queue: the device needs a reset."""


class Chain(NamedTuple):
    """What the device may read, and then where it may write; `head` names it to the driver."""

    head: int
    readable: Buffers
    writable: Buffers


class Virtqueue:
    """One queue of a device.

    Threads: `lock` is held by whoever works on the queue, which may take as long as a disk takes.
    """

    def __init__(self, memory: GuestMemory, max_size: int, interrupt: Callable[[], None]) -> None:
        """At most `max_size` descriptors; `interrupt` sends a used buffer notification."""
        self.max_size = max_size
        self._memory, self._interrupt = memory, interrupt
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Back to the beginning: what the driver said of the queue is forgotten."""
        self.driver_size = self.descriptor_gpa = self.driver_gpa = self.device_gpa = 0
        self.disable()

    def disable(self) -> None:
        """Let go of the driver's areas and of all memory."""
        self.ready = False  # becoming false, it also ends chains()
        # Views of RAM exist only while the queue is ready: one that lives pins the whole mapping.
        self._ram: list[tuple[int, int, memoryview]] = []  # GPA of the start, of the end, RAM
        self._descriptors = self._available = self._used = self._used_ring = memoryview(b"")

    def enable(self) -> None:
        """Begin to use the areas that the attributes driver_size and *_gpa tell of.

        Raises QueueError.
        """
        size = self.driver_size  # read once: another vCPU may write it now
        if not 0 < size <= self.max_size or size & size - 1:
            raise QueueError(f"a queue of {size} descriptors")
        self._ram = [
            (slot.gpa, slot.end, memoryview(slot.pages))
            for slot in self._memory.slots
            if not slot.readonly
        ]
        self._descriptors = self._area(self.descriptor_gpa, _DESCRIPTOR.size * size, 16)
        # As arrays of integers: each access is then one access to memory, as the driver expects.
        self._available = self._area(self.driver_gpa, 6 + 2 * size, 2).cast("H")
        used = self._area(self.device_gpa, 6 + 8 * size, 4)
        self._used, self._used_ring = used[:4].cast("H"), used[4:-2].cast("I")
        self._size = size
        self._taken = self._returned = 0  # our indices into the rings
        self._silent = True  # nothing was returned since the last notification
        self.ready = True

    def _area(self, gpa: int, size: int, alignment: int) -> memoryview:
        if gpa % alignment:
            raise QueueError(f"a part of the queue at {gpa:#x}")
        return self._buffer(gpa, size)

    def _buffer(self, gpa: int, length: int) -> memoryview:
        for start, end, ram in self._ram:
            if start <= gpa and gpa + length <= end and length:
                return ram[gpa - start : gpa - start + length]
        raise QueueError(f"a buffer of {length} bytes at GPA {gpa:#x}")

    # --- from the driver -----------------------------------------------------------------------

    def chains(self) -> Iterator[Chain]:
        """Each chain that the driver offers, until there is none.  Raises QueueError.

        Meanwhile the driver need not notify us of more.
        """
        while self.ready:
            self._used[_FLAGS] = VIRTQ_USED_F_NO_NOTIFY
            while self.ready and (chain := self.next_chain()):
                yield chain
            self._used[_FLAGS] = 0
            _barrier()  # the driver moves its index and then looks at the flag
            if self._available[_INDEX] == self._taken:
                return

    def next_chain(self) -> Chain | None:
        """The next chain that the driver offers, if there is one.  Raises QueueError."""
        waiting = self._available[_INDEX] - self._taken & 0xFFFF
        if not waiting:
            return None
        if waiting > self._size:
            raise QueueError(f"{waiting} chains in a queue of {self._size} descriptors")
        head = self._available[_RING + self._taken % self._size]
        self._taken = self._taken + 1 & 0xFFFF
        return self._follow(head)

    def _follow(self, head: int) -> Chain:
        """The chain that begins with descriptor `head`."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        table, index, bytes_left = self._descriptors, head, _MAX_CHAIN_BYTES
        for _ in range(self._size + 1):  # one for each buffer, and one for an indirect table
            try:
                gpa, length, flags, index = _DESCRIPTOR.unpack_from(table, index * 16)
            except struct.error:
                raise QueueError("a descriptor behind the end of the table") from None
            if flags & VIRTQ_DESC_F_INDIRECT:  # the chain goes on in a table of its own
                if table is not self._descriptors or flags & VIRTQ_DESC_F_NEXT or length % 16:
                    raise QueueError("an indirect descriptor that cannot be")
                table, index = self._buffer(gpa, length), 0
                continue
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append(self._buffer(gpa, length))
            elif writable:
                raise QueueError("a readable buffer behind a writable one")
            else:
                readable.append(self._buffer(gpa, length))
            bytes_left -= length
            if bytes_left < 0:
                break
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
        raise QueueError("a chain that is too long, or a loop")

    # --- to the driver -------------------------------------------------------------------------

    def push(self, chain: Chain, written: int) -> None:
        """Return a chain, to the beginning of which the device has written so many bytes."""
        entry = self._returned % self._size * 2
        self._used_ring[entry], self._used_ring[entry + 1] = chain.head, written
        self._returned = self._returned + 1 & 0xFFFF
        self._used[_INDEX] = self._returned  # x86 keeps writes in order: the entry is there
        self._silent = False

    def notify(self) -> None:
        """Tell the driver what was pushed, unless it does not want to be told."""
        if self._silent:
            return
        self._silent = True
        _barrier()  # the driver sets its flag and then looks at our index
        if not self._available[_FLAGS] & VIRTQ_AVAIL_F_NO_INTERRUPT:
            self._interrupt()


# Taking a lock is an atomic instruction, and on x86 no read overtakes a write over one of those.
_atomic = threading.Lock()


def _barrier() -> None:
    with _atomic:
        pass


# --- buffers -------------------------------------------------------------------------------------


def total(buffers: Buffers) -> int:
    """How many bytes they have."""
    return sum(map(len, buffers))


def split(buffers: Buffers, size: int) -> tuple[list[memoryview], list[memoryview]]:
    """The buffers of the first `size` bytes (or fewer, if there are no more), and of the rest."""
    first: list[memoryview] = []
    for number, buffer in enumerate(buffers):
        if size < len(buffer):
            rest = [buffer[size:], *buffers[number + 1 :]]
            return ([*first, buffer[:size]] if size else first), rest
        first.append(buffer)
        size -= len(buffer)
    return first, []


def fill(buffers: Buffers, data: bytes | bytearray) -> int:
    """Write the beginning of `data` into the buffers; returns how many bytes had room."""
    done = 0
    for buffer in buffers:
        piece = data[done : done + len(buffer)]
        buffer[: len(piece)] = piece
        done += len(piece)
    return done

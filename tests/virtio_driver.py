"""A driver for virtio devices as a guest has one: it lays out queues in guest memory.

Its numbers are typed from the specification and from Linux's headers, and not taken from what is
tested here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from pyvmm import handles
from pyvmm.devices.virtio import VirtioDevice, VirtioMmio
from pyvmm.devices.virtqueue import Virtqueue
from pyvmm.memory import GuestMemory

RAM = 1 << 20  # bytes, from GPA 0
FAR_GPA, FAR_RAM = 1 << 32, 1 << 16  # a second slot, above 4 GiB

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
NEXT, WRITE, INDIRECT = 1, 2, 4
VERSION_1 = 1 << 32

DESCRIPTOR = struct.Struct("<QIHH")


class AnyVm:
    """A VM that takes every memory slot."""

    def set_memory_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        pass


@contextmanager
def guest_memory() -> Iterator[GuestMemory]:
    """RAM in two slots; fails at the end if somebody still holds a view of it."""
    memory = GuestMemory(cast(handles.VmHandle, AnyVm()))
    memory.add_slot(0, RAM)
    memory.add_slot(FAR_GPA, FAR_RAM)
    try:
        yield memory
    finally:
        memory.close()


class Areas:
    """The driver's side of one queue: where it lies, and what is offered there."""

    def __init__(self, memory: GuestMemory, gpa: int, size: int) -> None:
        """Lay the queue out at `gpa`, a multiple of 4096, with its buffers behind it."""
        self.memory, self.size = memory, size
        self.descriptors = gpa
        self.available = gpa + 16 * size
        self.used = gpa + 16 * size + 6 + 2 * size + 2 & ~3
        self.buffers = self.next_buffer = gpa + 0x4000
        self.offered = self.returned = 0
        self.next_descriptor = 0
        self.writable: dict[int, list[tuple[int, int]]] = {}  # by head: (gpa, bytes)

    def number(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.memory.read(gpa, size), "little")

    def put(self, gpa: int, size: int, value: int) -> None:
        self.memory.write(gpa, value.to_bytes(size, "little"))

    def describe(self, index: int, gpa: int, length: int, flags: int = 0, after: int = 0) -> None:
        """Write a descriptor."""
        self.memory.write(self.descriptors + 16 * index, DESCRIPTOR.pack(gpa, length, flags, after))

    def buffer(self, data: bytes) -> int:
        """Put `data` somewhere; returns the GPA."""
        gpa = self.next_buffer
        self.memory.write(gpa, data)
        self.next_buffer += len(data) + 1  # odd addresses are allowed, too
        return gpa

    def forget_buffers(self) -> None:
        """Use the buffers' memory again."""
        self.next_buffer = self.buffers

    def offer(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """Offer a chain of buffers with this data, and of so many bytes; returns its head."""
        places = [(self.buffer(data), len(data), 0) for data in readable]
        places += [(self.buffer(bytes(size)), size, WRITE) for size in writable]
        first = 0 if indirect else self.next_descriptor
        table = [
            DESCRIPTOR.pack(
                gpa,
                size,
                flags | (NEXT if number + 1 < len(places) else 0),
                (first + number + 1) % self.size,
            )
            for number, (gpa, size, flags) in enumerate(places)
        ]
        if indirect:
            gpa = self.buffer(b"".join(table))
            table = [DESCRIPTOR.pack(gpa, 16 * len(places), INDIRECT, 0)]
        head = self.next_descriptor
        for number, entry in enumerate(table):
            self.memory.write(self.descriptors + 16 * ((head + number) % self.size), entry)
        self.next_descriptor = (head + len(table)) % self.size
        self.writable[head] = [(gpa, size) for gpa, size, flags in places if flags]
        self.offer_head(head)
        return head

    def offer_head(self, head: int) -> None:
        """Offer the chain that begins with descriptor `head`."""
        self.put(self.available + 4 + 2 * (self.offered % self.size), 2, head)
        self.offered = self.offered + 1 & 0xFFFF
        self.put(self.available + 2, 2, self.offered)

    def take(self) -> list[tuple[int, int]]:
        """What was returned since the last time: (head, bytes written)."""
        found = []
        while self.returned != self.number(self.used + 2, 2):
            entry = self.used + 4 + 8 * (self.returned % self.size)
            found.append((self.number(entry, 4), self.number(entry + 4, 4)))
            self.returned = self.returned + 1 & 0xFFFF
        return found

    def written(self, head: int) -> bytes:
        """What is in the writable buffers of a chain."""
        return b"".join(self.memory.read(gpa, size) for gpa, size in self.writable[head])

    def connect(self, queue: Virtqueue) -> None:
        """Tell the queue itself, where there are no registers."""
        queue.driver_size = self.size
        queue.descriptor_gpa, queue.driver_gpa = self.descriptors, self.available
        queue.device_gpa = self.used
        queue.enable()


class Driver:
    """A driver of one device."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory) -> None:
        self.memory = memory
        self.line = False  # the interrupt
        self.interrupts = 0  # how often it was raised
        self.mmio = VirtioMmio(device, memory, self._irq)
        self.queues: list[Areas] = []

    def _irq(self, level: bool) -> None:
        self.interrupts += level
        self.line = level

    def get(self, offset: int) -> int:
        return self.mmio.read(offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.mmio.write(offset, 4, value)

    def features(self) -> int:
        """What the device offers."""
        found = 0
        for word in range(2):
            self.set(0x014, word)
            found |= self.get(0x010) << 32 * word
        return found

    def choose(self, features: int) -> bool:
        """Choose features; whether the device agrees."""
        for word in range(2):
            self.set(0x024, word)
            self.set(0x020, features >> 32 * word & 0xFFFF_FFFF)
        self.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return self.get(0x070) & FEATURES_OK != 0

    def set_up_queue(self, number: int, areas: Areas) -> None:
        """Tell the device where a queue is."""
        self.set(0x030, number)
        self.set(0x038, areas.size)
        for offset, gpa in (
            (0x080, areas.descriptors),
            (0x090, areas.available),
            (0x0A0, areas.used),
        ):
            self.set(offset, gpa & 0xFFFF_FFFF)
            self.set(offset + 4, gpa >> 32)
        self.set(0x044, 1)

    def start(self, features: int | None = None, *, size: int = 8) -> Driver:
        """Do all that a driver does before it uses a device; by default with all features."""
        self.set(0x070, 0)
        self.set(0x070, ACKNOWLEDGE)
        self.set(0x070, ACKNOWLEDGE | DRIVER)
        assert self.choose(self.features() if features is None else features)
        self.queues = []
        while self.set(0x030, len(self.queues)) or self.get(0x034):
            areas = Areas(self.memory, 0x10000 + 0x20000 * len(self.queues), size)
            self.memory.write(areas.descriptors, bytes(0x4000))
            self.set_up_queue(len(self.queues), areas)
            self.queues.append(areas)
        self.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return self

    def notify(self, number: int = 0) -> None:
        """There is something in a queue."""
        self.set(0x050, number)

    def acknowledge(self) -> int:
        """What the interrupt was for; 0 where there was none."""
        reasons = self.get(0x060)
        self.set(0x064, reasons)
        return reasons

    @property
    def needs_reset(self) -> bool:
        """Whether the device says that its queues are broken."""
        return self.get(0x070) & NEEDS_RESET != 0

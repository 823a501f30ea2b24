"""The registers of a virtio device in memory (virtio-mmio, version 2), whatever the device is.

The driver reads what the device is and offers (features), writes which of that it will use, tells
where its queues are, and sets DRIVER_OK.  From then on a write to QueueNotify means "look at this
queue", and an interrupt means "look at all queues" or "the configuration has changed".

What a device does with its queues is a VirtioDevice, one file each.  Queues that break the rules
(see virtqueue.py) make the device stop and ask for a reset.

The interrupt line is high while a bit of InterruptStatus is set, as the specification has it, and
falls for a moment when the driver acknowledges only some bits.  So it does not matter whether the
guest's interrupt controller looks at the level or at rising edges: no event gets lost either way.
The ACPI tables say edges: they cost less (nobody has to tell the IOAPIC that the interrupt has been
handled), and kvm_pvm delivers each level twice.  An irqfd would save nothing: for a pin of the
IOAPIC the kernel hands it to a worker thread, and KVM_IRQ_LINE is done when it returns.

Left out: version 1 (legacy), shared memory regions, VIRTIO_F_RING_RESET.
Source: Virtual I/O Device (VIRTIO) Version 1.2, "Virtio Over MMIO" and "Basic Facilities of a
Virtio Device".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from pyvmm.devices.virtqueue import QueueError, Virtqueue
from pyvmm.memory import GuestMemory

# Offsets of the registers, of 32 bits each.
MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x080, 0x084
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x090, 0x094
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0x0A0, 0x0A4
SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH = 0x0B0, 0x0B4, 0x0B8, 0x0BC
CONFIG_GENERATION, CONFIG = 0x0FC, 0x100

MAGIC = int.from_bytes(b"virt", "little")
VENDOR = int.from_bytes(b"PYVM", "little")

# Bits of Status; the others are the driver's alone.
STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET = 0x04, 0x08, 0x40
# Bits of InterruptStatus.
USED_BUFFER, CONFIGURATION_CHANGE = 0x01, 0x02

VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1 = 1 << 28, 1 << 32

# The halves of the queue's addresses: the attribute of Virtqueue, and how far left its bits are.
_ADDRESSES = {
    QUEUE_DESC_LOW: ("descriptor_gpa", 0),
    QUEUE_DESC_HIGH: ("descriptor_gpa", 32),
    QUEUE_DRIVER_LOW: ("driver_gpa", 0),
    QUEUE_DRIVER_HIGH: ("driver_gpa", 32),
    QUEUE_DEVICE_LOW: ("device_gpa", 0),
    QUEUE_DEVICE_HIGH: ("device_gpa", 32),
}
_NO_SHARED_MEMORY = dict.fromkeys(
    (SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH), 0xFFFF_FFFF
)


class VirtioDevice:
    """What is behind the registers: a kind of device.  The attributes say which."""

    device_id: int
    features = 0  # those that the device offers, without the ones of all devices
    queue_sizes: tuple[int, ...]  # how many descriptors each queue can have
    config = b""  # the configuration space, which drivers only read
    slow = False  # serve() may have to wait for the host, and so must not hold up a vCPU
    transport: VirtioMmio  # the registers: set when they are made

    def serve(self, number: int, queue: Virtqueue) -> None:
        """Work on queue `number`.  Raises QueueError when the driver broke the rules.

        Never called for the same queue by two threads at once, nor before the driver is ready.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """The driver is ready."""

    def reset(self) -> None:
        """Back to power-on, apart from the queues: a reset of the machine, not the driver's."""

    def close(self) -> None:
        """Free what the device has of the host."""


class VirtioMmio:
    """The registers of one device, on the bus.

    Threads: `_lock` guards InterruptStatus, Status and the line, and is a leaf; each queue has a
    lock of its own.  A reset waits for whoever works on a queue.
    """

    size = 0x200

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        irq: Callable[[bool], None] = lambda level: None,
    ) -> None:
        """`irq` sets the interrupt line."""
        self.device, self._irq = device, irq
        device.transport = self
        self.on_ready: Callable[[], None] = lambda: None  # called when the driver is
        self.on_notify: Callable[[int], None] = self.serve  # called with the queue's number
        self._offered = device.features | VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC
        used_buffer = partial(self._interrupt, USED_BUFFER)
        self.queues = [Virtqueue(memory, size, used_buffer) for size in device.queue_sizes]
        self._lock = threading.Lock()
        self._status = self._interrupt_status = self._generation = 0
        self._line = False
        self._forget_choices()

    def _forget_choices(self) -> None:
        self._features = 0  # those that the driver chose
        self._selected = dict.fromkeys((DEVICE_FEATURES_SEL, DRIVER_FEATURES_SEL, QUEUE_SEL), 0)

    def reset(self) -> None:
        """What a write of 0 to Status does: the driver can begin again."""
        with self._lock:
            self._status = 0  # nobody begins to work on a queue any more
        for queue in self.queues:
            queue.ready = False  # and who does will soon have finished
            with queue.lock:
                queue.reset()
        self._forget_choices()
        with self._lock:
            self._status = self._interrupt_status = 0  # what the last work has left there
            self._set_line(False)

    # --- for the device and for the bus ----------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether the driver is ready, and has not broken a queue."""
        both = STATUS_DRIVER_OK | STATUS_FEATURES_OK
        return self._status & (both | STATUS_NEEDS_RESET) == both

    def has(self, feature: int) -> bool:
        """Whether the driver has chosen a feature."""
        return self._features & feature != 0

    def serve(self, number: int) -> None:
        """Let the device work on a queue now, if there is one of this number."""
        if number >= len(self.queues):
            return
        queue = self.queues[number]
        with queue.lock:
            if not self.live or not queue.ready:
                return
            try:
                self.device.serve(number, queue)
            except QueueError:
                self._need_reset()
            queue.notify()

    def change_config(self, config: bytes) -> None:
        """Give the device another configuration, and tell the driver."""
        with self._lock:
            self.device.config = config
            self._generation = self._generation + 1 & 0xFFFF_FFFF
        self._interrupt(CONFIGURATION_CHANGE)

    def _need_reset(self) -> None:
        with self._lock:
            self._status |= STATUS_NEEDS_RESET
        self._interrupt(CONFIGURATION_CHANGE)

    def _interrupt(self, reason: int) -> None:
        with self._lock:
            if self._status & STATUS_DRIVER_OK:  # before that the driver must not be told
                self._interrupt_status |= reason
                self._set_line(True)

    def _set_line(self, level: bool) -> None:
        """With `_lock` held, which keeps the order."""
        if level != self._line:
            self._line = level
            self._irq(level)

    # --- for the driver --------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register, or bytes of the configuration space.  What is not there reads 0."""
        if offset >= CONFIG:
            return int.from_bytes(self.device.config[offset - CONFIG :][:size], "little")
        if size != 4:
            return 0
        if offset == INTERRUPT_STATUS:  # first, because it is read at each interrupt
            return self._interrupt_status
        if offset == DEVICE_FEATURES:
            return self._offered >> 32 * min(self._selected[DEVICE_FEATURES_SEL], 2) & 0xFFFF_FFFF
        if offset in (QUEUE_NUM_MAX, QUEUE_READY):
            queue = self._selected_queue()
            if queue is None:
                return 0
            return queue.max_size if offset == QUEUE_NUM_MAX else int(queue.ready)
        if offset in _NO_SHARED_MEMORY:
            return _NO_SHARED_MEMORY[offset]
        return {
            MAGIC_VALUE: MAGIC,
            VERSION: 2,
            DEVICE_ID: self.device.device_id,
            VENDOR_ID: VENDOR,
            STATUS: self._status,
            CONFIG_GENERATION: self._generation,
        }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """A register.  What is not there ignores it, and so does the configuration space."""
        if size != 4:
            return
        if offset == QUEUE_NOTIFY:
            self.on_notify(value)
        elif offset == INTERRUPT_ACK:
            with self._lock:
                self._interrupt_status &= ~value
                self._set_line(False)
                self._set_line(self._interrupt_status != 0)  # another edge for what is left
        elif offset == STATUS:
            self._write_status(value)
        elif offset in self._selected:
            self._selected[offset] = value
        elif offset == DRIVER_FEATURES:
            self._write_features(value)
        elif offset == QUEUE_READY:
            self._write_queue_ready(value)
        elif queue := self._selected_queue():
            if offset == QUEUE_NUM:
                queue.driver_size = value
            elif offset in _ADDRESSES:
                name, shift = _ADDRESSES[offset]
                other_half = getattr(queue, name) & 0xFFFF_FFFF << 32 - shift
                setattr(queue, name, other_half | value << shift)

    def _selected_queue(self) -> Virtqueue | None:
        number = self._selected[QUEUE_SEL]
        return self.queues[number] if number < len(self.queues) else None

    def _write_features(self, value: int) -> None:
        shift = 32 * self._selected[DRIVER_FEATURES_SEL]
        if shift <= 32 and not self._status & STATUS_FEATURES_OK:  # after that it stays as it is
            self._features = self._features & ~(0xFFFF_FFFF << shift) | value << shift

    def _write_queue_ready(self, value: int) -> None:
        queue = self._selected_queue()
        if queue is None or bool(value) == queue.ready:
            return
        queue.ready = False
        with queue.lock:
            if not value:
                queue.disable()
                return
            try:
                queue.enable()
            except QueueError:
                queue.disable()
                self._need_reset()

    def _write_status(self, value: int) -> None:
        if not value:
            self.reset()
            return
        with self._lock:
            was_live = self.live
            unknown = self._features & ~self._offered
            if unknown or not self.has(VIRTIO_F_VERSION_1):
                value &= ~STATUS_FEATURES_OK  # the driver reads it back, and gives up
            self._status = value & 0xFF | self._status & STATUS_NEEDS_RESET
            begins = self.live and not was_live
        if begins:
            self.on_ready()
            self.device.begin()

"""Where the virtio devices of a machine are, and the threads of those that wait for the host.

    GPA                      GSI
    0xD0000000 + n * 0x200   16 + n: pins of the IOAPIC that no ISA device has

A driver finds them by the ACPI tables (boot/acpi.py).  The kernel's command line would be simpler,
but Linux must be built for it (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES), and Debian's is not.

A device that is `slow` has a thread.  The guest's writes to its QueueNotify do not leave KVM: they
signal an eventfd that the thread waits for (ioeventfd), and the vCPU runs on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial

from pyvmm import threads
from pyvmm.bus import Bus
from pyvmm.devices.virtio import QUEUE_NOTIFY, VirtioDevice, VirtioMmio
from pyvmm.memory import GuestMemory

VIRTIO_GPA = 0xD000_0000
FIRST_GSI, GSIS = 16, 8

Ioeventfd = Callable[[int, int, int], None]  # VmHandle.ioeventfd: eventfd, GPA, bytes


class IoThread(threading.Thread):
    """Serves one device until stop(); notify() wakes it, and so does KVM."""

    def __init__(self, name: str, transport: VirtioMmio, fail: Callable[[Exception], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._transport, self._fail = transport, fail
        self._stopping = False
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC)

    def run(self) -> None:
        """The thread's body."""
        try:
            while os.eventfd_read(self.eventfd) and not self._stopping:
                for number in range(len(self._transport.queues)):
                    self._transport.serve(number)
        except Exception as error:
            self._fail(error)

    def notify(self, number: int = 0) -> None:
        """Look at the queues: like KVM's eventfd, this does not say at which."""
        os.eventfd_write(self.eventfd, 1)

    def stop(self) -> None:
        """End the thread, after the request that it works on; join() waits for that."""
        self._stopping = True
        self.notify()


class VirtioBus:
    """The virtio devices of one machine.

    Threads: add() before the guest runs; close() when no vCPU does.
    """

    def __init__(
        self,
        mmio: Bus,
        memory: GuestMemory,
        set_irq: Callable[[int, bool], None],
        ioeventfd: Ioeventfd | None,
        fail: Callable[[Exception], None],
    ) -> None:
        """`set_irq` takes a GSI and a level; `fail` is told of an exception in a thread.

        Without `ioeventfd` each notification is an exit, for whoever wants to see them.
        """
        self._mmio, self._memory, self._set_irq = mmio, memory, set_irq
        self._ioeventfd, self._fail = ioeventfd, fail
        self.transports: list[VirtioMmio] = []
        self._threads: list[IoThread] = []
        self._start_lock = threading.Lock()  # a leaf: a thread is started once

    def add(self, device: VirtioDevice, name: str) -> None:
        """Give the machine a device, which is closed with the bus.

        Raises ValueError when there are too many.
        """
        number = len(self.transports)
        if number == GSIS:
            device.close()
            raise ValueError(f"{name}: a machine has at most {GSIS} virtio devices")
        gpa = VIRTIO_GPA + number * VirtioMmio.size
        transport = VirtioMmio(device, self._memory, partial(self._set_irq, FIRST_GSI + number))
        self.transports.append(transport)
        self._mmio.claim(gpa, VirtioMmio.size, transport, name)
        if device.slow:
            thread = IoThread(name, transport, self._fail)
            self._threads.append(thread)
            transport.on_notify = thread.notify
            transport.on_ready = partial(self._start, thread, gpa)

    def places(self) -> list[tuple[int, int, int]]:
        """(GPA, bytes, GSI) of each device, for the ACPI tables."""
        return [
            (VIRTIO_GPA + n * VirtioMmio.size, VirtioMmio.size, FIRST_GSI + n)
            for n in range(len(self.transports))
        ]

    def _start(self, thread: IoThread, gpa: int) -> None:
        """Once a driver is there: most guests have none, and would wait for it."""
        with self._start_lock:
            if thread.ident is None:
                threads.start(thread)
                if self._ioeventfd is not None:
                    self._ioeventfd(thread.eventfd, gpa + QUEUE_NOTIFY, 4)

    def reset(self) -> None:
        """All devices back to power-on, when no vCPU executes anything."""
        for transport in self.transports:
            transport.reset()
            transport.device.reset()

    def close(self, timeout: float) -> list[str]:
        """End the threads, then let go of guest memory and of the host's files.

        Returns the names of threads that did not end within `timeout` seconds: nothing is closed
        then.  Closing again does nothing.
        """
        for transport in self.transports:
            for queue in transport.queues:
                queue.ready = False
        for thread in self._threads:
            thread.stop()
        late = []
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout)
                late += [thread.name] if thread.is_alive() else []
        if late:
            return late
        for transport in self.transports:
            transport.reset()
            transport.device.close()
        for thread in self._threads:
            os.close(thread.eventfd)
        self.transports.clear()
        self._threads.clear()
        return []

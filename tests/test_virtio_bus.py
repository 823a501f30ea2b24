"""Where virtio devices are, and the threads of those that wait for the host."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest

from pyvmm import exits
from pyvmm.bus import Bus
from pyvmm.devices.virtio import VirtioDevice
from pyvmm.devices.virtqueue import Virtqueue, fill
from pyvmm.lab import LabMode
from pyvmm.memory import GuestMemory
from pyvmm.virtio_bus import VirtioBus
from tests.support import MMIO_GPA, MMIO_GVA, PATIENCE, Bench, wait_until
from tests.virtio_driver import Areas, Driver, guest_memory

QUEUE_NOTIFY = 0x050


class Quick(VirtioDevice):
    """Answers "quick"."""

    device_id = 42
    queue_sizes = (8,)
    closed = False
    resets = 0

    def serve(self, number: int, queue: Virtqueue) -> None:
        for chain in queue.chains():
            queue.push(chain, fill(chain.writable, b"quick"))

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.closed = True


class Slow(Quick):
    """Waits before it answers, and remembers on which thread."""

    slow = True

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.thread = ""

    def serve(self, number: int, queue: Virtqueue) -> None:
        self.thread = threading.current_thread().name
        for chain in queue.chains():
            assert self.go_on.wait(PATIENCE)
            queue.push(chain, fill(chain.writable, b"slow"))


class Machine:
    """What is around the bus."""

    def __init__(self, memory: GuestMemory) -> None:
        self.mmio, self.memory = Bus("GPA"), memory
        self.lines: dict[int, bool] = {}
        self.ioeventfds: list[tuple[int, int, int]] = []
        self.failures: list[Exception] = []
        self.virtio = VirtioBus(
            self.mmio, memory, self.lines.__setitem__, self.ioeventfd, self.failures.append
        )

    def ioeventfd(self, eventfd: int, gpa: int, size: int) -> None:
        self.ioeventfds.append((eventfd, gpa, size))

    def driver(self, number: int) -> Driver:
        """A driver of device `number`, which reaches it by the bus, at its GPA."""
        transport = self.virtio.transports[number]
        driver = Driver(transport.device, self.memory)
        transport.device.transport = driver.mmio = transport
        gpa, _, _ = self.virtio.places()[number]
        driver.set = lambda offset, value: self.mmio.write(gpa + offset, 4, value)  # type: ignore[method-assign]
        driver.get = lambda offset: self.mmio.read(gpa + offset, 4)  # type: ignore[method-assign]
        return driver


@pytest.fixture
def machine() -> Iterator[Machine]:
    with guest_memory() as memory:
        machine = Machine(memory)
        yield machine
        for transport in machine.virtio.transports:
            if isinstance(transport.device, Slow):
                transport.device.go_on.set()
        assert machine.virtio.close(PATIENCE) == []
        assert machine.failures == []


def answer(queue: Areas) -> bytes:
    """What the device answers to the next chain, once it does."""
    taken: list[tuple[int, int]] = []
    wait_until(lambda: bool(taken.extend(queue.take()) or taken), "the device answers")
    head, written = taken[0]
    return queue.written(head)[:written]


def test_each_device_has_its_place_and_its_interrupt(machine: Machine) -> None:
    for number in range(3):
        machine.virtio.add(Quick(), f"device {number}")
    assert machine.virtio.places() == [
        (0xD000_0000, 0x200, 16),
        (0xD000_0200, 0x200, 17),
        (0xD000_0400, 0x200, 18),
    ]
    driver = machine.driver(1).start()
    assert driver.get(0x008) == 42
    driver.queues[0].offer([], [8])
    driver.notify()
    assert answer(driver.queues[0]) == b"quick"
    assert machine.lines == {17: True}


def test_there_are_as_many_devices_as_interrupts(machine: Machine) -> None:
    for number in range(8):
        machine.virtio.add(Quick(), f"device {number}")
    ninth = Quick()
    with pytest.raises(ValueError, match="ninth: a machine has at most 8 virtio devices"):
        machine.virtio.add(ninth, "ninth")
    assert ninth.closed
    assert len(machine.virtio.places()) == 8


def test_a_quick_device_works_on_the_vcpu_s_thread(machine: Machine) -> None:
    machine.virtio.add(Quick(), "quick")
    before = threading.active_count()
    driver = machine.driver(0).start()
    driver.queues[0].offer([], [8])
    driver.notify()
    assert driver.queues[0].take() == [(0, 5)]
    assert threading.active_count() == before
    assert machine.ioeventfds == []


def test_a_slow_device_has_a_thread_from_when_the_driver_is_ready(machine: Machine) -> None:
    slow = Slow()
    machine.virtio.add(slow, "disk 0")
    before = threading.active_count()
    driver = machine.driver(0)
    assert (threading.active_count(), machine.ioeventfds) == (before, [])
    driver.start()
    driver.start()  # again: there is still only one
    assert threading.active_count() == before + 1
    ((_, gpa, size),) = machine.ioeventfds
    assert (gpa, size) == (0xD000_0000 + QUEUE_NOTIFY, 4)
    driver.queues[0].offer([], [8])
    driver.notify()  # does not wait
    assert driver.queues[0].take() == []
    slow.go_on.set()
    assert answer(driver.queues[0]) == b"slow"
    assert slow.thread == "disk 0"


def test_a_thread_is_started_once_whatever_several_vcpus_do(machine: Machine) -> None:
    machine.virtio.add(Slow(), "disk 0")
    before = threading.active_count()
    on_ready = machine.virtio.transports[0].on_ready
    vcpus = [threading.Thread(target=on_ready) for _ in range(8)]
    for vcpu in vcpus:
        vcpu.start()
    for vcpu in vcpus:
        vcpu.join(PATIENCE)
    assert threading.active_count() == before + 1
    assert len(machine.ioeventfds) == 1


def test_kvm_wakes_the_thread_of_a_slow_device(machine: Machine) -> None:
    slow = Slow()
    slow.go_on.set()
    machine.virtio.add(slow, "disk 0")
    driver = machine.driver(0).start()
    driver.queues[0].offer([], [8])
    ((eventfd, _, _),) = machine.ioeventfds
    os.eventfd_write(eventfd, 1)
    assert answer(driver.queues[0]) == b"slow"


def test_an_exception_in_a_thread_is_told(machine: Machine) -> None:
    class Broken(Slow):
        def serve(self, number: int, queue: Virtqueue) -> None:
            raise RuntimeError("a bug")

    machine.virtio.add(Broken(), "disk 0")
    driver = machine.driver(0).start()
    driver.notify()
    wait_until(lambda: bool(machine.failures), "the failure is told")
    assert str(machine.failures.pop()) == "a bug"


def test_a_reset_reaches_all_devices(machine: Machine) -> None:
    devices = [Quick(), Slow()]
    for device in devices:
        machine.virtio.add(device, "a device")
        machine.driver(len(machine.virtio.transports) - 1).start()
    machine.virtio.reset()
    assert [device.resets for device in devices] == [1, 1]
    assert [transport.live for transport in machine.virtio.transports] == [False, False]


def test_close_ends_threads_and_closes_devices(machine: Machine) -> None:
    before = threading.active_count()
    devices = [Quick(), Slow(), Slow()]  # the last one has no driver, and so no thread
    for device in devices:
        machine.virtio.add(device, "a device")
    machine.driver(0).start()
    machine.driver(1).start()
    assert machine.virtio.close(PATIENCE) == []
    assert [device.closed for device in devices] == [True, True, True]
    assert threading.active_count() == before
    assert machine.virtio.close(PATIENCE) == []


def test_a_thread_that_waits_for_the_host_is_named_and_nothing_is_closed(machine: Machine) -> None:
    slow = Slow()
    machine.virtio.add(slow, "disk 0")
    driver = machine.driver(0).start()
    for _ in range(2):
        driver.queues[0].offer([], [8])
    driver.notify()
    wait_until(lambda: bool(slow.thread), "the device works")
    assert machine.virtio.close(0.01) == ["disk 0"]
    assert not slow.closed
    slow.go_on.set()
    assert machine.virtio.close(PATIENCE) == []
    assert slow.closed
    assert len(driver.queues[0].take()) == 1  # the second one was not begun any more


@pytest.mark.kvm
def test_kvm_signals_an_ioeventfd_without_an_exit() -> None:
    """What the bus asks of KVM, with a guest that writes a QueueNotify and halts."""
    write_dword = b"\xc7\x04\x25" + (MMIO_GVA + QUEUE_NOTIFY).to_bytes(4, "little") + bytes(4)
    with Bench(write_dword, LabMode.LONG) as bench, guest_memory() as memory:
        virtio = VirtioBus(Bus("GPA"), memory, bench.vm.set_irq, bench.vm.handle.ioeventfd, print)
        slow = Slow()
        virtio.add(slow, "disk 0")
        (thread,) = virtio._threads
        bench.vm.handle.ioeventfd(thread.eventfd, MMIO_GPA + QUEUE_NOTIFY, 4)
        assert isinstance(bench.enter(), exits.Hlt)
        assert select.select([thread.eventfd], [], [], 0)[0] == [thread.eventfd]
        assert virtio.close(PATIENCE) == []

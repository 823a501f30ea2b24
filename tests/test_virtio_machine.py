"""Virtio devices in a machine: found by the guest, with KVM between, and gone at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvmm.boot import Image, read_image
from pyvmm.devices.virtio import VirtioDevice
from pyvmm.devices.virtio_blk import VirtioBlk
from pyvmm.devices.virtio_console import VirtioConsole
from pyvmm.devices.virtio_rng import VirtioRng
from pyvmm.disk import Disk
from pyvmm.machine import Machine
from pyvmm.stop import StopReason
from tests.virtio_driver import Areas, Driver

pytestmark = pytest.mark.kvm

VIRTIO_GPA = 0xD000_0000
SECTOR = 512
AREAS_GPA = 0x20_0000
USED_INDEX_GPA = AREAS_GPA + 16 * 8 + 6 + 2 * 8 + 2 + 2  # as Areas lays out a queue of 8
TIMEOUT = 20.0
READ = bytes(16)  # a request's header: read sector 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of two sectors."""
    file = tmp_path / "disk.img"
    file.write_bytes(b"first sector".ljust(SECTOR, b".") + bytes(SECTOR))
    return file


def block_device(path: Path) -> VirtioBlk:
    return VirtioBlk(Disk(str(path)))


def notify_and_wait(path: Path) -> Image:
    """A guest that notifies the first device, waits until it has returned a chain, and halts."""
    code = b"\xbb" + VIRTIO_GPA.to_bytes(4, "little")  # mov ebx, 0xD0000000
    code += b"\xc7\x43\x50" + bytes(4)  # mov dword [rbx+0x50], 0
    code += (
        b"\x66\x83\x3c\x25" + USED_INDEX_GPA.to_bytes(4, "little") + b"\0"
    )  # 1: cmp word [...], 0
    code += b"\x74\xf5"  # je 1b
    code += b"\xf4"
    file = path / "guest.bin"
    file.write_bytes(code)
    return read_image(str(file))


def start(machine: Machine, device: VirtioDevice) -> Areas:
    """Do for the guest what its driver would do at the first device; returns the queue."""
    transport = device.transport
    driver = Driver(device, machine.vm.memory)
    device.transport = driver.mmio = transport
    driver.set = lambda offset, value: machine.mmio.write(VIRTIO_GPA + offset, 4, value)  # type: ignore[method-assign]
    driver.choose(driver.features())
    queue = Areas(machine.vm.memory, AREAS_GPA, 8)
    driver.set_up_queue(0, queue)
    driver.set(0x070, 15)
    return queue


@pytest.mark.parametrize("coalesce", [True, False])
def test_a_guest_reads_its_disk(tmp_path: Path, disk: Path, coalesce: bool) -> None:
    """By an ioeventfd, and without."""
    device = block_device(disk)
    with Machine(notify_and_wait(tmp_path), virtio=[device], coalesce=coalesce) as machine:
        queue = start(machine, device)
        assert queue.used + 2 == USED_INDEX_GPA
        head = queue.offer([READ], [SECTOR, 1])
        assert machine.run(TIMEOUT).reason is StopReason.HALTED
        assert queue.take() == [(head, SECTOR + 1)]
        assert queue.written(head).startswith(b"first sector")


def test_the_tables_tell_of_each_device(disk: Path) -> None:
    devices = [block_device(disk), VirtioRng(), VirtioConsole(lambda data: None)]
    with Machine("guests/hello.bin", virtio=devices) as machine:
        firmware = machine.read_memory(0xE_0000, 0x1000, physical=True)
        assert firmware.count(b"LNRO0005") == 3
        ids = [machine.mmio.read(VIRTIO_GPA + 0x200 * n + 8, 4) for n in range(3)]
        assert ids == [2, 4, 3]


def test_a_machine_without_virtio_does_not_tell_of_any() -> None:
    with Machine("guests/hello.bin", irqchip=True) as machine:
        assert b"LNRO0005" not in machine.read_memory(0xE_0000, 0x1000, physical=True)


@pytest.mark.parametrize("wrong", [{"irqchip": False}, {"memory": 1 << 50}, {"cpus": 100_000}])
def test_a_machine_that_cannot_be_made_closes_the_disk(disk: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Machine("guests/hello.bin", virtio=[block_device(disk)], **wrong)
    block_device(disk).close()  # or else it would be in use


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="a machine has at most 8 virtio devices"):
        Machine("guests/hello.bin", virtio=[VirtioRng() for _ in range(9)])


def test_a_reset_leaves_no_device_with_a_queue(tmp_path: Path, disk: Path) -> None:
    """The memory is made zeros, and a device must not write there any more."""
    reset = tmp_path / "reset.bin"
    # The machine resets once, and ends at the second request, because it is not to reboot then.
    reset.write_bytes(b"\x66\xba\xf9\x0c\xb0\x06\xee\xf4")  # out 0xcf9, 6
    device = block_device(disk)
    with Machine(str(reset), virtio=[device]) as machine:
        start(machine, device)
        assert device.transport.live
        machine.on_reset(lambda: setattr(machine, "_reboot", False))
        assert machine.run(TIMEOUT).reason is StopReason.RESET
        assert not device.transport.live
        assert not device.transport.queues[0].ready

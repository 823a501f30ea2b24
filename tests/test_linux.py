"""Linux from its kernel to a shell and back: disk, console, power-off, reset and panic.

The kernels are Debian's (tests/hosts/linux.py): most tests boot the cloud kernel, which takes a
third of the time, and the last two the stock kernel. They type at its serial console.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvmm import StopReason
from pyvmm.devices.virtio import VirtioDevice
from pyvmm.devices.virtio_blk import VirtioBlk
from pyvmm.devices.virtio_console import VirtioConsole
from pyvmm.devices.virtio_rng import VirtioRng
from pyvmm.disk import Disk
from pyvmm.linux.printk import read_log
from pyvmm.names import KALLSYMS, Names
from pyvmm.testing import Guest
from tests.hosts import linux
from tests.linux_guest import (
    BOOT,
    MEMORY,
    MIB,
    PROMPT,
    STEP,
    find_linux,
    find_or_skip,
    linux_image,
    shell_line,
    succeeded,
)

pytestmark = [pytest.mark.kvm, pytest.mark.slow, pytest.mark.timeout(1200)]

# The processor that QEMU plays belongs to a family in which some had a GART. So the stock kernel
# looks for its bridge on each of 256 PCI buses, twice: 33,000 port accesses, half of its time.
NO_GART = "pci=noearly"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel, its initrd and e2fsck."""
    return find_linux(tmp_path_factory.mktemp("linux"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same with the stock kernel, and that as an ELF file."""
    return find_or_skip(linux.find_stock, tmp_path_factory.mktemp("stock"))


def empty_disk(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(32 * MIB)
    return path


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Path]:
    """A disk that the guest has put a file system and its own programs on."""
    path = empty_disk(tmp_path_factory.mktemp("disk"))
    with boot(folder, disk_and_entropy(path), cpus=2) as guest:
        wait_for_shell(guest, "rootfs")
        assert run(guest, "nproc") == "2"
        assert run(guest, "cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
        run(guest, "mke2fs /dev/vda >/dev/null")
        run(guest, "mount /dev/vda /root")
        run(guest, "cd /root; mkdir proc sys dev")
        run(guest, "cp -a /bin /init .; echo before >kept")
        run(guest, "cd /; umount /root")
        power_off(guest)
    fsck(folder, path)
    yield path


def disk_and_entropy(disk: Path) -> list[VirtioDevice]:
    return [VirtioBlk(Disk(str(disk))), VirtioRng()]


def boot(
    folder: Path,
    virtio: Sequence[VirtioDevice] = (),
    append: str = "",
    kernel: str = "vmlinuz",
    **machine: Any,
) -> Guest:
    image = linux_image(folder, append, kernel)
    return Guest(image, memory=MEMORY, virtio=virtio, **machine)


def run(guest: Guest, command: str) -> str:
    """Type a command at the shell's prompt; returns what it prints, and it must succeed."""
    guest.type(f"{shell_line(command)}\n")
    guest.wait_for("\n")  # what was typed, as the terminal has echoed it
    return succeeded(command, guest.wait_for(PROMPT, STEP))


def wait_for_shell(guest: Guest, root: str) -> None:
    guest.wait_for(f"a shell on {root}\r\n", BOOT)
    guest.wait_for(PROMPT, STEP)


def power_off(guest: Guest) -> None:
    guest.type("poweroff -f\n")
    stop = guest.wait(STEP)
    assert (stop.reason, stop.status) == (StopReason.POWERED_OFF, 0)


def fsck(folder: Path, disk: Path) -> None:
    """The host finds a clean file system with nothing to correct."""
    done = subprocess.run(
        [folder / "e2fsck", "-f", "-n", disk], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not cleanly unmounted" not in done.stdout


def test_a_root_file_system_is_written_and_outlives_power_off_and_reboot(
    folder: Path, disk: Path
) -> None:
    with boot(folder, disk_and_entropy(disk), "root=/dev/vda") as guest:
        wait_for_shell(guest, "/dev/vda")
        assert run(guest, "cat /kept") == "before"
        run(guest, "echo written >/kept; seq 100000 >/numbers")
        run(guest, "mount -o remount,ro /")
        guest.type("reboot -f\n")
        wait_for_shell(guest, "/dev/vda")
        assert run(guest, "cat /kept") == "written"
        run(guest, "seq 100000 | cmp - /numbers")
        run(guest, "mount -o remount,ro /")
        power_off(guest)
    fsck(folder, disk)
    assert b"written\n" in disk.read_bytes()


def test_a_virtio_console_prints_reads_and_knows_its_size(folder: Path) -> None:
    printed = bytearray()
    console = VirtioConsole(printed.extend, columns=111, rows=33)
    with boot(folder, virtio=[console]) as guest:
        wait_for_shell(guest, "rootfs")
        run(guest, "exec 3<>/dev/hvc0")
        assert run(guest, "stty size <&3") == "33 111"
        console.resize(120, 40)
        run(guest, "until stty size <&3 | grep '40 120'; do sleep 1; done")
        run(guest, "echo printed >&3")
        assert b"printed\r\n" in printed
        console.receive(b"typed\n")
        assert run(guest, "read line <&3; echo $line") == "typed"


def test_a_panic_is_a_crash_if_the_kernel_restarts_by_a_triple_fault(folder: Path) -> None:
    with boot(folder, append="rdinit=/bin/busybox reboot=triple") as guest:
        stop = guest.wait(BOOT)
        assert (stop.reason, stop.status) == (StopReason.CRASHED, 6)
        assert "Kernel panic - not syncing: Attempted to kill init!" in guest.output


def test_the_kernels_symbols_and_log_are_read_from_its_memory(folder: Path) -> None:
    with boot(folder, cpus=2) as guest:
        wait_for_shell(guest, "rootfs")
        symbols = run(guest, "grep -E ' (_text|start_kernel|do_idle|prb)$' /proc/kallsyms")
        log = run(guest, "dmesg | head -n 20")
        vm = guest.machine.vm
        names = Names(vm, None, is_linux=True)
        kernel = names.kernel()
        assert len(symbols.splitlines()) == 4
        for line in symbols.splitlines():
            gva, _, name = line.split()
            assert kernel.gva(name) == int(gva, 16), line
        assert [str(record) for record in read_log(kernel)[:20]] == log.splitlines()
        assert names.moved_base() in (kernel.base, None)
        *where, source = names.where()
        assert [line.split(":")[0] for line in where] == ["vCPU 0", "vCPU 1"]
        assert all(" at " in line for line in where)
        assert source == f"names: {KALLSYMS}"


def test_the_stock_kernel_boots_on_two_processors_and_writes_a_disk(
    stock: Path, tmp_path: Path
) -> None:
    path = empty_disk(tmp_path)
    with boot(stock, disk_and_entropy(path), NO_GART, cpus=2) as guest:
        wait_for_shell(guest, "rootfs")
        assert run(guest, "nproc") == "2"
        run(guest, "mke2fs /dev/vda >/dev/null")
        run(guest, "mount /dev/vda /root")
        run(guest, "echo written >/root/kept; seq 100000 >/root/numbers")
        run(guest, "umount /root; mount /dev/vda /root")
        run(guest, "seq 100000 | cmp - /root/numbers")
        run(guest, "umount /root")
        power_off(guest)
    fsck(stock, path)
    assert b"written\n" in path.read_bytes()


def test_an_unpacked_kernel_boots_by_pvh(stock: Path, tmp_path: Path) -> None:
    virtio = disk_and_entropy(empty_disk(tmp_path))
    with boot(stock, virtio, NO_GART, kernel="vmlinux", cpus=2) as guest:
        assert guest.machine.image.kind == "PVH ELF64"
        wait_for_shell(guest, "rootfs")
        assert run(guest, "nproc") == "2"
        assert run(guest, "cat /sys/block/vda/size") == str(32 * MIB // 512)
        power_off(guest)

"""Virtio devices: what a disk and a console get through.

The guest (virtio.c) is the same in both VMMs, and so is the file, which lies in the host's page
cache.  A figure is the time between two bytes that the guest prints at COM1 where its measured part
begins and ends.  CPU time is that of the whole process: the vCPU's thread is in it, which waits for
the device by looking at the queue.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import floor, gcc, processes, stubs
from benchmarks.guests import RANDOM_BYTES, SEQUENTIAL_BYTES
from benchmarks.measure import PYVMM, Contenders, Context, Measure, Sample, Unavailable
from benchmarks.processes import ROOT
from benchmarks.stubs import QEMU

_SOURCE = Path(__file__).parents[1] / "virtio.c"
_LINKER_SCRIPT = ROOT / "guests" / "guest.ld"
_BEGIN, _END = b"<", b">"  # what the guest prints at COM1
_PATIENCE = 20.0  # seconds

_BLOCK, _CONSOLE = 2, 3  # device IDs
_SECTOR = 512
_DISK_BYTES = 64 << 20
_DEPTH = 16  # requests under way at a time; floor.c has as many buffers
_PAGE_BYTES = 4096  # what Linux's driver of the console sends at a time: one page, then it waits


def guest(folder: Path, name: str, **work: int) -> Path:
    """The guest, compiled for `work`: see virtio.c.  Raises Unavailable without a compiler."""
    return gcc.compiled(
        _SOURCE, folder / f"{name}.bin",
        *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fcf-protection=none"),
        *("-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
        *("-mno-red-zone", "-mgeneral-regs-only"),
        *("-T", str(_LINKER_SCRIPT), f"-Wl,--defsym=load_address={stubs.LOAD_GPA}"),
        *("-Wl,--oformat=binary", "-Wl,--build-id=none"),
        *(f"-D{name}={value}" for name, value in work.items()),
    )  # fmt: skip


def _sample(command: Sequence[str], amount: float) -> Sample:
    """What is done a second of an `amount` of work between the guest's two bytes."""
    with processes.started(command) as process:
        behind = processes.wait_for(process, _BEGIN, _PATIENCE)
        begin, cpu = time.perf_counter(), processes.cpu_seconds(process)
        if _END in behind:
            raise Unavailable("too short to be timed on so busy a host")
        processes.wait_for(process, _END, _PATIENCE)
        wall, cpu = time.perf_counter() - begin, processes.cpu_seconds(process) - cpu
    return Sample(amount / wall, amount / cpu)


def _pyvmm(folder: Path, guest: Path, options: Sequence[str], amount: float) -> Sample:
    command = [*processes.python(folder), "-m", "pyvmm", str(guest), *options]
    return _sample([*command, "-m", f"{stubs.MEMORY_MIB}M"], amount)


def _qemu(folder: Path, guest: Path, options: Sequence[str], amount: float) -> Sample:
    # microvm has its devices where pyvmm has: in memory, and not on PCI.
    command = [*stubs.qemu_command(folder, guest), "-M", "microvm", *options]
    try:
        return _sample([*command, "-global", "virtio-mmio.force-legacy=false"], amount)
    except RuntimeError as error:
        raise Unavailable(f"QEMU: {error}") from None


@contextlib.contextmanager
def _disk(size: int, at_random: bool, total: int, context: Context) -> Iterator[Contenders]:
    """`total` requests of `size` bytes: reads a second at random, megabytes one after the other."""
    count = context.scaled(total)
    amount = count if at_random else count * size / 1e6
    disk = context.folder / "disk"
    if not disk.exists():
        disk.write_bytes(os.urandom(1 << 20) * (_DISK_BYTES >> 20))
    mode = "random" if at_random else "sequential"

    def made() -> Path:
        return guest(
            context.folder, f"disk-{mode}", DEVICE=_BLOCK, BYTES=size, COUNT=count, DEPTH=_DEPTH,
            RANDOM=int(at_random), SECTORS=_DISK_BYTES // _SECTOR,
        )  # fmt: skip

    theirs = ["-serial", "stdio", "-device", "virtio-blk-device,drive=disk"]
    theirs += ["-drive", f"file={disk},format=raw,if=none,id=disk,read-only=on"]

    def c() -> Sample:
        ((wall, cpu),) = floor.run(context.folder, mode, disk, count)
        return Sample(amount / wall, amount / cpu)

    yield {
        PYVMM: lambda: _pyvmm(context.folder, made(), ["--disk", f"{disk},ro"], amount),
        QEMU: lambda: _qemu(context.folder, made(), theirs, amount),
        floor.FLOOR: c,
    }


@contextlib.contextmanager
def _console(context: Context) -> Iterator[Contenders]:
    count = context.scaled(4000)
    amount = count * _PAGE_BYTES / 1e6

    def made() -> Path:
        return guest(
            context.folder, "console", DEVICE=_CONSOLE, BYTES=_PAGE_BYTES, COUNT=count, DEPTH=1,
            RANDOM=0, SECTORS=1,
        )  # fmt: skip

    theirs = ["-chardev", "stdio,id=out,mux=on", "-serial", "chardev:out"]
    theirs += ["-device", "virtio-serial-device", "-device", "virtconsole,chardev=out"]
    yield {
        PYVMM: lambda: _pyvmm(context.folder, made(), ["--console", "virtio"], amount),
        QEMU: lambda: _qemu(context.folder, made(), theirs, amount),
    }


_FLOOR = "the same reads from the page cache in a C loop, with no guest and no queue"

MEASURES = (
    Measure(
        "disk-sequential",
        "MB/s",
        "How fast a guest reads a large file from its disk: 128 KiB at a time, 16 requests ahead.",
        _FLOOR,
        functools.partial(_disk, SEQUENTIAL_BYTES, False, 4_000),
    ),
    Measure(
        "disk-random",
        "reads/s",
        "How many small reads (4 KiB) a second all over its disk a guest can make, 16 at a time.",
        _FLOOR,
        functools.partial(_disk, RANDOM_BYTES, True, 20_000),
    ),
    Measure(
        "console",
        "MB/s",
        "How fast what a guest prints at its virtio console comes out of a pipe.",
        "for each 4 KiB, an exit and a write to the pipe",
        _console,
    ),
)

"""Exits a second: how fast a guest can talk to devices.

The guest writes to one port, or to one MMIO address, in a loop.  pyvmm is measured whole: vm.run(),
the vCPU thread's loop and its handler, the bus, and a device that does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import bare, floor, guests
from benchmarks.bare import BARE
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample
from pyvmm import Machine, StopReason


class Marks:
    """Wall and CPU time of each vCPU's thread at the guest's marks."""

    def __init__(self, machine: Machine) -> None:
        self.wall: list[float] = []
        self._cpu: dict[str, list[float]] = {}
        machine.on_port(guests.MARK_PORT, write=self._mark)

    def _mark(self, offset: int, size: int, value: int) -> None:
        self.wall.append(time.perf_counter())
        self._cpu.setdefault(threading.current_thread().name, []).append(time.thread_time())

    def seconds(self) -> tuple[float, float]:
        """From the first mark to the last: wall seconds, and CPU seconds of all vCPU threads."""
        if any(len(marks) != 2 for marks in self._cpu.values()) or not self._cpu:
            raise RuntimeError(f"{len(self.wall)} marks of {len(self._cpu)} vCPUs: two each")
        cpu = sum(marks[-1] - marks[0] for marks in self._cpu.values())
        return max(self.wall) - min(self.wall), cpu


class NullDevice:
    """Takes what is written."""

    def read(self, offset: int, size: int) -> int:
        """See bus.Device."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """See bus.Device."""


def _pyvmm(guest: Path, cpus: int, count: int) -> Sample:
    with Machine(guest, cpus=cpus, irqchip=False) as machine:
        machine.ports.claim(guests.IO_PORT, 1, NullDevice(), "benchmark")
        machine.mmio.claim(guests.MMIO_GPA, 8, NullDevice(), "benchmark")
        marks = Marks(machine)
        stop = machine.run()
    assert stop.reason is StopReason.HALTED, stop
    return _rate(count * cpus, *marks.seconds())


def _bare(guest: Path, cpus: int, count: int) -> Sample:
    return _rate(count * cpus, *bare.exits(guest, cpus, count))


def _c(folder: Path, guest: Path, cpus: int, count: int) -> Sample:
    ((wall, cpu),) = floor.run(folder, "exits", guest, cpus)
    return _rate(count * cpus, wall, cpu)


def _rate(count: int, wall: float, cpu: float) -> Sample:
    return Sample(count / wall, count / cpu)


@contextlib.contextmanager
def _contenders(kind: str, cpus: int, context: Context) -> Iterator[Contenders]:
    count = context.scaled(30_000)
    code = guests.port_writes(count) if kind == "port" else guests.mmio_writes(count)
    guest = guests.write_guest(context.folder, f"{kind}-{count}", code)
    yield {
        PYVMM: lambda: _pyvmm(guest, cpus, count),
        BARE: lambda: _bare(guest, cpus, count),
        floor.FLOOR: lambda: _c(context.folder, guest, cpus, count),
    }


_FLOOR = "KVM_RUN in a C loop that looks at each exit and does nothing"

MEASURES = (
    Measure(
        "port-exits-1",
        "exits/s",
        "How many port accesses a second a guest's driver can make, with one vCPU.",
        _FLOOR,
        functools.partial(_contenders, "port", 1),
        Goal(floor.FLOOR, at_least=0.85),
    ),
    Measure(
        "port-exits-2",
        "exits/s",
        "The same with two vCPUs at once: what CPython's global lock leaves of a second one.",
        _FLOOR,
        functools.partial(_contenders, "port", 2),
        Goal(floor.FLOOR, at_least=0.85),
    ),
    Measure(
        "mmio-exits-1",
        "exits/s",
        "How many accesses a second to memory-mapped devices a guest's driver can make.",
        _FLOOR,
        functools.partial(_contenders, "mmio", 1),
        Goal(floor.FLOOR, at_least=0.85),
    ),
    Measure(
        "mmio-exits-2",
        "exits/s",
        "The same with two vCPUs at once.",
        _FLOOR,
        functools.partial(_contenders, "mmio", 2),
        Goal(floor.FLOOR, at_least=0.85),
    ),
)

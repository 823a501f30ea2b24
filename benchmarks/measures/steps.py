"""Single-steps without a debugger: what a program that uses pyvmm as a library gets.

Between vm.run() in steps and the bare system calls is what makes a step exact (see stepping.py in
pyvmm); between it and the gdb-step row is the debug server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import bare, floor, guests
from benchmarks.bare import BARE
from benchmarks.measure import PYVMM, Contenders, Context, Measure, Sample
from pyvmm import Machine, exits
from pyvmm.vcpurecord import Capability


def _pyvmm(guest: Path, count: int) -> Sample:
    def steps() -> Sample:
        vm.activate_cpu(0)
        vm.set_capability(0, Capability.MTRAP_EXIT, True)
        begin, cpu = time.perf_counter(), time.thread_time()
        for _ in range(count):
            exit = vm.run(0)
        wall, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        vm.deactivate_cpu(0)
        assert isinstance(exit, exits.Mtrap), exit
        return Sample(count / wall, count / cpu)

    with Machine(guest, irqchip=False) as machine, ThreadPoolExecutor(1) as thread:
        vm = machine.vm
        return thread.submit(steps).result()  # a thread that runs a vCPU has the kick blocked


def _bare(guest: Path, count: int) -> Sample:
    wall, cpu = bare.steps(guest, count)
    return Sample(count / wall, count / cpu)


def _c(folder: Path, guest: Path, count: int) -> Sample:
    ((wall, cpu),) = floor.run(folder, "steps", guest, count)
    return Sample(count / wall, count / cpu)


@contextlib.contextmanager
def _contenders(context: Context) -> Iterator[Contenders]:
    guest = guests.write_guest(context.folder, "circle", guests.circle())
    count = context.scaled(5000)
    yield {
        PYVMM: lambda: _pyvmm(guest, count),
        BARE: lambda: _bare(guest, count),
        floor.FLOOR: lambda: _c(context.folder, guest, count),
    }


MEASURES = (
    Measure(
        "steps",
        "steps/s",
        "How many instructions a second your own program can step and look at, without a debugger.",
        "KVM_SET_GUEST_DEBUG and KVM_RUN for each instruction",
        _contenders,
    ),
)

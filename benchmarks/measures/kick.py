"""Suspending: how fast a debugger, or a time limit, gets hold of a vCPU that never exits.

From vm.suspend_cpu() on one thread until the vCPU's thread has left KVM_RUN and is parked.  The
floors do the same with pthread_kill() and a condition variable, in C and in Python.  Each sample
has a VM of its own: one that spins beside the others would take a processor away from them.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import bare, floor, guests
from benchmarks.bare import BARE
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample, Sampler
from pyvmm import Machine
from pyvmm.memory import GuestMemory

_BETWEEN_KICKS = 0.0005  # seconds: the vCPU is in the guest again by then; floor.c waits as long

Statistic = Callable[[list[float]], float]


def p99(values: list[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[len(values) * 99 // 100]


class _Vcpu(NamedTuple):
    """A vCPU that spins, and how it is stopped and resumed."""

    memory: GuestMemory
    suspend: Callable[[], None]  # returns when it is parked
    resume: Callable[[], None]

    def let_run(self) -> None:
        """Resume it and wait until it executes: else the next kick would find it still asleep."""
        before = self._counted()
        self.resume()
        while self._counted() == before:
            time.sleep(0)  # lets go of the interpreter, which the vCPU's thread needs

    def _counted(self) -> bytes:
        return self.memory.read(guests.COUNTER_GPA, 4)

    def kicks(self, count: int) -> list[float]:
        """Microseconds of each kick.  (The first finds it wherever it is, and does not count.)"""
        taken = []
        self.suspend()
        self.let_run()
        for _ in range(count):
            start = time.perf_counter()
            self.suspend()
            taken.append((time.perf_counter() - start) * 1e6)
            self.let_run()
            time.sleep(_BETWEEN_KICKS)
        return taken

    def cycles(self, count: int) -> float:
        """Seconds for so many times of suspending and resuming."""
        self.suspend()
        self.let_run()
        start = time.perf_counter()
        for _ in range(count):
            self.suspend()
            self.let_run()
        return time.perf_counter() - start


@contextlib.contextmanager
def _pyvmm(guest: Path) -> Iterator[_Vcpu]:
    with Machine(guest) as machine:
        vm = machine.vm

        def suspend() -> None:
            vm.suspend_cpu(0)
            if vm.wait_parked([0], timeout=10):
                raise RuntimeError("the vCPU did not park within 10 s")

        runner = threading.Thread(target=machine.run, name="runner")
        runner.start()
        try:
            while not vm.active_cpus() or vm.debug_cpus():
                time.sleep(0.001)
            yield _Vcpu(vm.memory, suspend, lambda: vm.resume_cpu(0))
        finally:
            machine.interrupt()
            runner.join()


@contextlib.contextmanager
def _bare(guest: Path) -> Iterator[_Vcpu]:
    with bare.kicker(guest) as (kicker, machine):
        yield _Vcpu(machine.vm.memory, kicker.suspend, kicker.resume)


_VcpuOf = Callable[[Path], contextlib.AbstractContextManager[_Vcpu]]


def _kick_contenders(
    statistic: Statistic, context: Context
) -> contextlib.AbstractContextManager[Contenders]:
    count = context.scaled(500)
    guest = guests.write_guest(context.folder, "spin", guests.spin())

    def in_python(vcpu_of: _VcpuOf) -> Sample:
        with vcpu_of(guest) as vcpu:
            return Sample(statistic(vcpu.kicks(count)))

    def in_c() -> Sample:
        lines = floor.run(context.folder, "kick", guest, count)
        return Sample(statistic([microseconds for (microseconds,) in lines]))

    return _contenders(in_python, in_c)


def _cycle_contenders(context: Context) -> contextlib.AbstractContextManager[Contenders]:
    count = context.scaled(1000)
    guest = guests.write_guest(context.folder, "spin", guests.spin())

    def in_python(vcpu_of: _VcpuOf) -> Sample:
        with vcpu_of(guest) as vcpu:
            return Sample(count / vcpu.cycles(count))

    def in_c() -> Sample:
        ((seconds,),) = floor.run(context.folder, "cycles", guest, count)
        return Sample(count / seconds)

    return _contenders(in_python, in_c)


def _contenders(
    in_python: Callable[[_VcpuOf], Sample], in_c: Sampler
) -> contextlib.AbstractContextManager[Contenders]:
    return contextlib.nullcontext(
        {
            PYVMM: functools.partial(in_python, _pyvmm),
            BARE: functools.partial(in_python, _bare),
            floor.FLOOR: in_c,
        }
    )


_FLOOR = "pthread_kill, and a condition variable for the answer, in C"

MEASURES = (
    Measure(
        "kick-median",
        "us",
        "How long a debugger's ^C takes to stop a vCPU that spins, usually.",
        _FLOOR,
        functools.partial(_kick_contenders, statistics.median),
        Goal(at_most=100),
    ),
    Measure(
        "kick-p99",
        "us",
        "The same in the worst of a hundred cases.",
        _FLOOR,
        functools.partial(_kick_contenders, p99),
    ),
    Measure(
        "suspend-resume",
        "cycles/s",
        "How often a second a vCPU can be stopped and run again: what a debugger does.",
        _FLOOR,
        _cycle_contenders,
    ),
)

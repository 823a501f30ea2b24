"""Suspending: how fast a debugger, or a time limit, gets hold of a vCPU that never exits.

From vm.suspend_cpu() on one thread until the vCPU's thread has left KVM_RUN and is parked.  The C
floor does the same with pthread_kill() and a condition variable.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from benchmarks import floor, guests
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample
from pyvmm import Machine
from pyvmm.hypervisor import VM

_BETWEEN_KICKS = 0.0005  # seconds: the vCPU is in the guest again by then; floor.c waits as long

Statistic = Callable[[list[float]], float]


def p99(values: list[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[len(values) * 99 // 100]


@contextlib.contextmanager
def _spinning_vm(context: Context) -> Iterator[VM]:
    """A VM whose one vCPU spins on a thread of its own."""
    guest = guests.write_guest(context.folder, "spin", guests.spin())
    with Machine(guest) as machine:
        runner = threading.Thread(target=machine.run, name="runner")
        runner.start()
        try:
            while not machine.vm.active_cpus() or machine.vm.debug_cpus():
                time.sleep(0.001)
            yield machine.vm
        finally:
            machine.interrupt()
            runner.join()


def _suspend(vm: VM) -> None:
    vm.suspend_cpu(0)
    if vm.wait_parked([0], timeout=10):
        raise RuntimeError("the vCPU did not park within 10 s")


def _resume(vm: VM) -> None:
    """Resume the vCPU and wait until it executes: else the next kick would find it still asleep."""
    before = vm.memory.read(guests.COUNTER_GPA, 4)
    vm.resume_cpu(0)
    while vm.memory.read(guests.COUNTER_GPA, 4) == before:
        time.sleep(0)  # lets go of the interpreter, which the vCPU's thread needs


def _kicks(vm: VM, count: int) -> list[float]:
    """Microseconds of each kick."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        _suspend(vm)
        taken.append((time.perf_counter() - start) * 1e6)
        _resume(vm)
        time.sleep(_BETWEEN_KICKS)
    return taken


@contextlib.contextmanager
def _kick_contenders(statistic: Statistic, context: Context) -> Iterator[Contenders]:
    count = context.scaled(500)

    def in_c() -> Sample:
        guest = guests.write_guest(context.folder, "spin", guests.spin())
        lines = floor.run(context.folder, "kick", guest, count)
        return Sample(statistic([microseconds for (microseconds,) in lines]))

    with _spinning_vm(context) as vm:
        yield {PYVMM: lambda: Sample(statistic(_kicks(vm, count))), floor.FLOOR: in_c}


@contextlib.contextmanager
def _cycle_contenders(context: Context) -> Iterator[Contenders]:
    count = context.scaled(1000)

    def in_c() -> Sample:
        guest = guests.write_guest(context.folder, "spin", guests.spin())
        ((seconds,),) = floor.run(context.folder, "cycles", guest, count)
        return Sample(count / seconds)

    def in_pyvmm() -> Sample:
        start = time.perf_counter()
        for _ in range(count):
            _suspend(vm)
            _resume(vm)
        return Sample(count / (time.perf_counter() - start))

    with _spinning_vm(context) as vm:
        yield {PYVMM: in_pyvmm, floor.FLOOR: in_c}


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

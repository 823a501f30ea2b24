"""The floor in Python: KVM's system calls through ctypes in the shortest loop, and nothing else.

It stands between C and pyvmm.  From C to here is CPython's share: a call through ctypes, and its
global lock, which is let go of around each system call.  From here to pyvmm is pyvmm's own.  pyvmm
only builds the machine; none of its code is in the loops.  (A bare debug server is in echo.py.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import guests
from pyvmm import Machine, kvm
from pyvmm.handles import VcpuHandle

BARE = "bare Python"  # the contender's name


class Span(NamedTuple):
    """A part of a thread's life: wall clock at its begin and end, and CPU time used, in seconds."""

    begin: float
    end: float
    cpu: float


@contextlib.contextmanager
def _vcpus(guest: Path, cpus: int = 1) -> Iterator[list[VcpuHandle]]:
    """The vCPUs of a machine that nobody runs."""
    with Machine(guest, cpus=cpus, irqchip=False, coalesce=False) as machine:
        yield [machine.vm.handle_of(number) for number in range(cpus)]


def exits(guest: Path, cpus: int, count: int) -> tuple[float, float]:
    """Wall and CPU seconds for `count` exits on each vCPU of a guest that makes so many."""

    def one(vcpu: VcpuHandle) -> Span:
        enter = vcpu.enter
        enter()
        _expect_mark(vcpu)
        begin, cpu = time.perf_counter(), time.thread_time()
        for _ in range(count + 1):
            enter()
        span = Span(begin, time.perf_counter(), time.thread_time() - cpu)
        _expect_mark(vcpu)
        return span

    with _vcpus(guest, cpus) as vcpus, ThreadPoolExecutor(cpus) as threads:
        spans = list(threads.map(one, vcpus))
    wall = max(span.end for span in spans) - min(span.begin for span in spans)
    return wall, sum(span.cpu for span in spans)


def _expect_mark(vcpu: VcpuHandle) -> None:
    # No variable for vcpu.run: the exception would keep it alive, and the map could not be closed.
    if vcpu.run.exit_reason != kvm.KVM_EXIT_IO or vcpu.run.io.port != guests.MARK_PORT:
        raise RuntimeError(f"exit {vcpu.run.exit_reason} where the guest should be at MARK_PORT")


def steps(guest: Path, count: int) -> tuple[float, float]:
    """Wall and CPU seconds for `count` single-steps as KVM makes them."""
    control = kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP | kvm.KVM_GUESTDBG_BLOCKIRQ
    with _vcpus(guest) as (vcpu,):
        arm, enter = vcpu.set_guest_debug, vcpu.enter
        begin, cpu = time.perf_counter(), time.thread_time()
        for _ in range(count):
            arm(control)
            enter()
        wall, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        if vcpu.run.exit_reason != kvm.KVM_EXIT_DEBUG:
            raise RuntimeError(f"exit {vcpu.run.exit_reason} where a step should have ended")
    return wall, cpu


class Kicker:
    """What floor.c does to a vCPU that spins, with Python's threads and its condition variable."""

    def __init__(self, vcpu: VcpuHandle) -> None:
        self._vcpu = vcpu
        self._changed = threading.Condition()
        self._suspended = self._parked = self._ended = False
        self._thread = threading.Thread(target=self._run)
        vcpu.set_signal_mask(())
        # The thread inherits it; only KVM_RUN unblocks the signal.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _run(self) -> None:
        while not self._ended:
            self._vcpu.enter()
            signal.sigtimedwait({signal.SIGUSR1}, 0)
            with self._changed:
                while self._suspended:
                    self._parked = True
                    self._changed.notify_all()
                    self._changed.wait()

    def suspend(self) -> None:
        """Kick the vCPU and wait until it is parked."""
        assert self._thread.ident is not None
        with self._changed:
            self._suspended = True
            signal.pthread_kill(self._thread.ident, signal.SIGUSR1)
            while not self._parked:
                self._changed.wait()

    def resume(self) -> None:
        """Let it run on."""
        with self._changed:
            self._suspended = self._parked = False
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread."""
        self.suspend()
        self._ended = True
        self.resume()
        self._thread.join()


@contextlib.contextmanager
def kicker(guest: Path) -> Iterator[tuple[Kicker, Machine]]:
    """A vCPU that spins on a thread of its own, and its machine for a look at memory."""
    with Machine(guest, irqchip=False, coalesce=False) as machine:
        with contextlib.closing(Kicker(machine.vm.handle_of(0))) as kicker:
            yield kicker, machine

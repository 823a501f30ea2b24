"""What the tests of the hypervisor layer share: small guests, threads that run them, bounded waits.

`Bench` is the laboratory of pyvmm.lab, with its memory layout and a `hlt` behind each exception
vector, but on the hypervisor layer: what is measured here is what pyvmm makes of the host.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

import pytest

from pyvmm import exits, handles, kvm
from pyvmm.hostprobe import FINDINGS, Finding, host
from pyvmm.hypervisor import VM
from pyvmm.lab import CODE, PAGE_TABLES, RAM, STACK, Lab, LabMode
from pyvmm.vcpurecord import KICK_SIGNAL

# Guest code for 64-bit mode.  RDI points to a counter of the vCPU's own.
COUNT_FOREVER = b"\x48\xff\x07\xeb\xfb"  # 1: inc qword [rdi]; jmp 1b
HALT = b"\xf4"
NOP = b"\x90"
COUNTERS = 0x20000  # GPA; 64 bytes a vCPU
MMIO_GVA, MMIO_GPA = 0x20_0000, 0xE000_0000  # 2 MiB without RAM, mapped in LONG and USER

# Seconds to wait for what must happen: never reached unless there is a bug.  (More on slow hosts.)
PATIENCE = 30.0
_SYNCHRONOUS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}

OnExit = Callable[[exits.Exit], None]


def requires(name: str) -> None:
    """Skip the test unless the host probe's finding `name` is there.

    CI allows skips with exactly this reason, and no others on a machine with /dev/kvm.
    """
    finding = _finding(name)
    if not finding.measure(host()):
        pytest.skip(f"host probe: {name} is missing: {finding.bad}")


def lacks(name: str) -> None:
    """Skip the test, of what a user is told then, where the host probe's finding is there."""
    finding = _finding(name)
    if finding.measure(host()):
        pytest.skip(f"host probe: {name} is there: {finding.good}")


def _finding(name: str) -> Finding:
    return next(finding for finding in FINDINGS if finding.name == name)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition()` holds; fail with `what` when it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain: {what}"
        time.sleep(0.0005)


def wait_change(read: Callable[[], object], before: object, what: str) -> None:
    """Wait until `read()` is not `before` any more; fail with `what` when it stays."""
    wait_until(lambda: read() != before, what)


class Runner(threading.Thread):
    """Runs one vCPU until the VM ends; sleeps in Debug and Hlt exits, tells `on_exit` of others."""

    def __init__(self, vm: VM, vcpu_id: int, on_exit: OnExit | None = None) -> None:
        super().__init__(name=f"runner-{vcpu_id}", daemon=True)
        self.vm, self.vcpu_id, self.on_exit = vm, vcpu_id, on_exit
        self.active = threading.Event()
        self.error: BaseException | None = None
        self.debug_exits = 0

    def run(self) -> None:
        """The thread's body."""
        # pytest-timeout's SIGALRM is for the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _SYNCHRONOUS)
        try:
            self.vm.activate_cpu(self.vcpu_id)
            try:
                self.active.set()
                while self._one_exit():
                    pass
            finally:
                self.vm.deactivate_cpu(self.vcpu_id)
        except BaseException as error:
            self.error = error
        finally:
            self.active.set()

    def _one_exit(self) -> bool:
        exit = self.vm.run(self.vcpu_id)
        if isinstance(exit, exits.Ended):
            return False
        if isinstance(exit, exits.Debug):
            self.debug_exits += 1
        if isinstance(exit, (exits.Debug, exits.Hlt)):
            self.vm.sleep(self.vcpu_id)
        elif self.on_exit is not None:
            self.on_exit(exit)
        else:
            raise AssertionError(f"vCPU {self.vcpu_id} left the guest: {exit}")
        return True


class Bench(Lab):
    """The laboratory guest on the hypervisor layer.  A context manager.

    Either call enter() on the thread that made it, or start() a Runner for each vCPU.
    """

    def __init__(
        self, code: bytes, mode: LabMode = LabMode.LONG, *, cpus: int = 1, irqchip: bool = False
    ) -> None:
        """Prepare `cpus` vCPUs at `code`, to which a `hlt` is appended."""
        self.mode = mode
        self.runners: dict[int, Runner] = {}
        self._signals = signal.pthread_sigmask(signal.SIG_BLOCK, set())
        self.vcpu: handles.VcpuHandle | None = None  # vCPU 0, for Lab's methods
        self._here = False  # enter() was called: vCPU 0 belongs to this thread
        self.vm = VM(cpus=cpus, irqchip=irqchip)
        try:
            self.memory = self.vm.memory
            self.memory.add_slot(0, RAM)
            self._lay_out_memory()
            if mode in (LabMode.LONG, LabMode.USER):
                present_writable_user_large = 0x87
                entry = MMIO_GPA | present_writable_user_large
                self.write(PAGE_TABLES + 0x2000 + 8, entry.to_bytes(8, "little"))
            self.write(CODE, code + HALT)
            for vcpu_id in range(cpus):
                self.add_vcpu(vcpu_id)
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_vcpu(self, vcpu_id: int) -> None:
        """Create a vCPU that is to start at the code, with a counter and a stack of its own."""
        self.vm.create_vcpu(vcpu_id)
        first, self.vcpu = self.vcpu, self.vm.state(vcpu_id)
        self._set_entry_state()
        if self.mode is not LabMode.REAL:
            regs = self.vcpu.get(kvm.kvm_regs)
            regs.rdi = COUNTERS + 64 * vcpu_id
            if vcpu_id:
                regs.rsp = STACK + 0x40000 + 0x1000 * vcpu_id
            self.vcpu.set(regs)
        self.vcpu = first or self.vcpu

    def close(self) -> None:
        """End the VM and its runners; fails when one does not end or met an error."""
        self.vm.end()
        late = [runner for runner in self.runners.values() if not _joined(runner)]
        for runner in late:  # so that the tests that follow are not disturbed
            while runner.is_alive():
                self.vm._vcpus[runner.vcpu_id].attention = True
                self.vm.kick(runner.vcpu_id)
                runner.join(0.01)
        if self._here:
            self.vm.deactivate_cpu(0)
        self.vm.close()
        if KICK_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, set()):
            while signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
                pass  # test_kicks.py has a test that there are none
        signal.pthread_sigmask(signal.SIG_SETMASK, self._signals)
        assert not late, f"{[runner.name for runner in late]} went on after end()"
        for runner in self.runners.values():
            if runner.error is not None:
                raise runner.error

    # --- on the caller's thread ---

    def activate(self) -> None:
        """Make vCPU 0 the calling thread's, if it is not yet."""
        if not self._here:
            self.vm.activate_cpu(0)
            self._here = True

    def enter(self) -> exits.Exit:
        """vm.run(0) on the calling thread."""
        self.activate()
        return self.vm.run(0)

    # --- on threads ---

    def start(self, vcpu_id: int = 0, on_exit: OnExit | None = None) -> Runner:
        """Run a vCPU on a thread of its own; returns when it is active."""
        runner = self.runners[vcpu_id] = Runner(self.vm, vcpu_id, on_exit)
        runner.start()
        assert runner.active.wait(PATIENCE)
        return runner

    def start_all(self) -> None:
        """start() for each vCPU that was made at the beginning."""
        for vcpu_id in sorted(self.vm._vcpus):
            self.start(vcpu_id)

    def counter(self, vcpu_id: int = 0) -> int:
        """How often the vCPU went through COUNT_FOREVER."""
        return self.read_u64(COUNTERS + 64 * vcpu_id)

    def wait_runs(self, vcpu_id: int = 0) -> None:
        """Wait until the vCPU counts."""
        self.wait_ran(vcpu_id, self.counter(vcpu_id))

    def wait_ran(self, vcpu_id: int, before: int) -> None:
        """Wait until the vCPU's counter is not what it was `before`."""
        for _ in range(200):  # quicker than a sleep when it is about to
            if self.counter(vcpu_id) != before:
                return
            os.sched_yield()
        wait_until(lambda: self.counter(vcpu_id) != before, f"vCPU {vcpu_id} counts")

    def wait_handler(self, vector: int) -> None:
        """Wait until vCPU 0 has halted in the handler of an exception, and leave it parked."""
        for attempt in range(12):
            self.park()
            if self.delivered_vector() == vector:
                return
            self.vm.resume_cpu(0)
            time.sleep(0.001 * 2**attempt)  # longer each time: a slow host must get somewhere
        raise AssertionError(f"the handler of vector {vector} never runs")

    def park(self, *vcpu_ids: int) -> None:
        """Suspend vCPUs (0 when none is named) and wait until they are parked."""
        for vcpu_id in vcpu_ids or (0,):
            self.vm.suspend_cpu(vcpu_id)
        assert self.vm.wait_parked(vcpu_ids or (0,), PATIENCE) == frozenset(), "never parked"


def _joined(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return not thread.is_alive()


@functools.cache
def slowness() -> float:
    """How many times slower this host is at exits than a machine of our days; at least 1."""
    out_forever = b"\xe6\x10\xeb\xfc"  # 1: out 0x10, al; jmp 1b
    with Bench(out_forever) as bench:
        for _ in range(10):
            bench.enter()
        start, exits_made = time.perf_counter(), 0
        while time.perf_counter() - start < 0.05:
            bench.enter()
            exits_made += 1
    usual = 0.05 * 80_000
    return max(1.0, usual / exits_made)


def cycles(count: int) -> int:
    """`count` repetitions of something, fewer on a slow (emulated) host, but 5 at least."""
    return max(5, int(count / slowness()))

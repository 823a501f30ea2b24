"""Kicks are never lost: a vCPU that is told to stop does, whatever it was about to do.

Nothing here measures time.  A lost kick shows itself as a stop that is never complete.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from pyvmm import exits, kvm
from pyvmm.cpustate import Register
from pyvmm.debuggedset import ALL
from pyvmm.lab import CODE, HANDLERS
from pyvmm.vcpurecord import KICK_SIGNAL
from pyvmm.x86 import VECTOR_NMI
from tests.support import (
    COUNT_FOREVER,
    COUNTERS,
    HALT,
    PATIENCE,
    Bench,
    cycles,
    requires,
    wait_change,
    wait_until,
)

pytestmark = pytest.mark.kvm

EXIT_FOREVER = b"\xe6\x10\x48\xff\x07\xeb\xf9"  # 1: out 0x10, al; inc qword [rdi]; jmp 1b
HALT_FOREVER = b"\xfb\xf4\x48\xff\x07\xeb\xf9"  # 1: sti; hlt; inc qword [rdi]; jmp 1b


@pytest.fixture(params=["usual-switches", "frequent-switches"])
def switches(request: pytest.FixtureRequest) -> Iterator[None]:
    """With Python's usual change of threads, and with one that interrupts nearly every line."""
    usual = sys.getswitchinterval()
    if request.param == "frequent-switches":
        sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def dawdle(chance: random.Random) -> None:
    """Let a random, short time pass: none at all, or some hundred bytecodes."""
    for _ in range(chance.choice((0, 0, 1, 10, 100, 300))):
        pass


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("code", "count"),
    [(COUNT_FOREVER, 4000), (EXIT_FOREVER, 3000), (HALT, 3000)],
    ids=["spinning", "making-exits", "halted"],
)
def test_suspend_at_a_random_moment_always_stops_the_vcpu(code: bytes, count: int) -> None:
    chance = random.Random(1)
    with Bench(code) as bench:
        vm = bench.vm
        bench.start(on_exit=lambda exit: None)
        for number in range(cycles(count)):
            dawdle(chance)
            vm.suspend_cpu(0)
            dawdle(chance)
            assert not vm.wait_parked([0], PATIENCE), f"kick {number} was lost"
            dawdle(chance)
            vm.resume_cpu(0)
            # Else the thread may not even have woken up, and sleeps on.
            if code != HALT and number % 2:
                bench.wait_runs()


def test_suspend_at_a_random_moment_always_stops_a_vcpu_halted_in_the_kernel() -> None:
    requires("irqchip")
    chance = random.Random(2)
    with Bench(HALT_FOREVER, irqchip=True) as bench:
        vm = bench.vm
        runner, count = bench.start(), cycles(2000)
        for number in range(count):
            vm.suspend_cpu(0)
            assert not vm.wait_parked([0], PATIENCE), f"kick {number} was lost"
            vm.resume_cpu(0)
            dawdle(chance)
            if number % 2:
                wait_until(lambda: not vm._vcpus[0].asleep, "it goes back to the kernel")
        assert runner.debug_exits >= count // 2
        assert bench.counter() == 0, "a kick woke a halted vCPU"


def test_kick_before_the_first_entry_is_not_lost() -> None:
    for _ in range(cycles(200)):
        with Bench(COUNT_FOREVER) as bench:
            bench.start()  # active, and perhaps in the guest, perhaps not yet
            bench.vm.suspend_cpu(0)
            assert not bench.vm.wait_parked([0], PATIENCE)


def test_end_at_a_random_moment_ends_every_vcpu() -> None:
    chance = random.Random(3)
    for _ in range(cycles(150)):
        with Bench(COUNT_FOREVER, cpus=2) as bench:
            bench.start_all()
            dawdle(chance)
            if chance.random() < 0.5:
                bench.vm.suspend_cpu(0)
                dawdle(chance)
            bench.vm.end()
            for runner in bench.runners.values():
                runner.join(PATIENCE)
                assert not runner.is_alive()


def test_kicks_alone_change_nothing() -> None:
    exits_seen: list[exits.Exit] = []
    with Bench(COUNT_FOREVER) as bench:
        bench.start(on_exit=exits_seen.append)
        for _ in range(cycles(3000)):
            bench.vm.kick(0)
        bench.wait_runs()
        bench.park()
        assert bench.vm.get_register(0, Register.RIP) in (CODE, CODE + 3)
        assert not exits_seen


def test_vcpu_in_a_device_can_be_suspended_any_number_of_times() -> None:
    """Kicks must not pile up: the kernel's queue of signals is short, and full it refuses more."""
    in_device, leave_device = threading.Event(), threading.Event()

    def slow_device(exit: exits.Exit) -> None:
        in_device.set()
        leave_device.wait(PATIENCE)

    with Bench(b"\xe6\x10" + COUNT_FOREVER) as bench:  # out 0x10, al
        bench.start(on_exit=slow_device)
        assert in_device.wait(PATIENCE)
        before = _queued_signals()
        for _ in range(1000):
            bench.vm.suspend_cpu(ALL)
            bench.vm.resume_cpu(ALL)
        queued = _queued_signals() - before
        leave_device.set()
        bench.wait_runs()
        # Other processes of this user count, too: some, but not a thousand.
        assert queued < 500, f"{queued} kicks wait for one vCPU"


def _queued_signals() -> int:
    """How many signals of this user are queued."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("SigQ:"))
    return int(line.split()[1].split("/")[0])


def test_thread_that_gives_up_its_vcpu_keeps_no_kick() -> None:
    """With the signal unblocked again, a kick that is left over would kill the process."""
    with Bench(HALT) as bench:
        bench.vm.activate_cpu(0)
        for _ in range(3):
            bench.vm.kick(0)
        bench.vm.end()
        bench.vm.deactivate_cpu(0)
        assert KICK_SIGNAL not in signal.sigpending()


# --- storms ------------------------------------------------------------------------------------


def storm(bench: Bench, seed: int, count: int, failures: list[BaseException]) -> None:
    """Suspend and resume at random, one and all."""
    chance, vm = random.Random(seed), bench.vm
    try:
        for _ in range(count):
            vcpu_id = chance.choice((0, 1, 2, 3, ALL))
            try:
                if chance.random() < 0.5:
                    vm.suspend_cpu(vcpu_id)
                else:
                    vm.resume_cpu(vcpu_id)
            except OSError:
                assert vcpu_id != ALL, "the ALL forms never fail"
            if chance.random() < 0.05:
                vm.wait_parked(vm.debug_cpus(), 0.001)
            dawdle(chance)
    except BaseException as failure:
        failures.append(failure)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("code", [COUNT_FOREVER, EXIT_FOREVER], ids=["spinning", "making-exits"])
def test_after_a_storm_the_last_word_counts(code: bytes) -> None:
    with Bench(code, cpus=4) as bench:
        vm = bench.vm
        for vcpu_id in range(4):
            bench.start(vcpu_id, on_exit=lambda exit: None)
        for round_number in range(4):
            failures: list[BaseException] = []
            threads = [
                threading.Thread(
                    target=storm, args=(bench, 10 * round_number + n, cycles(1000), failures)
                )
                for n in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures
            vm.suspend_cpu(ALL)
            assert not vm.wait_parked(range(4), PATIENCE)
            before = [bench.counter(n) for n in range(4)]
            for vcpu_id in range(4):
                vm.get_register(vcpu_id, Register.RIP)
            assert [bench.counter(n) for n in range(4)] == before, "one ran on"
            vm.resume_cpu(ALL)
            assert vm.debug_cpus() == frozenset()
            for vcpu_id in range(4):
                bench.wait_ran(vcpu_id, before[vcpu_id])


def test_random_nmis_are_delivered_while_the_vcpu_is_suspended_and_resumed() -> None:
    """Each NMI that is raised when the one before has been handled reaches the guest."""
    iretq = b"\x48\xcf"
    count_and_return = b"\x48\xff\x47\x08" + iretq  # inc qword [rdi + 8]; iretq
    chance = random.Random(4)
    with Bench(COUNT_FOREVER) as bench:
        bench.write(HANDLERS + 16 * VECTOR_NMI, count_and_return)
        bench.start()
        for number in range(1, cycles(1000) + 1):
            bench.vm.inject_nmi(0)
            dawdle(chance)
            bench.vm.suspend_cpu(0)
            dawdle(chance)
            bench.vm.resume_cpu(0)
            wait_change(lambda: bench.read_u64(COUNTERS + 8), number - 1, f"NMI {number} arrives")
            assert bench.read_u64(COUNTERS + 8) == number
        bench.park()
        assert bench.vm.state(0).get(kvm.kvm_regs).rsp % 8 == 0

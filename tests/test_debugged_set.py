"""The debugged set: who runs, who does not, and what callers are told."""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable

import pytest

from pyvmm import exits
from pyvmm.cpustate import Register
from pyvmm.debuggedset import ALL
from pyvmm.hypervisor import VM
from pyvmm.lab import CODE, DATA
from pyvmm.vcpurecord import Capability
from tests.support import (
    COUNT_FOREVER,
    HALT,
    MMIO_GPA,
    MMIO_GVA,
    NOP,
    PATIENCE,
    Bench,
    cycles,
    requires,
    wait_change,
    wait_until,
)

pytestmark = pytest.mark.kvm

HALTED_THEN_COUNT = HALT + COUNT_FOREVER


def refusal(call: Callable[..., object], *arguments: object) -> int | None:
    """The errno with which a call is refused."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


# --- executing nothing -----------------------------------------------------------------------


def suspend_and_resume(bench: Bench, vcpu_id: int, count: int) -> None:
    for _ in range(count):
        bench.park(vcpu_id)
        before = bench.counter(vcpu_id)
        rip = bench.vm.get_register(vcpu_id, Register.RIP)
        assert rip in (CODE, CODE + 3)
        assert bench.counter(vcpu_id) == before, "a suspended vCPU changed memory"
        bench.vm.resume_cpu(vcpu_id)
        bench.wait_runs(vcpu_id)


def test_suspended_vcpu_changes_no_memory_until_resumed() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        suspend_and_resume(bench, 0, cycles(3000))


def test_several_threads_suspend_and_resume_a_vcpu_each() -> None:
    with Bench(COUNT_FOREVER, cpus=4) as bench:
        bench.start_all()
        failures: list[BaseException] = []

        def control(vcpu_id: int) -> None:
            try:
                suspend_and_resume(bench, vcpu_id, cycles(500))
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=control, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def test_several_threads_suspend_the_same_vcpu_and_it_stands_still() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        for _ in range(cycles(300)):
            suspenders = [
                threading.Thread(target=bench.vm.suspend_cpu, args=(who,)) for who in (0, ALL, 0)
            ]
            for thread in suspenders:
                thread.start()
            for thread in suspenders:
                thread.join()
            assert not bench.vm.wait_parked([0], PATIENCE)
            before = bench.counter()
            bench.vm.kick(0)
            assert bench.counter() == before
            bench.vm.resume_cpu(ALL)
            bench.wait_runs()


def test_suspend_before_the_first_entry_executes_nothing() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.activate()
        bench.vm.suspend_cpu(0)
        for _ in range(100):
            assert bench.enter() == exits.Debug()
            assert bench.rip == CODE
        assert bench.counter() == 0


def test_running_a_debugged_vcpu_returns_debug_until_it_is_resumed() -> None:
    with Bench(NOP * 3) as bench:
        bench.activate()
        bench.vm.suspend_cpu(0)
        bench.vm.suspend_cpu(0)
        assert [bench.enter() for _ in range(50)] == [exits.Debug()] * 50
        assert bench.vm.get_register(0, Register.RIP) == CODE
        bench.vm.resume_cpu(0)  # once is enough
        assert bench.enter() == exits.Hlt(False)
        assert bench.rip == CODE + 4


def test_thread_of_a_parked_vcpu_sleeps_and_does_not_spin() -> None:
    with Bench(COUNT_FOREVER) as bench:
        runner = bench.start()
        bench.park()
        before = runner.debug_exits
        for _ in range(100):
            bench.vm.suspend_cpu(0)
            bench.vm.kick(0)
        assert not bench.vm.wait_parked([0], PATIENCE)
        assert runner.debug_exits <= before + 1


def test_resuming_a_subset_runs_that_subset() -> None:
    with Bench(COUNT_FOREVER, cpus=4) as bench:
        bench.start_all()
        for chosen in ((1, 3), (0,), (2, 0, 1)):
            bench.vm.suspend_cpu(ALL)
            assert not bench.vm.wait_parked(range(4), PATIENCE)
            assert bench.vm.debug_cpus() == frozenset(range(4))
            before = [bench.counter(n) for n in range(4)]
            for vcpu_id in chosen:
                bench.vm.resume_cpu(vcpu_id)
            for vcpu_id in chosen:
                bench.wait_ran(vcpu_id, before[vcpu_id])
            rest = set(range(4)) - set(chosen)
            assert bench.vm.debug_cpus() == rest
            assert all(bench.counter(n) == before[n] for n in rest)
            bench.vm.resume_cpu(ALL)
            for vcpu_id in range(4):
                bench.wait_runs(vcpu_id)


# --- halted, waiting for SIPI ------------------------------------------------------------------


def test_suspend_and_resume_does_not_wake_a_halted_vcpu() -> None:
    with Bench(HALTED_THEN_COUNT) as bench:
        bench.start()
        wait_until(lambda: bench.vm.halted_cpus() == {0}, "it halts")
        for _ in range(cycles(200)):
            bench.park()
            assert bench.vm.get_register(0, Register.RIP) == CODE + 1
            assert bench.vm.halted_cpus() == {0}
            bench.vm.resume_cpu(0)
        assert bench.counter() == 0
        bench.vm.inject_nmi(0)  # its handler is a hlt, too
        wait_until(lambda: bench.vm.halted_cpus() == {0}, "it halts in the handler")


def test_vcpu_halted_in_the_kernel_parks_and_stays_halted() -> None:
    requires("irqchip")
    with Bench(HALTED_THEN_COUNT, irqchip=True) as bench:
        bench.start()
        for _ in range(cycles(300)):
            bench.park()
            assert bench.vm.get_register(0, Register.RIP) in (CODE, CODE + 1)
            bench.vm.resume_cpu(0)
        assert bench.counter() == 0


def test_vcpu_that_waits_for_its_startup_ipi_parks_and_is_not_started() -> None:
    requires("irqchip")
    with Bench(COUNT_FOREVER, cpus=2, irqchip=True) as bench:
        bench.start_all()
        bench.wait_runs(0)
        for _ in range(cycles(200)):
            bench.vm.suspend_cpu(ALL)
            assert not bench.vm.wait_parked([0, 1], PATIENCE)
            before = bench.counter(0)
            assert bench.vm.get_register(1, Register.RIP) == CODE
            assert bench.counter(0) == before
            bench.vm.resume_cpu(ALL)
        bench.wait_runs(0)
        assert bench.counter(1) == 0, "an application processor started by itself"


# --- order of checks ---------------------------------------------------------------------------


def test_ended_is_looked_at_before_debugged_and_debugged_before_halted() -> None:
    with Bench(HALT) as bench:
        assert bench.enter() == exits.Hlt(False)
        bench.vm.suspend_cpu(0)
        assert bench.enter() == exits.Debug()
        bench.vm.resume_cpu(0)
        assert bench.enter() == exits.Hlt(False), "still halted"
        bench.vm.suspend_cpu(0)
        bench.vm.end()
        assert [bench.enter(), bench.enter()] == [exits.Ended()] * 2


def test_events_are_not_injected_into_a_vcpu_that_parks() -> None:
    with Bench(NOP) as bench:
        bench.activate()
        bench.vm.inject_exception(0, 6)
        bench.vm.inject_nmi(0)
        bench.vm.suspend_cpu(0)
        assert bench.enter() == exits.Debug()
        assert bench.rip == CODE
        assert refusal(bench.vm.inject_exception, 0, 6) == errno.EBUSY, "it still waits"
        bench.vm.resume_cpu(0)
        assert bench.enter() == exits.Hlt(False)
        assert bench.delivered_vector() in (2, 6)  # the NMI may come on top


# --- I/O in flight -----------------------------------------------------------------------------

IN_LOOP = b"\xe4\x10\x48\xff\xc3\xeb\xf9"  # 1: in al, 0x10; inc rbx; jmp 1b
IN_LENGTH = 2
LOAD_LOOP = b"\x8b\x06\x48\xff\xc3\xeb\xf9"  # 1: mov eax, [rsi]; inc rbx; jmp 1b
STORE_LOOP = b"\x48\x89\x06\x48\xff\xc3\xeb\xf8"  # 1: mov [rsi], rax; inc rbx; jmp 1b


@pytest.mark.parametrize(
    ("code", "length", "gva"),
    [(IN_LOOP, 2, 0), (LOAD_LOOP, 2, MMIO_GVA), (LOAD_LOOP, 2, MMIO_GVA + 0xFFE)],
    ids=["port", "mmio", "mmio-over-a-page-boundary"],
)
def test_reads_in_flight_are_complete_in_the_registers_of_a_parked_vcpu(
    code: bytes, length: int, gva: int
) -> None:
    answers = 0
    pieces: list[exits.Exit] = []

    with Bench(code) as bench:
        bench.vm.set_register(0, Register.RSI, gva)

        def device(exit: exits.Exit) -> None:
            nonlocal answers
            assert isinstance(exit, (exits.InOut, exits.Mmio))
            if not isinstance(exit, exits.Mmio) or exit.gpa & 0xFFF or not gva & 0xFFF:
                pieces.append(exit)
            if isinstance(exit, exits.Mmio) and gva & 0xFFF:
                first = exit.gpa == MMIO_GPA + 0xFFE
                answers += first
                value = answers & 0xFFFF
            else:
                answers += 1
                value = answers & 0xFF
            bench.vm.answer(0, value.to_bytes(exit.size, "little"))

        bench.start(on_exit=device)
        for _ in range(cycles(1000)):
            bench.park()
            rip, rbx = (bench.vm.get_register(0, r) for r in (Register.RIP, Register.RBX))
            completed = rbx + (rip == CODE + length)
            assert completed == answers, "an access that was answered is not in the registers"
            rax = bench.vm.get_register(0, Register.RAX)
            if gva & 0xFFF:
                assert rax == (answers & 0xFFFF) * 0x10001
            else:
                assert rax & 0xFF == answers & 0xFF
            before = answers
            bench.vm.resume_cpu(0)
            wait_change(lambda: answers, before, "the guest goes on")


def test_writes_over_a_page_boundary_are_complete_when_parked() -> None:
    written = bytearray()
    with Bench(STORE_LOOP) as bench:
        bench.vm.set_register(0, Register.RSI, MMIO_GVA + 0xFFC)
        bench.vm.set_register(0, Register.RAX, 0x1122334455667788)

        def device(exit: exits.Exit) -> None:
            assert isinstance(exit, exits.Mmio) and exit.is_write
            written.extend(exit.data)

        bench.start(on_exit=device)
        for _ in range(cycles(500)):
            bench.park()
            rip, rbx = (bench.vm.get_register(0, r) for r in (Register.RIP, Register.RBX))
            stores, rest = divmod(len(written), 8)
            assert rest == 0, "half a store was made"
            assert stores == rbx + (rip == CODE + 3)
            before = len(written)
            bench.vm.resume_cpu(0)
            wait_change(lambda: len(written), before, "the guest goes on")
        bench.park()
        assert set(struct.iter_unpack("<Q", written)) == {(0x1122334455667788,)}


def test_repeated_output_is_interrupted_between_two_repetitions() -> None:
    printed = bytearray()
    text = bytes(range(256)) * 8
    with Bench(b"\xf3\x6e") as bench:  # rep outsb
        vm = bench.vm
        bench.write(DATA, text)
        for register, value in ((Register.RDX, 0x10), (Register.RSI, DATA)):
            vm.set_register(0, register, value)
        vm.set_register(0, Register.RCX, len(text))

        def device(exit: exits.Exit) -> None:
            assert isinstance(exit, exits.InOut)
            printed.extend(exit.data)

        bench.start(on_exit=device)
        while vm.halted_cpus() != {0}:
            bench.park()
            rcx, rsi = (vm.get_register(0, r) for r in (Register.RCX, Register.RSI))
            assert len(printed) == len(text) - rcx == rsi - DATA
            vm.resume_cpu(0)
            before = len(printed)
            while len(printed) == before and vm.halted_cpus() != {0}:
                time.sleep(0)
        assert printed == text


# --- coming and going --------------------------------------------------------------------------


def test_vcpu_added_while_all_are_suspended_parks_before_its_first_instruction() -> None:
    with Bench(COUNT_FOREVER, cpus=2) as bench:
        bench.start_all()
        bench.vm.suspend_cpu(ALL)
        assert not bench.vm.wait_parked([0, 1], PATIENCE)
        bench.add_vcpu(2)
        assert bench.vm.active_cpus() == {0, 1}
        assert 2 not in bench.vm.debug_cpus(), "it is not active yet"
        bench.start(2)
        assert bench.vm.debug_cpus() == {0, 1, 2}
        assert not bench.vm.wait_parked([2], PATIENCE)
        assert bench.vm.get_register(2, Register.RIP) == CODE
        assert bench.counter(2) == 0
        bench.vm.resume_cpu(2)
        bench.wait_runs(2)
        bench.vm.resume_cpu(ALL)
        bench.wait_runs(0)
        bench.add_vcpu(3)
        bench.start(3)
        bench.wait_runs(3)


def test_vcpu_whose_thread_leaves_is_neither_active_nor_debugged() -> None:
    with Bench(NOP) as bench:
        bench.vm.activate_cpu(0)
        bench.vm.suspend_cpu(0)
        bench.vm.deactivate_cpu(0)
        assert bench.vm.active_cpus() == bench.vm.debug_cpus() == frozenset()
        assert refusal(bench.vm.suspend_cpu, 0) == errno.EINVAL
        assert bench.enter() == exits.Hlt(False), "activated again, it runs"


def test_second_thread_for_a_running_vcpu_is_refused_at_once() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        bench.wait_runs()
        result: list[int | None] = []

        def intruder() -> None:
            try:
                bench.vm.activate_cpu(0)
            except OSError as error:
                result.append(error.errno)

        thread = threading.Thread(target=intruder, daemon=True)
        thread.start()
        thread.join(3)
        blocked = thread.is_alive()
        bench.vm.end()
        thread.join(PATIENCE)
        assert not blocked, "it waits for the vCPU to leave the guest"
        assert result == [errno.EBUSY]


# --- errors ------------------------------------------------------------------------------------


def test_suspend_and_resume_errors() -> None:
    with Bench(COUNT_FOREVER, cpus=2) as bench:
        vm = bench.vm
        vm.suspend_cpu(ALL)  # nobody is active: fine
        vm.resume_cpu(ALL)
        assert refusal(vm.suspend_cpu, 7) == errno.EINVAL
        assert refusal(vm.suspend_cpu, -2) == errno.EINVAL
        assert refusal(vm.suspend_cpu, 1) == errno.EINVAL, "not active"
        assert refusal(vm.resume_cpu, 7) == errno.EINVAL
        assert refusal(vm.resume_cpu, 0) == errno.EINVAL, "not debugged"
        bench.start(0)
        assert refusal(vm.resume_cpu, 0) == errno.EINVAL, "not debugged"
        vm.suspend_cpu(0)
        vm.suspend_cpu(0)
        assert refusal(vm.suspend_cpu, 1) == errno.EINVAL
        vm.resume_cpu(0)
        assert refusal(vm.resume_cpu, 0) == errno.EINVAL
        vm.resume_cpu(ALL)
        vm.resume_cpu(ALL)
        assert refusal(vm.wait_parked, [7]) == errno.EINVAL
        assert refusal(vm.create_vcpu, 1) == errno.EEXIST


def access_calls(vm: VM) -> list[Callable[[], object]]:
    return [
        lambda: vm.get_register(0, Register.RIP),
        lambda: vm.set_register(0, Register.RAX, 1),
        lambda: vm.get_register(0, Register.GUEST_ENTRY_INST_LENGTH),
        lambda: vm.state(0),
        lambda: vm.inject_exception(0, 6),
        lambda: vm.translate(0, CODE),
        lambda: vm.read_virtual(0, CODE, 1),
        lambda: vm.write_virtual(0, DATA, b"x"),
        lambda: vm.cpu(0),
    ]


def test_registers_and_memory_of_a_running_vcpu_are_busy() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        bench.wait_runs()
        for call in access_calls(bench.vm):
            assert refusal(call) == errno.EBUSY
        bench.park()
        assert bench.vm.read_virtual(0, CODE, 5) == COUNT_FOREVER
        bench.vm.set_register(0, Register.RBX, 5)
        assert bench.vm.get_register(0, Register.RBX) == 5
        bench.vm.resume_cpu(0)
        bench.wait_runs()
        assert refusal(bench.vm.get_register, 0, Register.RIP) == errno.EBUSY


def test_registers_of_an_unknown_vcpu_are_invalid() -> None:
    with Bench(NOP) as bench:
        for call in (bench.vm.get_register, bench.vm.inject_exception, bench.vm.translate):
            assert refusal(call, 9, Register.RIP if call == bench.vm.get_register else 3) == (
                errno.EINVAL
            )
        assert refusal(bench.vm.inject_nmi, 9) == errno.EINVAL
        assert refusal(bench.vm.kick, 9) == errno.EINVAL


@pytest.mark.parametrize("event", ["nmi", "capability", "kick", "suspend"])
def test_parked_vcpu_stays_parked_whatever_is_asked_of_it(event: str) -> None:
    """Its registers must be readable at every moment, and hold still."""
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        bench.park()
        vm = bench.vm
        rip, count = vm.get_register(0, Register.RIP), bench.counter()
        for _ in range(cycles(500)):
            if event == "nmi":
                vm.inject_nmi(0)
            elif event == "capability":
                vm.set_capability(0, Capability.BPT_EXIT, False)
            elif event == "kick":
                vm.kick(0)
            else:
                vm.suspend_cpu(ALL)
            assert vm.get_register(0, Register.RIP) == rip
        assert bench.counter() == count
        assert vm.debug_cpus() == {0}


# --- the end -----------------------------------------------------------------------------------


def test_vm_with_parked_vcpus_ends_at_once() -> None:
    with Bench(COUNT_FOREVER, cpus=3) as bench:
        bench.start_all()
        bench.park(0, 2)
        bench.vm.end()
        for runner in bench.runners.values():
            runner.join(PATIENCE)
            assert not runner.is_alive()
        assert bench.vm.debug_cpus() == bench.vm.active_cpus() == frozenset()
        assert not bench.vm.wait_parked(range(3), PATIENCE)


@pytest.mark.parametrize("resumed", [0, ALL])
def test_end_is_not_forgotten_when_a_parked_vcpu_is_resumed_right_after(resumed: int) -> None:
    with Bench(COUNT_FOREVER) as bench:
        runner = bench.start()
        bench.park()
        bench.vm.end()
        try:
            bench.vm.resume_cpu(resumed)
        except OSError as error:  # its thread may have left already
            assert error.errno == errno.EINVAL
        runner.join(3)
        assert not runner.is_alive(), "it went back to the guest"


def test_end_is_not_forgotten_while_capabilities_change() -> None:
    for _ in range(cycles(200)):
        with Bench(COUNT_FOREVER) as bench:
            bench.start()
            bench.vm.set_capability(0, Capability.BPT_EXIT, False)
            bench.vm.end()
            bench.vm.set_capability(0, Capability.BPT_EXIT, False)
            bench.runners[0].join(3)
            assert not bench.runners[0].is_alive(), "it went back to the guest"


def test_waiting_for_a_vcpu_ends_when_somebody_resumes_it() -> None:
    """A stop that is taken back must not leave the one who waits for it behind."""
    in_device, leave_device = threading.Event(), threading.Event()

    def slow_device(exit: exits.Exit) -> None:
        in_device.set()
        leave_device.wait(PATIENCE)

    with Bench(b"\xe6\x10" + COUNT_FOREVER) as bench:  # out 0x10, al
        bench.start(on_exit=slow_device)
        assert in_device.wait(PATIENCE)
        bench.vm.suspend_cpu(0)
        assert bench.vm.wait_parked([0], 0.05) == {0}, "named as the one that is late"
        waiter = threading.Thread(target=bench.vm.wait_parked, args=([0], PATIENCE), daemon=True)
        waiter.start()
        waiter.join(0.1)  # long enough to begin to wait
        assert waiter.is_alive()
        bench.vm.resume_cpu(0)
        waiter.join(3)
        stuck = waiter.is_alive()
        leave_device.set()
        bench.vm.end()
        waiter.join(PATIENCE)
        assert not stuck

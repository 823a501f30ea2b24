"""Injected exceptions and NMIs: what the guest's own handlers find in their frames."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from pyvmm import exits, kvm
from pyvmm.cpustate import Register
from pyvmm.hostprobe import host
from pyvmm.lab import CODE, HANDLERS, STACK, USER_STACK, LabMode
from pyvmm.vcpurecord import EXECUTE, Capability, HardwareBreakpoint
from pyvmm.x86 import (
    VECTOR_BP,
    VECTOR_DF,
    VECTOR_GP,
    VECTOR_NMI,
    VECTOR_PF,
    VECTOR_UD,
)
from tests.support import COUNT_FOREVER, HALT, NOP, Bench, requires, wait_until
from tests.test_breakpoint_exits import assert_handled_by_guest, intercepts, want_breakpoints

pytestmark = pytest.mark.kvm

LENGTH = Register.GUEST_ENTRY_INST_LENGTH
WRONG_LENGTHS = [0, 2, 5, 15]  # for an int3 of one byte


def refusal(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def hit_int3(bench: Bench) -> exits.Exit:
    """Run to the int3, where it leaves the guest."""
    want_breakpoints(bench)
    exit = bench.enter()
    assert isinstance(exit, exits.Bpt)
    return exit


# --- a guest's own breakpoint, handed back -----------------------------------------------------


@pytest.mark.parametrize("form", ["cc", "66cc", "f3cc", "66" * 14 + "cc"])
@pytest.mark.parametrize("mode", LabMode)
def test_breakpoint_handed_back_returns_behind_the_int3(mode: LabMode, form: str) -> None:
    code = bytes.fromhex(form)
    with Bench(code + NOP * 20, mode) as bench:
        start = bench.rip
        if not intercepts(mode):
            want_breakpoints(bench)
            assert_handled_by_guest(bench, start + len(code))
            return
        exit = hit_int3(bench)
        assert isinstance(exit, exits.Bpt)
        bench.vm.set_register(0, LENGTH, exit.inst_length)
        bench.vm.inject_exception(0, VECTOR_BP)
        assert_handled_by_guest(bench, start + len(code))


@pytest.mark.parametrize("length", WRONG_LENGTHS)
@pytest.mark.parametrize("mode", LabMode)
def test_saved_rip_is_rip_plus_the_length_that_was_asked_for(mode: LabMode, length: int) -> None:
    with Bench(b"\xcc" + NOP * 20, mode) as bench:
        start = bench.rip
        if not intercepts(mode):
            want_breakpoints(bench)
            assert_handled_by_guest(bench, start + 1)
            return
        hit_int3(bench)
        bench.vm.set_register(0, LENGTH, length)
        bench.vm.inject_exception(0, VECTOR_BP)
        assert_handled_by_guest(bench, start + length)


@pytest.mark.parametrize("mode", LabMode)
def test_restart_instruction_returns_to_the_int3(mode: LabMode) -> None:
    with Bench(b"\x66\xcc" + NOP * 20, mode) as bench:
        start = bench.rip
        if not intercepts(mode):
            want_breakpoints(bench)
            assert_handled_by_guest(bench, start + 2)
            return
        hit_int3(bench)
        bench.vm.set_register(0, LENGTH, 2)
        bench.vm.inject_exception(0, VECTOR_BP, restart_instruction=True)
        assert_handled_by_guest(bench, start)


@pytest.mark.parametrize("mode", LabMode)
def test_breakpoint_is_handed_back_many_times(mode: LabMode) -> None:
    """The guest returns from each and runs into the next: int3 of one byte, two, one, ..."""
    ret = {LabMode.LONG: "48cf", LabMode.USER: "48cf"}.get(mode, "cf")
    if mode is LabMode.PROTECTED and not host().iret32:
        ret = "83c40cff6424f4"  # add esp, 12; jmp [esp - 12]: the frame's EIP; CS is the same
    lengths = [1, 2, 1, 3, 1]
    end = b"\x0f\x0b" if mode is LabMode.USER else HALT  # ud2 where hlt is not allowed
    code = b"".join(b"\xf3" * (length - 1) + b"\xcc" for length in lengths) + end
    with Bench(code, mode) as bench:
        bench.write(HANDLERS + 16 * VECTOR_BP, bytes.fromhex(ret))
        want_breakpoints(bench)
        seen = []
        while isinstance(exit := bench.enter(), exits.Bpt):
            seen.append(exit.inst_length)
            bench.vm.set_register(0, LENGTH, exit.inst_length)
            bench.vm.inject_exception(0, VECTOR_BP)
        assert isinstance(exit, exits.Hlt)
        assert bench.delivered_vector() == (VECTOR_UD if mode is LabMode.USER else None)
        assert seen == (lengths if intercepts(mode) else [])


@pytest.mark.parametrize("length", [0, 1, 2, 5])
@pytest.mark.parametrize("mode", LabMode)
def test_breakpoint_can_be_injected_where_there_was_none(mode: LabMode, length: int) -> None:
    """No int3 has left the guest before: an exception out of the blue, at a nop."""
    with Bench(NOP * 20, mode) as bench:
        start = bench.rip
        bench.vm.set_register(0, LENGTH, length)
        bench.vm.inject_exception(0, VECTOR_BP)
        exit = bench.enter()
        assert isinstance(exit, exits.Hlt), exit
        assert bench.delivered_vector() == VECTOR_BP
        assert bench.pushed_rip() == start + length


def test_breakpoint_is_handed_back_after_other_debug_exits_came_between() -> None:
    """A step or a hardware breakpoint must not change what the host adds to RIP."""
    requires("breakpoint")  # else there is nothing to hand back
    with Bench(b"\x66\xcc" + NOP * 20) as bench:
        vm = bench.vm
        hit_int3(bench)
        vm.set_register(0, Register.RIP, rip := CODE + 2)
        if host().hardware_breakpoint:
            vm.set_hardware_breakpoints(0, [HardwareBreakpoint(CODE + 6, EXECUTE)])
            assert isinstance(bench.enter(), exits.Db)
            vm.set_hardware_breakpoints(0, [])
            rip = CODE + 6
            assert bench.rip == rip
        vm.set_register(0, LENGTH, 1)
        vm.inject_exception(0, VECTOR_BP)
        assert_handled_by_guest(bench, rip + 1)


@pytest.mark.parametrize("form", ["cc", "66cc"])
def test_int3_that_is_met_while_stepping_is_handed_back(form: str) -> None:
    requires("breakpoint")
    requires("step")
    code = bytes.fromhex(form)
    with Bench(NOP * 2 + code + NOP * 20) as bench:
        vm = bench.vm
        want_breakpoints(bench)
        vm.set_capability(0, Capability.MTRAP_EXIT, True)
        seen: list[exits.Exit] = []
        while not seen or isinstance(seen[-1], exits.Mtrap):
            seen.append(bench.enter())
        assert seen == [exits.Mtrap(), exits.Mtrap(), exits.Bpt(len(code))]
        assert bench.rip == CODE + 2
        vm.set_capability(0, Capability.MTRAP_EXIT, False)
        vm.set_register(0, LENGTH, len(code))
        vm.inject_exception(0, VECTOR_BP)
        assert_handled_by_guest(bench, CODE + 2 + len(code))


def test_a_guests_own_int3_right_behind_io_while_another_vcpu_steps() -> None:
    """Then an int3 leaves the guest although nobody asked, and the I/O is finished by then."""
    requires("irqchip")
    code = b"\xe4\x10" + b"\xcc"  # in al, 0x10; int3
    with Bench(code, cpus=2, irqchip=True) as bench:
        bench.write(HANDLERS + 16 * VECTOR_BP, b"\xe6\x11")  # out 0x11, al
        bench.vm.set_capability(1, Capability.MTRAP_EXIT, True)
        assert isinstance(bench.enter(), exits.InOut)
        bench.vm.answer(0, b"\x5a")
        assert bench.enter() == exits.InOut(0x11, 1, False, 1, b"\x5a")


@pytest.mark.parametrize("mode", LabMode)
def test_an_interrupt_on_its_way_is_delivered_before_a_vcpu_parks(mode: LabMode) -> None:
    """KVM has taken it from the controller when a kick comes; then it must not begin a step."""
    requires("irqchip")
    vector = 0x1E  # one for which the laboratory has a handler
    with Bench(NOP * 20, mode, irqchip=True) as bench:
        start = bench.rip
        bench.activate()
        events = bench.cpu.get(kvm.kvm_vcpu_events)
        events.interrupt.injected, events.interrupt.nr, events.flags = 1, vector, 0
        bench.cpu.set(events)
        bench.vm.suspend_cpu(0)
        handler = HANDLERS + 16 * vector
        for _ in range(2):
            assert bench.enter() == exits.Debug()
            assert bench.rip == (16 * vector if mode is LabMode.REAL else handler)
        assert bench.pushed_rip() == start
        assert not bench.cpu.get(kvm.kvm_vcpu_events).interrupt.injected
        assert not any(bench.cpu.get(kvm.kvm_sregs).interrupt_bitmap)


def test_lowering_cr8_is_no_exit() -> None:
    """On processors with VMX or SVM it leaves the guest where there is no irqchip."""
    code = bytes.fromhex("b80f000000 440f22c0 31c0 440f22c0 e610")  # mov eax, 15; mov cr8, rax; ...
    with Bench(code) as bench:
        assert bench.enter() == exits.InOut(0x10, 1, False, 1, b"\0")


# --- the pseudo-register -----------------------------------------------------------------------


def test_entry_instruction_length_reads_back() -> None:
    with Bench(NOP) as bench:
        for length in (0, 1, 15):
            bench.vm.set_register(0, LENGTH, length)
            assert bench.vm.get_register(0, LENGTH) == length
        assert refusal(bench.vm.set_register, 0, LENGTH, 16) == errno.EINVAL
        assert refusal(bench.vm.set_register, 0, LENGTH, -1) == errno.EINVAL


# --- any exception -----------------------------------------------------------------------------


def test_second_exception_is_refused_until_the_first_is_delivered() -> None:
    with Bench(NOP) as bench:
        bench.activate()
        bench.vm.inject_exception(0, VECTOR_UD)
        for vector in (VECTOR_UD, VECTOR_BP, VECTOR_GP):
            assert refusal(bench.vm.inject_exception, 0, vector) == errno.EBUSY
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.delivered_vector() == VECTOR_UD
        bench.vm.inject_exception(0, VECTOR_GP, 0)
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.delivered_vector() == VECTOR_GP


def test_refused_injection_changes_nothing() -> None:
    with Bench(NOP) as bench:
        bench.vm.set_register(0, LENGTH, 5)
        bench.vm.inject_exception(0, VECTOR_UD)
        rip = bench.rip
        assert refusal(bench.vm.inject_exception, 0, VECTOR_BP) == errno.EBUSY
        assert bench.rip == rip


@pytest.mark.parametrize("vector", [VECTOR_DF, -1, 32, 33, 255, 1 << 32])
def test_vectors_that_cannot_be_injected_are_invalid(vector: int) -> None:
    with Bench(NOP) as bench:
        assert refusal(bench.vm.inject_exception, 0, vector) == errno.EINVAL
        assert refusal(bench.vm.inject_exception, 5, 3) == errno.EINVAL
        assert bench.enter() == exits.Hlt(False)
        assert bench.rip == CODE + 2, "nothing was injected"


@pytest.mark.parametrize("mode", LabMode)
@pytest.mark.parametrize("vector", [0, VECTOR_UD, VECTOR_GP, VECTOR_PF])
def test_exception_is_delivered_with_its_error_code(mode: LabMode, vector: int) -> None:
    error_code = {VECTOR_GP: 0x1234, VECTOR_PF: 0x7}.get(vector)
    with Bench(NOP, mode) as bench:
        start = bench.rip
        bench.vm.inject_exception(0, vector, error_code)
        if mode is LabMode.REAL:  # there are no error codes
            error_code = None
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.delivered_vector() == vector
        pushed = [bench._pushed(n) for n in range(2)]
        assert pushed == ([start, pushed[1]] if error_code is None else [error_code, start])
        size = {LabMode.REAL: 2, LabMode.PROTECTED: 4}.get(mode, 8)
        words = (5 if size == 8 else 3) + (error_code is not None)
        assert bench.vm.get_register(0, Register.RSP) == STACK - size * words
        if mode is LabMode.USER:
            assert bench._pushed(words - 2) == USER_STACK


@pytest.mark.parametrize("mode", LabMode)
def test_error_code_that_is_left_out_is_zero_where_the_processor_pushes_one(mode: LabMode) -> None:
    with Bench(NOP, mode) as bench:
        start = bench.rip
        bench.vm.inject_exception(0, VECTOR_GP)
        assert isinstance(exit := bench.enter(), exits.Hlt), exit
        assert bench.delivered_vector() == VECTOR_GP
        pushed = [bench._pushed(n) for n in range(2)]
        assert pushed[:1] == [start] if mode is LabMode.REAL else pushed == [0, start]


def test_exception_waits_for_a_parked_vcpu_to_be_resumed() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        assert refusal(bench.vm.inject_exception, 0, VECTOR_UD) == errno.EBUSY, "running"
        bench.park()
        before = bench.counter()
        rip = bench.rip
        bench.vm.inject_exception(0, VECTOR_UD)
        assert not bench.vm.wait_parked([0], 0)
        assert (bench.rip, bench.counter()) == (rip, before)
        assert refusal(bench.vm.inject_exception, 0, VECTOR_UD) == errno.EBUSY, "pending"
        bench.vm.resume_cpu(0)
        bench.wait_handler(VECTOR_UD)
        assert bench.pushed_rip() == rip


def test_exception_wakes_a_halted_vcpu() -> None:
    with Bench(HALT + NOP) as bench:
        bench.start()
        wait_until(lambda: bench.vm.halted_cpus() == {0}, "it halts")
        bench.park()
        bench.vm.inject_exception(0, VECTOR_GP, 0x1234)
        bench.vm.resume_cpu(0)
        bench.wait_handler(VECTOR_GP)
        assert [bench._pushed(0), bench._pushed(1)] == [0x1234, CODE + 1]


def test_exception_is_refused_while_an_access_is_in_flight() -> None:
    with Bench(b"\xe4\x10" + NOP) as bench:  # in al, 0x10
        assert isinstance(bench.enter(), exits.InOut)
        assert refusal(bench.vm.inject_exception, 0, VECTOR_UD) == errno.EBUSY
        bench.vm.answer(0, b"\x5a")
        bench.vm.suspend_cpu(0)
        assert bench.enter() == exits.Debug()
        assert bench.vm.get_register(0, Register.RAX) == 0x5A
        bench.vm.inject_exception(0, VECTOR_UD)
        bench.vm.resume_cpu(0)
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.delivered_vector() == VECTOR_UD
        assert bench.pushed_rip() == CODE + 2


# --- NMI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", LabMode)
def test_nmi_reaches_the_guest(mode: LabMode) -> None:
    with Bench(NOP * 2, mode) as bench:
        start = bench.rip
        bench.vm.inject_nmi(0)
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.delivered_vector() == VECTOR_NMI
        assert bench.pushed_rip() == start


def test_nmi_wakes_a_halted_vcpu() -> None:
    with Bench(HALT) as bench:
        bench.start()
        wait_until(lambda: bench.vm.halted_cpus() == {0}, "it halts")
        bench.park()
        assert bench.rip == CODE + 1
        bench.vm.resume_cpu(0)
        bench.vm.inject_nmi(0)
        bench.wait_handler(VECTOR_NMI)
        assert bench.pushed_rip() == CODE + 1


def test_nmi_wakes_a_vcpu_halted_in_the_kernel() -> None:
    requires("irqchip")
    with Bench(HALT, irqchip=True) as bench:
        bench.start()
        bench.vm.inject_nmi(0)
        bench.wait_handler(VECTOR_NMI)


def test_nmi_interrupts_a_spinning_vcpu() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        bench.wait_runs()
        bench.vm.inject_nmi(0)
        bench.wait_handler(VECTOR_NMI)
        assert bench.pushed_rip() in (CODE, CODE + 3)


def test_nmi_waits_for_a_suspended_vcpu_to_be_resumed() -> None:
    with Bench(COUNT_FOREVER) as bench:
        bench.start()
        bench.park()
        before = bench.counter()
        bench.vm.inject_nmi(0)
        assert not bench.vm.wait_parked([0], 5)
        assert bench.counter() == before
        assert bench.vm.halted_cpus() == frozenset()
        bench.vm.resume_cpu(0)
        bench.wait_handler(VECTOR_NMI)


def test_nmi_to_a_parked_halted_vcpu_wakes_it_when_it_is_resumed() -> None:
    with Bench(HALT) as bench:
        bench.start()
        wait_until(lambda: bench.vm.halted_cpus() == {0}, "it halts")
        bench.park()
        bench.vm.inject_nmi(0)
        assert not bench.vm.wait_parked([0], 5)
        assert bench.vm.state(0).get(kvm.kvm_regs).rip == CODE + 1
        bench.vm.resume_cpu(0)
        bench.wait_handler(VECTOR_NMI)

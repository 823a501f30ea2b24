"""Capabilities: what can be switched, who refuses, and that a switch takes effect."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pyvmm import exits
from pyvmm.cpustate import Register
from pyvmm.hostprobe import HostProbe, host
from pyvmm.lab import CODE
from pyvmm.vcpurecord import EXECUTE, Capability, HardwareBreakpoint
from tests.support import COUNT_FOREVER, NOP, PATIENCE, Bench, requires, wait_until

pytestmark = pytest.mark.kvm


def refusal(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


SWITCHABLE = [
    (Capability.BPT_EXIT, lambda: host().breakpoint),
    (Capability.MTRAP_EXIT, lambda: host().step),
]


@pytest.mark.parametrize(("capability", "possible"), SWITCHABLE)
def test_capability_reads_back(capability: Capability, possible: Callable[[], bool]) -> None:
    with Bench(NOP, cpus=2) as bench:
        vm = bench.vm
        assert not vm.get_capability(0, capability), "off at first"
        if not possible():
            assert refusal(vm.set_capability, 0, capability, True) == errno.ENOTSUP
            assert not vm.get_capability(0, capability)
        else:
            for on in (True, True, False, False, True):
                vm.set_capability(0, capability, on)
                assert vm.get_capability(0, capability) is on
        vm.set_capability(0, capability, False)  # off is always fine
        assert not vm.get_capability(0, capability)
        assert not vm.get_capability(1, capability), "each vCPU has its own"


@pytest.mark.parametrize("unknown", ["BPT_EXIT", 0, None, -1, 99, Register.RIP])
def test_unknown_capability_is_no_such_entry(unknown: Any) -> None:
    with Bench(NOP) as bench:
        for on in (True, False):
            assert refusal(bench.vm.set_capability, 0, unknown, on) == errno.ENOENT
        assert refusal(bench.vm.get_capability, 0, unknown) == errno.ENOENT


@pytest.mark.parametrize("capability", Capability)
def test_capability_of_an_unknown_vcpu_is_invalid(capability: Capability) -> None:
    with Bench(NOP) as bench:
        for vcpu_id in (1, -1, 99):
            assert refusal(bench.vm.set_capability, vcpu_id, capability, True) == errno.EINVAL
            assert refusal(bench.vm.get_capability, vcpu_id, capability) == errno.EINVAL


@pytest.mark.parametrize(("capability", "possible"), SWITCHABLE)
def test_capability_that_the_host_lacks_is_not_supported(
    capability: Capability, possible: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every host: the probe is told that it found nothing."""
    poor = HostProbe()
    monkeypatch.setitem(vars(poor), "breakpoint", False)
    monkeypatch.setitem(vars(poor), "step", False)
    with Bench(NOP) as bench:
        bench.vm.host = poor
        assert refusal(bench.vm.set_capability, 0, capability, True) == errno.ENOTSUP
        assert not bench.vm.get_capability(0, capability)
        bench.vm.set_capability(0, capability, False)
        assert bench.enter() == exits.Hlt(False), "the vCPU is as it was"


@pytest.mark.parametrize("irqchip", [False, True], ids=["no-irqchip", "irqchip"])
def test_hlt_exit_is_on_exactly_where_no_irqchip_waits_in_the_kernel(irqchip: bool) -> None:
    if irqchip:
        requires("irqchip")
    with Bench(NOP, irqchip=irqchip) as bench:
        vm = bench.vm
        assert vm.get_capability(0, Capability.HLT_EXIT) is not irqchip
        vm.set_capability(0, Capability.HLT_EXIT, not irqchip)
        assert refusal(vm.set_capability, 0, Capability.HLT_EXIT, irqchip) == errno.ENOTSUP
        assert vm.get_capability(0, Capability.HLT_EXIT) is not irqchip


def test_capability_takes_effect_on_a_vcpu_that_is_running() -> None:
    """Switched on while the guest runs into its int3 over and over, which its handler skips."""
    if not host().breakpoint:
        with Bench(NOP) as bench:
            assert refusal(bench.vm.set_capability, 0, Capability.BPT_EXIT, True) == errno.ENOTSUP
        return
    from pyvmm.lab import HANDLERS
    from pyvmm.x86 import VECTOR_BP

    seen: list[exits.Exit] = []
    with Bench(b"\x48\xff\x07\xcc\xeb\xfa") as bench:  # 1: inc qword [rdi]; int3; jmp 1b
        bench.write(HANDLERS + 16 * VECTOR_BP, b"\x48\xcf")  # iretq

        def hit(exit: exits.Exit) -> None:
            bench.vm.suspend_cpu(0)  # first: who sees the exit waits until it is parked
            seen.append(exit)

        bench.start(on_exit=hit)
        for _ in range(20):
            bench.wait_runs()
            assert not seen
            bench.vm.set_capability(0, Capability.BPT_EXIT, True)
            wait_until(lambda: bool(seen), "the int3 leaves the guest")
            assert not bench.vm.wait_parked([0], PATIENCE)
            assert bench.vm.get_register(0, Register.RIP) == CODE + 3
            assert seen == [exits.Bpt(1)]
            bench.vm.set_capability(0, Capability.BPT_EXIT, False)
            seen.clear()
            bench.vm.resume_cpu(0)


def test_step_that_is_called_off_lets_the_vcpu_run() -> None:
    if not host().step:
        with Bench(NOP) as bench:
            assert refusal(bench.vm.set_capability, 0, Capability.MTRAP_EXIT, True) == errno.ENOTSUP
        return
    steps: list[exits.Exit] = []
    with Bench(COUNT_FOREVER) as bench:
        bench.start(on_exit=steps.append)
        for _ in range(20):
            bench.wait_runs()
            bench.vm.set_capability(0, Capability.MTRAP_EXIT, True)
            wait_until(lambda: len(steps) > 10, "it steps")
            bench.vm.set_capability(0, Capability.MTRAP_EXIT, False)
            bench.park()
            assert set(steps) == {exits.Mtrap()}
            assert not bench.vm.get_register(0, Register.RFLAGS) & 0x100, "the trap flag is left"
            steps.clear()
            bench.vm.resume_cpu(0)
            bench.wait_runs()
            assert not steps


def test_five_hardware_breakpoints_are_too_many() -> None:
    five = [HardwareBreakpoint(CODE + n, EXECUTE) for n in range(5)]
    with Bench(NOP) as bench:
        assert refusal(bench.vm.set_hardware_breakpoints, 0, five) == errno.ENOSPC
        assert refusal(bench.vm.set_hardware_breakpoints, 4, five[:1]) == errno.EINVAL
        assert bench.enter() == exits.Hlt(False)


@pytest.mark.parametrize("number", range(4))
def test_hardware_breakpoint_is_a_db_exit_with_its_number(number: int) -> None:
    requires("hw-breakpoint")
    elsewhere = [HardwareBreakpoint(CODE + 0x800 + n, EXECUTE) for n in range(number)]
    with Bench(NOP * 8) as bench:
        bench.vm.set_hardware_breakpoints(0, [*elsewhere, HardwareBreakpoint(CODE + 3, EXECUTE)])
        exit = bench.enter()
        assert isinstance(exit, exits.Db)
        assert exit.dr6 & 0xF == 1 << number
        assert bench.rip == CODE + 3
        bench.vm.set_hardware_breakpoints(0, [])
        assert bench.enter() == exits.Hlt(False)

"""A debugger and a guest with interrupts and several processors.

What a debugger does with vCPUs that all start at the entry is in test_run_control.py; a reset while
a debugger keeps some parked is in test_reset.py.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvmm import idle
from pyvmm.hostprobe import host
from pyvmm.stop import StopReason
from tests.gdb_client import gdb_batch, needs_gdb, serving
from tests.rsp_client import BASE, COUNT, RDI, RIP, RSP, Debuggee, RspClient
from tests.smp_guests import (
    AP,
    EOI,
    FIXED,
    FOREVER,
    HANDLERS,
    ICR_LOW,
    IDLE,
    IRETQ,
    LOAD_IDT,
    NMI_VECTOR,
    OTHERS,
    POWER_OFF,
    SLEEP,
    TICK,
    TICKS,
    TIMER_VECTOR,
    TRAMPOLINE,
    UD2,
    increment,
    lapic,
    out8,
    smp_image,
    start_ap,
    start_aps,
    start_timer,
    u32,
    until,
)
from tests.support import cycles, requires
from tests.test_run_control import assert_clean

pytestmark = pytest.mark.kvm


@pytest.fixture(autouse=True)
def irqchip() -> None:
    requires("irqchip")


HANDLER_STEPS = 4  # more than a handler has instructions
START = BASE + 15  # of what a test gives for the first processor
AP_NOP, AP_INC, AP_JMP = AP + 9, AP + 10, AP + 13  # of COUNT, which the others run
AP_FOREVER = AP + len(COUNT)  # where some have FOREVER
ARRIVED = TICKS + 4  # GPA
ARRIVE = increment(ARRIVED)
SPIN_NOP = START + 11
SPIN = bytes.fromhex("31ff") + COUNT  # xor edi, edi: the first processor counts in counter 0
VECTOR_UD, VECTOR_BP = 6, 3
UD_HANDLER = HANDLERS + 0x100 * VECTOR_UD
SKIP_UD = bytes.fromhex("48830424 02") + IRETQ  # add qword [rsp], 2; iretq
START_RESET = bytes.fromhex("90") + out8(0x64, 0xFE) + FOREVER


@contextmanager
def debugging(
    bsp: bytes,
    ap: bytes = COUNT,
    handlers: Mapping[int, bytes] | None = None,
    *,
    cpus: int = 2,
) -> Iterator[tuple[RspClient, Debuggee]]:
    """A client attached to a machine that waits before its first instruction."""
    with Debuggee(smp_image(bsp, ap, handlers), cpus=cpus, irqchip=True) as debuggee:
        with debuggee.connect() as client:
            yield client, debuggee


def states(client: RspClient) -> list[str]:
    """What `info threads` shows of each vCPU: "not started", "halted" or "running"."""
    listed = client.ask("qfThreadInfo").decode()[1:].split(",")
    texts = [bytes.fromhex(client.ask(f"qThreadExtraInfo,{n}").decode()).decode() for n in listed]
    return [text.split(", ")[1] for text in texts]


# --- threads that are not started ----------------------------------------------------------------


def test_threads_say_that_they_are_not_started() -> None:
    with debugging(start_ap(2) + SPIN, cpus=3) as (client, debuggee):
        assert states(client) == ["running", "not started", "not started"]
        assert client.register(RIP, 1) == 0xFFFF_FFF0, "the reset vector, linear"
        client.go()
        debuggee.wait_counts(2)
        client.break_in()
        assert states(client) == ["running", "not started", "running"]
        lines = client.monitor("vcpus").splitlines()
        assert ["not started" in line for line in lines] == [False, True, False]
        assert lines[1].startswith("vCPU 1: rip 0xfff0, not started, ")


def test_breakpoints_in_the_kernel_can_be_set_with_any_thread_selected() -> None:
    """One that is not started is in real mode, from where the kernel cannot even be reached."""
    requires("breakpoint")
    with debugging(SPIN) as (client, debuggee):
        client.select(1)
        client.insert(SPIN_NOP)
        stop = client.resume()
        assert (stop.vcpu_id, stop.rip) == (0, SPIN_NOP)
        client.select(1)
        client.remove(SPIN_NOP)
        client.go()
        debuggee.wait_counts()


def test_not_started_and_suspended_are_two_things() -> None:
    """A processor that gets its start-up IPI while it is parked is started, and stays parked."""
    with debugging(until(TICKS, 1) + start_aps() + SPIN, cpus=3) as (client, debuggee):
        client.go("vCont;c:1;c:3")
        debuggee.machine.write_memory(TICKS, b"\1", physical=True)
        debuggee.wait_counts(2)
        client.break_in()
        assert states(client) == ["running", "running", "running"]
        assert debuggee.counter(1) == 0
        assert client.register(RIP, 1) == TRAMPOLINE, "where it was sent to"
        client.go()
        debuggee.wait_counts(1)
        client.break_in()


def test_a_register_of_a_vcpu_that_is_not_started_can_be_read_and_written() -> None:
    with debugging(SPIN) as (client, debuggee):
        client.set_register(RDI, 0x1234, 1)
        assert client.register(RDI, 1) == 0x1234
        client.go()
        debuggee.wait_counts()
        client.break_in()
        assert states(client)[1] == "not started"


# --- breakpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["software", "hardware"])
def test_a_breakpoint_from_before_the_startup_ipi_stops_each_processor(kind: int) -> None:
    requires("hw-breakpoint" if kind else "breakpoint")
    with debugging(start_aps() + SPIN, COUNT + FOREVER, cpus=4) as (client, debuggee):
        client.insert(AP_NOP, kind)
        assert states(client)[1:] == ["not started"] * 3
        stopped = []
        for _ in range(3):
            stop = client.resume()
            assert (stop.rip, ("hwbreak" if kind else "swbreak") in stop) == (AP_NOP, True)
            stopped.append(stop.vcpu_id)
            client.set_register(RIP, AP_FOREVER, stop.vcpu_id)
        assert sorted(stopped) == [1, 2, 3]
        client.remove(AP_NOP, kind)
        for vcpu_id in stopped:
            assert debuggee.counter(vcpu_id) == 0
            client.set_register(RIP, AP_INC, vcpu_id)
        client.go()
        for vcpu_id in range(4):
            debuggee.wait_counts(vcpu_id)
        client.break_in()


def test_a_hardware_breakpoint_stops_a_processor_at_its_first_instruction() -> None:
    requires("hw-breakpoint")
    requires("real-mode")
    with debugging(start_aps() + SPIN) as (client, debuggee):
        client.insert(TRAMPOLINE, kind=1)
        stop = client.resume()
        # gdb compares this with its breakpoints: so not IP, which is 0.
        assert (stop.vcpu_id, stop.rip, "hwbreak" in stop) == (1, TRAMPOLINE, True)
        client.set_register(RIP, TRAMPOLINE, 1)
        assert "real mode" in client.monitor("vcpus").splitlines()[1]
        client.remove(TRAMPOLINE, kind=1)
        client.go()
        debuggee.wait_counts(1)
        client.break_in()


def test_a_watchpoint_stops_the_processor_that_writes() -> None:
    requires("watchpoint")
    with debugging(start_aps() + SPIN, cpus=3) as (client, debuggee):
        client.insert(0x20000 + 2 * 64, kind=2, length=8)
        stop = client.resume()
        assert (stop.vcpu_id, stop.rip, debuggee.counter(2)) == (2, AP_JMP, 1)


def test_breakpoints_of_two_processors_at_the_same_time_are_both_reported() -> None:
    requires("breakpoint")
    with debugging(start_aps() + SPIN, COUNT + FOREVER, cpus=3) as (client, debuggee):
        client.go()
        debuggee.wait_counts(1)
        debuggee.wait_counts(2)
        client.break_in()
        client.insert(AP_NOP)
        for _ in range(cycles(30)):
            stopped = []
            for _ in range(2):
                stop = client.resume()
                assert (stop.rip, "swbreak" in stop) == (AP_NOP, True)
                stopped.append(stop.vcpu_id)
                client.set_register(RIP, AP_FOREVER, stop.vcpu_id)
            assert sorted(stopped) == [1, 2]
            for vcpu_id in stopped:
                client.set_register(RIP, AP_INC, vcpu_id)


def test_the_guests_own_int3_reaches_it_on_every_processor() -> None:
    requires("own-int3")
    ap = LOAD_IDT + b"\xcc" + COUNT
    handlers = {VECTOR_BP: increment(TICKS) + IRETQ}
    with debugging(LOAD_IDT + b"\xcc" + start_aps() + SPIN, ap, handlers, cpus=3) as (
        client,
        debuggee,
    ):
        if host().breakpoint:
            client.insert(BASE + 0x700)  # elsewhere: int3 leaves the guest from now on
        client.go()
        for vcpu_id in range(3):
            debuggee.wait_counts(vcpu_id)
        client.break_in()
        assert u32(debuggee.machine, TICKS) == 3


# --- breakpoints and resets ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["software", "hardware"])
def test_breakpoints_and_the_debugger_survive_a_reset_of_the_guest(kind: int) -> None:
    requires("hw-breakpoint" if kind else "breakpoint")
    with debugging(START_RESET) as (client, debuggee):
        resets: list[None] = []
        debuggee.machine.on_reset(lambda: resets.append(None))
        client.insert(START, kind)
        for count in range(10):
            stop = client.resume()
            assert (stop.vcpu_id, stop.rip, len(resets)) == (0, START, count)
            assert client.read(START, 1) == b"\x90"
            client.set_register(RIP, START + 1)
        client.remove(START, kind)
        client.go()
        debuggee.wait_for(lambda: len(resets) > 12, "it goes on resetting")
        client.break_in()
        client.detach()


def test_a_breakpoint_on_another_processor_stops_it_after_each_reset() -> None:
    requires("breakpoint")
    with debugging(start_aps() + FOREVER, b"\x90" + out8(0xCF9, 6) + FOREVER) as (client, _):
        client.insert(AP)
        for _ in range(5):
            stop = client.resume()
            assert (stop.vcpu_id, stop.rip) == (1, AP)
            client.set_register(RIP, AP + 1)


def test_code_that_the_guest_has_not_loaded_yet_is_not_patched_after_a_reset() -> None:
    """mov byte [F], 0x90, before a breakpoint is put there: after a reset there are zeros."""
    requires("breakpoint")
    f = 0x200000
    write = bytes.fromhex("c60425") + struct.pack("<IB", f, 0x90) + b"\x90"
    with debugging(write + START_RESET) as (client, debuggee):
        client.insert(START + 8)
        client.resume()
        client.insert(f)
        client.set_register(RIP, START + 9)
        assert client.resume().rip == START + 8
        assert debuggee.memory(f, 1) == b"\x90", "the guest's own byte, written anew"
        client.remove(f)
        assert debuggee.memory(f, 1) == b"\x90"


# --- steps ---------------------------------------------------------------------------------------


def test_steps_while_the_others_run_and_while_they_are_parked() -> None:
    requires("step")
    with debugging(start_aps() + SPIN, cpus=3) as (client, debuggee):
        client.go()
        for vcpu_id in range(3):
            debuggee.wait_counts(vcpu_id)
        client.break_in()
        parked = debuggee.counter(1), debuggee.counter(2)
        rip = client.register(RIP, 0)
        cycle = [START + len(start_aps()) + 2 + n for n in (9, 10, 13)]
        for _ in range(cycles(300)):
            stop = client.step()
            assert (stop.vcpu_id, stop.rip in cycle, stop.rip != rip) == (0, True, True)
            rip = stop.rip
        assert (debuggee.counter(1), debuggee.counter(2)) == parked
        for _ in range(cycles(300)):
            stop = client.resume("vCont;s:1;c")
            assert (stop.vcpu_id, stop.rip in cycle, stop.rip != rip) == (0, True, True)
            rip = stop.rip
        client.go()
        for vcpu_id in range(3):
            debuggee.wait_counts(vcpu_id)
        client.break_in()


def test_thousands_of_steps_never_land_in_the_timers_handler() -> None:
    requires("step")
    handlers = {TIMER_VECTOR: TICK}
    with debugging(start_timer(500_000) + b"\xfb" + SPIN, handlers=handlers) as (client, debuggee):
        client.go()
        debuggee.wait_for(lambda: u32(debuggee.machine, TICKS) > 3, "the timer ticks")
        stop = client.break_in()
        for _ in range(HANDLER_STEPS):
            if stop.rip < HANDLERS:
                break
            stop = client.step()  # on a slow host the next tick is always due: run, it stays there
        for _ in range(cycles(3000)):
            assert BASE <= client.step().rip < AP
        ticks = u32(debuggee.machine, TICKS)
        client.go()
        debuggee.wait_for(lambda: u32(debuggee.machine, TICKS) > ticks + 3, "it ticks on")
        client.break_in()


def test_steps_inside_of_the_timers_handler_come_back_out() -> None:
    requires("step")
    requires("breakpoint")
    handlers = {TIMER_VECTOR: TICK}
    with debugging(start_timer() + b"\xfb" + SPIN, handlers=handlers) as (client, _):
        at = HANDLERS + 0x100 * TIMER_VECTOR
        client.insert(at)
        for _ in range(5):
            assert client.resume().rip == at
            client.remove(at)
            assert client.step().rip == at + 8, "lock inc"
            assert client.step().rip == at + 18, "the end of interrupt"
            assert BASE <= client.step().rip < AP, "iretq: the next tick has to wait"
            client.insert(at)


def test_a_step_over_an_instruction_that_faults_ends_at_its_handler() -> None:
    requires("step")
    requires("breakpoint")
    handlers = {VECTOR_UD: SKIP_UD}
    with debugging(LOAD_IDT + UD2 + FOREVER, handlers=handlers) as (client, _):
        client.insert(START + len(LOAD_IDT))
        stop = client.resume()
        client.remove(stop.rip)
        assert client.step().rip == UD_HANDLER
        assert not client.read_u64(client.register(RSP) + 16) & 0x100, "TF is on the guest's stack"
        assert client.step().rip == UD_HANDLER + 5
        assert client.step().rip == stop.rip + 2


def test_others_take_exceptions_while_one_steps() -> None:
    """vCPU 1 runs into an exception all the time, at whose handler steps of vCPU 0 plant a trap."""
    requires("step")
    requires("breakpoint")
    # 1: ud2; inc qword [COUNTERS + 64]; jmp 1b
    ap = LOAD_IDT + UD2 + bytes.fromhex("48ff042540000200 ebf4")
    handlers = {VECTOR_UD: SKIP_UD}
    with debugging(LOAD_IDT + start_aps() + SPIN, ap, handlers) as (client, debuggee):
        client.go()
        debuggee.wait_counts(1)
        client.break_in()
        for _ in range(cycles(100)):
            assert client.resume("vCont;s:1;c").vcpu_id == 0
        client.go()
        debuggee.wait_counts(1)
        debuggee.wait_counts(0)
        client.break_in()
        assert debuggee.memory(UD_HANDLER, len(SKIP_UD)) == SKIP_UD


def test_a_step_of_a_processor_that_is_not_started_waits_for_its_startup_ipi() -> None:
    """Meanwhile the first processor runs, hits a breakpoint, and steps."""
    requires("step")
    requires("breakpoint")
    with debugging(SPIN + bytes(16), cpus=2) as (client, debuggee):
        client.go("vCont;s:2;c:1")
        debuggee.wait_counts(0)
        assert client.silent()
        assert client.break_in().signal == 2
        client.insert(START + 2 + 9)
        for _ in range(5):
            stop = client.resume("vCont;s:2;c:1")
            assert (stop.vcpu_id, stop.rip) == (0, START + 2 + 9)
            client.set_register(RIP, stop.rip + 1, 0)
        client.remove(START + 2 + 9)
        for _ in range(5):
            assert client.resume("vCont;s").vcpu_id == 0, "both are to step"
        client.detach()
        debuggee.wait_counts(0)
        assert_clean(debuggee)


def test_a_step_of_a_processor_that_is_not_started_ends_when_it_is() -> None:
    """On emulated Intel at its first instruction, whose page is cold; elsewhere behind it."""
    requires("step")
    requires("step-real")
    with debugging(until(TICKS, 1) + start_aps() + SPIN) as (client, debuggee):
        client.go("vCont;s:2;c")
        assert client.silent()
        debuggee.machine.write_memory(TICKS, b"\1", physical=True)
        stop = client.wait_stop()
        assert (stop.vcpu_id, stop.signal, stop.rip - TRAMPOLINE in (0, 7)) == (1, 5, True)
        if stop.rip == 0:
            assert client.step(1).rip == 7
        client.go()
        debuggee.wait_counts(1)
        client.break_in()


def test_a_processor_is_stepped_from_real_mode_into_64_bit_mode() -> None:
    """It was started while it was parked, so it has not executed anything yet."""
    requires("step")
    requires("step-real")
    with debugging(start_aps() + SPIN) as (client, debuggee):
        client.go("vCont;s:2")
        assert client.silent()
        client.break_in()
        assert client.register(RIP, 1) == 0xFFFF_FFF0
        client.go("vCont;c:1")
        debuggee.wait_counts(0)
        client.break_in()
        assert client.register(RIP, 1) == TRAMPOLINE
        offsets = (7, 13, 16, 22, 25, 31, 34, 40, 42, 48, 51)
        rips = [client.step(1).rip for _ in range(len(offsets) + 3)]
        assert rips[: len(offsets)] == [TRAMPOLINE + offset for offset in offsets]
        assert rips[-3] == TRAMPOLINE + 0x41, "the far jump"
        assert rips[-1] > rips[-3]
        assert "64-bit mode" in client.monitor("vcpus").splitlines()[1]
        client.go()
        debuggee.wait_counts(1)
        client.break_in()


def test_the_start_of_the_others_is_stepped_over() -> None:
    requires("step")
    with debugging(start_aps() + SPIN, cpus=3) as (client, debuggee):
        rips = [client.resume("vCont;s:1;c").rip for _ in range(5)]
        assert rips == [BASE + 5, START, START + 10, START + 20, START + 30]
        client.go("vCont;c:2;c:3")
        debuggee.wait_counts(1)
        debuggee.wait_counts(2)
        client.break_in()
        assert client.register(RIP, 0) == START + 30


def test_a_step_of_a_halted_processor_waits_for_its_interrupt() -> None:
    requires("step")
    handlers = {NMI_VECTOR: increment(TICKS) + IRETQ}
    # One SIPI only: KVM wakes a halted processor by a second one that comes late.
    image = start_ap(1) + until(TICKS, 1) + SPIN, ARRIVE + LOAD_IDT + IDLE + b"\x90"
    with debugging(*image, handlers=handlers) as (client, debuggee):
        client.go()
        idle = AP + len(ARRIVE + LOAD_IDT)
        debuggee.wait_for(lambda: halts(debuggee, 1), "it halts")
        client.break_in()
        assert (client.register(RIP, 1), states(client)[1]) == (idle + 2, "halted")
        client.go("vCont;s:2;c")
        assert client.silent()
        debuggee.machine.write_memory(TICKS, b"\1", physical=True)
        debuggee.wait_counts(0)
        assert client.silent(), "nothing has woken it"
        assert client.break_in().signal == 2
        assert client.register(RIP, 1) == idle + 2
        client.monitor("inject-nmi 1")
        client.detach()
        debuggee.wait_for(lambda: u32(debuggee.machine, TICKS) == 2, "the NMI wakes it")


def halts(debuggee: Debuggee, vcpu_id: int) -> bool:
    """Whether the vCPU has executed ARRIVE and waits now (a statistic of KVM, for it may run)."""
    idle = debuggee.machine._idle
    arrived = u32(debuggee.machine, ARRIVED) != 0
    return arrived and idle is not None and idle._waiting[vcpu_id].read() != 0


def test_a_step_over_hlt_goes_on_behind_it() -> None:
    requires("step")
    with debugging(b"\xf4\x90" + SPIN) as (client, debuggee):
        while (rip := client.step().rip) != START + 1:
            assert rip <= START
        assert client.step().rip == START + 2
        client.go()
        debuggee.wait_counts(0)
        client.break_in()


# --- ^C, coming and going ------------------------------------------------------------------------


def test_interrupt_while_all_wait() -> None:
    """vCPU 0 idles with interrupts on, 1 is halted, 2 is not started."""
    with debugging(start_ap(1) + IDLE, ARRIVE + SLEEP, cpus=3) as (client, debuggee):
        client.go()
        debuggee.wait_for(lambda: halts(debuggee, 0) and halts(debuggee, 1), "they halt")
        for _ in range(cycles(50)):
            assert client.break_in().signal == 2
            assert states(client) == ["halted", "halted", "not started"]
            client.go()
        client.break_in()


def test_the_look_whether_an_idle_guest_has_ended_never_holds_what_a_debugger_has_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with debugging(LOAD_IDT + IDLE, cpus=1) as (client, debuggee):
        client.go()

        class Overtaken:
            """A statistic that the debugger's stop comes before."""

            def __init__(self, handle: object, name: str) -> None:
                self._name = name

            def read(self) -> int:
                if self._name == "blocking":
                    assert client.break_in().signal == 2
                return 1

        tester, ask = threading.get_ident(), debuggee.vm.all_wait_for_good

        def look() -> bool:
            if threading.get_ident() != tester:  # the machine has a watch of its own
                return ask()
            assert BASE <= client.register(RIP) < AP
            return False

        monkeypatch.setattr(idle, "Statistic", Overtaken)
        monkeypatch.setattr(debuggee.vm, "all_wait_for_good", look)
        watch = idle.IdleWatch(debuggee.vm)
        for _ in range(5):
            assert not watch.check()
            assert BASE <= client.register(RIP) < AP
            client.go()
        client.break_in()


# Interrupts that each lead to the next one, so that to lose one ends it: a ball that two processors
# throw each other, and a UART that has sent a byte. A vector that is higher comes first.
BALL_VECTOR, UART_VECTOR = 0x2E, 0x22
BALL, TWICE = TICKS + 8, TICKS + 12  # GPAs: whether it is in the air, and how often it was not
IOAPIC = 0xFEC00000 - 0xFEE00000 & 0xFFFFFFFF  # seen from RBX, the local APIC
THROW = increment(BALL) + lapic(ICR_LOW, OTHERS | FIXED | BALL_VECTOR)
CATCH = (  # lock dec dword [BALL]; jz 1f; lock inc dword [TWICE]; 1: ...
    bytes.fromhex("f0ff0c25") + struct.pack("<I", BALL) + b"\x74\x08" + increment(TWICE)
    + increment(TICKS) + EOI + THROW + IRETQ
)  # fmt: skip
SEND = (  # push rax; push rdx; mov dx, 0x3fa; in al, dx; ...; pop rdx; pop rax
    bytes.fromhex("5052 66bafa03 ec") + out8(0x3F8, ord("x")) + EOI + bytes.fromhex("5a58") + IRETQ
)
START_UART = (
    out8(0x21, 0xFF)  # no interrupt by the PIC
    + lapic(IOAPIC, 0x18) + lapic(IOAPIC + 0x10, UART_VECTOR)  # pin 4: the vector,
    + lapic(IOAPIC, 0x19) + lapic(IOAPIC + 0x10, 0)  # and the first processor
    + out8(0x3F9, 2)
)  # fmt: skip


def test_thousands_of_stops_lose_no_interrupt_and_deliver_none_twice() -> None:
    printed = bytearray()
    bsp = LOAD_IDT + start_aps() + until(ARRIVED, 1) + START_UART + THROW + IDLE
    image = smp_image(bsp, LOAD_IDT + ARRIVE + IDLE, {BALL_VECTOR: CATCH, UART_VECTOR: SEND})
    with (
        Debuggee(image, cpus=2, irqchip=True, output=printed.extend) as debuggee,
        debuggee.connect() as client,
    ):
        machine = debuggee.machine
        client.go()
        for number in range(cycles(3000)):
            throws, sent = u32(machine, TICKS), len(printed)
            debuggee.wait_for(lambda n=throws: u32(machine, TICKS) != n, "the next throw")
            debuggee.wait_for(lambda n=sent: len(printed) != n, "the next byte")
            time.sleep(number % 10 * 0.0001)
            assert client.break_in().signal == 2
            assert u32(machine, TWICE) == 0
            client.go()
        client.break_in()


def test_a_guest_that_is_halted_for_good_ends_under_a_debugger_too() -> None:
    with debugging(start_aps() + SLEEP, SLEEP, cpus=3) as (client, debuggee):
        assert client.resume().kind == "W"
        assert debuggee.wait_end().reason is StopReason.HALTED


def test_a_guest_does_not_end_while_the_debugger_keeps_a_processor_parked() -> None:
    with debugging(start_aps() + ARRIVE + SLEEP, cpus=2) as (client, debuggee):
        client.go("vCont;c:1")
        debuggee.wait_for(lambda: halts(debuggee, 0), "it halts")
        time.sleep(0.3)
        assert not debuggee.vm.ended
        assert client.break_in().signal == 2
        client.go()
        debuggee.wait_counts(1)
        client.break_in()


def test_detach_and_attach_again() -> None:
    requires("breakpoint")
    with Debuggee(smp_image(start_aps() + SPIN), cpus=3, irqchip=True) as debuggee:
        for _ in range(5):
            with debuggee.connect() as client:
                client.insert(AP_NOP)
                assert client.resume().rip == AP_NOP
                client.detach()
            for vcpu_id in range(3):
                debuggee.wait_counts(vcpu_id)
            assert debuggee.memory(AP_NOP, 1) == b"\x90"
            assert_clean(debuggee)


def test_a_debugger_that_vanishes_while_processors_are_not_started() -> None:
    requires("breakpoint")
    bsp = until(TICKS, 1) + start_aps() + SPIN
    with Debuggee(smp_image(bsp), cpus=3, irqchip=True) as debuggee:
        client = debuggee.connect()
        client.insert(AP_NOP)
        client.go("vCont;c:1")
        client.close()
        debuggee.wait_for(lambda: debuggee.memory(AP_NOP, 1) == b"\x90", "it is taken out")
        debuggee.machine.write_memory(TICKS, b"\1", physical=True)
        for vcpu_id in range(3):
            debuggee.wait_counts(vcpu_id)


def test_kill_with_processors_in_every_state() -> None:
    with debugging(start_ap(1) + SPIN, ARRIVE + SLEEP, cpus=3) as (client, debuggee):
        client.go()
        debuggee.wait_for(lambda: halts(debuggee, 1), "it halts")
        assert client.ask("k") == b"X09"
        assert debuggee.wait_end().reason is StopReason.KILLED


def test_a_triple_fault_of_another_processor_stops_all_and_names_it() -> None:
    with debugging(start_aps() + SPIN, UD2, cpus=3) as (client, debuggee):
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("T", 11) and stop.vcpu_id in (1, 2)
        before = debuggee.counter(0)
        time.sleep(0.02)
        assert debuggee.counter(0) == before
        assert client.resume().kind in ("T", "X")


def test_the_end_of_the_guest_is_told_when_an_ap_switches_the_machine_off() -> None:
    with debugging(start_aps() + IDLE, POWER_OFF) as (client, debuggee):
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("W", 0)
        assert debuggee.wait_end().reason is StopReason.POWERED_OFF


# --- monitor -------------------------------------------------------------------------------------


def test_monitor_shows_the_screen() -> None:
    hi = bytes.fromhex("c704250080 0b00 48076907".replace(" ", ""))  # mov dword [0xb8000], "Hi"
    with debugging(hi + SPIN) as (client, debuggee):
        assert "blank" in client.monitor("screen")
        client.go()
        debuggee.wait_counts()
        client.break_in()
        assert client.monitor("screen") == "Hi\n"


def test_monitor_injects_an_nmi_into_a_halted_processor() -> None:
    handlers = {NMI_VECTOR: increment(TICKS) + IRETQ}
    with debugging(start_aps() + SPIN, LOAD_IDT + ARRIVE + SLEEP, handlers) as (client, debuggee):
        client.go()
        debuggee.wait_for(lambda: halts(debuggee, 1), "it halts")
        client.break_in()
        client.monitor("inject-nmi 1")
        client.go()
        debuggee.wait_for(lambda: u32(debuggee.machine, TICKS) == 1, "the handler runs")
        client.break_in()


# --- gdb -----------------------------------------------------------------------------------------


@pytest.mark.process
@needs_gdb
def test_gdb_follows_smp_elf_from_before_the_start_of_its_processors(tmp_path: Path) -> None:
    requires("breakpoint")
    with serving(tmp_path, "smp.elf", "-c", "3") as guest:
        text = gdb_batch(
            guest, "info threads", "break ap", "continue", "info threads", "print $edi",
            "delete", "hbreak answer_handler", "continue", "delete", "continue",
        )  # fmt: skip
        assert text.count("not started") == 2
        assert "Thread 2" in text and "ap () at smp.S" in text
        assert "answer_handler () at smp.S" in text
        assert "exited normally" in text
        assert guest.wait() == 0
        assert guest.output.endswith("smp: ok\n")

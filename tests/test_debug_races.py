"""Races of run control: several vCPUs that stop at once, and debuggers that go at any moment.

The guest counts behind the breakpoint, so that what was executed can be held against what was
reported.  Delays are random, but seeded; CPython's switch interval is varied to force other
interleavings.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from pyvmm import exits
from pyvmm.boot.entry import GDT_GPA, PAGE_TABLES_GPA
from pyvmm.debug import DebugServer, parse_address
from pyvmm.hypervisor import VM
from pyvmm.machine import Machine
from pyvmm.stop import Stop, StopReason
from pyvmm.target import SIGINT
from pyvmm.vcpu import StopVm
from tests.rsp_client import (
    BASE,
    COUNT,
    COUNT_INC,
    COUNT_JMP,
    COUNT_NOP,
    COUNTERS,
    EFLAGS,
    PATIENCE,
    RAM,
    RIP,
    Closed,
    Debuggee,
    RspClient,
    flat_image,
    frame,
)
from tests.support import cycles, requires, wait_until
from tests.test_run_control import assert_clean, hit_together

pytestmark = pytest.mark.kvm


@pytest.fixture(params=[0.005, 0.00002], ids=["5 ms slices", "20 us slices"])
def switch_interval(request: pytest.FixtureRequest) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def masked(debuggee: Debuggee, cpus: int = 4) -> bytes:
    """Guest memory without what the guest itself changes: counters, accessed bits of its paging."""
    memory = bytearray(debuggee.memory())
    memory[PAGE_TABLES_GPA:GDT_GPA] = bytes(GDT_GPA - PAGE_TABLES_GPA)
    memory[COUNTERS : COUNTERS + 64 * cpus] = bytes(64 * cpus)
    return bytes(memory)


def assert_undisturbed(debuggee: Debuggee, before: bytes, cpus: int) -> None:
    """The guest runs on all vCPUs as if no debugger had ever been there, and another can attach."""
    # The server may not have seen yet that the debugger is gone: it will stop and resume them all.
    wait_until(lambda: debuggee.server._connection is None, "the debugger is not dropped")
    for vcpu_id in range(cpus):
        debuggee.wait_counts(vcpu_id)
    assert masked(debuggee) == before, "guest memory has changed"
    assert_clean(debuggee)
    with debuggee.connect() as client:
        assert client.why().kind == "T"
        client.detach()
    for vcpu_id in range(cpus):
        debuggee.wait_counts(vcpu_id)


# --- several vCPUs at one breakpoint -------------------------------------------------------------


@pytest.mark.parametrize("cpus", [2, 4])
@pytest.mark.timeout(300)
def test_each_hit_of_a_breakpoint_is_reported_exactly_once(
    cpus: int, switch_interval: None
) -> None:
    """A vCPU's counter says how often it went on behind the breakpoint."""
    hits = [0] * cpus
    with Debuggee(COUNT, cpus=cpus) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_NOP)
        for _ in range(cycles(1500)):
            stop = client.resume()
            assert (stop.rip, "swbreak" in stop) == (COUNT_NOP, True)
            who = stop.vcpu_id
            assert debuggee.counter(who) == hits[who], f"vCPU {who}: a hit was lost or made up"
            hits[who] += 1
            client.set_register(RIP, COUNT_INC)  # past the breakpoint
        assert min(hits) > 0, f"some vCPUs starve: {hits}"


@pytest.mark.timeout(300)
def test_hits_stepped_over_as_gdb_does_are_reported_exactly_once(switch_interval: None) -> None:
    """Remove, step this vCPU alone, insert again, continue all."""
    requires("step")
    hits = [0] * 3
    with Debuggee(COUNT, cpus=3) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_NOP)
        for _ in range(cycles(400)):
            stop = client.resume()
            who = stop.vcpu_id
            assert stop.rip == COUNT_NOP
            assert debuggee.counter(who) == hits[who]
            hits[who] += 1
            client.remove(COUNT_NOP)
            stop = client.step(who)
            assert (stop.vcpu_id, stop.rip) == (who, COUNT_INC)
            client.insert(COUNT_NOP)
        assert min(hits) > 0


def test_vcpus_are_resumed_in_turn_so_that_none_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host with one CPU the first to be woken hits before the others have run at all."""
    resumed: list[int] = []
    last_report = [0] * 3
    with Debuggee(COUNT, cpus=3) as debuggee, debuggee.connect() as client:
        resume_cpu = debuggee.vm.resume_cpu

        def recorded(vcpu_id: int) -> None:
            resumed.append(vcpu_id)
            resume_cpu(vcpu_id)

        monkeypatch.setattr(debuggee.vm, "resume_cpu", recorded)
        client.insert(COUNT_NOP)
        for round in range(1, 31):
            resumed.clear()
            who = client.resume().vcpu_id
            # None is resumed where an event was owed.
            assert resumed in ([], sorted(range(3), key=lambda vcpu_id: last_report[vcpu_id]))
            last_report[who] = round
            client.set_register(RIP, COUNT_INC)
        monkeypatch.undo()


@pytest.mark.timeout(300)
def test_two_breakpoints_hit_at_once_by_different_vcpus() -> None:
    reports = {0: 0, 1: 0}
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        where = {COUNT_NOP: COUNT_INC, COUNT_JMP: COUNT_NOP}
        for address in where:
            client.insert(address)
        for _ in range(cycles(800)):
            stop = client.resume()
            reports[stop.vcpu_id] += 1
            if stop.rip == COUNT_JMP:  # the second of each round: the counter is one further
                assert debuggee.counter(stop.vcpu_id) * 2 == reports[stop.vcpu_id]
            client.set_register(RIP, where[stop.rip])


@pytest.mark.timeout(120)
def test_breakpoint_removed_while_another_vcpu_waits_to_report_it() -> None:
    """The waiting vCPU executes the guest's own instruction, and its event is discarded."""
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        for _ in range(cycles(100)):
            client.insert(COUNT_NOP)
            _, other = hit_together(client, debuggee, exits.Bpt)
            client.remove(COUNT_NOP)
            before = debuggee.counter(other)
            client.go()
            debuggee.wait_counts(0)
            debuggee.wait_counts(1)
            assert client.break_in().signal == 2
            assert debuggee.counter(other) > before


@pytest.mark.timeout(120)
def test_the_waiting_vcpus_event_is_reported_before_anybody_runs() -> None:
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_NOP)
        for _ in range(cycles(100)):
            who, other = hit_together(client, debuggee, exits.Bpt)
            before = debuggee.counter(0), debuggee.counter(1)
            client.set_register(RIP, COUNT_INC, who)
            stop = client.resume()
            assert (stop.vcpu_id, stop.rip) == (other, COUNT_NOP)
            assert (debuggee.counter(0), debuggee.counter(1)) == before
            client.set_register(RIP, COUNT_INC)


def test_a_waiting_vcpu_that_is_not_resumed_keeps_its_event() -> None:
    requires("step")
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_NOP)
        who, other = hit_together(client, debuggee, exits.Bpt)
        client.set_register(RIP, COUNT_INC, who)
        for rip in (COUNT_JMP, COUNT_NOP):
            stop = client.step(who)
            assert (stop.vcpu_id, stop.rip) == (who, rip)
        stop = client.resume(f"vCont;c:{other + 1}")
        assert (stop.vcpu_id, stop.rip, "swbreak" in stop) == (other, COUNT_NOP, True)


@pytest.mark.timeout(120)
def test_step_of_one_while_the_others_run_into_a_breakpoint() -> None:
    """Either the step is reported or a hit, and whatever was not comes later."""
    requires("step")
    with Debuggee(COUNT, cpus=3) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_INC)
        seen = set()
        for count in range(300):
            if "step" in seen and count >= cycles(300):
                break
            stop = client.resume("vCont;s:1;c")
            seen.add("hit" if "swbreak" in stop else "step")
            if "swbreak" in stop:
                assert stop.rip == COUNT_INC
                client.write(COUNTERS + 64 * stop.vcpu_id, bytes(8))
                client.set_register(RIP, COUNT_JMP)
            else:
                assert stop.vcpu_id == 0
        assert "step" in seen


@pytest.mark.timeout(120)
def test_two_vcpus_that_crash_at_once_are_both_shown() -> None:
    ud2 = bytes.fromhex("0f0b")
    with Debuggee(ud2, cpus=2) as debuggee, debuggee.connect() as client:
        first = client.resume()
        assert (first.kind, first.signal) == ("T", 11)
        states = debuggee.server.run_control._states
        other = 1 - first.vcpu_id
        assert f"vCPU {first.vcpu_id}: SHUTDOWN" in client.console
        assert f"vCPU {other}: SHUTDOWN" not in client.console, "it is told with its own stop"
        waits = other in states and states[other].owed is not None
        last = client.resume()
        assert not waits or last.kind == "T", "a crash that waited to be shown was not"
        if last.kind == "T":  # else the first crash has ended the VM before the second
            assert (last.signal, last.vcpu_id) == (11, other)
            assert f"vCPU {other}: SHUTDOWN" in client.console
            last = client.resume()
        assert (last.kind, last.signal) == ("X", 11)


def end_late(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> threading.Event:
    """Whoever ends the VM takes a while for it; the event is set when that begins."""
    end, ending = machine.stop, threading.Event()

    def stop(stop: Stop) -> None:
        ending.set()
        time.sleep(0.05)
        end(stop)

    monkeypatch.setattr(machine, "stop", stop)
    return ending


@pytest.mark.timeout(120)
def test_no_stop_is_told_while_a_vcpu_ends_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the last that the debugger hears: nobody would owe it that the VM has ended."""
    # ud2; mov ecx, 5000; 1: dec ecx; jnz 1b; ud2
    code = bytes.fromhex("0f0b b988130000 ffc9 75fc 0f0b")
    with Debuggee(code, cpus=2) as debuggee, debuggee.connect() as client:
        assert client.resume("vCont;c:1").signal == 11
        client.set_register(RIP, BASE + 2, vcpu_id=1)
        ending = end_late(monkeypatch, debuggee.machine)  # the other vCPU crashes meanwhile
        stop = client.resume()
        if stop.kind == "T":  # the other was so fast that the first has not gone on at all
            assert not ending.is_set()
            stop = client.resume()
        assert stop.kind == "X"


# --- ^C at any moment ----------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_interrupts_among_breakpoints_give_one_stop_for_each_resume(switch_interval: None) -> None:
    """^C at random: before, while or after a vCPU hits; never a stop too many or too few."""
    rng = random.Random(3)
    hits = [0, 0]
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_NOP)
        for _ in range(cycles(600)):
            client.go()
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.001)
            client.interrupt()
            stop = client.wait_stop()
            if stop.signal == 2:
                continue
            who = stop.vcpu_id
            assert stop.rip == COUNT_NOP
            assert debuggee.counter(who) == hits[who]
            hits[who] += 1
            client.set_register(RIP, COUNT_INC, who)
        assert client.silent()


@pytest.mark.timeout(300)
def test_interrupts_among_steps_leave_no_step_armed(switch_interval: None) -> None:
    requires("step")
    rng = random.Random(4)
    order = {BASE: 0, BASE + 3: 1, COUNT_NOP: 2, COUNT_INC: 3, COUNT_JMP: 4}
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        before = masked(debuggee)
        for _ in range(cycles(400)):
            start = client.register(RIP, 0)
            client.go("vCont;s:1")
            time.sleep(rng.random() * 0.0005)
            client.interrupt()
            stop = client.wait_stop()
            assert stop.signal in (2, 5)
            at = client.register(RIP, 0)
            jumped = start == COUNT_JMP and at == COUNT_NOP
            assert at == start or jumped or order[at] == order[start] + 1
            assert not client.register(EFLAGS) & 0x100
            if stop.signal == 5:
                assert at != start
        client.detach()
        assert_undisturbed(debuggee, before, 2)


def test_interrupt_before_the_first_continue_and_at_once_after_it() -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.interrupt()
        client.send_raw(frame(b"vCont;c") + b"\x03")
        assert client.wait_stop().signal == 2
        assert client.silent()


# --- debuggers that vanish -----------------------------------------------------------------------


def _running(client: RspClient, debuggee: Debuggee) -> None:
    client.go()


def _before_the_stop_is_complete(client: RspClient, debuggee: Debuggee) -> None:
    client.go()
    debuggee.wait_counts()
    client.interrupt()


def _at_a_breakpoint(client: RspClient, debuggee: Debuggee) -> None:
    client.insert(COUNT_NOP)
    client.resume()


def _with_a_report_owed(client: RspClient, debuggee: Debuggee) -> None:
    client.insert(COUNT_NOP)
    client.go()


def _with_another_vcpus_report_waiting(client: RspClient, debuggee: Debuggee) -> None:
    client.insert(COUNT_NOP)
    hit_together(client, debuggee, exits.Bpt)


def _in_a_step(client: RspClient, debuggee: Debuggee) -> None:
    requires("step")
    client.go("vCont;s:1")


def _in_a_range_step(client: RspClient, debuggee: Debuggee) -> None:
    requires("step")
    client.go(f"vCont;r{BASE:x},{BASE + 0x100:x}:1;c")
    debuggee.wait_counts(0)


def _in_a_step_onto_a_breakpoint(client: RspClient, debuggee: Debuggee) -> None:
    requires("step")
    client.insert(COUNT_NOP)
    client.resume()
    client.go("vCont;s:1;c")


def _with_all_breakpoints(client: RspClient, debuggee: Debuggee) -> None:
    for address in (COUNT_NOP, COUNT_INC, COUNT_JMP):
        client.insert(address)
    if debuggee.vm.host.hardware_breakpoint:
        client.insert(COUNT_INC, kind=1)
    client.go()


def _in_the_middle_of_a_packet(client: RspClient, debuggee: Debuggee) -> None:
    client.insert(COUNT_NOP)
    client.send_raw(frame(b"Z0,%x,1" % COUNT_INC)[:-3])


def _with_unread_replies(client: RspClient, debuggee: Debuggee) -> None:
    client.insert(COUNT_NOP)
    client.send_raw(frame(b"m0,8000") * 300)


def _subset_running(client: RspClient, debuggee: Debuggee) -> None:
    client.go("vCont;c:2")
    debuggee.wait_counts(1)


MOMENTS = [
    _running,
    _before_the_stop_is_complete,
    _at_a_breakpoint,
    _with_a_report_owed,
    _with_another_vcpus_report_waiting,
    _in_a_step,
    _in_a_range_step,
    _in_a_step_onto_a_breakpoint,
    _with_all_breakpoints,
    _in_the_middle_of_a_packet,
    pytest.param(_with_unread_replies, marks=pytest.mark.slow),
    _subset_running,
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__.strip("_"))
@pytest.mark.timeout(300)
def test_a_debugger_that_vanishes_leaves_no_trace(moment: object) -> None:
    """Its socket is closed, without a word, at all kinds of moments; with and without a reset."""
    rng = random.Random(5)
    with Debuggee(COUNT, cpus=2) as debuggee:
        before = masked(debuggee)
        for _ in range(cycles(12)):
            client = debuggee.connect()
            moment(client, debuggee)  # type: ignore[operator]
            time.sleep(rng.choice((0, 0, 0.0001, 0.001, 0.003)))
            client.close()
            assert_undisturbed(debuggee, before, 2)


@pytest.mark.timeout(300)
def test_debuggers_that_come_and_go_at_random_never_kill_the_guest(switch_interval: None) -> None:
    """The guest has no IDT: an exception that it never raised would be its end."""
    rng = random.Random(6)
    with Debuggee(COUNT, cpus=4, wait=False) as debuggee:
        before = masked(debuggee)
        for _ in range(cycles(150)):
            with debuggee.connect() as client:
                for address in rng.sample((COUNT_NOP, COUNT_INC, COUNT_JMP), rng.randrange(4)):
                    client.insert(address)
                client.go()
                for _ in range(rng.randrange(3)):
                    if not client.silent(0.002):  # it has stopped
                        client.go()
                if rng.random() < 0.3:
                    client.interrupt()
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.002)
        assert_undisturbed(debuggee, before, 4)


@pytest.mark.timeout(300)
def test_attach_and_detach_thousands_of_times() -> None:
    with Debuggee(COUNT, cpus=2, wait=False) as debuggee:
        before = masked(debuggee)
        for round in range(cycles(2000)):
            client = debuggee.connect(handshake=False)
            if round % 3 == 0:
                client.send_raw(frame(b"Z0,%x,1" % COUNT_NOP))
                assert client.receive() == b"OK"
            if round % 2:
                client.detach()
            else:
                client.close()
        assert_undisturbed(debuggee, before, 2)


@pytest.mark.timeout(120)
def test_a_vm_that_ends_at_any_moment_is_told_or_closes(switch_interval: None) -> None:
    """mov ecx, N; 1: nop; dec ecx; jnz 1b; hlt: ends while the debugger stops and continues it."""
    rng = random.Random(7)
    for _ in range(cycles(60)):
        turns = rng.randrange(1, 3000)
        code = b"\xb9" + turns.to_bytes(4, "little") + bytes.fromhex("90 ffc9 75fb f4")
        with Debuggee(code) as debuggee, debuggee.connect() as client:
            try:
                while True:
                    client.go()
                    time.sleep(rng.random() * 0.001)
                    client.interrupt()
                    stop = client.wait_stop()
                    if stop.kind == "W":
                        assert stop.signal == 0
                        break
                    assert (stop.kind, stop.signal) == ("T", 2)
            except Closed:
                pytest.fail("the connection was closed without a W packet")
            except TimeoutError:
                pytest.fail(f"no reply after {turns} turns")


# --- the end of the VM at the worst moment -------------------------------------------------------

OUT = bytes.fromhex("66ba0010 ee f4")  # mov dx, 0x1000; out dx, al; hlt


def power_off(offset: int, size: int, value: int) -> None:
    raise StopVm(Stop(StopReason.POWERED_OFF, "off"))


def test_an_end_after_the_server_has_found_a_stop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def write(offset: int, size: int, value: int) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)
        power_off(offset, size, value)

    prepare = partial(Machine.on_port, port=0x1000, write=write)
    with Debuggee(OUT, prepare=prepare) as debuggee, debuggee.connect() as client:
        control = debuggee.server.run_control
        wait_stopped = control.wait_stopped

        def overtaken(timeout: float) -> frozenset[int]:
            if control.stop is not None and control.stop.signal == SIGINT:
                go_on.set()
                debuggee.wait_for(lambda: not debuggee.vm.active_cpus(), "the VM ends")
            return wait_stopped(timeout)

        monkeypatch.setattr(control, "wait_stopped", overtaken)
        client.go()
        assert inside.wait(PATIENCE)
        client.interrupt()
        assert client.wait_stop().kind == "W"


def end_before_the_next(monkeypatch: pytest.MonkeyPatch, vm: VM) -> None:
    """The vCPU that is resumed first ends the VM before the next is resumed."""
    resume = vm.resume_cpu

    def resume_cpu(vcpu_id: int) -> None:
        resume(vcpu_id)
        wait_until(lambda: not vm.active_cpus(), "the VM ends")

    monkeypatch.setattr(vm, "resume_cpu", resume_cpu)


def test_the_first_of_several_that_are_resumed_ends_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = partial(Machine.on_port, port=0x1000, write=power_off)
    with Debuggee(OUT, cpus=3, prepare=prepare) as debuggee, debuggee.connect() as client:
        end_before_the_next(monkeypatch, debuggee.vm)
        assert client.resume().kind == "W"


def test_the_first_that_a_machine_lets_run_ends_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine(flat_image(OUT), cpus=3, irqchip=False, memory=RAM) as machine:
        machine.on_port(0x1000, write=power_off)
        server = DebugServer(machine, parse_address("0"), wait=False)
        try:
            end_before_the_next(monkeypatch, machine.vm)
            assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF
        finally:
            server.close()


def test_a_stop_that_comes_while_the_machine_finds_that_nothing_can_wake_it_is_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requires("irqchip")
    looking = threading.Event()
    cli_hlt = bytes.fromhex("fa f4 ebfd")
    with Debuggee(cli_hlt, irqchip=True) as debuggee, debuggee.connect() as client:
        vm = debuggee.vm
        wait_for_good = vm.all_wait_for_good

        def overtaken() -> bool:
            looking.set()
            debuggee.wait_for(lambda: bool(vm.debug_cpus()), "the debugger stops it")
            return wait_for_good()

        monkeypatch.setattr(vm, "all_wait_for_good", overtaken)
        end_late(monkeypatch, debuggee.machine)
        client.go()
        assert looking.wait(PATIENCE)
        client.interrupt()
        assert client.wait_stop().kind == "W"

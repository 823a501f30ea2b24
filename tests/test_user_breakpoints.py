"""Breakpoints in ring 3: by int3 where the host intercepts it, else by the guard on #GP."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pyvmm import kvm
from pyvmm.machine import Machine
from tests.conftest import GUESTS
from tests.rsp_client import Debuggee, RspClient
from tests.support import cycles, requires

pytestmark = pytest.mark.kvm

CS = 18  # number in the 64-bit target description


def symbols(name: str) -> dict[str, int]:
    """The symbol table of a guest's ELF64 file (System V ABI, "Symbol Table")."""
    elf = (GUESTS / f"{name}.elf").read_bytes()
    at, size, count = (*struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<HH", elf, 0x3A))
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, at + size * n) for n in range(count)]
    table = next(section for section in sections if section[1] == 2)
    names = sections[table[6]]
    found = {}
    for entry in range(table[4], table[4] + table[5], 24):
        name_at, value = struct.unpack_from("<I4xQ", elf, entry)
        start = names[4] + name_at
        found[elf[start : elf.index(b"\0", start)].decode()] = value
    return found


def test_a_breakpoint_in_ring_3_stops_and_the_guests_own_faults_still_reach_it() -> None:
    where = symbols("ring3")
    with Debuggee(GUESTS / "ring3.bin") as debuggee, debuggee.connect() as client:
        # The guest's IDT must be loaded before the breakpoint in ring 3 is resumed over.
        client.insert(where["enter_user"])
        assert client.resume().rip == where["enter_user"]
        client.remove(where["enter_user"])
        client.insert(where["user"])
        stop = client.resume()
        assert stop.rip == where["user"] and "swbreak" in stop
        assert client.register(CS) & 3 == 3
        # From ring 3 a breakpoint in the kernel can be set, too, and a step goes on in ring 3.
        client.remove(where["user"])
        assert client.step().rip != where["user"]
        assert client.register(CS) & 3 == 3
        client.insert(where["system_call"])
        assert client.resume().rip == where["system_call"]
        assert client.register(CS) & 3 == 0
        client.remove(where["system_call"])
        client.insert(where["user"])  # keeps the guard in place while the guest faults
        stop = client.resume()
        assert stop.kind == "W"
        output = debuggee.wait_end()
    assert output.status == 0
    assert b"#GP at" in bytes(debuggee.machine.output)


@pytest.mark.parametrize("order", [("user", "gp_handler"), ("gp_handler", "user")])
def test_a_breakpoint_on_the_gp_handler_and_one_in_ring_3(order: tuple[str, str]) -> None:
    """Where the guard is needed both are on one byte; the guest must not see a fault of ours."""
    where = symbols("ring3")
    with Debuggee(GUESTS / "ring3.bin") as debuggee, debuggee.connect() as client:
        client.insert(where["enter_user"])
        assert client.resume().rip == where["enter_user"]
        client.remove(where["enter_user"])
        clean = client.read(where["gp_handler"], 1)
        for name in order:
            client.insert(where[name])
        stop = client.resume()
        assert stop.rip == where["user"] and "swbreak" in stop
        client.remove(where["user"])
        client.step()
        client.insert(where["user"])
        stop = client.resume()  # the guest ends with a #GP of its own
        assert stop.rip == where["gp_handler"] and "swbreak" in stop
        assert client.read(where["gp_handler"], 1) == clean
        client.remove(where["gp_handler"])
        assert client.read(where["gp_handler"], 1) == clean
        assert client.resume().kind == "W"
        assert debuggee.wait_end().status == 0
    assert b"hello" in bytes(debuggee.machine.output)


def test_a_breakpoint_on_the_gp_handler_outlives_the_guard() -> None:
    """The guest may name another handler; then the guard moves, and the breakpoint does not."""
    where = symbols("ring3")
    gate = where["idt"] + 13 * 16
    with Debuggee(GUESTS / "ring3.bin") as debuggee, debuggee.connect() as client:
        client.insert(where["enter_user"])
        client.resume()
        clean = debuggee.memory(where["gp_handler"], 1)
        client.insert(where["user"])
        client.insert(where["gp_handler"])
        planted = debuggee.memory(where["gp_handler"], 1)
        assert planted != clean
        to = where["system_call"]
        client.write(gate, struct.pack("<H", to & 0xFFFF))
        client.write(gate + 6, struct.pack("<H", to >> 16 & 0xFFFF))
        client.remove(where["enter_user"])
        client.step()
        assert debuggee.memory(where["gp_handler"], 1) == planted
        client.remove(where["gp_handler"])
        client.remove(where["user"])
        assert debuggee.memory(where["gp_handler"], 1) == clean
        assert debuggee.memory(to, 1) == client.read(to, 1)


@contextmanager
def looping_in_ring_3() -> Iterator[tuple[RspClient, Debuggee, int]]:
    """The guest stands at `jmp .` in ring 3: that is the address."""
    where = symbols("ring3")
    with Debuggee(GUESTS / "ring3.bin") as debuggee, debuggee.connect() as client:
        for name in ("enter_user", "user"):
            client.insert(where[name])
            assert client.resume().rip == where[name]
            client.remove(where[name])
        client.write(where["user"], b"\xeb\xfe")
        yield client, debuggee, where["user"]


def exception_pending(debuggee: Debuggee) -> int | None:
    """The vector of what KVM has queued for vCPU 0."""
    exception = debuggee.vm.state(0).get(kvm.kvm_vcpu_events).exception
    return exception.nr if exception.injected or exception.pending else None


@pytest.mark.timeout(120)
def test_an_interrupt_at_a_breakpoint_in_ring_3_leaves_no_fault_of_ours_behind() -> None:
    """Where a planted hlt raises #GP, the stop can come before its delivery."""
    rng = random.Random(1)
    with looping_in_ring_3() as (client, debuggee, user):
        client.insert(user)
        for _ in range(cycles(1500)):
            client.go()
            end = time.perf_counter() + rng.random() * 400e-6
            while time.perf_counter() < end:  # a sleep would not be this short
                pass
            client.interrupt()
            assert client.wait_stop().rip == user
            assert exception_pending(debuggee) is None
        client.remove(user)
        client.go()
        assert client.break_in().rip == user  # a ^C may have been left over
        client.go()
        assert client.silent(), "the guest got a fault that it has not made"
        assert client.break_in().rip == user


@pytest.mark.timeout(120)
def test_an_interrupt_of_steps_in_ring_3_leaves_no_trap_of_ours_behind() -> None:
    requires("step")
    rng = random.Random(2)
    with looping_in_ring_3() as (client, debuggee, user):
        if not (debuggee.vm.host.step_user or debuggee.vm.host.step_user_delivered):
            pytest.skip("host probe: steps in ring 3 are refused")
        for _ in range(cycles(500)):
            client.go(f"vCont;r{user:x},{user + 2:x}:1")
            time.sleep(rng.random() * 2e-3)
            client.interrupt()
            stop = client.wait_stop()
            assert stop.rip == user and client.register(CS) & 3 == 3
            assert exception_pending(debuggee) is None
        client.detach()
        time.sleep(0.05)
        with debuggee.connect() as another:
            assert another.register(16) == user


def test_breakpoints_in_ring_3_of_one_vcpu_hold_while_another_has_no_idt() -> None:
    where = symbols("ring3")
    idle = 0x1FF000

    def prepare(machine: Machine) -> None:
        machine.vm.memory.write(idle, b"\xeb\xfe")
        handle = machine.vm.state(0)
        regs, sregs = handle.get(kvm.kvm_regs), handle.get(kvm.kvm_sregs)
        regs.rip, sregs.idt.limit = idle, 0
        handle.set(regs)
        handle.set(sregs)

    with (
        Debuggee(GUESTS / "ring3.bin", cpus=2, prepare=prepare) as debuggee,
        debuggee.connect() as client,
    ):
        client.insert(where["enter_user"])
        stop = client.resume()
        assert (stop.vcpu_id, stop.rip) == (1, where["enter_user"])
        client.remove(where["enter_user"])
        client.insert(where["user"])
        stop = client.resume("vCont;c")
        assert (stop.vcpu_id, stop.rip) == (1, where["user"])

"""A debugger's stop that finds an exception on its way into the guest's handler.

The guest raises one after the other, and its handler compares what it finds in its frame.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from pyvmm import kvm
from pyvmm.machine import Machine
from pyvmm.x86 import VECTOR_BP, VECTOR_UD
from tests.rsp_client import BASE, COUNTERS, RIP, RSP, Debuggee, RspClient
from tests.support import requires

pytestmark = pytest.mark.kvm

IDT, WRONG, HANDLER, ELSEWHERE = 0x30000, COUNTERS + 64, BASE + 0x40, BASE + 0x80
ROUNDS = 150


class Raiser(NamedTuple):
    """An instruction that raises an exception, and what its handler finds and does."""

    code: str
    vector: int
    saved_rip: int
    skip: int  # how much further the handler returns, in bytes


INT3 = Raiser("cc", VECTOR_BP, BASE + 1, 0)
UD2 = Raiser("0f0b", VECTOR_UD, BASE, 2)


def guest(raiser: Raiser) -> bytes:
    """1: RAISE; pushfq; popfq; inc qword [COUNTERS]; jmp 1b

    handler: cmp qword [rsp], SAVED_RIP; je 2f; inc qword [WRONG]; 2: add qword [rsp], SKIP; iretq
    elsewhere: jmp elsewhere
    """
    loop = bytes.fromhex(raiser.code + "9c9d48ff0425") + struct.pack("<I", COUNTERS)
    loop += b"\xeb" + struct.pack("b", -len(loop) - 2)
    handler = bytes.fromhex("48813c24") + struct.pack("<I", raiser.saved_rip)
    handler += bytes.fromhex("740848ff0425") + struct.pack("<I", WRONG)
    handler += bytes.fromhex("48830424") + bytes((raiser.skip,)) + bytes.fromhex("48cf")
    return loop.ljust(HANDLER - BASE, b"\x90") + handler.ljust(0x40, b"\x90") + b"\xeb\xfe"


@contextmanager
def raising(raiser: Raiser) -> Iterator[tuple[RspClient, Debuggee]]:
    def give_it_an_idt(machine: Machine) -> None:
        handle = machine.vm.state(0)
        sregs = handle.get(kvm.kvm_sregs)
        gate = struct.pack(
            "<HHHHII", HANDLER & 0xFFFF, sregs.cs.selector, 0x8E00, HANDLER >> 16, 0, 0
        )
        machine.vm.memory.write(IDT + 16 * raiser.vector, gate)
        sregs.idt.base, sregs.idt.limit = IDT, 32 * 16 - 1
        handle.set(sregs)

    with Debuggee(guest(raiser), prepare=give_it_an_idt) as debuggee, debuggee.connect() as client:
        client.insert(ELSEWHERE + 8)  # never reached: the guest's own int3 leaves it, too
        yield client, debuggee
        assert debuggee.counter() > 0, "it never came back from its handler"


def stop_somewhere(client: RspClient, chance: random.Random) -> None:
    client.go()
    time.sleep(0.003 * chance.random())
    client.break_in()


@pytest.mark.parametrize("raiser", [INT3, UD2], ids=["int3", "ud2"])
def test_a_step_from_wherever_a_stop_came_is_what_the_guest_would_have_done(raiser: Raiser) -> None:
    requires("step")
    chance = random.Random(3)
    with raising(raiser) as (client, debuggee):
        for _ in range(ROUNDS):
            stop_somewhere(client, chance)
            client.step()
            assert client.read_u64(WRONG) == 0, "the handler has found another address"
        client.go()
        debuggee.wait_counts()
        client.break_in()
        assert client.read_u64(WRONG) == 0


@pytest.mark.parametrize("raiser", [INT3, UD2], ids=["int3", "ud2"])
def test_an_exception_does_not_follow_to_where_a_debugger_sends_the_guest(raiser: Raiser) -> None:
    chance = random.Random(4)
    with raising(raiser) as (client, debuggee):
        stack = client.register(RSP)
        for _ in range(ROUNDS):
            stop_somewhere(client, chance)
            client.set_register(RIP, ELSEWHERE)
            stop_somewhere(client, chance)
            assert client.register(RIP) == ELSEWHERE
            assert client.read_u64(WRONG) == 0, "an exception came from where it was before"
            client.set_register(RIP, BASE)
            client.set_register(RSP, stack)
        client.go()
        debuggee.wait_counts()
        client.break_in()

"""Breakpoints in ring 3: by int3 where the host intercepts it, else by the guard on #GP."""

from __future__ import annotations

import struct

import pytest

from tests.conftest import GUESTS
from tests.rsp_client import Debuggee

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

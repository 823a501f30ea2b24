"""Real gdb, where the host must have it: debug registers, int3 that leaves ring 3, 32-bit paging.

The rest of what gdb is used for is in test_gdb.py. Of the KVM hosts that the tests know, kvm_intel
alone can all of this; there a start of pyvmm and gdb takes ten seconds, so the tests are few, and
not marked `process`: tests.hosts runs them on every host.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gdb_client import Gdb, GdbError, gdb_batch, needs_gdb, serving, write
from tests.support import lacks, requires

pytestmark = [pytest.mark.kvm, needs_gdb]


@contextmanager
def debugging(directory: Path, image: str, *options: object) -> Iterator[Gdb]:
    """A gdb that is connected to a guest before its first instruction."""
    with serving(directory, image, *options) as guest, Gdb() as gdb:
        gdb.connect(guest)
        yield gdb


# ---- Hardware breakpoints ----


def test_hbreak_stops(tmp_path: Path) -> None:
    requires("hw-breakpoint")
    with debugging(tmp_path, "loops.bin") as gdb:
        gdb.execute("hbreak inner")
        for _ in range(3):  # it has to get off the breakpoint each time
            stop = gdb.resume("-exec-continue")
            assert (stop["reason"], stop["frame"]["func"]) == ("breakpoint-hit", "inner")


def test_hbreak_works_before_the_code_is_there(tmp_path: Path) -> None:
    requires("hw-breakpoint")
    nop_there = 0x20_0000
    with debugging(tmp_path, "loops.bin") as gdb:
        gdb.execute(f"hbreak *{nop_there:#x}")
        # mov byte [rax], 0x90; jmp rax: write the code, then go there
        gdb.execute(f"set $rax = {nop_there:#x}")
        write(gdb, gdb.number("$pc"), b"\xc6\x00\x90\xff\xe0")
        stop = gdb.resume("-exec-continue")
        assert (stop["reason"], stop["frame"]["addr"]) == ("breakpoint-hit", f"{nop_there:#018x}")
        assert gdb.memory(nop_there, 1) == b"\x90"


def test_a_fifth_hardware_breakpoint_is_refused(tmp_path: Path) -> None:
    requires("hw-breakpoint")
    five = [f"hbreak *{0x10_0000 + n:#x}" for n in (0x32, 0x33, 0x36, 0x37, 0x3C)]
    with serving(tmp_path, "loops.bin") as loops:
        text = gdb_batch(loops, *five, "continue", "monitor error", "delete 5", "continue")
    assert "You may have requested too many hardware breakpoints" in text
    assert "all four debug registers are in use" in text
    assert "Breakpoint 1, main ()" in text, "the other four work"


# ---- Watchpoints ----


def test_watch_stops_when_the_value_changes(tmp_path: Path) -> None:
    requires("watchpoint")
    with debugging(tmp_path, "cloops.bin") as gdb:
        assert "Hardware watchpoint" in gdb.execute("watch total")
        stop = gdb.resume("-exec-continue")
        assert (stop["reason"], stop["value"]) == ("watchpoint-trigger", {"old": "0", "new": "1"})
        assert gdb.resume("-exec-continue")["value"] == {"old": "1", "new": "2"}


@pytest.mark.parametrize("command", ["rwatch", "awatch"])
def test_rwatch_and_awatch_stop_when_it_is_read(tmp_path: Path, command: str) -> None:
    requires("watchpoint")
    with debugging(tmp_path, "cloops.bin") as gdb:
        gdb.execute(f"{command} total")
        gdb.execute("break 31")  # return (int)total
        reasons = set()
        while (stop := gdb.resume("-exec-continue"))["reason"] != "breakpoint-hit":
            reasons.add(stop["reason"])
        assert reasons == {f"{'read' if command == 'rwatch' else 'access'}-watchpoint-trigger"}


def test_where_watchpoints_never_hit_the_user_is_told_why(tmp_path: Path) -> None:
    lacks("watchpoint")
    with serving(tmp_path, "cloops.bin") as cloops:
        text = gdb_batch(cloops, "watch total", "continue", "monitor error", "info registers rip")
    assert "Could not insert hardware watchpoint 1" in text
    assert "watchpoints never hit on this host" in text
    assert "set can-use-hw-watchpoints 0" in text, "what to do instead"
    assert "<_start>" in text, "nothing has run"


# ---- Ring 3 ----


@pytest.mark.parametrize(
    ("command", "needed"), [("break", "breakpoint-user"), ("hbreak", "hw-breakpoint-user")]
)
def test_breakpoints_in_ring_3(tmp_path: Path, command: str, needed: str) -> None:
    requires(needed)
    with debugging(tmp_path, "ring3.bin") as gdb:
        gdb.execute(f"{command} user_hlt")
        stop = gdb.resume("-exec-continue")
        assert (stop["reason"], stop["frame"]["func"]) == ("breakpoint-hit", "user_hlt")
        assert gdb.number("$cs") & 3 == 3
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"


def test_watch_in_ring_3(tmp_path: Path) -> None:
    requires("watchpoint-user")
    data = 0x18_0000  # in the 2 MiB that ring 3 may use
    with debugging(tmp_path, "ring3.bin") as gdb:
        user = gdb.number("&user")
        write(gdb, user, b"\x48\x89\x04\x25" + struct.pack("<I", data))  # mov [data], rax
        gdb.execute(f"watch *(long *){data:#x}")
        stop = gdb.resume("-exec-continue")
        # The kernel's way to ring 3 has left the address in RAX.
        assert (stop["reason"], int(stop["value"]["new"])) == ("watchpoint-trigger", user)
        assert gdb.number("$cs") & 3 == 3


# ---- Paging in 32-bit mode ----


def turn_paging_on(gdb: Gdb, cr4_bit: int) -> None:
    """Switch to the tables at 0x200000."""
    gdb.execute("set $cr3 = 0x200000")
    gdb.execute(f"set $cr4 = $cr4 | {cr4_bit:#x}")
    gdb.execute("set $cr0 = $cr0 | 0x80000000")


def test_32_bit_paging(tmp_path: Path) -> None:
    requires("paging32")
    with debugging(tmp_path, "hello32.bin", "--mode", "protected") as gdb:
        # A page directory of 4 MiB pages: 0 -> 0, and 0xc0000000 -> 0x800000.
        write(gdb, 0x20_0000, struct.pack("<I", 0x83))
        write(gdb, 0x20_0000 + 4 * 0x300, struct.pack("<I", 0x80_0083))
        write(gdb, 0x80_0010, b"high")
        turn_paging_on(gdb, cr4_bit=0x10)
        assert gdb.memory(0xC000_0010, 4) == b"high"
        assert "PDE" in gdb.execute("monitor translate 0xc0000010")
        with pytest.raises(GdbError, match="Unable to read memory"):
            gdb.memory(0x80_0010, 4)
        gdb.execute("break putc")  # and the guest runs on with it
        assert gdb.resume("-exec-continue")["reason"] == "breakpoint-hit"


def test_pae_paging(tmp_path: Path) -> None:
    requires("paging32")
    with debugging(tmp_path, "hello32.bin", "--mode", "protected") as gdb:
        write(gdb, 0x20_0000, struct.pack("<4Q", 0x20_1001, 0, 0, 0x20_2001))
        write(gdb, 0x20_1000, struct.pack("<Q", 0x83))
        write(gdb, 0x20_2000, struct.pack("<Q", 0x80_0083))
        write(gdb, 0x80_0010, b"high")
        turn_paging_on(gdb, cr4_bit=0x20)
        assert gdb.memory(0xC000_0010, 4) == b"high"
        assert "PAE" in gdb.execute("monitor translate 0xc0000010")
        gdb.execute("break putc")
        assert gdb.resume("-exec-continue")["reason"] == "breakpoint-hit"


@pytest.mark.parametrize("cr4_bit", [0x10, 0x20])
def test_where_there_is_no_32_bit_paging_it_does_not_look_like_success(
    tmp_path: Path, cr4_bit: int
) -> None:
    lacks("paging32")
    with debugging(tmp_path, "hello32.bin", "--mode", "protected") as gdb:
        with pytest.raises(GdbError, match="this host has no paging in 32-bit mode"):
            turn_paging_on(gdb, cr4_bit)
        assert "PG" not in gdb.evaluate("$cr0")
        before = gdb.number("$pc")
        gdb.resume("-exec-step-instruction")
        assert gdb.number("$pc") > before, "a refused write has done something"

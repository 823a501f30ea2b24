"""Run control as a debugger sees it, over a real socket: who runs, what a step is, what stops.

Races are in test_debug_races.py.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from pyvmm import exits, kvm
from pyvmm.boot import Mode, read_image
from pyvmm.debug import DebugServer, parse_address
from pyvmm.debuggedset import ALL
from pyvmm.hostprobe import host
from pyvmm.machine import Machine
from pyvmm.mappings import mappings
from pyvmm.registers import Architecture, layout
from pyvmm.stop import StopReason
from pyvmm.vcpu import VcpuThread
from pyvmm.x86 import CR0_PG, CR4_PAE, DR6_BS, RFLAGS_TF
from tests.conftest import GUESTS
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
    RSI,
    RSP,
    Debuggee,
    Refused,
    RspClient,
    StopReply,
    flat_image,
    frame,
)
from tests.support import requires

pytestmark = pytest.mark.kvm

CR4_PSE = 1 << 4
INT3_AT, AFTER_INT3, BP_HANDLER, INT3_DONE = 0x100018, 0x100019, 0x10002A, 0x100027  # int3.elf
INNER, INNER_ADD, AFTER_ADD, OUTER_LOOP, TOTAL = 0x100074, 0x100078, 0x10007F, 0x10005F, 0x100108


@contextmanager
def debugging(
    guest: bytes | Path, *, cpus: int = 1, features: str = "swbreak+;hwbreak+", **options: object
) -> Iterator[tuple[RspClient, Debuggee]]:
    """A client attached to a machine that waits before its first instruction."""
    with Debuggee(guest, cpus=cpus, **options) as debuggee:  # type: ignore[arg-type]
        with debuggee.connect(features=features) as client:
            yield client, debuggee


def guest(name: str) -> Path:
    return GUESTS / f"{name}.bin"


def assert_clean(debuggee: Debuggee) -> None:
    """No vCPU has a trace of the debugger: no step, trap flag, debug register, masked interrupt."""
    vm = debuggee.vm
    vm.suspend_cpu(ALL)
    assert not vm.wait_parked(vm.vcpu_ids(), 20)
    for vcpu_id in vm.vcpu_ids():
        record = vm._vcpus[vcpu_id]
        debugregs = record.handle.get(kvm.kvm_debugregs)
        assert not record.wanted, f"vCPU {vcpu_id} keeps {record.wanted}"
        assert not record.breakpoints
        assert record.control == 0, f"vCPU {vcpu_id}: KVM_GUESTDBG {record.control:#x} is armed"
        assert not record.handle.get(kvm.kvm_regs).rflags & RFLAGS_TF
        assert not any(debugregs.db) and debugregs.dr7 & ~0x400 == 0
        assert not debugregs.dr6 & DR6_BS
    assert not vm.hlt_traps
    vm.resume_cpu(ALL)


# --- bhyve's mistakes ----------------------------------------------------------------------------


def test_bhyve_feature_names_compared_with_their_plus() -> None:
    with debugging(COUNT, features="swbreak+;hwbreak+") as (client, _):
        assert "swbreak+" in client.features
        client.insert(COUNT_NOP)
        assert "swbreak" in client.resume()
    with debugging(COUNT, features="swbreak-") as (client, _):
        assert "swbreak+" not in client.features
        client.insert(COUNT_NOP)
        stop = client.resume()
        assert (stop.signal, stop.rip) == (5, COUNT_NOP) and "swbreak" not in stop


# vCPU 0 counts, all others halt.
HALT_UNLESS_0 = bytes.fromhex("85ff 7401 f4") + COUNT  # test edi,edi; jz 1f; hlt; 1:


def test_bhyve_interrupt_during_a_step_disarms_the_step() -> None:
    """A step of a halted vCPU waits; ^C ends it, and it must not finish later."""
    requires("step")
    with debugging(HALT_UNLESS_0, cpus=2) as (client, debuggee):
        client.go()
        debuggee.wait_for(lambda: 1 in debuggee.vm.halted_cpus(), "vCPU 1 does not halt")
        client.break_in()
        client.go("vCont;s:2")
        assert client.silent()
        stop = client.break_in()
        assert stop.signal == 2
        client.go()
        debuggee.wait_counts()
        assert client.silent()
        client.break_in()
        client.detach()
        debuggee.wait_counts()
        assert_clean(debuggee)


def test_bhyve_disconnect_during_a_step_leaves_no_trap_flag_and_no_masked_interrupts() -> None:
    requires("step")
    with debugging(HALT_UNLESS_0, cpus=2) as (client, debuggee):
        before = debuggee.memory()
        client.go()
        debuggee.wait_for(lambda: 1 in debuggee.vm.halted_cpus(), "vCPU 1 does not halt")
        client.break_in()
        client.go("vCont;s:2")
        client.close()
        debuggee.wait_counts()
        assert_clean(debuggee)
        assert debuggee.memory()[BASE:] == before[BASE:]


def test_bhyve_disconnect_at_a_breakpoint_injects_no_exception() -> None:
    """The guest has no IDT: an int3 that it is given kills it."""
    with debugging(COUNT, cpus=2) as (client, debuggee):
        before = debuggee.memory()
        client.insert(COUNT_NOP)
        client.resume()
        client.close()
        debuggee.wait_counts(0)
        debuggee.wait_counts(1)
        assert_clean(debuggee)
        assert debuggee.memory()[BASE:] == before[BASE:]


def test_bhyve_attach_and_an_immediate_continue_reports_the_first_stop() -> None:
    with Debuggee(COUNT, cpus=2) as debuggee:
        client = debuggee.connect(handshake=False)
        with client:
            client.send_raw(b"".join(map(frame, (b"Z0,%x,1" % COUNT_NOP, b"c"))))
            assert client.receive() == b"OK"
            assert client.wait_stop().rip == COUNT_NOP
            assert client.silent()


def test_bhyve_two_cursors_for_registers_and_for_running() -> None:
    requires("step")
    with debugging(COUNT, cpus=2) as (client, _):
        client.ok("Hc1")
        client.ok("Hg2")
        assert client.resume("s").vcpu_id == 0
        assert client.register(RIP, 0) == BASE + 3
        assert client.register(RIP, 1) == BASE
        client.ok("Hc2")
        client.ok("Hg1")
        assert client.resume("s").vcpu_id == 1
        assert client.register(RIP, 1) == BASE + 3


def test_bhyve_qcrc_is_not_qc() -> None:
    with debugging(COUNT) as (client, _):
        assert client.ask("qC") == b"QC1"
        assert client.ask(f"qCRC:{BASE:x},4") == b""


def test_bhyve_thread_ids_and_lengths_are_checked() -> None:
    with debugging(COUNT, cpus=2) as (client, _):
        for packet in (
            "Hg3",
            "Hgffffffffffffffff",
            "T3",
            "vCont;s:3",
            "vCont;s:p2.1",
            "vCont;r100:1",
            "vCont;",
            "vCont;x",
            "m100000,",
            "m100000",
            "m,1",
            "m100000,fffffffffffffffffff",
            "M100000,2:00",
            "M100000,1:0",
            "X100000,5:a",
            "Z0,100000,3",
            "Z0,,1",
            "p999",
            "P10=00",
            "G00",
            "Hx1",
            "qThreadExtraInfo,9",
            "qRcmd,zz",
        ):
            reply = client.ask(packet)
            assert reply.startswith(b"E"), f"{packet}: {reply!r}"
        assert client.register(RIP) == BASE


def test_bhyve_memory_shows_the_guests_bytes_and_not_the_patched_ones() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.insert(COUNT_NOP)
        assert debuggee.memory(COUNT_NOP, 1) != b"\x90", "nothing is planted"
        assert client.read(BASE, len(COUNT)) == COUNT
        assert client.read(COUNT_NOP, 1) == b"\x90"
        assert client.ask(f"x{COUNT_NOP:x},2") == b"b" + COUNT[9:11]
        client.ok("Qqemu.PhyMemMode:1")
        assert client.read(BASE, len(COUNT)) == COUNT


@pytest.mark.parametrize("packet", ["M", "X"])
def test_bhyve_a_write_over_a_breakpoint_survives_its_removal(packet: str) -> None:
    with debugging(COUNT) as (client, debuggee):
        client.insert(COUNT_NOP)
        data = b"\xf8" if packet == "X" else b"f8"  # clc
        client.ok(f"{packet}{COUNT_NOP:x},1:".encode() + data)
        assert client.read(COUNT_NOP, 1) == b"\xf8"
        assert client.resume().rip == COUNT_NOP, "the write has taken the breakpoint away"
        client.remove(COUNT_NOP)
        assert debuggee.memory(COUNT_NOP, 1) == b"\xf8"


# Maps 2 MiB at GVA 0x200000 to GPA 0, calls F there, maps it to GPA 0x200000, calls F again, for
# ever.  (The page directory of the boot page tables is at 0x3000.)
#       c7 04 25 08 30 00 00 83 00 00 00     1: mov dword [0x3008], 0x83
#       0f 20 d8  0f 22 d8                      mov rax, cr3; mov cr3, rax
#       90                                   M1: nop
#       b8 40 00 30 00  ff d0                   mov eax, F + 0x200000; call rax
#       c7 04 25 08 30 00 00 83 00 20 00        mov dword [0x3008], 0x200083
#       0f 20 d8  0f 22 d8  90               M2: ... nop
#       b8 40 00 30 00  ff d0  eb c5            mov eax, F + 0x200000; call rax; jmp 1b
# F:    90 c3                                   nop; ret
_REMAP = bytes.fromhex(
    "c704250830000083000000 0f20d80f22d8 90 b840003000 ffd0"
    "c704250830000083002000 0f20d80f22d8 90 b840003000 ffd0 ebcc"
)
F_ALIAS, F = BASE + 0x200040, BASE + 0x40
MAPPED_LOW, MAPPED_HIGH = BASE + 17, BASE + 42
F_LOW_GPA, F_HIGH_GPA = BASE + 0x40, BASE + 0x200040
REMAP = _REMAP.ljust(0x40, b"\xf4") + b"\x90\xc3"


def _with_second_f(machine: Machine) -> None:
    machine.write_memory(F_HIGH_GPA, b"\x90\xc3", physical=True)


def test_bhyve_a_breakpoint_is_found_again_after_a_remap_and_leaves_nothing_behind() -> None:
    with debugging(REMAP, prepare=_with_second_f) as (client, debuggee):
        clean = debuggee.memory(BASE)
        client.insert(MAPPED_LOW)
        assert client.resume().rip == MAPPED_LOW
        client.remove(MAPPED_LOW)
        client.insert(F_ALIAS)  # the byte at F_LOW_GPA
        assert client.resume().rip == F_ALIAS
        assert debuggee.memory(F_LOW_GPA, 1) != b"\x90"
        client.set_register(RIP, F_ALIAS + 1)
        client.insert(MAPPED_HIGH)
        assert client.resume().rip == MAPPED_HIGH
        client.remove(MAPPED_HIGH)
        client.insert(F_ALIAS)  # now the byte at F_HIGH_GPA
        assert client.resume().rip == F_ALIAS
        assert client.read(F_ALIAS, 2) == b"\x90\xc3"
        client.remove(F_ALIAS)
        assert debuggee.memory(BASE) == clean, "a patched byte was left behind"
        client.go()
        assert client.silent()
        client.break_in()


def test_a_breakpoint_whose_address_is_mapped_elsewhere_is_removed_where_it_was() -> None:
    with debugging(REMAP, prepare=_with_second_f) as (client, debuggee):
        clean = debuggee.memory(BASE)
        client.insert(MAPPED_LOW)
        client.resume()
        client.insert(F_ALIAS)
        client.insert(MAPPED_HIGH)
        client.set_register(RIP, client.register(RIP) + 1)
        assert client.resume().rip == F_ALIAS
        client.set_register(RIP, F_ALIAS + 1)
        assert client.resume().rip == MAPPED_HIGH
        for address in (F_ALIAS, MAPPED_LOW, MAPPED_HIGH):
            client.remove(address)
        assert debuggee.memory(BASE) == clean


def test_a_breakpoint_stops_under_an_alias_of_its_address() -> None:
    with debugging(REMAP, prepare=_with_second_f) as (client, debuggee):
        client.insert(F)  # executed as F_ALIAS
        stop = client.resume()
        assert (stop.rip, "swbreak" in stop) == (F_ALIAS, True)
        client.insert(F_ALIAS)  # the same byte
        client.remove(F)
        assert debuggee.memory(F_LOW_GPA, 1) != b"\x90", "both names must go before the patch does"
        assert client.read(F, 1) == client.read(F_ALIAS, 1) == b"\x90"
        client.remove(F_ALIAS)
        assert debuggee.memory(F_LOW_GPA, 1) == b"\x90"


def test_bhyve_no_input_ends_the_session() -> None:
    with debugging(COUNT) as (client, debuggee):
        for packet in (b"\xff" * 40, b"vCont" * 9, b"", b"{}", b"m" * 1000, b"q", b"v", b"Q", b"H"):
            client.ask(packet)
        client.send_raw(b"+-+-\x03\x03")
        client.ok("Hg0")
        assert client.register(RIP) == BASE
        client.detach()
        debuggee.wait_counts()


# --- vCont ---------------------------------------------------------------------------------------


def test_vcont_names_what_gdb_must_see_to_use_it() -> None:
    with debugging(COUNT) as (client, _):
        assert client.ask("vCont?") == b"vCont;c;C;s;S;t;r"


@pytest.mark.parametrize("who", [0, 1, 2])
def test_only_the_threads_that_vcont_names_run(who: int) -> None:
    with debugging(COUNT, cpus=3) as (client, debuggee):
        client.go(f"vCont;c:{who + 1}")
        debuggee.wait_counts(who)
        assert client.break_in().vcpu_id == who, "^C names a vCPU that did not run"
        others = [n for n in range(3) if n != who]
        assert [debuggee.counter(n) for n in others] == [0, 0]
        assert [client.register(RIP, n) for n in others] == [BASE, BASE]


def test_subset_of_two_runs_and_t_keeps_the_third_parked() -> None:
    with debugging(COUNT, cpus=3) as (client, debuggee):
        client.go("vCont;t:2;c")
        debuggee.wait_counts(0)
        debuggee.wait_counts(2)
        client.break_in()
        assert debuggee.counter(1) == 0
        client.go("vCont;c:2;c:3")
        stopped = debuggee.counter(0)
        debuggee.wait_counts(1)
        debuggee.wait_counts(2)
        client.break_in()
        assert debuggee.counter(0) == stopped


def test_leftmost_action_decides() -> None:
    requires("step")
    with debugging(COUNT, cpus=2) as (client, debuggee):
        stop = client.resume("vCont;s:1;c:1;t:2;c")
        assert (stop.vcpu_id, stop.rip) == (0, BASE + 3)
        assert debuggee.counter(1) == 0


def test_scheduler_locking_steps_one_while_the_others_stay_parked() -> None:
    requires("step")
    with debugging(COUNT, cpus=3) as (client, debuggee):
        for _ in range(8):
            assert client.step(1).vcpu_id == 1
        assert client.register(RIP, 0) == client.register(RIP, 2) == BASE
        assert debuggee.counter(1) == 2


@pytest.mark.slow
def test_a_step_of_one_with_the_others_running() -> None:
    requires("step")
    with debugging(COUNT, cpus=3) as (client, debuggee):
        while min(debuggee.counter(0), debuggee.counter(2)) == 0:
            stop = client.resume("vCont;s:2;c")
            assert (stop.kind, stop.vcpu_id, stop.signal) == ("T", 1, 5)


def test_several_threads_step_each_one_instruction_at_most() -> None:
    requires("step")
    with debugging(COUNT, cpus=2) as (client, _):
        stop = client.resume("vCont;s")
        rips = [client.register(RIP, n) for n in range(2)]
        assert rips[stop.vcpu_id] == BASE + 3
        assert rips[1 - stop.vcpu_id] in (BASE, BASE + 3)


def test_no_thread_to_resume_is_refused_or_n() -> None:
    with debugging(COUNT) as (client, _):
        with pytest.raises(Refused):
            client.resume("vCont;t")
        assert client.register(RIP) == BASE
    with debugging(COUNT, features="no-resumed+") as (client, _):
        assert client.resume("vCont;t").kind == "N"


def test_continue_with_a_signal_just_continues() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.go("vCont;C05")
        debuggee.wait_counts()
        assert client.break_in().signal == 2


def test_continue_and_step_from_an_address() -> None:
    requires("step")
    with debugging(COUNT) as (client, debuggee):
        client.step()
        client.step()
        assert client.resume(f"s{COUNT_INC:x}").rip == COUNT_JMP
        client.go(f"c{COUNT_INC:x}")
        debuggee.wait_counts()
        client.break_in()


# --- steps ---------------------------------------------------------------------------------------


def test_range_step_runs_until_the_address_is_outside() -> None:
    requires("step")
    with debugging(guest("loops")) as (client, _):
        client.insert(INNER)
        client.resume()
        client.remove(INNER)
        assert client.resume(f"vCont;r{INNER:x},{AFTER_ADD:x}:1").rip == AFTER_ADD
        # push rbp .. after the call and its return, all in one go: the range holds inner and outer
        stop = client.resume(f"vCont;r{BASE + 0x50:x},{AFTER_ADD + 2:x}:1")
        assert not BASE + 0x50 <= stop.rip < AFTER_ADD + 2
        assert stop.signal == 5


def test_range_step_stops_at_a_breakpoint_inside() -> None:
    requires("step")
    with debugging(guest("loops")) as (client, _):
        client.insert(INNER_ADD)
        stop = client.resume(f"vCont;r{BASE:x},{BASE + 0x1000:x}:1")
        assert stop.rip == INNER_ADD and "swbreak" in stop


def test_range_step_stops_at_a_hardware_breakpoint_inside() -> None:
    """Also at an instruction that pyvmm executes itself, for which the host has no hit."""
    requires("step")
    requires("hw-breakpoint")
    for code in ("9c58", "9090"):  # pushf; pop rax
        with debugging(bytes.fromhex("90" + code + "909090" + "ebfe")) as (client, _):
            client.insert(BASE + 1, kind=1)
            stop = client.resume(f"vCont;r{BASE:x},{BASE + 6:x}:1")
            assert stop.rip == BASE + 1 and "hwbreak" in stop


def test_range_step_for_ever_ends_with_an_interrupt() -> None:
    requires("step")
    with debugging(COUNT) as (client, debuggee):
        client.go(f"vCont;r{BASE:x},{BASE + 0x100:x}:1")
        debuggee.wait_counts()
        assert client.break_in().signal == 2
        client.go()
        debuggee.wait_counts()
        assert client.silent(), "a step was left armed"
        client.break_in()


def test_a_breakpoint_at_rip_stops_again_until_it_is_stepped_over() -> None:
    requires("step")
    with debugging(COUNT) as (client, debuggee):
        client.insert(COUNT_NOP)
        for count in range(5):
            assert client.resume().rip == COUNT_NOP
            assert debuggee.counter() == count
            client.remove(COUNT_NOP)
            assert client.step().rip == COUNT_INC
            client.insert(COUNT_NOP)


def test_a_step_onto_a_breakpoint_stops_there_once() -> None:
    requires("step")
    with debugging(COUNT) as (client, debuggee):
        client.insert(COUNT_INC)
        client.step(), client.step()
        assert client.step().rip == COUNT_INC
        assert debuggee.counter() == 0
        assert client.step().rip == COUNT_INC  # the breakpoint itself
        client.remove(COUNT_INC)
        assert client.step().rip == COUNT_JMP
        assert debuggee.counter() == 1


# mov esp, 0x70000; pushf; pop rax; popf-free; pushf; pop rbx; jmp $
PUSHF = bytes.fromhex("bc00000700 9c 58 9c 5b ebfe")


def test_pushf_under_a_step_shows_the_guest_no_trap_flag() -> None:
    requires("step")
    with debugging(PUSHF) as (client, _):
        for rip in (BASE + 5, BASE + 6, BASE + 7, BASE + 8, BASE + 9, BASE + 9):
            assert client.step().rip == rip
            assert not client.register(EFLAGS) & RFLAGS_TF, "TF is shown to the debugger"
        for register in (0, 1):  # rax, rbx
            assert not client.register(register) & RFLAGS_TF, "TF is on the guest's stack"


def test_the_trap_flag_can_be_read_and_written_before_a_step() -> None:
    with debugging(COUNT) as (client, debuggee):
        flags = client.register(EFLAGS)
        client.set_register(EFLAGS, flags | RFLAGS_TF, size=4)
        assert client.register(EFLAGS) == flags | RFLAGS_TF
        client.set_register(EFLAGS, flags, size=4)
        client.go()
        debuggee.wait_counts()  # there is no IDT: a #DB would be the end


# Instructions, and how many stops each takes at most: a repetition of `rep` counts as one.
STEPS = (
    ("in al, 0x80", "e480", 1),
    ("out 0x80, al", "e680", 1),
    ("mov ebx, 0xe0000000", "bb000000e0", 1),
    ("mov [rbx], al (MMIO)", "8803", 1),
    ("mov al, [rbx] (MMIO)", "8a03", 1),
    ("hlt", "f4", 1),
    ("xor eax, eax", "31c0", 1),
    ("cpuid", "0fa2", 1),
    ("mov ecx, 0x1b", "b91b000000", 1),
    ("rdmsr", "0f32", 1),
    ("mov edi, 0x30000", "bf00000300", 1),
    ("mov ecx, 3", "b903000000", 1),
    ("rep stosb", "f3aa", 4),
    ("nop", "90", 1),
)


def test_a_step_is_one_instruction_over_io_mmio_hlt_cpuid_rdmsr_and_rep() -> None:
    requires("step")
    with debugging(bytes.fromhex("".join(code for _, code, _ in STEPS) + "ebfe")) as (client, _):
        rip = BASE
        for name, code, stops in STEPS:
            start, rip = rip, rip + len(code) // 2
            for _ in range(stops):
                stop = client.step()
                assert stop.rip in ((start, rip) if stops > 1 else (rip,)), name
                if stop.rip == rip:
                    break
            assert stop.rip == rip, name
        assert client.read(0x30000, 4)[3:] == b"\0", "rep stosb went too far"


# --- the guest's own int3 ------------------------------------------------------------------------


def printed(debuggee: Debuggee) -> str:
    debuggee.wait_for(lambda: b"back" in debuggee.machine.output, "nothing is printed")
    return debuggee.machine.output.decode()


INT3_PRINTS = "int3 at 0x100018, handler saw 0x100019\nback from the handler\n"


def test_the_guests_own_int3_reaches_it_while_a_debugger_has_breakpoints() -> None:
    requires("own-int3")
    with debugging(guest("int3")) as (client, debuggee):
        client.insert(INT3_DONE)
        stop = client.resume()
        assert stop.rip == INT3_DONE
        debuggee.machine.drain_output()
        assert printed(debuggee) == INT3_PRINTS


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with a breakpoint elsewhere"])
def test_a_step_over_the_guests_int3_ends_in_its_handler(others: bool) -> None:
    requires("step")
    with debugging(guest("int3")) as (client, debuggee):
        client.insert(INT3_AT)
        assert client.resume().rip == INT3_AT
        client.remove(INT3_AT)
        if others:
            client.insert(INT3_DONE)
        assert client.step().rip == BP_HANDLER
        frame_at = client.register(RSP)
        assert client.read_u64(frame_at) == AFTER_INT3
        assert not client.read_u64(frame_at + 16) & RFLAGS_TF, "TF leaked to the guest's stack"
        if not others:
            client.insert(INT3_DONE)
        assert client.resume().rip == INT3_DONE
        debuggee.machine.drain_output()
        assert printed(debuggee) == INT3_PRINTS


def test_a_breakpoint_on_the_guests_int3_is_the_debuggers() -> None:
    with debugging(guest("int3")) as (client, debuggee):
        client.insert(INT3_AT)
        stop = client.resume()
        assert stop.rip == INT3_AT and "swbreak" in stop
        assert client.read(INT3_AT, 1) == b"\xcc"
        client.remove(INT3_AT)
        assert debuggee.memory(INT3_AT, 1) == b"\xcc"


def test_catch_int3_stops_on_the_guests_own_int3_and_then_hands_it_over() -> None:
    requires("breakpoint")
    with debugging(guest("int3"), catch_int3=True) as (client, debuggee):
        stop = client.resume()
        assert (stop.rip, stop.signal, "swbreak" in stop) == (INT3_AT, 5, False)
        client.insert(INT3_DONE)
        assert client.resume().rip == INT3_DONE
        debuggee.machine.drain_output()
        assert printed(debuggee) == INT3_PRINTS


def test_catch_int3_holds_for_the_next_debugger_too() -> None:
    requires("breakpoint")
    with debugging(guest("int3"), catch_int3=True) as (client, debuggee):
        client.monitor("catch-int3 off")
        client.write(BASE, b"\xeb\xfe")  # jmp $
        client.detach()
        with debuggee.connect() as second:
            second.write(BASE, b"\xbf\x03")
            assert second.resume().rip == INT3_AT


def test_monitor_catch_int3_switches_it() -> None:
    with debugging(guest("int3")) as (client, _):
        assert "goes to the guest" in client.monitor("catch-int3")
        answer = client.monitor("catch-int3 on")
        if not host().breakpoint:
            assert "does not leave the guest" in answer
            return
        assert "stops" in answer
        assert client.resume().rip == INT3_AT
        client.monitor("catch-int3 off")
        client.insert(INT3_DONE)
        assert client.resume().rip == INT3_DONE


def test_a_caught_int3_that_the_debugger_skips_is_not_delivered() -> None:
    requires("breakpoint")
    with debugging(guest("int3"), catch_int3=True) as (client, debuggee):
        client.resume()
        client.set_register(RIP, AFTER_INT3)
        client.insert(INT3_DONE)
        assert client.resume().rip == INT3_DONE
        debuggee.machine.drain_output()
        assert printed(debuggee) == "back from the handler\n"


# --- software breakpoints ------------------------------------------------------------------------


def test_inserting_twice_and_removing_what_is_not_there_is_fine() -> None:
    with debugging(COUNT) as (client, debuggee):
        clean = debuggee.memory()
        client.remove(COUNT_NOP)
        client.insert(COUNT_NOP)
        client.insert(COUNT_NOP)
        client.remove(COUNT_NOP)
        assert debuggee.memory() == clean
        client.remove(COUNT_NOP)


def test_a_breakpoint_where_nothing_is_mapped_is_refused_with_advice() -> None:
    with debugging(COUNT) as (client, _):
        for address in (0x1_0000_0000, 0xFFFF_8000_0000_0000, 0xE000_0000):
            with pytest.raises(Refused):
                client.insert(address)
            assert "hbreak" in client.monitor("error")


def test_code_that_the_guest_writes_over_a_breakpoint_is_not_undone() -> None:
    """mov byte [F], 0xf8; 1: jmp 1b"""
    overwrite = bytes.fromhex("c6042540001000f8 90 ebfe").ljust(0x40, b"\xf4") + b"\x90\xc3"
    with debugging(overwrite) as (client, debuggee):
        client.insert(F)
        client.insert(BASE + 8)
        assert client.resume().rip == BASE + 8
        assert client.read(F, 1) == b"\xf8"
        client.remove(F)
        assert debuggee.memory(F, 1) == b"\xf8"


def test_reset_breakpoints_takes_all_out() -> None:
    with debugging(COUNT) as (client, debuggee):
        clean = debuggee.memory()
        client.insert(COUNT_NOP)
        client.insert(COUNT_INC)
        assert client.monitor("reset-breakpoints").startswith("2 breakpoints")
        assert debuggee.memory() == clean
        client.go()
        debuggee.wait_counts()
        client.break_in()


# --- hardware breakpoints and watchpoints --------------------------------------------------------


def test_a_host_without_hardware_breakpoints_says_so() -> None:
    with debugging(COUNT) as (client, _):
        for kind, works in ((1, host().hardware_breakpoint), (2, host().watchpoint)):
            if works:
                client.insert(BASE + 0x100, kind)
                client.remove(BASE + 0x100, kind)
                continue
            with pytest.raises(Refused):
                client.insert(BASE + 0x100, kind)
            assert "never hit on this host" in client.monitor("error")
            assert " NO " in client.monitor("probe")


def test_hardware_breakpoints_stop_every_vcpu() -> None:
    requires("hw-breakpoint")
    with debugging(COUNT, cpus=3) as (client, debuggee):
        client.insert(COUNT_INC, kind=1)
        assert debuggee.memory(COUNT_INC, 1) == COUNT[10:11], "nothing is patched for it"
        for who in (2, 0, 1):
            stop = client.resume(f"vCont;c:{who + 1}")
            assert (stop.vcpu_id, stop.rip, "hwbreak" in stop) == (who, COUNT_INC, True)
        client.remove(COUNT_INC, kind=1)
        client.go()
        for who in range(3):
            debuggee.wait_counts(who)
        client.break_in()


def test_a_step_does_not_lose_hardware_breakpoints() -> None:
    requires("hw-breakpoint")
    requires("step")
    with debugging(COUNT) as (client, _):
        client.insert(COUNT_JMP, kind=1)
        client.step()
        stop = client.resume()
        assert (stop.rip, "hwbreak" in stop) == (COUNT_JMP, True)


def test_a_fifth_hardware_breakpoint_is_refused_and_the_four_still_work() -> None:
    requires("hw-breakpoint")
    with debugging(COUNT) as (client, _):
        for address in (COUNT_INC, BASE + 0x100, BASE + 0x101, BASE + 0x102):
            client.insert(address, kind=1)
            client.insert(address, kind=1, length=4)  # the same one: costs no second register
        with pytest.raises(Refused):
            client.insert(BASE + 0x103, kind=1)
        assert "four" in client.monitor("error")
        assert client.resume().rip == COUNT_INC
        client.remove(BASE + 0x101, kind=1)
        client.insert(BASE + 0x103, kind=1)


def test_watch_stops_after_a_write_and_names_the_address() -> None:
    requires("watchpoint")
    with debugging(COUNT) as (client, debuggee):
        client.insert(0x20000, kind=2, length=8)
        stop = client.resume()
        assert (stop.fields["watch"], stop.rip) == ("20000", COUNT_JMP)
        assert debuggee.counter() == 1
        assert client.resume().fields["watch"] == "20000"
        assert debuggee.counter() == 2


READ_FOREVER = bytes.fromhex("488b042500000200 ebf6")  # 1: mov rax, [0x20000]; jmp 1b


def test_rwatch_stops_at_reads_and_not_at_writes() -> None:
    requires("watchpoint")
    with debugging(READ_FOREVER) as (client, _):
        client.insert(0x20000, kind=3, length=8)
        assert client.resume().fields["rwatch"] == "20000"
    with debugging(COUNT) as (client, debuggee):
        client.insert(0x20000, kind=3, length=8)
        client.go()
        debuggee.wait_counts()
        assert client.break_in().signal == 2


def test_rwatch_stops_at_a_read_of_what_the_debugger_has_written() -> None:
    requires("watchpoint")
    with debugging(READ_FOREVER) as (client, _):
        client.insert(0x20000, kind=3, length=8)
        for value in (b"a", b"b"):
            assert client.resume().fields["rwatch"] == "20000"
            client.write(0x20000, value * 8)


def test_a_step_over_a_write_that_rwatch_ignores_is_still_one_step() -> None:
    requires("watchpoint")
    requires("step")
    with debugging(COUNT) as (client, debuggee):
        client.insert(0x20000, kind=3, length=8)
        for rip in (BASE + 3, COUNT_NOP, COUNT_INC, COUNT_JMP, COUNT_NOP):
            assert client.step().rip == rip
        assert debuggee.counter() == 1


def test_awatch_stops_at_both() -> None:
    requires("watchpoint")
    for code in (READ_FOREVER, COUNT):
        with debugging(code) as (client, _):
            client.insert(0x20000, kind=4, length=8)
            assert client.resume().fields["awatch"] == "20000"


def test_a_watched_object_of_any_size_takes_several_debug_registers() -> None:
    requires("watchpoint")
    with debugging(COUNT) as (client, _):
        client.insert(0x1FFF4, kind=2, length=16)  # 4 + 8 + 4 bytes, the last of them the counter's
        stop = client.resume()
        assert (stop.fields["watch"], stop.rip) == ("20000", COUNT_JMP)
        client.remove(0x1FFF4, kind=2, length=16)
        client.insert(0x20000, kind=2, length=32)
        with pytest.raises(Refused):
            client.insert(0x30000, kind=2, length=1)
        assert "four" in client.monitor("error")


# --- ring 3 --------------------------------------------------------------------------------------

USER, USER_2 = 0x100104, 0x10010B  # ring3.elf: `user` and the instruction behind its first


def _run_to_user(client: RspClient) -> None:
    """Step over the iretq, which is the last instruction before `load_tables`, 0x100030."""
    client.insert(0x10002E)
    assert client.resume().rip == 0x10002E
    client.remove(0x10002E)


def test_ring_3_is_stepped_where_the_host_can_and_refused_where_not() -> None:
    with debugging(guest("ring3")) as (client, _):
        _run_to_user(client)
        if not (host().step_user or host().step_user_delivered):
            assert client.step().rip == USER
            with pytest.raises(Refused):
                client.step()
            assert "ring 3" in client.monitor("error")
            return
        assert client.step().rip == USER
        assert client.step().rip == USER_2


def test_a_software_breakpoint_in_ring_3_stops_or_is_refused() -> None:
    with debugging(guest("ring3")) as (client, _):
        _run_to_user(client)
        client.step()
        try:
            client.insert(USER_2)
        except Refused:
            assert "ring 3" in client.monitor("error")
            assert not host().breakpoint_user
            return
        assert client.resume().rip == USER_2


# --- real mode -----------------------------------------------------------------------------------

EIP, PUTC = 8, 0x7C10  # numbers in the 32-bit target description; the address from hello16.elf


def test_real_mode_is_told_to_gdb_and_steps_and_stops() -> None:
    requires("real-mode")
    requires("step-real")
    requires("breakpoint-real")
    image = read_image(GUESTS / "hello16.bin", mode=Mode.REAL)
    with Debuggee(image) as debuggee, debuggee.connect(features="swbreak+") as client:
        assert b"i8086" in client.ask("qXfer:features:read:target.xml:0,4000")
        clean = debuggee.memory()
        assert client.register(EIP) == 0x7C00
        for eip in (0x7C03, 0x7C04, 0x7C06, 0x7C08):
            client.step()
            assert client.register(EIP) == eip
        client.insert(PUTC)
        for _ in range(3):
            assert "swbreak" in client.resume()
            assert client.register(EIP) == PUTC
            assert client.read(PUTC, 1) == clean[PUTC : PUTC + 1]
            client.remove(PUTC)
            client.step()
            assert client.register(EIP) == PUTC + 2
            client.insert(PUTC)
        client.remove(PUTC)
        stack = slice(0x7B00, 0x7C00)
        after = bytearray(debuggee.memory())
        after[stack] = clean[stack]
        assert bytes(after) == clean
        client.detach()
        assert debuggee.wait_end().reason is StopReason.HALTED
        assert debuggee.machine.output == b"Hello from real mode!\n"


# --- memory --------------------------------------------------------------------------------------


def test_memory_is_read_in_hex_and_binary_by_virtual_and_physical_address() -> None:
    def fill(machine: Machine) -> None:
        machine.write_memory(0x300000, bytes(range(256)), physical=True)

    with debugging(COUNT, prepare=fill) as (client, _):
        for mode in (b"0", b"1"):
            client.ok(b"Qqemu.PhyMemMode:" + mode)
            assert client.ask("qqemu.PhyMemMode") == mode
            assert client.read(0x300000, 256) == bytes(range(256))
            assert client.ask("x300000,100") == b"b" + bytes(range(256))
            assert client.ask("x300000,0") == b"b"
            client.write(0x300010, b"$#}*")
            client.ok(b"X300020,4:$#}*")
            assert client.read(0x300010, 4) == client.read(0x300020, 4) == b"$#}*"
            client.write(0x300010, bytes(range(16, 20)))
            client.write(0x300020, bytes(range(32, 36)))


def test_a_large_read_and_write_comes_back_as_it_was() -> None:
    data = bytes(n * 7 & 0xFF for n in range(0xC000))
    with debugging(COUNT) as (client, _):
        client.write(0x200000, data)
        assert client.read(0x200000, len(data)) == data
        assert client.ask(f"x200000,{len(data):x}") == b"b" + data


def test_a_read_that_ends_in_nothing_gives_what_is_there() -> None:
    with debugging(COUNT) as (client, debuggee):
        for mode in ("0", "1"):
            client.ok(f"Qqemu.PhyMemMode:{mode}")
            assert client.read(RAM - 16, 64) == debuggee.memory(RAM - 16, 16)
            for address in (RAM, 0xE0000000, 1 << 40, (1 << 64) - 8):
                with pytest.raises(Refused):
                    client.read(address, 8)
            with pytest.raises(Refused):
                client.write(RAM - 4, bytes(8))
            assert debuggee.memory(RAM - 4, 4) == bytes(4), "half of a refused write was made"


def test_memory_is_read_with_the_paging_that_the_guest_has_built() -> None:
    requires("long-mode")
    with debugging(guest("paging")) as (client, debuggee):
        before = client.ask("mffff800000000000,8")
        assert before.startswith(b"E"), "the upper half is mapped too early"
        client.insert(0x100063)
        client.resume()
        small_page = 0x107000
        assert client.read(0xFFFF800000000000, 64) == debuggee.memory(small_page, 64)
        assert client.read(0xFFFF800000200000, 64) == debuggee.memory(0x200000, 64)
        client.write(0xFFFF800000000008, b"through")
        assert debuggee.memory(small_page + 8, 7) == b"through"
        walk = client.monitor("translate 0xffff800000000000")
        assert walk.count(" at GPA ") == 4 and "0x107000" in walk


def _paging32(machine: Machine) -> None:
    """A page directory at 0x30000: 4 MiB pages, GVA 0x400000 is GPA 0, as is GVA 0."""
    machine.write_memory(0x30000, struct.pack("<2I", 0x83, 0x83), physical=True)
    _turn_paging_on(machine, cr4=CR4_PSE)


def _paging_pae(machine: Machine) -> None:
    """A page directory pointer table at 0x30000, 2 MiB pages: GVA 0x400000 is GPA 0."""
    machine.write_memory(0x30000, struct.pack("<4Q", 0x31001, 0, 0, 0), physical=True)
    machine.write_memory(0x31000, struct.pack("<3Q", 0x83, 0x200083, 0x83), physical=True)
    _turn_paging_on(machine, cr4=CR4_PAE)


def _turn_paging_on(machine: Machine, cr4: int) -> None:
    handle = machine.vm.state(0)
    sregs = handle.get(kvm.kvm_sregs)
    sregs.cr3, sregs.cr4 = 0x30000, sregs.cr4 | cr4
    sregs.cr0 |= CR0_PG
    handle.set(sregs)


@pytest.mark.parametrize("paging", [_paging32, _paging_pae])
def test_memory_of_a_32_bit_guest_with_paging(paging: Callable[[Machine], None]) -> None:
    """Before its first instruction, which is enough to look at memory."""
    requires("paging32")
    image = flat_image(COUNT, Mode.PROTECTED)
    with Debuggee(image, prepare=paging) as debuggee, debuggee.connect() as client:
        assert client.register(EIP) == BASE
        assert client.read(0x400000 + BASE, len(COUNT)) == COUNT
        client.write(0x400000 + 0x2000, b"alias")
        assert debuggee.memory(0x2000, 5) == b"alias"
        client.insert(0x400000 + COUNT_NOP)
        assert debuggee.memory(COUNT_NOP, 1) != b"\x90"
        assert client.read(COUNT_NOP, 1) == b"\x90"
        with pytest.raises(Refused):
            client.read(0x800000, 4)


def test_each_vcpu_sees_memory_through_its_own_paging() -> None:
    """vCPU 1 takes other page tables: mov cr3 if edi is not 0; nop; jmp $"""

    def tables(machine: Machine) -> None:
        machine.write_memory(0x30000, struct.pack("<Q", 0x31003), physical=True)
        machine.write_memory(0x31000, struct.pack("<Q", 0x32003), physical=True)
        machine.write_memory(0x32000, struct.pack("<2Q", 0x83, 0x83), physical=True)

    code = bytes.fromhex("85ff 7408 b800000300 0f22d8 90 ebfe")
    with debugging(code, cpus=2, prepare=tables) as (client, _):
        client.insert(BASE + 12)
        client.resume()
        client.resume(f"vCont;c:{2 - client.why().vcpu_id}")
        client.select(0)
        assert client.read(0x200000 + BASE, 4) == bytes(4)
        client.select(1)
        assert client.read(0x200000 + BASE, 4) == code[:4]


def test_a_breakpoint_is_planted_again_where_the_guest_has_loaded_other_code() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.insert(COUNT_NOP)
        planted = debuggee.memory(COUNT_NOP, 1)
        debuggee.vm.memory.write(COUNT_NOP, b"\xf8")  # clc, as the guest itself would write it
        assert client.read(COUNT_NOP, 1) == b"\xf8"
        client.insert(COUNT_NOP)
        assert debuggee.memory(COUNT_NOP, 1) == planted
        assert client.read(COUNT_NOP, 1) == b"\xf8"
        assert "swbreak" in client.resume()
        client.remove(COUNT_NOP)
        assert debuggee.memory(COUNT_NOP, 1) == b"\xf8"


def test_a_breakpoint_on_an_instruction_that_looks_like_one_is_taken_out_again() -> None:
    for own in (b"\xf4", b"\xcc"):
        with debugging(own + COUNT) as (client, debuggee):
            client.insert(BASE)
            assert client.read(BASE, 1) == own
            assert "swbreak" in client.resume()
            client.remove(BASE)
            assert debuggee.memory(BASE, 1) == own


def hit_together(client: RspClient, debuggee: Debuggee, kind: type[exits.Exit]) -> tuple[int, int]:
    """Resume until both vCPUs have an exit of this kind: whose is reported, and whose waits."""
    handlers, both = debuggee.machine.handlers, threading.Barrier(2)
    handler = handlers[kind]

    def meet(cpu: VcpuThread, exit: exits.Exit) -> None:
        both.wait(PATIENCE)
        handler(cpu, exit)

    handlers[kind] = meet
    reported = client.resume().vcpu_id
    handlers[kind] = handler
    assert debuggee.server.run_control._states[1 - reported].owed is not None
    return reported, 1 - reported


@pytest.mark.parametrize("kind", [0, 1])
def test_a_hit_that_was_not_reported_yet_is_dropped_where_the_debugger_moves_the_vcpu(
    kind: int,
) -> None:
    """Two vCPUs hit, one is reported, and the other is sent somewhere else before its turn."""
    if kind:
        requires("hw-breakpoint")
    with debugging(COUNT, cpus=2) as (client, debuggee):
        client.insert(COUNT_NOP, kind)
        _, other = hit_together(client, debuggee, exits.Db if kind else exits.Bpt)
        client.set_register(RIP, COUNT_JMP, other)
        client.go(f"vCont;c:{other + 1}")
        stop = client.wait_stop()
        assert (stop.vcpu_id, stop.rip) == (other, COUNT_NOP), "once around, to the breakpoint"


def test_an_own_int3_that_was_not_reported_yet_is_dropped_when_nobody_wants_it() -> None:
    requires("breakpoint")
    code = COUNT[:9] + b"\xcc" + COUNT[10:]
    with debugging(code, cpus=2, catch_int3=True) as (client, debuggee):
        hit_together(client, debuggee, exits.Bpt)
        client.monitor("catch-int3 off")
        for vcpu_id in (0, 1):
            client.set_register(RIP, COUNT_INC, vcpu_id)
        # The int3 that either comes to next is the guest's, which has no IDT: a triple fault.
        assert client.resume().signal == 11


# --- ^C and stops --------------------------------------------------------------------------------


def test_interrupt_stops_everything_and_reports_sigint() -> None:
    with debugging(COUNT, cpus=3) as (client, debuggee):
        client.go()
        for n in range(3):
            debuggee.wait_counts(n)
        assert client.break_in().signal == 2
        before = [debuggee.counter(n) for n in range(3)]
        time.sleep(0.02)
        assert [debuggee.counter(n) for n in range(3)] == before


def test_an_interrupt_before_the_guest_has_run_is_ignored() -> None:
    with debugging(COUNT) as (client, debuggee):
        for _ in range(3):
            client.interrupt()
        assert client.silent()
        client.go()
        debuggee.wait_counts()
        assert client.silent(), "a ^C from before the continue was kept"
        assert client.break_in().signal == 2


def test_two_interrupts_give_one_stop() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.go()
        debuggee.wait_counts()
        client.send_raw(b"\x03\x03\x03")
        assert client.wait_stop().signal == 2
        assert client.silent()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("when", ["at once", "between packets"])
def test_an_interrupt_while_stopped_at_a_breakpoint_counts_when_the_guest_runs_again(
    when: str, times: int
) -> None:
    """A debugger that goes on by itself, as a condition is false, could never be interrupted."""
    with debugging(COUNT) as (client, debuggee):
        client.insert(COUNT_NOP)
        client.go()
        assert "swbreak" in client.wait_stop()
        if when == "between packets":
            client.read(BASE, 1)
        client.send_raw(b"\x03" * times)
        assert client.ask("g")[:1] != b"E"
        client.remove(COUNT_NOP)
        client.go()
        assert client.wait_stop().signal == 2
        client.go()
        debuggee.wait_counts()
        assert client.silent(), "it was kept longer than that"


def test_an_interrupt_after_the_stop_of_another_is_not_kept() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.go()
        assert client.break_in().signal == 2
        client.interrupt()
        client.go()
        debuggee.wait_counts()
        assert client.silent()


def test_interrupt_in_the_same_segment_as_the_continue() -> None:
    with debugging(COUNT) as (client, _):
        for _ in range(20):
            client.send_raw(frame(b"vCont;c") + b"\x03")
            assert client.wait_stop().signal == 2
        assert client.silent()


def test_vctrlc_is_answered_and_stops() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.go()
        debuggee.wait_counts()
        assert client.ask("vCtrlC") == b"OK"
        assert client.wait_stop().signal == 2


def test_interrupt_of_halted_vcpus_stops_them() -> None:
    halted_with_interrupts_on = bytes.fromhex("fb f4 ebfd")  # sti; 1: hlt; jmp 1b
    with debugging(halted_with_interrupts_on, cpus=2) as (client, debuggee):
        client.go()
        debuggee.wait_for(lambda: len(debuggee.vm.halted_cpus()) == 2, "they do not halt")
        assert client.break_in().signal == 2
        assert "halted" in client.monitor("vcpus")


def test_packets_while_the_guest_runs_are_refused_and_do_not_stop_it() -> None:
    with debugging(COUNT) as (client, debuggee):
        client.go()
        for packet in ("g", f"m{BASE:x},4", f"Z0,{COUNT_NOP:x},1", "vCont;c", "?", "Hg1"):
            assert client.ask(packet).startswith(b"E"), packet
        debuggee.wait_counts()
        assert client.break_in().signal == 2
        assert client.silent()


def test_a_step_reports_the_registers_that_a_debugger_reads_first() -> None:
    requires("step")
    with debugging(COUNT) as (client, _):
        client.set_register(RSI, 0x1234)
        stop: StopReply = client.step()
        assert stop.rip == client.register(RIP) == BASE + 3
        assert int.from_bytes(bytes.fromhex(stop.fields["07"]), "little") == client.register(RSP)
        assert client.register(RSI) == 0x1234


def test_registers_of_another_thread_are_written_to_it() -> None:
    with debugging(COUNT, cpus=2) as (client, _):
        client.set_register(RSI, 0xAAAA, 0)
        client.set_register(RSI, 0xBBBB, 1)
        assert (client.register(RSI, 0), client.register(RSI, 1)) == (0xAAAA, 0xBBBB)


def test_a_value_too_wide_for_its_register_is_refused_and_nothing_is_written() -> None:
    """gdb sees 32 bits where the processor has 16: `set $fctrl = 0x10000`."""
    x87, selectors = ("fctrl", "fstat", "ftag", "fiseg", "foseg", "fop"), ("cs", "ss", "ds", "gs")
    with debugging(COUNT) as (client, _):
        registers = layout(Architecture.X86_64, _has_avx(client))
        before = client.ask("g")
        for name in (*x87, *selectors):
            with pytest.raises(Refused):
                client.set_register(registers.number_of[name], 0x1_0000, size=4)
            assert client.monitor("error") == f"the register {name} has 16 bits\n"
            data = bytearray.fromhex(before.decode())
            data[0] ^= 1  # rax, too
            end = sum(row.size for row in registers.registers[: registers.number_of[name] + 1])
            data[end - 1] = 1
            with pytest.raises(Refused):
                client.ok(b"G" + data.hex().encode())
            assert client.ask("g") == before, name


def test_a_value_that_kvm_refuses_is_refused_by_the_register_s_name() -> None:
    with debugging(COUNT) as (client, _):
        registers = layout(Architecture.X86_64, _has_avx(client))
        for name, size in (("mxcsr", 4), ("cr4", 8)):
            before = client.ask("g")
            with pytest.raises(Refused):
                client.set_register(registers.number_of[name], (1 << 8 * size) - 1, size=size)
            assert client.monitor("error") == f"KVM refuses this value of {name}\n"
            assert client.ask("g") == before


def _has_avx(client: RspClient) -> bool:
    return b"avx" in client.ask("qXfer:features:read:target.xml:0,7000")


@pytest.mark.parametrize("mode", Mode)
def test_ones_or_zeros_in_any_register_are_taken_or_refused_and_the_guest_lives(mode: Mode) -> None:
    if mode is Mode.REAL:
        requires("real-mode")
    architecture = {Mode.REAL: Architecture.I8086, Mode.PROTECTED: Architecture.I386}.get(
        mode, Architecture.X86_64
    )
    forever = bytes.fromhex("90 ebfd")
    with Debuggee(flat_image(forever, mode, 0x8000)) as debuggee, debuggee.connect() as client:
        registers = layout(architecture, _has_avx(client))
        for number, row in enumerate(registers.registers):
            before = client.ask(f"p{number:x}").decode()
            for byte in ("ff", "00"):
                reply = client.ask(f"P{number:x}={byte * row.size}")
                assert reply == b"OK" or reply.startswith(b"E"), (row.name, reply)
                assert len(client.ask("g")) == 2 * registers.size, row.name
                client.ok(f"P{number:x}={before}")
                assert client.ask(f"p{number:x}").decode() == before, row.name
        client.go()
        assert client.break_in().signal == 2


def test_no_file_descriptor_is_left_by_clients() -> None:
    with Debuggee(COUNT) as debuggee:
        debuggee.connect().detach()
        debuggee.wait_counts()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            debuggee.connect().close()
        debuggee.connect().detach()
        debuggee.wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before, "descriptors leak")


def test_a_run_limit_does_not_resume_what_the_debugger_keeps_parked() -> None:
    """Machine.run() returns at its limit and is called again, as a library's user may do."""

    def counter(vcpu_id: int) -> int:
        data = machine.read_memory(COUNTERS + 64 * vcpu_id, 8, physical=True)
        return int.from_bytes(data, "little")

    with Machine(flat_image(COUNT), cpus=2, irqchip=False, memory=RAM) as machine:
        server = DebugServer(machine, parse_address("0"))
        try:
            machine.run(timeout=0.02)
            with RspClient(server.address) as client:
                client.go("vCont;c:1")
                machine.run(timeout=0.1)
                before = counter(0)
                machine.run(timeout=0.1)
                assert counter(0) > before > 0
                assert counter(1) == 0
                assert client.break_in().signal == 2
        finally:
            server.close()


@pytest.mark.parametrize("leave", ["vanish", "detach", "continue"])
def test_nobody_runs_between_two_calls_of_run_whatever_a_debugger_does(leave: str) -> None:
    def counter() -> int:
        return int.from_bytes(machine.read_memory(COUNTERS, 8, physical=True), "little")

    with Machine(flat_image(COUNT), irqchip=False, memory=RAM) as machine:
        server = DebugServer(machine, parse_address("0"), wait=False)
        try:
            machine.run(timeout=0.05)
            before = counter()
            client = RspClient(server.address)
            if leave == "detach":
                client.detach()
            elif leave == "continue":
                client.go()
                assert client.silent()
                client.break_in()
                client.go()
                assert client.silent()
            client.close()
            time.sleep(0.05)
            assert counter() == before
            assert machine.registers()["rip"] in (COUNT_NOP, COUNT_INC, COUNT_JMP)
            machine.run(timeout=0.05)
            assert counter() > before
        finally:
            server.close()


def test_a_region_is_told_only_as_far_as_the_page_tables_were_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many entries of the top table lead to one and the same empty one."""
    empty_table, gap = 0x60000, 1 << 39
    with debugging(COUNT) as (client, debuggee):
        top_table = debuggee.vm.state(0).get(kvm.kvm_sregs).cr3
        debuggee.vm.memory.write(top_table + 8, struct.pack("<Q", empty_table | 3) * 200)
        ask = b"qMemoryRegionInfo:%x" % gap
        assert client.ask(ask) == b"start:%x;size:%x;" % (gap, (1 << 64) - gap)
        monkeypatch.setattr("pyvmm.debugtarget.mappings", partial(mappings, max_entries=5000))
        start, size = (
            int(field.partition(b":")[2], 16) for field in client.ask(ask).split(b";")[:2]
        )
        assert start == gap and 0 < size < 1 << 47

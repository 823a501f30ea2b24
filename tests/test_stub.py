"""The packet table against a target that is not there: what each packet does and answers."""

from __future__ import annotations

import struct
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from pyvmm.registers import Architecture, layout
from pyvmm.rsp import PACKET_SIZE, escaped_length
from pyvmm.session import MAX_DATA, Phase, Session
from pyvmm.stub import PACKETS, Row, Stub, _find, console_output
from pyvmm.target import (
    SIGINT,
    SIGSEGV,
    Action,
    ActionKind,
    BreakpointKind,
    ExecFile,
    StopKind,
    StopReport,
)
from tests.fake_target import GDB, RAM_SIZE, FakeTarget, packets, register_file

CONTINUE, STEP = Action(ActionKind.CONTINUE), Action(ActionKind.STEP)
EFAULT, EBUSY, EINVAL = b"E0e", b"E10", b"E16"


@pytest.fixture
def target() -> FakeTarget:
    return FakeTarget()


@pytest.fixture
def stub(target: FakeTarget) -> Stub:
    """A session with gdb 13."""
    stub = Stub(target)
    stub.handle(GDB)
    return stub


def stop(stub: Stub, report: StopReport) -> bytes | None:
    """The debug server's part: all vCPUs are parked, and the stub may tell."""
    target = stub.session.target
    assert isinstance(target, FakeTarget)
    target.stopped, target.report = True, report
    return stub.stop_reply(report)


def resumed(target: FakeTarget) -> tuple[dict[int, Action], bool]:
    """What the last resume was told."""
    name, actions, newcomers_run = target.calls[-1]
    assert name == "resume" and isinstance(actions, dict) and isinstance(newcomers_run, bool)
    return actions, newcomers_run


# ---- The table ----


def test_what_is_advertised_works(stub: Stub, target: FakeTarget) -> None:
    target.file = ExecFile("/hello.elf", 64, 4, lambda offset, length: b"\x7fELF"[offset:][:length])
    target.ranges = [(0, 1 << 63)]
    reply = stub.handle(GDB)
    assert reply is not None
    probes = {
        b"PacketSize=20000": b"m0,10000",
        b"QStartNoAckMode+": b"QStartNoAckMode",
        b"binary-upload+": b"x0,0",
        b"vContSupported+": b"vCont?",
        b"qXfer:features:read+": b"qXfer:features:read:target.xml:0,10",
        b"qXfer:threads:read+": b"qXfer:threads:read::0,10",
        b"qXfer:memory-map:read+": b"qXfer:memory-map:read::0,10",
        b"qXfer:exec-file:read+": b"qXfer:exec-file:read:1:0,10",
        b"multiprocess+": b"Hgp1.2",
        b"no-resumed+": b"vCont;t",
        b"swbreak+": b"Z0,0,1",
        b"hwbreak+": b"Z2,0,1",
    }
    assert set(reply.split(b";")) == set(probes)
    for token, probe in probes.items():
        answer = stub.handle(probe)
        assert answer and not answer.startswith(b"E"), token


def test_what_is_not_there_is_not_advertised(stub: Stub) -> None:
    reply = stub.handle(b"qSupported:xmlRegisters=i386")
    assert reply is not None
    for word in (b"exec-file", b"memory-map", b"multiprocess", b"swbreak", b"error-message"):
        assert word not in reply
    assert stub.handle(b"qXfer:exec-file:read:1:0,10") == b""
    assert stub.handle(b"qXfer:memory-map:read::0,10") == b""


def test_features_are_compared_without_their_plus(stub: Stub, target: FakeTarget) -> None:
    assert b"swbreak" in stub.session.announced
    stub.handle(b"qSupported:swbreak-;hwbreak+;x=5;;")
    assert stub.session.announced == {b"hwbreak"}


def test_names_are_matched_exactly(stub: Stub) -> None:
    """bhyve answers qCRC as qC."""
    assert stub.handle(b"qC") == b"QCp1.1"
    for packet in (b"qCRC:0,4", b"qCx", b"q", b"Q", b"v", b"vContinue;c", b"vCont!", b"qSupporte"):
        assert stub.handle(packet) == b""


@pytest.mark.parametrize("row", PACKETS, ids=lambda row: row.name.decode())
def test_every_row_is_found_by_its_own_name(row: Row) -> None:
    for arguments in (b"", b":1", b";1", b",1"):
        assert _find(row.name + arguments) == (row, arguments)


def test_names_in_the_table_are_unique() -> None:
    assert len({row.name for row in PACKETS}) == len(PACKETS)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xff",
        *packets("""
        R00 qTStatus qOffsets jThreadsInfo _M100,rwx vRun;61 vMustReplyEmpty qShlibInfoAddr
        qStructuredDataPlugins qVAttachOrWaitSupported qXfer:auxv:read::0,10
        qXfer:features:write:target.xml:0,1:a vFile:unlink:61
    """),
    ],
)
def test_unknown_packets_get_the_empty_reply(packet: bytes, stub: Stub) -> None:
    assert stub.handle(packet) == b""


@pytest.mark.parametrize(
    "packet",
    [
        b"m 1,4",
        b"Hg1 ",
        *packets("""
        m m0 m0, m0,0 m,4 m0,4,4 m-1,4 m0x1,4 m1_0,4 m00000000000000001,4 mzz,4 x x0
        M0,1 M0,1:0 M0,1:zz M0,2:00 M:00 X0,1 X0,2:a X0:a Xffffffffffffffff,2:ab
        H Hg Hx0 Hg3 Hgp Hgp2.1 Hgpx.1 Hgp1.3 Hcp1. T T3 Tp1.9
        c-5 C Cxx C05;zz s! S Z Z0 Z0,0 Z0,0,0 Z0,0,3 Z0,0,1,1 Z0,0,1;X1,00 z0
        Z1,0,10 Z2,0,0 Z4,fffffffffffffff8,10
        qThreadExtraInfo qThreadExtraInfo,9 qThreadExtraInfo:1 qThreadStopInfo qThreadStopInfo7
        qRcmd,z qRcmd,6 qRcmd:68 qMemoryRegionInfo qMemoryRegionInfo;10
        vKill;2 vKill:1 vKill vAttach;2 vAttach D;2 D1 D:1 Qqemu.PhyMemMode:2 Qqemu.PhyMemMode
        qXfer:features:read:target.xml: qXfer:features:read:target.xml:0 qXfer;threads:read::0,1
        qXfer:features:read:other.xml:0,10 qXfer:threads:read::10,10
    """),
    ],
)
def test_malformed_packets_get_an_error_and_the_session_lives(packet: bytes, stub: Stub) -> None:
    reply = stub.handle(packet)
    assert reply and reply.startswith(b"E") and len(reply) == 3
    assert stub.handle(b"m0,1") == b"00"


@pytest.mark.parametrize(
    "packet",
    packets("""
    p pz p42 p100000000 P0 P0= P0=00 P0=zz P42=00 P=00 G G00 Gzz g5 g; g;thread:9; g;pid:1;
    p0;thread:; vCont vCont; vCont;x vCont;c:9 vCont;c: vCont;r vCont;r1 vCont;r1,2,3 vCont;C
    vCont;Cz vCont;c5 vCont;s5 vCont;t5 vCont;c;;s vCont:c
"""),
)
def test_malformed_packets_say_why_where_old_gdb_shows_it(packet: bytes, stub: Stub) -> None:
    reply = stub.handle(packet)
    assert reply and reply.startswith(b"E.") and stub.session.target.last_error
    assert stub.handle(b"m0,1") == b"00"


# ---- Errors ----


def test_an_error_is_a_number_for_a_client_that_announced_nothing(target: FakeTarget) -> None:
    assert Stub(target).handle(b"m80000,4") == EFAULT


def test_an_error_has_a_message_where_gdb_before_15_shows_it(stub: Stub) -> None:
    assert stub.handle(b"P1b=0000000000000000") == b"E.CR0.PG needs CR0.PE .1"
    assert stub.handle(b"Z1,0,1") == b"E1c"
    assert stub.session.target.last_error == "all 4 hardware breakpoints are in use"


def test_an_error_has_a_message_everywhere_for_a_client_that_announced_it(stub: Stub) -> None:
    stub.handle(b"qSupported:error-message+")
    assert stub.handle(b"m80000,4") == b"E.nothing is mapped at 0x80000"
    assert stub.handle(b"Z1,0,1") == b"E.all 4 hardware breakpoints are in use"


def test_an_error_has_a_message_for_lldb(stub: Stub) -> None:
    assert stub.handle(b"QEnableErrorStrings") == b"OK"
    assert stub.handle(b"m80000,4") == b"E0e;" + b"nothing is mapped at 0x80000".hex().encode()
    assert stub.handle(b"p99") == b"E16;" + b"there is no register 153".hex().encode()


def test_what_could_not_be_decoded_is_rejected_with_an_error(stub: Stub) -> None:
    assert stub.reject("bad checksum") == EINVAL


# ---- Registers ----


def test_g_gives_all_registers_of_the_selected_vcpu(stub: Stub, target: FakeTarget) -> None:
    registers = layout(Architecture.X86_64, False)
    assert stub.handle(b"g") == registers.encode(register_file(target.registers[0]))
    assert stub.handle(b"Hgp1.2") == b"OK"
    assert stub.handle(b"g") == registers.encode(register_file(target.registers[1]))


def test_p_gives_one_register(stub: Stub) -> None:
    assert stub.handle(b"p10") == b"1000000000000000"
    assert stub.handle(b"p11") == b"11000000"
    assert stub.handle(b"p20") == b"20" + b"00" * 7, "efer"


def test_P_writes_one_register(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"P10=8877665544332211") == b"OK"
    assert target.calls == [("write_registers", 0, {"rip": 0x1122334455667788})]
    assert stub.handle(b"p10") == b"8877665544332211"


def test_P_writes_a_vector_register(stub: Stub, target: FakeTarget) -> None:
    number = layout(Architecture.X86_64, False).number_of["xmm1"]
    assert stub.handle(b"P%x=%b" % (number, b"ab" * 16)) == b"OK"
    assert target.registers[0]["xmm1"] == b"\xab" * 16


def test_G_writes_only_what_changed(stub: Stub, target: FakeTarget) -> None:
    data = stub.handle(b"g")
    assert data is not None
    assert stub.handle(b"G" + data) == b"OK"
    assert target.calls == []
    assert stub.handle(b"G" + b"ff" * 8 + data[16:]) == b"OK"
    assert target.calls == [("write_registers", 0, {"rax": 0xFFFFFFFFFFFFFFFF})]


def test_lldb_names_the_thread_in_the_packet(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"QThreadSuffixSupported") == b"OK"
    assert stub.handle(b"p10;thread:0002;") == b"1001000000000000"
    assert stub.handle(b"p10;thread:p1.2;") == b"1001000000000000"
    assert stub.handle(b"P0=0000000000000000;thread:2;") == b"OK"
    assert target.calls[-1] == ("write_registers", 1, {"rax": 0})
    data = stub.handle(b"g;thread:2;")
    assert data == layout(Architecture.X86_64, False).encode(register_file(target.registers[1]))
    assert data is not None
    assert stub.handle(b"G" + b"11" * 8 + data[16:] + b";thread:2;") == b"OK"
    assert target.calls[-1] == ("write_registers", 1, {"rax": 0x1111111111111111})


def test_the_layout_stays_until_the_description_is_read_again(
    stub: Stub, target: FakeTarget
) -> None:
    """Or gdb says: Remote 'g' packet reply is too long."""
    before = stub.handle(b"g")
    target.arch = Architecture.I8086
    assert stub.handle(b"g") == before
    description = stub.handle(b"qXfer:features:read:target.xml:0,ffff")
    assert description is not None and b"<architecture>i8086<" in description
    after = stub.handle(b"g")
    assert after is not None and before is not None and len(after) < len(before)


def test_a_feature_without_a_name_is_none(stub: Stub) -> None:
    stub.handle(b"qSupported:+;swbreak+")
    assert stub.session.announced == {b"swbreak"}


def test_in_real_mode_the_program_counter_is_linear(stub: Stub, target: FakeTarget) -> None:
    target.arch = Architecture.I8086
    target.registers[0] |= {"rip": 0x10010, "code_base": 0x10000}
    stub = Stub(target)
    assert stub.handle(b"p8") == b"10000100", "CS base 0x10000 + IP 0x10"
    assert stub.handle(b"P8=34120100") == b"OK"
    assert target.calls == [("write_registers", 0, {"rip": 0x1234})]
    assert stub.handle(b"?") == b"T05thread:1;08:34120100;04:07000000;05:06000000;"
    assert (
        stub.handle(b"P8=ffff0000") == b"E.eip is below the code segment, which begins at 0x10000"
    )


# ---- Memory ----


def test_m_gives_memory_in_hex(stub: Stub, target: FakeTarget) -> None:
    target.ram[16:20] = b"\x01\xab\xcd\xef"
    assert stub.handle(b"m10,4") == b"01abcdef"


def test_x_gives_memory_in_binary(stub: Stub, target: FakeTarget) -> None:
    target.ram[16:20] = b"#$}*"
    assert stub.handle(b"x10,4") == b"b#$}*"
    assert stub.handle(b"x0,0") == b"b"


def test_a_range_that_ends_in_unmapped_memory_gives_what_was_readable(stub: Stub) -> None:
    assert stub.handle(b"m3fffe,8") == b"0000"
    assert stub.handle(b"m40000,8") == EFAULT


@pytest.mark.parametrize("letter", [b"m", b"x"])
def test_a_reply_never_exceeds_the_packet_size(
    letter: bytes, stub: Stub, target: FakeTarget
) -> None:
    target.ram[:] = b"#" * RAM_SIZE
    reply = stub.handle(letter + b"0,ffffffffffffffff")
    assert reply is not None
    assert len(reply) >= MAX_DATA
    assert escaped_length(reply) <= PACKET_SIZE, "also if each byte is escaped"


def test_reading_at_the_end_of_the_address_space_does_not_wrap(stub: Stub) -> None:
    assert stub.handle(b"mffffffffffffffff,10") == EFAULT


def test_M_and_X_write_memory(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"M10,2:abcd") == b"OK"
    assert stub.handle(b"X12,3:a:\x03") == b"OK"
    assert stub.handle(b"X0,0:") == b"OK"
    assert target.ram[16:21] == b"\xab\xcda:\x03"
    assert stub.handle(b"M3ffff,2:0000") == EFAULT


def test_addresses_are_physical_when_qemus_mode_says_so(stub: Stub, target: FakeTarget) -> None:
    target.ram[0] = 0x77
    assert stub.handle(b"qqemu.Supported") == b"PhyMemMode"
    assert stub.handle(b"qqemu.PhyMemMode") == b"0"
    assert stub.handle(b"Qqemu.PhyMemMode:1") == b"OK"
    assert stub.handle(b"qqemu.PhyMemMode") == b"1"
    assert stub.handle(b"m1000,1") == b"77"
    assert stub.handle(b"m0,1") == EFAULT
    assert stub.handle(b"M1001,1:88") == b"OK"
    assert target.ram[1] == 0x88
    assert stub.handle(b"Qqemu.PhyMemMode:0") == b"OK"
    assert stub.handle(b"m0,2") == b"7788"


def test_memory_regions_for_lldb(stub: Stub) -> None:
    assert stub.handle(b"qMemoryRegionInfo:10") == b"start:0;size:40000;permissions:rwx;"
    assert stub.handle(b"qMemoryRegionInfo:40000") == b"start:40000;size:fffffffffffc0000;"


# ---- Running ----


def test_s_steps_the_thread_that_stopped_and_no_other(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"s") is None
    assert resumed(target) == ({0: STEP}, False)


def test_c_continues_all(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"c") is None
    assert resumed(target) == ({0: CONTINUE, 1: CONTINUE}, True)


def test_Hc_any_continues_all_and_steps_one(stub: Stub, target: FakeTarget) -> None:
    stub.handle(b"Hc0")
    stub.handle(b"c")
    assert resumed(target) == ({0: CONTINUE, 1: CONTINUE}, True)
    stop(stub, StopReport(1))
    stub.handle(b"s")
    assert resumed(target) == ({1: STEP}, False)


def test_Hc_locks_the_scheduler_to_a_thread(stub: Stub, target: FakeTarget) -> None:
    stub.handle(b"Hcp1.2")
    stub.handle(b"c")
    assert resumed(target) == ({1: CONTINUE}, False)


def test_Hg_and_Hc_are_two_cursors(stub: Stub, target: FakeTarget) -> None:
    """bhyve has one."""
    stub.handle(b"Hcp1.2")
    stub.handle(b"Hgp1.1")
    assert stub.handle(b"p10") == b"1000000000000000"
    stub.handle(b"s")
    assert resumed(target) == ({1: STEP}, False)


def test_a_signal_for_the_guest_is_understood_and_ignored(stub: Stub, target: FakeTarget) -> None:
    stub.handle(b"C0b")
    assert resumed(target)[0] == {0: CONTINUE, 1: CONTINUE}
    stop(stub, StopReport(0))
    stub.handle(b"S0b")
    assert resumed(target)[0] == {0: STEP}


def test_c_at_an_address_goes_there(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"c1234") is None
    assert target.calls[0] == ("write_registers", 0, {"rip": 0x1234})
    stop(stub, StopReport(1))
    stub.handle(b"C0b;5678")
    assert target.calls[-2] == ("write_registers", 1, {"rip": 0x5678})


def test_a_refused_resume_is_an_error_and_the_guest_stays_stopped(
    stub: Stub, target: FakeTarget
) -> None:
    target.refuse_resume = True
    assert stub.handle(b"s") == b"E5f"
    assert stub.handle(b"m0,1") == b"00"


@pytest.mark.parametrize(
    ("packet", "actions", "newcomers_run"),
    [
        (b"vCont;c", {0: CONTINUE, 1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;c:p1.-1", {0: CONTINUE, 1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;c:p1", {0: CONTINUE, 1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;c:-1", {0: CONTINUE, 1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;s", {0: STEP, 1: STEP, 2: STEP}, False),
        (b"vCont;s:p1.1;c:p1.-1", {0: STEP, 1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;s:2;c", {0: CONTINUE, 1: STEP, 2: CONTINUE}, True),
        (b"vCont;s:2", {1: STEP}, False),
        (b"vCont;c:1;s:3", {0: CONTINUE, 2: STEP}, False),
        (b"vCont;c;s:1", {0: CONTINUE, 1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;t:1;c", {1: CONTINUE, 2: CONTINUE}, True),
        (b"vCont;s:0", {2: STEP}, False),
        (b"vCont;C0b:1", {0: CONTINUE}, False),
        (b"vCont;S0b:1", {0: STEP}, False),
        (b"vCont;r10,1f:1", {0: Action(ActionKind.RANGE_STEP, start=16, end=31)}, False),
    ],
)
def test_vCont_honours_default_and_thread_actions(
    packet: bytes, actions: dict[int, Action], newcomers_run: bool
) -> None:
    target = FakeTarget(vcpus=3)
    stub = Stub(target)
    stub.handle(GDB)
    stub.handle(b"c")
    stop(stub, StopReport(2))
    assert stub.handle(packet) is None
    assert resumed(target) == (actions, newcomers_run)


def test_a_vCont_that_resumes_nobody_says_so_at_once(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"vCont;t") == b"N"
    stub.handle(b"qSupported:")
    assert stub.handle(b"vCont;t") == b"E.no thread would run"
    assert target.calls == []


def test_while_the_guest_runs_packets_for_a_stopped_one_are_refused(
    stub: Stub, target: FakeTarget
) -> None:
    stub.handle(b"c")
    for packet in (b"m0,1", b"?", b"s", b"Z0,0,1", b"qC", b"qXfer:threads:read::0,10"):
        assert stub.handle(packet) == EBUSY
    assert stub.handle(b"g") == b"E.the guest is running"
    assert stub.handle(b"vCtrlC") == b"OK"
    assert target.calls[-1] == ("interrupt",)
    assert stop(stub, StopReport(0, SIGINT)) is not None
    assert stub.handle(b"m0,1") == b"00"


# ---- Stop replies ----


def after_continue(stub: Stub, report: StopReport) -> bytes | None:
    assert stub.handle(b"c") is None
    return stop(stub, report)


REGISTERS_1 = b"10:1001000000000000;07:0701000000000000;06:0601000000000000;"


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (StopReport(1), b""),
        (StopReport(1, kind=StopKind.SWBREAK), b"swbreak:;"),
        (StopReport(1, kind=StopKind.HWBREAK), b"hwbreak:;"),
        (StopReport(1, kind=StopKind.WATCH, gva=0x1234), b"watch:1234;"),
        (StopReport(1, kind=StopKind.RWATCH, gva=0x1234), b"rwatch:1234;"),
        (StopReport(1, kind=StopKind.AWATCH, gva=0x1234), b"awatch:1234;"),
    ],
)
def test_a_stop_tells_thread_reason_and_first_registers(
    report: StopReport, reason: bytes, stub: Stub
) -> None:
    assert after_continue(stub, report) == b"T05thread:p1.2;" + reason + REGISTERS_1
    assert stub.handle(b"?") == b"T05thread:p1.2;" + reason + REGISTERS_1


def test_a_stop_has_no_words_that_were_not_announced(target: FakeTarget) -> None:
    stub = Stub(target)
    reply = after_continue(stub, StopReport(1, kind=StopKind.SWBREAK))
    assert reply == b"T05thread:2;" + REGISTERS_1


def test_a_stop_lists_the_threads_for_lldb(stub: Stub) -> None:
    assert stub.handle(b"QListThreadsInStopReply") == b"OK"
    reply = after_continue(stub, StopReport(1, SIGINT))
    assert reply == b"T02thread:p1.2;threads:p1.1,p1.2;" + REGISTERS_1


def test_a_stop_is_told_also_if_registers_cannot_be_read(stub: Stub, target: FakeTarget) -> None:
    target.refuse_registers = True
    assert after_continue(stub, StopReport(1, SIGSEGV)) == b"T0bthread:p1.2;"


def test_a_stop_selects_its_thread(stub: Stub) -> None:
    stub.handle(b"Hgp1.1")
    after_continue(stub, StopReport(1))
    assert stub.handle(b"qC") == b"QCp1.2"
    assert stub.handle(b"p10") == b"1001000000000000"


def test_a_stop_that_nobody_waits_for_is_not_told(stub: Stub) -> None:
    """It would be taken for the answer to the next packet."""
    assert not stub.owes_reply
    assert stop(stub, StopReport(0)) is None
    stub.handle(b"c")
    assert stub.owes_reply
    assert stop(stub, StopReport(0)) is not None
    assert not stub.owes_reply
    assert stop(stub, StopReport(1)) is None
    stub.handle(b"D;1")
    assert stop(stub, StopReport(0)) is None


@pytest.mark.parametrize(
    ("report", "for_gdb", "for_others"),
    [
        (StopReport(0, kind=StopKind.EXITED, status=3), b"W03;process:1", b"W03"),
        (StopReport(0, SIGSEGV, kind=StopKind.SIGNALLED), b"X0b;process:1", b"X0b"),
    ],
)
def test_the_end_of_the_vm_is_told(
    report: StopReport, for_gdb: bytes, for_others: bytes, stub: Stub, target: FakeTarget
) -> None:
    assert after_continue(stub, report) == for_gdb
    assert stub.handle(b"m0,1") == EBUSY
    assert stub.handle(b"D;1") == b"OK"
    assert stub.handle(b"vKill;1") == b"OK"
    assert ("detach",) not in target.calls and ("kill",) not in target.calls
    assert after_continue(Stub(target), report) == for_others


def test_a_vm_that_has_ended_before_is_told_on_the_first_question(target: FakeTarget) -> None:
    target.report = StopReport(0, kind=StopKind.EXITED)
    stub = Stub(target)
    assert stub.handle(b"?") == b"W00"
    assert stub.handle(b"c") == EBUSY
    assert stub.session.target.last_error == "the VM has ended"


def test_each_thread_can_be_asked_why_it_stopped(stub: Stub) -> None:
    stub.handle(b"c")
    stop(stub, StopReport(1, kind=StopKind.SWBREAK))
    assert stub.handle(b"qThreadStopInfo2") == b"T05thread:p1.2;swbreak:;" + REGISTERS_1
    reply = stub.handle(b"qThreadStopInfo1")
    assert reply is not None and reply.startswith(b"T00thread:p1.1;10:")


def test_a_thread_id_of_letters_follows_the_name(target: FakeTarget) -> None:
    stub = Stub(FakeTarget(vcpus=11))
    reply = stub.handle(b"qThreadStopInfob")
    assert reply is not None and reply.startswith(b"T00thread:b;")


# ---- Breakpoints ----


@pytest.mark.parametrize("kind", [kind for kind in BreakpointKind if kind != 1])
def test_breakpoints_reach_the_target(kind: BreakpointKind, stub: Stub, target: FakeTarget) -> None:
    stub.handle(b"Hgp1.2")
    assert stub.handle(b"Z%d,1000,4" % kind) == b"OK"
    assert stub.handle(b"z%d,1000,4" % kind) == b"OK"
    assert target.calls == [("insert", kind, 1, 0x1000, 4), ("remove", kind, 1, 0x1000, 4)]


def test_objects_of_any_size_can_be_watched(stub: Stub, target: FakeTarget) -> None:
    """gdb sends one packet for all of it."""
    assert stub.handle(b"Z2,1003,10") == b"OK"
    assert stub.handle(b"Z2,fffffffffffffff0,10") == b"OK"
    assert target.calls[0] == ("insert", BreakpointKind.WRITE, 0, 0x1003, 16)


@pytest.mark.parametrize("packet", [b"Z5,1000,1", b"z9,1000,1"])
def test_a_kind_of_breakpoint_that_is_not_known_gets_the_empty_reply(
    packet: bytes, stub: Stub, target: FakeTarget
) -> None:
    assert stub.handle(packet) == b""
    assert target.calls == []


# ---- Threads ----


def test_threads_are_listed(stub: Stub) -> None:
    assert stub.handle(b"qfThreadInfo") == b"mp1.1,p1.2"
    assert stub.handle(b"qsThreadInfo") == b"l"
    stub.handle(b"qSupported:")
    assert stub.handle(b"qfThreadInfo") == b"m1,2"


def test_threads_have_a_name_and_a_state(stub: Stub) -> None:
    assert stub.handle(b"qThreadExtraInfo,p1.2") == b"vCPU 1, halted, CPL <0>".hex().encode()
    document = stub.handle(b"qXfer:threads:read::0,1000")
    assert document is not None and document.startswith(b"l")
    threads = ElementTree.fromstring(document[1:]).findall("thread")
    assert [thread.get("id") for thread in threads] == ["p1.1", "p1.2"]
    assert [thread.get("name") for thread in threads] == ["vCPU 0", "vCPU 1"]
    assert [thread.text for thread in threads] == ["halted, CPL <0>"] * 2


def test_one_thread_is_described_without_asking_for_the_others(
    stub: Stub, target: FakeTarget
) -> None:
    asked: list[int] = []

    def describe(vcpu_id: int) -> str:
        asked.append(vcpu_id)
        return "halted"

    target.describe = describe  # type: ignore[method-assign]
    assert stub.handle(b"qThreadExtraInfo,2") == b"vCPU 1, halted".hex().encode()
    assert asked == [1]


@pytest.mark.parametrize("thread", [b"1", b"2", b"p1.1", b"p1.2", b"p-1.2", b"p0.1", b"0", b"-1"])
def test_threads_that_exist_are_alive(thread: bytes, stub: Stub) -> None:
    assert stub.handle(b"T" + thread) == b"OK"
    assert stub.handle(b"Hg" + thread) == b"OK"
    assert stub.handle(b"Hc" + thread) == b"OK"


def test_any_thread_means_the_one_that_stopped(stub: Stub) -> None:
    after_continue(stub, StopReport(1))
    for thread in (b"0", b"-1", b"p0.0", b"p1.-1", b"p1"):
        stub.handle(b"Hg" + thread)
        assert stub.handle(b"p10") == b"1001000000000000"


# ---- The session ----


def test_acks_end_when_the_client_says_so(target: FakeTarget) -> None:
    stub = Stub(target)
    assert not stub.no_ack_mode
    assert stub.handle(b"QStartNoAckMode") == b"OK"
    assert stub.no_ack_mode


@pytest.mark.parametrize(
    ("packet", "reply"),
    [
        (b"!", b"OK"),
        (b"qAttached", b"1"),
        (b"qAttached:1", b"1"),
        (b"qSymbol::", b"OK"),
        (b"qOffsets", b""),
        (b"vCont?", b"vCont;c;C;s;S;t;r"),
        (b"qWatchpointSupportInfo:", b"num:4;"),
    ],
)
def test_small_talk(packet: bytes, reply: bytes, stub: Stub) -> None:
    assert stub.handle(packet) == reply


def test_the_debugger_is_told_where_a_kernel_has_moved_itself(target: FakeTarget) -> None:
    target.base = 0xFFFF_FFFF_8F80_0000
    assert Stub(target).handle(b"qOffsets") == b"TextSeg=ffffffff8f800000"


@pytest.mark.parametrize("packet", [b"qHostInfo", b"qProcessInfo"])
def test_lldb_learns_the_processor_and_no_process_id(
    packet: bytes, stub: Stub, target: FakeTarget
) -> None:
    """A process id that looks real makes lldb load that process's binary."""
    triple = b"x86_64-unknown-none".hex().encode()
    assert stub.handle(packet) == b"triple:%b;endian:little;ptrsize:8;" % triple
    target.arch = Architecture.I386
    triple = b"i386-unknown-none".hex().encode()
    assert Stub(target).handle(packet) == b"triple:%b;endian:little;ptrsize:4;" % triple


def test_monitor_commands_are_answered_with_text_before_the_reply(stub: Stub) -> None:
    def monitor(command: bytes) -> str:
        assert stub.handle(b"qRcmd," + command.hex().encode()) == b"OK"
        texts = stub.take_console()
        assert stub.take_console() == [], "once"
        assert all(text[:1] == b"O" and len(text) <= PACKET_SIZE for text in texts)
        return bytes.fromhex(b"".join(text[1:] for text in texts).decode()).decode()

    assert monitor(b"help") == "you said help\n"
    assert monitor("é".encode()) == "you said é\n"
    assert monitor(b"quiet") == ""
    assert monitor(b"fail") == "there is no monitor command fail\n"
    assert monitor(b"long") == "x" * PACKET_SIZE, "in several packets"
    assert monitor(b"\xff") == "you said \ufffd\n"
    assert monitor(b"vcpu") == "0\n"
    stub.handle(b"Hgp1.2")
    assert monitor(b"vcpu") == "1\n", "of the thread that is selected"


def test_text_for_the_console() -> None:
    text = "no watchpoints here\n"
    assert console_output(text) == [b"O" + text.encode().hex().encode()]
    assert console_output("") == []
    packets = console_output("x" * PACKET_SIZE)
    assert [len(packet) <= PACKET_SIZE for packet in packets] == [True] * 3


def test_detach_lets_the_guest_run(stub: Stub, target: FakeTarget) -> None:
    assert stub.handle(b"D;1") == b"OK"
    assert target.calls == [("detach",)]
    assert stub.handle(b"m0,1") == EBUSY
    assert stub.handle(b"D") == b"OK", "twice is fine"
    assert target.calls == [("detach",)]


def test_detach_while_the_guest_runs(stub: Stub, target: FakeTarget) -> None:
    stub.handle(b"c")
    assert stub.handle(b"D") == b"OK"
    assert target.calls[-1] == ("detach",)


def test_attach_again_after_a_detach(stub: Stub, target: FakeTarget) -> None:
    stub.handle(b"D;1")
    assert stub.handle(b"vAttach;1") is None
    assert target.calls == [("detach",), ("attach",)]
    assert stub.handle(b"vAttach;1") == EBUSY, "it is on its way"
    reply = stop(stub, StopReport(0))
    assert reply is not None and reply.startswith(b"T05")


def test_attach_to_what_is_attached(stub: Stub) -> None:
    assert stub.handle(b"vAttach;1") == stub.handle(b"?")


@pytest.mark.parametrize(("packet", "reply"), [(b"k", b"X09"), (b"vKill;1", b"OK")])
@pytest.mark.parametrize("before", [b"g", b"c", b"D;1"])
def test_kill_in_any_phase(
    packet: bytes, reply: bytes, before: bytes, stub: Stub, target: FakeTarget
) -> None:
    stub.handle(before)
    assert stub.handle(packet) == reply
    assert target.calls[-1] == ("kill",)
    assert stub.handle(packet) == reply
    assert target.calls.count(("kill",)) == 1


def test_the_phases_have_no_other_ways(target: FakeTarget) -> None:
    session = Session(target)
    session.enter(Phase.ENDED)
    with pytest.raises(AssertionError):
        session.enter(Phase.RUNNING)


# ---- Documents and the one file ----


def test_documents_are_read_in_pieces_that_fit_together(stub: Stub, target: FakeTarget) -> None:
    whole = stub.handle(b"qXfer:threads:read::0,ffff")
    assert whole is not None
    pieces, offset = b"", 0
    while True:
        piece = stub.handle(b"qXfer:threads:read::%x,7" % offset)
        assert piece is not None
        pieces, offset = pieces + piece[1:], offset + len(piece) - 1
        target.vcpus = 1 + offset % 2  # the pieces do not notice
        if piece[:1] == b"l":
            break
    assert pieces == whole[1:]
    assert stub.handle(b"qXfer:threads:read::%x,7" % offset) == b"l"
    assert stub.handle(b"qXfer:threads:read::%x,7" % (offset + 1)) == EINVAL


def test_a_piece_that_ends_with_the_document_is_the_last(stub: Stub) -> None:
    whole = stub.handle(b"qXfer:features:read:target.xml:0,ffff")
    assert whole is not None and whole[:1] == b"l"
    size = len(whole) - 1
    assert stub.handle(b"qXfer:features:read:target.xml:0,%x" % size) == whole
    almost = stub.handle(b"qXfer:features:read:target.xml:0,%x" % (size - 1))
    assert almost == b"m" + whole[1:-1]


def test_the_memory_map_is_told_if_the_target_has_one(stub: Stub, target: FakeTarget) -> None:
    target.ranges = [(0, 1 << 63), (1 << 63, 1 << 63)]
    document = stub.handle(b"qXfer:memory-map:read::0,ffff")
    assert document is not None
    regions = ElementTree.fromstring(document[1:]).findall("memory")
    assert [region.get("type") for region in regions] == ["ram", "ram"]
    assert regions[1].get("start") == "0x8000000000000000"


CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def served(stub: Stub, target: FakeTarget) -> Stub:
    """A session with an executable, whose path needs escapes and is not ASCII."""
    target.file = ExecFile(
        "/guests/é*.elf", 64, len(CONTENT), lambda offset, length: CONTENT[offset : offset + length]
    )
    return stub


def opened(stub: Stub, path: str = "/guests/é*.elf", flags: bytes = b"0") -> bytes | None:
    return stub.handle(b"vFile:open:%b,%b,1c0" % (path.encode().hex().encode(), flags))


def test_gdb_fetches_the_executable_by_itself(served: Stub) -> None:
    assert served.handle(b"qXfer:exec-file:read:1:0,1000") == b"l" + "/guests/é*.elf".encode()
    assert served.handle(b"vFile:setfs:0") == b"F0"
    assert opened(served) == b"F0"
    reply = served.handle(b"vFile:fstat:0")
    assert reply is not None and reply.startswith(b"F40;") and len(reply) == 4 + 64
    fields = struct.unpack(">7I3Q3I", reply[4:])
    assert fields[2] == 0o100444 and fields[7] == len(CONTENT)
    data = b""
    while True:
        reply = served.handle(b"vFile:pread:0,%x,%x" % (PACKET_SIZE, len(data)))
        assert reply is not None and escaped_length(reply) <= PACKET_SIZE
        count, _, piece = reply[1:].partition(b";")
        assert int(count, 16) == len(piece)
        if not piece:
            break
        data += piece
    assert data == CONTENT
    assert served.handle(b"vFile:close:0") == b"F0"
    assert served.handle(b"vFile:close:0") == b"F-1,9"


def test_no_other_file_is_served(served: Stub, target: FakeTarget) -> None:
    for path in ("/etc/passwd", "/guests/é*.elf/../é*.elf", "", "/guests/é*.elf\x00"):
        assert opened(served, path) == b"F-1,2"
    target.file = None
    assert opened(served) == b"F-1,2"


def test_the_executable_is_read_only(served: Stub) -> None:
    for flags in (b"1", b"2", b"201", b"600"):
        assert opened(served, flags=flags) == b"F-1,1e"


def test_open_files_are_bounded(served: Stub) -> None:
    assert [opened(served) for _ in range(16)] == [b"F%x" % n for n in range(16)]
    assert opened(served) == b"F-1,18"
    assert served.handle(b"vFile:close:5") == b"F0"
    assert opened(served) == b"F5"


def test_a_file_that_has_vanished_is_an_error(served: Stub, target: FakeTarget) -> None:
    def vanished(offset: int, length: int) -> bytes:
        raise OSError

    assert target.file is not None
    target.file = replace(target.file, pread=vanished)
    opened(served)
    assert served.handle(b"vFile:pread:0,10,0") == b"F-1,5"


@pytest.mark.parametrize(
    "packet",
    packets("""
    open open:zz,0,0 open:2f,0 pread:0 pread:0,1 pread:x,1,1 fstat: fstat:0,1 close: setfs: setfs:-1
"""),
)
def test_malformed_file_operations_are_invalid(packet: bytes, served: Stub) -> None:
    assert served.handle(b"vFile:" + packet) == b"F-1,16"


@pytest.mark.parametrize("packet", [b"pread:7,1,0", b"fstat:7", b"close:7"])
def test_files_that_are_not_open(packet: bytes, served: Stub) -> None:
    assert served.handle(b"vFile:" + packet) == b"F-1,9"


def test_a_32_bit_executable_is_not_offered_with_a_64_bit_description(target: FakeTarget) -> None:
    """gdb would fetch it only to say that it does not recognize it."""
    target.file = ExecFile("/hello.elf", 32, 4, lambda offset, length: b"\x7fELF")
    path = b"/hello.elf".hex().encode()
    for architecture, offered in ((Architecture.I386, True), (Architecture.X86_64, False)):
        target.arch = architecture
        stub = Stub(target)
        assert (b"exec-file" in (stub.handle(b"qSupported") or b"")) is offered
        assert (stub.handle(b"vFile:open:%b,0,0" % path) == b"F0") is offered


def test_a_path_is_told_as_the_host_spells_it(stub: Stub, target: FakeTarget) -> None:
    target.file = ExecFile("/guests/\udcff.elf", 64, 0, lambda o, n: b"")
    assert stub.handle(b"qXfer:exec-file:read::0,1000") == b"l/guests/\xff.elf"
    assert stub.handle(b"vFile:open:2f6775657374732fff2e656c66,0,0") == b"F0"

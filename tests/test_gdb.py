"""Real gdb, as its users use it: typed commands in batch, and by its machine interface.

What only some hosts can (watchpoints, for one) is in test_gdb_hardware.py.

The guests are those of guests/; where a test needs other code, gdb writes it into guest memory.
"""

from __future__ import annotations

import re
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.hostprobe import host
from pyvmm.monitor import COMMANDS
from tests.conftest import GUESTS, REPOSITORY
from tests.gdb_client import (
    ENVIRONMENT,
    PATIENCE,
    Gdb,
    GdbError,
    Serving,
    gdb_batch,
    needs_gdb,
    parse_record,
    pyvmm_command,
    serving,
    wait_for,
    write,
)
from tests.support import requires

pytestmark = [pytest.mark.kvm, pytest.mark.process, needs_gdb]


@pytest.fixture
def gdb() -> Iterator[Gdb]:
    """A gdb that is connected to nothing yet."""
    with Gdb() as client:
        yield client


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path, "loops.bin") as guest:
        yield guest


@pytest.fixture
def cloops(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path, "cloops.bin") as guest:
        yield guest


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path, "counter.bin") as guest:
        yield guest


def run_code(gdb: Gdb, code: bytes, steps: int) -> None:
    """Put `code` at the program counter and execute so many instructions of it."""
    write(gdb, gdb.number("$pc"), code)
    for _ in range(steps):
        gdb.resume("stepi")


# ---- Our own reader of gdb's records ----


@pytest.mark.parametrize(
    ("line", "kind", "name", "values"),
    [
        ('~"a \\"b\\" \\303\\244\\n"', "~", 'a "b" ä\n', {}),
        ('7^done,value="3"', "^", "done", {"value": "3"}),
        ("^running", "^", "running", {}),
        ('*stopped,frame={addr="0x1",args=[]},core="0"', "*", "stopped",
         {"frame": {"addr": "0x1", "args": []}, "core": "0"}),
        ('^done,stack=[frame={level="0"},frame={level="1"}]', "^", "done",
         {"stack": [{"level": "0"}, {"level": "1"}]}),
        ("(gdb) ", "@", "", {}),
    ],
)  # fmt: skip
def test_a_line_of_gdb_is_read(line: str, kind: str, name: str, values: object) -> None:
    record = parse_record(line)
    assert (record.kind, record.name, record.values) == (kind, name, values)


# ---- Attaching, symbols, source ----


def test_symbols_and_source_lines_are_there_by_themselves(loops: Serving) -> None:
    text = gdb_batch(loops, "info symbol $pc", "list inner", "info line outer_loop")
    assert "_start () at loops.S:29" in text
    assert "xor     ebp, ebp" in text, "the first instruction's source line"
    assert "_start in section .text" in text
    assert "# Adds rdi to total." in text
    assert re.search(r'Line \d+ of "loops.S" starts at address 0x[0-9a-f]+ <outer', text)


def test_attaching_prints_no_error_and_no_unknown_warning(cloops: Serving) -> None:
    text = gdb_batch(cloops, "continue")
    # The one warning is gdb's own, and right: it reads the file with the symbols through us.
    warnings = [line for line in text.splitlines() if "arning" in line or "rror" in line]
    assert all("File transfers from remote targets can be slow" in line for line in warnings), text


def test_an_elf_image_is_its_own_symbol_file(tmp_path: Path) -> None:
    with serving(tmp_path, "cloops.elf") as guest:
        text = gdb_batch(guest, "break inner", "continue", "info args")
        assert "inner (n=1) at guests/cloops.c:18" in text
        assert "n = 1" in text


def test_without_symbols_gdb_attaches_in_silence(tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(b"\x90\x90\xf4")
    with serving(tmp_path, image) as guest:
        text = gdb_batch(guest, "stepi", "print $pc", "continue")
        assert "= (void (*)()) 0x100001" in text
        assert "exited normally" in text
        assert guest.wait() == 0


def test_the_guest_ends_and_gdb_says_with_which_status(cloops: Serving) -> None:
    assert "exited with code 0107" in gdb_batch(cloops, "continue")  # gdb writes it in octal
    assert cloops.wait() == 71


# ---- Breakpoints ----


def test_break_stops_and_bt_shows_the_callers(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("break inner")
    stop = gdb.resume("-exec-continue")
    assert stop["reason"] == "breakpoint-hit"
    assert (stop["frame"]["func"], stop["frame"]["line"]) == ("inner", "18")
    frames = gdb.command("-stack-list-frames")["stack"]
    assert [frame["func"] for frame in frames][:3] == ["inner", "outer", "main"]
    assert gdb.evaluate("n") == "1"
    gdb.execute("up")
    assert gdb.evaluate("i") == "1"


def test_tbreak_stops_once(loops: Serving) -> None:
    text = gdb_batch(loops, "tbreak inner", "continue", "continue")
    assert text.count("Temporary breakpoint 1, inner ()") == 1
    assert "exited normally" in text
    assert "total is 0x23" in loops.output


def test_a_condition_decides_whether_it_stops(cloops: Serving) -> None:
    text = gdb_batch(cloops, "break inner if n == 4", "continue", "print total", "continue",
                     "cond 1 n == 5", "continue", "print n", "continue")  # fmt: skip
    assert text.count("Breakpoint 1, inner (n=4)") == 2, text
    assert "$1 = 16" in text  # 1 + (1+2) + (1+2+3) + (1+2+3)
    assert "$2 = 5" in text


def test_an_ignore_count_passes_so_many_hits(cloops: Serving) -> None:
    text = gdb_batch(cloops, "break inner", "ignore 1 10", "continue", "print n", "print total",
                     "info breakpoints")  # fmt: skip
    assert "$1 = 1" in text and "$2 = 20" in text  # the 11th call: inner(1) of round 5
    assert "breakpoint already hit 11 times" in text


def test_commands_of_a_breakpoint_run_each_time(cloops: Serving, tmp_path: Path) -> None:
    script = tmp_path / "script.gdb"
    script.write_text('break inner\ncommands\nsilent\nprintf "n is %ld\\n", n\ncontinue\nend\n')
    text = gdb_batch(cloops, f"source {script}", "continue")
    assert text.count("n is ") == 15
    assert cloops.wait() == 71


def test_a_disabled_breakpoint_does_not_stop(loops: Serving) -> None:
    text = gdb_batch(loops, "break inner", "break outer", "disable 1", "continue", "disable 2",
                     "continue")  # fmt: skip
    assert "Breakpoint 2, outer" in text and "Breakpoint 1, inner" not in text
    assert "exited normally" in text


def test_a_breakpoint_where_nothing_is_mapped_says_what_to_do(loops: Serving) -> None:
    text = gdb_batch(loops, "break *0xffff800000000000", "continue", "monitor error")
    assert "Cannot insert breakpoint 1" in text
    assert "nothing is mapped at 0xffff800000000000 yet: use hbreak" in text


def test_gdb_never_sees_its_own_breakpoints_in_memory(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    code = gdb.memory(0x10_0000, 0x100)
    gdb.execute("set breakpoint always-inserted on")
    for place in ("main", "outer", "inner", "*$pc"):
        gdb.execute(f"break {place}")
    gdb.execute("set trust-readonly-sections off")
    assert gdb.memory(0x10_0000, 0x100) == code
    text = gdb.execute("disassemble inner")
    assert "push   %rbp" in text and "int3" not in text and "hlt" not in text


# ---- Steps ----


def test_step_goes_into_a_function_and_finish_out_of_it(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("tbreak outer")
    gdb.resume("-exec-continue")
    for _ in range(3):
        stop = gdb.resume("step")
        if stop["frame"]["func"] == "inner":
            break
    assert stop["frame"]["func"] == "inner"
    assert stop["reason"] == "end-stepping-range"
    stop = gdb.resume("finish")
    assert (stop["reason"], stop["frame"]["func"]) == ("function-finished", "outer")
    assert gdb.evaluate("total") == "1"


def test_next_steps_over_a_call(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("tbreak outer")
    gdb.resume("-exec-continue")
    for _ in range(4):
        assert gdb.resume("next")["frame"]["func"] in ("outer", "main")
    assert gdb.number("total") >= 1


def test_stepi_is_one_instruction_and_nexti_one_with_its_call(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    assert gdb.resume("stepi")["frame"]["addr"] == "0x0000000000100002"
    assert gdb.resume("stepi")["frame"]["func"] == "main"
    gdb.execute("tbreak outer_loop")
    gdb.resume("-exec-continue")
    gdb.resume("nexti")
    assert gdb.number("(long)total") == 0
    stop = gdb.resume("nexti")  # over `call inner`
    assert stop["frame"]["func"] == "outer"
    assert gdb.number("(long)total") == 1


def test_stepi_takes_a_count(gdb: Gdb, counter: Serving) -> None:
    gdb.connect(counter)
    gdb.resume("stepi 100")
    assert gdb.number("(long)counter") == 50


def test_until_leaves_a_loop_and_advance_goes_to_a_place(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    gdb.execute("break outer if $rdi == 5")
    gdb.resume("-exec-continue")
    gdb.execute("delete")
    assert gdb.resume("advance inner")["frame"]["func"] == "inner"
    gdb.resume("finish")
    for _ in range(20):
        stop = gdb.resume("until")
        if "pop" in gdb.execute("x/i $pc"):
            break
    assert stop["frame"]["func"] == "outer"
    assert gdb.number("(long)total") == 35, "all five rounds of the loop are done"


def test_a_line_is_stepped_in_the_vmm_not_by_packets(gdb: Gdb, counter: Serving) -> None:
    gdb.connect(counter)
    # One line that takes two steps for ever: only a breakpoint on the way ends it.
    gdb.execute("tbreak *_start if (long)counter == 20")
    gdb.execute("set debug remote 1")
    gdb.resume("stepi")
    gdb.resume("-exec-step")
    assert "vCont;r" in gdb.log


def test_a_guest_function_can_be_called(cloops: Serving) -> None:
    text = gdb_batch(cloops, "break outer", "continue", "call inner(7)", "print total",
                     "call outer(2)", "backtrace 3")  # fmt: skip
    assert "$1 = 7" in text
    # A breakpoint in what is called stops there, as in any program.
    assert "stopped while in a function called from GDB" in text
    assert re.search(r"#0 +outer \(n=2\).*\n#1 +<function called from gdb>", text), text


def test_a_called_function_returns_its_value(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("tbreak outer")
    gdb.resume("-exec-continue")
    before = gdb.evaluate("$rsp"), gdb.evaluate("$rip"), gdb.evaluate("$rdi")
    assert gdb.execute("call main()").strip() == "$1 = 35"
    assert (gdb.evaluate("$rsp"), gdb.evaluate("$rip"), gdb.evaluate("$rdi")) == before
    gdb.execute("set var total = 0")
    gdb.execute("delete")
    assert gdb.resume("-exec-continue")["exit-code"] == "0107"


def test_return_and_jump_move_the_program_counter(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("break inner if n == 2")
    gdb.resume("-exec-continue")
    gdb.execute("return")  # this call adds nothing
    gdb.execute("delete")
    assert gdb.resume("-exec-continue")["exit-code"] == "0103"  # (33 << 1) | 1


# ---- Watchpoints ----


def test_software_watchpoints_work_everywhere(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("set can-use-hw-watchpoints 0")
    gdb.execute("watch total")
    stop = gdb.resume("-exec-continue")
    assert (stop["reason"], stop["value"]) == ("watchpoint-trigger", {"old": "0", "new": "1"})


# ---- Threads ----


def test_each_vcpu_is_a_thread_with_its_state(tmp_path: Path) -> None:
    with serving(tmp_path, "counter.bin", "-c", "3", "--irqchip", "off") as guest:
        text = gdb_batch(guest, "info threads", "thread apply all backtrace", "thread 2",
                         "print $_thread")  # fmt: skip
    assert re.search(r'\* 1 +Thread 1\.1 "vCPU 0" \(\w+, CPL 0, 64-bit mode\) _start', text), text
    assert all(f'Thread 1.{n + 1} "vCPU {n}"' in text for n in range(3))
    assert text.count("#0  _start () at counter.S") >= 3
    assert "$1 = 2" in text


def test_threads_have_registers_of_their_own(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "counter.bin", "-c", "2", "--irqchip", "off") as guest:
        gdb.connect(guest)
        gdb.execute("thread apply all -q -s set $rbx = 0x1000 + $_thread")
        gdb.execute("set scheduler-locking off")
        gdb.resume("stepi")
        for thread in (1, 2):
            gdb.execute(f"thread {thread}")
            assert gdb.number("$rbx") == 0x1000 + thread


def test_scheduler_locking_on_runs_one_thread_only(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "counter.bin", "-c", "2", "--irqchip", "off") as guest:
        gdb.connect(guest)
        gdb.execute("thread 2")
        gdb.execute("set scheduler-locking on")
        gdb.resume("stepi 10")
        assert gdb.number("(long)counter") == 5
        gdb.execute("tbreak *_start")
        stop = gdb.resume("-exec-continue")
        assert stop["thread-id"] == "2"
        gdb.execute("thread 1")
        assert gdb.number("$pc") == 0x10_0000, "the first one has never run"


def test_scheduler_locking_step_parks_the_others_in_a_step(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "counter.bin", "-c", "2", "--irqchip", "off") as guest:
        gdb.connect(guest)
        gdb.execute("set scheduler-locking step")
        for _ in range(6):
            gdb.resume("stepi")
        assert gdb.number("(long)counter") == 3


def test_a_breakpoint_stops_whichever_vcpu_comes_there(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "counter.bin", "-c", "4", "--irqchip", "off") as guest:
        gdb.connect(guest)
        gdb.execute("break *_start thread 3")
        assert gdb.resume("-exec-continue")["thread-id"] == "3"
        assert gdb.resume("-exec-continue")["thread-id"] == "3"


# ---- Registers ----

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))


def test_general_registers_are_written_and_the_guest_sees_them(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    values = {name: 0x1111_0000_0000_0000 + 0x2_0000 + 0x100 * n for n, name in enumerate(GENERAL)}
    values["rsp"], values["rbp"] = 0x7_0000, 0x7_0100
    for name, value in values.items():
        gdb.execute(f"set ${name} = {value:#x}")
    run_code(gdb, b"\x53\x41\x57\x50", 3)  # push rbx; push r15; push rax
    values["rsp"] -= 24
    assert {name: gdb.number(f"${name}") for name in GENERAL} == values
    stack = struct.unpack("<3Q", gdb.memory(0x7_0000 - 24, 24))
    assert stack == (values["rax"], values["r15"], values["rbx"])


def test_parts_of_registers_can_be_written(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    gdb.execute("set $rax = 0x1122334455667788")
    gdb.execute("set $al = 0xaa")
    gdb.execute("set $ah = 0xbb")
    assert gdb.number("$rax") == 0x1122_3344_5566_BBAA
    gdb.execute("set $ax = 0xcccc")
    assert gdb.number("$rax") == 0x1122_3344_5566_CCCC


def test_flags_and_program_counter_are_written(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    gdb.execute("set $eflags = 0x8d7 & ~0x800")
    assert gdb.evaluate("$eflags") == "[ CF PF AF ZF SF IOPL=0 ]"
    run_code(gdb, b"\x9c\x90", 1)  # pushfq
    assert struct.unpack("<Q", gdb.memory(gdb.number("$rsp"), 8))[0] == 0xD7
    gdb.execute("set $pc = &inner")
    assert "<inner>" in gdb.execute("info registers rip")


def test_segment_registers_and_bases(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    names = ("cs", "ss", "ds", "es", "fs", "gs")
    assert [gdb.number(f"${name}") for name in names] == [8, 16, 16, 16, 16, 16]
    bases = {"fs_base": 0x20_0000, "gs_base": 0x7FFF_1234_5000, "k_gs_base": 0x1234_5678}
    for name, value in bases.items():
        gdb.execute(f"set ${name} = {value:#x}")
    assert {name: gdb.number(f"${name}") for name in bases} == bases
    write(gdb, 0x20_0008, struct.pack("<Q", 0xFEED))
    run_code(gdb, b"\x64\x48\x8b\x04\x25\x08\x00\x00\x00", 1)  # mov rax, fs:[8]
    assert gdb.number("$rax") == 0xFEED
    gdb.execute("set $es = 0")
    assert gdb.number("$es") == 0


def test_control_registers_are_named_by_their_bits_and_written(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    assert "[ PE " in gdb.evaluate("$cr0") and " PG ]" in gdb.evaluate("$cr0")
    assert gdb.evaluate("$efer") == "[ LME LMA ]"
    assert "PAE" in gdb.evaluate("$cr4")
    gdb.execute("set $cr2 = 0x123456789")
    gdb.execute("set $cr8 = 5")
    run_code(gdb, b"\x0f\x20\xd0", 1)  # mov rax, cr2
    assert gdb.number("$rax") == 0x1_2345_6789
    assert gdb.number("$cr8") == 5


def test_a_control_register_that_the_processor_refuses_is_an_error(loops: Serving) -> None:
    text = gdb_batch(loops, "set $cr0 = 0x80000000L", "print $cr0", "stepi", "info registers rip")
    assert "Could not write register" in text, "paging without protection: no processor has that"
    assert "$1 = [ PE" in text
    assert "0x100002" in text, "the guest is as it was"


def test_x87_registers(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    assert gdb.number("$fctrl") == 0x37F
    assert gdb.number("$ftag") == 0xFFFF
    gdb.execute("set $st0 = 1.5")
    gdb.execute("set $fctrl = 0x27f")
    assert gdb.evaluate("$st0") == "1.5"
    gdb.execute("set $ftag = 0xfffc")  # the register that is st0 is not empty
    assert "1.5" in gdb.execute("info float")
    gdb.resume("stepi")
    assert (gdb.evaluate("$st0"), gdb.number("$fctrl")) == ("1.5", 0x27F)


def test_sse_registers_and_mxcsr(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    assert gdb.evaluate("$mxcsr") == "[ IM DM ZM OM UM PM RC=0 ]"
    for number in (0, 7, 15):
        gdb.execute(f"set $xmm{number}.v4_float = {{1, 2.5, -3, {number}}}")
    gdb.execute("set $mxcsr = 0x9fc0")
    run_code(gdb, b"\x0f\x11\x04\x25\x00\x00\x20\x00", 1)  # movups [0x200000], xmm0
    assert struct.unpack("<4f", gdb.memory(0x20_0000, 16)) == (1, 2.5, -3, 0)
    assert gdb.evaluate("$xmm15.v4_float") == "{1, 2.5, -3, 15}"
    assert gdb.evaluate("$mxcsr") == "[ DAZ IM DM ZM OM UM PM RC=0 FZ ]"


def test_avx_registers(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    if gdb.evaluate("$ymm0") == "void":
        assert "avx" not in gdb.execute("maint print xml-tdesc")
        return
    low, high = "0x1111111122222222", "0x3333333344444444"
    gdb.execute(f"set $ymm3.v4_int64 = {{{low}, 1, 2, {high}}}")
    gdb.resume("stepi")
    assert gdb.number("$ymm3.v4_int64[3]") == int(high, 16)
    assert gdb.number("$xmm3.v2_int64[0]") == int(low, 16)
    assert gdb.number("$ymm2.v4_int64[3]") == 0


def test_the_guest_sees_vector_and_float_registers_in_ring_3(tmp_path: Path, gdb: Gdb) -> None:
    # In ring 3, because hosts that emulate ring 0 do not know all these instructions there.
    requires("step-user")
    with serving(tmp_path, "ring3.bin") as guest:
        to_ring_3(gdb, guest)
        gdb.execute("set $mxcsr = 0x9f80")
        gdb.execute("set $fctrl = 0x27f")
        gdb.execute("set $xmm9.v2_int64 = {5, 6}")
        # stmxcsr [rsp-8]; fnstcw [rsp-16]; movups [rsp-32], xmm9
        run_code(gdb, b"\x0f\xae\x5c\x24\xf8\xd9\x7c\x24\xf0\x44\x0f\x11\x4c\x24\xe0", 3)
        top = gdb.memory(gdb.number("$rsp") - 32, 32)
        assert struct.unpack("<QQH6xI", top[:28]) == (5, 6, 0x27F, 0x9F80)


def test_registers_are_shown_by_group(gdb: Gdb, cloops: Serving) -> None:
    gdb.connect(cloops)
    gdb.execute("break inner")
    gdb.resume("-exec-continue")
    before = gdb.execute("info all-registers")
    gdb.resume("stepi")
    assert gdb.execute("info all-registers") != before
    for group in ("general", "float", "vector", "all"):
        assert gdb.execute(f"info registers {group}")


# ---- Memory ----


def test_memory_is_read_written_searched_dumped_and_restored(
    tmp_path: Path, gdb: Gdb, loops: Serving
) -> None:
    gdb.connect(loops)
    data = bytes(range(256)) * 64
    write(gdb, 0x20_0000, data)
    file = tmp_path / "dump"
    gdb.execute(f"dump binary memory {file} 0x200000 0x204000")
    assert file.read_bytes() == data
    gdb.execute(f"restore {file} binary 0x300000")
    assert gdb.memory(0x30_0000, len(data)) == data
    assert "1 pattern found" in gdb.execute("find /b1 0x300010, +0x200, 0x42, 0x43")
    assert gdb.execute("x/2xh 0x300010").split()[1:] == ["0x1110", "0x1312"]
    gdb.execute("set {long}0x300000 = -2")
    assert gdb.memory(0x30_0000, 8) == b"\xfe" + b"\xff" * 7


def test_megabytes_are_dumped(tmp_path: Path, gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    file = tmp_path / "dump"
    gdb.execute(f"dump binary memory {file} 0x100000 0x900000")
    data = file.read_bytes()
    assert len(data) == 0x80_0000
    assert data.startswith((GUESTS / "loops.bin").read_bytes())


def test_unmapped_memory_is_an_error_and_not_zeros(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    for address in (0x1_0000_0000, 0xFFFF_8000_0000_0000, 0xF000_0000, (64 << 20)):
        with pytest.raises(GdbError, match="Cannot access memory"):
            gdb.execute(f"x/gx {address:#x}")
    assert gdb.execute(f"x/xb {(64 << 20) - 1:#x}").split()[-1] == "0x00", "RAM's last byte"
    assert "exits" in gdb.execute("monitor help"), "the session is alive"


def test_x_i_and_disassemble(loops: Serving) -> None:
    text = gdb_batch(loops, "x/2i $pc", "disassemble /r inner", "set disassembly-flavor intel",
                     "x/i inner_add")  # fmt: skip
    assert "=> 0x100000 <_start>:\txor    %ebp,%ebp" in text
    assert "55" in text and "push   %rbp" in text
    assert re.search(r"add +QWORD PTR \[rip\+0x[0-9a-f]+\],rdi", text)


def test_a_load_writes_an_image_into_the_guest(gdb: Gdb, tmp_path: Path) -> None:
    with serving(tmp_path, "counter.bin") as guest:
        gdb.connect(guest)
        gdb.execute(f"load {GUESTS / 'loops.elf'}")
        gdb.execute(f"symbol-file {GUESTS / 'loops.elf'}")
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        assert guest.wait() == 0
        assert "total is 0x23" in guest.output


# ---- Memory in every paging mode ----


def test_no_paging(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "hello32.bin", "--mode", "protected") as guest:
        gdb.connect(guest)
        write(gdb, 0x20_0000, b"physical")
        assert gdb.memory(0x20_0000, 8) == b"physical"
        assert "paging is off" in gdb.execute("monitor pagetables")
        assert "paging is off" in gdb.execute("monitor translate 0x100000")


def test_4_level_paging_high_half_addresses(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "paging.bin") as guest:
        gdb.connect(guest)
        gdb.execute("break new_tables")
        gdb.resume("-exec-continue")
        small_page = gdb.number("&small_page")
        write(gdb, 0xFFFF_8000_0000_0020, b"by the high address")
        assert gdb.memory(small_page + 0x20, 19) == b"by the high address"
        write(gdb, 0x21_2340, b"2M")
        assert gdb.memory(0xFFFF_8000_0021_2340, 2) == b"2M"
        # From the last bytes of the small page on nothing is mapped.
        assert len(gdb.memory(0xFFFF_8000_0000_0FFC, 4)) == 4
        with pytest.raises(GdbError):
            gdb.memory(0xFFFF_8000_0000_1000, 4)
        gdb.execute("delete")
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"


def test_user_pages(tmp_path: Path, gdb: Gdb) -> None:
    requires_steps_in_ring_3()
    with serving(tmp_path, "ring3.bin") as guest:
        to_ring_3(gdb, guest)
        assert gdb.execute("x/s &user_hello").endswith('by way of a system call\\n"\n')
        assert "rwxu" in gdb.execute("monitor translate 0x100000")
        write(gdb, gdb.number("&user_hello"), b"RING")
        gdb.execute("delete")
        gdb.resume("-exec-continue")
        assert "RING 3: hello" in guest.output


def test_physical_addresses(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "paging.bin") as guest:
        gdb.connect(guest)
        gdb.execute("maint packet Qqemu.PhyMemMode:1")
        assert gdb.memory(0x1000, 8) != bytes(8), "the page tables of the start"
        gdb.execute("maint packet Qqemu.PhyMemMode:0")


# ---- Modes of the processor ----


def test_real_mode(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "hello16.bin", "--mode", "real") as guest:
        gdb.execute("set architecture i8086")
        gdb.connect(guest)
        assert gdb.number("$pc") == 0x7C00
        assert "mov    $0x7c21,%si" in gdb.execute("x/i $pc"), "16-bit instructions"
        gdb.execute("break putc")
        stop = gdb.resume("-exec-continue")
        assert (stop["reason"], stop["frame"]["func"]) == ("breakpoint-hit", "putc")
        assert "next_char" in gdb.execute("info symbol *(unsigned short *)$esp")
        for _ in range(3):
            gdb.resume("stepi")
        gdb.execute("delete")
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        assert guest.output == "Hello from real mode!\n"


def test_real_mode_without_symbols_is_told_as_16_bits(tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes((GUESTS / "hello16.bin").read_bytes())
    with serving(tmp_path, image, "--mode", "real") as guest:
        text = gdb_batch(guest, "show architecture", "x/2i $pc", "break *0x7c04", "continue",
                         "info registers ip")  # fmt: skip
    assert 'currently "i8086"' in text
    assert "mov    $0x7c21,%si" in text
    assert "Breakpoint 1, 0x00007c04" in text
    assert re.search(r"ip +0x7c04", text)


def test_32_bit_mode(tmp_path: Path) -> None:
    with serving(tmp_path, "hello32.bin", "--mode", "protected") as guest:
        text = gdb_batch(guest, "break putc", "continue", "x/s $esi", "info registers", "stepi",
                         "delete", "continue")  # fmt: skip
        assert "Breakpoint 1, putc () at hello32.S:31" in text
        assert '"ello from protected mode!\\n"' in text
        assert re.search(r"eip +0x100014 +0x100014 <putc>", text) and "rip" not in text
        assert "exited normally" in text
        assert guest.output == "Hello from protected mode!\n"


def requires_steps_in_ring_3() -> None:
    if not (host().step_user or host().step_user_delivered):
        requires("step-user")


def to_ring_3(gdb: Gdb, guest: Serving) -> None:
    """Step the guest `ring3` over its iretq, with no breakpoints left."""
    gdb.connect(guest)
    gdb.execute("tbreak *enter_user")
    gdb.resume("-exec-continue")
    while gdb.number("$cs") & 3 == 0:
        gdb.resume("stepi")


def test_a_guest_is_stepped_into_ring_3_and_over_a_system_call(tmp_path: Path, gdb: Gdb) -> None:
    requires_steps_in_ring_3()
    with serving(tmp_path, "ring3.bin") as guest:
        to_ring_3(gdb, guest)
        assert "<user>" in gdb.execute("info registers rip")
        assert "CPL 3" in gdb.execute("info threads")
        assert gdb.resume("stepi")["frame"]["func"] == "user"
        # `int`: the step ends before the first instruction of its handler, with a clean frame.
        assert gdb.resume("stepi")["frame"]["func"] == "system_call"
        assert gdb.number("$cs") & 3 == 0
        rip, cs, flags = struct.unpack("<3Q", gdb.memory(gdb.number("$rsp"), 24))
        assert (rip, cs & 3, flags & 0x100) == (gdb.number("(long)&user + 9"), 3, 0)
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        assert guest.output.splitlines()[1:3] == [
            "ring 3: hello, by way of a system call", "ring 3: CS says 3, now I try hlt",
        ]  # fmt: skip


def test_a_step_in_ring_3_does_not_disturb_the_guest_afterwards(tmp_path: Path, gdb: Gdb) -> None:
    requires_steps_in_ring_3()
    with serving(tmp_path, "ring3.bin") as guest:
        to_ring_3(gdb, guest)
        gdb.resume("stepi")
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        assert "ring 0: #GP at" in guest.output and "with CS 0x1b, the end" in guest.output


def test_a_kernel_breakpoint_stops_a_guest_that_was_in_ring_3(tmp_path: Path, gdb: Gdb) -> None:
    requires_steps_in_ring_3()
    with serving(tmp_path, "ring3.bin") as guest:
        to_ring_3(gdb, guest)
        gdb.execute("break system_call")
        stop = gdb.resume("-exec-continue")
        assert (stop["reason"], stop["frame"]["func"]) == ("breakpoint-hit", "system_call")


# ---- Exceptions, and the guest's own int3 ----


@pytest.mark.parametrize("name", ["de", "ud", "gp", "pf"])
def test_stepi_over_a_faulting_instruction_lands_at_its_handler(
    tmp_path: Path, gdb: Gdb, name: str
) -> None:
    with serving(tmp_path, "exceptions.bin") as guest:
        gdb.connect(guest)
        gdb.execute(f"tbreak cause_{name}")
        gdb.resume("-exec-continue")
        gdb.resume("stepi")
        assert f"<{name}_handler>" in gdb.execute("info registers rip")
        assert gdb.number("$eflags") & 0x100 == 0
        # And the guest is none the wiser.
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        with_gdb = guest.output
    alone = subprocess.run(
        pyvmm_command("exceptions.bin"), env=ENVIRONMENT, capture_output=True, timeout=PATIENCE
    )
    assert with_gdb == alone.stdout.decode()


def test_each_fault_after_the_other_is_stepped_over(tmp_path: Path, gdb: Gdb) -> None:
    names = ("de", "ud", "gp", "pf")
    with serving(tmp_path, "exceptions.bin") as guest:
        gdb.connect(guest)
        for name in names:
            gdb.execute(f"break cause_{name}")
        for name in names:
            assert gdb.resume("-exec-continue")["frame"]["func"] == f"cause_{name}"
            assert gdb.resume("stepi")["frame"]["func"] == f"{name}_handler"
            gdb.resume("stepi")
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        assert guest.output.endswith("all handled\n")


def test_stepi_over_hlt_leaves_nothing_behind(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    # hlt; six times inc rax; jmp to itself
    write(gdb, gdb.number("$pc"), b"\xf4" + b"\x48\xff\xc0" * 6 + b"\xeb\xfe")
    gdb.execute("set $rax = 0")
    gdb.resume("stepi")
    assert gdb.number("$pc") == 0x10_0001
    gdb.execute("tbreak *0x100013")
    gdb.resume("-exec-continue")
    assert gdb.number("$rax") == 6


def test_a_guests_own_int3_is_undisturbed(tmp_path: Path) -> None:
    with serving(tmp_path, "int3.bin") as guest:
        text = gdb_batch(guest, "break done", "continue", "continue")
        assert "SIGTRAP" not in text
        assert "Breakpoint 1, done ()" in text
        assert guest.output == ("int3 at 0x100018, handler saw 0x100019\nback from the handler\n")


def test_a_guests_own_int3_stops_when_asked_for(tmp_path: Path) -> None:
    requires("breakpoint")
    with serving(tmp_path, "int3.bin", "--gdb-catch-int3") as guest:
        text = gdb_batch(guest, "continue", "info registers rip", "stepi", "continue")
        assert "Program received signal SIGTRAP" in text
        assert re.search(r"rip +0x100018 +0x100018 <the_int3>", text)
        assert "bp_handler () at int3.S" in text
        assert "handler saw 0x100019\nback from the handler\n" in guest.output


def test_catching_int3_can_be_turned_on_and_off(tmp_path: Path, gdb: Gdb) -> None:
    requires("breakpoint")
    with serving(tmp_path, "int3.bin") as guest:
        gdb.connect(guest)
        assert gdb.execute("monitor catch-int3") == "the guest's own int3 goes to the guest\n"
        gdb.execute("monitor catch-int3 on")
        assert gdb.resume("-exec-continue")["signal-name"] == "SIGTRAP"
        assert gdb.execute("monitor catch-int3 off") == "the guest's own int3 goes to the guest\n"
        assert gdb.resume("-exec-continue")["reason"] == "exited-normally"
        assert "handler saw 0x100019" in guest.output


def test_a_crash_can_be_looked_at_before_the_vm_ends(tmp_path: Path) -> None:
    with serving(tmp_path, "triplefault.bin") as guest:
        text = gdb_batch(guest, "continue", "info registers rip", "x/i $pc", "monitor regs",
                         "continue")  # fmt: skip
        assert "Program received signal SIGSEGV" in text
        if host().crash_registers:
            assert "ud2" in text
            assert "CPL 0, 64-bit mode" in text
        assert "Program terminated with signal SIGSEGV" in text
        assert guest.wait() == 6


# ---- ^C, detach, kill, a gdb that dies ----


def let_it_count(gdb: Gdb) -> None:
    """Continue and interrupt until the counter has moved: a stop can come before it does."""
    before = gdb.number("(long)counter")
    for _ in range(20):
        gdb.command("-exec-continue")
        time.sleep(0.05)
        gdb.command("-exec-interrupt")
        assert gdb.wait_stop()["signal-name"] == "SIGINT"
        if gdb.number("(long)counter") > before:
            return
    raise AssertionError("the guest does not run")


def test_exec_interrupt_stops_a_running_guest(gdb: Gdb, counter: Serving) -> None:
    gdb.connect(counter)
    for _ in range(3):
        let_it_count(gdb)


def test_exec_interrupt_is_not_lost_between_hits_whose_condition_is_false(
    gdb: Gdb, counter: Serving
) -> None:
    gdb.connect(counter)
    gdb.command("-break-insert -c 0 *0x100007")
    for _ in range(10):
        gdb.command("-exec-continue")
        time.sleep(0.05)
        gdb.command("-exec-interrupt")
        assert gdb.wait_stop()["signal-name"] == "SIGINT"


@pytest.mark.parametrize(
    "before",
    [(), ("tbreak *0x100007", "continue", "break *0x100007 if 0")],
    ids=["running", "a false condition"],
)
def test_control_c_in_gdbs_terminal_stops_the_guest(
    counter: Serving, tmp_path: Path, before: tuple[str, ...]
) -> None:
    """Also one that it goes on from all the time, because a condition is false.

    The first breakpoint makes pyvmm probe the host, which takes some time of the CPU, too.
    """
    lines = (f"target remote {counter.address}", *before, "echo ready\\n", "continue",
             "print (long)counter > 0")  # fmt: skip
    output = tmp_path / "gdb"
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["gdb", "-nx", "-q", "-batch", *(word for line in lines for word in ("-ex", line))],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=ENVIRONMENT, cwd=REPOSITORY,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: "ready\n" in output.read_text(), "gdb does not connect")
        # The guest says nothing: see by the time it takes that it runs.
        pid, used = counter.process.pid, _cpu_seconds(counter.process.pid)
        wait_for(lambda: _cpu_seconds(pid) > used + 0.2, "the guest does not run")
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait(PATIENCE)
    text = output.read_text()
    assert "received signal SIGINT" in text
    assert re.search(r"\$\d = 1\n", text)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_detach_lets_the_guest_run_to_its_end(loops: Serving) -> None:
    text = gdb_batch(loops, "break inner", "continue", "detach")
    assert "[Inferior 1 (process 1) detached]" in text
    assert loops.wait() == 0
    assert loops.output == "total is 0x23\n"


def test_quitting_gdb_detaches_and_does_not_kill(loops: Serving) -> None:
    gdb_batch(loops, "break inner", "continue")
    assert loops.wait() == 0
    assert loops.output == "total is 0x23\n"


def test_detach_and_attach_again(counter: Serving) -> None:
    for _ in range(4):
        text = gdb_batch(counter, "break _start", "continue", "stepi", "print (long)counter",
                         "detach")  # fmt: skip
        assert "Breakpoint 1, _start ()" in text
        assert "detached" in text
    assert not counter.ended


def test_a_gdb_that_detaches_and_connects_again_by_itself(gdb: Gdb, counter: Serving) -> None:
    gdb.connect(counter)
    counts = [gdb.number("*(long *)&counter")]
    for _ in range(20):
        gdb.command("-target-detach")
        time.sleep(0.05)
        gdb.connect(counter)
        counts.append(gdb.number("*(long *)&counter"))
        if len(set(counts)) == 3:
            break
    assert counts[0] == 0 and len(set(counts)) == 3 and counts == sorted(counts)


@pytest.mark.parametrize("state", ["stopped", "running", "at a breakpoint", "stepping"])
def test_a_gdb_that_is_killed_leaves_a_running_guest(
    counter: Serving, gdb: Gdb, state: str
) -> None:
    gdb.connect(counter)
    code = gdb.memory(0x10_0000, 16)
    if state == "running":
        gdb.command("-exec-continue")
    elif state == "at a breakpoint":
        gdb.execute("set breakpoint always-inserted on")
        gdb.execute("break _start")
        gdb.resume("-exec-continue")
    elif state == "stepping":
        gdb.command('-interpreter-exec console "stepi 1000000"')
    gdb.kill()
    with Gdb() as second:
        second.connect(counter)
        assert second.memory(0x10_0000, 16) == code, "no breakpoint is left"
        let_it_count(second)
        assert second.number("$eflags") & 0x100 == 0


def test_kill_ends_the_vm(counter: Serving) -> None:
    assert "[Inferior 1 (process 1) killed]" in gdb_batch(counter, "kill")
    assert counter.wait() == 0


def test_a_second_gdb_is_refused_and_the_first_not_disturbed(gdb: Gdb, counter: Serving) -> None:
    gdb.connect(counter)
    text = gdb_batch(counter, "print $pc")
    assert "one at a time" in text or re.search("Remote c.* error|closed|reset", text)
    assert gdb.number("$pc") == 0x10_0000
    assert "one at a time" in counter.messages


def test_gdb_nowait_attaches_to_a_guest_that_runs(tmp_path: Path) -> None:
    with serving(tmp_path, "counter.bin", "--gdb-nowait") as guest:
        for _ in range(20):
            text = gdb_batch(guest, "print (long)counter > 0", "detach")
            if "$1 = 1" in text:
                break
            assert "$1 = 0" in text  # it was stopped before it had executed anything
        assert "$1 = 1" in text
        assert not guest.ended


# ---- Ways to connect ----


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(tmp_path, "loops.bin", at=f"unix:{path}") as guest:
        assert guest.address == str(path)
        assert "exited normally" in gdb_batch(guest, "continue")
        assert guest.wait() == 0
        assert not path.exists()


def test_a_pipe_from_gdb_itself(tmp_path: Path) -> None:
    command = " ".join(pyvmm_command("loops.bin", "--gdb", "stdio"))
    text = gdb_batch(f"| {command}", "break inner", "continue", "delete", "continue")
    assert "Breakpoint 1, inner () at loops.S" in text
    assert "total is 0x23" in text, "the guest prints on stderr, which is gdb's"
    assert "exited normally" in text


def test_extended_remote(counter: Serving) -> None:
    text = gdb_batch(counter, "stepi", "detach", "attach 1", "print $_inferior", "kill",
                     connect="target extended-remote")  # fmt: skip
    assert "detached" in text and "killed" in text
    assert "SIGINT" not in text, "nobody has pressed ^C"
    assert "$1 = 1" in text
    assert counter.wait() == 0


def test_tcp_by_name(counter: Serving) -> None:
    port = counter.address.rpartition(":")[2]
    assert "_start () at counter.S" in gdb_batch(f"localhost:{port}", "detach")


# ---- monitor ----


def test_monitor_help_names_every_command(loops: Serving) -> None:
    text = gdb_batch(loops, "monitor help", "monitor")
    for command in COMMANDS:
        assert text.count(f"\n{command.name} ") == 2, command.name


MONITOR = (
    ("regs", r"rip 0x0000000000100000  rflags 0x2"),
    ("regs", r"idt base 0x"),
    ("regs", r"efer 0x500"),
    ("translate 0x100000", r"PML4E +at GPA 0x1000 = 0x[0-9a-f]+ +P RW"),
    ("translate $pc", r"GPA 0x100000, rwx"),
    ("translate 0xffff800000000000", r"not mapped: "),
    ("pagetables", r"0x0000000000000000 - 0x0000000100000000  GPA 0x0"),
    ("exits", r"vCPU 0, since it was created:"),
    ("memory", r"0x0000000000 - 0x0004000000  64M RAM"),
    ("memory", r"0x3f8"),
    ("vcpus", r"vCPU 0: rip 0x100000, \w+, CPL 0, 64-bit mode"),
    ("probe", r"watchpoint +watchpoints, CPL 0 +(yes|NO)"),
    ("where", r"vCPU 0: at _start\nnames: .*/loops\.elf"),
    ("kaslr", r"no symbol table of a 64-bit Linux kernel in memory"),
    ("dmesg", r"no symbol table of a 64-bit Linux kernel in memory"),
    ("symbols", r"name a file, as System.map"),
    ("symbols /no/such/file", r"/no/such/file: No such file"),
    ("  symbols   /no/such/ file ", r"/no/such/ file: No such file"),
    ("screen", r"the screen is blank"),
    ("catch-int3", r"the guest's own int3 goes to the guest"),
    ("reset", r"the machine is reset"),
    ("reset-breakpoints", r"0 breakpoints removed"),
    ("error", r"no packet was refused"),
    ("inject-nmi", r"vCPU 0 takes an NMI when it runs"),
    # with nonsense
    ("no-such", r"no-such: unknown command; try `monitor help`"),
    ("re", r"re: ambiguous command"),
    ("reg", r"rip 0x"),
    ("regs 7", r"there is no vCPU 7"),
    ("regs x", r"'x' is no vCPU"),
    ("regs 0 0", r"name one vCPU"),
    ("translate", r"name one address, as 0x1000"),
    ("translate zz", r"'zz' is no address: write 0x1000"),
    ("translate $nothing", r"'\$nothing' is no register"),
    ("translate $pc 0", r"GPA 0x100000, rwx"),
    ("translate 1 2", r"there is no vCPU 2"),
    ("translate 1 0 0", r"name one vCPU"),
    ("pagetables 9", r"there is no vCPU 9"),
    ("exits 9", r"exits takes no argument"),
    ("memory 1", r"memory takes no argument"),
    ("vcpus 1", r"vcpus takes no argument"),
    ("probe 1", r"probe takes no argument"),
    ("catch-int3 maybe", r"catch-int3: on or off"),
    ("inject-nmi 5", r"there is no vCPU 5"),
    ("reset-breakpoints 1", r"reset-breakpoints takes no argument"),
    ("res", r"res: ambiguous command"),
    ("catch-int3 on off", r"catch-int3: on or off"),
    ("regs -1", r"there is no vCPU -1"),
    (
        "symbols /proc/self/pagemap",
        r"/proc/self/pagemap: (too long for|:1: not a line of) a System",
    ),
    ("screen 1", r"screen takes no argument"),
    ("where 1", r"where takes no argument"),
    ("kaslr 1", r"kaslr takes no argument"),
    ("dmesg x", r"say how many of the last messages, as 20"),
    ("error 1", r"error takes no argument"),
    ("quit now", r"quit takes no argument"),
)


def test_every_monitor_command_answers_also_to_nonsense(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    for command, expected in MONITOR:
        answer = gdb.execute(f"monitor {command}")
        assert re.search(expected, answer), f"monitor {command}: {answer}"
        assert answer.endswith("\n")
    assert {row.name for row in COMMANDS} - {"help", "quit"} <= {c.split()[0] for c, _ in MONITOR}
    assert not loops.ended
    assert "Traceback" not in loops.messages


def test_monitor_reset_breakpoints_takes_them_out(gdb: Gdb, loops: Serving) -> None:
    gdb.connect(loops)
    gdb.execute("set breakpoint always-inserted on")
    gdb.execute("break inner")
    assert "1 breakpoint removed" in gdb.execute("monitor reset-breakpoints")
    assert gdb.resume("-exec-continue")["reason"] == "exited-normally"


def test_what_monitor_prints_is_output_like_any_other(loops: Serving, tmp_path: Path) -> None:
    """It can be logged, or read by a script, although the protocol has two ways to send it."""
    log = tmp_path / "log"
    logging = "set logging enabled"
    gdb_batch(loops, f"set logging file {log}", f"{logging} on", "monitor vcpus", f"{logging} off")
    assert re.search(r"^vCPU 0: rip 0x100000, .*64-bit mode\n", log.read_text(), re.MULTILINE)


def test_monitor_quit_ends_the_vm(counter: Serving) -> None:
    gdb_batch(counter, "monitor quit")
    assert counter.wait() == 0


def test_monitor_is_of_the_thread_that_is_selected(tmp_path: Path, gdb: Gdb) -> None:
    with serving(tmp_path, "counter.bin", "-c", "2", "--irqchip", "off") as guest:
        gdb.connect(guest)
        gdb.execute("set scheduler-locking on")
        gdb.execute("thread 2")
        gdb.resume("stepi")
        assert "rip 0x0000000000100007" in gdb.execute("monitor regs 1")
        assert "rip 0x0000000000100007" in gdb.execute("monitor regs")
        assert "GPA 0x100007" in gdb.execute("monitor translate $pc")
        gdb.execute("thread 1")
        assert "rip 0x0000000000100000" in gdb.execute("monitor regs"), "not the one that stopped"
        assert "GPA 0x100000" in gdb.execute("monitor translate $pc")
        assert "GPA 0x100007" in gdb.execute("monitor translate $pc 1")

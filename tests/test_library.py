"""`import pyvmm`: machines from Python."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm import GuestMemoryError, Machine, Mode, StopReason, machine, paging, read_image
from pyvmm.boot import Image
from pyvmm.hostprobe import host
from tests.conftest import GUESTS
from tests.support import PATIENCE, wait_until

pytestmark = pytest.mark.kvm

HELLO, COUNTER = GUESTS / "hello.bin", GUESTS / "counter.bin"
TEXT = b"Hello from long mode!\n"


def guest(tmp_path: Path, code: str | bytes, **options: Any) -> Image:
    """A flat guest of 64-bit code."""
    path = tmp_path / f"guest{len(os.listdir(tmp_path))}.bin"
    path.write_bytes(bytes.fromhex(code) if isinstance(code, str) else code)
    return read_image(path, **options)


def counted(vm: Machine) -> int:
    """How far counter.bin has counted: its variable is behind its code."""
    data = vm.read_memory(0x100000, 24, physical=True)
    return int.from_bytes(data[-8:], "little")


# --- running -------------------------------------------------------------------------------------


def test_the_example_of_the_docstring() -> None:
    with pyvmm.Machine(HELLO) as vm:
        stop = vm.run(timeout=5)
        assert stop.reason is StopReason.HALTED
        assert bytes(vm.output) == TEXT
        assert stop.status == 0 and stop.final and stop.vcpu_id is None


@pytest.mark.parametrize(
    "path", [str(HELLO), HELLO, read_image(HELLO)], ids=["str", "Path", "Image"]
)
def test_an_image_can_be_given_in_three_ways(path: Any) -> None:
    with Machine(path) as vm:
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED


def test_output_can_go_to_a_function(tmp_path: Path) -> None:
    got: list[bytes] = []
    with Machine(HELLO, output=got.append) as vm:
        vm.run(timeout=PATIENCE)
        assert b"".join(got) == TEXT
        assert bytes(vm.output) == b""


@pytest.mark.parametrize("coalesce", [True, False])
def test_output_is_complete_when_run_returns(tmp_path: Path, coalesce: bool) -> None:
    # 1000 bytes alternating between COM1 and the debug console, then debug-exit.
    code = "b9f4010000 66baf803 b061 ee 66bae900 b062 ee ffc9 75ee b000 e6f4"
    with Machine(guest(tmp_path, code), coalesce=coalesce) as vm:
        stop = vm.run(timeout=PATIENCE)
        assert (stop.reason, stop.status) == (StopReason.DEBUG_EXIT, 1)
        assert bytes(vm.output) == b"ab" * 500


def test_after_the_end_run_says_the_same_again() -> None:
    with Machine(HELLO) as vm:
        first = vm.run(timeout=PATIENCE)
        assert vm.run(timeout=PATIENCE) == vm.run(max_exits=1) == first
        assert bytes(vm.output) == TEXT


def test_a_time_limit_suspends_and_the_next_run_goes_on() -> None:
    with Machine(COUNTER) as vm:
        counts = []
        for _ in range(5):
            stop = vm.run(timeout=0.05)
            assert stop.reason is StopReason.TIMEOUT and not stop.final and stop.status == 124
            counts.append(counted(vm))
            time.sleep(0.02)
            assert counted(vm) == counts[-1]  # it does not run on meanwhile
        assert counts == sorted(set(counts))
        assert 0x100000 <= vm.registers()["rip"] < 0x100018


def test_a_limit_of_exits_is_exact_and_the_next_run_goes_on() -> None:
    with Machine(HELLO, coalesce=False) as vm:
        for n in range(len(TEXT)):
            stop = vm.run(timeout=PATIENCE, max_exits=2)  # one `in` of LSR, one `out`
            assert stop.reason is StopReason.EXIT_LIMIT and not stop.final
            assert bytes(vm.output) == TEXT[: n + 1]
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert bytes(vm.output) == TEXT


def test_the_access_that_reached_the_limit_is_complete() -> None:
    with Machine(HELLO, coalesce=False) as vm:
        vm.run(timeout=PATIENCE, max_exits=1)
        first = vm.registers()
        assert first["rax"] & 0xFF == 0x60  # what the guest read is in its register
        vm.run(timeout=PATIENCE, max_exits=1)
        assert vm.registers()["rip"] != first["rip"]


def test_the_end_is_not_forgotten_when_it_is_the_last_exit_allowed() -> None:
    with Machine(HELLO, coalesce=False) as vm:
        stop = vm.run(timeout=PATIENCE, max_exits=2 * len(TEXT) + 1)
        assert stop.reason in (StopReason.HALTED, StopReason.EXIT_LIMIT)
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert bytes(vm.output) == TEXT


def test_a_limit_of_no_exits_runs_nothing() -> None:
    with Machine(HELLO, coalesce=False) as vm:
        assert vm.run(timeout=PATIENCE, max_exits=0).reason is StopReason.EXIT_LIMIT
        assert vm.registers()["rip"] == 0x100000
        assert bytes(vm.output) == b""


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_several_vcpus_are_limited_and_go_on(cpus: int) -> None:
    with Machine(HELLO, cpus=cpus, irqchip=False, coalesce=False) as vm:
        for _ in range(5):
            assert vm.run(timeout=PATIENCE, max_exits=5).reason is StopReason.EXIT_LIMIT
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert sorted(vm.output) == sorted(TEXT * cpus)


def test_interrupt_makes_run_return_and_the_guest_can_go_on() -> None:
    with Machine(COUNTER) as vm:
        for _ in range(3):
            timer = threading.Timer(0.05, vm.interrupt)
            timer.start()
            assert vm.run(timeout=PATIENCE).reason is StopReason.INTERRUPTED
            timer.join()
        before = counted(vm)
        vm.run(timeout=0.05)
        assert counted(vm) > before


def test_an_interrupt_just_before_run_is_not_lost() -> None:
    with Machine(COUNTER) as vm:
        vm.interrupt()
        assert vm.run(timeout=1).reason is StopReason.INTERRUPTED


def test_a_crash_is_a_stop_with_the_exit_and_a_report() -> None:
    with Machine(GUESTS / "triplefault.bin") as vm:
        stop = vm.run(timeout=PATIENCE)
    assert (stop.reason, stop.status, stop.vcpu_id) == (StopReason.CRASHED, 6, 0)
    assert stop.exit is not None and stop.exit.name == "SHUTDOWN"
    shown = "0f 0b" if host().crash_registers else "resets a vCPU"
    assert shown in stop.report and "SHUTDOWN" in stop.message
    assert len(stop.message.splitlines()) == 1


def test_debug_exit_gives_the_guest_s_status() -> None:
    with Machine(GUESTS / "exit.bin") as vm:
        stop = vm.run(timeout=PATIENCE)
    assert (stop.reason, stop.status, stop.guest_status) == (StopReason.DEBUG_EXIT, 85, 85)


def test_input_from_a_descriptor_reaches_the_guest(tmp_path: Path) -> None:
    echo = "66bafd03 ec a801 74f7 66baf803 ec ee 3c71 75ed f4"
    reading, writing = os.pipe()
    try:
        with Machine(guest(tmp_path, echo)) as vm:
            vm.connect_input(reading)
            assert vm.run(timeout=0.05).reason is StopReason.TIMEOUT
            os.write(writing, b"hello, q")
            assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
            assert bytes(vm.output) == b"hello, q"
    finally:
        os.close(reading)
        os.close(writing)


# --- callbacks -----------------------------------------------------------------------------------


def test_callbacks_on_ports_see_every_width(tmp_path: Path) -> None:
    calls: list[tuple[object, ...]] = []

    def read(offset: int, size: int) -> int:
        calls.append(("in", offset, size))
        return 0x11223344

    def write(offset: int, size: int, value: int) -> None:
        calls.append(("out", offset, size, value))

    code = (
        "66ba0010 b8ddccbbaa ee 66ef ef"  # mov dx,0x1000; mov eax,0xaabbccdd; out 8, 16, 32 bits
        "ffc2 31c0 ec 89c3 ffc2 66ed ffc2 89c1 ed f4"  # inc edx; in 8 -> ebx, 16 -> ecx, 32 -> eax
    )
    with Machine(guest(tmp_path, code)) as vm:
        vm.on_port(0x1000, 8, read=read, write=write)
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        registers = vm.registers()
    assert calls == [
        ("out", 0, 1, 0xDD),
        ("out", 0, 2, 0xCCDD),
        ("out", 0, 4, 0xAABBCCDD),
        ("in", 1, 1),
        ("in", 2, 2),
        ("in", 3, 4),
    ]
    assert (registers["rbx"], registers["rcx"], registers["rax"]) == (0x44, 0x3344, 0x11223344)


@pytest.mark.parametrize(
    ("size", "out", "into"), [(1, "6e", "6c"), (2, "666f", "666d"), (4, "6f", "6d")]
)
def test_string_instructions_call_back_once_for_each_element(
    tmp_path: Path, size: int, out: str, into: str
) -> None:
    written: list[int] = []
    values = iter(range(1, 100))
    rep_out = f"66{out[2:]}" if len(out) == 4 else out
    rep_in = f"66{into[2:]}" if len(into) == 4 else into
    prefix = "f3"
    code = (
        f"fc 66ba0010 be00002000 b910000000 {prefix}{rep_out}"
        f"bf00003000 b910000000 {prefix}{rep_in} f4"
    )
    with Machine(guest(tmp_path, code)) as vm:
        data = bytes(range(16 * size))
        vm.write_memory(0x200000, data, physical=True)
        vm.on_port(
            0x1000,
            4,
            read=lambda offset, n: next(values),
            write=lambda offset, n, value: written.append(value),
        )
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        got = vm.read_memory(0x300000, 16 * size, physical=True)
    parts = [data[n : n + size] for n in range(0, len(data), size)]
    assert written == [int.from_bytes(part, "little") for part in parts]
    assert got == b"".join(n.to_bytes(size, "little") for n in range(1, 17))


def test_callbacks_on_memory_see_every_width(tmp_path: Path) -> None:
    calls: list[tuple[object, ...]] = []

    def read(offset: int, size: int) -> int:
        calls.append(("load", offset, size))
        return 0x1122334455667788

    def write(offset: int, size: int, value: int) -> None:
        calls.append(("store", offset, size, value))

    code = (
        "bf000000f0 48b88877665544332211"  # mov edi, 0xf0000000; mov rax, 0x1122334455667788
        "8807 66894702 894704 48894708"  # stores of 1, 2, 4, 8 bytes
        "31c0 8a07 89c3 0fb74702 89c1 8b4704 89c2 488b4708 f4"  # loads to ebx, ecx, edx, rax
    )
    with Machine(guest(tmp_path, code)) as vm:
        vm.on_mmio(0xF000_0000, 0x1000, read=read, write=write)
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        registers = vm.registers()
    assert calls == [
        ("store", 0, 1, 0x88),
        ("store", 2, 2, 0x7788),
        ("store", 4, 4, 0x55667788),
        ("store", 8, 8, 0x1122334455667788),
        ("load", 0, 1),
        ("load", 2, 2),
        ("load", 4, 4),
        ("load", 8, 8),
    ]
    assert [registers[name] for name in ("rbx", "rcx", "rdx", "rax")] == [
        0x88,
        0x7788,
        0x55667788,
        0x1122334455667788,
    ]


def test_a_callback_where_a_device_is_already_is_an_error() -> None:
    with Machine(HELLO) as vm:
        with pytest.raises(ValueError, match="COM1"):
            vm.on_port(0x3F8, write=lambda *_: None)
        vm.on_port(0x1000)
        with pytest.raises(ValueError):
            vm.on_port(0x1000)


@pytest.mark.parametrize(
    "error",
    [ValueError("the flux capacitor is empty"), OSError(5, "the flux capacitor is empty")],
    ids=["ValueError", "OSError"],
)
def test_an_exception_in_a_callback_ends_the_vm_with_its_message(
    tmp_path: Path, error: Exception
) -> None:
    def write(offset: int, size: int, value: int) -> None:
        raise error

    with Machine(guest(tmp_path, "66ba0010 ee f4")) as vm:
        vm.on_port(0x1000, write=write)
        stop = vm.run(timeout=PATIENCE)
        assert (stop.reason, stop.status, stop.final) == (StopReason.FAILED, 4, True)
        assert "the flux capacitor is empty" in stop.message
        assert stop.vcpu_id == 0
        assert vm.run(timeout=PATIENCE) == stop


def test_a_callback_that_gives_no_number_ends_the_vm_with_a_message(tmp_path: Path) -> None:
    with Machine(guest(tmp_path, "66ba0010 ec f4")) as vm:
        vm.on_port(0x1000, read=lambda offset, size: None)  # type: ignore[arg-type,return-value]
        stop = vm.run(timeout=PATIENCE)
    assert stop.reason is StopReason.FAILED and "TypeError" in stop.message


def test_a_callback_may_look_at_the_vcpu_and_at_memory(tmp_path: Path) -> None:
    seen: list[tuple[int, bytes]] = []
    with Machine(guest(tmp_path, "66ba0010 ee f4")) as vm:
        vm.on_port(
            0x1000,
            write=lambda *_: seen.append((vm.get_register("rdx"), vm.read_memory(0x100000, 2))),
        )
        vm.run(timeout=PATIENCE)
    assert seen == [(0x1000, b"\x66\xba")]


def test_a_callback_may_interrupt(tmp_path: Path) -> None:
    with Machine(guest(tmp_path, "66ba0010 ee ebfd")) as vm:
        vm.on_port(0x1000, write=lambda *_: vm.interrupt())
        for _ in range(3):
            assert vm.run(timeout=PATIENCE).reason is StopReason.INTERRUPTED


# --- registers and memory ------------------------------------------------------------------------


def test_registers_by_name(tmp_path: Path) -> None:
    with Machine(guest(tmp_path, "4801d8 f4")) as vm:  # add rax, rbx
        assert vm.get_register("rip") == 0x100000
        assert vm.get_register("cs") == 0x08 and vm.get_register("CS_BASE") == 0
        assert vm.get_register("cr0") & 0x80000001 == 0x80000001
        vm.set_register("rax", 40)
        vm.set_register("rbx", 2)
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert vm.get_register("rax") == vm.registers()["rax"] == 42
        with pytest.raises(KeyError):
            vm.get_register("eax")
        with pytest.raises(KeyError):
            vm.set_register("", 0)
        with pytest.raises(OSError):
            vm.set_register("rax", 1 << 64)
        with pytest.raises(OSError):
            vm.get_register("rax", vcpu_id=1)


@pytest.mark.parametrize("irqchip", [False, True])
def test_cr8_that_is_written_is_what_the_guest_reads(tmp_path: Path, irqchip: bool) -> None:
    code = guest(tmp_path, "440f20c0 f4")  # mov rax, cr8
    with Machine(code, irqchip=irqchip) as vm:
        vm.set_register("cr8", 5)
        with pytest.raises(OSError, match="CR8 has 4 bits"):
            vm.set_register("cr8", 16)
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert vm.get_register("rax") == vm.get_register("cr8") == 5


def test_each_vcpu_has_its_own_registers() -> None:
    with Machine(COUNTER, cpus=3, irqchip=False) as vm:
        assert [vm.get_register("rdi", n) for n in range(3)] == [0, 1, 2]
        assert len({vm.get_register("rsp", n) for n in range(3)}) == 3
        assert all(vm.get_register("rsp", n) % 16 == 0 for n in range(3))


def test_registers_of_a_running_guest_are_busy() -> None:
    with Machine(COUNTER) as vm:
        errors: list[OSError] = []

        def look() -> None:
            wait_until(lambda: counted(vm) > 0, "it runs")
            try:
                vm.get_register("rip")
            except OSError as error:
                errors.append(error)
            vm.interrupt()

        thread = threading.Thread(target=look)
        thread.start()
        vm.run(timeout=PATIENCE)
        thread.join()
        assert len(errors) == 1 and "suspend" in str(errors[0])
        assert vm.get_register("rip") in range(0x100000, 0x100018)


def test_memory_by_gpa_and_by_gva() -> None:
    with Machine(GUESTS / "paging.bin") as vm:
        vm.write_memory(0x300000, b"before", physical=True)
        assert vm.read_memory(0x300000, 6) == b"before"  # identity-mapped at first
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        # The guest has mapped a page of its own in the upper half.
        gpa = int(bytes(vm.output).split(b"found 0x1234 at ")[1].split()[0], 16)
        gva = 0xFFFF_8000_0000_0010
        assert vm.read_memory(gva, 2) == vm.read_memory(gpa, 2, physical=True) == b"\x34\x12"
        vm.write_memory(gva, b"\xcd\xab")
        assert vm.read_memory(gpa, 2, physical=True) == b"\xcd\xab"
        with pytest.raises(paging.TranslationFault):
            vm.read_memory(0xFFFF_8100_0000_0000, 1)
        with pytest.raises(GuestMemoryError):
            vm.read_memory(64 << 20, 1, physical=True)
        with pytest.raises(GuestMemoryError):
            vm.write_memory((64 << 20) - 1, b"ab", physical=True)


def test_what_is_written_before_run_is_what_runs(tmp_path: Path) -> None:
    with Machine(guest(tmp_path, "ebfe")) as vm:
        vm.write_memory(0x100000, bytes.fromhex("b015 e6f4"), physical=True)
        assert vm.run(timeout=PATIENCE).status == 0x15 << 1 | 1


def test_a_breakpoint_of_the_guest_s_own_works_without_a_debugger() -> None:
    with Machine(GUESTS / "int3.bin") as vm:
        assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert b"handler saw" in vm.output


def test_all_modes_can_be_asked_for(tmp_path: Path) -> None:
    for mode in Mode:
        with Machine(guest(tmp_path, "b005 e6f4", mode=mode)) as vm:
            assert vm.run(timeout=PATIENCE).status == 11


# --- a good guest in somebody else's process -----------------------------------------------------


def signal_state() -> tuple[object, ...]:
    return (
        {n: signal.getsignal(n) for n in signal.valid_signals()},
        signal.pthread_sigmask(signal.SIG_BLOCK, set()),
        signal.set_wakeup_fd(-1),
    )


def test_signal_handlers_and_masks_stay_as_they_were() -> None:
    before = signal_state()
    with Machine(HELLO, cpus=2, irqchip=False) as vm:
        assert signal_state() == before
        vm.run(timeout=PATIENCE)
        assert signal_state() == before
    with Machine(COUNTER) as vm:
        vm.run(timeout=0.05)
        assert signal_state() == before
    assert signal_state() == before


def test_a_python_signal_handler_of_the_caller_s_runs_while_a_guest_does() -> None:
    with Machine(COUNTER) as vm:
        previous = signal.signal(signal.SIGUSR1, lambda number, frame: vm.interrupt())
        try:
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            assert vm.run(timeout=PATIENCE).reason is StopReason.INTERRUPTED
            timer.join()
        finally:
            signal.signal(signal.SIGUSR1, previous)


def test_it_works_from_any_thread() -> None:
    results: list[tuple[StopReason, bytes]] = []

    def work() -> None:
        with Machine(HELLO) as vm:
            stop = vm.run(timeout=PATIENCE)
            results.append((stop.reason, bytes(vm.output)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    assert results == [(StopReason.HALTED, TEXT)]


def test_two_machines_run_at_once() -> None:
    results: list[tuple[StopReason, bytes]] = []

    def work() -> None:
        for _ in range(5):
            with Machine(HELLO, cpus=2, irqchip=False) as vm:
                results.append((vm.run(timeout=PATIENCE).reason, bytes(vm.output)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert len(results) == 10
    for reason, output in results:
        assert reason is StopReason.HALTED and sorted(output) == sorted(TEXT * 2)


def test_two_machines_take_turns() -> None:
    with Machine(COUNTER) as left, Machine(COUNTER) as right:
        for _ in range(3):
            before = counted(left), counted(right)
            left.run(timeout=0.02)
            assert counted(left) > before[0] and counted(right) == before[1]
            right.run(timeout=0.02)
            assert counted(right) > before[1]


def test_many_machines_one_after_the_other() -> None:
    for _ in range(30):
        with Machine(HELLO) as vm:
            assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
            assert bytes(vm.output) == TEXT


def test_it_works_in_a_process_with_many_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        return  # cannot be tried here
    script = (
        "import os, resource, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))\n"
        "kept = [os.dup(0) for _ in range(1050)]\n"
        "import pyvmm\n"
        "with pyvmm.Machine(sys.argv[1]) as vm:\n"
        "    print(vm.run().reason.name, bytes(vm.output).decode())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, HELLO],
        env={**os.environ, "PYTHONPATH": str(GUESTS.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.stdout == "HALTED " + TEXT.decode() + "\n", result.stderr[-300:]


def test_importing_pyvmm_touches_no_device() -> None:
    assert machine.Machine is pyvmm.Machine
    script = (
        "import os, pyvmm, threading\n"
        "assert threading.active_count() == 1\n"
        "with os.scandir('/proc/self/fd') as fds:\n"
        "    assert '/dev/kvm' not in [os.readlink(fd.path) for fd in fds]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(GUESTS.parent)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=PATIENCE)


def test_the_public_names_are_there_and_documented() -> None:
    for name in pyvmm.__all__:
        value = getattr(pyvmm, name)
        assert isinstance(value, str) or value.__doc__

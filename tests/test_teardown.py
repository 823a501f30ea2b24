"""The end of a machine: everything is given back, whatever happened before, and it never hangs."""

from __future__ import annotations

import errno
import mmap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm import ImageError, Machine, StopReason, handles, machine, memory
from pyvmm.stop import Stop
from tests.conftest import GUESTS, open_fds
from tests.support import PATIENCE, wait_until

pytestmark = pytest.mark.kvm

HELLO, COUNTER = GUESTS / "hello.bin", GUESTS / "counter.bin"


@pytest.fixture(autouse=True)
def no_ram_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is guest RAM cannot be told from other mappings of this process: it is kept track of."""
    made: list[mmap.mmap] = []
    make = memory._map

    def spy(gpa: int, size: int) -> tuple[mmap.mmap, int]:
        pages, hva = make(gpa, size)
        made.append(pages)
        return pages, hva

    monkeypatch.setattr(memory, "_map", spy)
    yield
    assert all(pages.closed for pages in made), "guest RAM was left behind"


def kvm_mappings() -> int:
    """How many mappings are KVM's: one for each vCPU."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return sum("kvm" in line for line in maps)


def all_mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return sum(1 for _ in maps)


def state() -> tuple[set[str], list[threading.Thread], int]:
    return open_fds(), threading.enumerate(), kvm_mappings()


# --- nothing is left behind ----------------------------------------------------------------------


def test_fifty_machines_leave_no_descriptor_thread_or_mapping(tmp_path: Path) -> None:
    too_large = tmp_path / "large.bin"
    too_large.write_bytes(bytes(2 << 20))

    def one_of_each() -> None:
        with Machine(HELLO) as vm:
            assert vm.run(timeout=PATIENCE).reason is StopReason.HALTED
        with Machine(COUNTER, cpus=2, irqchip=False) as vm:
            assert vm.run(timeout=0.01).reason is StopReason.TIMEOUT
        with Machine(GUESTS / "triplefault.bin") as vm:
            assert vm.run(timeout=PATIENCE).reason is StopReason.CRASHED
        with Machine(HELLO):
            pass  # never run
        with pytest.raises(ImageError):
            Machine(too_large, memory=2 << 20)
        with pytest.raises(ValueError):
            Machine(HELLO, cpus=1_000_000, irqchip=False)
        with pytest.raises(OSError):
            Machine(HELLO, device="/dev/null")
        with pytest.raises(OSError):
            Machine(HELLO, memory=1 << 46)  # more than a KVM memory slot takes

    one_of_each()  # imports and caches
    before, mappings_before = state(), all_mappings()
    for _ in range(50 // 4):
        one_of_each()
    assert state() == before
    assert all_mappings() <= mappings_before + 8  # the allocator's own


def test_an_exception_in_the_with_block_passes_and_everything_is_freed() -> None:
    before = state()
    with pytest.raises(KeyError), Machine(COUNTER, cpus=2, irqchip=False) as vm:
        vm.run(timeout=0.02)
        raise KeyError
    assert state() == before


def test_closing_twice_or_never_having_run_is_fine() -> None:
    before = state()
    vm = Machine(HELLO)
    assert kvm_mappings() == before[2] + 1
    vm.close()
    vm.close()
    vm = Machine(HELLO)
    vm.run(timeout=PATIENCE)
    vm.close()
    vm.close()
    assert state() == before


def test_using_a_closed_machine_is_an_error_and_not_a_crash_or_a_hang() -> None:
    vm = Machine(COUNTER)
    vm.run(timeout=0.02)
    vm.close()
    with pytest.raises((OSError, ValueError, RuntimeError)):
        vm.run(timeout=1)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        vm.get_register("rip")
    with pytest.raises((OSError, ValueError, RuntimeError)):
        vm.read_memory(0, 1, physical=True)


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_guest_that_spins_is_closed_at_once(cpus: int) -> None:
    before = state()
    with Machine(COUNTER, cpus=cpus, irqchip=False) as vm:
        vm.run(timeout=0.02)
    assert state() == before


def test_a_guest_that_waits_for_an_interrupt_is_closed_at_once(tmp_path: Path) -> None:
    guest = tmp_path / "waits.bin"
    guest.write_bytes(bytes.fromhex("fb f4 ebfd"))  # sti; 1: hlt; jmp 1b
    before = state()
    with Machine(guest, cpus=2, irqchip=False) as vm:
        assert vm.run(timeout=0.05).reason is StopReason.TIMEOUT
    assert state() == before


def test_a_machine_that_failed_while_it_was_built_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = state()
    for name in ("write_boot_structures", "set_entry_state", "CoalescedPorts", "Pc"):
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> None:
                raise MemoryError

            patch.setattr(machine, name, fail)
            with pytest.raises((MemoryError, TypeError, AttributeError)):
                Machine(HELLO)
        assert state() == before, name


def test_a_vcpu_that_cannot_be_mapped_is_an_oserror_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, "no room")

    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(handles, "mmap", SimpleNamespace(mmap=refuse))
        with pytest.raises(OSError, match="no room"):
            Machine(COUNTER)
    assert state() == before


def test_a_machine_whose_threads_cannot_start_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start
    before = state()

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "vcpu-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    vm = Machine(HELLO, cpus=3, irqchip=False)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            vm.run(timeout=PATIENCE)
        vm.close()
        assert state() == before
    finally:  # where close() fails, too, the tests that follow shall not
        vm.threads = {n: thread for n, thread in vm.threads.items() if thread.ident is not None}
        vm.close()


# --- a thread that does not stop -----------------------------------------------------------------


class Stuck:
    """A machine whose vCPU 0 is inside a callback that does not return until it is released."""

    def __init__(self, tmp_path: Path) -> None:
        guest = tmp_path / "stuck.bin"
        # vCPU 0 writes to the port; vCPU 1 spins.
        guest.write_bytes(bytes.fromhex("85ff 7506 66ba0010 ee f4 ebfe"))
        self.release, self.inside = threading.Event(), threading.Event()
        self.machine = Machine(guest, cpus=2, irqchip=False)
        self.machine.on_port(0x1000, write=self._write)
        self.outcome: list[object] = []
        self.thread = threading.Thread(target=self._run)

    def _write(self, offset: int, size: int, value: int) -> None:
        self.inside.set()
        self.release.wait(30)

    def _run(self) -> None:
        try:
            self.outcome.append(self.machine.run(timeout=0.5))
        except BaseException as error:
            self.outcome.append(error)

    def start(self) -> None:
        self.thread.start()
        assert self.inside.wait(PATIENCE)


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setattr(machine, "_JOIN_SECONDS", 0.3)
    stuck = Stuck(tmp_path)
    yield stuck
    stuck.release.set()
    stuck.machine.close()


def test_closing_names_the_thread_that_does_not_stop(stuck: Stuck) -> None:
    stuck.start()
    with pytest.raises(RuntimeError, match=r"vcpu-0\b") as error:
        stuck.machine.close()
    assert "vcpu-1" not in str(error.value)
    stuck.release.set()
    stuck.machine.close()  # now it can
    stuck.thread.join(PATIENCE)
    assert not stuck.thread.is_alive()


def test_a_time_limit_with_a_thread_that_does_not_stop_does_not_hang(stuck: Stuck) -> None:
    stuck.start()
    stuck.thread.join(3)
    hung = stuck.thread.is_alive()
    stuck.release.set()
    stuck.thread.join(PATIENCE)
    assert not hung, "run(timeout=0.5) waited for a callback without end"
    assert len(stuck.outcome) == 1


def test_no_output_is_dropped_where_the_vm_ends_while_it_is_interrupted(tmp_path: Path) -> None:
    guest = tmp_path / "ends.bin"
    guest.write_bytes(bytes.fromhex("66ba0010 ee f4"))  # mov dx, 0x1000; out; hlt
    hurried: list[None] = []

    def write(offset: int, size: int, value: int) -> None:
        vm.interrupt()
        time.sleep(0.05)  # it waits for us
        vm.stop(Stop(StopReason.KILLED, "enough"))
        time.sleep(0.05)  # as a vCPU that still prints

    with Machine(guest) as vm:
        vm.on_hurry(lambda: hurried.append(None))
        vm.on_port(0x1000, write=write)
        assert vm.run(timeout=PATIENCE).reason is StopReason.KILLED
        assert hurried == []


def test_a_callback_for_the_end_that_fails_does_not_keep_run_waiting() -> None:
    def fail() -> None:
        raise ValueError("a bug")

    with Machine(COUNTER) as vm:
        vm.on_end(fail)
        thread = threading.Thread(target=vm.run)
        thread.start()
        wait_until(lambda: bool(vm.vm.active_cpus()), "it runs")
        with pytest.raises(ValueError, match="a bug"):
            vm.stop(Stop(StopReason.KILLED, "enough"))
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_the_thread_that_does_not_stop_is_named_when_another_vcpu_ends_the_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_JOIN_SECONDS", 0.3)
    guest = tmp_path / "stuck.bin"
    # vCPU 0 writes to 0x1000 and stays there; the other waits for a byte in memory, then ends.
    guest.write_bytes(bytes.fromhex("85ff 7506 66ba0010 ee f4  803c250000200000 74f6 e6f4"))
    release, inside = threading.Event(), threading.Event()

    def write(offset: int, size: int, value: int) -> None:
        vm.write_memory(0x200000, b"\1", physical=True)
        inside.set()
        release.wait(30)

    vm = Machine(guest, cpus=2, irqchip=False)
    vm.on_port(0x1000, write=write)
    try:
        with pytest.raises(RuntimeError, match="vcpu-0"):
            vm.run(timeout=5)
    finally:
        release.set()
        vm.close()

"""vCPU threads: what ends a VM, what a failure looks like, and that a stuck thread is named."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

import pytest

from pyvmm import exits, machine, vcpu
from pyvmm.boot.image import Image, Mode, Segment
from pyvmm.machine import Machine
from pyvmm.stop import STATUS_CRASHED, STATUS_FAILED, STATUS_OK, Stop, StopReason
from pyvmm.vcpurecord import KICK_SIGNAL
from tests.support import PATIENCE, wait_until

pytestmark = pytest.mark.kvm

LOAD = 0x10_0000  # GPA
SPIN = b"\xeb\xfe"
OUT_THEN_SPIN = b"\xe6\x80" + SPIN  # out 0x80, al
PORT = 0x80


def image(code: bytes) -> Image:
    """A guest in 64-bit mode that is nothing but `code`."""
    return Image("test", "flat binary", Mode.LONG, LOAD, (Segment(LOAD, code, len(code)),))


class Boom(Exception):
    """What the devices here raise."""


# --- ends --------------------------------------------------------------------------------------


def test_halt_with_interrupts_off_ends_the_vm() -> None:
    with Machine(image(b"\xfa\xf4")) as guest:
        stop = guest.run(timeout=PATIENCE)
        assert (stop.reason, stop.status) == (StopReason.HALTED, STATUS_OK)
        assert guest.run() is stop, "the same again"


def test_vm_ends_only_when_all_vcpus_have_halted() -> None:
    # vCPU 0 halts at once; the others print 200 times before: test edi, edi; jz 2f; ...
    code = bytes.fromhex("85ff740bb9c8000000e680ffc975faf4")
    with Machine(image(code), cpus=3, irqchip=False) as guest:
        written: list[int] = []
        guest.on_port(PORT, write=lambda offset, size, value: written.append(value))
        assert guest.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert len(written) == 2 * 200


def test_triple_fault_of_one_vcpu_ends_the_vm_of_all() -> None:
    code = bytes.fromhex("83ff027402ebfe0f0b")  # cmp edi, 2; je 1f; jmp .; 1: ud2
    with Machine(image(code), cpus=3, irqchip=False) as guest:
        stop = guest.run(timeout=PATIENCE)
        assert (stop.reason, stop.status) == (StopReason.CRASHED, STATUS_CRASHED)
        assert stop.vcpu_id == 2
        assert isinstance(stop.exit, (exits.Shutdown, exits.InternalError))
        assert "vCPU 2" in stop.message
        assert "rip" in stop.report.lower()


def test_vcpus_start_together_and_none_before_run() -> None:
    code = b"\x48\xff\x04\xfd" + (0x20_0000).to_bytes(4, "little") + b"\xeb\xf6"
    with Machine(
        image(code), cpus=3, irqchip=False
    ) as guest:  # 1: inc qword [0x200000 + 8 * rdi]; jmp 1b
        assert guest.read_memory(0x20_0000, 24, physical=True) == bytes(24)
        assert not guest.vm.active_cpus()
        assert guest.run(timeout=0.2).reason is StopReason.TIMEOUT
        counts = guest.read_memory(0x20_0000, 24, physical=True)
        assert all(counts[8 * n : 8 * n + 8] != bytes(8) for n in range(3))
        assert guest.read_memory(0x20_0000, 24, physical=True) == counts, "one runs on"
        assert guest.run(timeout=0.2).reason is StopReason.TIMEOUT
        assert guest.read_memory(0x20_0000, 24, physical=True) != counts, "it goes on"


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [1, 3])
def test_exception_in_a_device_ends_the_vm_with_its_message(cpus: int) -> None:
    def device(offset: int, size: int, value: int) -> None:
        raise Boom("the device is on fire")

    with Machine(image(OUT_THEN_SPIN), cpus=cpus, irqchip=False) as guest:
        guest.on_port(PORT, write=device)
        stop = guest.run(timeout=PATIENCE)
        assert (stop.reason, stop.status) == (StopReason.FAILED, STATUS_FAILED)
        assert stop.vcpu_id in range(cpus)
        assert stop.message == f"vCPU {stop.vcpu_id}: Boom: the device is on fire"
        assert "in device" in stop.report, "a traceback that names the function"
        assert "\n" not in stop.message


def test_exception_in_a_handler_ends_the_vm_with_its_message() -> None:
    def handler(cpu: vcpu.VcpuThread, exit: exits.InOut) -> None:
        raise Boom(f"port {exit.port:#x}")

    with Machine(image(OUT_THEN_SPIN)) as guest:
        guest.handlers[exits.InOut] = handler
        stop = guest.run(timeout=PATIENCE)
        assert (stop.reason, stop.message) == (StopReason.FAILED, "vCPU 0: Boom: port 0x80")


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()])
def test_exception_that_is_no_error_ends_the_vm_as_well(error: BaseException) -> None:
    def device(offset: int, size: int, value: int) -> None:
        raise error

    with Machine(image(OUT_THEN_SPIN)) as guest:
        guest.on_port(PORT, write=device)
        stop = guest.run(timeout=PATIENCE)
        assert (stop.reason, stop.status) == (StopReason.FAILED, STATUS_FAILED)
        assert type(error).__name__ in stop.message


def test_refusal_of_the_kernel_is_told_in_one_line() -> None:
    def device(offset: int, size: int) -> int:
        guest.vm.handle.ioctl(0xAEFF)
        return 0

    with Machine(image(b"\xe4\x80" + SPIN)) as guest:  # in al, 0x80
        guest.on_port(PORT, read=device)
        stop = guest.run(timeout=PATIENCE)
        assert stop.reason is StopReason.FAILED
        assert stop.message.startswith("vCPU 0: 0xaeff: ")
        assert "\n" not in stop.message


def test_failure_of_one_vcpu_wins_over_what_the_others_say_later() -> None:
    first = Stop(StopReason.FAILED, "first")
    with Machine(image(SPIN)) as guest:
        guest.stop(first)
        guest.stop(Stop(StopReason.HALTED, "second"))
        assert guest.run(timeout=PATIENCE) is first


def test_vcpu_that_cannot_become_active_ends_the_vm() -> None:
    with Machine(image(SPIN), cpus=2, irqchip=False) as guest:
        original = guest.vm.activate_cpu

        def activate(vcpu_id: int) -> None:
            if vcpu_id == 1:
                raise OSError(1, "not today")
            original(vcpu_id)

        guest.vm.activate_cpu = activate  # type: ignore[method-assign]
        stop = guest.run(timeout=PATIENCE)
        assert (stop.reason, stop.message) == (StopReason.FAILED, "vCPU 1: not today")


def test_callbacks_are_told_of_the_end_once() -> None:
    told: list[str] = []
    with Machine(image(b"\xf4"), cpus=2, irqchip=False) as guest:
        guest.on_end(lambda: told.append("end"))
        guest.run(timeout=PATIENCE)
    assert told, "somebody waits for this to let a device go"


# --- teardown ----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that does not end is given up on soon."""
    monkeypatch.setattr(machine, "_JOIN_SECONDS", 0.3)


@pytest.mark.usefixtures("impatient")
def test_stuck_thread_is_named_and_close_works_when_it_lets_go() -> None:
    in_device, leave_device = threading.Event(), threading.Event()

    def device(offset: int, size: int, value: int) -> None:
        in_device.set()
        leave_device.wait(PATIENCE)

    guest = Machine(
        image(bytes.fromhex("85ff75fe") + OUT_THEN_SPIN), cpus=3, irqchip=False
    )  # vCPU 0 only
    guest.on_port(PORT, write=device)
    guest.on_port(PORT + 1, write=lambda *args: None)
    runner = threading.Thread(target=_run_quietly, args=(guest,))
    runner.start()
    try:
        assert in_device.wait(PATIENCE)
        with pytest.raises(RuntimeError, match=r"^vcpu-0 did not stop within 0\.3 s"):
            guest.close()
    finally:
        leave_device.set()
        guest.interrupt()
        runner.join(PATIENCE)
        for thread in guest.threads.values():
            thread.join(PATIENCE)
        guest.close()
    assert not runner.is_alive()


def _run_quietly(guest: Machine) -> None:
    with contextlib.suppress(RuntimeError, AssertionError):
        guest.run()


def _wait_active(guest: Machine, count: int) -> None:
    wait_until(lambda: len(guest.vm.active_cpus()) == count, f"{count} vCPUs are active")


@pytest.mark.usefixtures("impatient")
def test_time_limit_is_kept_although_a_vcpu_is_stuck_in_a_device() -> None:
    in_device, leave_device = threading.Event(), threading.Event()

    def device(offset: int, size: int, value: int) -> None:
        in_device.set()
        leave_device.wait(PATIENCE)

    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(guest.run(timeout=0.1))
        except RuntimeError as error:
            outcome.append(str(error))

    with Machine(image(OUT_THEN_SPIN)) as guest:
        guest.on_port(PORT, write=device)
        runner = threading.Thread(target=run)
        runner.start()
        try:
            assert in_device.wait(PATIENCE)
            runner.join(4)
            waits_on = runner.is_alive()
        finally:
            leave_device.set()
            runner.join(PATIENCE)
        assert not waits_on, "run() waits for the device, whatever its time limit"
        assert isinstance(outcome[0], Stop) or "vcpu-0" in str(outcome[0])


def test_close_ends_a_machine_that_runs_on_another_thread() -> None:
    for _ in range(20):
        guest = Machine(image(SPIN), cpus=2, irqchip=False)
        runner = threading.Thread(target=_run_quietly, args=(guest,))
        runner.start()
        _wait_active(guest, 2)
        guest.stop(Stop(StopReason.INTERRUPTED, "enough"))
        runner.join(PATIENCE)
        assert not runner.is_alive()
        guest.close()
        guest.close()


def test_machine_that_never_ran_is_closed() -> None:
    Machine(image(SPIN), cpus=2, irqchip=False).close()


def test_interrupt_before_and_during_run_is_not_lost() -> None:
    with Machine(image(SPIN)) as guest:
        guest.interrupt()  # as a ^C does that comes early
        assert guest.run(timeout=2).reason is StopReason.INTERRUPTED
        assert guest.run(timeout=0.05).reason is StopReason.TIMEOUT, "one counts once"
        for _ in range(30):
            timer = threading.Timer(0.002, guest.interrupt)
            timer.start()
            stop = guest.run(timeout=PATIENCE)
            timer.join()
            assert stop.reason is StopReason.INTERRUPTED


def test_running_a_machine_leaves_the_callers_signals_alone() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    with Machine(image(SPIN), cpus=2, irqchip=False) as guest:
        guest.run(timeout=0.05)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    assert {n: signal.getsignal(n) for n in signal.valid_signals()} == handlers
    assert KICK_SIGNAL not in signal.sigpending()


def test_machine_works_on_a_thread_that_is_not_the_main_one(tmp_path: Path) -> None:
    stops: list[Stop] = []

    def run() -> None:
        with Machine(image(b"\xb0\x48\xe6\xe9\xf4")) as guest:  # mov al, 'H'; out 0xe9, al; hlt
            stops.append(guest.run(timeout=PATIENCE))
            assert guest.output == b"H"

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [stop.reason for stop in stops] == [StopReason.HALTED]


def test_several_machines_run_at_the_same_time() -> None:
    stops: list[Stop] = []

    def run() -> None:
        with Machine(
            image(b"\xb9\x40\x42\x00\x00\xff\xc9\x75\xfc\xf4"), cpus=2, irqchip=False
        ) as guest:
            stops.append(guest.run(timeout=PATIENCE))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stop.reason for stop in stops] == [StopReason.HALTED] * 4


def test_limit_of_exits_is_exact_and_the_guest_goes_on_after_it() -> None:
    with Machine(image(b"\xe6\x80\xeb\xfc")) as guest:  # 1: out 0x80, al; jmp 1b
        written: list[int] = []
        guest.on_port(PORT, write=lambda offset, size, value: written.append(value))
        for number in range(1, 21):
            assert guest.run(timeout=PATIENCE, max_exits=7).reason is StopReason.EXIT_LIMIT
            assert len(written) == 7 * number

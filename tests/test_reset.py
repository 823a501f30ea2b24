"""Reset and power-off that the guest, or somebody outside, asks for.

The guests count their starts in a byte of CMOS RAM, which survives a reset, and switch the machine
off after so many.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyvmm import kvm
from pyvmm.boot import read_image
from pyvmm.machine import Machine
from pyvmm.stop import StopReason
from pyvmm.vcpu import StopVm
from tests.conftest import GUESTS, REPOSITORY
from tests.rsp_client import BASE, COUNT, COUNT_INC, COUNTERS, RAM, RIP, Debuggee, flat_image
from tests.smp_guests import (
    FOREVER,
    IDLE,
    IRETQ,
    LOAD_IDT,
    NMI_VECTOR,
    POWER_OFF,
    SLEEP,
    TICK,
    TICKS,
    TIMER_VECTOR,
    Running,
    counter,
    increment,
    lapic,
    out8,
    out16,
    pc,
    smp_image,
    start_aps,
    start_timer,
    u32,
    until,
    wait_counts,
)
from tests.support import PATIENCE, cycles, requires, wait_until

pytestmark = pytest.mark.kvm


@pytest.fixture(autouse=True)
def irqchip() -> None:
    requires("irqchip")


KEYBOARD_RESET = out8(0x64, 0xFE) + FOREVER
CF9_RESET = out8(0xCF9, 0x06) + FOREVER
SPIN = bytes.fromhex("31ff") + COUNT  # xor edi, edi: the first processor counts in counter 0

CELL = 0x40  # of CMOS RAM
LAPIC_LINT0 = 0x350


def boots(count: int, otherwise: bytes, then: bytes = POWER_OFF) -> bytes:
    """`then` at the start number `count`, else `otherwise`."""
    # mov al, CELL; out 0x70, al; in al, 0x71; inc al; out 0x71, al; cmp al, count; jne
    code = struct.pack("2B", 0xB0, CELL) + bytes.fromhex("e670 e471 fec0 e671")
    return code + struct.pack("4B", 0x3C, count, 0x75, len(then)) + then + otherwise


# --- ways to ask for it --------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [1, 3])
@pytest.mark.parametrize("reset", [KEYBOARD_RESET, CF9_RESET], ids=["0x64", "0xcf9"])
def test_a_guest_that_resets_the_machine_starts_again(reset: bytes, cpus: int) -> None:
    with pc(smp_image(boots(4, start_aps() + reset)), cpus=cpus) as machine:
        seen: list[None] = []
        machine.on_reset(lambda: seen.append(None))
        stop = machine.run(timeout=PATIENCE)
    assert (stop.reason, stop.status, len(seen)) == (StopReason.POWERED_OFF, 0, 3)


def test_a_machine_without_interrupt_controllers_is_reset_as_well() -> None:
    """There all vCPUs begin at the entry; vCPU 0 goes on, the others spin."""
    code = b"\x85\xff\x74\x02" + FOREVER + boots(3, KEYBOARD_RESET)  # test edi, edi; jz; jmp $
    with Machine(flat_image(code), cpus=2, memory=4 << 20, irqchip=False) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF


def test_a_reset_clears_cr8_without_interrupt_controllers_too() -> None:
    # 1: mov rax, cr8; mov [TICKS], rax; mov eax, 5; mov cr8, rax; jmp 1b
    code = bytes.fromhex("440f20c0 48890425") + struct.pack("<I", TICKS)
    code += bytes.fromhex("b805000000 440f22c0 ebe9")
    with Running(Machine(flat_image(code), memory=4 << 20, irqchip=False)) as running:
        machine, cr8 = running.machine, []
        machine.on_reset(lambda: cr8.append(machine.vm.handle_of(0).run.cr8))
        wait_until(lambda: u32(machine, TICKS) == 5, "it runs")
        machine.request_reset()
        wait_until(lambda: bool(cr8), "the machine is reset")
    assert cr8 == [0]


def test_request_reset_from_another_thread_while_all_run() -> None:
    with Running(pc(smp_image(start_aps() + SPIN), cpus=3)) as running:
        machine, resets = running.machine, []
        machine.on_reset(lambda: resets.append(u32(machine, TICKS)))
        for count in range(1, cycles(60) + 1):
            for vcpu_id in range(3):
                wait_counts(machine, vcpu_id)
            machine.request_reset()
            wait_until(lambda count=count: len(resets) == count, "the machine is reset")


def test_request_reset_of_a_machine_that_idles() -> None:
    bsp = boots(5, increment(TICKS) + IDLE)
    with Running(pc(smp_image(bsp), cpus=2)) as running:
        machine, resets = running.machine, []
        machine.on_reset(lambda: resets.append(None))
        for count in range(1, 5):
            wait_until(lambda: u32(machine, TICKS) == 1, "it runs")
            machine.request_reset()
            wait_until(lambda count=count: len(resets) >= count, "the machine is reset")
        assert running.wait_end().reason is StopReason.POWERED_OFF


def test_request_reset_before_the_first_run_and_between_runs() -> None:
    with pc(smp_image(increment(TICKS) + SPIN), cpus=2) as machine:
        for _ in range(4):
            machine.request_reset()
            while u32(machine, TICKS) != 1:
                assert machine.run(timeout=0.1).reason is StopReason.TIMEOUT
            machine.write_memory(TICKS, b"\x40", physical=True)


def test_without_reboot_a_reset_ends_the_machine_with_status_0() -> None:
    with pc(smp_image(start_aps() + KEYBOARD_RESET), cpus=2, reboot=False) as machine:
        stop = machine.run(timeout=PATIENCE)
        assert (stop.reason, stop.status) == (StopReason.RESET, 0)
        with pytest.raises(StopVm):
            machine.request_reset()


@pytest.mark.process
def test_no_reboot_on_the_command_line(tmp_path: Path) -> None:
    guest = tmp_path / "guest.bin"
    guest.write_bytes(out8(0xE9, ord("x")) + boots(3, CF9_RESET))
    for options, output in (((), "xxx"), (("--no-reboot",), "x")):
        result = subprocess.run(
            [sys.executable, "-m", "pyvmm", str(guest), "-c", "2", *options],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=PATIENCE,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, output, "")


def test_our_guest_runs_again_after_a_reset() -> None:
    """smp.elf powers off; it is reset after its first line instead, and then does all."""
    printed = bytearray()

    def output(data: bytes) -> None:  # on the vCPU's thread: it executes nothing meanwhile
        asked = b"processors: " in printed
        printed.extend(data)
        if not asked and b"processors: " in printed:  # it has started the others
            machine.request_reset()

    with Machine(read_image(GUESTS / "smp.elf"), cpus=2, output=output) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF
        assert printed.count(b"smp: starting") == 2
        assert printed.endswith(b"smp: ok\n")


# --- power-on state ------------------------------------------------------------------------------

# What a guest can change of its processor, besides general registers:
#   mov dr0, rbx; or cr4, PGE; movups xmm3, [GDT]; EFER |= SCE; LSTAR = rbx; mov ds, 0x10
_CHANGES = bytes.fromhex(
    "0f23c3 0f20e0 0c80 0f22e0 0f101c2500700000"
    "b9800000c0 0f32 0c01 0f30  b9820000c0 89d8 31d2 0f30  66b81000 8ed8"
)
_PIC_MASKS = out8(0x21, 0x55) + out8(0xA1, 0xAA)
_PIT_RUNS = out8(0x43, 0x34) + out8(0x40, 0x10) + out8(0x40, 0x27)
# mov ecx, 0xfec00000; mov dword [rcx], 0x14; mov dword [rcx + 16], 0x10042: an IOAPIC pin
_IOAPIC_PIN = bytes.fromhex("b90000c0fe c70114000000 c7411042000100")
_DEVICES = (
    out8(0x3F9, 0x0F)  # COM1: all interrupts
    + out8(0x3FC, 0x0B)
    + out8(0x64, 0x60)  # the keyboard controller: a command byte
    + out8(0x60, 0x01)
    + out8(0x3D4, 0x0E)  # the cursor
    + out8(0x3D5, 0x07)
    + out16(0x602, 0x0101)
)
VCPU_STATE = (
    kvm.kvm_regs,
    kvm.kvm_sregs,
    kvm.kvm_debugregs,
    kvm.kvm_vcpu_events,
    kvm.kvm_xcrs,
    kvm.kvm_xsave,
    kvm.kvm_lapic_state,
    kvm.kvm_mp_state,
)
MSRS = (0xC0000080, 0xC0000081, 0xC0000082, 0xC0000084, 0x174, 0x277)  # EFER, STAR, ..., PAT


def power_on_state(machine: Machine) -> dict[str, bytes]:
    """All state of processors and interrupt controllers; no vCPU may run."""
    state = {}
    for vcpu_id in range(machine.cpus):
        handle = machine.vm.handle_of(vcpu_id)
        for kind in VCPU_STATE:
            found = handle.get(kind)
            if isinstance(found, kvm.kvm_vcpu_events):
                found.flags = 0  # which fields KVM_SET is to look at
            state[f"{kind.__name__} of vCPU {vcpu_id}"] = bytes(found)
        state[f"MSRs of vCPU {vcpu_id}"] = repr(handle.get_msrs(MSRS)).encode()
    for number, controller in enumerate(machine.vm.handle.get_interrupt_controllers()):
        if isinstance(controller, kvm.kvm_pit_state2):
            for channel in controller.channels:
                channel.count_load_time = 0
        state[f"interrupt controller {number}"] = bytes(controller)
    return state


def test_a_reset_brings_back_the_state_of_power_on() -> None:
    """Both processors change what they can, and are reset when they have."""
    ap = LOAD_IDT + _CHANGES + lapic(LAPIC_LINT0, 0x700) + COUNT
    bsp = start_aps() + _CHANGES + _PIC_MASKS + _PIT_RUNS + _IOAPIC_PIN + _DEVICES + start_timer()
    bsp += b"\xfb" + increment(TICKS + 4) + FOREVER  # sti
    handlers = {TIMER_VECTOR: TICK, NMI_VECTOR: IRETQ}
    machine = pc(smp_image(boots(3, bsp), ap, handlers), cpus=2)
    power_on, memory = power_on_state(machine), machine.vm.memory.read(0, RAM)
    differences: list[str] = []
    resets: list[None] = []

    def compare() -> None:
        resets.append(None)
        for name, value in power_on_state(machine).items():
            if value != power_on[name]:
                differences.append(name)
        if machine.vm.memory.read(0, RAM) != memory:
            differences.append("memory")

    machine.on_reset(compare)
    with Running(machine) as running:
        for count in range(1, 3):
            wait_until(lambda: u32(machine, TICKS + 4) == 1 and counter(machine, 1) > 0, "it runs")
            machine.vm.inject_nmi(0)
            machine.vm.set_irq(4, True)
            machine.request_reset()
            wait_until(lambda count=count: len(resets) == count, "it is reset")
        assert running.wait_end().reason is StopReason.POWERED_OFF
    assert differences == []


def test_the_guest_itself_finds_memory_cleared_and_its_local_apic_off() -> None:
    """Debug-exit 1: a word that the last start has written; 2: the LAPIC's timer still set up."""
    check = bytes.fromhex("833c25") + struct.pack("<IB", TICKS, 0) + b"\x74\x04"
    check += bytes.fromhex("b001 e6f4") + bytes.fromhex("81bb") + struct.pack("<II", 0x320, 0x10000)
    check += b"\x74\x04" + bytes.fromhex("b002 e6f4") + increment(TICKS)
    bsp = check + start_timer() + boots(5, CF9_RESET)
    with pc(smp_image(bsp), cpus=1) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF


def test_a_startup_ipi_that_was_on_its_way_does_not_survive_the_reset() -> None:
    """The AP is suspended, so INIT and SIPI wait for it when the machine is reset."""
    reset_first = start_aps() + increment(TICKS) + FOREVER
    image = smp_image(increment(TICKS + 4) + until(TICKS + 8, 1) + boots(2, reset_first, SPIN))
    with Running(pc(image, cpus=2)) as running:
        machine, vm, resets = running.machine, running.machine.vm, []
        machine.on_reset(lambda: resets.append(None))
        for _ in range(2):
            wait_until(lambda: u32(machine, TICKS + 4) == 1, "it runs")
            if not resets:
                vm.suspend_cpu(1)
                assert not vm.wait_parked([1], PATIENCE)
            machine.write_memory(TICKS + 8, b"\1", physical=True)
            if not resets:
                wait_until(lambda: u32(machine, TICKS) == 1, "the start-up IPI is sent")
                machine.request_reset()
                wait_until(lambda: len(resets) == 1, "it is reset")
                vm.resume_cpu(1)
        wait_counts(machine, 0)
        time.sleep(0.05)
        assert counter(machine, 1) == 0, "it was started by an IPI of the guest before"


# --- many, and at bad moments --------------------------------------------------------------------


@pytest.mark.slow
def test_hundreds_of_resets_with_several_processors_running() -> None:
    count = min(250, cycles(300))
    with pc(smp_image(start_aps() + boots(count, KEYBOARD_RESET)), cpus=4) as machine:
        resets: list[None] = []
        machine.on_reset(lambda: resets.append(None))
        stop = machine.run(timeout=2 * PATIENCE)
        assert (stop.reason, len(resets)) == (StopReason.POWERED_OFF, count - 1)


def test_all_processors_ask_for_a_reset_at_once() -> None:
    """Each AP resets as soon as it runs, the BSP at the same time, by another port."""
    count = min(100, cycles(150))
    bsp = boots(count, start_aps() + CF9_RESET)
    with pc(smp_image(bsp, KEYBOARD_RESET), cpus=4) as machine:
        resets: list[None] = []
        machine.on_reset(lambda: resets.append(None))
        assert machine.run(timeout=2 * PATIENCE).reason is StopReason.POWERED_OFF
        assert len(resets) == count - 1


def test_a_reset_and_a_power_off_at_once() -> None:
    """The first processor gives up after five starts, at the latest."""
    bsp = boots(5, start_aps() + KEYBOARD_RESET, start_aps() + FOREVER)
    for _ in range(cycles(20)):
        with pc(smp_image(bsp, POWER_OFF), cpus=3) as machine:
            assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF


def test_an_ap_that_resets_the_machine_while_the_first_processor_prints() -> None:
    print_forever = bytes.fromhex("b078 1: e6e9 ebfc".replace("1: ", ""))
    count = min(50, cycles(100))
    bsp = boots(count, start_aps() + print_forever)
    with pc(smp_image(bsp, KEYBOARD_RESET), cpus=2) as machine:
        assert machine.run(timeout=2 * PATIENCE).reason is StopReason.POWERED_OFF
        assert set(machine.output) <= {ord("x")}


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
def test_a_reset_at_a_limit_of_exits(limit: int) -> None:
    """The exit that asks for the reset may be the last that is allowed."""
    with pc(smp_image(start_aps() + boots(4, KEYBOARD_RESET), SLEEP), cpus=2) as machine:
        resets: list[None] = []
        machine.on_reset(lambda: resets.append(None))
        stop = machine.run(timeout=PATIENCE, max_exits=limit)
        for _ in range(100):
            if stop.reason is not StopReason.EXIT_LIMIT:
                break
            assert machine.get_register("rip") >= 0, "it can be looked at"
            stop = machine.run(timeout=PATIENCE, max_exits=limit)
        assert (stop.reason, len(resets)) == (StopReason.POWERED_OFF, 3)


def test_a_reset_at_a_time_limit() -> None:
    count = min(100, cycles(100))
    with pc(smp_image(start_aps() + boots(count, CF9_RESET)), cpus=3) as machine:
        runs = 0
        while machine.run(timeout=0.0005 * (runs % 7)).reason is StopReason.TIMEOUT:
            assert machine.get_register("rip") >= 0, "it can be looked at"
            runs += 1
            assert runs < 100_000
        assert machine.ended is not None and machine.ended.reason is StopReason.POWERED_OFF


def test_a_reset_that_is_asked_for_while_the_machine_looks_whether_it_idles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both keep the vCPUs out of the guest for a moment: the shorter one must not end the other."""
    machine = pc(smp_image(boots(2, increment(TICKS) + IDLE)), cpus=2)
    vm, held = machine.vm, []

    def ask_for_a_reset() -> bool:
        machine.request_reset()
        return False

    machine.on_reset(lambda: held.append([vm._vcpus[n].held for n in range(2)]))
    monkeypatch.setattr(vm, "all_wait_for_good", ask_for_a_reset)
    with Running(machine) as running:
        assert running.wait_end().reason is StopReason.POWERED_OFF
        assert held == [[True, True]]


def test_a_reset_waits_for_a_vcpu_that_waits_until_its_output_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes on printing afterwards: nobody is told to drop its output."""
    monkeypatch.setattr("pyvmm.machine._PATIENCE_SECONDS", 0.05)
    inside, go_on = threading.Event(), threading.Event()
    resets: list[None] = []
    hurried: list[None] = []

    def write(offset: int, size: int, value: int) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)

    out = bytes.fromhex("66ba0010 ee ebfe")  # mov dx, 0x1000; out dx, al; jmp .
    machine = Machine(flat_image(out), irqchip=False, memory=RAM)
    machine.on_port(0x1000, write=write)
    machine.on_reset(lambda: resets.append(None))
    machine.on_hurry(lambda: hurried.append(None))
    with Running(machine):
        assert inside.wait(PATIENCE)
        machine.request_reset()
        time.sleep(0.3)
        assert (resets, hurried) == ([], [])
        go_on.set()
        wait_until(lambda: bool(resets), "it is reset")
        assert hurried == []


def test_a_reset_that_an_exception_has_ended_is_made_anew() -> None:
    """As ^C in the thread that runs the machine, or a test's time limit."""
    resets: list[None] = []

    def fail_once() -> None:
        resets.append(None)
        if len(resets) == 1:
            raise KeyboardInterrupt

    with Machine(flat_image(COUNT), irqchip=False, memory=RAM) as machine:
        machine.on_reset(fail_once)
        machine.run(timeout=0.05)
        machine.request_reset()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=PATIENCE)
        machine.write_memory(COUNTERS, bytes(8), physical=True)
        while not counter(machine, 0):
            assert machine.run(timeout=0.05).reason is StopReason.TIMEOUT
        assert len(resets) == 2


# --- with a debugger -----------------------------------------------------------------------------


def test_a_stop_from_just_before_a_reset_is_told_without_its_reason() -> None:
    """vCPU 1 has hit a breakpoint, in code that is not where it is any more."""
    # test edi, edi; jz 2f; mov dx, 0x1001; 1: in al, dx; test al, al; jz 1b; nop; jmp .
    # 2: mov dx, 0x1000; out dx, al; jmp .
    code = bytes.fromhex("85ff 740c 66ba0110 ec 84c0 74fb 90 ebfe 66ba0010 ee ebfe")
    nop = BASE + 13
    inside = threading.Event()

    def reset_when_it_is_claimed(offset: int, size: int, value: int) -> None:
        if not inside.is_set():
            inside.set()
            wait_until(lambda: debuggee.server.run_control.stop is not None, "the other hits")
            debuggee.machine.request_reset()

    def prepare(machine: Machine) -> None:
        machine.on_port(0x1000, write=reset_when_it_is_claimed)
        machine.on_port(0x1001, read=lambda offset, size: inside.is_set())

    with Debuggee(code, cpus=2, prepare=prepare) as debuggee, debuggee.connect() as client:
        client.insert(nop)
        stop = client.resume()
        assert (stop.kind, stop.signal, stop.vcpu_id, stop.rip) == ("T", 5, 1, BASE)
        assert "swbreak" not in stop


STARTED = bytes.fromhex("833c25") + struct.pack("<IB", TICKS, 2) + b"\x72\xf6"  # 1: cmp; jb 1b
COUNT_IN = increment(TICKS) + COUNT


@pytest.mark.parametrize("reset", [KEYBOARD_RESET, CF9_RESET], ids=["0x64", "0xcf9"])
def test_resets_while_a_debugger_lets_all_run(reset: bytes) -> None:
    """Each time the first processor waits for the others, which the debugger must not hold."""
    bsp = start_aps() + STARTED + b"\x90" + boots(3, reset)
    image = smp_image(bsp, COUNT_IN)
    with Debuggee(image, cpus=3, irqchip=True) as debuggee, debuggee.connect() as client:
        resets: list[None] = []
        debuggee.machine.on_reset(lambda: resets.append(None))
        stop = client.resume()
        assert (stop.kind, stop.signal, len(resets)) == ("W", 0, 2)
        assert debuggee.vm.ended


def test_parked_processors_are_not_started_after_a_reset() -> None:
    bsp = start_aps() + STARTED + increment(TICKS + 4) + until(TICKS + 8, 1) + KEYBOARD_RESET
    image = smp_image(boots(2, bsp, SPIN), COUNT_IN)
    with Debuggee(image, cpus=3, irqchip=True) as debuggee, debuggee.connect() as client:
        client.go()
        debuggee.wait_for(lambda: u32(debuggee.machine, TICKS + 4) == 1, "they are started")
        client.break_in()
        debuggee.machine.write_memory(TICKS + 8, b"\1", physical=True)
        assert "not started" not in client.monitor("vcpus")
        client.go("vCont;c:1")
        debuggee.wait_counts(0)
        assert client.break_in().vcpu_id == 0
        assert client.monitor("vcpus").count("not started") == 2
        assert client.register(RIP, 1) == client.register(RIP, 2) == 0xFFFF_FFF0
        client.go()
        debuggee.wait_counts(0)
        assert debuggee.counter(1) == debuggee.counter(2) == 0
        client.break_in()


@pytest.mark.parametrize("port", [0x604, 0xB004])
def test_power_off_while_the_debugger_keeps_the_others_parked(port: int) -> None:
    bsp = start_aps() + STARTED + until(TICKS + 8, 1) + out16(port, 0x2000) + FOREVER
    image = smp_image(bsp, COUNT_IN)
    with Debuggee(image, cpus=3, irqchip=True) as debuggee, debuggee.connect() as client:
        client.go()
        debuggee.wait_for(lambda: u32(debuggee.machine, TICKS) == 2, "they are started")
        client.break_in()
        debuggee.machine.write_memory(TICKS + 8, b"\1", physical=True)
        stop = client.resume("vCont;c:1")
        assert (stop.kind, stop.signal) == ("W", 0)
        assert debuggee.wait_end().reason is StopReason.POWERED_OFF


def test_a_step_over_the_reset_ends_at_the_images_entry() -> None:
    requires("step")
    with Debuggee(smp_image(KEYBOARD_RESET), cpus=2, irqchip=True) as debuggee:
        with debuggee.connect() as client:
            for _ in range(3):
                rips = [client.step().rip for _ in range(5)]
                assert rips[-1] == BASE, "mov ebx; mov [rbx]; mov dx; mov al; out"
                assert rips[0] > BASE


def test_a_reset_that_somebody_else_asks_for_while_all_are_parked() -> None:
    with Debuggee(smp_image(start_aps() + SPIN), cpus=2, irqchip=True) as debuggee:
        with debuggee.connect() as client:
            resets: list[None] = []
            debuggee.machine.on_reset(lambda: resets.append(None))
            client.go()
            debuggee.wait_counts(1)
            client.break_in()
            debuggee.machine.request_reset()
            debuggee.wait_for(lambda: len(resets) == 1, "it is reset")
            assert client.register(RIP, 0) == BASE
            assert "not started" in client.monitor("vcpus")
            client.go()
            debuggee.wait_counts(1)
            client.break_in()


# --- a reset that a debugger asks for ------------------------------------------------------------


def test_monitor_reset_begins_again_and_stays_before_the_first_instruction() -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.insert(COUNT_INC)
        client.resume()
        client.remove(COUNT_INC)
        client.go()
        debuggee.wait_counts()
        client.break_in()
        client.insert(COUNT_INC)
        assert client.monitor("reset").startswith("the machine is reset")
        assert client.register(RIP) == BASE
        assert debuggee.counter() == 0
        assert client.silent()
        stop = client.resume()
        assert stop.rip == COUNT_INC and "swbreak" in stop, "breakpoints stay"
        client.remove(COUNT_INC)
        client.go()
        debuggee.wait_counts()


def test_monitor_reset_after_a_crash_gives_the_guest_another_life() -> None:
    with Debuggee(bytes.fromhex("90 0f0b")) as debuggee, debuggee.connect() as client:
        for _ in range(3):
            assert client.resume().signal == 11
            client.monitor("reset")
            assert client.register(RIP) == BASE
        assert client.resume().signal == 11
        assert client.resume().kind == "X"
        assert debuggee.wait_end().reason is StopReason.CRASHED


def test_monitor_reset_of_a_machine_that_must_not_reboot_is_refused() -> None:
    with Debuggee(COUNT, reboot=False) as debuggee, debuggee.connect() as client:
        assert "--no-reboot" in client.monitor("reset")
        client.go()
        debuggee.wait_counts()

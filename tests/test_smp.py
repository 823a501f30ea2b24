"""Several processors and interrupts, with the in-kernel irqchip: start-up, idling, what CPUID says.

Resets are in test_reset.py, a debugger is in test_smp_debug.py.
"""

from __future__ import annotations

import re
import struct
import time

import pytest

from pyvmm import idle
from pyvmm.debuggedset import ALL
from pyvmm.machine import Machine
from pyvmm.stop import StopReason
from tests.conftest import GUESTS
from tests.rsp_client import COUNT
from tests.smp_guests import (
    EOI,
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
    UD2,
    Running,
    counter,
    increment,
    lapic,
    pc,
    smp_image,
    start_ap,
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


SPIN = bytes.fromhex("31ff") + COUNT  # xor edi, edi: the first processor counts in counter 0


def hold_still(machine: Machine, seconds: float = 0.2) -> None:
    """Let the guest run for a moment; then all vCPUs are parked and can be looked at."""
    stop = machine.run(timeout=seconds)
    assert stop.reason is StopReason.TIMEOUT, stop


# --- our guest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8])
def test_smp_guest_finds_starts_and_calls_every_processor(cpus: int) -> None:
    with Machine(GUESTS / "smp.elf", cpus=cpus) as machine:
        stop = machine.run(timeout=2 * PATIENCE)
        lines = machine.output.decode().splitlines()
    assert (stop.reason, stop.status) == (StopReason.POWERED_OFF, 0), (stop, lines)
    ticks = lines.pop(-2)
    assert re.fullmatch(r"timer: 0x[0-9a-f]+ ticks of 10 ms", ticks)
    assert lines == [
        "smp: starting the other processors",
        f"processors: {cpus:#x}",
        f"each adds 0x1000 to the counter: {0x1000 * cpus:#x}, none is lost",
        *(f"APIC id {apic_id:#x} has got the IPI" for apic_id in range(1, cpus)),
        "smp: ok",
    ]


# --- not started ---------------------------------------------------------------------------------


def test_vcpus_execute_nothing_before_their_startup_ipi() -> None:
    with pc(smp_image(SPIN), cpus=3) as machine:
        for _ in range(3):
            hold_still(machine, 0.05)
            assert [machine.vm.started(n) for n in range(3)] == [True, False, False]
            states = [machine.vm.run_state(n) for n in range(3)]
            assert states == ["running", "not started", "not started"]
            assert machine.get_register("rip", 1) == machine.get_register("rip", 2) == 0xFFF0
        assert machine.vm.active_cpus() == {0, 1, 2}, "they have threads, and are no halted ones"
        assert counter(machine, 1) == counter(machine, 2) == 0 < counter(machine, 0)
        assert machine.describe_vcpus().count("not started") == 2


def test_only_the_processor_that_the_startup_ipi_names_starts() -> None:
    with pc(smp_image(start_ap(2) + SPIN), cpus=4) as machine:
        while counter(machine, 2) == 0:
            hold_still(machine, 0.05)
        assert [machine.vm.run_state(n) for n in range(4)] == [
            *("running", "not started", "running", "not started")
        ]
        assert counter(machine, 1) == counter(machine, 3) == 0


def test_init_alone_starts_nobody() -> None:
    init_to_all = lapic(0x300, 0xC4500)
    with pc(smp_image(init_to_all + SPIN), cpus=2) as machine:
        hold_still(machine)
        assert machine.vm.run_state(1) == "not started"
        assert counter(machine, 1) == 0


def test_init_stops_a_running_processor_and_a_second_sipi_starts_it_again() -> None:
    """The AP counts itself in and powers the machine off the second time."""
    count_in = increment(TICKS) + bytes.fromhex("833c25") + struct.pack("<IB", TICKS, 2)
    ap = count_in + b"\x74\x02" + FOREVER + POWER_OFF  # cmp dword [TICKS], 2; je 1f; jmp $; 1:
    bsp = start_aps() + until(TICKS, 1) + start_aps() + FOREVER
    with pc(smp_image(bsp, ap), cpus=2) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF


# --- the end: nobody can ever run again ----------------------------------------------------------


@pytest.mark.parametrize(
    ("bsp", "cpus"),
    [
        pytest.param(SLEEP, 1, id="one"),
        pytest.param(SLEEP, 3, id="the others not started"),
        pytest.param(start_aps() + SLEEP, 3, id="all halted"),
        pytest.param(lapic(0x300, 0xC4500) + SLEEP, 2, id="the other one has got INIT only"),
    ],
)
def test_a_guest_ends_when_all_processors_are_halted_with_interrupts_off(
    bsp: bytes, cpus: int
) -> None:
    with pc(smp_image(bsp, ap=SLEEP), cpus=cpus) as machine:
        stop = machine.run(timeout=PATIENCE)
    assert (stop.reason, stop.status) == (StopReason.HALTED, 0)


def _until_ticks(count: int, then: bytes) -> bytes:
    """A timer handler: TICK, but `then` at the tick with this number."""
    compare = increment(TICKS) + bytes.fromhex("833c25") + struct.pack("<IB", TICKS, count)
    return compare + struct.pack("BB", 0x72, len(then)) + then + EOI + IRETQ  # jb: go on


def test_a_guest_that_has_idled_for_a_while_still_ends_when_it_is_halted_for_good() -> None:
    """Long enough to have been looked at, and found waiting for its timer."""
    handlers = {TIMER_VECTOR: _until_ticks(100, SLEEP)}
    with pc(smp_image(start_timer(5_000_000) + IDLE, handlers=handlers), cpus=2) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert u32(machine, TICKS) == 100


def test_a_guest_that_waits_for_interrupts_does_not_end() -> None:
    handlers = {TIMER_VECTOR: TICK}
    with pc(smp_image(start_timer() + start_aps() + IDLE, SLEEP, handlers), cpus=2) as machine:
        for _ in range(2):
            before = u32(machine, TICKS)
            hold_still(machine, 0.5)
            assert u32(machine, TICKS) > before
        assert machine.vm.run_state(1) == "halted"


def test_a_guest_whose_only_hope_is_a_device_does_not_end() -> None:
    """Interrupts are on, though no timer runs: a key may be pressed."""
    with pc(smp_image(IDLE), cpus=2) as machine:
        hold_still(machine, 0.5)
        assert machine.vm.run_state(0) == "halted"


@pytest.mark.parametrize("spinning", [0, 1])
def test_a_guest_does_not_end_while_one_processor_spins(spinning: int) -> None:
    bsp, ap = (SPIN, SLEEP) if spinning == 0 else (SLEEP, COUNT)
    with pc(smp_image(start_aps() + bsp, ap), cpus=2) as machine:
        while machine.vm.active_cpus() and counter(machine, spinning) == 0:
            hold_still(machine, 0.1)
        hold_still(machine, 0.4)
        assert machine.vm.run_state(1 - spinning) == "halted"
        assert machine.vm.run_state(spinning) == "running"


def test_the_end_is_noticed_without_statistics_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.17 does not say whether a vCPU waits."""

    def no_statistic(handle: object, name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(idle, "Statistic", no_statistic)
    handlers = {TIMER_VECTOR: _until_ticks(100, SLEEP)}
    with pc(smp_image(start_timer(5_000_000) + IDLE, handlers=handlers), cpus=2) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert u32(machine, TICKS) == 100
    with pc(smp_image(start_aps() + IDLE, SLEEP), cpus=2) as machine:
        hold_still(machine, 0.5)


# --- non-maskable interrupts ---------------------------------------------------------------------


@pytest.mark.parametrize("halted", [0, 1])
def test_an_nmi_wakes_a_processor_that_is_halted_with_interrupts_off(halted: int) -> None:
    bsp, ap = (SLEEP, COUNT) if halted == 0 else (SPIN, LOAD_IDT + increment(TICKS + 4) + SLEEP)
    start = LOAD_IDT + start_aps() + (increment(TICKS + 4) if halted == 0 else b"")
    handlers = {NMI_VECTOR: increment(TICKS) + IRETQ}
    with Running(pc(smp_image(start + bsp, ap, handlers), cpus=2)) as running:
        machine = running.machine
        wait_counts(machine, 1 - halted)
        wait_until(lambda: u32(machine, TICKS + 4) == 1, "it is about to halt")
        for count in range(1, 11):
            machine.vm.inject_nmi(halted)
            wait_until(lambda count=count: u32(machine, TICKS) == count, "the NMI handler runs")


# --- suspending ----------------------------------------------------------------------------------


def test_suspend_and_resume_of_vcpus_that_spin_halt_idle_or_are_not_started() -> None:
    """vCPU 0 counts, 1 is halted for good, 2 idles with a timer, 3 was never started."""
    ap = bytes.fromhex("83ff02 74 04") + SLEEP  # cmp edi, 2; je 1f; SLEEP; 1:
    ap += start_timer() + IDLE
    handlers = {TIMER_VECTOR: TICK}
    image = smp_image(start_ap(1) + start_ap(2) + SPIN, ap, handlers)
    with Running(pc(image, cpus=4)) as running:
        machine, vm = running.machine, running.machine.vm
        wait_until(lambda: u32(machine, TICKS) > 0, "the timer ticks")
        for _ in range(cycles(2000)):
            vm.suspend_cpu(ALL)
            assert not vm.wait_parked(range(4), PATIENCE)
            assert [vm.run_state(n) for n in (0, 3)] == ["running", "not started"]
            before = counter(machine, 0), u32(machine, TICKS)
            registers = [machine.registers(n) for n in range(4)]
            assert (counter(machine, 0), u32(machine, TICKS)) == before, "somebody runs"
            assert [machine.registers(n) for n in range(4)] == registers
            vm.resume_cpu(ALL)
        wait_counts(machine, 0)
        ticks = u32(machine, TICKS)
        wait_until(lambda: u32(machine, TICKS) > ticks, "the timer still ticks")
        vm.suspend_cpu(ALL)
        assert not vm.wait_parked(range(4), PATIENCE)
        assert vm.run_state(1) == "halted"
        vm.resume_cpu(ALL)


def test_a_vcpu_that_is_started_while_it_is_suspended_runs_when_it_is_resumed() -> None:
    bsp = increment(TICKS) + until(TICKS + 4, 1) + start_aps() + SPIN
    with Running(pc(smp_image(bsp), cpus=2)) as running:
        machine, vm = running.machine, running.machine.vm
        wait_until(lambda: u32(machine, TICKS) == 1, "it runs")
        vm.suspend_cpu(1)
        assert not vm.wait_parked([1], PATIENCE)
        assert vm.run_state(1) == "not started"
        machine.write_memory(TICKS + 4, b"\1", physical=True)
        wait_counts(machine, 0)
        assert vm.run_state(1) == "running", "started, though it may not run"
        assert counter(machine, 1) == 0
        vm.resume_cpu(1)
        wait_counts(machine, 1)


def test_a_run_with_a_time_limit_goes_on_where_it_stopped() -> None:
    handlers = {TIMER_VECTOR: _until_ticks(50, POWER_OFF)}
    bsp = start_aps() + start_timer() + IDLE
    with pc(smp_image(bsp, handlers=handlers), cpus=3) as machine:
        stop, runs, counters = machine.run(timeout=0.005), 0, [0, 0]
        while stop.reason is StopReason.TIMEOUT:
            now = [counter(machine, n) for n in (1, 2)]
            assert all(a >= b for a, b in zip(now, counters, strict=True))
            counters = now
            stop, runs = machine.run(timeout=0.005), runs + 1
            assert runs < 5000
        assert stop.reason is StopReason.POWERED_OFF
        assert u32(machine, TICKS) == 50


def test_a_run_with_a_limit_of_exits_goes_on_where_it_stopped() -> None:
    """Each of three processors prints; together they are stopped after every few exits."""
    write = b"\x40\x88\xf8\xe6\xe9"  # mov al, dil; out 0xe9, al
    ap = (bytes.fromhex("83c730 b964000000") + b"\x89\xce" + write + bytes.fromhex("ffc9 75f7")
          + increment(TICKS) + SLEEP)  # fmt: skip
    # add edi, '0'; mov ecx, 100; mov esi, ecx; 1: out 0xe9, al; dec ecx; jnz 1b
    with pc(smp_image(start_aps() + b"\x31\xff" + ap, ap), cpus=3, coalesce=False) as machine:
        stops = 0
        while (stop := machine.run(timeout=PATIENCE, max_exits=7)).reason is StopReason.EXIT_LIMIT:
            stops += 1
        assert stop.reason is StopReason.HALTED
        assert stops > 20
        assert sorted(machine.output) == sorted(b"012" * 100)


# --- what the guest is told of itself ------------------------------------------------------------

LEAVES = ((0, 0), (1, 0), (4, 0), (4, 3), (0xB, 0), (0xB, 1), (0xB, 2), (0x80000000, 0),
          (0x80000008, 0), (0x8000001E, 0), (0x40000000, 0), (0x40000001, 0))  # fmt: skip
ANSWERS, ANSWER_BYTES = 0x30000, 0x1000  # GPA; of vCPU n behind those of vCPU n - 1


def _ask_cpuid() -> bytes:
    """Stores APIC id, then EAX, EBX, ECX, EDX for each of LEAVES, at RBP on."""
    # mov ebp, edi; shl ebp, 12; add ebp, ANSWERS; mov eax, [rbx + 0x20]; shr eax, 24;
    # mov [rbp], eax; add ebp, 4
    code = bytes.fromhex("89fd c1e50c 81c5") + struct.pack("<I", ANSWERS)
    code += bytes.fromhex("8b4320 c1e818 894500 83c504")
    for leaf, subleaf in LEAVES:
        # mov eax, leaf; mov ecx, subleaf; cpuid; four stores; add ebp, 16
        code += struct.pack("<BIBI", 0xB8, leaf, 0xB9, subleaf)
        code += bytes.fromhex("0fa2 894500 895d04 894d08 89550c 83c510")
    return code


def _answers(machine: Machine, vcpu_id: int) -> tuple[int, dict[tuple[int, int], list[int]]]:
    """The APIC id and CPUID as a vCPU saw them; leaves that the processor does not have are left
    out."""
    raw = machine.read_memory(ANSWERS + ANSWER_BYTES * vcpu_id, 4 + 16 * len(LEAVES), physical=True)
    apic_id, *values = struct.unpack(f"<{1 + 4 * len(LEAVES)}I", raw)
    found = {leaf: values[4 * n : 4 * n + 4] for n, leaf in enumerate(LEAVES)}
    last = {base: found[base, 0][0] for base in (0, 0x80000000, 0x40000000)}
    known = {leaf: v for leaf, v in found.items() if leaf[0] <= last[leaf[0] & 0xF0000000]}
    return apic_id, known


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8])
def test_cpuid_tells_each_processor_its_apic_id_and_the_topology(cpus: int) -> None:
    bsp = start_aps() + b"\x31\xff" + _ask_cpuid() + SLEEP
    with pc(smp_image(bsp, _ask_cpuid() + SLEEP), cpus=cpus) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.HALTED
        answers = [_answers(machine, n) for n in range(cpus)]
    bits = (cpus - 1).bit_length()
    for vcpu_id, (apic_id, leaves) in enumerate(answers):
        assert apic_id == vcpu_id, "the local APIC's own register"
        _, ebx, ecx, edx = leaves[1, 0]
        assert ebx >> 24 == vcpu_id, "the initial APIC id"
        assert ebx >> 16 & 0xFF == cpus, "logical processors in the package"
        assert edx & 1 << 28 or cpus == 1, "HTT: there are several"  # kvm_pvm always sets it
        assert edx & 1 << 9 and ecx & 1 << 31, "there is an APIC, and a hypervisor"
        if (4, 0) in leaves and leaves[4, 0][0] & 0x1F:
            cores = (leaves[4, 0][0] >> 26) + 1
            assert cores == 1 << bits, "ids of cores in the package"
            assert leaves[4, 0][0] >> 14 & 0xFFF == 0, "nobody shares the first cache"
        if (0xB, 0) in leaves:
            eax, ebx, ecx, edx = leaves[0xB, 0]
            assert (eax & 0x1F, ebx & 0xFFFF, ecx >> 8 & 0xFF, edx) == (0, 1, 1, vcpu_id), "threads"
            eax, ebx, ecx, edx = leaves[0xB, 1]
            assert (eax & 0x1F, ebx & 0xFFFF, ecx >> 8, edx) == (bits, cpus, 2, vcpu_id), "cores"
            eax, ebx, ecx, _ = leaves[0xB, 2]
            assert (ebx & 0xFFFF, ecx >> 8 & 0xFF) == (0, 0), "no further level"
        if (0x80000008, 0) in leaves and leaves[0x80000008, 0][2]:  # AMD's number of cores
            assert leaves[0x80000008, 0][2] & 0xFF == cpus - 1
    first, *others = (leaves for _, leaves in answers)
    for leaves in others:
        assert leaves.keys() == first.keys(), "all processors are of one kind"
        assert leaves[0, 0] == first[0, 0]


KVMCLOCK_MSR, CLOCK = 0x4B564D01, 0x38000


def test_the_tsc_counts_and_kvmclock_is_there_where_cpuid_says_so() -> None:
    """Both processors write their TSC, the first after it has seen the other's."""
    read_tsc = bytes.fromhex("0f31 48c1e220 4809d0")  # rdtsc; shl rdx, 32; or rax, rdx
    ap = read_tsc + bytes.fromhex("48890425") + struct.pack("<I", ANSWERS) + SLEEP  # mov [], rax
    wait = bytes.fromhex("48833c25") + struct.pack("<IB", ANSWERS, 0) + b"\x74\xf5"  # cmp; je
    bsp = start_aps() + wait + read_tsc
    bsp += bytes.fromhex("48890425") + struct.pack("<I", ANSWERS + 8)
    # mov eax, 0x40000001; cpuid; test al, 8; jz past the wrmsr
    switch_on = struct.pack("<BIBI", 0xB9, KVMCLOCK_MSR, 0xB8, CLOCK | 1) + b"\x31\xd2\x0f\x30"
    bsp += bytes.fromhex("b801000040 0fa2 89c5 a808 74") + bytes((len(switch_on),)) + switch_on
    bsp += bytes.fromhex("892c25") + struct.pack("<I", ANSWERS + 16) + SLEEP  # mov [], ebp
    with pc(smp_image(bsp, ap), cpus=2) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.HALTED
        data = machine.read_memory(ANSWERS, 24, physical=True)
        other, own, features, _ = struct.unpack("<QQII", data)
        clock = machine.read_memory(CLOCK, 32, physical=True)
    assert 0 < other < own < other + (1 << 40), "the processors' time stamps belong together"
    if features & 8:  # KVM_FEATURE_CLOCKSOURCE2
        version, _, timestamp, _, multiplier, _, _ = struct.unpack("<IIQQIb3s", clock)
        assert version and version % 2 == 0 and timestamp and multiplier


# --- the end, the other way ----------------------------------------------------------------------


def test_a_triple_fault_of_another_processor_is_a_crash_with_its_number() -> None:
    with pc(smp_image(start_aps() + SPIN, UD2), cpus=2) as machine:
        stop = machine.run(timeout=PATIENCE)
    assert (stop.reason, stop.vcpu_id) == (StopReason.CRASHED, 1)
    assert "triple fault" in stop.report and stop.message.startswith("vCPU 1")


def test_a_power_off_by_another_processor_ends_all() -> None:
    with pc(smp_image(start_aps() + SPIN, POWER_OFF), cpus=4) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.POWERED_OFF


@pytest.mark.parametrize("seconds", [None, 0.0, 0.05])
def test_closing_with_processors_that_were_never_started_leaves_nothing(
    seconds: float | None,
) -> None:
    """The fixture of all KVM tests counts threads and descriptors."""
    started = time.monotonic()
    with pc(smp_image(IDLE), cpus=8) as machine:
        if seconds is not None:
            machine.run(timeout=seconds)
    assert time.monotonic() - started < PATIENCE, "it waited for a thread until it gave up"

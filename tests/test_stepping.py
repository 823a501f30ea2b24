"""A single-step executes exactly one instruction: a table of instructions, and what is awkward."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pyvmm import exits, kvm, x86
from pyvmm.cpustate import Register
from pyvmm.lab import (
    CODE,
    DATA,
    HANDLERS,
    IDT,
    KERNEL_CODE,
    KERNEL_DATA,
    PAGE_TABLES,
    STACK,
    LabMode,
)
from pyvmm.vcpurecord import Capability, Guard
from tests.support import MMIO_GVA, Bench, cycles, requires

pytestmark = pytest.mark.kvm

NOPS = b"\x90" * 8
FINDING = {
    LabMode.LONG: "step",
    LabMode.USER: "step-user",
    LabMode.PROTECTED: "step",
    LabMode.REAL: "step-real",
}


class Case(NamedTuple):
    """An instruction, and how far RIP moves; or `vector`, the exception it raises instead."""

    code: bytes
    moves: int
    vector: int | None = None
    modes: tuple[LabMode, ...] = tuple(LabMode)


KERNEL = (LabMode.LONG, LabMode.PROTECTED, LabMode.REAL)
LONG = (LabMode.LONG,)
LONG_USER = (LabMode.LONG, LabMode.USER)

CASES = {
    "nop": Case(b"\x90", 1),
    "jump to itself": Case(b"\xeb\xfe", 0),
    "jump back": Case(b"\xeb\xf0", -14, modes=(*LONG_USER, LabMode.PROTECTED)),
    "jump far away": Case(b"\xe9\x00\x10\0\0", 0x1005, modes=LONG_USER),
    "call": Case(b"\xe8\x02\x00\x00\x00", 7, modes=LONG_USER),
    "call far away": Case(b"\xe8\x00\x10\0\0", 0x1005, modes=LONG_USER),
    "in": Case(b"\xe4\x10", 2, modes=KERNEL),
    "out": Case(b"\xe6\x10", 2, modes=KERNEL),
    "rep outsb, one left": Case(b"\xf3\x6e", 2, modes=LONG),
    "rep stosb, one left": Case(b"\xf3\xaa", 2, modes=LONG_USER),
    "MMIO load": Case(b"\x8a\x04\x25" + MMIO_GVA.to_bytes(4, "little"), 7, modes=LONG_USER),
    "MMIO store": Case(b"\x88\x04\x25" + MMIO_GVA.to_bytes(4, "little"), 7, modes=LONG_USER),
    "hlt": Case(b"\xf4", 1, modes=KERNEL),
    "pushf": Case(b"\x9c", 1),
    "popf": Case(b"\x9d", 1),
    "sti": Case(b"\xfb", 1, modes=KERNEL),
    "mov ss": Case(b"\x8e\xd0", 2, modes=LONG),
    "cpuid": Case(b"\x0f\xa2", 2),
    "lower CR8": Case(b"\x44\x0f\x22\xc1", 4, modes=LONG),
    "rdmsr": Case(b"\x0f\x32", 2, modes=LONG),
    "iretq": Case(b"\x48\xcf", 3, modes=LONG),
    "syscall": Case(b"\x0f\x05", 0x40, modes=LONG),
    "sysret": Case(b"\x48\x0f\x07", -CODE, modes=LONG),  # to RCX, which is 0
    "int3 of the guest's": Case(b"\xcc", 0, vector=3),
    "int3 with a prefix": Case(b"\x66\xcc", 0, vector=3),
    "int n": Case(b"\xcd\x05", 0, vector=5),
    "ud2": Case(b"\x0f\x0b", 0, vector=6, modes=LONG_USER),
    "divide by zero": Case(b"\xf7\xf1", 0, vector=0),
    "general protection": Case(b"\xfa", 0, vector=13, modes=(LabMode.USER,)),
    "page fault": Case(b"\xa2" + (1 << 40).to_bytes(8, "little"), 0, vector=14, modes=LONG_USER),
}
TABLE = [(name, mode) for name, case in CASES.items() for mode in case.modes]


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    name, mode = request.param
    with prepared(CASES[name].code, mode) as bench:
        yield bench


def prepared(code: bytes, mode: LabMode) -> Bench:
    """The code with registers and a stack that suit every row of the table, ready to step."""
    requires(FINDING[mode])
    bench = Bench(code + NOPS, mode)
    bench.activate()
    regs = bench.cpu.get(kvm.kvm_regs)
    regs.rdx, regs.rax = 0x10, KERNEL_DATA
    regs.rcx = {b"\xf3": 1, b"\x0f": x86.MSR_EFER}.get(code[:1], 0)  # rep, rdmsr
    regs.rsi = regs.rdi = DATA
    if code[:1] == b"\x9d" or code == b"\x48\xcf":
        regs.rsp -= 40
        sp = regs.rsp
        frame = (CODE + 3, KERNEL_CODE, x86.RFLAGS_FIXED, STACK, KERNEL_DATA)
        flags = (x86.RFLAGS_FIXED,) * 5
        bench.write(sp, struct.pack("<5Q", *(flags if code[:1] == b"\x9d" else frame)))
    bench.cpu.set(regs)
    if mode is LabMode.LONG:
        sregs = bench.cpu.get(kvm.kvm_sregs)
        sregs.efer |= x86.EFER_SCE
        sregs.cr8 = 15
        bench.cpu.set(sregs)
        bench.cpu.set_msrs({x86.MSR_STAR: KERNEL_CODE << 32, x86.MSR_LSTAR: CODE + 0x40})
    bench.vm.set_capability(0, Capability.MTRAP_EXIT, True)
    return bench


def step(bench: Bench) -> exits.Exit:
    """Run until something that is no I/O."""
    for _ in range(8):
        exit = bench.enter()
        is_read = isinstance(exit, exits.Mmio) and not exit.is_write
        if is_read or (isinstance(exit, exits.InOut) and exit.is_in):
            bench.vm.answer(0, b"\x5a")
        elif not isinstance(exit, (exits.InOut, exits.Mmio)):
            return exit
    raise AssertionError("I/O without end")


@pytest.mark.parametrize(
    ("bench", "name", "mode"),
    [((name, mode), name, mode) for name, mode in TABLE],
    indirect=["bench"],
    ids=[f"{name}-{mode.name}" for name, mode in TABLE],
)
def test_a_step_is_exactly_one_instruction(bench: Bench, name: str, mode: LabMode) -> None:
    case = CASES[name]
    start = bench.vm.get_register(0, Register.RIP)
    rsp = bench.vm.get_register(0, Register.RSP)
    assert step(bench) == exits.Mtrap()
    rip = bench.vm.get_register(0, Register.RIP)
    if case.vector is None:
        assert rip - start == case.moves
    else:
        code_base = bench.vm.get_register(0, Register.CS_BASE) if mode is LabMode.REAL else 0
        assert code_base + rip == HANDLERS + 16 * case.vector, "not at the handler's first byte"
        assert not saved_flags(bench, case.vector) & x86.RFLAGS_TF, "TF leaked to the handler"
        assert bench.memory.read(HANDLERS + 16 * case.vector, 1) == b"\xf4"
    if case.code == b"\x9c":
        width = {LabMode.REAL: 2, LabMode.PROTECTED: 4}.get(mode, 8)
        pushed = int.from_bytes(bench.memory.read(rsp - width, width), "little")
        assert bench.vm.get_register(0, Register.RSP) == rsp - width
        assert not pushed & x86.RFLAGS_TF, "TF leaked to the guest's stack"
        assert pushed & x86.RFLAGS_FIXED
    if case.code == b"\x0f\x05":
        assert not bench.vm.get_register(0, Register.R11) & x86.RFLAGS_TF
    assert not bench.vm.get_register(0, Register.RFLAGS) & x86.RFLAGS_TF


def saved_flags(bench: Bench, vector: int) -> int:
    size = {LabMode.REAL: 2, LabMode.PROTECTED: 4}.get(bench.mode, 8)
    error_code = vector in x86.VECTORS_WITH_ERROR_CODE and bench.mode is not LabMode.REAL
    rsp = bench.vm.get_register(0, Register.RSP)
    at = rsp + (2 + error_code) * size
    return int.from_bytes(bench.memory.read(at, size), "little")


def test_a_step_reads_what_the_device_answered() -> None:
    with prepared(b"\xe4\x10", LabMode.LONG) as bench:
        assert step(bench) == exits.Mtrap()
        assert bench.vm.get_register(0, Register.RAX) & 0xFF == 0x5A


def test_a_hundred_steps_over_nops_and_ios_stop_at_each_instruction() -> None:
    code = (b"\x90" + b"\xe6\x10" + b"\xff\xc0") * 33
    with prepared(code, LabMode.LONG) as bench:
        expected = CODE
        for size in [1, 2, 2] * 33:
            assert step(bench) == exits.Mtrap()
            expected += size
            assert bench.vm.get_register(0, Register.RIP) == expected


def test_the_guest_runs_on_freely_when_stepping_is_switched_off() -> None:
    with prepared(b"\x90" * 4 + b"\x9c", LabMode.LONG) as bench:
        assert step(bench) == exits.Mtrap()
        bench.vm.set_capability(0, Capability.MTRAP_EXIT, False)
        assert bench.enter() == exits.Hlt(False)
        pushed = bench.read_u64(bench.vm.get_register(0, Register.RSP))
        assert not pushed & x86.RFLAGS_TF, "the trap flag survived the debugger"


def test_a_step_onto_a_wanted_breakpoint_is_a_breakpoint() -> None:
    requires("breakpoint")
    with prepared(b"\x90\xcc", LabMode.LONG) as bench:
        bench.vm.set_capability(0, Capability.BPT_EXIT, True)
        assert step(bench) == exits.Mtrap()
        assert step(bench) == exits.Bpt(1)
        assert bench.vm.get_register(0, Register.RIP) == CODE + 1


def test_a_step_leaves_no_byte_of_the_guest_changed() -> None:
    with prepared(b"\x90" * 4, LabMode.LONG) as bench:
        before = bench.memory.read(CODE, 0x10000)
        for _ in range(4):
            assert step(bench) == exits.Mtrap()
            assert bench.memory.read(CODE, 0x10000) == before


def test_a_vcpu_that_faults_while_another_steps_still_reaches_its_handler() -> None:
    """The stepping vCPU's traps lie on the handlers that the other one uses all the time."""
    # 1: ud2; jmp 1b, and a handler of #UD that counts and skips the ud2
    fault_forever = b"\x0f\x0b\xeb\xfc"
    handler = (
        b"\x48\xff\x07" + b"\x48\x83\x04\x24\x02" + b"\x48\xcf"
    )  # inc [rdi]; add [rsp],2; iretq
    with Bench(fault_forever, cpus=2) as bench:
        bench.write(0x30000, handler)
        gate = struct.pack("<HHHHQ", 0x0000, KERNEL_CODE, 0x8E00, 0x0003, 0)
        bench.write(IDT + 16 * 6, gate)
        bench.write(0x40000, b"\x90" * 400)
        bench.start(1)
        bench.wait_runs(1)
        bench.activate()
        bench.vm.set_register(0, Register.RIP, 0x40000)
        bench.vm.set_capability(0, Capability.MTRAP_EXIT, True)
        for n in range(300):
            assert step(bench) == exits.Mtrap()
            assert bench.vm.get_register(0, Register.RIP) == 0x40001 + n
        bench.wait_runs(1)
        assert bench.memory.read(0x30000, len(handler)) == handler


@pytest.mark.parametrize("mode", LONG_USER)
@pytest.mark.parametrize("code", ["ud2", "page fault"])
def test_a_step_into_a_handler_that_all_exceptions_share(mode: LabMode, code: str) -> None:
    """Also that of #DB, with which some hosts tell of a step in ring 3."""
    for nops in (2, 3):  # RIP & 3, in the place of CS where there is no error code
        with prepared(NOPS[:nops] + CASES[code].code, mode) as bench:
            handler = HANDLERS + 0x800
            bench.write(handler, NOPS)
            gate = struct.pack("<HHHHQ", handler & 0xFFFF, KERNEL_CODE, 0xEE00, handler >> 16, 0)
            bench.write(IDT, gate * 32)
            for _ in range(nops):
                assert step(bench) == exits.Mtrap()
            assert step(bench) == exits.Mtrap()
            assert bench.vm.get_register(0, Register.RIP) == handler
            assert not saved_flags(bench, CASES[code].vector or 0) & x86.RFLAGS_TF


@pytest.mark.parametrize("irqchip", [False, True])
def test_a_step_over_a_call_of_an_exception_handler_is_no_exception(irqchip: bool) -> None:
    """The traps are int3 with an irqchip; the step ends at one without executing it."""
    requires("step")
    if irqchip:
        requires("irqchip")
    handler, words = 0x30000, struct.pack("<4Q", *[0xFFFF] * 4)
    call = b"\xe8" + (handler - CODE - 5).to_bytes(4, "little")
    with Bench(call, irqchip=irqchip) as bench:
        bench.activate()
        bench.write(handler, NOPS)
        gate = struct.pack("<HHHHQ", handler & 0xFFFF, KERNEL_CODE, 0x8E00, handler >> 16, 0)
        bench.write(IDT + 16 * x86.VECTOR_UD, gate)
        top = STACK - 0x40
        bench.vm.set_register(0, Register.RSP, top)
        bench.write(top, words)
        bench.vm.set_capability(0, Capability.MTRAP_EXIT, True)
        assert step(bench) == exits.Mtrap()
        assert bench.vm.get_register(0, Register.RIP) == handler
        assert bench.memory.read(top, len(words)) == words, "taken for an exception's frame"


def test_a_step_at_a_handler_while_another_vcpu_steps() -> None:
    """It must not execute the other one's trap instead of the guest's instruction."""
    requires("step")
    handler = b"\xb8\x01\0\0\0"  # mov eax, 1
    with Bench(b"\x90\x90\x90\xeb\xfb", cpus=2) as bench:
        bench.write(0x30000, handler + NOPS)
        gate = struct.pack("<HHHHQ", 0x0000, KERNEL_CODE, 0x8E00, 0x0003, 0)
        bench.write(IDT + 16 * x86.VECTOR_UD, gate)
        vm, ends = bench.vm, threading.Event()

        def step_for_ever() -> None:
            vm.activate_cpu(1)
            vm.set_capability(1, Capability.MTRAP_EXIT, True)
            while not ends.is_set():
                vm.run(1)
            vm.deactivate_cpu(1)

        other = threading.Thread(target=step_for_ever)
        other.start()
        try:
            bench.activate()
            vm.set_capability(0, Capability.MTRAP_EXIT, True)
            for _ in range(cycles(500)):
                vm.set_register(0, Register.RIP, 0x30000)
                assert step(bench) == exits.Mtrap()
                assert vm.get_register(0, Register.RIP) == 0x30000 + len(handler)
        finally:
            ends.set()
            other.join(30)


def test_a_handler_that_the_guest_has_mapped_elsewhere_is_found_there() -> None:
    """With the same CR3. Its old page is something else's by then, and is left alone."""
    handler, tables, first_page, second_page = 0x40_0000, 0x30000, 0x31000, 0x32000
    # ud2; mov [rdi], rax; invlpg [handler]; ud2
    code = b"\x0f\x0b" + b"\x48\x89\x07" + b"\x0f\x01\x3c\x25\x00\x00\x40\x00" + b"\x0f\x0b"
    with prepared(code, LabMode.LONG) as bench:
        bench.write(PAGE_TABLES + 0x2000 + 16, (tables | 3).to_bytes(8, "little"))
        bench.write(tables, (first_page | 3).to_bytes(8, "little"))
        for page in (first_page, second_page):
            bench.write(page, NOPS)
        gate = struct.pack("<HHHHQ", handler & 0xFFFF, KERNEL_CODE, 0x8E00, handler >> 16, 0)
        bench.write(IDT + 16 * x86.VECTOR_UD, gate)
        vm = bench.vm
        assert step(bench) == exits.Mtrap()
        assert vm.get_register(0, Register.RIP) == handler
        vm.set_register(0, Register.RDI, tables)
        vm.set_register(0, Register.RAX, second_page | 3)
        vm.set_register(0, Register.RIP, CODE + 2)
        seen: list[int] = []
        vm.memory.write(first_page, b"\xc3" * 8)
        for _ in range(3):
            assert step(bench) == exits.Mtrap()
            seen.append(vm.get_register(0, Register.RIP))
        assert seen == [CODE + 5, CODE + 13, handler]
        assert vm.memory.read(first_page, 8) == b"\xc3" * 8
        assert vm.memory.read(second_page, 8) == NOPS


def test_steps_into_the_gp_handler_while_another_vcpu_goes_through_its_guard() -> None:
    """The guard (of breakpoints in ring 3) and the trap of a step are on the same byte."""
    # mov eax, 0xfff8; 1: mov ds, eax; jmp 1b, and a handler of #GP that counts and skips the mov
    fault_forever = b"\xb8\xf8\xff\0\0" + b"\x8e\xd8" + b"\xeb\xfc"
    # inc [rdi]; add rsp, 8; add [rsp], 2; iretq
    handler = b"\x48\xff\x07" + b"\x48\x83\xc4\x08" + b"\x48\x83\x04\x24\x02" + b"\x48\xcf"
    gp_handler, faulting = 0x30000, 0x40000
    with Bench(fault_forever, cpus=2) as bench:
        bench.write(gp_handler, handler)
        gate = struct.pack("<HHHHQ", gp_handler & 0xFFFF, KERNEL_CODE, 0x8E00, gp_handler >> 16, 0)
        bench.write(IDT + 16 * x86.VECTOR_GP, gate)
        bench.write(faulting, b"\x8e\xd8")
        vm = bench.vm
        vm.hlt_traps.add(faulting + 0x1000)  # as if in ring 3
        vm.guard = Guard(gp_handler, handler[0])
        bench.write(gp_handler, b"\xf4")
        bench.start(1)
        bench.wait_runs(1)
        bench.activate()
        vm.set_register(0, Register.RAX, 0xFFF8)
        vm.set_capability(0, Capability.MTRAP_EXIT, True)
        for _ in range(cycles(1000)):
            vm.set_register(0, Register.RIP, faulting)
            vm.set_register(0, Register.RSP, STACK)
            assert step(bench) == exits.Mtrap()
            assert vm.get_register(0, Register.RIP) == gp_handler
        bench.wait_runs(1)
        bench.park(1)
        assert vm.memory.read(gp_handler, len(handler)) == b"\xf4" + handler[1:]


# --- steps in a range ---------------------------------------------------------------------------

DOWN = b"\xff\xc9\x75\xfc"  # here: dec ecx; jnz here


def in_a_range(code: bytes, length: int, rcx: int = 0) -> Bench:
    """Ready to step through the first `length` bytes of `code` without an exit for each."""
    bench = prepared(code, LabMode.LONG)
    regs = bench.cpu.get(kvm.kvm_regs)
    regs.rcx = rcx
    bench.cpu.set(regs)
    bench.vm.set_step_range(0, range(CODE, CODE + length))
    return bench


def test_steps_in_a_range_end_at_the_first_instruction_outside() -> None:
    with in_a_range(DOWN, len(DOWN), rcx=100) as bench:
        assert step(bench) == exits.Mtrap()
        assert bench.vm.get_register(0, Register.RIP) == CODE + len(DOWN)
        assert bench.vm.get_register(0, Register.RCX) == 0
        assert step(bench) == exits.Mtrap(), "outside, each step is an exit"
        assert bench.vm.get_register(0, Register.RIP) == CODE + len(DOWN) + 1


def test_a_range_that_is_not_left_can_be_interrupted() -> None:
    with in_a_range(b"\xeb\xfe", 2) as bench:
        stopper = threading.Timer(0.05, bench.vm.suspend_cpu, (0,))
        stopper.start()
        while not isinstance(bench.enter(), exits.Debug):
            assert bench.vm.get_register(0, Register.RIP) == CODE
        stopper.join()


def test_a_range_forgets_its_addresses_when_stepping_is_switched_on_again() -> None:
    with in_a_range(DOWN, len(DOWN), rcx=100) as bench:
        bench.vm.set_capability(0, Capability.MTRAP_EXIT, True)
        assert step(bench) == exits.Mtrap()
        assert bench.vm.get_register(0, Register.RIP) == CODE + 2


def test_code_that_changes_itself_in_a_range_is_stepped_as_it_is_then() -> None:
    # mov byte [rip + 0], 0x9c: the nop behind it becomes a pushf, which must not show TF
    code = b"\xc6\x05\x00\x00\x00\x00\x9c" + b"\x90"
    with in_a_range(code, len(code)) as bench:
        rsp = bench.vm.get_register(0, Register.RSP)
        assert step(bench) == exits.Mtrap()
        assert bench.vm.get_register(0, Register.RIP) == CODE + len(code)
        assert bench.vm.get_register(0, Register.RSP) == rsp - 8
        assert not bench.read_u64(rsp - 8) & x86.RFLAGS_TF


def test_io_in_a_range_is_an_exit_and_the_range_goes_on_behind_it() -> None:
    code = b"\x90\xe4\x10\xe6\x10\x90"  # nop; in al, 0x10; out 0x10, al; nop
    with in_a_range(code, len(code)) as bench:
        assert isinstance(bench.enter(), exits.InOut)
        bench.vm.answer(0, b"\x5a")
        while not isinstance(exit := bench.enter(), exits.InOut):
            assert exit == exits.Mtrap()
        assert exit.data == b"\x5a"
        while bench.vm.get_register(0, Register.RIP) != CODE + len(code):
            assert bench.enter() == exits.Mtrap()


def test_a_fault_in_a_range_is_a_step_to_its_handler() -> None:
    code = b"\x90\x0f\x0b"  # nop; ud2
    with in_a_range(code, len(code)) as bench:
        assert step(bench) == exits.Mtrap()
        assert bench.vm.get_register(0, Register.RIP) == HANDLERS + 16 * x86.VECTOR_UD
        assert not saved_flags(bench, x86.VECTOR_UD) & x86.RFLAGS_TF

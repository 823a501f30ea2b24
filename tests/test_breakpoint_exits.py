"""Breakpoint exits: with BPT_EXIT an int3 leaves the guest, without it the guest handles it.

What a host cannot do is taken from the host probe's findings, and what then happens is asserted:
the guest's own handler runs.
"""

from __future__ import annotations

import errno

import pytest

from pyvmm import exits
from pyvmm.cpustate import Register
from pyvmm.debuggedset import ALL
from pyvmm.hostprobe import host
from pyvmm.lab import CODE, DATA, HANDLERS, RAM, LabMode
from pyvmm.vcpurecord import Capability
from pyvmm.x86 import VECTOR_BP, VECTOR_UD
from tests.support import COUNT_FOREVER, NOP, PATIENCE, Bench, wait_until

pytestmark = pytest.mark.kvm

# With every prefix that changes nothing about int3, alone and piled up to 15 bytes.
INT3_FORMS = ["cc", "66cc", "67cc", "f2cc", "f3cc", "2ecc", "65cc", "6667f22ecc", "66" * 14 + "cc"]
INT3_FORMS_64 = ["48cc", "40cc", "6648cc", "4f4fcc"]  # REX


def intercepts(mode: LabMode) -> bool:
    """Whether the probe says that int3 leaves a guest in this mode."""
    return {
        LabMode.LONG: host().breakpoint,
        LabMode.USER: host().breakpoint_user,
        LabMode.PROTECTED: host().breakpoint,
        LabMode.REAL: host().breakpoint_real,
    }[mode]


def want_breakpoints(bench: Bench) -> None:
    """Switch BPT_EXIT on where the host can; where it cannot, that is what must be said."""
    if host().breakpoint:
        bench.vm.set_capability(0, Capability.BPT_EXIT, True)
        assert bench.vm.get_capability(0, Capability.BPT_EXIT)
        return
    with pytest.raises(OSError) as refusal:
        bench.vm.set_capability(0, Capability.BPT_EXIT, True)
    assert refusal.value.errno == errno.ENOTSUP
    assert not bench.vm.get_capability(0, Capability.BPT_EXIT)


def assert_handled_by_guest(bench: Bench, saved_rip: int) -> None:
    """The guest's own #BP handler runs, and finds this return address in its frame."""
    assert isinstance(bench.enter(), exits.Hlt)
    assert bench.delivered_vector() == VECTOR_BP
    assert bench.pushed_rip() == saved_rip


def forms(mode: LabMode) -> list[str]:
    return INT3_FORMS + (INT3_FORMS_64 if mode in (LabMode.LONG, LabMode.USER) else [])


EVERY_FORM = [(mode, form) for mode in LabMode for form in forms(mode)]


@pytest.mark.parametrize(("mode", "form"), EVERY_FORM)
def test_int3_leaves_the_guest_with_its_length_and_rip_at_it(mode: LabMode, form: str) -> None:
    code = bytes.fromhex(form)
    with Bench(code + NOP, mode) as bench:
        want_breakpoints(bench)
        start = bench.rip
        if not intercepts(mode):
            assert_handled_by_guest(bench, start + len(code))
            return
        for _ in range(3):  # it stays there
            assert bench.enter() == exits.Bpt(len(code))
            assert bench.vm.get_register(0, Register.RIP) == start
        bench.vm.set_capability(0, Capability.BPT_EXIT, False)
        assert_handled_by_guest(bench, start + len(code))


@pytest.mark.parametrize(("mode", "form"), EVERY_FORM)
def test_without_the_capability_the_guest_handles_its_own_int3(mode: LabMode, form: str) -> None:
    code = bytes.fromhex(form)
    with Bench(code + NOP, mode) as bench:
        assert_handled_by_guest(bench, bench.rip + len(code))


@pytest.mark.parametrize("wanted", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("mode", LabMode)
def test_int_3_of_two_bytes_is_no_breakpoint(mode: LabMode, wanted: bool) -> None:
    int_3 = b"\xcd\x03"
    with Bench(int_3 + NOP, mode) as bench:
        if wanted:
            want_breakpoints(bench)
        assert_handled_by_guest(bench, bench.rip + 2)


@pytest.mark.parametrize("mode", LabMode)
def test_guest_returns_from_its_own_int3_and_goes_on(mode: LabMode) -> None:
    """Its handler returns behind the int3, a hundred times."""
    loop = {
        LabMode.LONG: "cc48ffc381fb6400000075f4",  # 1: int3; inc rbx; cmp ebx, 100; jne 1b
        LabMode.USER: "cc48ffc381fb6400000075f4",
        LabMode.PROTECTED: "cc4381fb6400000075f6",
        LabMode.REAL: "cc4381fb640075f8",
    }[mode]
    ret = {LabMode.LONG: "48cf", LabMode.USER: "48cf"}.get(mode, "cf")
    end = "0f0b" if mode is LabMode.USER else "f4"  # ud2 where hlt is not allowed
    if mode is LabMode.PROTECTED and not host().iret32:
        ret = "83c40cff6424f4"  # add esp, 12; jmp [esp - 12]: the frame's EIP; CS is the same
    with Bench(bytes.fromhex(loop + end), mode) as bench:
        bench.write(HANDLERS + 16 * VECTOR_BP, bytes.fromhex(ret))
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.delivered_vector() == (VECTOR_UD if mode is LabMode.USER else None)
        assert bench.vm.get_register(0, Register.RBX) & 0xFFFF == 100


def test_int3_as_the_last_byte_of_memory() -> None:
    with Bench(NOP) as bench:
        want_breakpoints(bench)
        # Behind it lies MMIO, from which no instruction bytes can be read.
        bench.write(RAM - 1, b"\xcc")
        bench.vm.set_register(0, Register.RIP, RAM - 1)
        if host().breakpoint:
            assert bench.enter() == exits.Bpt(1)
            assert bench.rip == RAM - 1
        else:
            assert_handled_by_guest(bench, RAM)


def test_int3_in_a_code_segment_with_a_base() -> None:
    with Bench(NOP * 16 + b"\x66\xcc", LabMode.PROTECTED) as bench:
        want_breakpoints(bench)
        bench.vm.set_register(0, Register.CS_BASE, CODE)
        bench.vm.set_register(0, Register.RIP, 0)
        if host().breakpoint:
            assert bench.enter() == exits.Bpt(2)
            assert bench.rip == 16
            bench.vm.set_capability(0, Capability.BPT_EXIT, False)
        assert_handled_by_guest(bench, 18)


def test_int3_in_16_bit_protected_mode() -> None:
    with Bench(b"\x66\xcc", LabMode.PROTECTED) as bench:
        sregs = bench.cpu.get(type(bench.vm.cpu(0).sregs))
        sregs.cs.db = 0
        sregs.cs.base, sregs.cs.limit, sregs.cs.g = CODE, 0xFFFF, 0
        bench.cpu.set(sregs)
        bench.vm.set_register(0, Register.RIP, 0)
        want_breakpoints(bench)
        if host().breakpoint:
            assert bench.enter() == exits.Bpt(2)
            assert bench.rip == 0
            bench.vm.set_capability(0, Capability.BPT_EXIT, False)
        assert_handled_by_guest(bench, 2)


def test_int3_reached_by_falling_into_it_and_by_jumping_to_it() -> None:
    with Bench(NOP * 5 + b"\xcc" + NOP + b"\xeb\xfc") as bench:  # the jump goes to the int3
        want_breakpoints(bench)
        if not host().breakpoint:
            assert_handled_by_guest(bench, CODE + 6)
            return
        assert bench.enter() == exits.Bpt(1)
        assert bench.rip == CODE + 5
        bench.vm.set_register(0, Register.RIP, CODE + 6)  # step over it
        assert bench.enter() == exits.Bpt(1)
        assert bench.rip == CODE + 5


def test_guest_goes_on_where_the_original_byte_is_put_back() -> None:
    original = b"\x89\xc3"  # mov ebx, eax
    with Bench(original) as bench:
        bench.vm.set_register(0, Register.RAX, 0x1234)
        bench.write(CODE, b"\xcc")
        want_breakpoints(bench)
        if not host().breakpoint:
            assert_handled_by_guest(bench, CODE + 1)
            return
        assert bench.enter() == exits.Bpt(1)
        bench.write(CODE, original)
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.rip == CODE + 3
        assert bench.vm.get_register(0, Register.RBX) == 0x1234


def test_breakpoint_written_under_running_vcpus_stops_each_of_them() -> None:
    if not host().breakpoint:
        with Bench(NOP) as bench:
            want_breakpoints(bench)  # it is refused: a debugger writes no int3 then
        return
    with Bench(COUNT_FOREVER, cpus=3) as bench:
        vm = bench.vm
        hits: list[tuple[int, exits.Exit, int]] = []

        def on_exit_of(vcpu_id: int) -> None:
            def hit(exit: exits.Exit) -> None:
                rip = vm.get_register(vcpu_id, Register.RIP)
                vm.suspend_cpu(vcpu_id)  # first: who sees the hit waits until it is parked
                hits.append((vcpu_id, exit, rip))

            bench.start(vcpu_id, hit)

        for vcpu_id in range(3):
            on_exit_of(vcpu_id)
        for _ in range(5):
            vm.suspend_cpu(ALL)
            assert not vm.wait_parked(range(3), PATIENCE)
            for vcpu_id in range(3):
                vm.set_capability(vcpu_id, Capability.BPT_EXIT, True)
            bench.write(CODE, b"\xcc")
            vm.resume_cpu(ALL)
            wait_until(lambda: len(hits) == 3, "all three hit it")
            assert not vm.wait_parked(range(3), PATIENCE)
            assert sorted(hits) == [(n, exits.Bpt(1), CODE) for n in range(3)]
            bench.write(CODE, COUNT_FOREVER)
            vm.resume_cpu(ALL)
            for vcpu_id in range(3):
                bench.wait_runs(vcpu_id)
            hits.clear()


def test_breakpoints_of_one_vcpu_are_not_those_of_another() -> None:
    with Bench(b"\xcc", cpus=2) as bench:
        want_breakpoints(bench)
        assert not bench.vm.get_capability(1, Capability.BPT_EXIT)
        bench.vm.activate_cpu(1)
        assert isinstance(bench.vm.run(1), exits.Hlt)
        bench.vm.deactivate_cpu(1)


def test_int3_without_a_handler_is_the_end_of_the_guest() -> None:
    """A triple fault, also on a host that emulates ring 0 and gives up at the int3."""
    with Bench(b"\xcc") as bench:
        bench.vm.set_register(0, Register.IDT_LIMIT, 0)
        assert bench.enter() == exits.Shutdown()


def test_lookalikes_are_no_breakpoints() -> None:
    """CC as an operand, not as an opcode: mov eax, 0xcccccccc; mov [DATA], al."""
    code = b"\xb8" + b"\xcc" * 4 + b"\x88\x04\x25" + DATA.to_bytes(4, "little")
    with Bench(code) as bench:
        want_breakpoints(bench)
        assert isinstance(bench.enter(), exits.Hlt)
        assert bench.rip == CODE + len(code) + 1
        assert bench.memory.read(DATA, 1) == b"\xcc"

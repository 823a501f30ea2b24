"""Instructions that pyvmm executes itself: frames, stacks, gates, what is left to the host."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from pyvmm import emulate, x86
from pyvmm.kvm import kvm_regs, kvm_segment, kvm_sregs

CODE, STACK, KERNEL_STACK, IST_STACK = 0x10_0000, 0x8000, 0x9000, 0xA000
IDT, GDT, TSS, HANDLER = 0x1000, 0x2000, 0x3000, 0x4000

CODE64, DATA, CODE32, USER_CODE, USER_DATA, CONFORMING = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
NOT_PRESENT = 0x38

INTERRUPT_GATE, TRAP_GATE, TASK_GATE = 0xE, 0xF, 0x5
INTERRUPT_GATE16, TRAP_GATE16 = 0x6, 0x7

IF, TF, NT, RF = 1 << 9, 1 << 8, 1 << 14, 1 << 16


class Memory:
    """Sparse memory: reads zeros, unless `unmapped` covers it; remembers every write."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.unmapped = range(0)
        self.writes: list[tuple[int, bytes]] = []

    def read(self, gva: int, length: int) -> bytes:
        self._check(gva, length)
        return bytes(self.bytes.get(gva + n, 0) for n in range(length))

    def write(self, gva: int, data: bytes) -> None:
        self._check(gva, len(data))
        self.writes.append((gva, data))
        self.put(gva, data)

    def put(self, gva: int, data: bytes) -> None:
        self.bytes.update({gva + n: byte for n, byte in enumerate(data)})

    def _check(self, gva: int, length: int) -> None:
        if any(gva + n in self.unmapped for n in range(length)):
            raise LookupError(f"nothing is mapped at {gva:#x}")


class Fixture:
    """A vCPU in some mode, with an IDT, a GDT and a TSS in its memory."""

    def __init__(self, mode: x86.CpuMode, cpl: int = 0) -> None:
        self.memory = Memory()
        self.sregs = kvm_sregs()
        self.regs = kvm_regs(rip=CODE, rsp=STACK, rflags=2 | IF)
        self.msrs: dict[int, int] = {}
        self.nmis_unmasked: list[bool] = []
        self.shadows: list[int] = []
        self.long = mode in (x86.CpuMode.LONG, x86.CpuMode.COMPAT32, x86.CpuMode.COMPAT16)
        if mode is x86.CpuMode.REAL:
            self.regs.rip = 0x100
            self.sregs.cs = kvm_segment(selector=0x7C0, base=0x7C00)
            self.sregs.ss = kvm_segment(selector=0x200, base=0x2000)
            self.sregs.idt.limit = 0x3FF
        else:
            self._protected(mode, cpl)
        self.cpu = emulate.Cpu(
            self.regs,
            self.sregs,
            self.memory.read,
            self.memory.write,
            self.msrs.__getitem__,
            lambda: self.nmis_unmasked.append(True),
            self.shadows.append,
        )

    def _protected(self, mode: x86.CpuMode, cpl: int) -> None:
        self.sregs.cr0 = 1
        bits = {
            x86.CpuMode.LONG: 64,
            x86.CpuMode.COMPAT16: 16,
            x86.CpuMode.PROTECTED16: 16,
        }.get(mode, 32)
        if self.long:
            self.sregs.efer = x86.EFER_LMA | x86.EFER_LME | x86.EFER_SCE
        code = USER_CODE | 3 if cpl else CODE64 if self.long else CODE32
        self.sregs.cs = x86.flat_segment(code, code=True, bits=bits, dpl=cpl)
        self.sregs.ss = x86.flat_segment(USER_DATA | 3 if cpl else DATA, code=False, dpl=cpl)
        self.sregs.gdt.base, self.sregs.gdt.limit = GDT, 8 * 8 - 1
        self.sregs.idt.base, self.sregs.idt.limit = IDT, 256 * (16 if self.long else 8) - 1
        self.sregs.tr = kvm_segment(base=TSS, limit=0x67, type=x86.TYPE_TSS32_BUSY, present=1)
        kernel_code = CODE64 if self.long else CODE32
        conforming = x86.flat_segment(CONFORMING, code=True, bits=64 if self.long else 32)
        conforming.type |= 4
        absent = x86.flat_segment(NOT_PRESENT, code=True, bits=64 if self.long else 32)
        absent.present = 0
        for segment in (
            x86.flat_segment(kernel_code, code=True, bits=64 if self.long else 32),
            x86.flat_segment(DATA, code=False),
            x86.flat_segment(USER_CODE, code=True, dpl=3, bits=64 if self.long else 32),
            x86.flat_segment(USER_DATA, code=False, dpl=3),
            conforming,
            absent,
        ):
            self.memory.put(GDT + segment.selector, struct.pack("<Q", x86.descriptor(segment)))

    def gate(
        self,
        vector: int,
        kind: int = INTERRUPT_GATE,
        *,
        selector: int | None = None,
        dpl: int = 3,
        present: int = 1,
        ist: int = 0,
        offset: int = HANDLER,
    ) -> None:
        """Write an IDT entry."""
        if selector is None:
            selector = CODE64 if self.long else CODE32
        access = kind | dpl << 5 | present << 7
        entry = struct.pack("<HHBBH", offset & 0xFFFF, selector, ist, access, offset >> 16 & 0xFFFF)
        if self.long:
            entry += struct.pack("<II", offset >> 32, 0)
        self.memory.put(IDT + vector * len(entry), entry)

    def run(self, code: bytes) -> bool:
        """Execute `code` at RIP, as the hypervisor layer does."""
        return emulate.complete(self.cpu, code)

    def frame(self, count: int, size: int) -> tuple[int, ...]:
        """The `count` values on top of the stack, the last pushed first."""
        base = 0 if self.cpu.mode is x86.CpuMode.LONG else self.cpu.sregs.ss.base
        data = self.memory.read(base + self.cpu.regs.rsp, count * size)
        return struct.unpack(f"<{count}{ {2: 'H', 4: 'I', 8: 'Q'}[size] }", data)

    def snapshot(self) -> tuple[bytes, bytes, dict[int, int]]:
        return bytes(self.cpu.regs), bytes(self.cpu.sregs), dict(self.memory.bytes)


def left_alone(fixture: Fixture, code: bytes) -> bool:
    """Whether `code` was not executed and nothing at all has changed."""
    before = fixture.snapshot()
    return not fixture.run(code) and fixture.snapshot() == before and not fixture.memory.writes


LONG, PROTECTED, REAL = x86.CpuMode.LONG, x86.CpuMode.PROTECTED32, x86.CpuMode.REAL


# --- int3 and int n in long mode -----------------------------------------------------------------


def test_int3_in_long_mode_pushes_five_quadwords_on_an_aligned_stack() -> None:
    f = Fixture(LONG)
    f.regs.rsp = STACK + 8
    f.gate(3, offset=0xFFFF_8000_1234_5678)
    assert f.run(b"\xcc")
    assert f.frame(5, 8) == (CODE + 1, CODE64, 2 | IF, STACK + 8, DATA)
    assert f.cpu.regs.rsp == STACK - 40  # aligned to 16 first
    assert f.cpu.regs.rip == 0xFFFF_8000_1234_5678
    assert f.cpu.sregs.cs.selector == CODE64 and f.cpu.sregs.cs.l
    assert f.cpu.sregs.ss.selector == DATA  # the same privilege: SS stays


def test_a_prefix_counts_into_the_return_address() -> None:
    f = Fixture(LONG)
    f.gate(3)
    assert f.run(b"\x66\xf2\xcc")
    assert f.frame(1, 8) == (CODE + 3,)


@pytest.mark.parametrize("vector", [0, 3, 0x21, 0x80, 0xFF])
def test_int_n_uses_its_own_vector_and_is_two_bytes_long(vector: int) -> None:
    f = Fixture(LONG)
    f.gate(vector, offset=HANDLER + vector)
    assert f.run(bytes((0xCD, vector, 0x90)))
    assert f.cpu.regs.rip == HANDLER + vector
    assert f.frame(1, 8) == (CODE + 2,)


@pytest.mark.parametrize(("kind", "enabled"), [(INTERRUPT_GATE, 0), (TRAP_GATE, IF)])
def test_an_interrupt_gate_disables_interrupts_and_a_trap_gate_does_not(
    kind: int, enabled: int
) -> None:
    f = Fixture(LONG)
    f.gate(3, kind)
    assert f.run(b"\xcc")
    assert f.cpu.regs.rflags & IF == enabled


def test_the_handler_starts_without_trap_nested_task_and_resume_flags() -> None:
    f = Fixture(LONG)
    f.regs.rflags |= TF | NT | RF
    f.gate(3, TRAP_GATE)
    assert f.run(b"\xcc")
    assert f.cpu.regs.rflags & (TF | NT | RF) == 0
    assert f.frame(3, 8)[2] & (TF | NT) == TF | NT  # what was there is on the stack


def test_from_cpl_3_the_stack_is_the_one_of_the_tss() -> None:
    f = Fixture(LONG, cpl=3)
    f.memory.put(TSS + 4, struct.pack("<Q", KERNEL_STACK))
    f.gate(3)
    assert f.run(b"\xcc")
    assert f.frame(5, 8) == (CODE + 1, USER_CODE | 3, 2 | IF, STACK, USER_DATA | 3)
    assert f.cpu.regs.rsp == KERNEL_STACK - 40
    assert (f.cpu.sregs.cs.selector, f.cpu.sregs.ss.selector) == (CODE64, 0)
    assert f.cpu.cpl == 0
    assert f.cpu.sregs.cs.dpl == 0


@pytest.mark.parametrize("ist", range(1, 8))
@pytest.mark.parametrize("cpl", [0, 3])
def test_a_gate_with_an_ist_number_switches_stacks_at_every_privilege(cpl: int, ist: int) -> None:
    f = Fixture(LONG, cpl=cpl)
    f.memory.put(TSS + 0x24 + 8 * (ist - 1), struct.pack("<Q", IST_STACK + 0x100 * ist + 8))
    f.gate(3, ist=ist)
    assert f.run(b"\xcc")
    assert f.cpu.regs.rsp == IST_STACK + 0x100 * ist - 40
    assert f.frame(5, 8)[3] == STACK


def test_a_conforming_handler_keeps_the_privilege_level_and_the_stack() -> None:
    f = Fixture(LONG, cpl=3)
    f.gate(3, selector=CONFORMING)
    assert f.run(b"\xcc")
    assert f.cpu.cpl == 3 and f.cpu.sregs.cs.selector == CONFORMING | 3
    assert f.cpu.sregs.ss.selector == USER_DATA | 3
    assert f.cpu.regs.rsp == STACK - 40


def test_from_compatibility_mode_the_frame_is_still_the_one_of_long_mode() -> None:
    f = Fixture(x86.CpuMode.COMPAT32, cpl=3)
    f.memory.put(TSS + 4, struct.pack("<Q", KERNEL_STACK))
    f.gate(0x80)
    assert f.run(b"\xcd\x80")
    assert f.cpu.mode is LONG
    assert f.frame(5, 8) == (CODE + 2, USER_CODE | 3, 2 | IF, STACK, USER_DATA | 3)


def test_a_stack_at_the_bottom_wraps_around_64_bits() -> None:
    f = Fixture(LONG)
    f.regs.rsp = 0
    f.gate(3)
    assert f.run(b"\xcc")
    assert f.cpu.regs.rsp == (1 << 64) - 40


# --- in protected mode ---------------------------------------------------------------------------


def test_int3_in_protected_mode_pushes_three_doublewords() -> None:
    f = Fixture(PROTECTED)
    f.gate(3)
    assert f.run(b"\xcc")
    assert f.frame(3, 4) == (CODE + 1, CODE32, 2 | IF)
    assert (f.cpu.regs.rip, f.cpu.regs.rsp) == (HANDLER, STACK - 12)
    assert f.cpu.regs.rflags & IF == 0


def test_a_16_bit_gate_pushes_words_and_has_a_16_bit_offset() -> None:
    f = Fixture(PROTECTED)
    f.gate(3, TRAP_GATE16, offset=0xDEAD_4000)
    assert f.run(b"\xcc")
    assert f.frame(3, 2) == (CODE + 1 & 0xFFFF, CODE32, 2 | IF)
    assert (f.cpu.regs.rip, f.cpu.regs.rsp) == (0x4000, STACK - 6)
    assert f.cpu.regs.rflags & IF == IF


def test_from_cpl_3_in_protected_mode_the_old_stack_is_saved_too() -> None:
    f = Fixture(PROTECTED, cpl=3)
    f.memory.put(TSS + 4, struct.pack("<IH", KERNEL_STACK, DATA))
    f.gate(0x80)
    assert f.run(b"\xcd\x80")
    assert f.frame(5, 4) == (CODE + 2, USER_CODE | 3, 2 | IF, STACK, USER_DATA | 3)
    assert f.cpu.regs.rsp == KERNEL_STACK - 20
    assert (f.cpu.sregs.cs.selector, f.cpu.sregs.ss.selector) == (CODE32, DATA)
    assert f.cpu.cpl == 0


def test_a_stack_segment_with_a_base_is_honoured() -> None:
    f = Fixture(PROTECTED)
    f.sregs.ss.base = 0x5_0000
    f.gate(3)
    assert f.run(b"\xcc")
    assert f.cpu.regs.rsp == STACK - 12
    assert f.memory.writes[0][0] == 0x5_0000 + STACK - 12


def test_on_a_16_bit_stack_only_sp_moves() -> None:
    f = Fixture(PROTECTED)
    f.sregs.ss.db = 0
    f.regs.rsp = 0xABCD_0004
    f.gate(3)
    assert f.run(b"\xcc")
    assert f.cpu.regs.rsp == 0xABCD_FFF8


# --- in real mode --------------------------------------------------------------------------------


def test_int_n_in_real_mode_goes_through_the_vector_table() -> None:
    f = Fixture(REAL)
    f.regs.rsp = 0x1000
    f.memory.put(4 * 0x21, struct.pack("<HH", 0x1234, 0xF000))
    assert f.run(b"\xcd\x21")
    assert f.frame(3, 2) == (0x102, 0x7C0, 2 | IF)
    assert (f.cpu.regs.rip, f.cpu.regs.rsp) == (0x1234, 0x1000 - 6)
    assert (f.cpu.sregs.cs.selector, f.cpu.sregs.cs.base) == (0xF000, 0xF_0000)
    assert f.cpu.regs.rflags & (IF | TF) == 0
    assert f.memory.writes[0][0] == 0x2000 + 0x1000 - 6


def test_the_vector_table_is_where_the_idt_register_says() -> None:
    f = Fixture(REAL)
    f.sregs.idt.base = 0x6000
    f.memory.put(0x6000 + 12, struct.pack("<HH", 0x10, 0x20))
    assert f.run(b"\xcc")
    assert (f.cpu.regs.rip, f.cpu.sregs.cs.selector) == (0x10, 0x20)


def test_a_real_mode_stack_wraps_at_64_kib() -> None:
    f = Fixture(REAL)
    f.regs.rsp = 0xFFFF_0002
    assert f.run(b"\xcc")
    assert f.cpu.regs.rsp == 0xFFFF_FFFC


# --- what is left to the host --------------------------------------------------------------------


Change = Callable[[Fixture], object]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda f: f.gate(3, present=0), id="gate not present"),
        pytest.param(lambda f: f.gate(3, TASK_GATE), id="task gate"),
        pytest.param(lambda f: f.gate(3, 0xC), id="call gate"),
        pytest.param(lambda f: f.gate(3, selector=0), id="null selector"),
        pytest.param(lambda f: f.gate(3, selector=DATA), id="data segment"),
        pytest.param(lambda f: f.gate(3, selector=NOT_PRESENT), id="segment not present"),
        pytest.param(lambda f: f.gate(3, selector=CODE64 | 4), id="in the LDT"),
        pytest.param(lambda f: f.gate(3, selector=0x40), id="beyond the GDT"),
        pytest.param(lambda f: f.gate(3, selector=USER_CODE | 3), id="less privileged handler"),
        pytest.param(lambda f: setattr(f.sregs.idt, "limit", 3 * 8 + 6), id="beyond the IDT"),
        pytest.param(lambda f: setattr(f.sregs.idt, "limit", 0), id="no IDT"),
        pytest.param(lambda f: setattr(f.memory, "unmapped", range(IDT, IDT + 64)), id="IDT"),
        pytest.param(lambda f: setattr(f.memory, "unmapped", range(GDT, GDT + 64)), id="GDT"),
        pytest.param(
            lambda f: setattr(f.memory, "unmapped", range(STACK - 64, STACK)), id="stack not mapped"
        ),
    ],
)
@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_a_fault_on_the_way_leaves_everything_untouched(mode: x86.CpuMode, change: Change) -> None:
    f = Fixture(mode)
    f.gate(3)
    change(f)
    assert left_alone(f, b"\xcc")


@pytest.mark.parametrize("mode", [LONG, PROTECTED])
@pytest.mark.parametrize(("dpl", "executed"), [(0, False), (1, False), (2, False), (3, True)])
def test_a_user_program_may_use_gates_of_dpl_3_only(
    mode: x86.CpuMode, dpl: int, executed: bool
) -> None:
    f = Fixture(mode, cpl=3)
    f.memory.put(TSS + 4, struct.pack("<IH", KERNEL_STACK, 0 if mode is LONG else DATA))
    f.gate(0x80, dpl=dpl)
    assert emulate.complete(f.cpu, b"\xcd\x80") if executed else left_alone(f, b"\xcd\x80")


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (LONG, lambda f: setattr(f.memory, "unmapped", range(TSS, TSS + 0x68))),
        (
            LONG,
            lambda f: setattr(f.memory, "unmapped", range(KERNEL_STACK - 64, KERNEL_STACK)),
        ),
        (PROTECTED, lambda f: setattr(f.memory, "unmapped", range(TSS, TSS + 0x68))),
        (PROTECTED, lambda f: setattr(f.sregs.tr, "type", 3)),  # a 16-bit TSS
        (PROTECTED, lambda f: f.memory.put(TSS + 8, struct.pack("<H", USER_DATA | 3))),
        (PROTECTED, lambda f: f.memory.put(TSS + 8, struct.pack("<H", 0))),
        (
            PROTECTED,
            lambda f: setattr(f.memory, "unmapped", range(KERNEL_STACK - 64, KERNEL_STACK)),
        ),
    ],
)
def test_a_fault_while_switching_stacks_leaves_everything_untouched(
    mode: x86.CpuMode, change: Change
) -> None:
    f = Fixture(mode, cpl=3)
    f.memory.put(TSS + 4, struct.pack("<IH", KERNEL_STACK, 0 if mode is LONG else DATA))
    f.gate(3)
    change(f)
    assert left_alone(f, b"\xcc")


def test_a_handler_that_is_not_64_bit_code_is_refused_in_long_mode() -> None:
    f = Fixture(LONG)
    code32 = x86.flat_segment(CODE32, code=True)
    f.memory.put(GDT + CODE32, struct.pack("<Q", x86.descriptor(code32)))
    f.gate(3, selector=CODE32)
    assert left_alone(f, b"\xcc")


@pytest.mark.parametrize("kind", [INTERRUPT_GATE16, TRAP_GATE16])
def test_16_bit_gates_do_not_exist_in_long_mode(kind: int) -> None:
    f = Fixture(LONG)
    f.gate(3, kind)
    assert left_alone(f, b"\xcc")


@pytest.mark.parametrize("code", [b"\xcc", b"\xcd\x80", b"\x9c"])
def test_virtual_8086_mode_is_left_to_the_host(code: bytes) -> None:
    f = Fixture(PROTECTED, cpl=3)
    f.regs.rflags |= x86.RFLAGS_VM
    f.gate(3)
    f.gate(0x80)
    assert left_alone(f, code)


def test_a_short_real_mode_vector_table_is_left_to_the_host() -> None:
    f = Fixture(REAL)
    f.sregs.idt.limit = 3 * 4 + 2
    assert left_alone(f, b"\xcc")
    f.cpu.sregs.idt.limit = 3 * 4 + 3
    assert f.run(b"\xcc")


@pytest.mark.parametrize(
    "code", [b"", b"\x90", b"\xcd", b"\xf0\xcc", b"\x66", b"\x0f", b"\x0f\x06"]
)
def test_other_bytes_are_not_ours(code: bytes) -> None:
    f = Fixture(LONG)
    f.gate(3)
    assert left_alone(f, code)


# --- pushf ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "code", "size"),
    [
        (LONG, b"\x9c", 8),
        (LONG, b"\x66\x9c", 2),
        (LONG, b"\x48\x9c", 8),
        (LONG, b"\x66\x48\x9c", 8),  # REX.W is stronger than 66
        (LONG, b"\x48\x66\x9c", 2),  # a REX that is not right before the opcode is ignored
        (PROTECTED, b"\x9c", 4),
        (PROTECTED, b"\x66\x9c", 2),
        (x86.CpuMode.PROTECTED16, b"\x9c", 2),
        (x86.CpuMode.PROTECTED16, b"\x66\x9c", 4),
        (x86.CpuMode.COMPAT32, b"\x9c", 4),
        (x86.CpuMode.COMPAT16, b"\x9c", 2),
        (REAL, b"\x9c", 2),
        (REAL, b"\x66\x9c", 4),
    ],
)
def test_pushf_pushes_as_much_as_the_mode_and_the_prefixes_say(
    mode: x86.CpuMode, code: bytes, size: int
) -> None:
    f = Fixture(mode)
    rip = f.regs.rip
    f.regs.rflags = 2 | IF | NT | 1
    assert f.run(code)
    assert f.cpu.regs.rsp == STACK - size
    assert f.frame(1, size) == (2 | IF | NT | 1,)
    assert f.cpu.regs.rip == rip + len(code)
    assert f.cpu.regs.rflags == 2 | IF | NT | 1


def test_pushf_hides_the_resume_flag() -> None:
    f = Fixture(LONG)
    f.regs.rflags |= RF
    assert f.run(b"\x9c")
    assert f.frame(1, 8) == (2 | IF,)


def test_pushf_keeps_a_trap_flag_of_the_guest_s_own() -> None:
    f = Fixture(LONG)
    f.regs.rflags |= TF
    assert f.run(b"\x9c")
    assert f.frame(1, 8)[0] & TF


def test_pushf_onto_an_unmapped_stack_is_left_to_the_host() -> None:
    f = Fixture(LONG)
    f.memory.unmapped = range(STACK - 8, STACK)
    assert left_alone(f, b"\x9c")


# --- syscall -------------------------------------------------------------------------------------


def syscall_fixture() -> Fixture:
    f = Fixture(LONG, cpl=3)
    f.msrs |= {
        x86.MSR_STAR: 0x0008 << 32 | 0x0020 << 48,
        x86.MSR_LSTAR: 0xFFFF_8000_0000_1000,
        x86.MSR_SYSCALL_MASK: IF | TF,
    }
    return f


def test_syscall_enters_the_kernel_as_the_manual_says() -> None:
    f = syscall_fixture()
    f.regs.rflags |= RF | 1
    assert f.run(b"\x0f\x05")
    regs, sregs = f.cpu.regs, f.cpu.sregs
    assert (regs.rcx, regs.rip) == (CODE + 2, 0xFFFF_8000_0000_1000)
    assert regs.r11 == 2 | IF | 1
    assert regs.rflags == 2 | 1
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.dpl) == (0x08, 1, 0)
    assert (sregs.ss.selector, sregs.ss.dpl) == (0x10, 0)
    assert f.cpu.cpl == 0
    assert regs.rsp == STACK and not f.memory.writes  # no stack is touched


def test_syscall_takes_the_requested_privilege_out_of_the_selector() -> None:
    f = syscall_fixture()
    f.msrs[x86.MSR_STAR] = 0x000B << 32
    assert f.run(b"\x0f\x05")
    assert (f.cpu.sregs.cs.selector, f.cpu.sregs.ss.selector) == (0x08, 0x10)


def test_syscall_is_left_to_the_host_where_it_does_not_exist() -> None:
    f = syscall_fixture()
    f.sregs.efer &= ~x86.EFER_SCE
    assert left_alone(f, b"\x0f\x05")
    for mode in (PROTECTED, x86.CpuMode.COMPAT32, REAL):
        assert left_alone(Fixture(mode), b"\x0f\x05")


def test_an_msr_that_cannot_be_read_leaves_everything_untouched() -> None:
    f = syscall_fixture()
    del f.msrs[x86.MSR_SYSCALL_MASK]
    assert left_alone(f, b"\x0f\x05")


# --- iret ----------------------------------------------------------------------------------------

IOPL = 3 << 12


def put_frame(f: Fixture, size: int, *values: int) -> None:
    """Put `values` on top of the stack, as if the last had been pushed first."""
    base = 0 if f.cpu.mode is LONG else f.sregs.ss.base
    f.memory.put(base + f.regs.rsp, b"".join(v.to_bytes(size, "little") for v in values))


@pytest.mark.parametrize("mode", [LONG, PROTECTED, REAL])
def test_iret_undoes_an_int3(mode: x86.CpuMode) -> None:
    f = Fixture(mode)
    f.regs.rflags |= 1
    if mode is REAL:
        f.memory.put(4 * 3, struct.pack("<HH", 0x1234, 0xF000))
    else:
        f.gate(3)
    rip, before = f.regs.rip, (f.regs.rsp, f.regs.rflags, f.sregs.cs.selector, f.sregs.cs.base)
    assert f.run(b"\xcc")
    assert f.run(b"\x48\xcf" if mode is LONG else b"\xcf")
    regs, cs = f.cpu.regs, f.cpu.sregs.cs
    assert (regs.rsp, regs.rflags, cs.selector, cs.base) == before
    assert regs.rip == rip + 1
    assert f.nmis_unmasked == [True]


@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_iret_to_a_user_program_loads_its_stack_and_takes_the_kernel_s_segments_away(
    mode: x86.CpuMode,
) -> None:
    f = Fixture(mode)
    f.sregs.ds = x86.flat_segment(DATA, code=False)
    f.sregs.es = x86.flat_segment(USER_DATA | 3, code=False, dpl=3)
    put_frame(f, 8 if mode is LONG else 4, 0x1234, USER_CODE | 3, 2 | IF, 0x7000, USER_DATA | 3)
    assert f.run(b"\x48\xcf" if mode is LONG else b"\xcf")
    assert (f.cpu.regs.rip, f.cpu.regs.rsp, f.cpu.regs.rflags) == (0x1234, 0x7000, 2 | IF)
    assert f.cpu.cpl == 3
    assert f.cpu.sregs.cs.selector == USER_CODE | 3
    assert f.cpu.sregs.ds.unusable and f.cpu.sregs.ds.selector == 0
    assert f.cpu.sregs.es.selector == USER_DATA | 3


def test_a_user_program_s_iret_changes_neither_if_nor_iopl() -> None:
    f = Fixture(LONG, cpl=3)
    put_frame(f, 8, 0x1234, USER_CODE | 3, 2 | IOPL | 1, 0x7000, USER_DATA | 3)
    before = f.snapshot()
    if f.run(b"\x48\xcf"):  # leaving it to the host is fine as well
        assert f.cpu.regs.rflags == 2 | IF | 1
    else:
        assert f.snapshot() == before


def test_iretq_does_not_load_the_virtual_8086_flag() -> None:
    f = Fixture(LONG)
    put_frame(f, 8, 0x1234, CODE64, 2 | x86.RFLAGS_VM, 0x7000, DATA)
    before = f.snapshot()
    if f.run(b"\x48\xcf"):
        assert f.cpu.regs.rflags == 2
    else:
        assert f.snapshot() == before


def test_iret_works_where_the_stack_ends_behind_the_frame() -> None:
    f = Fixture(PROTECTED)
    f.memory.unmapped = range(STACK + 12, STACK + 0x1000)
    put_frame(f, 4, 0x1234, CODE32, 2)
    assert f.run(b"\xcf")
    assert (f.cpu.regs.rip, f.cpu.regs.rsp) == (0x1234, STACK + 12)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param((0x1234, 0, 2, 0x7000, DATA), id="null CS"),
        pytest.param((0x1234, DATA, 2, 0x7000, DATA), id="CS is data"),
        pytest.param((0x1234, NOT_PRESENT, 2, 0x7000, DATA), id="CS not present"),
        pytest.param((0x1234, USER_CODE, 2, 0x7000, DATA), id="CS of another privilege"),
        pytest.param((0x1234, USER_CODE | 3, 2, 0x7000, DATA), id="SS of another privilege"),
        pytest.param((0x1234, USER_CODE | 3, 2, 0x7000, USER_CODE | 3), id="SS is code"),
        pytest.param((0x1234, USER_CODE | 3, 2, 0x7000, 0), id="null SS at CPL 3"),
    ],
)
@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_an_iret_that_faults_leaves_everything_untouched(
    mode: x86.CpuMode, frame: tuple[int, ...]
) -> None:
    f = Fixture(mode)
    put_frame(f, 8 if mode is LONG else 4, *frame)
    assert left_alone(f, b"\x48\xcf" if mode is LONG else b"\xcf")
    assert f.nmis_unmasked == []


# --- sti and mov ss ------------------------------------------------------------------------------


def test_sti_holds_interrupts_off_for_one_more_instruction() -> None:
    f = Fixture(LONG)
    f.regs.rflags = 2
    assert f.run(b"\xfb")
    assert (f.cpu.regs.rip, f.cpu.regs.rflags) == (CODE + 1, 2 | IF)
    assert f.shadows == [emulate.SHADOW_STI]
    assert f.run(b"\xfb")  # already on: no shadow
    assert f.shadows == [emulate.SHADOW_STI]


def test_sti_of_a_user_program_is_left_to_the_host() -> None:
    f = Fixture(LONG, cpl=3)
    f.regs.rflags = 2
    assert left_alone(f, b"\xfb") and f.shadows == []


def test_mov_ss_in_real_mode_moves_the_base() -> None:
    f = Fixture(REAL)
    f.regs.rax = 0xFFFF_1234
    assert f.run(b"\x8e\xd0")
    assert (f.cpu.sregs.ss.selector, f.cpu.sregs.ss.base) == (0x1234, 0x12340)
    assert f.cpu.regs.rip == 0x102
    assert f.shadows == [emulate.SHADOW_MOV_SS]


@pytest.mark.parametrize(
    ("code", "register"), [(b"\x8e\xd3", "rbx"), (b"\x41\x8e\xd3", "r11"), (b"\x48\x8e\xd7", "rdi")]
)
def test_mov_ss_takes_the_register_that_the_instruction_names(code: bytes, register: str) -> None:
    f = Fixture(LONG)
    setattr(f.regs, register, DATA)
    assert f.run(code)
    assert f.cpu.sregs.ss.selector == DATA
    assert f.cpu.regs.rip == CODE + len(code)


def test_pop_ss_takes_a_word_with_the_old_stack_segment() -> None:
    f = Fixture(REAL)
    f.regs.rsp = 0xFFFE
    f.memory.put((f.cpu.sregs.ss.base + 0xFFFE), b"\x34\x12")
    assert f.run(b"\x17")
    assert (f.cpu.sregs.ss.selector, f.cpu.sregs.ss.base) == (0x1234, 0x12340)
    assert (f.cpu.regs.rip, f.cpu.regs.rsp) == (0x101, 0)
    assert f.shadows == [emulate.SHADOW_MOV_SS]


def test_there_is_no_pop_ss_in_64_bit_mode() -> None:
    assert left_alone(Fixture(LONG), b"\x17")


@pytest.mark.parametrize(
    ("code", "selector"),
    [
        (b"\x8e\xd8", DATA),  # ds
        (b"\x8e\x10", DATA),  # from memory
        (b"\x8e\xd0", CODE64),
        (b"\x8e\xd0", USER_DATA | 3),
        (b"\x8e\xd0", 0x40),
        (b"\x8e", DATA),
    ],
)
def test_a_mov_ss_that_faults_and_other_moves_leave_everything_untouched(
    code: bytes, selector: int
) -> None:
    f = Fixture(LONG)
    f.regs.rax = selector
    assert left_alone(f, code) and f.shadows == []


# --- fetch ---------------------------------------------------------------------------------------


def test_fetch_reads_up_to_the_end_of_what_is_mapped() -> None:
    f = Fixture(LONG)
    f.regs.rip = 0x5FFD
    f.memory.put(0x5FFD, b"abc")
    assert f.cpu.fetch(15)[:3] == b"abc"
    f.memory.unmapped = range(0x6000, 0x7000)
    assert f.cpu.fetch(15) == b"abc"
    f.memory.unmapped = range(0x5000, 0x7000)
    assert f.cpu.fetch(15) == b""


def test_fetch_adds_the_base_of_the_code_segment_outside_of_64_bit_mode() -> None:
    f = Fixture(REAL)
    f.memory.put(0x7C00 + 0x100, b"\xcd\x10")
    assert f.cpu.fetch(2) == b"\xcd\x10"

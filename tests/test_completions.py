"""Instructions that a host's KVM lacks: operands, XSAVE areas, and what is left alone."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from pyvmm import Machine, StopReason, completions, kvm, operands, x86
from pyvmm.kvm import kvm_segment
from pyvmm.lab import Lab, LabMode
from pyvmm.x86 import CpuMode
from tests.test_emulate import CODE, LONG, PROTECTED, REAL, Fixture

AREA, FS_BASE, GS_BASE = 0x20_0000, 0x7000_0000_0000, 0xFFFF_8000_0000_0000
CR4_FSGSBASE, CR4_OSXSAVE = 1 << 16, 1 << 18
CF, ZF, OF, AC = 1 << 0, 1 << 6, 1 << 11, 1 << 18

X87, SSE, AVX = 1, 2, 4
INITIAL_MXCSR = 0x1F80


class Extended:
    """The extended state of a vCPU: an XSAVE area."""

    def __init__(self, xstate_bv: int = 0, xcr0: int = 7) -> None:
        rng = random.Random(xstate_bv)
        self.area = bytearray(4096)
        struct.pack_into("<H", self.area, 0, 0x37F)
        struct.pack_into("<II", self.area, 24, INITIAL_MXCSR, 0xFFFF)
        for bit, start, end in ((X87, 32, 160), (SSE, 160, 416), (AVX, 576, 832)):
            if xstate_bv & bit:
                self.area[start:end] = rng.randbytes(end - start)
        struct.pack_into("<Q", self.area, 512, xstate_bv)
        self._xcr0 = xcr0
        self.written = False

    def read(self) -> bytearray:
        return bytearray(self.area)

    def write(self, area: bytearray) -> None:
        self.area, self.written = bytearray(area), True

    def xcr0(self) -> int:
        return self._xcr0


class Guest(Fixture):
    """A vCPU at CPL 0 (or another) with extended state."""

    def __init__(
        self, mode: CpuMode = LONG, cpl: int = 0, extended: Extended | None = None, **regs: int
    ) -> None:
        super().__init__(mode, cpl)
        self.extended = extended or Extended()
        self.sregs.cr4 = CR4_FSGSBASE | CR4_OSXSAVE
        self.sregs.fs, self.sregs.gs = kvm_segment(base=FS_BASE), kvm_segment(base=GS_BASE)
        for name, value in regs.items():
            setattr(self.regs, name, value)

    def run(self, code: bytes) -> bool:
        return completions.complete(self.cpu, self.extended, code)

    def completes(self, code: str) -> None:
        """Execute `code`, hexadecimal, with other bytes behind it."""
        length = len(bytes.fromhex(code))
        assert self.run(bytes.fromhex(code) + b"\xcc" * (15 - length))
        assert self.cpu.regs.rip == CODE + length

    def leaves(self, code: str) -> None:
        """`code` is not executed, and nothing has changed."""
        before, area = self.snapshot(), bytes(self.extended.area)
        assert not self.run(bytes.fromhex(code))
        assert self.snapshot() == before
        assert not self.memory.writes
        assert bytes(self.extended.area) == area and not self.extended.written


# --- where operands are --------------------------------------------------------------------------

REGS = {"rax": 0x1000, "rbx": 0x2000, "rbp": 0x3000, "rsp": 0x4000, "r12": 0x5000, "r13": 0x6000}


@pytest.mark.parametrize(
    ("code", "gva"),
    [  # instruction prefixes, then 0F AE and its ModRM byte; as GNU as assembles them
        ("0fae20", 0x1000),  # [rax]
        ("0fae6380", 0x1F80),  # [rbx - 0x80]
        ("0faea378563412", 0x1234_7678),  # [rbx + 0x12345678]
        ("0fae6500", 0x3000),  # [rbp]
        ("0fae2424", 0x4000),  # [rsp]
        ("410fae2424", 0x5000),  # [r12]
        ("410fae6500", 0x6000),  # [r13]
        ("0fae24d8", 0x1000 + 8 * 0x2000),  # [rax + rbx * 8]
        ("420fae64a500", 0x3000 + 4 * 0x5000),  # [rbp + r12 * 4]
        ("0fae242500100080", 0xFFFF_FFFF_8000_1000),  # [0xffffffff80001000]
        ("0fae245d10000000", 2 * 0x2000 + 0x10),  # [rbx * 2 + 0x10]
        ("0fae2510000000", CODE + 7 + 0x10),  # [rip + 0x10]
        ("0fae25f0ffffff", CODE + 7 - 0x10),  # [rip - 0x10]
        ("64480fae20", FS_BASE + 0x1000),  # fs:[rax]
        ("65480fae242510000000", GS_BASE + 0x10),  # gs:[0x10]
        ("65480fae2510000000", GS_BASE + CODE + 9 + 0x10),  # gs:[rip + 0x10]
    ],
)
def test_where_an_operand_in_memory_is(code: str, gva: int) -> None:
    prefixes, rest = x86.split_prefixes(bytes.fromhex(code), LONG)
    found = operands.decode(Guest(**REGS).cpu, prefixes, rest, 2)
    assert found.gva == gva
    assert (found.rm, found.length) == (None, len(bytes.fromhex(code)))
    assert found.reg & 7 == 4


@pytest.mark.parametrize(
    ("code", "reg", "rm", "size"),
    [
        ("f30fb8c3", 0, 3, 4),  # popcnt eax, ebx
        ("f3480fb8c3", 0, 3, 8),
        ("66f30fb8c3", 0, 3, 2),
        ("f34d0fb8fc", 15, 12, 8),  # popcnt r15, r12
        ("f3410fb8d9", 3, 9, 4),
        ("66f3480fb8c3", 0, 3, 8),  # REX.W goes before 66
    ],
)
def test_operands_in_registers(code: str, reg: int, rm: int, size: int) -> None:
    prefixes, rest = x86.split_prefixes(bytes.fromhex(code), LONG)
    found = operands.decode(Guest().cpu, prefixes, rest, 2)
    assert found == operands.Operands(reg, rm, None, size, len(bytes.fromhex(code)))


@pytest.mark.parametrize("code", ["0fae", "0fae24", "0fae63", "0faea3785634", "0fae2510"])
def test_an_instruction_that_is_cut_short_is_left_alone(code: str) -> None:
    Guest().leaves("48" + code)


# --- single instructions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "rbx", "result"),
    [
        ("f30fb8c3", 0xFFFF_FFFF_0000_0101, 2),
        ("f3480fb8c3", 0xFFFF_FFFF_0000_0101, 34),
        ("66f30fb8c3", 0xFFFF_FFFF_FFFF_0101, 0xDEAD_BEEF_CAFE_0002),  # the rest is kept
        ("f30fb8c3", 0xFFFF_FFFF_0000_0000, 0),
    ],
)
def test_popcnt_counts_ones(code: str, rbx: int, result: int) -> None:
    guest = Guest(rax=0xDEAD_BEEF_CAFE_F00D, rbx=rbx, rflags=2 | CF | OF)
    guest.completes(code)
    assert guest.cpu.regs.rax == result
    assert guest.cpu.regs.rflags == (2 if result else 2 | ZF)


def test_popcnt_of_memory() -> None:
    guest = Guest(rdi=AREA)
    guest.memory.put(AREA, b"\x03\x00\x00\x80\xff")
    guest.completes("f30fb807")
    assert guest.cpu.regs.rax == 3
    guest = Guest(rdi=AREA)
    guest.memory.unmapped = range(AREA + 3, AREA + 4)
    guest.leaves("f30fb807")


def test_stac_and_clac() -> None:
    guest = Guest(rflags=2 | CF)
    guest.completes("0f01cb")
    assert guest.cpu.regs.rflags == 2 | CF | AC
    guest = Guest(rflags=2 | CF | AC)
    guest.completes("0f01ca")
    assert guest.cpu.regs.rflags == 2 | CF
    Guest(cpl=3).leaves("0f01ca")
    Guest(PROTECTED).leaves("0f01ca")


def test_rdssp_reads_nothing_where_there_are_no_shadow_stacks() -> None:
    guest = Guest(rsi=1)
    guest.completes("f3480f1ece")  # rdsspq rsi
    assert guest.cpu.regs.rsi == 1
    Guest().completes("f30f1efa")  # endbr64
    guest = Guest()
    guest.sregs.cr4 |= 1 << 23  # CET
    guest.leaves("f3480f1ece")


def test_fwait_waits_for_nothing_unless_an_exception_is_pending() -> None:
    Guest().completes("9b")
    pending = Extended()
    struct.pack_into("<HH", pending.area, 0, 0x37E, 0x0001)  # invalid operation, not masked
    Guest(extended=pending).leaves("9b")
    struct.pack_into("<HH", pending.area, 0, 0x37F, 0x0001)
    Guest(extended=pending).completes("9b")
    guest = Guest()
    guest.sregs.cr0 |= 1 << 3  # TS: #NM
    guest.leaves("9b")


@pytest.mark.parametrize(
    "code",
    [
        "",
        "90",
        "0fb8c3",  # popcnt without its prefix
        "0faef0",  # mfence
        "0fae38",  # clflush [rax]
        "480fae20",  # xsave64 [rax]
        "0fae28",  # xrstor, not xrstor64
        "480faee8",  # lfence
        "f30fae20",  # ptwrite [rax]
        "67480fae20",  # with a 32-bit address
        "0fc708",  # cmpxchg8b [rax]
        "480fc730",  # vmptrld
        "f00f01ca",  # lock clac
        "660f01ca",
        "0f01cc",
    ],
)
def test_other_instructions_are_left_alone(code: str) -> None:
    for mode in (LONG, PROTECTED, REAL):
        Guest(mode).leaves(code)


# --- XSAVE areas ---------------------------------------------------------------------------------

XRSTOR = "480fae2f"  # of [rdi]


def put_area(guest: Guest, xstate_bv: int, xcomp_bv: int = 0, mxcsr: int = INITIAL_MXCSR) -> bytes:
    """Put an area into memory whose components are all ones, twos and threes."""
    area = bytearray(832)
    area[0:24], area[32:160] = b"\x01" * 24, b"\x01" * 128
    area[160:416], area[576:832] = b"\x02" * 256, b"\x03" * 256
    struct.pack_into("<I", area, 24, mxcsr)
    struct.pack_into("<QQ", area, 512, xstate_bv, xcomp_bv)
    guest.memory.put(AREA, bytes(area))
    return bytes(area)


@pytest.mark.parametrize("compacted", [0, 1 << 63 | 7])
@pytest.mark.parametrize("stored", range(8))
@pytest.mark.parametrize("wanted", range(8))
def test_xrstor_loads_or_initialises(compacted: int, stored: int, wanted: int) -> None:
    guest = Guest(extended=Extended(7), rdi=AREA, rax=wanted, rdx=0)
    before, area = bytes(guest.extended.area), put_area(guest, stored, compacted)
    guest.completes(XRSTOR)
    after = guest.extended.area
    for bit, start, end in ((X87, 32, 160), (SSE, 160, 416), (AVX, 576, 832)):
        source = before if not wanted & bit else area if stored & bit else bytes(832)
        assert after[start:end] == source[start:end]
    if wanted & X87:
        assert after[0:2] == (b"\x01\x01" if stored & X87 else b"\x7f\x03")
    assert after[28:32] == before[28:32]  # MXCSR's mask is the processor's
    assert struct.unpack_from("<Q", after, 512) == (7 & ~wanted | stored & wanted,)
    assert not guest.memory.writes


@pytest.mark.parametrize(
    ("compacted", "wanted", "stored", "mxcsr"),
    [
        (0, SSE, SSE, 0x9FC0),
        (0, SSE, 0, 0x9FC0),  # in the standard form whatever XSTATE_BV says
        (0, AVX, 0, 0x9FC0),
        (0, X87, 7, 0xAAAA),
        (1 << 63 | 7, SSE, SSE, 0x9FC0),
        (1 << 63 | 7, SSE, 0, INITIAL_MXCSR),
        (1 << 63 | 7, AVX, 7, 0xAAAA),
    ],
)
def test_xrstor_and_mxcsr(compacted: int, wanted: int, stored: int, mxcsr: int) -> None:
    guest = Guest(rdi=AREA, rax=wanted, rdx=0)
    struct.pack_into("<I", guest.extended.area, 24, 0xAAAA)
    put_area(guest, stored, compacted, mxcsr=0x9FC0)
    guest.completes(XRSTOR)
    assert struct.unpack_from("<I", guest.extended.area, 24) == (mxcsr,)
    if mxcsr == 0x9FC0:  # or KVM_SET_XSAVE would leave it alone
        assert guest.extended.area[512] & SSE


@pytest.mark.parametrize(
    ("xstate_bv", "xcomp_bv", "reserved", "mxcsr"),
    [
        (8, 0, 0, INITIAL_MXCSR),
        (1 << 63, 0, 0, INITIAL_MXCSR),
        (1, 1, 0, INITIAL_MXCSR),
        (3, 1 << 63 | 1, 0, INITIAL_MXCSR),
        (1, 1 << 63 | 9, 0, INITIAL_MXCSR),
        (1, 0, 1, INITIAL_MXCSR),
        (2, 0, 0, 0x1_0000),
    ],
)
def test_an_area_that_xrstor_refuses_is_left_alone(xstate_bv, xcomp_bv, reserved, mxcsr) -> None:
    guest = Guest(rdi=AREA, rax=7, rdx=0)
    put_area(guest, xstate_bv, xcomp_bv, mxcsr)
    guest.memory.put(AREA + 528, struct.pack("<Q", reserved))
    guest.leaves(XRSTOR)


def test_an_xrstor_that_faults_is_left_alone() -> None:
    code = XRSTOR
    Guest(rdi=AREA + 32, rax=7).leaves(code)  # not aligned
    Guest(PROTECTED, rdi=AREA, rax=7).leaves(code)
    Guest(rdi=AREA, rax=7, extended=Extended(xcr0=0xE7)).leaves(code)  # AVX-512
    guest = Guest(rdi=AREA, rax=7)
    guest.sregs.cr4 = 0
    guest.leaves(code)
    guest = Guest(rdi=AREA, rax=7)
    guest.memory.unmapped = range(AREA + 800, AREA + 4096)
    guest.leaves(code)
    guest = Guest(rdi=AREA, rax=3)  # without AVX the area ends before
    guest.memory.unmapped = range(AREA + 576, AREA + 4096)
    guest.completes(code)


# --- on this host, by KVM or by pyvmm ------------------------------------------------------------

ENABLE_AVX = bytes.fromhex(
    "0f20e0 480d00000400 0f22e0"  # mov rax, cr4; or rax, 0x40000; mov cr4, rax
    "31c9 31d2 b807000000 0f01d1"  # xor ecx, ecx; xor edx, edx; mov eax, 7; xsetbv
)
RESTORE = bytes.fromhex("bf00002000 480fae2f f4")  # mov edi, 0x200000; xrstor64 [rdi]; hlt


@pytest.mark.kvm
def test_a_kernel_waits_for_the_x87_and_counts_ones(tmp_path: Path) -> None:
    path = tmp_path / "kernel.bin"
    path.write_bytes(bytes.fromhex("b807000000 9b f3480fb8d8 f4"))  # popcnt rbx, rax
    with Machine(path) as machine:
        assert machine.run(timeout=30).reason is StopReason.HALTED
        assert machine.registers()["rbx"] == 3


def keeps_xcr0() -> bool:
    """Whether KVM knows what the guest has done; QEMU's SVM does not tell it of xsetbv."""
    with Lab(LabMode.LONG, ENABLE_AVX) as lab:
        return lab.run() == kvm.KVM_EXIT_HLT and lab.cpu.get(kvm.kvm_xcrs).xcrs[0].value == 7


@pytest.mark.kvm
def test_a_kernel_has_in_its_registers_what_it_has_restored(tmp_path: Path) -> None:
    if not keeps_xcr0():
        pytest.skip("host probe: guests have no AVX here, or lose XCR0 at the next exit")
    path = tmp_path / "kernel.bin"
    path.write_bytes(ENABLE_AVX + RESTORE)
    rng = random.Random(7)
    area = bytearray(832)
    struct.pack_into("<HHB", area, 0, 0x37F, 0, 0xFF)  # FCW, FSW, FTW: all registers in use
    struct.pack_into("<I", area, 24, 0x3F80)
    for n in range(8):
        area[32 + 16 * n : 42 + 16 * n] = b"\0" * 7 + rng.randbytes(1) + b"\xff\x3f"
        area[39 + 16 * n] |= 0x80  # a normal number
    area[160:416], area[576:832] = rng.randbytes(256), rng.randbytes(256)
    struct.pack_into("<Q", area, 512, 7)
    with Machine(path) as machine:
        machine.write_memory(0x20_0000, bytes(area), physical=True)
        assert machine.run(timeout=30).reason is StopReason.HALTED
        saved = bytes(machine.vm.state(0).get(kvm.kvm_xsave))
    assert saved[0:5] == area[0:5]
    assert saved[24:28] == area[24:28]
    assert saved[32:416] == area[32:416]
    assert saved[512:520] == area[512:520]
    assert saved[576:832] == area[576:]

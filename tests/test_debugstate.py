"""The register file against the kernel's own structures: each register is where the table says."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm import debugstate, kvm, x86
from pyvmm.lab import Lab, LabMode
from pyvmm.registers import FILE_SIZE, TABLE, Architecture, Bank, Value, layout
from tests.support import HALT

pytestmark = pytest.mark.kvm

EVERYTHING = layout(Architecture.X86_64, True).banks
SELECTORS = {"cs": 0x10, "ss": 0x18, "ds": 0x20, "es": 0x28, "fs": 0x30, "gs": 0x38}
ROWS = {row.name: row for row in TABLE}
# What any vCPU takes over in any state: no selectors, and none of the bits that switch modes.
FREE = {"fs_base", "gs_base", "cr2", "cr8"}
FREE |= {row.name for row in TABLE if row.bank not in (Bank.SYSTEM, Bank.FPU)}
FREE |= {row.name for row in TABLE if row.bank == Bank.FPU} - {"ftag"}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(LabMode.LONG, HALT) as lab:
        yield lab


def random_state(lab: Lab) -> dict[str, Value]:
    """Give the vCPU other values in all that can be changed freely; returns what it has then."""
    chance = random.Random(11)
    values: dict[str, Value] = {}
    regs = lab.cpu.get(kvm.kvm_regs)
    for name, _ in kvm.kvm_regs._fields_[:17]:  # not rflags
        setattr(regs, name, chance.getrandbits(47))
        values[name] = getattr(regs, name)
    values["eflags"] = regs.rflags
    lab.cpu.set(regs)
    sregs = lab.cpu.get(kvm.kvm_sregs)
    for name, selector in SELECTORS.items():
        getattr(sregs, name).selector = selector
    sregs.fs.base, sregs.gs.base, sregs.cr2, sregs.cr8 = 0x1111_0000, 0x2222_0000, 0x3333, 5
    lab.cpu.set(sregs)
    values |= SELECTORS | {"fs_base": 0x1111_0000, "gs_base": 0x2222_0000}
    values |= {name: getattr(sregs, name) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")}
    lab.cpu.set_msrs({x86.MSR_KERNEL_GS_BASE: 0x4444_0000})
    values["k_gs_base"] = 0x4444_0000
    area = bytearray(lab.cpu.get(kvm.kvm_xsave))
    fields = {"fctrl": 0x37F, "fstat": 0x3800, "ftag": 0xFF, "fop": 0x123}  # TOP is 7
    fields |= {"fioff": 0x5555, "fiseg": 0x66, "fooff": 0x7777, "foseg": 0x88, "mxcsr": 0x1FA0}
    struct.pack_into("<HHBxHIH2xIH2xI", area, 0, *fields.values())
    values |= fields | {"ftag": 0}  # all registers hold normal numbers
    for n in range(8):
        values[f"st{n}"] = chance.randbytes(7) + b"\x80" + struct.pack("<H", 0x3FFF + n)
    for n in range(16):
        values[f"xmm{n}"], values[f"ymm{n}h"] = chance.randbytes(16), chance.randbytes(16)
    for pattern, count, start in ("st{}", 8, 32), ("xmm{}", 16, 160), ("ymm{}h", 16, 576):
        for n in range(count):
            data = values[pattern.format(n)]
            assert isinstance(data, bytes)
            area[start + 16 * n : start + 16 * n + len(data)] = data
    in_use = 7 if debugstate.has_avx(lab.cpu) else 3
    struct.pack_into("<Q", area, 512, in_use)
    lab.cpu.set(kvm.kvm_xsave.from_buffer(area))
    return values


def value_of(name: str, file: bytes) -> Value:
    row = ROWS[name]
    data = row.read(file)
    return data if row.bits > 64 else int.from_bytes(data, "little")


def readable(lab: Lab) -> list[str]:
    return [n for n, row in ROWS.items() if row.bank != Bank.AVX or debugstate.has_avx(lab.cpu)]


def test_each_register_is_read_from_its_own_field(lab: Lab) -> None:
    values = random_state(lab)
    file = debugstate.read(lab.cpu, EVERYTHING)
    assert len(file) == FILE_SIZE
    for name in readable(lab):
        assert value_of(name, file) == values[name], name
    assert int.from_bytes(file[-8:], "little") == lab.cpu.get(kvm.kvm_sregs).cs.base


def test_what_is_not_asked_for_does_not_move_the_rest(lab: Lab) -> None:
    values = random_state(lab)
    for bank in (Bank.GENERAL, Bank.SYSTEM, Bank.MSR, Bank.FPU):
        file = debugstate.read(lab.cpu, bank)
        names = [row.name for row in TABLE if row.bank == bank]
        assert names
        for name in names:
            assert value_of(name, file) == values[name], name
    assert len(debugstate.read(lab.cpu, Bank.SYSTEM)) == FILE_SIZE


def test_writing_a_register_changes_it_and_no_other(lab: Lab) -> None:
    random_state(lab)
    for name in FREE.intersection(readable(lab)):
        row = ROWS[name]
        before = debugstate.read(lab.cpu, EVERYTHING)
        old = row.read(before)
        new = bytes([old[0] ^ 2]) + old[1:]  # bit 1, which no register has to have
        if row.name == "eflags":
            new = bytes([old[0] ^ 1]) + old[1:]  # carry
        debugstate.write(lab.cpu, row.decode(new, before))
        after = debugstate.read(lab.cpu, EVERYTHING)
        assert after == before[: row.at] + new + before[row.at + row.size :], row.name


def test_a_refused_write_changes_nothing(lab: Lab) -> None:
    values = random_state(lab)
    before = debugstate.read(lab.cpu, EVERYTHING)
    xmm0 = values["xmm0"]
    assert isinstance(xmm0, bytes)
    with pytest.raises(OSError):
        # CR0.PG without CR0.PE, behind what is written first.
        debugstate.write(lab.cpu, {"xmm0": xmm0[::-1], "rax": 1, "fs_base": 2, "cr0": 1 << 31})
    assert debugstate.read(lab.cpu, EVERYTHING) == before


class KeptState:
    """Instead of a vCPU: it keeps what is set. Not every host lets EFLAGS.VM be set."""

    def __init__(self, cr0: int, rflags: int) -> None:
        self.state = {
            kvm.kvm_regs: kvm.kvm_regs(rflags=rflags),
            kvm.kvm_sregs: kvm.kvm_sregs(cr0=cr0),
        }

    def get(self, kind: type[Any]) -> Any:
        return kind.from_buffer_copy(self.state[kind])

    def set(self, state: Any) -> None:
        self.state[type(state)] = state


@pytest.mark.parametrize(
    ("cr0", "rflags", "base"),
    [
        (x86.CR0_ET, x86.RFLAGS_FIXED, 0x12340),
        (x86.CR0_ET | x86.CR0_PE, x86.RFLAGS_FIXED | x86.RFLAGS_VM, 0x12340),
        (x86.CR0_ET | x86.CR0_PE, x86.RFLAGS_FIXED, 0),
    ],
    ids=["real mode", "virtual-8086 mode", "protected mode"],
)
def test_a_selector_brings_its_base_where_there_are_no_descriptors(
    cr0: int, rflags: int, base: int
) -> None:
    vcpu = KeptState(cr0, rflags)
    debugstate.write(vcpu, {"ds": 0x1234})  # type: ignore[arg-type]
    ds = vcpu.get(kvm.kvm_sregs).ds
    assert (ds.selector, ds.base) == (0x1234, base)

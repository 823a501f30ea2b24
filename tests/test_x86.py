"""The processor's numbers: modes, segments, descriptors, prefixes, int3."""

from __future__ import annotations

import pytest

from pyvmm import x86
from pyvmm.kvm import kvm_segment, kvm_sregs
from pyvmm.x86 import CpuMode, linear_address, split_prefixes


@pytest.mark.parametrize(
    ("cr0", "efer", "cs_l", "cs_db", "rflags", "mode"),
    [
        (0, 0, 0, 0, 0, CpuMode.REAL),
        (0, 0, 0, 1, 0, CpuMode.REAL),  # "unreal": CS is still 16 bits in KVM's eyes and ours
        (1, 0, 0, 0, 0, CpuMode.PROTECTED16),
        (1, 0, 0, 1, 0, CpuMode.PROTECTED32),
        (1, 0, 1, 1, 0, CpuMode.PROTECTED32),  # L means nothing before long mode is active
        (1, 0, 0, 1, 1 << 17, CpuMode.V8086),
        (1, x86.EFER_LME, 1, 0, 0, CpuMode.PROTECTED16),
        (1, x86.EFER_LMA, 1, 0, 0, CpuMode.LONG),
        (1, x86.EFER_LMA, 0, 1, 0, CpuMode.COMPAT32),
        (1, x86.EFER_LMA, 0, 0, 0, CpuMode.COMPAT16),
    ],
)
def test_the_mode_follows_from_cr0_efer_rflags_and_cs(
    cr0: int, efer: int, cs_l: int, cs_db: int, rflags: int, mode: CpuMode
) -> None:
    sregs = kvm_sregs(cr0=cr0, efer=efer)
    sregs.cs.l, sregs.cs.db = cs_l, cs_db
    assert x86.cpu_mode(sregs, rflags) is mode


@pytest.mark.parametrize(
    ("base", "offset", "mode", "gva"),
    [
        (0x7C00, 0x10, CpuMode.REAL, 0x7C10),
        (0xFFFF0, 0xFFFF, CpuMode.REAL, 0x10FFEF),
        (0xFFFF_FF00, 0x200, CpuMode.PROTECTED32, 0x100),
        (0x1000, 0x10, CpuMode.LONG, 0x10),  # no base in 64-bit mode
        (0, -1, CpuMode.LONG, (1 << 64) - 1),
        (0, 0xFFFF_8000_0000_0000, CpuMode.LONG, 0xFFFF_8000_0000_0000),
    ],
)
def test_linear_addresses_wrap_as_wide_as_the_mode(
    base: int, offset: int, mode: CpuMode, gva: int
) -> None:
    assert linear_address(base, offset, mode) == gva


@pytest.mark.parametrize(
    ("segment", "value"),
    [
        (x86.flat_segment(8, code=True, bits=64), 0x00AF_9B00_0000_FFFF),
        (x86.flat_segment(16, code=False), 0x00CF_9300_0000_FFFF),
        (x86.flat_segment(24, code=True), 0x00CF_9B00_0000_FFFF),
        (x86.flat_segment(8, code=True, bits=64, dpl=3), 0x00AF_FB00_0000_FFFF),
        (x86.flat_segment(8, code=True, bits=16), 0x0000_9B00_0000_FFFF),
        (
            kvm_segment(base=0x1234_5678, limit=0x67, type=0x9, present=1),  # a TSS
            0x1200_8934_5678_0067,
        ),
    ],
)
def test_descriptors_are_what_every_operating_system_puts_in_its_gdt(
    segment: kvm_segment, value: int
) -> None:
    assert x86.descriptor(segment) == value


@pytest.mark.parametrize(
    ("code", "mode", "prefixes"),
    [
        (b"\x90", CpuMode.LONG, b""),
        (b"\x66\x90", CpuMode.LONG, b"\x66"),
        (b"\x48\x90", CpuMode.LONG, b"\x48"),
        (b"\x48\x90", CpuMode.PROTECTED32, b""),  # there it is `dec eax`
        (b"\xf3\x2e\x65\x67\x66\x4f\x0f\x05", CpuMode.LONG, b"\xf3\x2e\x65\x67\x66\x4f"),
        (b"\xf0\x90", CpuMode.LONG, b""),
        (b"", CpuMode.LONG, b""),
        (b"\x66" * 20, CpuMode.LONG, b"\x66" * 15),
    ],
)
def test_prefixes_are_split_off(code: bytes, mode: CpuMode, prefixes: bytes) -> None:
    assert split_prefixes(code, mode) == (prefixes, code[len(prefixes) :])


@pytest.mark.parametrize(
    ("code", "mode", "length"),
    [
        (b"\xcc", CpuMode.LONG, 1),
        (b"\xcc\x90", CpuMode.REAL, 1),
        (b"\x66\xcc", CpuMode.LONG, 2),
        (b"\x48\xcc", CpuMode.LONG, 2),
        (b"\x48\xcc", CpuMode.PROTECTED32, None),
        (b"\xf2\x66\x41\xcc", CpuMode.LONG, 4),
        (b"\xcd\x03", CpuMode.LONG, None),
        (b"\xf1", CpuMode.LONG, None),
        (b"\xf0\xcc", CpuMode.LONG, None),  # LOCK makes it #UD
        (b"\x90\xcc", CpuMode.LONG, None),
        (b"\x66" * 14 + b"\xcc", CpuMode.LONG, 15),
        (b"\x66" * 15 + b"\xcc", CpuMode.LONG, None),  # too long to be an instruction
        (b"\x66", CpuMode.LONG, None),
        (b"", CpuMode.LONG, None),
    ],
)
def test_the_length_of_an_int3(code: bytes, mode: CpuMode, length: int | None) -> None:
    assert x86.int3_length(code, mode) == length


def test_the_vectors_with_an_error_code_are_those_of_the_manual() -> None:
    assert sorted(x86.VECTORS_WITH_ERROR_CODE) == [8, 10, 11, 12, 13, 14, 17, 21]

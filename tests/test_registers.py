"""The register table, and what is made from it: packets and the target description."""

from __future__ import annotations

import random
import struct
from binascii import unhexlify
from xml.etree import ElementTree

import pytest

from pyvmm.registers import (
    AVX,
    FILE_SIZE,
    TABLE,
    Architecture,
    Bank,
    Layout,
    Register,
    Value,
    abridge_tag_word,
    architecture_for,
    expand_tag_word,
    layout,
)
from pyvmm.targetxml import target_description
from tests.fake_target import register_file

I8086, I386, X86_64 = Architecture.I8086, Architecture.I386, Architecture.X86_64
LAYOUTS = [layout(architecture, avx) for architecture in Architecture for avx in (False, True)]
# The types that gdb knows without being told (Target Descriptions, "Predefined Target Types").
PREDEFINED = {"int", "int32", "int64", "uint128", "data_ptr", "code_ptr", "i387_ext"}


def some_values(seed: int = 0) -> dict[str, Value]:
    """Values for every register of the table, all different, as the target gives them."""
    chance = random.Random(seed)
    values: dict[str, Value] = {
        row.name: chance.getrandbits(row.bits) if row.bits <= 64 else chance.randbytes(row.size)
        for row in TABLE
    }
    return values | {"code_base": 0xF0000, "rip": 0xFFFF0}


def words(text: str) -> list[str]:
    return text.split()


def names(architecture: Architecture, avx: bool = False) -> list[str]:
    return [row.name for row in layout(architecture, avx).registers]


def test_64_bit_registers_have_the_numbers_that_qemu_gives_them() -> None:
    expected = words(
        "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags cs ss ds es fs gs"
        " fs_base gs_base k_gs_base cr0 cr2 cr3 cr4 cr8 efer st0 st1 st2 st3 st4 st5 st6 st7"
        " fctrl fstat ftag fiseg fioff foseg fooff fop xmm0 xmm1 xmm2 xmm3 xmm4 xmm5 xmm6 xmm7 xmm8"
        " xmm9 xmm10 xmm11 xmm12 xmm13 xmm14 xmm15 mxcsr"
    )
    assert names(X86_64) == expected
    assert names(X86_64, avx=True) == expected + [f"ymm{n}h" for n in range(16)]


def test_32_bit_registers_have_the_numbers_that_qemu_gives_them() -> None:
    expected = words(
        "eax ecx edx ebx esp ebp esi edi eip eflags cs ss ds es fs gs fs_base gs_base k_gs_base"
        " cr0 cr2 cr3 cr4 cr8 efer st0 st1 st2 st3 st4 st5 st6 st7 fctrl fstat ftag fiseg fioff"
        " foseg fooff fop xmm0 xmm1 xmm2 xmm3 xmm4 xmm5 xmm6 xmm7 mxcsr"
    )
    assert names(I386) == expected
    assert names(I386, avx=True) == expected + [f"ymm{n}h" for n in range(8)]
    assert names(I8086) == [*expected, "ip"]


@pytest.mark.parametrize("registers", LAYOUTS)
def test_description_and_packet_agree_on_every_register(registers: Layout) -> None:
    tree = ElementTree.fromstring(target_description(registers))
    described = tree.findall("feature/reg")
    assert [reg.get("name") for reg in described] == [row.name for row in registers.registers]
    assert [int(reg.get("regnum", "")) for reg in described] == list(range(len(described)))
    assert sum(int(reg.get("bitsize", "")) for reg in described) == registers.size * 8
    assert tree.findtext("architecture") == registers.architecture.value
    features = [feature.get("name") for feature in tree.findall("feature")]
    assert len(features) == len(set(features)), "gdb looks at the first of a name only"
    assert ("org.gnu.gdb.i386.avx" in features) == bool(registers.banks & Bank.AVX)


@pytest.mark.parametrize("registers", LAYOUTS)
def test_description_defines_each_type_before_its_use(registers: Layout) -> None:
    for feature in ElementTree.fromstring(target_description(registers)).findall("feature"):
        known = set(PREDEFINED) | {"ieee_single", "ieee_double", "int8", "int16"}
        for element in feature:
            if element.tag != "union":
                assert element.get("type") is None or element.get("type") in known
            for field in element:
                assert field.get("type") is None or field.get("type") in known
            known.add(element.get("id", ""))


@pytest.mark.parametrize("registers", LAYOUTS)
def test_flag_types_have_the_width_of_their_register(registers: Layout) -> None:
    tree = ElementTree.fromstring(target_description(registers))
    size_of = {flags.get("id"): int(flags.get("size", "")) for flags in tree.iter("flags")}
    for row in registers.registers:
        if row.gdb_type in size_of:
            assert size_of[row.gdb_type] == row.size
    for flags in tree.iter("flags"):
        for field in flags:
            low, high = int(field.get("start", "")), int(field.get("end", ""))
            assert 0 <= low <= high < 8 * size_of[flags.get("id")]


@pytest.mark.parametrize("registers", LAYOUTS)
def test_all_registers_at_once_are_the_single_ones_in_a_row(registers: Layout) -> None:
    file = register_file(some_values())
    assert registers.encode(file) == b"".join(row.encode(file) for row in registers.registers)
    assert len(registers.encode(file)) == 2 * registers.size


def test_a_register_file_holds_each_register_of_the_table() -> None:
    values = some_values()
    file = register_file(values)
    assert len(file) == FILE_SIZE
    for row in TABLE:
        value = values[row.name]
        data = value if isinstance(value, bytes) else value.to_bytes(row.size, "little")
        assert row.read(file) == data


def test_64_bit_values_are_little_endian_at_the_offsets_of_qemu() -> None:
    values = some_values()
    data = unhexlify(layout(X86_64, False).encode(register_file(values)))
    assert struct.unpack_from("<Q", data, 16 * 8)[0] == values["rip"]
    assert struct.unpack_from("<I", data, 17 * 8)[0] == values["eflags"]
    assert struct.unpack_from("<I", data, 17 * 8 + 4)[0] == values["cs"]
    assert data[-4 - 16 : -4] == values["xmm15"]
    assert struct.unpack_from("<I", data, len(data) - 4)[0] == values["mxcsr"]


@pytest.mark.parametrize("registers", LAYOUTS)
def test_writing_back_what_was_read_writes_nothing(registers: Layout) -> None:
    file = register_file(some_values())
    assert registers.decode(unhexlify(registers.encode(file)), file) == {}


@pytest.mark.parametrize("registers", LAYOUTS)
def test_writing_all_registers_writes_the_one_that_changed(registers: Layout) -> None:
    values, other = some_values(1), register_file(some_values(2))
    file = register_file(values)
    data = unhexlify(registers.encode(file))
    offset = 0
    for row in registers.registers:
        changed = unhexlify(row.encode(other))
        updates = registers.decode(data[:offset] + changed + data[offset + row.size :], file)
        if changed != data[offset : offset + row.size]:
            assert list(updates) == [row.source]
            assert row.encode(register_file(values | updates)) == row.encode(other)
        offset += row.size


def test_registers_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="607 bytes of registers instead of 608"):
        layout(X86_64, False).decode(bytes(607), bytes(FILE_SIZE))


def test_a_32_bit_view_shows_the_lower_half_and_clears_the_upper() -> None:
    file = register_file(some_values() | {"rax": 0x1122334455667788})
    row = layout(I386, False).registers[0]
    assert (row.name, row.encode(file)) == ("eax", b"88776655")
    assert row.decode(bytes.fromhex("ffffffff"), file) == {"rax": 0xFFFFFFFF}


def test_in_real_mode_eip_is_linear_and_ip_is_not() -> None:
    registers, file = layout(I8086, False), register_file(some_values())
    eip, ip = (registers.registers[registers.number_of[name]] for name in ("eip", "ip"))
    assert eip.encode(file) == (0xFFFF0).to_bytes(4, "little").hex().encode()
    assert ip.encode(file) == (0xFFF0).to_bytes(4, "little").hex().encode()
    assert eip.decode((0xF1234).to_bytes(4, "little"), file) == {"rip": 0x1234}
    assert ip.decode((0x1234).to_bytes(4, "little"), file) == {"rip": 0x1234}
    with pytest.raises(ValueError, match="eip is below the code segment, which begins at 0xf0000"):
        eip.decode((0xEFFFF).to_bytes(4, "little"), file)


@pytest.mark.parametrize("registers", LAYOUTS)
def test_the_program_counter_is_linear_for_every_debugger(registers: Layout) -> None:
    row = registers.registers[registers.first[0]]
    file = register_file(some_values())
    assert int.from_bytes(row.read(file), "little") == 0xFFFF0
    assert row.decode((0xF1234).to_bytes(row.size, "little"), file) == {"rip": 0x1234}
    assert row.bank == Bank.GENERAL | Bank.SYSTEM, "CS is needed to write it"


def test_the_first_registers_are_program_counter_stack_and_frame() -> None:
    for architecture, expected in ((X86_64, "rip rsp rbp"), (I386, "eip esp ebp")):
        registers = layout(architecture, True)
        assert [registers.registers[n].name for n in registers.first] == expected.split()
        assert all(registers.registers[n].bank & Bank.GENERAL for n in registers.first)


def test_the_same_layout_is_made_once() -> None:
    assert layout(X86_64, True) is layout(X86_64, True)


def test_rows_are_unique_and_packable() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert {row.bits for row in TABLE} <= {32, 64, 80, 128}
    assert all(row.bank is Bank.AVX for row in TABLE if row.feature == AVX)


@pytest.mark.parametrize(
    ("kernel_bits", "image_bits", "expected"),
    [
        (16, None, I8086),
        (16, 32, I8086),
        (16, 64, X86_64),
        (32, None, I386),
        (32, 32, I386),
        (32, 64, X86_64),
        (64, None, X86_64),
        (64, 32, X86_64),
        (64, 64, X86_64),
    ],
)
def test_architecture_follows_the_image_and_then_the_mode(
    kernel_bits: int, image_bits: int | None, expected: Architecture
) -> None:
    assert architecture_for(kernel_bits, image_bits) is expected


def extended(mantissa: int, exponent: int) -> bytes:
    return struct.pack("<QH", mantissa, exponent)


def test_full_tag_word_is_recreated_from_the_abridged_one() -> None:
    one, zero = extended(1 << 63, 0x3FFF), bytes(10)
    infinity, denormal, unnormal = extended(1 << 63, 0x7FFF), extended(1, 0), extended(1, 0x3FFF)
    st = (one, zero, infinity, denormal, unnormal, one, one, one)
    assert expand_tag_word(0x00, 0, st) == 0xFFFF
    assert expand_tag_word(0x1F, 0, st) == 0b11_11_11_10_10_10_01_00
    top_is_6 = 6 << 11  # ST(0) is physical register 6
    assert expand_tag_word(0xC0, top_is_6, st) == 0b01_00_11_11_11_11_11_11
    assert expand_tag_word(0x01, top_is_6, st) == 0b11_11_11_11_11_11_11_10


def test_abridged_tag_word_says_what_is_not_empty() -> None:
    assert abridge_tag_word(0xFFFF) == 0
    assert abridge_tag_word(0b11_11_11_10_10_10_01_00) == 0x1F


def test_a_row_gives_bytes_as_they_are() -> None:
    row = Register("xmm0", 128, "vec128", "f", Bank.FPU)
    assert row.encode(bytes(range(16))) == bytes(range(16)).hex().encode()
    assert row.decode(bytes(16), b"") == {"xmm0": bytes(16)}

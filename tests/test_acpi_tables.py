"""The tables by which kernels find the processors, read as kernels read them."""

from __future__ import annotations

import struct

import pytest

from pyvmm.boot import Mode, acpi, mptable, tables
from pyvmm.boot.layout import RESERVED
from pyvmm.stop import StopReason
from tests.rsp_client import flat_image
from tests.smp_guests import pc

CPUS = (1, 2, 8, 255)


class Memory:
    """The first megabyte of a guest, as much of GuestMemory as write_tables() uses."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 20)

    def write(self, gpa: int, data: bytes) -> None:
        assert gpa + len(data) <= len(self.bytes)
        assert not any(self.bytes[gpa : gpa + len(data)]), f"{gpa:#x} is written twice"
        self.bytes[gpa : gpa + len(data)] = data

    def number(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.bytes[gpa : gpa + size], "little")

    def search(self, mark: bytes, start: int, end: int) -> int:
        """The one multiple of 16 where `mark` is."""
        found = [gpa for gpa in range(start, end, 16) if self.bytes.startswith(mark, gpa)]
        assert len(found) == 1
        return found[0]


def firmware(cpus: int) -> Memory:
    """The memory of a machine after write_tables()."""
    memory = Memory()
    tables.write_tables(memory, cpus)  # type: ignore[arg-type]
    return memory


def acpi_table(memory: Memory, gpa: int) -> tuple[bytes, bytes]:
    """The signature and the bytes of the table at `gpa`, whose sum must be 0."""
    table = bytes(memory.bytes[gpa : gpa + memory.number(gpa + 4, 4)])
    assert len(table) >= 36
    assert sum(table) % 256 == 0
    return table[:4], table


def acpi_tables(memory: Memory) -> dict[bytes, bytes]:
    """All tables by signature, found by way of the RSDP, as ACPI 1.0 does it and as 2.0 does."""
    rsdp = memory.search(b"RSD PTR ", 0xE_0000, 0x10_0000)
    assert sum(memory.bytes[rsdp : rsdp + 20]) % 256 == 0
    assert sum(memory.bytes[rsdp : rsdp + 36]) % 256 == 0
    assert (memory.bytes[rsdp + 15], memory.number(rsdp + 20, 4)) == (2, 36)
    mark, rsdt = acpi_table(memory, memory.number(rsdp + 16, 4))
    assert mark == b"RSDT"
    mark, xsdt = acpi_table(memory, memory.number(rsdp + 24, 8))
    assert mark == b"XSDT"
    addresses = struct.unpack(f"<{(len(rsdt) - 36) // 4}I", rsdt[36:])
    assert addresses == struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
    found = dict(acpi_table(memory, gpa) for gpa in addresses)
    fadt = found[b"FACP"]
    dsdt_gpa, x_dsdt_gpa = (
        struct.unpack_from("<I", fadt, 40)[0],
        struct.unpack_from("<Q", fadt, 140),
    )
    assert x_dsdt_gpa == (dsdt_gpa,)
    found.update([acpi_table(memory, dsdt_gpa)])
    facs_gpa = struct.unpack_from("<I", fadt, 36)[0]
    assert facs_gpa % 64 == 0
    found[b"FACS"] = bytes(memory.bytes[facs_gpa : facs_gpa + 64])
    return found


def madt_entries(madt: bytes) -> list[bytes]:
    """The entries of a MADT, each with its type and its length."""
    entries, offset = [], 44
    while offset < len(madt):
        entries.append(madt[offset : offset + madt[offset + 1]])
        offset += madt[offset + 1]
    assert offset == len(madt)
    return entries


# --- ACPI ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", CPUS)
def test_acpi_names_each_processor_once(cpus: int) -> None:
    madt = acpi_tables(firmware(cpus))[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    processors = [entry for entry in madt_entries(madt) if entry[0] == 0]
    assert processors == [struct.pack("<BBBBI", 0, 8, n, n, 1) for n in range(cpus)]


def test_acpi_names_the_ioapic_and_the_interrupts_that_are_wired_otherwise() -> None:
    others = [e for e in madt_entries(acpi_tables(firmware(2))[b"APIC"]) if e[0] != 0]
    assert others == [
        struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC0_0000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),  # the timer: pin 2, as the ISA bus has it
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xD),  # the SCI: active high, level
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),  # NMI: LINT1 of all processors
    ]


def test_acpi_tells_the_ports_of_power_management() -> None:
    fadt = acpi_tables(firmware(1))[b"FACP"]
    assert (len(fadt), fadt[8]) == (244, 3)

    def number(offset: int, size: int) -> int:
        return int.from_bytes(fadt[offset : offset + size], "little")

    assert number(46, 2) == 9  # SCI
    assert number(48, 4) == 0  # no SMI command: ACPI is always on
    assert [number(offset, 4) for offset in (56, 64, 76)] == [0x600, 0x604, 0x608]
    assert [fadt[offset] for offset in (88, 89, 91)] == [4, 2, 4]
    for offset, bits, port in (
        (116, 8, 0xCF9),
        (148, 32, 0x600),
        (172, 16, 0x604),
        (208, 32, 0x608),
    ):
        assert (fadt[offset], fadt[offset + 1], number(offset + 4, 8)) == (1, bits, port)
    assert fadt[128] == 6  # what to write to the reset register
    assert fadt[108] == 0x32  # the CMOS register of the century
    assert number(109, 2) == 1 << 0 | 1 << 1 | 1 << 3
    assert number(112, 4) == 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10


def test_power_off_can_be_found_by_the_bytes_of_its_name() -> None:
    """Kernels without an AML interpreter search for _S5_ and read the package behind it."""
    dsdt = acpi_tables(firmware(1))[b"DSDT"]
    at = dsdt.index(b"_S5_")
    assert dsdt[at - 1] == 0x08  # NameOp
    assert dsdt[at + 4 :] == bytes((0x12, 6, 4, 0, 0, 0, 0))  # PackageOp, length, 4 zeros


def test_aml_integers_are_operators_or_have_a_prefix() -> None:
    assert acpi._aml_package(0, 1, 5) == bytes((0x12, 6, 3, 0x00, 0x01, 0x0A, 5))


VIRTIO = [(0xD000_0000 + 0x200 * n, 0x200, 16 + n) for n in range(8)]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_acpi_tells_where_virtio_devices_are(count: int) -> None:
    """By the bytes; that a kernel's interpreter understands them shows when Linux boots."""
    memory = Memory()
    memory.write(0xE_0000, acpi.tables(0xE_0000, 2, VIRTIO[:count]))
    aml = acpi_tables(memory)[b"DSDT"][36:]
    assert aml.startswith(b"\x08_S5_\x12\x06\x04\0\0\0\0\x10")
    name, devices = aml_sized(aml[13:], 5)
    assert name == b"\\_SB_"
    for number, (gpa, size, gsi) in enumerate(VIRTIO[:count]):
        assert devices[:2] == b"\x5b\x82"
        length = len(devices[2:]) - len(after_sized(devices[2:]))
        name, body = aml_sized(devices[2 : 2 + length], 4)
        assert name == b"VR%02d" % number
        unique = bytes((number,)) if number < 2 else bytes((0x0A, number))
        resources = (
            struct.pack("<BHBII", 0x86, 9, 1, gpa, size)  # memory: it can be written
            + struct.pack("<BHBBI", 0x89, 6, 0b0011, 1, gsi)  # consumer, edge, high, exclusive
            + b"\x79\0"
        )
        assert len(resources) == 23
        expected = b"\x08_HID\x0dLNRO0005\0" + b"\x08_UID" + unique + b"\x08_CRS\x11"
        expected += bytes((len(resources) + 3, 0x0A, len(resources))) + resources
        assert body == expected
        devices = devices[2 + length :]
    assert devices == b""


def aml_length(aml: bytes) -> tuple[int, int]:
    """The length at the beginning, and how many bytes say it."""
    more = aml[0] >> 6
    if not more:
        return aml[0], 1
    return aml[0] & 0xF | int.from_bytes(aml[1 : 1 + more], "little") << 4, 1 + more


def aml_sized(aml: bytes, name_size: int) -> tuple[bytes, bytes]:
    """The name and the rest of what begins with its length, and is all there is."""
    length, size = aml_length(aml)
    assert length == len(aml)
    return aml[size : size + name_size], aml[size + name_size :]


def after_sized(aml: bytes) -> bytes:
    """What is behind that which begins with its length."""
    return aml[aml_length(aml)[0] :]


@pytest.mark.parametrize("size", [0, 62, 63, 64, 4000])
def test_aml_lengths_count_themselves(size: int) -> None:
    body = bytes(size)
    sized = acpi._aml_sized(body)
    assert aml_length(sized)[0] == len(sized)
    assert sized[aml_length(sized)[1] :] == body


def test_the_facs_has_its_length_and_an_unlocked_lock() -> None:
    facs = acpi_tables(firmware(1))[b"FACS"]
    assert struct.unpack_from("<4sIIII", facs) == (b"FACS", 64, 0, 0, 0)


@pytest.mark.parametrize("make", [acpi.tables, mptable.tables])
def test_more_processors_than_apic_ids_are_refused(make) -> None:
    with pytest.raises(ValueError, match="256 vCPUs"):
        make(0xE_0000, 256)


# --- MP table --------------------------------------------------------------------------------


def mp_entries(memory: Memory) -> list[bytes]:
    """The entries of the MP table, found by its floating pointer."""
    pointer = memory.search(b"_MP_", 0xF_0000, 0x10_0000)
    assert sum(memory.bytes[pointer : pointer + 16]) % 256 == 0
    assert memory.bytes[pointer + 8 : pointer + 10] == bytes((1, 4))
    assert not any(memory.bytes[pointer + 11 : pointer + 16])  # a table, and PICs at the start
    gpa = memory.number(pointer + 4, 4)
    table = bytes(memory.bytes[gpa : gpa + memory.number(gpa + 4, 2)])
    assert (table[:4], table[6]) == (b"PCMP", 4)
    assert sum(table) % 256 == 0
    assert struct.unpack_from("<I", table, 36) == (0xFEE0_0000,)
    entries, offset = [], 44
    while offset < len(table):
        size = 20 if table[offset] == 0 else 8
        entries.append(table[offset : offset + size])
        offset += size
    assert offset == len(table)
    assert len(entries) == struct.unpack_from("<H", table, 34)[0]
    assert [e[0] for e in entries] == sorted(e[0] for e in entries)
    return entries


@pytest.mark.parametrize("cpus", CPUS)
def test_the_mp_table_names_each_processor_once(cpus: int) -> None:
    processors = [entry for entry in mp_entries(firmware(cpus)) if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1)  # the first one boots


def test_the_mp_table_wires_each_request_of_the_isa_bus_to_a_pin() -> None:
    entries = mp_entries(firmware(1))
    assert [e for e in entries if e[0] == 1] == [b"\1\0ISA   "]
    assert [e for e in entries if e[0] == 2] == [struct.pack("<BBBBI", 2, 0, 0x11, 1, 0xFEC0_0000)]
    wiring = {e[5]: e[7] for e in entries if e[0] == 3}
    assert wiring == {0: 2, 1: 1, **{irq: irq for irq in range(3, 16)}}
    flags = {e[5]: e[2] for e in entries if e[0] == 3 and e[2]}
    assert flags == {9: 0xD}


def test_the_mp_table_has_the_pic_at_lint0_and_nmi_at_lint1() -> None:
    local = [e for e in mp_entries(firmware(1)) if e[0] == 4]
    assert [(e[1], e[6], e[7]) for e in local] == [(3, 0xFF, 0), (1, 0xFF, 1)]


def test_acpi_and_the_mp_table_agree() -> None:
    memory = firmware(3)
    madt = madt_entries(acpi_tables(memory)[b"APIC"])
    overrides = {e[3]: (struct.unpack_from("<I", e, 4)[0], e[8]) for e in madt if e[0] == 2}
    for entry in mp_entries(memory):
        if entry[0] == 3:
            assert (entry[7], entry[2]) == overrides.get(entry[5], (entry[5], 0))


# --- the BIOS data area ----------------------------------------------------------------------


def test_the_bios_data_area_says_where_to_search() -> None:
    memory = firmware(1)
    ebda = memory.number(0x40E, 2) << 4
    assert ebda == 0x9_FC00
    assert memory.number(ebda, 1) == 1  # KiB
    assert memory.number(0x413, 2) == ebda // 1024
    assert memory.number(0x400, 2) == 0x3F8  # COM1
    assert memory.number(0x410, 2) >> 9 & 7 == 1  # serial ports
    assert (memory.number(0x449, 1), memory.number(0x44A, 2), memory.number(0x484, 1)) == (
        3,
        80,
        24,
    )
    assert memory.number(0x463, 2) == 0x3D4


@pytest.mark.kvm
def test_a_call_of_the_firmware_fails_and_returns() -> None:
    """In real mode: a kernel that asks a BIOS must not run away through zeros."""
    # clc; mov ax, 0xe820; mov bp, 0x1234; int 0x15; jnc bad; cmp bp, 0x1234; jne bad; mov al, 3
    # out 0xf4, al; bad: hlt
    code = "f8 b820e8 bd3412 cd15 730a 81fd3412 7504 b003 e6f4 f4"
    with pc(flat_image(bytes.fromhex(code), Mode.REAL, 0x7C00)) as machine:
        stop = machine.run(timeout=20)
        assert (stop.reason, stop.status) == (StopReason.DEBUG_EXIT, 7)


@pytest.mark.kvm
def test_a_jump_to_the_reset_vector_resets() -> None:
    jump = bytes.fromhex("ea 0000 ffff")  # jmp 0xffff:0
    with pc(flat_image(jump, Mode.REAL, 0x7C00), reboot=False) as machine:
        assert machine.run(timeout=20).reason is StopReason.RESET


def test_the_tables_stay_inside_what_is_reserved_for_them() -> None:
    memory = firmware(255)
    for gpa, size, _ in RESERVED:
        memory.bytes[gpa : gpa + size] = bytes(size)
    assert not any(memory.bytes)

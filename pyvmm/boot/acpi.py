"""ACPI tables: how a kernel finds the processors, the interrupt wiring, and the way to power off.

The kernel searches the firmware's area for the RSDP, which points to a list of all tables (twice:
RSDT with 32-bit addresses, XSDT with 64-bit ones). The others: the FADT has the ports of the power
management, the MADT the local APICs and the IOAPIC, the FACS is only there because it must be, and
the DSDT holds AML, ACPI's bytecode.

The DSDT is minimal: it says with which sleep type a write to PM1a control powers off, and where the
virtio devices are. Other devices are where every PC has them, and are not described.

Source: ACPI specification 6.5, chapter 5 "ACPI Software Programming Model" for the tables, in the
versions that ACPI 2.0 has of them; "AML Grammar Definition" and "Resource Data Types for ACPI" for
the DSDT. That LNRO0005 is a virtio device in memory is in Linux's drivers/virtio/virtio_mmio.c.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pyvmm.boot.layout import IOAPIC_GPA, LOCAL_APIC_GPA, Area
from pyvmm.devices.pm import (
    PM1_CONTROL_PORT,
    PM1_EVENT_PORT,
    PM_TIMER_PORT,
    RESET_CONTROL_PORT,
    RESET_VALUE,
    S5_SLEEP_TYPE,
    SCI_IRQ,
)

PM1_EVENT_BYTES, PM1_CONTROL_BYTES, PM_TIMER_BYTES = 4, 2, 4

MAX_CPUS = 255  # an APIC id has 8 bits here, and 0xFF is all of them
IOAPIC_ID = 0  # as KVM's IOAPIC says itself

# An ISA interrupt request arrives at the IOAPIC's pin of the same number, rising edge, with these
# exceptions: the timer's pin, and ACPI's own interrupt (SCI), a level.
TIMER_IRQ, TIMER_PIN = 0, 2
ACTIVE_HIGH_LEVEL, AS_THE_BUS_HAS_IT = 0b1101, 0  # INTI flags: trigger mode and polarity
NMI_LINT = 1  # the local APICs' pin for non-maskable interrupts

# FADT: "IA-PC Boot Architecture Flags" and "Fixed Feature Flags".
LEGACY_DEVICES, HAS_8042, NO_MSI = 1 << 0, 1 << 1, 1 << 3
WBINVD, ALL_HAVE_C1, NO_POWER_BUTTON, NO_SLEEP_BUTTON = 1 << 0, 1 << 2, 1 << 4, 1 << 5
HAS_RESET_REGISTER = 1 << 10
FADT_FLAGS = WBINVD | ALL_HAVE_C1 | NO_POWER_BUTTON | NO_SLEEP_BUTTON | HAS_RESET_REGISTER
FADT_BYTES = 244  # of revision 3
CMOS_CENTURY = 0x32
NO_C2, NO_C3 = 101, 1001  # a latency, in microseconds, so long that the state does not exist

# MADT: types of entries, and flags.
MADT_LOCAL_APIC, MADT_IOAPIC, MADT_OVERRIDE, MADT_LOCAL_NMI = 0, 1, 2, 4
HAS_PIC, CPU_ENABLED, ALL_CPUS = 1, 1, 0xFF

MmioDevice = tuple[int, int, int]  # GPA, bytes, interrupt (GSI)

_OEM_ID = b"PYVMM "
_TABLE_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_RSDP_V1, _RSDP_V2 = struct.Struct("<8sB6sBI"), struct.Struct("<IQB3x")


def tables(gpa: int, cpus: int, virtio: Sequence[MmioDevice] = ()) -> bytes:
    """All tables for `cpus` processors, as bytes for `gpa`, which the RSDP is at.

    A kernel looks for the RSDP at each multiple of 16 in 0xE0000..0xFFFFF.
    `virtio` says where the virtio devices are.
    Raises ValueError for more processors than the tables can name.
    """
    if cpus > MAX_CPUS:
        raise ValueError(f"{cpus} vCPUs: ACPI tables are made for at most {MAX_CPUS}")
    rsdp_bytes = _RSDP_V1.size + _RSDP_V2.size
    area = Area(gpa + rsdp_bytes)
    facs_gpa = area.add(_facs(), alignment=64)
    fadt_gpa = area.add(_fadt(facs_gpa, dsdt_gpa=area.add(_dsdt(virtio))))
    madt_gpa = area.add(_madt(cpus))
    rsdt = _table(b"RSDT", 1, struct.pack("<2I", fadt_gpa, madt_gpa))
    xsdt = _table(b"XSDT", 1, struct.pack("<2Q", fadt_gpa, madt_gpa))
    return _rsdp(area.add(rsdt), area.add(xsdt, alignment=8)) + area.data


def checksum(data: bytes) -> int:
    """The byte that makes the sum of all bytes 0, modulo 256."""
    return -sum(data) & 0xFF


def _rsdp(rsdt_gpa: int, xsdt_gpa: int) -> bytes:
    """Root System Description Pointer: two parts, each with a checksum that ends at it."""
    first = _RSDP_V1.pack(b"RSD PTR ", 0, _OEM_ID, 2, rsdt_gpa)
    first = _RSDP_V1.pack(b"RSD PTR ", checksum(first), _OEM_ID, 2, rsdt_gpa)
    size = _RSDP_V1.size + _RSDP_V2.size
    second = _RSDP_V2.pack(size, xsdt_gpa, 0)
    return first + _RSDP_V2.pack(size, xsdt_gpa, checksum(first + second))


def _table(signature: bytes, revision: int, body: bytes | bytearray) -> bytes:
    """A table with the header that all but the RSDP and the FACS have."""

    def header(check: int) -> bytes:
        size = _TABLE_HEADER.size + len(body)
        oem = (_OEM_ID, b"PYVMM   ", 1, b"PYVM", 1)  # ids and revisions of OEM and of creator
        return _TABLE_HEADER.pack(signature, size, revision, check, *oem)

    return header(checksum(header(0) + body)) + body


def _facs() -> bytes:
    """Firmware ACPI Control Structure: the lock and the waking vector of firmware, unused."""
    return struct.pack("<4sI24xB31x", b"FACS", 64, 1)


def _fadt(facs_gpa: int, dsdt_gpa: int) -> bytes:
    """Fixed ACPI Description Table: what has no field here is zero, a thing that there is not.

    SMI_CMD is one of those: ACPI cannot be switched off.
    """
    fields = (  # offset, format, value
        (36, "<I", facs_gpa),  # FIRMWARE_CTRL; X_FIRMWARE_CTRL must be 0 then
        (40, "<I", dsdt_gpa),  # DSDT
        (46, "<H", SCI_IRQ),  # SCI_INT
        (56, "<I", PM1_EVENT_PORT),  # PM1a_EVT_BLK
        (64, "<I", PM1_CONTROL_PORT),  # PM1a_CNT_BLK
        (76, "<I", PM_TIMER_PORT),  # PM_TMR_BLK
        (88, "<B", PM1_EVENT_BYTES),  # PM1_EVT_LEN
        (89, "<B", PM1_CONTROL_BYTES),  # PM1_CNT_LEN
        (91, "<B", PM_TIMER_BYTES),  # PM_TMR_LEN
        (96, "<H", NO_C2),  # P_LVL2_LAT
        (98, "<H", NO_C3),  # P_LVL3_LAT
        (108, "<B", CMOS_CENTURY),  # CENTURY
        (109, "<H", LEGACY_DEVICES | HAS_8042 | NO_MSI),  # IAPC_BOOT_ARCH
        (112, "<I", FADT_FLAGS),  # Flags
        (116, "12s", _register(RESET_CONTROL_PORT, 1)),  # RESET_REG
        (128, "<B", RESET_VALUE),  # RESET_VALUE
        (140, "<Q", dsdt_gpa),  # X_DSDT
        (148, "12s", _register(PM1_EVENT_PORT, PM1_EVENT_BYTES)),  # X_PM1a_EVT_BLK
        (172, "12s", _register(PM1_CONTROL_PORT, PM1_CONTROL_BYTES)),  # X_PM1a_CNT_BLK
        (208, "12s", _register(PM_TIMER_PORT, PM_TIMER_BYTES)),  # X_PM_TMR_BLK
    )
    table = bytearray(FADT_BYTES)
    for offset, form, value in fields:
        struct.pack_into(form, table, offset, value)
    return _table(b"FACP", 3, table[_TABLE_HEADER.size :])


def _register(port: int, size: int) -> bytes:
    """Generic Address Structure of a register in port space, without an access size of its own."""
    return struct.pack("<BBBBQ", 1, size * 8, 0, 0, port)


def _madt(cpus: int) -> bytes:
    """Multiple APIC Description Table: who takes interrupts, and where they come from."""
    entries = [struct.pack("<II", LOCAL_APIC_GPA, HAS_PIC)]
    entries += [struct.pack("<BBBBI", MADT_LOCAL_APIC, 8, n, n, CPU_ENABLED) for n in range(cpus)]
    entries += [
        struct.pack("<BBBxII", MADT_IOAPIC, 12, IOAPIC_ID, IOAPIC_GPA, 0),
        struct.pack("<BBBBIH", MADT_OVERRIDE, 10, 0, TIMER_IRQ, TIMER_PIN, AS_THE_BUS_HAS_IT),
        struct.pack("<BBBBIH", MADT_OVERRIDE, 10, 0, SCI_IRQ, SCI_IRQ, ACTIVE_HIGH_LEVEL),
        struct.pack("<BBBHB", MADT_LOCAL_NMI, 6, ALL_CPUS, AS_THE_BUS_HAS_IT, NMI_LINT),
    ]
    return _table(b"APIC", 1, b"".join(entries))


# --- AML -----------------------------------------------------------------------------------------

ZERO_OP, ONE_OP, NAME_OP, BYTE_PREFIX, STRING_PREFIX = 0x00, 0x01, 0x08, 0x0A, 0x0D
SCOPE_OP, BUFFER_OP, PACKAGE_OP, EXTENDED_PREFIX, DEVICE_OP = 0x10, 0x11, 0x12, 0x5B, 0x82
SYSTEM_BUS = b"\\_SB_"

# Resource descriptors, and bits in them.
MEMORY_32_FIXED, EXTENDED_INTERRUPT, END_TAG = 0x86, 0x89, 0x79
READ_WRITE = 1
CONSUMER, EDGE, ACTIVE_HIGH, EXCLUSIVE = 1 << 0, 1 << 1, 0 << 2, 0 << 3


def _dsdt(virtio: Sequence[MmioDevice]) -> bytes:
    r"""Differentiated System Description Table.

        Name (\_S5, Package () {type, type, 0, 0})
        Scope (\_SB) {
            Device (VR00) {...}
        }

    The types are those for PM1a and PM1b control; the rest of the package is reserved.
    """
    aml = _aml_name(b"_S5_", _aml_package(S5_SLEEP_TYPE, S5_SLEEP_TYPE, 0, 0))
    if virtio:
        devices = (_virtio_device(number, *place) for number, place in enumerate(virtio))
        aml += bytes((SCOPE_OP,)) + _aml_sized(SYSTEM_BUS + b"".join(devices))
    return _table(b"DSDT", 2, aml)


def _virtio_device(number: int, gpa: int, size: int, gsi: int) -> bytes:
    """Device (VR00) {Name (_HID, "LNRO0005") Name (_UID, 0) Name (_CRS, resources)}."""
    memory = struct.pack("<BHBII", MEMORY_32_FIXED, 9, READ_WRITE, gpa, size)
    flags = CONSUMER | EDGE | ACTIVE_HIGH | EXCLUSIVE
    interrupt = struct.pack("<BHBBI", EXTENDED_INTERRUPT, 6, flags, 1, gsi)
    end = struct.pack("<BB", END_TAG, 0)  # without a checksum
    body = (
        b"VR%02d" % number
        + _aml_name(b"_HID", bytes((STRING_PREFIX,)) + b"LNRO0005\0")
        + _aml_name(b"_UID", _aml_byte(number))
        + _aml_name(b"_CRS", _aml_buffer(memory + interrupt + end))
    )
    return bytes((EXTENDED_PREFIX, DEVICE_OP)) + _aml_sized(body)


def _aml_name(name: bytes, value: bytes) -> bytes:
    """The object `name`, four characters, in the scope that it is in."""
    return bytes((NAME_OP,)) + name + value


def _aml_package(*values: int) -> bytes:
    """A package of integers below 256: their number, and each of them."""
    return bytes((PACKAGE_OP,)) + _aml_sized(
        bytes((len(values),)) + b"".join(map(_aml_byte, values))
    )


def _aml_buffer(data: bytes) -> bytes:
    """A buffer of less than 256 bytes."""
    return bytes((BUFFER_OP,)) + _aml_sized(_aml_byte(len(data)) + data)


def _aml_sized(body: bytes) -> bytes:
    """The length of it all, with the 1 or 2 bytes (for up to 4095) of the length, and the body."""
    size = len(body) + 1
    if size < 1 << 6:
        return bytes((size,)) + body
    size += 1
    return bytes((1 << 6 | size & 0xF, size >> 4)) + body


def _aml_byte(value: int) -> bytes:
    """An integer: 0 and 1 are operators of their own."""
    return bytes((value,)) if value in (ZERO_OP, ONE_OP) else bytes((BYTE_PREFIX, value))

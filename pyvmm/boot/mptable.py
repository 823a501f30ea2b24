"""The MP table: how a kernel finds the processors without ACPI, as kernels of the 1990s did.

A floating pointer, which the kernel searches the firmware's area for, and the configuration table
that it points to. It says the same as the ACPI tables: a local APIC for each processor, one IOAPIC,
and to which of its pins the interrupt requests of the ISA bus go.

Left out: PCI and its interrupts, and the extended entries of version 1.4.

Source: Intel MultiProcessor Specification version 1.4, chapter 4 "MP Configuration Table".
"""

from __future__ import annotations

import struct

from pyvmm.boot.acpi import (
    ACTIVE_HIGH_LEVEL,
    AS_THE_BUS_HAS_IT,
    IOAPIC_ID,
    MAX_CPUS,
    NMI_LINT,
    TIMER_IRQ,
    TIMER_PIN,
    checksum,
)
from pyvmm.boot.layout import IOAPIC_GPA, LOCAL_APIC_GPA
from pyvmm.devices.pm import SCI_IRQ

PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)  # types of entries
CPU_ENABLED, CPU_BOOTS, IOAPIC_ENABLED = 1 << 0, 1 << 1, 1 << 0
INT, NMI, SMI, EXT_INT = range(4)  # types of interrupts; an ExtINT's vector comes from the PIC
ISA_BUS, ISA_IRQS = 0, 16
PIC_LINT = 0  # the local APICs' pin for the PIC
ALL_CPUS = 0xFF

LOCAL_APIC_VERSION, IOAPIC_VERSION = 0x14, 0x11
# A kernel asks CPUID; these are for its messages. Family 6; an FPU and an APIC.
CPU_SIGNATURE, CPU_FEATURES = 0x600, 0x201

_POINTER = struct.Struct("<4sIBBB5x")
_TABLE_HEADER = struct.Struct("<4sHBB8s12sIHHIHBx")


def tables(gpa: int, cpus: int) -> bytes:
    """The floating pointer, for `gpa`, and behind it the table for `cpus` processors.

    A kernel looks for the pointer at each multiple of 16 in 0xF0000..0xFFFFF.
    Raises ValueError for more processors than the table can name.
    """
    if cpus > MAX_CPUS:
        raise ValueError(f"{cpus} vCPUs: an MP table is made for at most {MAX_CPUS}")

    def pointer(check: int) -> bytes:
        return _POINTER.pack(b"_MP_", gpa + _POINTER.size, 1, 4, check)  # 16 bytes; version 1.4

    return pointer(checksum(pointer(0))) + _configuration(cpus)


def _configuration(cpus: int) -> bytes:
    entries = _entries(cpus)
    body = b"".join(entries)

    def header(check: int) -> bytes:
        size = _TABLE_HEADER.size + len(body)
        return _TABLE_HEADER.pack(
            *(b"PCMP", size, 4, check),
            *(b"PYVMM   ", b"PC          ", 0, 0),  # names, and no table of the manufacturer's
            *(len(entries), LOCAL_APIC_GPA, 0, 0),  # and no extended entries
        )

    return header(checksum(header(0) + body)) + body


def _entries(cpus: int) -> list[bytes]:
    """All entries, in the order of their types, as the specification wants it."""
    entries = [_processor(n) for n in range(cpus)]
    entries.append(struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "))
    entries.append(
        struct.pack("<BBBBI", IOAPIC, IOAPIC_ID, IOAPIC_VERSION, IOAPIC_ENABLED, IOAPIC_GPA)
    )
    for irq in range(ISA_IRQS):
        if irq != TIMER_PIN:  # request 2 is how the second PIC reaches the first
            pin = TIMER_PIN if irq == TIMER_IRQ else irq
            flags = ACTIVE_HIGH_LEVEL if irq == SCI_IRQ else AS_THE_BUS_HAS_IT
            entries.append(_interrupt(IO_INTERRUPT, INT, flags, irq, IOAPIC_ID, pin))
    for kind, lint in ((EXT_INT, PIC_LINT), (NMI, NMI_LINT)):
        entries.append(_interrupt(LOCAL_INTERRUPT, kind, AS_THE_BUS_HAS_IT, 0, ALL_CPUS, lint))
    return entries


def _processor(number: int) -> bytes:
    flags = CPU_ENABLED | CPU_BOOTS if number == 0 else CPU_ENABLED
    version = LOCAL_APIC_VERSION
    return struct.pack("<BBBBII8x", PROCESSOR, number, version, flags, CPU_SIGNATURE, CPU_FEATURES)


def _interrupt(entry: int, kind: int, flags: int, irq: int, apic: int, pin: int) -> bytes:
    """Where request `irq` of the ISA bus goes: to a `pin` of the IOAPIC or of local APICs."""
    return struct.pack("<BBHBBBB", entry, kind, flags, ISA_BUS, irq, apic, pin)

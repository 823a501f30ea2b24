"""What a PC's firmware leaves in the first megabyte, for kernels that look for it.

    0x00000  interrupt vectors of real mode
    0x00400  BIOS data area: where the EBDA is, and what is in the machine
    0x9FC00  EBDA: its own size
    0xE0000  ACPI tables, with the RSDP first
    0xF0000  MP table, with its floating pointer first
    0xFF000  what all vectors lead to, and at 0xFFFF0 what resets the machine

There is no firmware.  A kernel that calls it all the same (Xen goes back to real mode to ask for
the memory map, disks and video) is told that there is no such function.

Source: for the BIOS data area, IBM Personal System/2 and Personal Computer BIOS Interface Technical
Reference, "Data Areas and ROM Tables".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pyvmm.boot import acpi, mptable
from pyvmm.boot.image import KIB
from pyvmm.boot.layout import BIOS_DATA_GPA, EBDA_BYTES, EBDA_GPA, FIRMWARE_GPA
from pyvmm.devices.serial import COM1_PORT
from pyvmm.devices.vga import COLUMNS, CRTC, ROWS, VGA_PORT
from pyvmm.memory import GuestMemory

RSDP_GPA = FIRMWARE_GPA
MP_POINTER_GPA = 0xF_0000

VECTORS = 256
NO_FUNCTION_GPA, RESET_GPA = 0xF_F000, 0xF_FFF0
# 16-bit code.  push bp; mov bp, sp; or byte [bp + 6], 1; pop bp; iret: the caller finds CF set.
_NO_FUNCTION = bytes.fromhex("55 89e5 804e0601 5d cf")
_RESET = bytes.fromhex("b0fe e664 f4")  # mov al, 0xfe; out 0x64, al; hlt

HAS_FPU, TEXT_80_COLOR, ONE_SERIAL_PORT = 1 << 1, 2 << 4, 1 << 9  # bits of the equipment word

# Offset, format, value. A kernel that looks for the MP table takes the first two addresses from
# here, and some look for their ports here.
_BIOS_DATA = (
    (0x00, "<H", COM1_PORT),
    (0x0E, "<H", EBDA_GPA >> 4),  # as a real-mode segment
    (0x10, "<H", HAS_FPU | TEXT_80_COLOR | ONE_SERIAL_PORT),
    (0x13, "<H", EBDA_GPA // KIB),  # base memory
    (0x49, "<B", 3),  # video mode: text with 80 columns
    (0x4A, "<H", COLUMNS),
    (0x63, "<H", VGA_PORT + CRTC),
    (0x84, "<B", ROWS - 1),
)


def write_tables(memory: GuestMemory, cpus: int, virtio: Sequence[acpi.MmioDevice] = ()) -> None:
    """Write all of it for a machine with `cpus` processors, whose APIC ids are 0, 1 and so on.

    `virtio` says where the virtio devices are.

    Raises ValueError for more processors than the tables can name.
    """
    vector = struct.pack("<HH", NO_FUNCTION_GPA & 0xFFFF, NO_FUNCTION_GPA >> 4 & 0xF000)
    memory.write(0, vector * VECTORS)
    memory.write(NO_FUNCTION_GPA, _NO_FUNCTION)
    memory.write(RESET_GPA, _RESET)
    for offset, form, value in _BIOS_DATA:
        memory.write(BIOS_DATA_GPA + offset, struct.pack(form, value))
    memory.write(EBDA_GPA, bytes((EBDA_BYTES // KIB,)))
    memory.write(RSDP_GPA, acpi.tables(RSDP_GPA, cpus, virtio))
    memory.write(MP_POINTER_GPA, mptable.tables(MP_POINTER_GPA, cpus))

"""The guests that are measured: a few instructions of 64-bit code each, as bytes.

They are made here and not assembled, so that a measure can choose a count or a port, and so that
nobody needs an assembler.  A guest writes to MARK_PORT where its measured part begins and where it
ends: what starts and stops a VM is not in the figure.  floor.c is told that port, too.
"""

from __future__ import annotations

import struct
from pathlib import Path

MARK_PORT = 0x5E0
IO_PORT = 0x500  # a port with a device behind it, which nobody coalesces
MMIO_GPA = 0xD000_0000  # no RAM is there

COUNTER_GPA = 0x200000  # spin() counts here; floor.c is told
COM1 = 0x3F8

# How much virtio.c, which is compiled, reads from a disk in one request.  floor.c is told.
SEQUENTIAL_BYTES, RANDOM_BYTES = 128 << 10, 4 << 10


def _select(port: int) -> bytes:
    return b"\x66\xba" + struct.pack("<H", port)  # mov dx, port


_OUT = b"\xee"  # out dx, al
_MARK = _select(MARK_PORT) + _OUT
_END = bytes.fromhex("fa f4")  # cli; hlt: the guest ends


def _repeat(count: int, prepare: bytes, body: bytes) -> bytes:
    """A guest that executes `body` (which keeps ecx) `count` times between two marks."""
    loop = body + bytes.fromhex("ffc9")  # dec ecx
    loop += bytes((0x75, 0x100 - len(loop) - 2))  # jnz to the start of `body`
    return _MARK + b"\xb9" + struct.pack("<I", count) + prepare + loop + _MARK + _END


def port_writes(count: int, port: int = IO_PORT) -> bytes:
    """Writes a byte to `port` `count` times."""
    return _repeat(count, b"\xb0." + _select(port), _OUT)  # mov al, '.'


def mmio_writes(count: int) -> bytes:
    """Stores a byte to MMIO_GPA `count` times."""
    edi = b"\xbf" + struct.pack("<I", MMIO_GPA)  # mov edi, MMIO_GPA
    return _repeat(count, edi, bytes.fromhex("8807"))  # mov [rdi], al


def spin() -> bytes:
    """Counts for ever at COUNTER_GPA, 32 bits, without an exit."""
    # here: inc dword ptr [COUNTER_GPA]; jmp here
    return b"\xff\x04\x25" + struct.pack("<I", COUNTER_GPA) + b"\xeb\xf7"


def circle() -> bytes:
    """Three instructions for ever, without an exit; counts in rax."""
    return bytes.fromhex("48ffc0 90 ebfa")  # here: inc rax; nop; jmp here


def says(text: bytes) -> bytes:
    """Prints `text` at COM1, without polling it, and stays."""
    characters = b"".join(b"\xb0" + bytes((character,)) + _OUT for character in text)
    return _select(COM1) + characters + bytes.fromhex("ebfe")  # here: jmp here


def write_guest(folder: Path, name: str, code: bytes) -> Path:
    """Put a guest into `folder` as a flat binary, entered in long mode at GPA 0x100000."""
    path = folder / f"{name}.bin"
    path.write_bytes(code)
    return path

"""Guest memory with as much of a Linux kernel in it as can be looked at from outside.

The kernel's image has a symbol table, packed as scripts/kallsyms.c does it, page tables, a banner
and boot parameters; a log can be added.  There is no code in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from pyvmm.memory import GuestMemory

LINK_BASE = 0xFFFF_FFFF_8100_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000  # all of guest-physical memory, without KASLR
KERNEL_GPA = 2 << 20
RAM_BYTES = 8 << 20

# Offsets in the image.
TABLES, BANNER, BOOT_PARAMS, PAGE_TABLES, PRB, LOG = (
    0x10_0000,
    0x18_0000,
    0x18_1000,
    0x19_0000,
    0x1A_0000,
    0x1B_0000,
)
SYMBOLS = (
    (0, "T", "_text"),
    (0x1000, "T", "start_kernel"),
    (0x1100, "t", "do_idle"),
    (0x1200, "W", "weak_alias"),
    (BANNER, "D", "linux_banner"),
    (BOOT_PARAMS, "B", "boot_params"),
    (PAGE_TABLES, "D", "init_top_pgt"),
    (PRB, "d", "prb"),
    (PRB + 8, "B", "vmcoreinfo_data"),
)
TOKENS = {128: "_tex", 129: "start_", 130: "nel", 200: "_" * 20, 255: "id"}

PRESENT_WRITABLE, LARGE = 3, 0x80


def aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def pack_tables(
    symbols: Sequence[tuple[int, str, str]],
    *,
    base: int = LINK_BASE,
    order: str = "old",
    percpu: Sequence[tuple[int, str]] | None = (),
) -> bytes:
    """The tables of `symbols`, (offset from base, kind, name).

    `order`: "old" (Linux 6.1), "old with seqs" (6.2, 6.3) or "new" (6.4 and later).  `percpu` are
    absolute (address, name); None: CONFIG_KALLSYMS_ABSOLUTE_PERCPU is off.
    """
    tokens = [chr(n) if 33 <= n < 127 else TOKENS.get(n, "") for n in range(256)]
    names = [f"A{name}" for _, name in percpu or ()] + [kind + name for _, kind, name in symbols]
    if percpu is None:
        offsets = [offset for offset, _, _ in symbols]
    else:
        offsets = [gva for gva, _ in percpu] + [-1 - offset for offset, _, _ in symbols]

    packed, markers = b"", []
    for number, name in enumerate(names):
        if number % 256 == 0:
            markers.append(len(packed))
        data = compressed(name, tokens)
        length = len(data)
        packed += (
            bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        ) + data
    starts, at = [], 0
    for token in tokens:
        starts.append(at)
        at += len(token) + 1

    places = [
        struct.pack(f"<{len(offsets)}i", *offsets),
        struct.pack("<Q", base),
    ]
    what = [struct.pack("<I", len(names)), packed, struct.pack(f"<{len(markers)}I", *markers)]
    strings = [
        "".join(f"{token}\0" for token in tokens).encode(),
        struct.pack("<256H", *starts),
    ]
    seqs = [b"\x12\x34\x56" * len(names)]
    whole = {
        "old": places + what + strings,
        "old with seqs": places + what + seqs + strings,
        "new": what + strings + places + seqs,
    }[order]
    return b"".join(map(aligned, whole))


def compressed(name: str, tokens: list[str]) -> bytes:
    longest_first = sorted(TOKENS, key=lambda number: -len(TOKENS[number]))
    data = bytearray()
    while name:
        token = next((n for n in longest_first if name.startswith(tokens[n])), ord(name[0]))
        data.append(token)
        name = name[len(tokens[token]) :]
    return bytes(data)


class Ram:
    """The memory, to be written by offsets in the kernel's image; `memory` is what is looked at."""

    def __init__(
        self,
        *,
        offset: int = 0,
        symbols: Sequence[tuple[int, str, str]] = SYMBOLS,
        order: str = "old",
        percpu: Sequence[tuple[int, str]] | None = (),
    ) -> None:
        """`offset` is by how much the kernel has moved itself."""
        self.base = LINK_BASE + offset
        without_kvm: Any = SimpleNamespace(set_memory_slot=lambda *arguments: None)
        self.memory = GuestMemory(without_kvm)
        self.pages = self.memory.add_slot(0, RAM_BYTES).pages
        self.write(TABLES, pack_tables(symbols, base=self.base, order=order, percpu=percpu))
        self.write(BANNER, b"Linux version 6.1.0 (made up)\n\0")
        self.write(BOOT_PARAMS + 0x258, struct.pack("<Q", 16 << 20))
        self._map()

    def write(self, offset: int, data: bytes) -> None:
        self.pages[KERNEL_GPA + offset : KERNEL_GPA + offset + len(data)] = data

    def _map(self) -> None:
        """4-level paging: the image, in pages of 2 MiB, and one of 1 GiB for the direct map."""
        top = KERNEL_GPA + PAGE_TABLES
        for gva, gpa in ((self.base, KERNEL_GPA), (self.base + (2 << 20), KERNEL_GPA + (2 << 20))):
            self._entry(top, gva >> 39, top + 0x1000)
            self._entry(top + 0x1000, gva >> 30, top + 0x2000)
            self._entry(top + 0x2000, gva >> 21, gpa | LARGE)
        self._entry(top, DIRECT_MAP >> 39, top + 0x3000)
        self._entry(top + 0x3000, DIRECT_MAP >> 30, LARGE)

    def _entry(self, table: int, index: int, value: int) -> None:
        at = table + (index & 511) * 8
        self.pages[at : at + 8] = struct.pack("<Q", value | PRESENT_WRITABLE)

    def direct(self, offset: int) -> int:
        """The address in the direct map of what is at an offset in the image."""
        return DIRECT_MAP + KERNEL_GPA + offset

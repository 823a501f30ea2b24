"""QEMU's fw_cfg: facts about the machine, by number, through ports 0x510 (which) and 0x511 (data).

The guest writes a key to the selector (2 bytes) and reads the item byte by byte from the data port.
Numbers are little-endian, but for the file directory's.  Behind the end of an item, and for keys
that nobody has, there are zeros; so the address of the command line is 0, as in QEMU for an ELF
kernel: the guest reads the line from here.
Left out: the DMA interface, which a guest finds missing in FW_CFG_ID; files; writing.
Source: QEMU's docs/specs/fw_cfg.rst, "Guest-side Hardware Interface"; the keys are in QEMU's
include/standard-headers/linux/qemu_fw_cfg.h.
"""

from __future__ import annotations

import threading

FW_CFG_PORT = 0x510

FW_CFG_SIGNATURE = 0x00
FW_CFG_ID = 0x01
FW_CFG_RAM_SIZE = 0x03
FW_CFG_NB_CPUS = 0x05
FW_CFG_MAX_CPUS = 0x0F
FW_CFG_CMDLINE_SIZE = 0x14
FW_CFG_CMDLINE_DATA = 0x15
FW_CFG_FILE_DIR = 0x19

FW_CFG_WRITE_CHANNEL = 0x4000  # in a key: to be written, which is ignored since QEMU 2.4
FW_CFG_VERSION = 0x01  # the traditional interface, and no DMA

SELECTOR, DATA = range(2)  # offsets of the ports


class FwCfg:
    """The items, and how far the guest has read in one of them."""

    size = 2

    def __init__(self, memory: int, cpus: int, command_line: bytes = b"") -> None:
        """`memory` is all RAM in bytes; `command_line` is without a NUL at its end."""
        self._items = {
            FW_CFG_SIGNATURE: b"QEMU",
            FW_CFG_ID: FW_CFG_VERSION.to_bytes(4, "little"),
            FW_CFG_RAM_SIZE: memory.to_bytes(8, "little"),
            FW_CFG_NB_CPUS: cpus.to_bytes(2, "little"),
            FW_CFG_MAX_CPUS: cpus.to_bytes(2, "little"),
            FW_CFG_CMDLINE_SIZE: (len(command_line) + 1).to_bytes(4, "little"),
            FW_CFG_CMDLINE_DATA: command_line + b"\0",
            FW_CFG_FILE_DIR: bytes(4),  # the number of files; as many entries would follow
        }
        self._lock = threading.Lock()  # guards all below
        self._item = self._items[FW_CFG_SIGNATURE]
        self._position = 0

    def reset(self) -> None:
        """Back to the beginning of the signature."""
        self._select(FW_CFG_SIGNATURE)

    def _select(self, key: int) -> None:
        with self._lock:
            self._item = self._items.get(key & ~FW_CFG_WRITE_CHANNEL, b"")
            self._position = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the item, at either port.  Wider reads give 0 and take nothing."""
        if size != 1:
            return 0
        with self._lock:
            position = self._position
            if position == len(self._item):
                return 0
            self._position += 1
            return self._item[position]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item; all other writes are ignored."""
        if offset == SELECTOR and size == 2:
            self._select(value)

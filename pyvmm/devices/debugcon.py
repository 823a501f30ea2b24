"""The debug console at port 0xE9: what is written there is printed.  Reads give 0xE9.

Bochs invented it, QEMU has it as `-device isa-debugcon`: a guest can tell that it is there.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.bytewise import BytewiseDevice

DEBUGCON_PORT = 0xE9


class DebugConsole(BytewiseDevice):
    """Prints through `transmit`."""

    size = 1

    def __init__(self, transmit: Callable[[bytes], None]) -> None:
        self._transmit = transmit

    def read_byte(self, offset: int) -> int:
        """The mark by which a guest knows the console."""
        return DEBUGCON_PORT

    def write_byte(self, offset: int, value: int) -> None:
        """Print a byte."""
        self._transmit(bytes((value,)))

    def write_many(self, data: bytes) -> None:
        """Print bytes that were written one after the other."""
        self._transmit(data)

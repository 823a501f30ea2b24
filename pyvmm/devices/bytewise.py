"""Base of devices whose registers are one byte wide."""

from __future__ import annotations


class BytewiseDevice:
    """Splits wider accesses into bytes at consecutive offsets, as the ISA bus does.

    Offsets behind the device's range (an access over its end) read all ones and ignore writes.
    """

    size: int

    def read_byte(self, offset: int) -> int:
        """The register at `offset`."""
        raise NotImplementedError

    def write_byte(self, offset: int, value: int) -> None:
        """Set the register at `offset`."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> int:
        """See bus.Device."""
        if size == 1:
            return self.read_byte(offset)
        return sum(
            (self.read_byte(offset + n) if offset + n < self.size else 0xFF) << 8 * n
            for n in range(size)
        )

    def write(self, offset: int, size: int, value: int) -> None:
        """See bus.Device."""
        for n in range(size):
            if offset + n < self.size:
                self.write_byte(offset + n, value >> 8 * n & 0xFF)

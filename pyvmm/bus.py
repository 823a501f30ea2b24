"""Which device answers at a port or a guest-physical address.

The bus knows ranges, devices know offsets into theirs.  Addresses that nobody claims read all ones
and ignore writes, as on a PC without a card in the slot, and are logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

log = logging.getLogger("pyvmm")


class Device(Protocol):
    """What the bus needs of a device.  Calls come from any vCPU's thread."""

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset` of the device's range."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `size` bytes, little-endian in `value`, at `offset` of the device's range."""


class CallbackDevice:
    """A device made of two functions; a missing one reads all ones or ignores the write."""

    def __init__(
        self,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self._read, self._write = read, write

    def read(self, offset: int, size: int) -> int:
        return self._read(offset, size) if self._read else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if self._write:
            self._write(offset, size, value)


class Claim(NamedTuple):
    """A range of addresses and the device behind it; `name` is for messages."""

    start: int
    size: int
    device: Device
    name: str


class Bus:
    """One address space: the ports, or guest-physical memory outside of RAM."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.claims: list[Claim] = []
        self._found: dict[tuple[int, int], Claim | None] = {}  # lookups made before
        self._logged: set[int] = set()

    def claim(self, start: int, size: int, device: Device, name: str) -> None:
        """Put `device` at [start, start + size).  Raises ValueError if part of it is taken."""
        if size <= 0 or start < 0:
            raise ValueError(f"{name}: no range of {size} at {start:#x}")
        for other in self.claims:
            if start < other.start + other.size and other.start < start + size:
                raise ValueError(
                    f"{self.name} {start:#x}..{start + size - 1:#x} for {name} "
                    f"is taken by {other.name}"
                )
        self.claims.append(Claim(start, size, device, name))
        self._found.clear()

    def read(self, address: int, size: int) -> int:
        """What the guest reads: `size` bytes at `address`, little-endian in an int."""
        claim = self._find(address, size)
        if claim is None:
            return (1 << 8 * size) - 1
        return claim.device.read(address - claim.start, size) & (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """The guest writes `size` bytes at `address`."""
        claim = self._find(address, size)
        if claim is not None:
            claim.device.write(address - claim.start, size, value)

    def _find(self, address: int, size: int) -> Claim | None:
        key = address, size
        try:
            return self._found[key]
        except KeyError:
            pass
        # An access that runs over the end of a range still belongs to the device it starts in.
        claim = next((c for c in self.claims if 0 <= address - c.start < c.size), None)
        if claim is None and address not in self._logged and len(self._logged) < 1000:
            self._logged.add(address)
            log.info("nothing at %s %#x (%d bytes)", self.name, address, size)
        if len(self._found) < 4096:  # a guest can touch any number of addresses
            self._found[key] = claim
        return claim

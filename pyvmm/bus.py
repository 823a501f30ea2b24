"""Which device answers at a port or a guest-physical address.

The bus knows ranges, devices know offsets into theirs.  Addresses that nobody claims read all ones
and ignore writes, as on a PC without a card in the slot, and are logged once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from pyvmm.light import NamedTuple, Protocol


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


NOTHING: Device = CallbackDevice()  # where there is no device


class LateDevices:
    """Devices that are made, and their module imported, when the guest first looks for one."""

    def __init__(self, make: Callable[[], Mapping[int, Device]]) -> None:
        """`make` returns them by their first port."""
        self._make = make
        self._lock = threading.Lock()  # guards `made`
        self.made: Mapping[int, Device] = {}

    def get(self, port: int) -> Device:
        """The device at `port`."""
        with self._lock:
            self.made = self.made or self._make()
            return self.made[port]

    def at(self, port: int) -> Device:
        """What stands for the device at `port` on the bus."""
        return CallbackDevice(
            lambda offset, size: self.get(port).read(offset, size),
            lambda offset, size, value: self.get(port).write(offset, size, value),
        )


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
        self._found: dict[tuple[int, int], tuple[Device, int]] = {}  # lookups made before
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
        device, offset = self._found.get((address, size)) or self._find(address, size)
        return device.read(offset, size) & (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """The guest writes `size` bytes at `address`."""
        device, offset = self._found.get((address, size)) or self._find(address, size)
        device.write(offset, size, value)

    def _find(self, address: int, size: int) -> tuple[Device, int]:
        """The device behind an address, and the offset there."""
        # An access that runs over the end of a range still belongs to the device it starts in.
        for claim in self.claims:
            if 0 <= address - claim.start < claim.size:
                found = claim.device, address - claim.start
                break
        else:
            found = NOTHING, 0
            self._log_once(address, size)
        if len(self._found) < 4096:  # a guest can touch any number of addresses
            self._found[address, size] = found
        return found

    def _log_once(self, address: int, size: int) -> None:
        if address not in self._logged and len(self._logged) < 1000:
            import logging  # here, because it would make every start longer by 5 ms

            self._logged.add(address)
            logging.getLogger("pyvmm").info(
                "nothing at %s %#x (%d bytes)", self.name, address, size
            )

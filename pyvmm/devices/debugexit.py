"""The debug-exit port 0xF4: a guest ends the VM with a status, as with QEMU's `isa-debug-exit`."""

from __future__ import annotations

from collections.abc import Callable

DEBUG_EXIT_PORT = 0xF4


class DebugExit:
    """Calls `ended` with the exit status of the process: (value << 1) | 1, so it is always odd."""

    size = 4

    def __init__(self, ended: Callable[[int], None]) -> None:
        self._ended = ended

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the VM.  Only the low byte of a status survives exit(2), as in QEMU."""
        self._ended((value << 1 | 1) & 0xFF)

"""`--trace`: each exit as a line, readable like strace, and a table of them at the end.

A tracer wraps the table of exit handlers; a guest that is not traced pays nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

from pyvmm import exits
from pyvmm.cpustate import Register
from pyvmm.vcpu import Handler, VcpuThread

_INTERNAL = (exits.Debug, exits.Ended)  # made by pyvmm, not exits of the guest


class Tracer:
    """Prints exits to `out` and sums them up."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._lock = threading.Lock()  # guards _totals, and keeps lines whole
        self._totals: dict[str, tuple[int, float]] = {}  # kind -> (count, seconds)

    def wrap(self, handlers: dict[type, Handler]) -> dict[type, Handler]:
        """The same table, with each handler traced."""
        return {k: h if k in _INTERNAL else self._traced(h) for k, h in handlers.items()}

    def _traced(self, handler: Handler) -> Handler:
        def traced(cpu: VcpuThread, exit: Any) -> None:
            rip = cpu.vm.get_register(cpu.vcpu_id, Register.RIP)
            read = isinstance(exit, exits.InOut) and exit.is_in
            read = read or (isinstance(exit, exits.Mmio) and not exit.is_write)
            started = time.perf_counter()
            try:
                handler(cpu, exit)
            finally:
                seconds = time.perf_counter() - started
                # What a read gave is known only now, and is the point of the line.
                data = cpu.vm.answered(cpu.vcpu_id) if read else getattr(exit, "data", b"")
                with self._lock:
                    count, total = self._totals.get(kind(exit), (0, 0.0))
                    self._totals[kind(exit)] = count + 1, total + seconds
                    print(f"vcpu{cpu.vcpu_id} {rip:#x} {describe(exit, data)}", file=self._out)

        return traced

    def summary(self) -> str:
        """The table: exits by kind, the most frequent first."""
        rows = sorted(self._totals.items(), key=lambda row: -row[1][0])
        lines = [f"{'exits':>10}  {'handled in':>12}  {'each':>10}  kind"]
        for name, (count, seconds) in rows:
            each = seconds / count * 1e6
            lines.append(f"{count:>10}  {seconds * 1e3:>9.3f} ms  {each:>7.1f} us  {name}")
        total = sum(count for count, _ in self._totals.values())
        seconds = sum(seconds for _, seconds in self._totals.values())
        lines.append(f"{total:>10}  {seconds * 1e3:>9.3f} ms  {'':>10}  total")
        return "\n".join(lines)


def kind(exit: exits.Exit) -> str:
    """What exits are summed up under: the direction and the port count, the value does not."""
    if isinstance(exit, exits.InOut):
        return f"{'in' if exit.is_in else 'out'} {exit.port:#x}"
    if isinstance(exit, exits.Mmio):
        return f"mmio {'write' if exit.is_write else 'read'}"
    return exit.name.lower()


def describe(exit: exits.Exit, data: bytes) -> str:
    """An exit with what was read or written: `out 0x3f8 <- 0x48 'H'`."""
    if isinstance(exit, exits.InOut):
        arrow = "->" if exit.is_in else "<-"
        repeated = f" x{exit.count}" if exit.count > 1 else ""
        width = {2: "w", 4: "l"}.get(exit.size, "")
        direction = "in" if exit.is_in else "out"
        return f"{direction}{width} {exit.port:#x}{repeated} {arrow} {_value(data, exit.size)}"
    if isinstance(exit, exits.Mmio):
        arrow = "<-" if exit.is_write else "->"
        direction = "write" if exit.is_write else "read"
        return f"mmio {direction}{8 * exit.size} {exit.gpa:#x} {arrow} {_value(data, exit.size)}"
    facts = vars(exit)
    return " ".join((exit.name.lower(), *(f"{name}={value}" for name, value in facts.items())))


def _value(data: bytes, size: int) -> str:
    if len(data) > size:
        return repr(data)
    number = int.from_bytes(data, "little")
    return f"{number:#x} {chr(number)!r}" if size == 1 and 32 <= number < 127 else f"{number:#x}"

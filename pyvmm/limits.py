"""A limit on the number of exits of a whole machine."""

from __future__ import annotations

import threading

from pyvmm import exits, vcpu
from pyvmm.debuggedset import ALL
from pyvmm.light import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.machine import Machine


class ExitLimiter:
    """Counts exits of all vCPUs and stops each vCPU at the limit."""

    def __init__(self, machine: Machine, limit: int) -> None:
        self._machine = machine
        self._lock = threading.Lock()
        self.limit = limit
        self._left = limit  # guarded by _lock
        self.reached = limit <= 0

    def wrap(self, handlers: dict[type, vcpu.Handler]) -> dict[type, vcpu.Handler]:
        free = (exits.Debug, exits.Ended)  # made by pyvmm, not exits of the guest
        return {k: h if k in free else self._count(h) for k, h in handlers.items()}

    def _count(self, handler: vcpu.Handler) -> vcpu.Handler:
        def counted(cpu: vcpu.VcpuThread, exit: exits.Exit) -> None:
            with self._lock:
                self._left -= 1
                self.reached = self._left <= 0
            if self.reached:  # before the handler: it may sleep
                self._machine.vm.suspend_cpu(ALL)
                self._machine.wake()
            handler(cpu, exit)

        return counted

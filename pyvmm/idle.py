"""Notices that no vCPU can ever run again, where KVM does not say so.

With an in-kernel irqchip `hlt` does not leave the guest: the vCPU waits in KVM_RUN.  If all wait
with interrupts off, nothing can wake them, and the guest has ended.  KVM's statistics tell that a
vCPU waits without disturbing it.  Only when all do, and have executed something since the last
time, are they held for a moment to look at their flags.  A kernel without these statistics (they
came with 5.17) has them held each time.
"""

from __future__ import annotations

from contextlib import suppress

from pyvmm.hypervisor import VM
from pyvmm.kvm import KvmError
from pyvmm.stats import Statistic

_PATIENCE_SECONDS = 5.0


class IdleWatch:
    """Watches the vCPUs of one VM; check() is to be called a few times a second."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        handles = [vm.handle_of(vcpu_id) for vcpu_id in vm.vcpu_ids()]
        self._waiting: list[Statistic] = []
        self._exits: list[Statistic] = []
        with suppress(KvmError, KeyError):
            self._waiting = [Statistic(handle, "blocking") for handle in handles]
            self._exits = [Statistic(handle, "exits") for handle in handles]
        self._looked_at: list[int] = []

    def check(self) -> bool:
        """Whether all vCPUs wait for an interrupt that cannot come.

        If so they stay held: nobody is to find them stopped before the VM has been ended.
        """
        if not all(waiting.read() for waiting in self._waiting):
            return False
        exits = [count.read() for count in self._exits]
        if exits and exits == self._looked_at:  # they wait just as they did at the last look
            return False
        if not self._vm.hold_unless_debugged("idle"):
            return False
        for_good = False
        try:
            self._looked_at = exits
            late = self._vm.wait_out(_PATIENCE_SECONDS)
            for_good = not late and self._vm.all_wait_for_good()
        finally:
            if not for_good:
                self._vm.release("idle")
        return for_good

    def close(self) -> None:
        """Close the statistics."""
        for statistic in self._waiting + self._exits:
            statistic.close()

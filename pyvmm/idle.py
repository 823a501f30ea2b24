"""Notices that no vCPU can ever run again, where KVM does not say so.

With an in-kernel irqchip `hlt` does not leave the guest: the vCPU waits in KVM_RUN.  If all wait
with interrupts off, nothing can wake them, and the guest has ended.  KVM's statistics tell that a
vCPU waits without disturbing it.  Only when all do, and have executed something since the last
time, are they held for a moment to look at their flags.
"""

from __future__ import annotations

from pyvmm.hypervisor import VM
from pyvmm.stats import Statistic

_PATIENCE_SECONDS = 5.0


class IdleWatch:
    """Watches the vCPUs of one VM; check() is to be called a few times a second."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        handles = [vm.handle_of(vcpu_id) for vcpu_id in vm.vcpu_ids()]
        self._waiting = [Statistic(handle, "blocking") for handle in handles]
        self._exits = [Statistic(handle, "exits") for handle in handles]
        self._looked_at: list[int] = []

    def check(self) -> bool:
        """Whether all vCPUs wait for an interrupt that cannot come."""
        if self._vm.debug_cpus() or not all(waiting.read() for waiting in self._waiting):
            return False
        exits = [count.read() for count in self._exits]
        if exits == self._looked_at:
            return False
        self._looked_at = exits
        self._vm.hold()
        try:
            late = self._vm.wait_held(_PATIENCE_SECONDS)
            return not late and self._vm.all_wait_for_good()
        finally:
            self._vm.release()

    def close(self) -> None:
        """Close the statistics."""
        for statistic in self._waiting + self._exits:
            statistic.close()

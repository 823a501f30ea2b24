"""Which vCPUs may execute guest instructions: the debugged set, kicks, parking.

A vCPU executes guest instructions only when it is *active* (it has a thread), *started* (not
waiting for its start-up IPI; the kernel keeps that state) and not *debugged*.  These are three
separate things.  vm.suspend_cpu() puts a vCPU into the debugged set and vm.resume_cpu() takes it
out; while it is in there, vm.run() returns a Debug exit at once, and the vCPU's thread sleeps in
vm.sleep() until it is resumed.  It is then *parked*, and its registers may be touched from other
threads.

                     suspend_cpu                    vm.run() returns Debug, vm.sleep()
        running ---------------------> debugged ---------------------------------------> parked
           ^                              | resume_cpu                                      |
           +------------------------------+-------------------------- resume_cpu ----------+

Kicks.  A vCPU inside KVM_RUN is brought out by KICK_SIGNAL.  Its thread keeps that signal blocked
and only KVM_RUN unblocks it (KVM_SET_SIGNAL_MASK).  So a kick that arrives at any other moment
stays pending and interrupts the next KVM_RUN at once: it cannot be lost, and no handler is needed.

Locking.  VM._lock guards the fields of VcpuRecord that say so.  It is held for a few instructions
only, never while in KVM_RUN, and nothing is called back with it held.  `attention` is what the hot
path reads without the lock: whoever changes a fact that vm.run() must look at sets it *before* the
kick.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Iterable

from pyvmm.vcpurecord import KICK_SIGNAL, VcpuRecord, VmError

ALL = -1  # for suspend_cpu() and resume_cpu(): every vCPU


def _nothing() -> None:
    pass


class DebuggedSet:
    """The vCPUs of a VM, and which of them may run.  hypervisor.VM is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._vcpus: dict[int, VcpuRecord] = {}
        self._parked = threading.Condition(self._lock)  # a vCPU has parked, or the VM has ended
        self._holders: set[str] = set()  # guarded by _lock: between hold() and release()
        self._all_suspended = False  # guarded by _lock: newcomers are debugged from the start
        self._ended = False  # guarded by _lock; once True, never False again
        self.on_parked: Callable[[], None] = _nothing  # called when the last one parks

    # --- vCPUs and their threads -----------------------------------------------------------------

    def vcpu_ids(self) -> list[int]:
        """The ids of all vCPUs, in order."""
        return sorted(self._vcpus)

    def _record(self, vcpu_id: int) -> VcpuRecord:
        vcpu = self._vcpus.get(vcpu_id)
        if vcpu is None:
            raise VmError(errno.EINVAL, f"no vCPU {vcpu_id}")
        return vcpu

    def activate_cpu(self, vcpu_id: int) -> None:
        """Make the calling thread the one that runs `vcpu_id`, and the vCPU active.

        Blocks KICK_SIGNAL in this thread.  A vCPU that is activated while all are suspended is
        debugged from the start, and so parks before its first instruction.
        """
        vcpu = self._record(vcpu_id)
        with self._lock:
            if vcpu.thread_id is not None:
                raise VmError(errno.EBUSY, f"vCPU {vcpu_id} has a thread already")
            inside_kvm_run = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL}) - {KICK_SIGNAL}
            vcpu.handle.set_signal_mask(inside_kvm_run)
            vcpu.thread_id = threading.get_ident()
            vcpu.debugged = vcpu.debugged or self._all_suspended
            vcpu.held = bool(self._holders)
            vcpu.update_attention()

    def deactivate_cpu(self, vcpu_id: int) -> None:
        """The calling thread stops running `vcpu_id`; it is no longer active, nor debugged."""
        vcpu = self._record(vcpu_id)
        with self._lock:  # from here on nobody sends the signal to this thread
            vcpu.thread_id = None
            vcpu.debugged = vcpu.held = False
            vcpu.update_attention()
            self._parked.notify_all()
        self.take_kick(vcpu)

    def active_cpus(self) -> frozenset[int]:
        """The ids of the vCPUs that have a thread."""
        with self._lock:
            return frozenset(v.vcpu_id for v in self._vcpus.values() if v.thread_id is not None)

    def debug_cpus(self) -> frozenset[int]:
        """The ids in the debugged set."""
        with self._lock:
            return frozenset(v.vcpu_id for v in self._vcpus.values() if v.debugged)

    def halted_cpus(self) -> frozenset[int]:
        """The ids of the vCPUs that executed `hlt` and have not been woken."""
        with self._lock:
            return frozenset(v.vcpu_id for v in self._vcpus.values() if v.halted)

    # --- kicks -----------------------------------------------------------------------------------

    def kick(self, vcpu_id: int) -> None:
        """Bring `vcpu_id` out of KVM_RUN, now or at its next entry, to look at its state again."""
        vcpu = self._record(vcpu_id)
        with self._lock:
            self._kick(vcpu)

    def _kick(self, vcpu: VcpuRecord) -> None:
        # The lock guards "this thread still exists": pthread_kill on a finished one may crash.
        if vcpu.thread_id == threading.get_ident():
            return  # it looks at `attention` before it enters; a kick would only undo its next step
        vcpu.wake.notify_all()
        if vcpu.thread_id is not None and not vcpu.asleep and not vcpu.kicked:
            vcpu.kicked = True  # one at a time: real-time signals queue up
            signal.pthread_kill(vcpu.thread_id, KICK_SIGNAL)

    def _changed(self, vcpu: VcpuRecord) -> None:
        """KVM must be told before the next entry; only the vCPU's own thread can (lock held)."""
        vcpu.stale = True
        vcpu.update_attention()
        if not vcpu.asleep:  # else it looks when it wakes up
            self._kick(vcpu)

    def take_kick(self, vcpu: VcpuRecord) -> None:
        """KVM_RUN was interrupted: take the signal away, on the vCPU's own thread.

        Whoever kicks after `kicked` was cleared sends another one; whoever found it set has changed
        what the run loop is about to look at.
        """
        signal.sigtimedwait({KICK_SIGNAL}, 0)
        with self._lock:
            vcpu.kicked = False

    # --- the debugged set ----------------------------------------------------------------------

    def suspend_cpu(self, vcpu_id: int) -> None:
        """Put an active vCPU, or ALL that are active now, into the debugged set and kick it.

        Returns at once; wait_parked() waits until it executes nothing more.  Suspending a debugged
        vCPU is fine.  Raises VmError (EINVAL) for an unknown or inactive one; ALL never fails.
        """
        with self._lock:
            if vcpu_id == ALL:
                self._all_suspended = True
                chosen = [v for v in self._vcpus.values() if v.thread_id is not None]
            else:
                chosen = [self._record(vcpu_id)]
                if chosen[0].thread_id is None:
                    raise VmError(errno.EINVAL, f"vCPU {vcpu_id} is not active")
            for vcpu in chosen:
                vcpu.debugged = True
                vcpu.update_attention()
                self._kick(vcpu)
            self._parked.notify_all()  # those that sleep already are parked by this

    def resume_cpu(self, vcpu_id: int) -> None:
        """Take a vCPU, or ALL, out of the debugged set; it executes guest instructions again.

        Raises VmError (EINVAL) for one that is unknown or not debugged; ALL never fails.
        """
        with self._lock:
            if vcpu_id == ALL:
                self._all_suspended = False
                chosen = [v for v in self._vcpus.values() if v.debugged]
            else:
                chosen = [self._record(vcpu_id)]
                if not chosen[0].debugged:
                    raise VmError(errno.EINVAL, f"vCPU {vcpu_id} is not suspended")
            for vcpu in chosen:
                vcpu.debugged = False
                vcpu.update_attention()
                vcpu.wake.notify_all()
            self._parked.notify_all()  # nobody need wait for these to park any more

    def hold_newcomers(self, hold: bool) -> None:
        """Whether a vCPU that is activated from now on is debugged from the start.

        suspend_cpu(ALL) implies it and resume_cpu(ALL) the opposite; for whoever resumes some.
        """
        with self._lock:
            self._all_suspended = hold

    def wait_parked(self, vcpu_ids: Iterable[int], timeout: float | None = None) -> frozenset[int]:
        """Wait until each of `vcpu_ids` that is debugged is parked, or the VM has ended.

        Returns those that are not parked after `timeout` seconds: empty when the stop is complete.
        """
        wanted = [self._record(vcpu_id) for vcpu_id in vcpu_ids]

        def late() -> frozenset[int]:
            return frozenset(v.vcpu_id for v in wanted if v.debugged and not v.parked)

        with self._lock:
            self._parked.wait_for(lambda: self._ended or not late(), timeout)
            return late()

    def hold(self, holder: str) -> None:
        """Keep every vCPU out of the guest until release(), for the machine's own purposes.

        There can be several holders: the guest runs when the last one releases it.  The debugged
        set stays as it is.  Returns at once; on a vCPU's thread too, whose next vm.run() then does
        not enter.
        """
        with self._lock:
            self._hold(holder)

    def hold_unless_debugged(self, holder: str) -> bool:
        """hold(), and True; or nothing, and False, if a vCPU is debugged.

        A vCPU that is held is not parked: a debugger that has stopped it could not look at it.
        """
        with self._lock:
            if any(vcpu.debugged for vcpu in self._vcpus.values()):
                return False
            self._hold(holder)
            return True

    def _hold(self, holder: str) -> None:
        self._holders.add(holder)
        for vcpu in self._vcpus.values():
            if vcpu.thread_id is not None:
                vcpu.held = True
                vcpu.update_attention()
                self._kick(vcpu)

    def wait_out(self, timeout: float | None = None) -> frozenset[int]:
        """Wait until all that are held or debugged are out of the guest, and out of its devices.

        Returns those that are not after `timeout` seconds.
        """

        def late() -> frozenset[int]:
            vcpus = self._vcpus.values()
            return frozenset(v.vcpu_id for v in vcpus if (v.held or v.debugged) and not v.asleep)

        with self._lock:
            self._parked.wait_for(lambda: self._ended or not late(), timeout)
            return late()

    def release(self, holder: str) -> None:
        """End what hold() began."""
        with self._lock:
            self._holders.discard(holder)
            if self._holders:
                return
            for vcpu in self._vcpus.values():
                vcpu.held = False
                vcpu.update_attention()
                vcpu.wake.notify_all()
            self._parked.notify_all()
            complete = self._stop_is_complete()
        if complete:
            self.on_parked()

    def _stop_is_complete(self) -> bool:
        """Whether there are debugged vCPUs, and all of them are parked (lock held)."""
        debugged = [v for v in self._vcpus.values() if v.debugged]
        return bool(debugged) and all(v.parked for v in debugged)

    def sleep(self, vcpu_id: int) -> None:
        """What a vCPU's thread does with a Debug or Hlt exit: sleep until vm.run() has news."""
        vcpu = self._record(vcpu_id)
        with self._lock:
            vcpu.asleep = True
            if vcpu.debugged or vcpu.held:
                self._parked.notify_all()
            complete = vcpu.debugged and self._stop_is_complete()
        if complete:
            # With no lock held, and not before: who is told would only wait for us again.
            self.on_parked()
        with self._lock:
            while not self._ended and (
                vcpu.debugged or vcpu.held or (vcpu.halted and not vcpu.nmi_wanted)
            ):
                vcpu.wake.wait()
            vcpu.asleep = False

    @property
    def ended(self) -> bool:
        """Whether end() was called."""
        return self._ended

    def end(self) -> None:
        """End the VM: every vm.run() returns Ended from now on, also of debugged vCPUs."""
        with self._lock:
            self._ended = True
            for vcpu in self._vcpus.values():
                vcpu.ended = True
                vcpu.update_attention()
                self._kick(vcpu)
            self._parked.notify_all()

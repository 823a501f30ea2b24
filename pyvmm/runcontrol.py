"""Run control: which vCPU's event stops the VM, who runs after it, and what a step is.

The debug server (debug.py) calls attach(), resume(), interrupt() and detach() on its thread; the
vCPUs' threads come here with Bpt, Mtrap, Db and crash exits (the handlers below, which replace
those of vcpu.py).  Nothing here knows packets or sockets.

A vCPU's state, from the debugger's point of view:

    idle ----(resume: step)----> stepping ----(Mtrap exit)----> stepped ---+
      |                                                                    |  the event is owed
      +------(Bpt exit at a breakpoint)-----------------------> hit -------+
                                                                           |
    idle <--(reported: this vCPU's event stopped the VM, or discarded)-----+

and the VM's:

    running ---(an event claims the stop, or ^C)---> stopping ---(all parked)---> stopped
       ^                                                                            |
       +------------------------------ resume, detach ------------------------------+

- The first event claims the stop: `_stop` is set and all vCPUs are suspended.  The others park in
  their handlers; the resume that would let them run reports them instead, before anybody executes
  an instruction.  So vCPUs that hit at the same moment are reported one after the other.  (A
  *finished step* is discarded instead when its vCPU is resumed: the resume says anew what the
  vCPU shall do.)
- The vCPU that was reported least recently is reported, and woken, first.  Where CPUs are few, the
  one woken first may stop the VM before the others have run: it must not always be the same one.
- A breakpoint event is discarded if the breakpoint is gone by then: the guest's own instruction is
  back in memory and is simply executed.
- Every stop disarms all steps.  Detaching also takes out all breakpoints.

`_lock` guards everything here.  It is taken before VM._lock and never held while waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from pyvmm import exits, kvm, vcpu, x86
from pyvmm.breakpoints import Breakpoints
from pyvmm.cpustate import Register
from pyvmm.debuggedset import ALL
from pyvmm.hypervisor import VM
from pyvmm.target import (
    SIGABRT,
    SIGINT,
    SIGSEGV,
    SIGTRAP,
    Action,
    ActionKind,
    BreakpointKind,
    StopKind,
    StopReport,
)
from pyvmm.vcpu import Handler, StopVm, VcpuThread
from pyvmm.vcpurecord import Capability, VmError

_WATCH_STOPS = {
    BreakpointKind.HARDWARE: StopKind.HWBREAK,
    BreakpointKind.WRITE: StopKind.WATCH,
    BreakpointKind.READ: StopKind.RWATCH,
    BreakpointKind.ACCESS: StopKind.AWATCH,
}


def _always() -> bool:
    return True


def crash_signal(exit: exits.Exit | None) -> int:
    """What a debugger is told that has killed the guest."""
    return SIGSEGV if isinstance(exit, exits.Shutdown) else SIGABRT


class VcpuState:
    """What run control knows of one vCPU."""

    def __init__(self) -> None:
        self.stepping: Action | None = None  # STEP or RANGE_STEP, armed
        self.owed: StopReport | None = None  # an event that is not reported yet
        self.stepped = False  # the owed event is a finished step, and nothing more
        self.still_valid: Callable[[], bool] = _always  # asked before it is reported
        self.reported = 0  # the number of the stop that named it last


class RunControl:
    """Run control of one VM."""

    def __init__(self, vm: VM, on_stop: Callable[[], None], catch_int3: bool = False) -> None:
        """`on_stop` is called when a stop is complete: by the vCPU's thread that parks last.

        `catch_int3`: stop at the guest's own int3, unless a debugger says otherwise.
        """
        self.vm = vm
        self.catch_int3 = catch_int3
        self.breakpoints = Breakpoints(vm)
        vm.on_parked = on_stop
        self._lock = threading.Lock()
        self._attached = False
        self._stop: StopReport | None = None  # claimed: the VM is stopping or stopped
        self._stops = 0  # how many have been claimed
        self._running: frozenset[int] = frozenset()  # whom the debugger resumed last; none: all
        self._newcomers_run = True
        self._resets = 0
        self._may_run = False  # between let_run() and keep_still()
        self._states: dict[int, VcpuState] = {}

    def handlers(self) -> dict[type, Handler]:
        """What replaces rows of vcpu.HANDLERS."""
        return {
            exits.Bpt: self._on_bpt,
            exits.Mtrap: self._on_mtrap,
            exits.Db: self._on_db,
            **{
                kind: self._on_crash
                for kind, handler in vcpu.HANDLERS.items()
                if handler is vcpu.handle_crash and kind not in (exits.Bpt, exits.Mtrap, exits.Db)
            },
        }

    # --- for the debug server's thread -----------------------------------------------------------

    @property
    def stop(self) -> StopReport | None:
        """Why the VM is stopping or stopped; None while it runs."""
        with self._lock:
            return self._stop

    def hold(self) -> None:
        """Count as stopped before the first instruction; the vCPUs are suspended already."""
        with self._lock:
            self._stop = StopReport(0)

    def let_run(self) -> None:
        """The machine is run: resume the vCPUs, unless they are stopped for a debugger.

        If a debugger has resumed some already, or had before a limit stopped the machine, then
        only those.
        """
        with self._lock:
            self._may_run = True
            if self._stop is None:
                self._resume(self._running or self.vm.active_cpus(), self._newcomers_run)

    def keep_still(self) -> None:
        """A limit has stopped the machine: whoever is resumed from now on runs after let_run()."""
        with self._lock:
            self._may_run = False

    def attach(self) -> None:
        """A debugger is there: stop the VM for it, if it runs."""
        with self._lock:
            self._attached = True
            if self._stop is None:
                self._claim(StopReport(self._first_vcpu()))

    def interrupt(self) -> bool:
        """Stop the VM and report SIGINT; False if it stops, or has stopped, for another reason."""
        with self._lock:
            self._attached = True
            if self._stop is None:
                self._claim(StopReport(self._first_vcpu(), SIGINT))
                return True
            return self._stop.signal == SIGINT

    def _first_vcpu(self) -> int:
        """Whom to name for a stop that is nobody's event: one of those that run."""
        active = self.vm.active_cpus()
        return min(active & self._running or active, default=0)

    def wait_stopped(self, timeout: float) -> frozenset[int]:
        """Wait until the stop is complete; those that are not parked after `timeout` s."""
        return self.vm.wait_parked(self.vm.vcpu_ids(), timeout)

    def resume(self, actions: Mapping[int, Action], newcomers_run: bool) -> None:
        """Let the vCPUs in `actions` run; the others stay parked.

        Raises VmError, with nothing done: ENOTSUP, or EBUSY while the machine is being reset.
        """
        with self._lock:
            self.breakpoints.prepare_to_run(min(actions))
            for vcpu_id, action in actions.items():
                stepping = action.kind is not ActionKind.CONTINUE
                self.vm.set_capability(vcpu_id, Capability.MTRAP_EXIT, stepping)
                if action.kind is ActionKind.RANGE_STEP:
                    self.vm.set_step_range(vcpu_id, range(action.start, action.end))
            for vcpu_id, action in actions.items():
                state = self._state(vcpu_id)
                state.stepping = None if action.kind is ActionKind.CONTINUE else action
                if state.stepped:
                    state.owed = None  # superseded by this action
            stop, self._stop = self._stop, None
            try:
                for vcpu_id in self._in_turn(actions):
                    self._try_to_report(vcpu_id)
            except OSError:
                self._stop = stop
                raise
            if self._stop is not None:
                return  # an event was waiting: nobody runs before it is reported
            self._running, self._newcomers_run = frozenset(actions), newcomers_run
            self._resume(self._running, newcomers_run)

    def _resume(self, vcpu_ids: frozenset[int], newcomers_run: bool) -> None:
        if not self._may_run:
            return
        self.vm.hold_newcomers(not newcomers_run)
        for vcpu_id in self._in_turn(vcpu_ids & self.vm.debug_cpus()):
            with suppress(VmError):  # one that was resumed before it has ended the VM
                self.vm.resume_cpu(vcpu_id)

    def _in_turn(self, vcpu_ids: Iterable[int]) -> list[int]:
        """The vCPU that was reported least recently comes first."""
        return sorted(vcpu_ids, key=lambda vcpu_id: self._state(vcpu_id).reported)

    def detach(self) -> None:
        """Make the guest as if no debugger had ever been there, and let it run.

        All vCPUs must be parked (interrupt() and wait_stopped() before).
        """
        with self._lock:
            self._attached = False
            self._disarm_steps()
            for state in self._states.values():
                state.owed = None
            self.breakpoints.clear()
            self.breakpoints.catch_int3 = self.catch_int3
            self._running, self._newcomers_run = frozenset(), True
            self._stop = None
            if self._may_run:
                self.vm.resume_cpu(ALL)

    def after_reset(self) -> None:
        """The machine was reset, and its image loaded again: keep the breakpoints in it.

        All vCPUs are held.  Events from before are of a guest that is gone; a stop that was claimed
        for one is still a stop.
        """
        with self._lock:
            self._resets += 1
            for state in self._states.values():
                state.owed = None
            if self._stop is not None and self._stop.signal != SIGINT:
                self._stop = StopReport(self._stop.vcpu_id)
            self.breakpoints.plant_again()

    # --- claiming a stop (with _lock held) -------------------------------------------------------

    def _claim(self, report: StopReport) -> None:
        self._stop = report
        self._stops += 1
        self._state(report.vcpu_id).reported = self._stops
        self.vm.suspend_cpu(ALL)
        self._disarm_steps()

    def _disarm_steps(self) -> None:
        for vcpu_id, state in self._states.items():
            if state.stepping is not None:
                state.stepping = None
                self.vm.set_capability(vcpu_id, Capability.MTRAP_EXIT, False)

    def _state(self, vcpu_id: int) -> VcpuState:
        """Made when it is first asked for: vCPUs can be added (with _lock held)."""
        state = self._states.get(vcpu_id)
        if state is None:
            state = self._states[vcpu_id] = VcpuState()
        return state

    # --- for the vCPUs' threads ------------------------------------------------------------------

    def _try_to_report(self, vcpu_id: int, *, waited: bool = True) -> None:
        """Claim the stop for the event that a vCPU owes, or discard the event (with _lock held).

        One that has not had to wait is as valid as when it came: nobody could change anything.
        """
        state = self._state(vcpu_id)
        report = state.owed
        if report is None:
            return
        if not self._attached or (waited and not state.still_valid()):
            state.owed = None
        elif self._stop is None:
            state.owed = None
            self._claim(report)

    def _report(
        self,
        cpu: VcpuThread,
        report: StopReport,
        still_valid: Callable[[], bool] = _always,
        *,
        stepped: bool = False,
    ) -> None:
        """Stop the VM for an event of this vCPU; returns when it runs again.

        Another vCPU may own the stop: then wait, and try again when resumed.  `still_valid` is
        asked before each further try, by whoever resumes or by us; when it says no the event is
        discarded.
        """
        with self._lock:
            state = self._state(cpu.vcpu_id)
            state.owed, state.still_valid, state.stepped = report, still_valid, stepped
            self._try_to_report(cpu.vcpu_id, waited=False)
        while True:
            if cpu.vcpu_id in self.vm.debug_cpus():
                self.vm.sleep(cpu.vcpu_id)
            with self._lock:
                if state.owed is None or self.vm.ended:
                    return
                self._try_to_report(cpu.vcpu_id)

    def _on_bpt(self, cpu: VcpuThread, exit: exits.Bpt) -> None:
        """An int3, or our hlt.  Either it is a breakpoint, or it is the guest's own."""
        vcpu_id = cpu.vcpu_id
        gva = self._pc(vcpu_id)
        if self.breakpoints.at(vcpu_id, gva):
            self._report(
                cpu,
                StopReport(vcpu_id, SIGTRAP, StopKind.SWBREAK),
                lambda: self._pc(vcpu_id) == gva and self.breakpoints.at(vcpu_id, gva),
            )
            return
        if not self._int3_at_rip(vcpu_id):
            return  # ours, and removed since: the guest's instruction is back and is executed
        if self.breakpoints.catch_int3:
            self._report(
                cpu,
                StopReport(vcpu_id, SIGTRAP),
                lambda: self._pc(vcpu_id) == gva and self.breakpoints.catch_int3,
            )
            if self.vm.ended or self._pc(vcpu_id) != gva or not self._int3_at_rip(vcpu_id):
                return  # the debugger went somewhere else
        self._pass_to_guest(cpu, exit.inst_length)

    def _pass_to_guest(self, cpu: VcpuThread, inst_length: int) -> None:
        """Deliver the guest's own int3 to it, as one step if this vCPU is stepping."""
        vcpu_id = cpu.vcpu_id
        stepping = self.vm.get_capability(vcpu_id, Capability.MTRAP_EXIT)
        if stepping and self.vm.execute_in_software(vcpu_id):
            self._step_done(cpu)
            return
        self.vm.set_register(vcpu_id, Register.GUEST_ENTRY_INST_LENGTH, inst_length)
        self.vm.inject_exception(vcpu_id, x86.VECTOR_BP)

    def _on_mtrap(self, cpu: VcpuThread, exit: exits.Mtrap) -> None:
        self._step_done(cpu)

    def _step_done(self, cpu: VcpuThread) -> None:
        """Report it, unless it is one of a range and still inside."""
        vcpu_id = cpu.vcpu_id
        action = self._stepping(vcpu_id)
        if action is None:  # called off while it was under way
            return
        if action.kind is ActionKind.RANGE_STEP and action.start <= self._pc(vcpu_id) < action.end:
            return
        self._end_step(vcpu_id)
        self._report(cpu, StopReport(vcpu_id), stepped=True)

    def _stepping(self, vcpu_id: int) -> Action | None:
        with self._lock:
            return self._state(vcpu_id).stepping

    def _end_step(self, vcpu_id: int) -> None:
        with self._lock:
            self._state(vcpu_id).stepping = None
            self.vm.set_capability(vcpu_id, Capability.MTRAP_EXIT, False)

    def _on_db(self, cpu: VcpuThread, exit: exits.Db) -> None:
        """A debug register hit; or the guest debugs itself."""
        vcpu_id = cpu.vcpu_id
        watches = self.breakpoints.watches
        hits = [w for number, w in enumerate(watches) if exit.dr6 >> number & 1]
        if not hits:
            self._guests_own_db(vcpu_id, exit.dr6)
            return
        stepped = self._stepping(vcpu_id) is not None and exit.dr6 & x86.DR6_BS
        hits = [w for w in hits if not self.breakpoints.only_written(vcpu_id, w)]
        if not hits:
            if stepped:
                self._step_done(cpu)
            return
        if stepped:
            self._end_step(vcpu_id)
        watch = hits[0]
        report = StopReport(vcpu_id, SIGTRAP, _WATCH_STOPS[watch.kind], watch.gva)
        if watch.kind is not BreakpointKind.HARDWARE:
            self._report(cpu, report)  # data was touched, whatever becomes of the watchpoint
            return
        self._report(
            cpu,
            report,
            lambda: self._pc(vcpu_id) == watch.gva and watch in self.breakpoints.watches,
        )

    def _guests_own_db(self, vcpu_id: int, dr6: int) -> None:
        handle = self.vm.state(vcpu_id)
        debugregs = handle.get(kvm.kvm_debugregs)
        debugregs.dr6 |= dr6
        handle.set(debugregs)
        # When another exception is pending: the processor drops the trap then, too.
        with suppress(VmError):
            self.vm.inject_exception(vcpu_id, x86.VECTOR_DB)

    def _on_crash(self, cpu: VcpuThread, exit: exits.Exit) -> None:
        """The guest cannot go on: let the debugger look at it, and reset it, before the VM ends."""
        stop = cpu.machine.crash(cpu.vcpu_id, exit)
        why = f"{stop.message}\n{stop.report}\n"
        resets = self._resets
        self._report(cpu, StopReport(cpu.vcpu_id, crash_signal(exit), message=why))
        if self._resets == resets:
            raise StopVm(stop)

    def _pc(self, vcpu_id: int) -> int:
        """CS base + RIP, as a GVA."""
        handle = self.vm.state(vcpu_id)
        sregs, regs = handle.get(kvm.kvm_sregs), handle.get(kvm.kvm_regs)
        return x86.linear_address(sregs.cs.base, regs.rip, x86.cpu_mode(sregs, regs.rflags))

    def _int3_at_rip(self, vcpu_id: int) -> bool:
        cpu = self.vm.cpu(vcpu_id)
        return x86.int3_length(cpu.fetch(), cpu.mode) is not None

"""One single-step: exactly one instruction, whatever the instruction and the host.

KVM steps with the processor's trap flag, and by itself that goes wrong in four ways, which are made
up for here:

- `int3`, `int n`, `syscall`, `pushf` and some more lose the flag or show it to the guest: they are
  executed in software instead (emulate.py);
- an instruction that faults runs away into its handler: traps on the handlers (steptraps.py);
- some hosts stop again where they started (an EPT violation while the flag is armed, on emulated
  Intel): such a stop, with no register changed, is repeated;
- port I/O and MMIO leave the guest in the middle of the instruction: the hypervisor layer finishes
  the access without entering, and that ends the step.

A `rep` string instruction counts as one instruction for each stop the host makes in it, as with a
real trap flag, which stops after each repetition.  The last stop is behind it.
"""

from __future__ import annotations

import threading

from pyvmm import emulate, exits, injection, kvm, x86
from pyvmm.cpucopy import complete_in_software, copy_state, write_state
from pyvmm.decode import MTRAP, decode
from pyvmm.light import TYPE_CHECKING, NamedTuple
from pyvmm.memory import GuestMemory, VirtualMemory
from pyvmm.steptraps import (
    StepTraps,
    clear_saved_tf,
    undo_fault,
    undo_step_delivery,
)
from pyvmm.vcpurecord import Capability, VcpuRecord
from pyvmm.x86 import HLT, INT3

if TYPE_CHECKING:
    from pyvmm.hypervisor import VM

_HLT = bytes((HLT,))
_STRING_OPCODES = {
    bytes((n,)) for n in (*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0))
}
_MAX_REPEATS = 16  # stops without progress: one for each cold page that the instruction touches


class _Context(NamedTuple):
    """A vCPU's system registers, and what follows from them: seldom other from step to step."""

    system: bytes  # kvm_sregs
    cpu: emulate.Cpu  # not to be changed: it is kept for the next step
    mode: x86.CpuMode  # (RFLAGS.VM, too, decides it, but never changes alone)
    code_base: int
    trap: int | None  # what leaves the guest from a handler: see _trap_instruction()
    lends_gate: bool  # a host that delivers the step's #DB at CPL 3 needs a gate to do so


class Stepper:
    """Makes the single-steps of one VM, one at a time: the traps are in memory that all share."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        # Held while traps are planted, or the guard is lifted, also over KVM_RUN.
        self._lock = threading.RLock()
        self._traps = StepTraps(memory)
        self._contexts: dict[int, _Context] = {}  # by vcpu_id: as it was last

    def step(self, vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
        """Let `vcpu`, on its own thread, execute one instruction.  None: it was interrupted.

        In a range (VM.set_step_range) it is one after the other, until one leads out of it or
        something else wants to be looked at.
        """
        exit: exits.Exit | None = None
        while True:
            waits = vm.irqchip and _waits_in_kernel(vcpu)
            context, pc = self._look(vm, vcpu)
            if exit is MTRAP and pc not in vcpu.step_range:
                return exit
            if waits:
                return self._step_once_awake(vm, vcpu)
            if exit is MTRAP and vcpu.breakpoints and (hits := vcpu.execute_hits(pc)):
                return exits.Db(hits)  # what is executed in software does not hit by itself
            exit = self._step_from(vm, vcpu, context, pc)
            if exit is not MTRAP or not vcpu.step_range or vcpu.interrupted:
                return exit

    def _look(self, vm: VM, vcpu: VcpuRecord) -> tuple[_Context, int]:
        """`vcpu`'s state, and the GVA of the next instruction."""
        system = vcpu.handle.get_bytes(kvm.kvm_sregs)
        context = self._contexts.get(vcpu.vcpu_id)
        if context is None or context.system != system:
            context = self._contexts[vcpu.vcpu_id] = _context(vm, vcpu, system)
        regs = context.cpu.regs = vcpu.handle.get(kvm.kvm_regs)
        return context, x86.linear_address(context.code_base, regs.rip, context.mode)

    def _step_from(
        self, vm: VM, vcpu: VcpuRecord, context: _Context, start: int
    ) -> exits.Exit | None:
        """Execute one instruction from where `vcpu` is, as _look() has found it."""
        _, cpu, mode, _, trap, lends_gate = context
        with self._lock:  # the code, too: it may be read where another's step has a trap
            code = cpu.fetch_at(start)
            if emulate.may_complete(code, mode):  # only a few instructions are special
                cpu = copy_state(vm.memory, vcpu)
                length = x86.int3_length(code, mode)
                if length is not None and Capability.BPT_EXIT in vcpu.wanted:
                    return exits.Bpt(length)
                if code[0] == HLT and vm.hlt_traps:
                    gpa = _gpa_of_rip(vm, cpu)
                    if gpa in vm.hlt_traps:
                        return exits.Bpt(1)
                    if vm.guard is not None and vm.guard.gpa == gpa and vm.guard.original != HLT:
                        return self._step_without_guard(vm, vcpu)
                if complete_in_software(vcpu, cpu, code):
                    return MTRAP
            vm.has_stepped = True
            vcpu.step_rip = cpu.regs.rip
            if lends_gate:
                _forget_single_step(vcpu)  # else it could not be told from that of this step
            if trap is not None:
                self._traps.plant(cpu, start, trap, lend_db_gate=lends_gate)
            try:
                if not _enter_until_progress(vm, vcpu, cpu, start, int3=trap == INT3):
                    return MTRAP if lends_gate and _forget_pending_step(vcpu) else None
                if self._is_behind(vcpu, start) or self._faulted(vm, vcpu, context, cpu):
                    return MTRAP
            finally:
                self._traps.remove()
        exit = decode(vm, vcpu)
        if exit is MTRAP and self._at_spent_repeat(vm, vcpu, start):
            return self._step_from(vm, vcpu, *self._look(vm, vcpu))
        return exit

    def _step_once_awake(self, vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
        """The same for a vCPU that waits in the kernel, for its start-up IPI or for an interrupt.

        It may do so for ever, and nobody must have to wait for it: so it plants no traps.
        """
        cpu = copy_state(vm.memory, vcpu)
        vcpu.step_rip = cpu.regs.rip
        if not _enter_until_progress(vm, vcpu, cpu, cpu.pc, int3=False):
            return None
        return decode(vm, vcpu)

    def _is_behind(self, vcpu: VcpuRecord, start: int) -> bool:
        """Whether the step has ended as nearly all do: behind the instruction at GVA `start`.

        Told from the exit alone, and in a few words, because it is asked after each.
        """
        run = vcpu.kvm_run
        if run.exit_reason != kvm.KVM_EXIT_DEBUG or not vcpu.stepping:
            return False
        debug = run.debug
        pc = debug.pc
        if debug.exception != x86.VECTOR_DB or debug.dr6 & x86.DR6_HITS or pc == start:
            return False
        return not self._traps.may_have_left(pc)

    def _faulted(self, vm: VM, vcpu: VcpuRecord, context: _Context, before: emulate.Cpu) -> bool:
        """Whether the step ended in a trap on an exception handler; then all is set right."""
        run = vcpu.kvm_run
        if run.exit_reason == kvm.KVM_EXIT_DEBUG:
            # The usual case, told from the exit alone: registers cost a system call each.
            if not self._traps.may_have_left(run.debug.pc):
                return False
            if context.trap == INT3 and run.debug.exception != x86.VECTOR_BP:
                return False  # a call or jump to the handler: the trap has not been executed
        elif run.exit_reason not in (kvm.KVM_EXIT_HLT, kvm.KVM_EXIT_INTERNAL_ERROR):
            return False  # (an internal error: where KVM fails to emulate int3)
        after = copy_state(vm.memory, vcpu)
        # On a host that gives the #DB of a step at CPL 3 to the guest, and has done so.
        delivered = context.lends_gate and _single_step_flag(vcpu)
        if not self._traps.hit(after, before.regs.rip, db_delivered=delivered):
            return False
        _take_owed_hlt(vm, vcpu, after)
        after.regs.rip -= self._traps.length
        if not before.regs.rflags & x86.RFLAGS_TF:  # else the guest steps by itself
            if not (delivered and undo_step_delivery(after, before.sregs)):
                clear_saved_tf(after, before.regs)
            _forget_single_step(vcpu)
        write_state(vcpu, after)
        return True

    @staticmethod
    def _at_spent_repeat(vm: VM, vcpu: VcpuRecord, start: int) -> bool:
        run = vcpu.kvm_run
        if run.exit_reason == kvm.KVM_EXIT_DEBUG and run.debug.pc != start:
            return False
        return _repeated_out(vcpu, copy_state(vm.memory, vcpu))

    def io_was_all(self, vm: VM, vcpu: VcpuRecord) -> bool:
        """Whether the instruction of the step is over now that its I/O is finished."""
        return not _repeated_out(vcpu, copy_state(vm.memory, vcpu))

    def not_the_guests_hlt(self, vm: VM, vcpu: VcpuRecord) -> tuple[bool, exits.Exit | None]:
        """Whether a `hlt` that a vCPU left with was planted by us, and the exit to report for it.

        It can be a debugger's breakpoint (a Bpt exit), or a trap planted for another vCPU's step,
        or either of them just taken out again: then there is nothing to report, and the guest's
        instruction is executed instead.
        """
        with self._lock:  # until another's step is over and the guest's bytes are back
            cpu = copy_state(vm.memory, vcpu)
            cpu.regs.rip -= 1
            guarded = vm.guard is not None and _gpa_of_rip(vm, cpu) == vm.guard.gpa
            if not guarded:
                at_breakpoint = _at_breakpoint(vm, cpu)
                if not at_breakpoint and cpu.fetch(1) == _HLT:
                    return False, None
                vcpu.handle.set(cpu.regs)
                return True, exits.Bpt(1) if at_breakpoint else None
        return True, self._at_gp_handler(vm, vcpu, cpu)

    def not_the_guests_int3(self, vm: VM, vcpu: VcpuRecord) -> bool:
        """Whether an int3 that a vCPU left with was a trap for another's step, gone by now."""
        if not (vm.irqchip and vm.has_stepped):
            return False
        with self._lock:
            cpu = copy_state(vm.memory, vcpu)
            return x86.int3_length(cpu.fetch(), cpu.mode) is None

    def _at_gp_handler(self, vm: VM, vcpu: VcpuRecord, cpu: emulate.Cpu) -> exits.Exit | None:
        """A #GP has reached the guarded handler: a breakpoint in ring 3, or the guest's own."""
        undone = undo_fault(cpu)
        if undone and _at_breakpoint(vm, cpu):
            write_state(vcpu, cpu)
            return exits.Bpt(1)
        if undone:
            cpu = copy_state(vm.memory, vcpu)
            cpu.regs.rip -= 1
        vcpu.handle.set(cpu.regs)
        if _at_breakpoint(vm, cpu):  # in the handler itself
            return exits.Bpt(1)
        exit = self._step_without_guard(vm, vcpu)
        vcpu.set_guest_debug()
        vcpu.handle.leave_registers(False)
        return None if isinstance(exit, exits.Mtrap) else exit

    def forget_gp_of_breakpoint(self, vm: VM, vcpu: VcpuRecord) -> None:
        """Take back the #GP of a breakpoint in ring 3, for a vCPU that parks before its delivery.

        The debugger may take the breakpoint out, and then the guest would get a #GP for nothing; if
        it does not, the breakpoint raises it again.
        """
        is_gp = injection.queued(vcpu) == x86.VECTOR_GP
        if is_gp and _at_breakpoint(vm, copy_state(vm.memory, vcpu)):
            injection.forget(vcpu)

    def _step_without_guard(self, vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
        """Step over the first instruction of the #GP handler, with the guest's byte in place.

        Another vCPU that meets a breakpoint in ring 3 just then has its #GP delivered to the guest.
        """
        with self._lock:
            guard = vm.guard
            if guard is None:  # taken away by a debugger in this moment
                return self._step_from(vm, vcpu, *self._look(vm, vcpu))
            vm.memory.write(guard.gpa, bytes((guard.original,)))
            try:
                return self._step_from(vm, vcpu, *self._look(vm, vcpu))
            finally:
                if vm.guard is guard:
                    vm.memory.write(guard.gpa, _HLT)


def _context(vm: VM, vcpu: VcpuRecord, system: bytes) -> _Context:
    cpu = copy_state(vm.memory, vcpu)
    mode = cpu.mode
    lends_gate = cpu.cpl == 3 and not vm.host.step_user
    return _Context(system, cpu, mode, cpu.sregs.cs.base, _trap_instruction(vm, mode), lends_gate)


def _waits_in_kernel(vcpu: VcpuRecord) -> bool:
    if vcpu.startup_awaited:
        # Asking KVM for the state can make a start-up IPI take effect, which sets registers: those
        # that were left at the last exit are then old.
        vcpu.handle.leave_registers(False)
    return bool(vcpu.handle.get(kvm.kvm_mp_state).mp_state != kvm.KVM_MP_STATE_RUNNABLE)


def _trap_instruction(vm: VM, mode: x86.CpuMode) -> int | None:
    """What leaves the guest from an exception handler; None: nothing does, on this host.

    Without it, a step over an instruction that faults goes on until the handler has returned.
    """
    if not vm.irqchip:
        return HLT
    host = vm.host
    return INT3 if (host.breakpoint_real if mode is x86.CpuMode.REAL else host.breakpoint) else None


def _at_breakpoint(vm: VM, cpu: emulate.Cpu) -> bool:
    """Whether a debugger has planted `hlt` at RIP."""
    return bool(vm.hlt_traps) and _gpa_of_rip(vm, cpu) in vm.hlt_traps


def _gpa_of_rip(vm: VM, cpu: emulate.Cpu) -> int | None:
    try:
        return VirtualMemory(vm.memory, cpu.sregs).translate(cpu.pc)
    except Exception:  # not mapped
        return None


def _take_owed_hlt(vm: VM, vcpu: VcpuRecord, after: emulate.Cpu) -> None:
    """Make a host that has stepped over a trap's `hlt` forget it.

    Where ring 0 is emulated, the step over a `hlt` ends in a debug exit, and KVM keeps in mind that
    it has to halt: it leaves with a HLT exit after the *next* instruction that is not stepped,
    whatever that is.  So the `hlt`, which is still in memory, is executed again without a step:
    that is the exit that was owed.
    """
    if vcpu.kvm_run.exit_reason != kvm.KVM_EXIT_DEBUG or vm.irqchip:
        return
    again = kvm.kvm_regs.from_buffer_copy(after.regs)
    again.rip -= 1
    vcpu.handle.set(again)
    vcpu.handle.set_guest_debug(kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_BLOCKIRQ)
    while not kvm.run(vcpu.fd):
        vm.take_kick(vcpu)  # what it was about is looked at when the step is over


def _single_step_flag(vcpu: VcpuRecord) -> bool:
    """DR6.BS, which says to the guest that a #DB was that of a step."""
    return bool(vcpu.handle.get(kvm.kvm_debugregs).dr6 & x86.DR6_BS)


def _forget_pending_step(vcpu: VcpuRecord) -> bool:
    """Take back a step's #DB that the guest would get at its next entry; whether there was one.

    The instruction has been executed then: a kick has come just before the #DB was delivered.
    """
    if injection.queued(vcpu) != x86.VECTOR_DB:
        return False
    injection.forget(vcpu)
    _forget_single_step(vcpu)
    return True


def _forget_single_step(vcpu: VcpuRecord) -> None:
    """Take BS out of DR6, where the delivery of the step's own #DB has put it."""
    debugregs = vcpu.handle.get(kvm.kvm_debugregs)
    if debugregs.dr6 & x86.DR6_BS:
        debugregs.dr6 &= ~x86.DR6_BS
        vcpu.handle.set(debugregs)


def _repeated_out(vcpu: VcpuRecord, cpu: emulate.Cpu) -> bool:
    """Whether the step is at the same `rep` string instruction, with no repetition left to do.

    A processor would be behind it; KVM's emulator is so only after it looks once more.
    """
    if cpu.regs.rip != vcpu.step_rip:
        return False
    prefixes, rest = x86.split_prefixes(cpu.fetch(), cpu.mode)
    count_bits = 64 if cpu.mode is x86.CpuMode.LONG else 32 if cpu.sregs.cs.db else 16
    left = cpu.regs.rcx & (1 << count_bits) - 1
    return left == 0 and rest[:1] in _STRING_OPCODES and bool({0xF2, 0xF3} & set(prefixes))


def _enter_until_progress(
    vm: VM, vcpu: VcpuRecord, before: emulate.Cpu, start: int, *, int3: bool
) -> bool:
    """Enter with the trap flag armed, at GVA `start`; False when that was interrupted.

    `int3`: those in the traps have to leave the guest, too.
    """
    for _ in range(_MAX_REPEATS):
        # Armed each time anew: an instruction that loads RFLAGS clears the flag KVM has set there.
        vcpu.set_guest_debug(step=True, int3=int3)
        vcpu.handle.leave_registers(True)
        if vcpu.enter() != 0:
            kvm.check_interrupted()
            vm.take_kick(vcpu)
            return False
        run = vcpu.kvm_run
        if run.exit_reason != kvm.KVM_EXIT_DEBUG or run.debug.pc != start:
            break
        if run.debug.dr6 & x86.DR6_HITS or bytes(vcpu.handle.get(kvm.kvm_regs)) != bytes(
            before.regs
        ):
            break
    return True

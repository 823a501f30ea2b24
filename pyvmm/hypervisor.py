"""What bhyve's vmm.ko gives its userland, built on KVM: VMs, vCPUs, and the debugged set.

    vm.run(vcpu_id) -> a typed exit (exits.py)

Who may run, and how a vCPU is brought out of the guest, is in debuggedset.py; registers and memory
of one that does not run are in vcpuaccess.py.  Here is what a vCPU does when it may run: the checks
before each entry, the entry, what KVM is asked and told.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import threading
from collections.abc import Iterable
from types import TracebackType

from pyvmm import cpuid, exits, handles, kvm, x86
from pyvmm.decode import decode
from pyvmm.light import TYPE_CHECKING
from pyvmm.memory import GuestMemory
from pyvmm.vcpuaccess import NOT_STARTED, VcpuAccess
from pyvmm.vcpurecord import (
    Capability,
    Guard,
    HardwareBreakpoint,
    VcpuRecord,
    VmError,
)

if TYPE_CHECKING:
    from pyvmm.hostprobe import HostProbe
    from pyvmm.stepping import Stepper

# Where KVM on Intel may put three hidden pages for real mode: below the BIOS, as api.rst advises.
_TSS_GPA, _IDENTITY_MAP_GPA = 0xFFFBD000, 0xFFFBC000


class VM(VcpuAccess):
    """A virtual machine: memory, vCPUs, and the debugged set.  A context manager."""

    def __init__(self, *, device: str = "/dev/kvm", cpus: int = 1, irqchip: bool = False) -> None:
        """Create an empty VM.  Raises OSError when KVM is missing or refuses.

        `cpus`: how many vCPUs CPUID tells the guest of.  `irqchip`: LAPICs, IOAPIC, PIC and PIT in
        the kernel; a vCPU other than 0 then waits for INIT and SIPI, and `hlt` waits in the kernel.
        """
        super().__init__()
        system = handles.SystemHandle(device)
        try:
            self._vcpu_mmap_size = system.vcpu_mmap_size()
            self.max_vcpus = system.check_extension(kvm.KVM_CAP_MAX_VCPUS)
            self.coalesced_pio = bool(system.check_extension(kvm.KVM_CAP_COALESCED_PIO))
            self._cpuid = system.supported_cpuid()
            cpuid.add_core_level(self._cpuid)
            self.handle = system.create_vm()
        finally:
            system.close()
        self.memory = GuestMemory(self.handle)
        self.has_stepped = False  # a vCPU may meet traps that another's step planted, or has left
        self.cpus, self.irqchip = cpus, irqchip
        self.guard: Guard | None = None  # makes hlt_traps work in ring 3
        self.hlt_traps: set[int] = set()  # GPAs where a debugger has planted hlt as a breakpoint
        self._device = device
        self._stepper: Stepper | None = None
        self._stepper_lock = threading.Lock()
        try:
            self.handle.ioctl(kvm.KVM_SET_TSS_ADDR, _TSS_GPA)
            self.handle.ioctl(kvm.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(_IDENTITY_MAP_GPA))
            if irqchip:
                self.handle.create_irqchip()
        except OSError:
            self.close()
            raise

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free everything.  No vCPU may be in KVM_RUN: end() the VM and join its threads first."""
        for vcpu in self._vcpus.values():
            vcpu.close()
        self._vcpus.clear()
        self.handle.close()
        self.memory.close()

    @functools.cached_property
    def host(self) -> HostProbe:
        """What the host really does, by experiment: made, and imported, only when asked for."""
        from pyvmm import hostprobe

        return hostprobe.host(self._device)

    @property
    def stepper(self) -> Stepper:
        """What single-steps the vCPUs: imported only when there is something to step."""
        stepper = self._stepper
        if stepper is None:
            from pyvmm.stepping import Stepper

            with self._stepper_lock:  # two with a lock each would not see each other's traps
                stepper = self._stepper = self._stepper or Stepper(self.memory)
        return stepper

    # --- vCPUs ---------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> None:
        """Create vCPU `vcpu_id` (its APIC id).  It becomes active when a thread takes it."""
        if vcpu_id in self._vcpus:
            raise VmError(errno.EEXIST, f"vCPU {vcpu_id} exists already")
        handle = self.handle.create_vcpu(vcpu_id, self._vcpu_mmap_size)
        try:
            cpuid.describe(self._cpuid, vcpu_id, self.cpus, irqchip=self.irqchip)
            handle.ioctl(kvm.KVM_SET_CPUID2, self._cpuid)
        except OSError:
            handle.close()
            raise
        vcpu = VcpuRecord(vcpu_id, handle, self._lock)
        vcpu.startup_awaited = self._awaits_startup(vcpu_id)
        with self._lock:
            self._vcpus[vcpu_id] = vcpu

    def handle_of(self, vcpu_id: int) -> handles.VcpuHandle:
        """The vCPU's handle, whatever it is doing: for what may be done with it at any time."""
        return self._record(vcpu_id).handle

    def hide_what_fails(self) -> None:
        """Let CPUID hide from vCPUs that are made later what this host cannot execute at CPL 0.

        For kernels that use whatever CPUID offers; the probe behind it takes 25 ms.
        """
        if not self.host.cmpxchg16b:
            cpuid.hide_cmpxchg16b(self._cpuid)

    def _awaits_startup(self, vcpu_id: int) -> bool:
        """Whether the vCPU does not run from power-on, but from its start-up IPI on."""
        return self.irqchip and vcpu_id != 0

    def all_halted_for_good(self) -> bool:
        """Whether every active vCPU executed `hlt` with interrupts off: nothing can wake them."""
        with self._lock:
            active = [v for v in self._vcpus.values() if v.thread_id is not None]
            return all(v.halted and not v.kvm_run.if_flag and not v.nmi_wanted for v in active)

    def all_wait_for_good(self) -> bool:
        """The same with an in-kernel irqchip, where vCPUs wait in the kernel.  All must be held."""
        states = [
            (v.handle.get(kvm.kvm_mp_state).mp_state, v.kvm_run.if_flag, v.nmi_wanted)
            for v in self._vcpus.values()
        ]
        return all(
            state in NOT_STARTED
            or (state == kvm.KVM_MP_STATE_HALTED and not interrupts_enabled and not nmi_wanted)
            for state, interrupts_enabled, nmi_wanted in states
        )

    def started(self, vcpu_id: int) -> bool:
        """Whether a parked vCPU has got its start-up IPI; without an irqchip all have."""
        state = self.state(vcpu_id).get(kvm.kvm_mp_state).mp_state if self.irqchip else 0
        return state not in NOT_STARTED

    def run_state(self, vcpu_id: int) -> str:
        """What a parked vCPU is about, in words: "not started", "halted" or "running"."""
        if not self.started(vcpu_id):
            return "not started"
        if not self.irqchip:
            return "halted" if vcpu_id in self.halted_cpus() else "running"
        mp_state = self.state(vcpu_id).get(kvm.kvm_mp_state).mp_state
        return "halted" if mp_state == kvm.KVM_MP_STATE_HALTED else "running"

    def set_irq(self, number: int, level: bool) -> None:
        """Raise or lower interrupt line `number`; nobody hears it without an irqchip."""
        if self.irqchip:
            self.handle.irq_line(number, level)

    # --- reset ---------------------------------------------------------------------------------

    def like_this(self) -> VM:
        """A new VM of the same kind, without memory and vCPUs."""
        return VM(device=self._device, cpus=self.cpus, irqchip=self.irqchip)

    @functools.cached_property
    def msr_indices(self) -> tuple[int, ...]:
        """The model-specific registers that KVM saves and restores on this host."""
        system = handles.SystemHandle(self._device)
        try:
            return system.msr_indices()
        finally:
            system.close()

    def reset(self) -> None:
        """Bring vCPUs and irqchip back to power-on; all vCPUs must be held.

        What was asked for stays: capabilities, hardware breakpoints, the debugged set.
        """
        from pyvmm import reset

        reset.power_on(self)
        with self._lock:
            for vcpu in self._vcpus.values():
                vcpu.halted = vcpu.nmi_wanted = False
                vcpu.bp_queued, vcpu.last_exit = None, None
                vcpu.entry_inst_length = 0
                vcpu.startup_awaited = self._awaits_startup(vcpu.vcpu_id)
                self._changed(vcpu)

    # --- capabilities --------------------------------------------------------------------------

    def set_capability(self, vcpu_id: int, capability: Capability, on: bool) -> None:
        """Switch a capability of a vCPU; it takes effect before its next guest instruction.

        BPT_EXIT: an int3 in the guest leaves it with a Bpt exit.  MTRAP_EXIT: after each
        instruction a Mtrap exit; external interrupts are held off meanwhile.  HLT_EXIT: always on
        without an in-kernel irqchip, never with one.
        Raises VmError: EINVAL no such vCPU, ENOENT no such capability, ENOTSUP the host cannot.
        """
        vcpu = self._record(vcpu_id)
        if not isinstance(capability, Capability):
            raise VmError(errno.ENOENT, f"no capability {capability!r}")
        if capability is Capability.HLT_EXIT:
            if on == self.irqchip:
                with_or_without = "with" if self.irqchip else "without"
                raise VmError(
                    errno.ENOTSUP,
                    f"HLT_EXIT cannot be {'on' if on else 'off'} {with_or_without} an irqchip",
                )
            return
        if on and capability is Capability.BPT_EXIT and not self.host.breakpoint:
            raise VmError(errno.ENOTSUP, "this host's KVM does not intercept int3")
        if on and capability is Capability.MTRAP_EXIT and not self.host.step:
            raise VmError(errno.ENOTSUP, "this host's KVM cannot single-step")
        with self._lock:
            vcpu.step_range = range(0)
            if on == (capability in vcpu.wanted):
                return
            vcpu.wanted = vcpu.wanted | {capability} if on else vcpu.wanted - {capability}
            self._changed(vcpu)
            if capability is Capability.MTRAP_EXIT and self.irqchip:
                self._let_int3_exit()

    def _let_int3_exit(self) -> None:
        """A step may plant int3 where other vCPUs come by, too (lock held); see steptraps.py."""
        needed = any(vcpu.stepping for vcpu in self._vcpus.values())
        for vcpu in self._vcpus.values():
            if vcpu.int3_exits != needed:
                vcpu.int3_exits = needed
                self._changed(vcpu)

    def get_capability(self, vcpu_id: int, capability: Capability) -> bool:
        """Whether a capability is on.  Raises VmError: EINVAL no such vCPU, ENOENT unknown."""
        vcpu = self._record(vcpu_id)
        if not isinstance(capability, Capability):
            raise VmError(errno.ENOENT, f"no capability {capability!r}")
        if capability is Capability.HLT_EXIT:
            return not self.irqchip
        return capability in vcpu.wanted

    def set_step_range(self, vcpu_id: int, gvas: range) -> None:
        """With MTRAP_EXIT: no exit after instructions that lead to one of these GVAs.

        Until a capability of the vCPU is set again.  Whatever else asks for an exit gets it; there
        can be a Mtrap inside of the range, too.  Raises VmError (EINVAL) for an unknown vCPU.
        """
        vcpu = self._record(vcpu_id)
        with self._lock:
            vcpu.step_range = gvas

    def breakpoint_instruction(self, vcpu_id: int) -> int:
        """The one-byte instruction that leaves the guest, to plant as a breakpoint.

        int3 where it does so as such; else hlt, which works at CPL 0 on every host (also where
        an int3 leaves only through a failed emulation, which takes KVM a hundred times as long).
        The hlt must be in `hlt_traps`, by its GPA: its exits are Bpt exits then.
        Raises VmError (ENOTSUP) where neither works.
        """
        sregs = self.state(vcpu_id).get(kvm.kvm_sregs)
        real = x86.cpu_mode(sregs) is x86.CpuMode.REAL
        int3_exits = self.host.breakpoint_real if real else self.host.breakpoint_as_such
        if int3_exits:
            return x86.INT3
        if not self.irqchip:
            return x86.HLT
        if self.host.breakpoint and not real:
            return x86.INT3
        raise VmError(errno.ENOTSUP, "this host has no breakpoint instruction: use hbreak")

    def set_hardware_breakpoints(
        self, vcpu_id: int, breakpoints: Iterable[HardwareBreakpoint]
    ) -> None:
        """Use DR0 to DR3 of a vCPU for these; hits are Db exits.  None gives them to the guest.

        Raises VmError: EINVAL no such vCPU, ENOSPC more than four.
        """
        vcpu = self._record(vcpu_id)
        chosen = tuple(breakpoints)
        if len(chosen) > 4:
            raise VmError(errno.ENOSPC, "x86 has four hardware breakpoints")
        with self._lock:
            if chosen != vcpu.breakpoints:
                vcpu.breakpoints = chosen
                self._changed(vcpu)

    # --- running -------------------------------------------------------------------------------

    def run(self, vcpu_id: int) -> exits.Exit:
        """Run a vCPU, on the thread that activated it, until something happens: a typed exit.

        Order of checks before the guest is entered: VM ended, I/O to finish, debugged (with an
        interrupt that is on its way delivered first), halted, a #BP to deliver, enter.
        """
        vcpu = self._vcpus[vcpu_id]
        while True:
            stepping = False
            if vcpu.attention:
                exit = self._before_entry(vcpu)
                if exit is not None:
                    return exit
                stepping = vcpu.stepping
            if stepping:
                exit = self.stepper.step(self, vcpu)
            elif vcpu.enter() == 0:
                exit = decode(self, vcpu)
            else:
                kvm.check_interrupted()
                exit = None
                self.take_kick(vcpu)
            vcpu.last_exit = exit
            if exit is not None:
                return exit

    def halt(self, vcpu: VcpuRecord) -> None:
        """`vcpu` has executed hlt: run() returns Hlt until something wakes it."""
        with self._lock:
            vcpu.halted = True
            vcpu.update_attention()

    def answer(self, vcpu_id: int, data: bytes) -> None:
        """Give the bytes that the guest reads, for the InOut or Mmio that run() just returned."""
        vcpu = self._vcpus[vcpu_id]
        if isinstance(vcpu.last_exit, exits.InOut):
            offset = vcpu.kvm_run.io.data_offset
            vcpu.handle.map[offset : offset + len(data)] = data
        else:
            vcpu.kvm_run.mmio.data[: len(data)] = data

    def answered(self, vcpu_id: int) -> bytes:
        """What answer() was given for the last exit: for a trace."""
        vcpu = self._vcpus[vcpu_id]
        exit = vcpu.last_exit
        if isinstance(exit, exits.InOut):
            offset = vcpu.kvm_run.io.data_offset
            return vcpu.map[offset : offset + exit.size * exit.count]
        assert isinstance(exit, exits.Mmio)
        return bytes(vcpu.kvm_run.mmio.data[: exit.size])

    def _before_entry(self, vcpu: VcpuRecord) -> exits.Exit | None:
        """All that must be looked at before the guest is entered; None: enter it."""
        if self._ended:
            return exits.Ended()
        if vcpu.stale:
            self._tell_kvm(vcpu)
        stopping = vcpu.debugged or vcpu.held
        if vcpu.io_in_flight and (stopping or vcpu.stepping):
            # Finish the access, and nothing else: what a debugger reads is consistent then, and
            # for a step that was its one instruction.
            exit = self._complete_io(vcpu)
            if exit is not None:
                return exit
            if vcpu.stepping and self.stepper.io_was_all(self, vcpu):
                return exits.Mtrap()
        if stopping:
            if self.guard is not None:
                self.stepper.forget_gp_of_breakpoint(self, vcpu)
            if self.irqchip:
                events = vcpu.handle.get(kvm.kvm_vcpu_events)
                if events.interrupt.injected and not events.interrupt.soft:
                    from pyvmm import injection

                    injection.deliver_interrupt(self, vcpu, events)
            return exits.Debug()
        if vcpu.halted:
            return exits.Hlt(bool(vcpu.kvm_run.if_flag))
        if vcpu.bp_queued is not None:
            with self._lock:
                length, vcpu.bp_queued = vcpu.bp_queued, None
                vcpu.update_attention()
            from pyvmm import injection

            injection.deliver_breakpoint(self, vcpu, length)
            if vcpu.stepping:
                return exits.Mtrap()
        return None

    def _complete_io(self, vcpu: VcpuRecord) -> exits.Exit | None:
        """Finish the I/O in flight without entering the guest.

        It can cause an exit: the next piece of a wide or repeated access, or the end of a step.
        """
        vcpu.kvm_run.immediate_exit = 1
        finished = kvm.run(vcpu.fd)
        vcpu.kvm_run.immediate_exit = 0
        vcpu.last_exit = None
        if finished:
            vcpu.last_exit = decode(self, vcpu)
        return vcpu.last_exit

    def _tell_kvm(self, vcpu: VcpuRecord) -> None:
        """Bring KVM up to date with what was asked for since the last entry."""
        with self._lock:
            vcpu.stale = False
            nmi, vcpu.nmi_wanted = vcpu.nmi_wanted, False
            if nmi:
                vcpu.halted = False
            vcpu.update_attention()
        if nmi:
            vcpu.handle.ioctl(kvm.KVM_NMI)
        if not vcpu.stepping:  # else each step arms itself
            vcpu.set_guest_debug()
            vcpu.handle.leave_registers(False)  # each exit would pay for them

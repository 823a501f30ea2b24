"""A vCPU's state, for who may touch it: registers, exceptions, memory through its own paging.

The state belongs to the thread that runs the vCPU.  Others may touch it while the vCPU is parked,
or has no thread; to all that come at another moment _accessible() says EBUSY.
"""

from __future__ import annotations

import errno
import threading

from pyvmm import cpustate, handles, kvm
from pyvmm.cpustate import Register
from pyvmm.debuggedset import DebuggedSet
from pyvmm.light import TYPE_CHECKING
from pyvmm.memory import GuestMemory, VirtualMemory
from pyvmm.vcpurecord import VcpuRecord, VmError

if TYPE_CHECKING:
    from pyvmm.emulate import Cpu

NOT_STARTED = (kvm.KVM_MP_STATE_UNINITIALIZED, kvm.KVM_MP_STATE_INIT_RECEIVED)


class VcpuAccess(DebuggedSet):
    """The state of a VM's vCPUs.  hypervisor.VM is one."""

    memory: GuestMemory
    irqchip: bool

    def _accessible(self, vcpu_id: int) -> VcpuRecord:
        """The record, if the caller may touch its registers now."""
        vcpu = self._record(vcpu_id)
        with self._lock:
            if vcpu.thread_id not in (None, threading.get_ident()) and not vcpu.parked:
                raise VmError(errno.EBUSY, f"vCPU {vcpu_id} is running: suspend it first")
        if vcpu.startup_awaited:
            # One that came while it was parked changes its registers only when KVM is asked this:
            # those that were left at the last exit are then old.
            vcpu.handle.leave_registers(False)
            mp_state = vcpu.handle.get(kvm.kvm_mp_state).mp_state
            vcpu.startup_awaited = mp_state in NOT_STARTED
        return vcpu

    # --- registers and events ------------------------------------------------------------------

    def get_register(self, vcpu_id: int, register: Register) -> int:
        """Read a register.  Raises VmError: EINVAL no such vCPU, EBUSY it is running."""
        vcpu = self._accessible(vcpu_id)
        if register is Register.GUEST_ENTRY_INST_LENGTH:
            return vcpu.entry_inst_length
        return cpustate.get(vcpu.handle, register)

    def set_register(self, vcpu_id: int, register: Register, value: int) -> None:
        """Write a register.  Raises VmError: EINVAL no such vCPU or value, EBUSY it is running.

        A halted vCPU whose RIP is written runs on from there.
        """
        vcpu = self._accessible(vcpu_id)
        if register is Register.GUEST_ENTRY_INST_LENGTH:
            if not 0 <= value <= 15:
                raise VmError(errno.EINVAL, f"no instruction is {value} bytes long")
            vcpu.entry_inst_length = value
            return
        try:
            cpustate.set(vcpu.handle, register, value)
        except OverflowError as error:
            raise VmError(errno.EINVAL, str(error)) from None
        if register is Register.RIP:
            self._unhalt(vcpu)

    def state(self, vcpu_id: int) -> handles.VcpuHandle:
        """The vCPU's handle, for whole structures.  Raises VmError (EBUSY) while it is running."""
        return self._accessible(vcpu_id).handle

    def inject_exception(
        self,
        vcpu_id: int,
        vector: int,
        error_code: int | None = None,
        restart_instruction: bool = False,
    ) -> None:
        """Queue an exception for the vCPU's next entry; does not kick.

        For #BP the guest sees a saved RIP of RIP + GUEST_ENTRY_INST_LENGTH on every host; with
        `restart_instruction` it sees RIP itself.
        Raises VmError: EINVAL no such vCPU, a vector outside 0..31, or #DF; EBUSY the vCPU is
        running, has I/O in flight, or has an exception pending already.
        """
        from pyvmm import injection

        vcpu = self._accessible(vcpu_id)
        queued_length = injection.inject(vcpu, vector, error_code, restart_instruction)
        with self._lock:
            vcpu.bp_queued = queued_length
            vcpu.update_attention()
        self._unhalt(vcpu)

    def inject_nmi(self, vcpu_id: int) -> None:
        """Raise a non-maskable interrupt, from any thread; wakes a halted vCPU.

        Raises VmError (EINVAL) for an unknown vCPU.
        """
        vcpu = self._record(vcpu_id)
        with self._lock:
            vcpu.nmi_wanted = True
            self._changed(vcpu)
            vcpu.wake.notify_all()

    def go_on_at_rip(self, vcpu_id: int) -> None:
        """A debugger has written RIP: what belonged to the instruction before is no more.

        Neither a halt nor an exception that was on its way.  Raises VmError as set_register() does.
        """
        from pyvmm import injection

        vcpu = self._accessible(vcpu_id)
        injection.forget(vcpu)
        with self._lock:
            vcpu.bp_queued = None
        self._unhalt(vcpu)

    def _unhalt(self, vcpu: VcpuRecord) -> None:
        if self.irqchip and vcpu.handle.get(kvm.kvm_mp_state).mp_state == kvm.KVM_MP_STATE_HALTED:
            vcpu.handle.set(kvm.kvm_mp_state(kvm.KVM_MP_STATE_RUNNABLE))
        with self._lock:
            vcpu.halted = False
            vcpu.update_attention()
            vcpu.wake.notify_all()

    # --- guest virtual memory, as the vCPU sees it -----------------------------------------------

    def translate(self, vcpu_id: int, gva: int) -> int:
        """The GPA behind `gva` with the vCPU's own paging, as CPL 0; it need not be RAM.

        Raises paging.TranslationFault where nothing is mapped, VmError as get_register() does.
        """
        return self._virtual(self._accessible(vcpu_id)).translate(gva)

    def read_virtual(self, vcpu_id: int, gva: int, length: int) -> bytes:
        """Read `length` bytes at a GVA.  Raises as translate() does, and GuestMemoryError."""
        return self._virtual(self._accessible(vcpu_id)).read(gva, length)

    def write_virtual(self, vcpu_id: int, gva: int, data: bytes) -> None:
        """Write at a GVA, all of `data` or nothing.  Raises as read_virtual() does."""
        self._virtual(self._accessible(vcpu_id)).write(gva, data)

    def _virtual(self, vcpu: VcpuRecord) -> VirtualMemory:
        return VirtualMemory(self.memory, vcpu.handle.get(kvm.kvm_sregs))

    # --- instructions executed by pyvmm (emulate.py) -------------------------------------------

    def cpu(self, vcpu_id: int) -> Cpu:
        """A copy of a vCPU's state, with its view of memory.  Raises as get_register() does."""
        from pyvmm.cpucopy import copy_state

        return copy_state(self.memory, self._accessible(vcpu_id))

    def execute_in_software(self, vcpu_id: int) -> bool:
        """Execute the instruction at RIP if it is one of emulate.py's.  Raises VmError (EBUSY)."""
        from pyvmm.cpucopy import complete_in_software, copy_state

        vcpu = self._accessible(vcpu_id)
        cpu = copy_state(self.memory, vcpu)
        return complete_in_software(vcpu, cpu, cpu.fetch())

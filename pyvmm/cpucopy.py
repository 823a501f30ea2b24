"""A vCPU's state as emulate.py wants it: copied out, changed, written back.

Only for a vCPU whose registers may be touched: on its own thread, or parked.
"""

from __future__ import annotations

from pyvmm import emulate, handles, kvm
from pyvmm.memory import GuestMemory, VirtualMemory
from pyvmm.vcpurecord import VcpuRecord


def copy_state(memory: GuestMemory, vcpu: VcpuRecord) -> emulate.Cpu:
    """A copy of `vcpu`'s registers, with its view of `memory`."""
    handle = vcpu.handle
    sregs = handle.get(kvm.kvm_sregs)
    virtual = VirtualMemory(memory, sregs)
    return emulate.Cpu(
        handle.get(kvm.kvm_regs),
        sregs,
        virtual.read,
        virtual.write,
        lambda index: handle.get_msrs([index])[0],
        lambda: _unmask_nmi(handle),
        lambda shadow: _set_shadow(handle, shadow),
    )


def write_state(vcpu: VcpuRecord, cpu: emulate.Cpu) -> None:
    """Make a changed copy the vCPU's state."""
    vcpu.handle.set(cpu.sregs)
    vcpu.handle.set(cpu.regs)


def complete_in_software(vcpu: VcpuRecord, cpu: emulate.Cpu, code: bytes) -> bool:
    """Execute the instruction that `code` begins with, at RIP, if it is one of emulate.py's."""
    if not emulate.complete(cpu, code):
        return False
    write_state(vcpu, cpu)
    return True


def complete_for_host(vcpu: VcpuRecord, cpu: emulate.Cpu, code: bytes) -> bool:
    """The same for an instruction that this host's KVM lacks: one of completions.py's."""
    from pyvmm import completions  # few hosts need it

    segments = bytes(cpu.sregs)
    if not completions.complete(cpu, _ExtendedState(vcpu.handle), code):
        return False
    if bytes(cpu.sregs) != segments:  # to set them is slow
        vcpu.handle.set(cpu.sregs)
    vcpu.handle.set(cpu.regs)
    return True


class _ExtendedState:
    """See completions.ExtendedState."""

    def __init__(self, handle: handles.VcpuHandle) -> None:
        self._handle = handle

    def read(self) -> bytearray:
        return bytearray(self._handle.get(kvm.kvm_xsave))

    def write(self, area: bytearray) -> None:
        self._handle.set(kvm.kvm_xsave.from_buffer_copy(area))

    def xcr0(self) -> int:
        xcrs = self._handle.get(kvm.kvm_xcrs)
        return int(xcrs.xcrs[0].value) if xcrs.nr_xcrs else 1


def _unmask_nmi(handle: handles.VcpuHandle) -> None:
    events = handle.get(kvm.kvm_vcpu_events)
    if events.nmi.masked:
        events.nmi.masked = 0
        events.flags = 0
        handle.set(events)


def _set_shadow(handle: handles.VcpuHandle, shadow: int) -> None:
    events = handle.get(kvm.kvm_vcpu_events)
    events.interrupt.shadow = shadow
    events.flags = kvm.KVM_VCPUEVENT_VALID_SHADOW
    handle.set(events)

"""Exceptions that the hypervisor layer gives to a guest: queued in KVM, or delivered in software.

A #BP is delivered in software, right before the next entry: what hosts make of one that is injected
differs (hostprobe.Injection), and none tells any more that it has one.
Source: api.rst, "KVM_SET_VCPU_EVENTS"; Intel SDM vol. 3C, "VM-Entry Controls for Event Injection".
"""

from __future__ import annotations

import errno

from pyvmm import emulate, kvm, x86
from pyvmm.cpucopy import copy_state, write_state
from pyvmm.light import TYPE_CHECKING
from pyvmm.vcpurecord import VcpuRecord, VmError

if TYPE_CHECKING:
    from pyvmm.hypervisor import VM


def inject(
    vcpu: VcpuRecord, vector: int, error_code: int | None, restart_instruction: bool
) -> int | None:
    """Queue an exception in KVM; see VM.inject_exception(), which lists the errors.

    Returns None; or, for a #BP, the length with which deliver_breakpoint() is to be called before
    the next entry.
    """
    if not 0 <= vector < 32 or vector == x86.VECTOR_DF:
        raise VmError(errno.EINVAL, f"vector {vector} is no exception to inject")
    if vcpu.io_in_flight:
        raise VmError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} has I/O in flight")
    if queued(vcpu) is not None or vcpu.bp_queued is not None:
        raise VmError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} has an exception pending")
    if vector == x86.VECTOR_BP:
        return 0 if restart_instruction else vcpu.entry_inst_length
    _queue(vcpu, vector, error_code)
    return None


def _queue(vcpu: VcpuRecord, vector: int, error_code: int | None) -> None:
    """Let KVM deliver an exception at the next entry."""
    # Some vectors always push an error code, but real mode has none.
    protected = vcpu.handle.get(kvm.kvm_sregs).cr0 & x86.CR0_PE
    pushes_one = vector in x86.VECTORS_WITH_ERROR_CODE and bool(protected)
    events = vcpu.handle.get(kvm.kvm_vcpu_events)
    events.exception.injected = 1
    events.exception.nr = vector
    events.exception.has_error_code = error_code is not None or pushes_one
    events.exception.error_code = error_code or 0
    events.flags = 0  # only the exception: the other fields may be older than what is queued
    vcpu.handle.set(events)


def queued(vcpu: VcpuRecord) -> int | None:
    """The vector of the exception that KVM has not delivered yet, if there is one."""
    exception = vcpu.handle.get(kvm.kvm_vcpu_events).exception
    return int(exception.nr) if exception.injected or exception.pending else None


def forget(vcpu: VcpuRecord) -> None:
    """Take back an exception that KVM has not delivered yet: it belongs to where RIP was before."""
    events = vcpu.handle.get(kvm.kvm_vcpu_events)
    if events.exception.injected or events.exception.pending:
        events.exception.injected = events.exception.pending = 0
        events.flags = 0  # as in _queue()
        vcpu.handle.set(events)


def deliver_interrupt(vm: VM, vcpu: VcpuRecord, events: kvm.kvm_vcpu_events) -> None:
    """Deliver what KVM has taken from an interrupt controller but not yet given to the guest.

    A kick can come between the two.  KVM would deliver it at the next entry, whatever that is for:
    a step, for which interrupts are held off, would run through the handler.  So a vCPU that parks
    has it delivered before, and a debugger sees where the guest is going on.
    """
    cpu = copy_state(vm.memory, vcpu)
    if not emulate.deliver_or_undo(cpu, events.interrupt.nr, external=True):
        return  # it would fault on the way: KVM raises the right fault
    events.interrupt.injected = 0
    events.flags = 0  # as in _queue()
    vcpu.handle.set(events)
    cpu.sregs.interrupt_bitmap[:] = (0,) * 4  # which says the same
    write_state(vcpu, cpu)


def deliver_breakpoint(vm: VM, vcpu: VcpuRecord, length: int) -> None:
    """Deliver a #BP with a saved RIP of RIP + `length` as the processor does, before an entry."""
    cpu = copy_state(vm.memory, vcpu)
    cpu.advance(length)
    if emulate.deliver_or_undo(cpu, x86.VECTOR_BP):
        write_state(vcpu, cpu)
    else:  # it would fault on the way: KVM raises the right fault
        vcpu.handle.set(cpu.regs)
        _queue(vcpu, x86.VECTOR_BP, None)

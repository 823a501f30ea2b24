"""Exceptions that the hypervisor layer gives to a guest: queued in KVM, or delivered in software.

What hosts do with a #BP that is injected differs: see vcpurecord.Injection, which the host probe
fills in.  The outcome is the same on all: the guest's handler sees RIP + GUEST_ENTRY_INST_LENGTH.
Source: api.rst, "KVM_SET_VCPU_EVENTS"; Intel SDM vol. 3C, "VM-Entry Controls for Event Injection".
"""

from __future__ import annotations

import errno

from pyvmm import emulate, kvm, x86
from pyvmm.cpucopy import copy_state, write_state
from pyvmm.light import TYPE_CHECKING
from pyvmm.vcpurecord import Injection, VcpuRecord, VmError

if TYPE_CHECKING:
    from pyvmm.hypervisor import VM


def inject(
    vm: VM, vcpu: VcpuRecord, vector: int, error_code: int | None, restart_instruction: bool
) -> int | None:
    """Queue an exception in KVM; see VM.inject_exception(), which lists the errors.

    Returns None; or, for a #BP that KVM would not deliver right, the length with which
    deliver_breakpoint() is to be called before the next entry.
    """
    if not 0 <= vector < 32 or vector == x86.VECTOR_DF:
        raise VmError(errno.EINVAL, f"vector {vector} is no exception to inject")
    if vcpu.io_in_flight:
        raise VmError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} has I/O in flight")
    events = vcpu.handle.get(kvm.kvm_vcpu_events)
    if events.exception.injected or events.exception.pending or vcpu.bp_queued is not None:
        raise VmError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} has an exception pending")
    if vector == x86.VECTOR_BP:
        length = 0 if restart_instruction else vcpu.entry_inst_length
        if not _let_kvm_inject_bp(vm, vcpu, length):
            return length
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


def _let_kvm_inject_bp(vm: VM, vcpu: VcpuRecord, length: int) -> bool:
    """Move RIP so that KVM, which adds what the probe found, saves RIP + `length`.

    False where that cannot be relied on: then the #BP is delivered in software instead.
    """
    host = vm.host.injection
    added = vcpu.last_bpt_length if host is Injection.EXIT_LENGTH else 0
    if host is Injection.UNRELIABLE or (host is Injection.EXIT_LENGTH and not added):
        return False
    if length != added:
        cpu = copy_state(vm.memory, vcpu)
        cpu.advance(length - added)
        vcpu.handle.set(cpu.regs)
    return True


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

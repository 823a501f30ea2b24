"""From struct kvm_run to a typed exit: one function for each reason that KVM gives.

What hosts report differently looks the same from here on: an int3 that left the guest is a Bpt exit
whether KVM says so or fails to emulate it, and RIP is at the instruction.  A decoder that returns
None has dealt with the exit itself, and the guest is entered again.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

from pyvmm import exits, kvm, x86
from pyvmm.light import TYPE_CHECKING
from pyvmm.vcpurecord import Capability, VcpuRecord

if TYPE_CHECKING:
    from pyvmm.hypervisor import VM

_KVM_RUN_IO = struct.Struct("=BBHIQ")
_KVM_RUN_MMIO = struct.Struct("=Q8sIB")

MTRAP = exits.Mtrap()

# A polling guest makes the same few accesses over and over, and an exit is a value: what the same
# bytes were decoded to before, they are again.  These are all that an access is told by.
_REASON_AND_ACCESS = slice(kvm.kvm_run.exit_reason.offset, kvm.kvm_run.exit.offset + 24)
_PORT_DATA = slice(mmap.PAGESIZE, mmap.PAGESIZE + 8)
_MAX_KNOWN = 1024
_known: dict[tuple[bytes, bytes], exits.InOut | exits.Mmio] = {}


def decode(vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
    """The exit that `vcpu`'s kvm_run tells of; None: dealt with, enter again."""
    map = vcpu.map
    exit = _known.get((map[_REASON_AND_ACCESS], map[_PORT_DATA]))
    return exit or DECODERS.get(vcpu.kvm_run.exit_reason, _unhandled)(vm, vcpu)


def _remember(vcpu: VcpuRecord, exit: exits.InOut | exits.Mmio) -> None:
    if len(_known) >= _MAX_KNOWN:  # a guest can make any number of different ones
        _known.clear()
    _known[vcpu.map[_REASON_AND_ACCESS], vcpu.map[_PORT_DATA]] = exit


def _io_exit(vm: VM, vcpu: VcpuRecord) -> exits.Exit:
    fields = _KVM_RUN_IO.unpack_from(vcpu.map, kvm.kvm_run.exit.offset)
    direction, size, port, count, offset = fields
    is_in = direction == kvm.KVM_EXIT_IO_IN
    data = b"" if is_in else vcpu.map[offset : offset + size * count]
    exit = exits.InOut(port, size, is_in, count, data)
    if offset == _PORT_DATA.start and len(data) <= 8:
        _remember(vcpu, exit)
    return exit


def _mmio_exit(vm: VM, vcpu: VcpuRecord) -> exits.Exit:
    gpa, data, length, is_write = _KVM_RUN_MMIO.unpack_from(vcpu.map, kvm.kvm_run.exit.offset)
    exit = exits.Mmio(gpa, length, bool(is_write), data[:length] if is_write else b"")
    _remember(vcpu, exit)
    return exit


def _hlt_exit(vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
    if vm.hlt_traps or vm.has_stepped:
        trapped, exit = vm.stepper.not_the_guests_hlt(vm, vcpu)
        if trapped:
            return exit
    if vcpu.stepping:
        return MTRAP  # as on a processor, whose trap after the step ends the halt
    vm.halt(vcpu)
    return exits.Hlt(bool(vcpu.kvm_run.if_flag))


def _debug_exit(vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
    debug = vcpu.kvm_run.debug
    if debug.exception == x86.VECTOR_BP:
        if vm.stepper.not_the_guests_int3(vm, vcpu):
            return None
        from pyvmm.cpucopy import copy_state

        cpu = copy_state(vm.memory, vcpu)
        length = x86.int3_length(cpu.fetch(), cpu.mode) or 1
        return _bpt(vm, vcpu, length)
    if debug.dr6 & x86.DR6_HITS and vcpu.breakpoints:
        return exits.Db(debug.dr6)
    if vcpu.stepping:
        return MTRAP
    if vcpu.control & kvm.KVM_GUESTDBG_SINGLESTEP:
        return None  # the step was called off while it was under way
    return exits.Db(debug.dr6)


def _bpt(vm: VM, vcpu: VcpuRecord, length: int) -> exits.Exit | None:
    """An int3 that the host did not execute: an exit if it was asked for, else the guest's."""
    if Capability.BPT_EXIT in vcpu.wanted:
        return exits.Bpt(length)
    vcpu.last_exit = None  # I/O, if that is what it was, is finished by now
    kept, vcpu.entry_inst_length = vcpu.entry_inst_length, length
    vm.inject_exception(vcpu.vcpu_id, x86.VECTOR_BP)
    vcpu.entry_inst_length = kept
    return None


def _internal_error(vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
    """KVM's instruction emulator gave up.  On some hosts that is how an int3 shows itself."""
    from pyvmm.cpucopy import complete_for_host, complete_in_software, copy_state

    failure = vcpu.kvm_run.emulation_failure
    if failure.suberror != kvm.KVM_INTERNAL_ERROR_EMULATION:
        return exits.InternalError(failure.suberror, b"")
    code = b""
    if failure.flags & kvm.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
        code = bytes(failure.insn_bytes[: failure.insn_size])
    cpu = copy_state(vm.memory, vcpu)
    length = x86.int3_length(code, cpu.mode)
    if length is not None:
        return None if vm.stepper.not_the_guests_int3(vm, vcpu) else _bpt(vm, vcpu, length)
    if complete_in_software(vcpu, cpu, code) or complete_for_host(vcpu, cpu, code):
        return MTRAP if vcpu.stepping else None
    return exits.InternalError(failure.suberror, code)


def _set_tpr(vm: VM, vcpu: VcpuRecord) -> exits.Exit | None:
    """The guest has lowered CR8, and there is nobody who would hold back interrupts for it.

    The instruction is complete, and KVM has forgotten a single-step that ended with it.
    """
    return MTRAP if vcpu.stepping else None


def _shutdown_exit(vm: VM, vcpu: VcpuRecord) -> exits.Exit:
    return exits.Shutdown()


def _system_event(vm: VM, vcpu: VcpuRecord) -> exits.Exit:
    return exits.SystemEvent(vcpu.kvm_run.system_event.type)


def _fail_entry(vm: VM, vcpu: VcpuRecord) -> exits.Exit:
    return exits.FailEntry(vcpu.kvm_run.fail_entry.hardware_entry_failure_reason)


def _unhandled(vm: VM, vcpu: VcpuRecord) -> exits.Exit:
    reason = vcpu.kvm_run.exit_reason
    return exits.Unhandled(kvm.EXIT_NAMES.get(reason, f"KVM exit {reason}"))


DECODERS: dict[int, Callable[[VM, VcpuRecord], exits.Exit | None]] = {
    kvm.KVM_EXIT_IO: _io_exit,
    kvm.KVM_EXIT_MMIO: _mmio_exit,
    kvm.KVM_EXIT_HLT: _hlt_exit,
    kvm.KVM_EXIT_DEBUG: _debug_exit,
    kvm.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    kvm.KVM_EXIT_SET_TPR: _set_tpr,
    kvm.KVM_EXIT_SHUTDOWN: _shutdown_exit,
    kvm.KVM_EXIT_SYSTEM_EVENT: _system_event,
    kvm.KVM_EXIT_FAIL_ENTRY: _fail_entry,
}

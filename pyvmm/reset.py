"""Back to power-on: vCPUs, interrupt controllers and timer as KVM makes them.

Nobody has to remember what that looks like: a second VM is made for a moment, and its state copied.
So a VM that is never reset pays nothing for it.
Source: api.rst, for what each KVM_GET_* and KVM_SET_* covers.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from pyvmm import handles, kvm
from pyvmm.light import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.hypervisor import VM

# In this order: the LAPIC needs its base from sregs, and mp_state comes last because the others
# are refused by a vCPU that waits for INIT on some kernels.
_STATE = (
    kvm.kvm_regs,
    kvm.kvm_xcrs,
    kvm.kvm_xsave,
    kvm.kvm_sregs,
    kvm.kvm_debugregs,
    kvm.kvm_vcpu_events,
)
_IRQCHIP_STATE = (kvm.kvm_lapic_state, kvm.kvm_mp_state)

_ALL_EVENTS = kvm.KVM_VCPUEVENT_VALID_NMI_PENDING | kvm.KVM_VCPUEVENT_VALID_SHADOW
_MSR_TSC, _MSR_TSC_ADJUST = 0x10, 0x3B  # the time goes on


def power_on(vm: VM) -> None:
    """Copy a new VM's state into `vm`, all of whose vCPUs are held."""
    with vm.like_this() as new:
        if vm.irqchip:  # first: what they still raise is wiped out of the LAPICs
            vm.handle.set_interrupt_controllers(new.handle.get_interrupt_controllers())
        for vcpu_id in vm.vcpu_ids():
            new.create_vcpu(vcpu_id)
            source, target = new.handle_of(vcpu_id), vm.handle_of(vcpu_id)
            if vm.irqchip:
                # KVM takes in INIT and SIPI that were on their way only when it is asked this.
                target.get(kvm.kvm_mp_state)
            _copy_msrs(source, target, vm.msr_indices)
            for kind in _STATE + (_IRQCHIP_STATE if vm.irqchip else ()):
                state = source.get(kind)
                if isinstance(state, kvm.kvm_vcpu_events):
                    state.flags = _ALL_EVENTS
                target.set(state)


def _copy_msrs(
    source: handles.VcpuHandle, target: handles.VcpuHandle, indices: Iterable[int]
) -> None:
    for index in indices:
        if index not in (_MSR_TSC, _MSR_TSC_ADJUST):
            with suppress(kvm.KvmError):  # one that this vCPU does not have, or that is read-only
                target.set_msrs({index: source.get_msrs([index])[0]})

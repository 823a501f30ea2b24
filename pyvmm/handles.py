"""System, VM and vCPU: a descriptor of /dev/kvm each, and the ioctls that belong to it.

Thin: a method is one ioctl, or the few that only make sense together.  What to ask for, and when,
is decided in hypervisor.py.
Source: the kernel's Documentation/virt/kvm/api.rst, where each ioctl has a section of its name.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterable
from ctypes import c_uint8, c_uint32

from pyvmm import kvm
from pyvmm.light import Any, TypeVar

State = TypeVar("State", bound=ctypes.Structure)

# The state that a vCPU can be asked for and given, by its struct.
VCPU_STATE: dict[type[ctypes.Structure], tuple[int, int]] = {
    kvm.kvm_regs: (kvm.KVM_GET_REGS, kvm.KVM_SET_REGS),
    kvm.kvm_sregs: (kvm.KVM_GET_SREGS, kvm.KVM_SET_SREGS),
    kvm.kvm_fpu: (kvm.KVM_GET_FPU, kvm.KVM_SET_FPU),
    kvm.kvm_xsave: (kvm.KVM_GET_XSAVE, kvm.KVM_SET_XSAVE),
    kvm.kvm_xcrs: (kvm.KVM_GET_XCRS, kvm.KVM_SET_XCRS),
    kvm.kvm_vcpu_events: (kvm.KVM_GET_VCPU_EVENTS, kvm.KVM_SET_VCPU_EVENTS),
    kvm.kvm_debugregs: (kvm.KVM_GET_DEBUGREGS, kvm.KVM_SET_DEBUGREGS),
    kvm.kvm_mp_state: (kvm.KVM_GET_MP_STATE, kvm.KVM_SET_MP_STATE),
    kvm.kvm_lapic_state: (kvm.KVM_GET_LAPIC, kvm.KVM_SET_LAPIC),
}

# Where in the map KVM leaves what leave_registers() asks for.
_LEFT_AT_EXIT: dict[type[ctypes.Structure], int] = {
    kvm.kvm_regs: kvm.kvm_run.s.offset + kvm.kvm_sync_regs.regs.offset,
    kvm.kvm_sregs: kvm.kvm_run.s.offset + kvm.kvm_sync_regs.sregs.offset,
}


class Handle:
    """A KVM file descriptor that is closed exactly once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ioctl(self, request: int, argument: Any = None) -> int:
        """See kvm.ioctl()."""
        return kvm.ioctl(self.fd, request, argument)

    def close(self) -> None:
        """Close the descriptor; closing it again does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def stats_fd(self) -> int:
        """A new descriptor with this object's binary statistics (api.rst, KVM_GET_STATS_FD)."""
        return self.ioctl(kvm.KVM_GET_STATS_FD)


class SystemHandle(Handle):
    """/dev/kvm itself."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open `path`.  Raises OSError when it is missing or may not be used, or is no KVM."""
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        try:
            version = self.ioctl(kvm.KVM_GET_API_VERSION)
            if version != kvm.KVM_API_VERSION:
                raise kvm.KvmError(
                    errno.ENOTSUP, f"KVM API version {version}, not {kvm.KVM_API_VERSION}"
                )
        except OSError as error:
            self.close()
            raise kvm.KvmError(error.errno, f"not a KVM device ({error.strerror})", path) from None

    def check_extension(self, capability: int) -> int:
        """The value of KVM_CAP_*: 0 when the host does not have it."""
        return self.ioctl(kvm.KVM_CHECK_EXTENSION, capability)

    def create_vm(self) -> VmHandle:
        """A new, empty VM.  An interrupted KVM_CREATE_VM is tried again, as api.rst asks for."""
        while True:
            try:
                return VmHandle(self.ioctl(kvm.KVM_CREATE_VM, 0))
            except kvm.KvmError as error:
                if error.errno != errno.EINTR:
                    raise

    def vcpu_mmap_size(self) -> int:
        """The size in bytes of the map of a vCPU's descriptor: kvm_run and the coalesced ring."""
        return self.ioctl(kvm.KVM_GET_VCPU_MMAP_SIZE)

    def msr_indices(self) -> tuple[int, ...]:
        """The model-specific registers that KVM saves and restores on this host."""
        indices = kvm.flexible(kvm.kvm_msr_list, c_uint32, 1024)()
        indices.header.nmsrs = 1024
        self.ioctl(kvm.KVM_GET_MSR_INDEX_LIST, indices)
        return tuple(indices.entries[: indices.header.nmsrs])

    def supported_cpuid(self) -> Any:
        """What KVM can offer a guest: a kvm_cpuid2 whose `entries[:header.nent]` are valid."""
        count = 128
        while True:
            cpuid = kvm.flexible(kvm.kvm_cpuid2, kvm.kvm_cpuid_entry2, count)()
            cpuid.header.nent = count
            try:
                self.ioctl(kvm.KVM_GET_SUPPORTED_CPUID, cpuid)
                return cpuid
            except kvm.KvmError as error:
                if error.errno != errno.E2BIG:
                    raise
                count *= 2


class VmHandle(Handle):
    """A VM's descriptor."""

    def create_vcpu(self, vcpu_id: int, mmap_size: int) -> VcpuHandle:
        """Create vCPU `vcpu_id` (its APIC id) and map its kvm_run, `mmap_size` bytes."""
        return VcpuHandle(self.ioctl(kvm.KVM_CREATE_VCPU, vcpu_id), mmap_size)

    def set_memory_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Back [gpa, gpa + size) with the memory at `hva`; a size of 0 removes the slot."""
        self.ioctl(
            kvm.KVM_SET_USER_MEMORY_REGION,
            kvm.kvm_userspace_memory_region(slot, flags, gpa, size, hva),
        )

    def create_irqchip(self) -> None:
        """LAPICs, an IOAPIC, two PICs and a PIT in the kernel.  Before the first vCPU."""
        self.ioctl(kvm.KVM_CREATE_IRQCHIP)
        # The speaker's port, 0x61, is how guests measure time with the PIT.
        self.ioctl(kvm.KVM_CREATE_PIT2, kvm.kvm_pit_config(kvm.KVM_PIT_SPEAKER_DUMMY))
        self._route_interrupts()

    def _route_interrupts(self) -> None:
        """As on every PC: line n to pin n of PIC and IOAPIC, but the timer to IOAPIC pin 2."""
        pins = [(gsi, gsi >> 3, gsi & 7) for gsi in range(16) if gsi != 2]  # 2: the second PIC
        pins += [(gsi, kvm.KVM_IRQCHIP_IOAPIC, gsi or 2) for gsi in range(24) if gsi != 2]
        routing = kvm.flexible(kvm.kvm_irq_routing, kvm.kvm_irq_routing_entry, len(pins))()
        routing.header.nr = len(pins)
        for entry, (gsi, chip_id, pin) in zip(routing.entries, pins, strict=True):
            entry.gsi, entry.type = gsi, kvm.KVM_IRQ_ROUTING_IRQCHIP
            entry.u.irqchip = kvm.kvm_irq_routing_irqchip(chip_id, pin)
        self.ioctl(kvm.KVM_SET_GSI_ROUTING, routing)

    def get_interrupt_controllers(self) -> list[ctypes.Structure]:
        """The state of PIT, both PICs and IOAPIC, for set_interrupt_controllers().

        In this order: a PIT that still runs raises interrupts in the others.
        """
        pit = kvm.kvm_pit_state2()
        self.ioctl(kvm.KVM_GET_PIT2, pit)
        states: list[ctypes.Structure] = [pit]
        for chip_id in (
            kvm.KVM_IRQCHIP_PIC_MASTER,
            kvm.KVM_IRQCHIP_PIC_SLAVE,
            kvm.KVM_IRQCHIP_IOAPIC,
        ):
            states.append(kvm.kvm_irqchip(chip_id))
            self.ioctl(kvm.KVM_GET_IRQCHIP, states[-1])
        return states

    def set_interrupt_controllers(self, states: Iterable[ctypes.Structure]) -> None:
        """Write back what get_interrupt_controllers() returned."""
        for state in states:
            self.ioctl(
                kvm.KVM_SET_PIT2 if isinstance(state, kvm.kvm_pit_state2) else kvm.KVM_SET_IRQCHIP,
                state,
            )

    def irq_line(self, gsi: int, level: int) -> None:
        """Set interrupt line `gsi` of the in-kernel irqchip to `level` (0 or 1)."""
        self.ioctl(kvm.KVM_IRQ_LINE, kvm.kvm_irq_level(gsi, level))

    def coalesce(self, address: int, size: int, *, pio: bool, stop: bool = False) -> None:
        """Let KVM collect writes to [address, address + size) in the coalesced ring, or `stop`."""
        request = kvm.KVM_UNREGISTER_COALESCED_MMIO if stop else kvm.KVM_REGISTER_COALESCED_MMIO
        self.ioctl(request, kvm.kvm_coalesced_mmio_zone(address, size, pio))

    def ioeventfd(self, eventfd: int, address: int, length: int, **flags: int) -> None:
        """Signal `eventfd` on guest writes of `length` bytes to `address`, without an exit.

        Keywords: `flags` (KVM_IOEVENTFD_FLAG_*), `datamatch`.
        """
        self.ioctl(
            kvm.KVM_IOEVENTFD, kvm.kvm_ioeventfd(fd=eventfd, addr=address, len=length, **flags)
        )


def _guest_debug(fd: int, control: int, debugreg: tuple[int, ...]) -> Callable[[], int]:
    """KVM_SET_GUEST_DEBUG as a call without arguments: 0, or -1 when the kernel refuses."""
    debug = kvm.kvm_guest_debug(control)
    for number, value in enumerate(debugreg):
        debug.debugreg[number] = value
    return functools.partial(kvm.ioctl_of_ints, fd, kvm.KVM_SET_GUEST_DEBUG, ctypes.byref(debug))


class VcpuHandle(Handle):
    """A vCPU's descriptor and its mapped `struct kvm_run`."""

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        try:
            # The map holds a reference to the VM: the VM lives until it is closed.
            self.map = mmap.mmap(fd, mmap_size)
        except OSError:
            super().close()
            raise
        self.run = kvm.kvm_run.from_buffer(self.map)
        # The last KVM_SET_GUEST_DEBUG: a debugger steps with the same one thousands of times.
        self._debug_wanted: tuple[int, tuple[int, ...]] | None = None
        self._set_guest_debug: Callable[[], int] = lambda: 0
        # KVM_RUN for the run loop, where each microsecond counts: 0, or else check_interrupted().
        self.enter = functools.partial(kvm.ioctl_of_ints, fd, kvm.KVM_RUN, 0)

    def close(self) -> None:
        """Unmap kvm_run and close.  Nobody may be in KVM_RUN."""
        if self.fd >= 0:
            del self.run  # mmap.close() raises while a view is alive
            self.map.close()
        super().close()

    def leave_registers(self, leave: bool) -> None:
        """Let KVM leave registers in kvm_run at each exit: get() then needs no system call.

        With True, the next thing must be KVM_RUN.  Whatever writes registers switches it off again
        (api.rst, KVM_CAP_SYNC_REGS).
        """
        self.run.kvm_valid_regs = kvm.KVM_SYNC_X86_REGS | kvm.KVM_SYNC_X86_SREGS if leave else 0

    def get(self, kind: type[State]) -> State:
        """Read one of VCPU_STATE: `vcpu.get(kvm_regs)`."""
        if kind in _LEFT_AT_EXIT and self.run.kvm_valid_regs:
            return kind.from_buffer_copy(self.map, _LEFT_AT_EXIT[kind])
        state = kind()
        self.ioctl(VCPU_STATE[kind][0], state)
        return state

    def get_bytes(self, kind: type[ctypes.Structure]) -> bytes:
        """The same as bytes: to compare, or to look at one field."""
        if kind in _LEFT_AT_EXIT and self.run.kvm_valid_regs:
            start = _LEFT_AT_EXIT[kind]
            return self.map[start : start + ctypes.sizeof(kind)]
        return bytes(self.get(kind))

    def set(self, state: ctypes.Structure) -> None:
        """Write back what get() returned.  Raises KvmError for what cannot be."""
        self.leave_registers(False)
        if isinstance(state, kvm.kvm_sregs):
            # Without an in-kernel LAPIC, KVM_RUN begins with loading CR8 from here, and fails if it
            # cannot; KVM_SET_SREGS ignores what it cannot.
            if state.cr8 >> 4:
                raise kvm.KvmError(errno.EINVAL, "CR8 has 4 bits")
            self.run.cr8 = state.cr8
        self.ioctl(VCPU_STATE[type(state)][1], state)

    def get_msrs(self, indices: Iterable[int]) -> list[int]:
        """Values of model-specific registers.  Raises KvmError (EINVAL) if KVM knows one not."""
        wanted = list(indices)
        msrs = kvm.flexible(kvm.kvm_msrs, kvm.kvm_msr_entry, len(wanted))()
        msrs.header.nmsrs = len(wanted)
        for entry, index in zip(msrs.entries, wanted, strict=True):
            entry.index = index
        done = self.ioctl(kvm.KVM_GET_MSRS, msrs)
        if done != len(wanted):
            raise kvm.KvmError(errno.EINVAL, f"KVM_GET_MSRS: no MSR {wanted[done]:#x} on this host")
        return [entry.data for entry in msrs.entries]

    def set_msrs(self, values: dict[int, int]) -> None:
        """Write model-specific registers.  Raises KvmError (EINVAL) naming the one refused."""
        self.leave_registers(False)  # EFER and segment bases are in kvm_sregs, too
        msrs = kvm.flexible(kvm.kvm_msrs, kvm.kvm_msr_entry, len(values))()
        msrs.header.nmsrs = len(values)
        for entry, (index, value) in zip(msrs.entries, values.items(), strict=True):
            entry.index, entry.data = index, value
        done = self.ioctl(kvm.KVM_SET_MSRS, msrs)
        if done != len(values):
            index = list(values)[done]
            raise kvm.KvmError(
                errno.EINVAL, f"KVM_SET_MSRS: {index:#x} <- {values[index]:#x} refused"
            )

    def set_signal_mask(self, signals: Iterable[int]) -> None:
        """Block exactly `signals` while in KVM_RUN (api.rst, KVM_SET_SIGNAL_MASK)."""
        mask = kvm.flexible(kvm.kvm_signal_mask, c_uint8, 8)()
        mask.header.len = 8  # the kernel's sigset_t, not the C library's
        bits = sum(1 << (number - 1) for number in signals)
        mask.entries[:] = bits.to_bytes(8, "little")
        self.ioctl(kvm.KVM_SET_SIGNAL_MASK, mask)

    def set_guest_debug(self, control: int, debugreg: Iterable[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG with KVM_GUESTDBG_* flags and DR0..DR7 (DR4, DR5 unused)."""
        wanted = control, tuple(debugreg)
        if wanted != self._debug_wanted:
            self._debug_wanted, self._set_guest_debug = wanted, _guest_debug(self.fd, *wanted)
        if self._set_guest_debug() < 0:
            raise kvm.failure(kvm.KVM_SET_GUEST_DEBUG)

"""What the hypervisor layer keeps for each vCPU, and the words it is asked with.

The lock discipline is the one of debuggedset.py: fields in the first group of VcpuRecord are
guarded by VM._lock, those in the second belong to the thread that runs the vCPU.
"""

from __future__ import annotations

import functools
import signal
import threading
from enum import Enum

from pyvmm import exits, handles, kvm
from pyvmm.light import NamedTuple

KICK_SIGNAL = signal.SIGRTMIN + 2  # the C library uses the first two for itself


class VmError(OSError):
    """The VM refused a request; `errno` says which way (as bhyve's ioctls do)."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)
        self.message = message


class Capability(Enum):
    """What a vCPU can be asked to do; see VM.set_capability()."""

    BPT_EXIT = "int3 leaves the guest"
    MTRAP_EXIT = "single-step: each instruction leaves the guest"
    HLT_EXIT = "hlt leaves the guest"

    __hash__ = object.__hash__  # Enum's own, of the name, is slow, and these are asked for often


class HardwareBreakpoint(NamedTuple):
    """What one of DR0 to DR3 watches: `length` bytes (1, 2, 4, 8) at `gva`.

    `kind` is the debug register's R/W field: EXECUTE (length 1), WRITE or ACCESS (read or write).
    """

    gva: int
    kind: int
    length: int = 1


EXECUTE, WRITE, ACCESS = 0, 1, 3  # Intel SDM vol. 3B, "Debug Control Register (DR7)"


class Guard:
    """A `hlt` on the first byte of the guest's #GP handler, in place of `original`.

    In ring 3 a planted `hlt` raises #GP; that is how a breakpoint there is noticed.
    """

    def __init__(self, gpa: int, original: int) -> None:
        self.gpa, self.original = gpa, original


class VcpuRecord:
    """What the hypervisor layer knows of one vCPU."""

    def __init__(self, vcpu_id: int, handle: handles.VcpuHandle, lock: threading.Lock) -> None:
        self.vcpu_id = vcpu_id
        self.handle = handle
        self.fd, self.enter = handle.fd, handle.enter
        self.kvm_run, self.map = handle.run, handle.map
        # Guarded by VM._lock.
        self.thread_id: int | None = None  # the thread that runs it; None: not active
        self.kicked = False  # KICK_SIGNAL was sent and has not been taken
        self.debugged = False
        self.held = False  # kept out of the guest by VM.hold()
        self.ended = False  # the VM is ending
        self.bp_queued: int | None = None  # a #BP to deliver in software, RIP this much further
        self.asleep = False  # in vm.sleep()
        self.halted = False  # executed hlt, no in-kernel irqchip to wait in
        self.wanted: frozenset[Capability] = frozenset()
        self.breakpoints: tuple[HardwareBreakpoint, ...] = ()
        self.nmi_wanted = False
        self.int3_exits = False  # also without BPT_EXIT: another vCPU's step may plant some
        self.stale = False  # `wanted`, `breakpoints` or `nmi_wanted` not yet told to KVM
        self.wake = threading.Condition(lock)  # something that vm.sleep() waits for has changed
        self.step_range = range(0)  # GVAs; see VM.set_step_range()
        self.attention = False  # vm.run() must look at the above before it enters
        self.interrupted = False  # the same, but for MTRAP_EXIT: also between two steps in a range
        self.stepping = False  # MTRAP_EXIT is wanted
        # Owned by the vCPU's thread (by the debugger while parked).
        self.last_exit: exits.Exit | None = None  # of the last KVM_RUN that was not interrupted
        self.step_rip = 0  # where the last single-step began
        self.control = 0  # the KVM_GUESTDBG_* flags that KVM has now
        self.entry_inst_length = 0  # Register.GUEST_ENTRY_INST_LENGTH
        self.startup_awaited = False  # nobody has seen yet that it has got its start-up IPI

    @property
    def io_in_flight(self) -> bool:
        """Whether the last exit was an access that KVM finishes only when it is entered again."""
        return isinstance(self.last_exit, (exits.InOut, exits.Mmio))

    @property
    def parked(self) -> bool:
        """Debugged, and its thread sleeps: it executes nothing and its registers hold still."""
        return self.debugged and self.asleep and not self.held

    def update_attention(self) -> None:
        """Call with VM._lock held, after any change of a guarded field."""
        self.interrupted = (
            self.ended
            or self.debugged
            or self.held
            or self.halted
            or self.stale
            or self.bp_queued is not None
        )
        self.stepping = Capability.MTRAP_EXIT in self.wanted
        self.attention = self.interrupted or self.stepping

    def execute_hits(self, gva: int) -> int:
        """DR6's bits for the hardware breakpoints on the instruction at `gva`."""
        numbered = enumerate(self.breakpoints)
        return sum(1 << n for n, b in numbered if (b.kind, b.gva) == (EXECUTE, gva))

    def set_guest_debug(self, *, step: bool = False, int3: bool = False) -> None:
        """Tell KVM which traps are wanted now (KVM_SET_GUEST_DEBUG).  On the vCPU's own thread.

        `step` and `int3` add what nobody has asked for.  Without a step, this takes the trap flag
        out of RFLAGS again.
        """
        control = 0
        if int3 or self.int3_exits or Capability.BPT_EXIT in self.wanted:
            control |= kvm.KVM_GUESTDBG_USE_SW_BP
        if step or self.stepping:
            control |= kvm.KVM_GUESTDBG_SINGLESTEP | kvm.KVM_GUESTDBG_BLOCKIRQ
        if self.breakpoints:
            control |= kvm.KVM_GUESTDBG_USE_HW_BP
        if control:
            control |= kvm.KVM_GUESTDBG_ENABLE
        self.handle.set_guest_debug(control, _debug_registers(self.breakpoints))
        self.control = control

    def close(self) -> None:
        """Close the vCPU's descriptor.  Nobody may be in KVM_RUN."""
        del self.kvm_run, self.map  # the map cannot be closed while a view of it lives
        self.handle.close()


@functools.lru_cache(maxsize=64)  # asked for before each step
def _debug_registers(breakpoints: tuple[HardwareBreakpoint, ...]) -> tuple[int, ...]:
    """DR0 to DR7 that make the processor watch for these."""
    debugreg = [0] * 8
    if breakpoints:
        debugreg[7] = 0x400  # bit 10 is always 1
    for number, breakpoint in enumerate(breakpoints):
        debugreg[number] = breakpoint.gva
        debugreg[7] |= _dr7_bits(number, breakpoint)
    return tuple(debugreg)


def _dr7_bits(number: int, breakpoint: HardwareBreakpoint) -> int:
    """The bits of DR7 that make debug register `number` watch for `breakpoint`."""
    length_field = {1: 0, 2: 1, 4: 3, 8: 2}[breakpoint.length]
    globally_enabled = 2 << 2 * number
    return globally_enabled | (breakpoint.kind | length_field << 2) << (16 + 4 * number)

"""Why a vCPU left the guest: one frozen dataclass for each kind of exit.

`vm.run()` returns one of these.  They are facts copied out of the kernel's `struct kvm_run`, which
changes at the next entry; nothing in them refers to it.  The first group are KVM's exits under
bhyve's names, the second are exits that the hypervisor layer makes (see hypervisor.py).
"""

from __future__ import annotations

from pyvmm.light import dataclass


class Exit:
    """Base of all exits; `name` is what is shown to users."""

    @property
    def name(self) -> str:
        return type(self).__name__.upper()


@dataclass(frozen=True)
class InOut(Exit):
    """Port I/O.  KVM_EXIT_IO.

    `size` bytes at a time, `count` times (above 1: a string instruction).  For `out`, `data` holds
    size * count bytes; for `in` it is empty and the device's bytes are given with vm.answer().
    """

    port: int
    size: int
    is_in: bool
    count: int
    data: bytes


@dataclass(frozen=True)
class Mmio(Exit):
    """An access to a GPA that is not RAM.  KVM_EXIT_MMIO.

    An access of more than 8 bytes, or over a page boundary, comes as several of these.  For a write
    `data` holds `size` bytes; for a read it is empty and the answer is given with vm.answer().
    """

    gpa: int
    size: int
    is_write: bool
    data: bytes


@dataclass(frozen=True)
class Hlt(Exit):
    """The guest executed `hlt` and waits for an interrupt; `interrupts_enabled` is RFLAGS.IF.

    Returned again by each vm.run() until something wakes the vCPU.
    """

    interrupts_enabled: bool


@dataclass(frozen=True)
class Shutdown(Exit):
    """A triple fault: an exception while delivering a double fault.  KVM_EXIT_SHUTDOWN."""


@dataclass(frozen=True)
class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT; `type` is KVM_SYSTEM_EVENT_*."""

    type: int


@dataclass(frozen=True)
class FailEntry(Exit):
    """The processor refused the guest's state.  KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: int


@dataclass(frozen=True)
class InternalError(Exit):
    """KVM gave up.  KVM_EXIT_INTERNAL_ERROR; `instruction` holds the bytes it could not emulate."""

    suberror: int
    instruction: bytes


@dataclass(frozen=True)
class Unhandled(Exit):
    """An exit that pyvmm never asked for; `reason` is the kernel's name of it."""

    reason: str


@dataclass(frozen=True)
class Bpt(Exit):
    """An int3 with the BPT_EXIT capability on, or a `hlt` that a debugger has planted.

    RIP is at the instruction.  `inst_length` is its length in bytes: 1 for CC and hlt, more with
    prefixes.
    """

    inst_length: int


@dataclass(frozen=True)
class Mtrap(Exit):
    """One instruction was executed with the MTRAP_EXIT capability on."""


@dataclass(frozen=True)
class Db(Exit):
    """A #DB that the VMM caused: a hardware breakpoint or watchpoint (or a stray trap).

    `dr6` is the debug status: bits 0 to 3 tell which of DR0 to DR3 matched, bit 14 (BS) that the
    vCPU was stepping as well.  Intel SDM vol. 3B, "Debug Status Register (DR6)".
    """

    dr6: int


@dataclass(frozen=True)
class Debug(Exit):
    """The vCPU is in the debugged set.  No guest instruction was executed."""


@dataclass(frozen=True)
class Ended(Exit):
    """The VM is ending (vm.end() was called).  No guest instruction was executed."""

"""Why a machine stopped, as a fact for whoever started it."""

from __future__ import annotations

from enum import Enum

from pyvmm.light import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pyvmm import exits


class StopReason(Enum):
    """Why Machine.run() returned."""

    HALTED = "the guest ended by itself"
    POWERED_OFF = "the guest switched the machine off"
    RESET = "the guest asked for a reset, and the machine was not to do that"
    DEBUG_EXIT = "the guest wrote to the debug-exit port"
    CRASHED = "the guest crashed"
    FAILED = "the host or the VMM failed"
    TIMEOUT = "the time limit was reached"
    EXIT_LIMIT = "the limit of exits was reached"
    KILLED = "the debugger ended the VM"
    INTERRUPTED = "somebody called Machine.interrupt()"


# Exit statuses of the process.  Odd ones are the guest's own, (value << 1) | 1; even ones ours.
STATUS_OK, STATUS_USAGE, STATUS_FAILED, STATUS_CRASHED = 0, 2, 4, 6
STATUS_TIMEOUT = 124  # as timeout(1)

_STATUS = {
    StopReason.HALTED: STATUS_OK,
    StopReason.POWERED_OFF: STATUS_OK,
    StopReason.RESET: STATUS_OK,
    StopReason.CRASHED: STATUS_CRASHED,
    StopReason.FAILED: STATUS_FAILED,
    StopReason.TIMEOUT: STATUS_TIMEOUT,
}


class Stop(NamedTuple):
    """A reason and what to tell a person.

    `message` is one line, `report` more of them (registers, the bytes at RIP); `exit` is what a
    crashed vCPU left the guest with; `guest_status` what the guest gave to the debug-exit port.
    """

    reason: StopReason
    message: str
    report: str = ""
    vcpu_id: int | None = None
    exit: exits.Exit | None = None
    guest_status: int | None = None

    @property
    def status(self) -> int:
        """The exit status of a process that ends for this reason."""
        if self.guest_status is not None:
            return self.guest_status
        return _STATUS.get(self.reason, STATUS_OK)

    @property
    def final(self) -> bool:
        """Whether the VM is over, and not merely stopped until the next Machine.run()."""
        return self.reason not in (
            StopReason.TIMEOUT,
            StopReason.EXIT_LIMIT,
            StopReason.INTERRUPTED,
        )

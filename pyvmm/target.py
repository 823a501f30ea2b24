"""What a debugger can ask of a virtual machine: the seam between the stub and the debug server.

The stub (stub.py) knows packets and nothing of KVM; the debug server (debug.py) knows run control
and nothing of packets. They meet here: facts as frozen dataclasses, and `Target`, the interface
that the debug server implements and that tests fake.

vCPUs are named by `vcpu_id` (0-based) on this side; thread ids exist only in packets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from pyvmm.light import Protocol
from pyvmm.registers import Architecture, RegisterFile, Value


class TargetError(Exception):
    """The target cannot do what the debugger asked. The session goes on: it becomes an E reply.

    `errno`: what clients see that show only numbers. `message`: one line for the user, without a
    full stop, that says why, and what to do instead if there is something.
    """

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno, self.message = errno, message


class StopKind(Enum):
    """Why the VM stopped; the values are the words of stop replies."""

    SIGNAL = ""  # nothing more than the signal says: a step is done, ^C, a crash
    SWBREAK = "swbreak"
    HWBREAK = "hwbreak"
    WATCH = "watch"  # the address was written
    RWATCH = "rwatch"  # ... read
    AWATCH = "awatch"  # ... read or written
    EXITED = "exited"
    SIGNALLED = "signalled"  # the VM has crashed, and its state is gone


SIGINT, SIGTRAP, SIGABRT, SIGSEGV = 2, 5, 6, 11  # the numbers are gdb's, not the host's


class StopReport(NamedTuple):
    """One stop of the VM."""

    vcpu_id: int  # whose event it is; no meaning if EXITED or SIGNALLED
    signal: int = SIGTRAP
    kind: StopKind = StopKind.SIGNAL
    gva: int = 0  # of data, if WATCH, RWATCH or AWATCH: somewhere in what is watched
    status: int = 0  # the exit status, if EXITED
    message: str = ""  # for the user to read


class ActionKind(Enum):
    """What a vCPU shall do when the VM is resumed."""

    CONTINUE = "c"
    STEP = "s"  # one instruction, then stop
    RANGE_STEP = "r"  # instructions, until RIP is outside of [start, end)


class Action(NamedTuple):
    """An action for one vCPU; `start` and `end` are those of a RANGE_STEP."""

    kind: ActionKind
    start: int = 0  # GVA
    end: int = 0


class BreakpointKind(IntEnum):
    """The digit in `Z0`..`Z4`."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


@dataclass(frozen=True)
class MemoryRegion:
    """[start, start + length) in GVAs with the same permissions; "" means nothing is mapped."""

    start: int
    length: int
    permissions: str  # of "rwx"


@dataclass(frozen=True)
class ExecFile:
    """The one file that is ever served: the image's ELF, with its symbols."""

    path: str  # absolute: gdb asks for it by this name
    bits: int  # 32 or 64: the class of the ELF
    size: int  # bytes
    # (offset, length in bytes) -> at most so many bytes; may raise OSError
    pread: Callable[[int, int], bytes]


class Target(Protocol):
    """A virtual machine under debug.

    Every method may raise TargetError, and nothing else; vcpu_ids, architecture and has_avx raise
    nothing. Unless a line says otherwise, they are called only while the VM is stopped, that is,
    while all vCPUs are parked.
    """

    last_error: str  # why the last packet was refused: the stub writes it, for `monitor error`

    # What it is.

    def vcpu_ids(self) -> Sequence[int]:
        """The vCPUs that exist now, in order. Asked often: must be cheap."""

    def describe(self, vcpu_id: int) -> str:
        """A vCPU's state in words, as `info threads` shows it: "halted, CPL 0, 64-bit mode"."""

    def architecture(self) -> Architecture:
        """What gdb shall be told; see registers.architecture_for. Asked when a session begins and
        each time the debugger reads the target description."""

    def has_avx(self) -> bool:
        """Whether the guest has AVX registers. Asked together with architecture()."""

    def exec_file(self) -> ExecFile | None:
        """The file with the symbols, if there is one. Also called while the VM runs."""

    def moved_base(self) -> int | None:
        """The GVA at which a kernel begins that has moved itself (KASLR): not where its ELF file
        says. None for all others. Asked when a session begins."""

    def memory_map(self) -> Sequence[tuple[int, int]] | None:
        """All GVAs at which there can ever be memory, as (start, length) in bytes; None: not told.

        A trap: gdb takes the map for virtual memory and asks for it only when it connects. Outside
        of it gdb 13 refuses every access and silently makes all breakpoints hardware ones. So the
        ranges of RAM are a wrong answer for a guest that will ever map memory elsewhere, and so are
        the addresses of the mode that it is in: it can switch to another during the session.
        """

    # Registers and memory.

    def read_registers(self, vcpu_id: int, banks: int) -> RegisterFile:
        """The register file, of which at least `banks` (of registers.Bank, added up) are filled
        in."""

    def write_registers(self, vcpu_id: int, updates: Mapping[str, Value]) -> None:
        """Write some registers: all or none."""

    def read_memory(self, vcpu_id: int, gva: int, length: int) -> bytes:
        """Guest memory through the vCPU's own paging, as CPL 0, without patched bytes. Shorter if
        the range ends in memory that is not mapped; TargetError(EFAULT) if it begins there."""

    def write_memory(self, vcpu_id: int, gva: int, data: bytes) -> None:
        """Write all of `data` or nothing."""

    def read_physical(self, gpa: int, length: int) -> bytes:
        """Like read_memory, by guest physical address."""

    def write_physical(self, gpa: int, data: bytes) -> None:
        """Like write_memory, by guest physical address."""

    def memory_region(self, vcpu_id: int, gva: int) -> MemoryRegion:
        """The region that holds `gva`; if nothing is mapped there, the gap around it."""

    # Breakpoints, for every vCPU; `vcpu_id` says whose paging the GVA belongs to.

    def insert_breakpoint(self, kind: BreakpointKind, vcpu_id: int, gva: int, length: int) -> None:
        """Insert; it is fine if it is there. `length` is 1, 2, 4 or 8 bytes; what is watched can
        have any number of bytes, at any address. TargetError(ENOSPC) if it is too much."""

    def remove_breakpoint(self, kind: BreakpointKind, vcpu_id: int, gva: int, length: int) -> None:
        """Remove; it is fine if it is not there."""

    # Running. The debug server tells of the stop later, with stub.stop_reply(report).

    def stop_report(self) -> StopReport:
        """Why the VM is stopped now."""

    def resume(self, actions: Mapping[int, Action], newcomers_run: bool) -> None:
        """Let the vCPUs in `actions` run, at least one; all others stay parked. So does a vCPU
        that is added while the VM runs, unless `newcomers_run`."""

    def interrupt(self) -> bool:
        """Stop the VM and report SIGINT; False if it stops, or has stopped, for another reason.
        Also called while it runs."""

    def detach(self) -> None:
        """Disarm everything and let the guest run on. Also called while it runs."""

    def attach(self) -> None:
        """Stop the VM again after detach() and report SIGTRAP, as at the beginning of a session.
        Called while it runs."""

    def kill(self) -> None:
        """Remember to end the VM once the reply has been sent. Also called while it runs."""

    # More.

    def monitor(self, command: str, vcpu_id: int) -> str:
        """Execute a `monitor` command line; return what the user shall read. `vcpu_id`: of the
        thread that the user has selected."""

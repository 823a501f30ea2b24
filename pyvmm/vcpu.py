"""The vCPU thread: run the guest, look at why it came back, deal with it, again.

Each vCPU has one thread, and only that thread runs it.  The loop is VcpuThread._loop(); what it
does with each kind of exit is HANDLERS, one function a kind.  Whether the vCPU may run at all (the
debugged set) is not decided here but inside vm.run(), which returns a Debug exit for a vCPU that a
debugger holds: its handler sleeps.  A debugger replaces handlers to be told of breakpoints.

An exception in a handler is a bug or a failing host; it ends the VM with its message.  A handler
that returns lets the guest run on; one that raises StopVm ends the VM in an orderly way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from pyvmm import exits
from pyvmm.light import TYPE_CHECKING, Any
from pyvmm.stop import Stop, StopReason

if TYPE_CHECKING:
    from pyvmm.machine import Machine

Handler = Callable[["VcpuThread", Any], None]

ALL_HALTED = "all vCPUs are halted with interrupts off"


class StopVm(Exception):
    """Raised by a handler: the VM is to end for this reason."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.message)
        self.stop = stop


class VcpuThread(threading.Thread):
    """Runs one vCPU until the VM ends."""

    def __init__(self, machine: Machine, vcpu_id: int, handlers: Mapping[type, Handler]) -> None:
        # A daemon, so that one that is stuck in a device cannot keep the interpreter from exiting.
        super().__init__(name=f"vcpu-{vcpu_id}", daemon=True)
        self.machine = machine
        self.vm = machine.vm
        self.vcpu_id = vcpu_id
        self.handlers = handlers  # replaced only while the vCPU is parked
        self.active = threading.Event()  # set when the vCPU counts as active, or has failed to

    def run(self) -> None:
        """The thread's body; threading.Thread calls it."""
        try:
            self.vm.activate_cpu(self.vcpu_id)
        except BaseException as error:
            self.machine.fail(error, self.vcpu_id)
            return
        finally:
            self.active.set()
        try:
            self._loop()
        except StopVm as stop:
            self.machine.stop(stop.stop)
        except BaseException as error:  # an exception that dies with its thread helps nobody
            self.machine.fail(error, self.vcpu_id)
        finally:
            # Not before the VM has ended: a debugger's stop would be complete without this vCPU.
            self.vm.deactivate_cpu(self.vcpu_id)

    def _loop(self) -> None:
        """The run loop."""
        run, vcpu_id, drain = self.vm.run, self.vcpu_id, self.machine.drainer()
        exit: exits.Exit = exits.Debug()
        while type(exit) is not exits.Ended:
            exit = run(vcpu_id)
            drain()  # output that the kernel has collected comes before what this exit does
            self.handlers[type(exit)](self, exit)


# --- one handler for each kind of exit ---------------------------------------------------------


def handle_in_out(cpu: VcpuThread, exit: exits.InOut) -> None:
    """Port I/O: ask the bus, or tell it, once for each repetition of a string instruction."""
    ports, port, size = cpu.machine.ports, exit.port, exit.size
    if exit.is_in:
        values = (ports.read(port, size) for _ in range(exit.count))
        cpu.vm.answer(cpu.vcpu_id, b"".join(v.to_bytes(size, "little") for v in values))
        return
    data = exit.data
    if exit.count == 1:
        ports.write(port, size, int.from_bytes(data, "little"))
        return
    for start in range(0, len(data), size):
        ports.write(port, size, int.from_bytes(data[start : start + size], "little"))


def handle_mmio(cpu: VcpuThread, exit: exits.Mmio) -> None:
    """Memory-mapped I/O: the same, by guest-physical address."""
    if exit.is_write:
        cpu.machine.mmio.write(exit.gpa, exit.size, int.from_bytes(exit.data, "little"))
    else:
        value = cpu.machine.mmio.read(exit.gpa, exit.size)
        cpu.vm.answer(cpu.vcpu_id, value.to_bytes(exit.size, "little"))


def handle_hlt(cpu: VcpuThread, exit: exits.Hlt) -> None:
    """Sleep until something wakes the vCPU.  If nothing ever can, the guest has ended."""
    vm = cpu.vm
    if not exit.interrupts_enabled and vm.all_halted_for_good():
        raise StopVm(Stop(StopReason.HALTED, ALL_HALTED))
    vm.sleep(cpu.vcpu_id)


def handle_debug(cpu: VcpuThread, exit: exits.Debug) -> None:
    """In the debugged set: sleep until resumed."""
    cpu.vm.sleep(cpu.vcpu_id)


def handle_ended(cpu: VcpuThread, exit: exits.Ended) -> None:
    """The VM is ending: the loop does."""


def handle_crash(cpu: VcpuThread, exit: exits.Exit) -> None:
    """A triple fault, a refused entry, or an exit that nobody handles: the end, with a report."""
    raise StopVm(cpu.machine.crash(cpu.vcpu_id, exit))


HANDLERS: dict[type, Handler] = {
    exits.InOut: handle_in_out,
    exits.Mmio: handle_mmio,
    exits.Hlt: handle_hlt,
    exits.Debug: handle_debug,
    exits.Ended: handle_ended,
    exits.Shutdown: handle_crash,
    exits.FailEntry: handle_crash,
    exits.InternalError: handle_crash,
    exits.SystemEvent: handle_crash,
    exits.Unhandled: handle_crash,
    # Exits that only a debugger asks for, and handles with handlers of its own.
    exits.Bpt: handle_crash,
    exits.Mtrap: handle_crash,
    exits.Db: handle_crash,
}

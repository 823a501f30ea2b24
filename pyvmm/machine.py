"""A whole machine: owns the VM, its memory, devices and vCPU threads; builds, runs, ends them.

    with Machine("guests/hello.bin") as machine:
        stop = machine.run(timeout=5)

Order of teardown, which close() follows: ask all to end, join the vCPU threads, drop the views of
their maps, close vCPUs and VM, and last the memory, which KVM may use until then.

Threads: the caller's (run, interrupt, close) and one for each vCPU.  `_lock` guards `_stop`, the
first reason to end; it is a leaf.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from pyvmm import exits, kvm, threads, vcpu
from pyvmm.boot import Image, check_fits, finish_image, layout, read_image
from pyvmm.boot.entry import RESERVED, check_stacks, set_entry_state, write_boot_structures
from pyvmm.bus import Bus, CallbackDevice
from pyvmm.coalesced import CoalescedPorts, Drainer
from pyvmm.cpustate import Register
from pyvmm.debuggedset import ALL
from pyvmm.devices.debugcon import DEBUGCON_PORT
from pyvmm.devices.serial import COM1_PORT
from pyvmm.devices.vga import BLANK_SCREEN, TEXT_GPA
from pyvmm.hypervisor import VM
from pyvmm.light import TYPE_CHECKING
from pyvmm.limits import ExitLimiter
from pyvmm.pc import Facts, Pc, Wiring
from pyvmm.stop import Stop, StopReason
from pyvmm.waiting import Receiver, Typist, Waiter

if TYPE_CHECKING:
    from pyvmm.console import EscapeKeys
    from pyvmm.debug import DebugServer
    from pyvmm.devices.virtio import VirtioDevice
    from pyvmm.idle import IdleWatch
    from pyvmm.screen import Screen
    from pyvmm.virtio_bus import VirtioBus

DEFAULT_MEMORY = 64 << 20  # bytes
MIN_MEMORY, MAX_MEMORY = 1 << 20, 64 << 40

_PATIENCE_SECONDS = 0.5  # how long a vCPU may be busy with output before it is made to drop it
_JOIN_SECONDS = 5.0  # how long a vCPU thread may take to end
_LOOK_SECONDS = 0.1  # how often to look at what nobody tells: that all vCPUs wait for good


class Machine:
    """A guest with its memory, devices and vCPUs.  A context manager; use it from one thread.

    interrupt() may be called from any thread or from a signal handler.  A program that handles
    signals should give `wakeup_fd` to signal.set_wakeup_fd(): one that arrives just before run()
    begins to wait would not end the wait otherwise.
    """

    def __init__(
        self,
        image: Image | str | os.PathLike[str],
        *,
        cpus: int = 1,
        memory: int = DEFAULT_MEMORY,
        output: Callable[[bytes], None] | None = None,
        device: str = "/dev/kvm",
        coalesce: bool = True,
        irqchip: bool | None = None,
        reboot: bool = True,
        virtio: Sequence[VirtioDevice] = (),
    ) -> None:
        """Build a machine that is ready to run `image` (a path, or what read_image() returned).

        `memory` is in bytes.  Guest output goes to `output`, or is kept in the attribute `output`.
        `coalesce=False` makes each printed byte an exit of its own.
        `irqchip`: interrupt controllers and a timer, the tables that tell of them, and vCPUs other
        than the first wait for INIT and SIPI.  None: where there are several vCPUs, or the image
        expects it.  Without, all vCPUs begin at the image's entry, with their number in EDI.
        `reboot=False`: when the guest asks for a reset the machine ends instead.
        `virtio` are further devices, which need the irqchip; the machine closes them.
        Raises ImageError, ValueError for impossible numbers, OSError when KVM refuses.
        """
        try:
            if not isinstance(image, Image):
                image = read_image(image)
            if irqchip is None:
                irqchip = image.expects_pc or cpus > 1 or bool(virtio)
            _check(image, cpus, memory, irqchip=irqchip, has_virtio=bool(virtio))
        except BaseException:
            _close_all(virtio)
            raise
        self.image, self.cpus, self._reboot = image, cpus, reboot
        self.ports, self.mmio = Bus("port"), Bus("GPA")
        self.output = bytearray()
        self._print = output or self.output.extend
        self._coalesced: CoalescedPorts | None = None
        self._drainer: Drainer | None = None
        self.threads: dict[int, vcpu.VcpuThread] = {}
        self.handlers: dict[type, vcpu.Handler] = dict(vcpu.HANDLERS)
        self._lock = threading.Lock()
        self._stop: Stop | None = None
        self._interrupted = False
        self._reset_wanted = False  # set while all vCPUs are held
        self._idle: IdleWatch | None = None
        self._virtio: VirtioBus | None = None
        self._waiter = Waiter()
        self._at_end: list[Callable[[], None]] = []
        self._on_hurry: list[Callable[[], None]] = []
        self._on_reset: list[Callable[[], None]] = []
        self._on_look: list[Callable[[], None]] = []
        self.debug_server: DebugServer | None = None  # set by a debug server that is attached to us
        try:
            self.vm = VM(device=device, cpus=cpus, irqchip=irqchip)
        except OSError:
            self._waiter.close()
            _close_all(virtio)
            raise
        try:
            self._build(memory, coalesce, virtio)
        except BaseException:
            self.close()
            _close_all(virtio)
            raise

    def _build(self, memory: int, coalesce: bool, virtio: Sequence[VirtioDevice]) -> None:
        ram = layout.ram_ranges(memory)
        self._loaded = finish_image(self.image, ram)
        reserved = RESERVED[self.image.mode]
        check_fits(self._loaded, ram, reserved + layout.RESERVED if self.vm.irqchip else reserved)
        if self.cpus > self.vm.max_vcpus:
            raise ValueError(
                f"this host's KVM has at most {self.vm.max_vcpus} vCPUs, not {self.cpus}"
            )
        for gpa, size in ram:
            self.vm.memory.add_slot(gpa, size)
        if self.image.is_linux:  # it uses whatever CPUID offers
            self.vm.hide_what_fails()
        for vcpu_id in range(self.cpus):
            self.vm.create_vcpu(vcpu_id)
        wiring = Wiring(
            self._print,
            self.wake,
            self.vm.set_irq,
            self.request_reset,
            _power_off,
            _debug_exit,
        )
        low, high = ram[0][1], sum(size for _, size in ram[1:])
        self.pc = Pc(
            self.ports, wiring, Facts(low, high, self.cpus, os.fsencode(self.image.append))
        )
        if virtio:
            from pyvmm.virtio_bus import VirtioBus

            ioeventfd = self.vm.handle.ioeventfd if coalesce else None
            self._virtio = VirtioBus(
                self.mmio, self.vm.memory, self.vm.set_irq, ioeventfd, self.fail
            )
            for number, device in enumerate(virtio):
                self._virtio.add(device, f"{type(device).__name__} {number}")
        self._load()
        if coalesce and self.vm.coalesced_pio:
            self._coalesced = CoalescedPorts(
                self.vm.handle,
                self.vm.state(0).map,
                {
                    COM1_PORT: self.pc.serial.write_many,
                    DEBUGCON_PORT: self.pc.debug_console.write_many,
                },
            )
            self.pc.serial.on_transmit_interrupt = self._send_at_once

    def _load(self) -> None:
        """Put the image into memory, which is all zeros, and the vCPUs at its entry."""
        image, memory = self._loaded, self.vm.memory
        write_boot_structures(memory, image.mode, image.selectors)
        memory.write(TEXT_GPA, BLANK_SCREEN)
        if self.vm.irqchip:
            from pyvmm.boot.tables import write_tables

            write_tables(memory, self.cpus, self._virtio.places() if self._virtio else ())
        for segment in image.segments:
            memory.write(segment.gpa, segment.data)
        for vcpu_id in range(1 if self.vm.irqchip else self.cpus):
            handle = self.vm.handle_of(vcpu_id)
            set_entry_state(
                handle, vcpu_id, image.mode, image.entry, image.registers, image.selectors
            )

    def _send_at_once(self, wanted: bool) -> None:
        """A driver that waits for an interrupt after each byte gets it when the byte is sent."""
        if wanted and self._coalesced is not None:  # for good: to switch it costs milliseconds
            self._coalesced.exclude(COM1_PORT)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- running -------------------------------------------------------------------------------

    def run(self, timeout: float | None = None, max_exits: int | None = None) -> Stop:
        """Let the guest run until it ends, a limit is reached or interrupt() is called.

        `timeout` in seconds, `max_exits` over all vCPUs.  After a limit the vCPUs are suspended,
        memory and registers can be looked at, and run() goes on.  After the end it returns the
        same Stop again.
        """
        if self._stop is None:
            limiter = None if max_exits is None else ExitLimiter(self, max_exits)
            for thread in self.threads.values():
                thread.handlers = self._handlers_now(limiter)
            if not self.threads:
                self._start_threads(limiter)
            if self.debug_server is None:
                self.vm.resume_cpu(ALL)
            else:  # which vCPUs run is the debugger's affair
                self.debug_server.start()
                self.debug_server.let_run()
            stop = self._wait(None if timeout is None else time.monotonic() + timeout, limiter)
            if stop is not None:
                if self.debug_server is not None:
                    self.debug_server.keep_still()
                self.vm.suspend_cpu(ALL)
                self._wait_out()
                if self._reset_wanted:  # by the last thing that a vCPU did
                    self._reset()
                self.drain_output()
                if self._stop is None:
                    return stop
        self._join()
        self.drain_output()
        assert self._stop is not None
        return self._stop

    def _wait_out(self) -> None:
        """Wait until the vCPUs that are suspended, or held, are."""
        late = self.vm.wait_out(_PATIENCE_SECONDS)
        if late and not self.vm.ended:  # after the end nobody is late: they are joined
            self._hurry()
            late = self.vm.wait_out(_JOIN_SECONDS)
        if late and not self.vm.ended:
            raise _did_not_stop([self.threads[n].name for n in sorted(late)])

    def _handlers_now(self, limiter: ExitLimiter | None) -> dict[type, vcpu.Handler]:
        return self.handlers if limiter is None else limiter.wrap(self.handlers)

    def _start_threads(self, limiter: ExitLimiter | None) -> None:
        self.vm.suspend_cpu(ALL)  # they become active one by one, and then start together
        for vcpu_id in range(self.cpus):
            thread = vcpu.VcpuThread(self, vcpu_id, self._handlers_now(limiter))
            threads.start(thread)
            self.threads[vcpu_id] = thread
        for thread in self.threads.values():
            thread.active.wait()
        if self.vm.irqchip:
            from pyvmm.idle import IdleWatch

            self._idle = IdleWatch(self.vm)
        if self._coalesced is not None:
            self._drainer = Drainer(self._coalesced, self.fail)
            threads.start(self._drainer)

    def _wait(self, deadline: float | None, limiter: ExitLimiter | None) -> Stop | None:
        """Wait for the end (None) or for a limit (its Stop)."""
        while True:
            if self._stop is not None:
                return None
            if self._reset_wanted:
                self._reset()
            elif self._idle is not None and self._idle.check():
                self.stop(Stop(StopReason.HALTED, vcpu.ALL_HALTED))
                continue
            if self._interrupted:
                self._interrupted = False
                return Stop(StopReason.INTERRUPTED, "interrupted")
            if limiter is not None and limiter.reached:
                return Stop(StopReason.EXIT_LIMIT, f"{limiter.limit} exits")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return Stop(StopReason.TIMEOUT, "the time limit was reached")
            for callback in self._on_look:
                callback()
            if self._idle is not None or self._on_look or self._reset_wanted:
                left = _LOOK_SECONDS if left is None else min(left, _LOOK_SECONDS)
            self._waiter.wait(left)

    def connect_input(
        self,
        fd: int,
        *,
        keyboard: bool = False,
        console: Receiver | None = None,
        escape: EscapeKeys | None = None,
    ) -> None:
        """Let what can be read from `fd` reach the guest while run() waits.

        At COM1; at another `console`; or on the `keyboard`, an American one, from a terminal.
        `escape` keeps what is not for the guest.
        """
        receiver = Typist(self.pc.keyboard) if keyboard else console or self.pc.serial
        self._waiter.connect(fd, receiver, escape)

    def interrupt(self) -> None:
        """Make run() return.  From any thread, or from a signal handler: takes no lock."""
        self._interrupted = True
        self.wake()

    def wake(self) -> None:
        """Make run() look at its limits again."""
        self._waiter.wake()

    @property
    def wakeup_fd(self) -> int:
        """To write to it does the same as wake()."""
        return self._waiter.wakeup_fd

    def drain_output(self) -> None:
        """Print what the kernel has collected (see coalesced.py)."""
        self.drainer()()

    def drainer(self) -> Callable[[], None]:
        """What drain_output() calls: for the run loop, which does it at each exit."""
        return _nothing if self._coalesced is None else self._coalesced.drain

    # --- reset -----------------------------------------------------------------------------------

    def request_reset(self) -> None:
        """Do what a PC's reset line does.  From any thread; on a vCPU's, from its handler.

        No vCPU executes another instruction before the image is loaded again.  Raises StopVm where
        the machine is not to reboot.
        """
        if not self._reboot:
            raise vcpu.StopVm(Stop(StopReason.RESET, "the guest asked for a reset"))
        self.vm.hold("reset")
        self._reset_wanted = True
        self.wake()

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each reset, while no vCPU executes anything."""
        self._on_reset.append(callback)

    def _reset(self) -> None:
        self.vm.hold("reset")  # once more: the last reset may have just released it
        late = self.vm.wait_out(_PATIENCE_SECONDS)
        if late or self._stop is not None:
            return  # one that waits until its output is read may do so: we are called again
        self._reset_wanted = False  # all who could ask for this one are out
        try:
            self._begin_again()
        except BaseException:  # a callback's, or a signal handler's
            self._reset_wanted = True
            raise
        self.vm.release("reset")

    def _begin_again(self) -> None:
        self.drain_output()
        if self._virtio is not None:
            self._virtio.reset()  # and from now on writes no more into memory
        self.vm.memory.clear()
        self.vm.reset()
        self.pc.reset()
        self._load()
        for callback in self._on_reset:
            callback()

    # --- the end -------------------------------------------------------------------------------

    def stop(self, stop: Stop) -> None:
        """End the VM for this reason, unless it is ending already.  From any thread."""
        with self._lock:
            if self._stop is None:
                self._stop = stop
        self.vm.end()
        try:
            for callback in self._at_end:
                callback()
        finally:
            self.wake()

    @property
    def ended(self) -> Stop | None:
        """How the VM ended; None while it has not."""
        return self._stop

    def on_look(self, callback: Callable[[], None]) -> None:
        """Call `callback` ten times a second while run() waits, on its thread."""
        self._on_look.append(callback)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback`, on any thread, when the VM ends."""
        self._at_end.append(callback)

    def on_hurry(self, callback: Callable[[], None]) -> None:
        """Call `callback` when a vCPU has to stop but does not: what makes it wait must let go."""
        self._on_hurry.append(callback)

    def _hurry(self) -> None:
        for callback in self._on_hurry:
            callback()

    def fail(self, error: BaseException, vcpu_id: int | None = None) -> None:
        """End the VM because a thread (that of a vCPU, if one is named) met an exception."""
        if isinstance(error, OSError):
            message, report = str(error.strerror or error), ""
        else:
            message = f"{type(error).__name__}: {error}"
            import traceback  # here, because it would make every start longer

            report = "".join(traceback.format_exception(error)).rstrip()
        where = "" if vcpu_id is None else f"vCPU {vcpu_id}: "
        self.stop(Stop(StopReason.FAILED, where + message, report, vcpu_id))

    def crash(self, vcpu_id: int, exit: exits.Exit) -> Stop:
        """The Stop for an exit that the guest cannot go on from."""
        from pyvmm import report

        return Stop(
            StopReason.CRASHED,
            f"vCPU {vcpu_id}: {exit.name}",
            report.crash(self.vm, vcpu_id, exit),
            vcpu_id,
            exit,
        )

    def describe_vcpus(self) -> str:
        """State and registers of each vCPU, which must not run: for a person."""
        from pyvmm import report

        return "\n".join(report.vcpu(self.vm, vcpu_id) for vcpu_id in sorted(self.threads))

    def _join(self) -> None:
        stuck: list[str] = []
        for _ in range(2):
            deadline = time.monotonic() + _JOIN_SECONDS
            for thread in self.threads.values():
                thread.join(max(0.0, deadline - time.monotonic()))
            stuck = [thread.name for thread in self.threads.values() if thread.is_alive()]
            if not stuck:
                return
            self._hurry()
        if stuck:
            raise _did_not_stop(stuck)

    def close(self) -> None:
        """End the VM and free everything; closing again does nothing.

        Raises RuntimeError naming the thread if one does not stop; what it uses is left alone.
        """
        if self._waiter.closed:
            return
        self.vm.end()
        self._join()
        if self._drainer is not None:
            self._drainer.stop(_PATIENCE_SECONDS)
            if self._drainer.is_alive():
                self._hurry()
                self._drainer.stop(_JOIN_SECONDS)
        if self._coalesced is not None:
            self._coalesced.close()
        if self._idle is not None:
            self._idle.close()
        if self._virtio is not None and (late := self._virtio.close(_JOIN_SECONDS)):
            raise _did_not_stop(late)
        self.vm.close()
        self._waiter.close()

    # --- looking inside, while the guest does not run --------------------------------------------

    def registers(self, vcpu_id: int = 0) -> dict[str, int]:
        """The general registers, RIP and RFLAGS of a vCPU, by lower-case name."""
        regs = self.vm.state(vcpu_id).get(kvm.kvm_regs)
        return {field[0]: getattr(regs, field[0]) for field in kvm.kvm_regs._fields_}

    def get_register(self, name: str, vcpu_id: int = 0) -> int:
        """A register by name ("rip", "cr3", "cs_base"): see Register.  KeyError if none."""
        return self.vm.get_register(vcpu_id, Register[name.upper()])

    def set_register(self, name: str, value: int, vcpu_id: int = 0) -> None:
        """Write a register by name."""
        self.vm.set_register(vcpu_id, Register[name.upper()], value)

    def read_memory(
        self, address: int, length: int, *, physical: bool = False, vcpu_id: int = 0
    ) -> bytes:
        """Read `length` bytes at a GVA of `vcpu_id`, or at a GPA with `physical=True`.

        Raises GuestMemoryError where there is no RAM, paging.TranslationFault for an unmapped GVA.
        """
        if physical:
            return self.vm.memory.read(address, length)
        return self.vm.read_virtual(vcpu_id, address, length)

    def write_memory(
        self, address: int, data: bytes, *, physical: bool = False, vcpu_id: int = 0
    ) -> None:
        """Write `data` at a GVA of `vcpu_id`, or at a GPA with `physical=True`; all or nothing."""
        if physical:
            self.vm.memory.write(address, data)
        else:
            self.vm.write_virtual(vcpu_id, address, data)

    def screen(self) -> Screen:
        """The text screen at 0xB8000, to look at also while the guest runs."""
        from pyvmm.screen import Screen

        return Screen(self.vm.memory.read, self.pc.screen)

    def on_port(
        self,
        port: int,
        size: int = 1,
        *,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """Call `read(offset, size)` and `write(offset, size, value)` for `size` ports from `port`.

        They are called on the vCPU's thread.  Raises ValueError if a device is there already.
        """
        self.ports.claim(port, size, CallbackDevice(read, write), "a callback")

    def on_mmio(
        self,
        gpa: int,
        size: int,
        *,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """The same for `size` bytes of guest-physical addresses.

        Raises ValueError where there is RAM or a device: the guest would never leave for it.
        """
        for slot in self.vm.memory.slots:
            if gpa < slot.end and slot.gpa < gpa + size:
                raise ValueError(f"GPA {gpa:#x}..{gpa + size - 1:#x} is RAM")
        self.mmio.claim(gpa, size, CallbackDevice(read, write), "a callback")


def _check(image: Image, cpus: int, memory: int, *, irqchip: bool, has_virtio: bool) -> None:
    """Raise ValueError unless there can be such a machine."""
    if cpus < 1:
        raise ValueError(f"a machine has at least one vCPU, not {cpus}")
    if memory < MIN_MEMORY or memory % 4096 or memory > MAX_MEMORY:
        raise ValueError(f"{memory} bytes of memory: 1M to 64T, in whole pages of 4K")
    if image.expects_pc and cpus > 1 and not irqchip:
        raise ValueError(f"{image.name}: several vCPUs of a {image.kind} need the irqchip")
    if has_virtio and not irqchip:
        raise ValueError("virtio devices need the irqchip")
    check_stacks(image.mode, 1 if irqchip else cpus)


def _did_not_stop(names: list[str]) -> RuntimeError:
    return RuntimeError(f"{', '.join(names)} did not stop within {_JOIN_SECONDS:g} s")


def _nothing() -> None:
    pass


def _close_all(devices: Sequence[VirtioDevice]) -> None:
    for device in devices:
        device.close()


def _power_off() -> None:
    raise vcpu.StopVm(Stop(StopReason.POWERED_OFF, "the guest switched the machine off"))


def _debug_exit(status: int) -> None:
    stop = Stop(StopReason.DEBUG_EXIT, f"debug-exit, status {status}", guest_status=status)
    raise vcpu.StopVm(stop)

"""The debug server: a socket, one debugger at a time, and the stub between it and run control.

    server = DebugServer(machine, parse_address("127.0.0.1:1234"), wait=True)
    machine.run()               # waits until a debugger continues the guest

One thread, `gdb`, waits for whatever comes first: a debugger that connects, bytes from it, or the
wake-up of the vCPU that completes a stop.  It never waits for a debugger that does not read
(connection.py), nor, but for some seconds when one comes or goes, for a vCPU that does not stop.

    no debugger --connect--> connected --bytes--> packets --> Stub --> MachineTarget --> RunControl
         ^                       |  <--stop reply-- (all vCPUs parked) <-- a vCPU's event
         +-- gone, D, k ---------+

A debugger that goes away, politely or not, leaves the guest running as if nobody had been there.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pyvmm import threads
from pyvmm.connection import CHUNK, Connection, StdioSocket
from pyvmm.debugtarget import MachineTarget
from pyvmm.light import TYPE_CHECKING, NamedTuple
from pyvmm.rsp import encode
from pyvmm.runcontrol import RunControl, crash_signal
from pyvmm.session import Phase
from pyvmm.stop import Stop, StopReason
from pyvmm.target import StopKind, StopReport

if TYPE_CHECKING:
    from pyvmm.machine import Machine

DEFAULT_HOST = "127.0.0.1"

_STOP_SECONDS = 5.0  # how long a stop may take before the user is told which vCPU is late
_JOIN_SECONDS = 15.0
_NO_DESCRIPTOR_SECONDS = 0.2  # until the next try to accept a connection when none is free
_IN = select.POLLIN
_MAX_REFUSED = 8  # connections that may wait to be refused
_TCP_OPTIONS = (
    # Without it each small reply waits for the acknowledgement of the one before.
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # A debugger's host that has vanished must not keep the guest stopped, and others out, for ever:
    # after 30 silent seconds it is asked for a sign of life, three times, every 10 seconds.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class Address(NamedTuple):
    """Where to listen: TCP (`host`, `port`), a Unix socket (`path`), or stdin and stdout."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        if not self.host:
            return "stdio"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """`[tcp:][HOST:]PORT`, `unix:PATH` or `stdio`.  Raises ValueError saying what to write."""
    if text == "stdio":
        return Address()
    text = text.removeprefix("tcp:")  # as QEMU writes it
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path or len(os.fsencode(path)) > 107:
            raise ValueError(f"{text!r}: a Unix socket needs a path of 1 to 107 bytes")
        return Address(path=path)
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(f"{text!r} is no address: write PORT, HOST:PORT, unix:PATH or stdio")
    return Address(host=host.strip("[]") or DEFAULT_HOST, port=int(port))


class DebugServer:
    """Serves debuggers until the VM ends."""

    def __init__(
        self,
        machine: Machine,
        address: Address,
        *,
        wait: bool = True,
        symbols: str | None = None,
        catch_int3: bool = False,
    ) -> None:
        """Listen at `address`; a machine that is run waits for a debugger if `wait`.

        Must be made before the machine is run.  Raises OSError when the address cannot be used.
        """
        self.machine = machine
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()  # guards: not written after it was closed
        self._poll = select.poll()  # not epoll: stdin may be a file
        self._actions: dict[int, Callable[[], object]] = {}  # what to do when a descriptor is ready
        self._listener: socket.socket | None = None
        self._connection: Connection | None = None
        self._refused: list[socket.socket] = []  # to be told so and closed
        self._finished = threading.Event()
        self._final: StopReport | None = None  # how the VM ended
        self._patience: float | None = None  # ms to wait: a stop that was claimed may get stuck
        self._kill_wanted = False
        self._told: StopReport | None = None  # the stop of which the user knows that it is late
        try:
            if str(address) != "stdio":
                self._listener = _listen(address)
                self._watch(self._listener.fileno(), self._accept)
        except OSError:
            os.close(self._wake)
            raise
        self._address = address
        self._watch(self._wake, self._on_wake)
        # Only now is anything of the machine changed.
        self.run_control = RunControl(machine.vm, self._wake_up, catch_int3)
        self.target = MachineTarget(machine, self.run_control, symbols, self._kill)
        if wait:
            self.run_control.hold()
        self._wait = wait
        machine.handlers.update(self.run_control.handlers())
        machine.debug_server = self
        machine.on_end(self._wake_up)
        machine.on_reset(self.run_control.after_reset)
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)

    @property
    def address(self) -> Address:
        """Where it listens, with the port that was found when 0 was asked for."""
        if self._listener is not None and self._address.host:
            host, port = self._listener.getsockname()[:2]
            return Address(host=host, port=port)
        return self._address

    def start(self) -> None:
        """Begin to serve, once.  machine.run() calls it when its vCPUs are active."""
        if self._thread.ident is None and not self._finished.is_set():
            if self.run_control.catch_int3:
                self.run_control.breakpoints.catch_int3 = True
                if not self.machine.vm.host.breakpoint:
                    print("gdb: on this host an int3 does not leave the guest", file=sys.stderr)
            if self._address == Address():
                self._connect(StdioSocket())
            threads.start(self._thread)

    def let_run(self) -> None:
        """Resume what may run when machine.run() begins or goes on after a limit."""
        self.run_control.let_run()

    def keep_still(self) -> None:
        """machine.run() returns at a limit: nobody may run until let_run()."""
        self.run_control.keep_still()

    def finish(self, status: int) -> None:
        """The VM is over, with this exit status: tell the debugger and stop serving."""
        stop = self.machine.ended
        if stop is not None and stop.reason is StopReason.CRASHED:
            self._final = StopReport(0, crash_signal(stop.exit), StopKind.SIGNALLED)
        else:
            self._final = StopReport(0, kind=StopKind.EXITED, status=status)
        self.close()

    def close(self) -> None:
        """Stop serving; close all descriptors.  Closing again does nothing.

        A VM that has not ended is as if no debugger had been there, and can be run on.
        """
        if self._wake < 0:
            return
        self._finished.set()
        self._wake_up()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                raise RuntimeError("the gdb thread did not stop")
        if self._connection is not None:
            self._connection.socket.close()
        for sock in self._refused:
            sock.close()
        if self._listener is not None:
            self._listener.close()
            if self._address.path:
                with suppress(FileNotFoundError):
                    os.unlink(self._address.path)
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        if not self.machine.vm.ended:
            self.target.detach()

    # --- the gdb thread --------------------------------------------------------------------------

    def _wake_up(self) -> None:
        """Make the gdb thread look.  From any thread, also when serving is over."""
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        try:
            while not self._finished.is_set():
                ready = self._poll.poll(self._patience)
                for fd, _ in ready:
                    if fd in self._actions:  # else dropped by an event of the same round
                        self._actions[fd]()
                self._report_stop(waited=not ready)
                if self._kill_wanted:
                    self._end_the_vm()
            self._say_goodbye()
        except Exception as error:  # a bug in the debugger must not hide, nor stop the guest
            self.machine.fail(error)

    def _watch(self, fd: int, action: Callable[[], object], events: int = _IN) -> None:
        """Call `action` whenever `fd` is ready, or has failed."""
        self._poll.register(fd, events)
        self._actions[fd] = action

    def _unwatch(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._actions[fd]

    def _on_wake(self) -> None:
        os.eventfd_read(self._wake)

    def _report_stop(self, waited: bool) -> None:
        """Tell the debugger of a stop that is complete; or the user, if we have waited long."""
        connection = self._connection
        self._patience = None
        if connection is None or not connection.stub.owes_reply:
            return
        self._patience = _STOP_SECONDS * 1000  # nobody wakes us for a stop that is never complete
        report = self.run_control.stop
        if report is None:
            return
        late = self.run_control.wait_stopped(0)
        if self.machine.vm.ended:  # asked last: its vCPUs are not late, they have gone
            return
        if not late:
            connection.send_stop(report)
            self._send(connection)
            self._patience = None
        elif waited and report is not self._told:
            self._told = report
            _tell_of(late)

    def _end_the_vm(self) -> None:
        """The debugger wanted it; as soon as its reply is sent."""
        if self._connection is None or self._connection.flush():
            self._kill_wanted = False
            self.machine.stop(Stop(StopReason.KILLED, "the debugger ended the VM"))

    def _kill(self) -> None:
        self._kill_wanted = True

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it will be there at once again
                time.sleep(_NO_DESCRIPTOR_SECONDS)
            return  # or it has gone again
        # Its predecessor may have gone just before, and the news be still unread.
        while self._connection is not None and self._on_bytes():
            pass
        if self._connection is not None:
            print("gdb: a second debugger was refused: one at a time", file=sys.stderr)
            self._refuse(sock)
            return
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            for level, option, value in _TCP_OPTIONS:
                sock.setsockopt(level, option, value)
        self._connect(sock)

    def _refuse(self, sock: socket.socket) -> None:
        """Tell a second debugger why when it has asked something: before, it would not look."""
        if len(self._refused) == _MAX_REFUSED:
            sock.close()
            return

        def answer() -> None:
            self._unwatch(sock.fileno())
            self._refused.remove(sock)
            with sock, suppress(OSError):
                if sock.recv(CHUNK):
                    sock.send(b"+" + encode(b"E.another debugger is attached: one at a time"))

        sock.setblocking(False)
        self._refused.append(sock)
        self._watch(sock.fileno(), answer)

    def _connect(self, sock: socket.socket | StdioSocket) -> None:
        self.run_control.attach()
        late = self.run_control.wait_stopped(_STOP_SECONDS)
        if late or self.machine.vm.ended:
            if not self.machine.vm.ended:
                _tell_of(late)
                self.run_control.detach()
            sock.close()
            return
        self._connection = Connection(sock, self.target)
        self._watch(self._connection.waits_for, self._on_bytes)

    def _on_bytes(self) -> bool:
        """Deal with what the debugger has sent; False when it was nothing."""
        connection = self._connection
        if connection is None:  # dropped by an event of the same round
            return False
        if connection.blocked:
            # What is ready is the output. Whether there is input is for poll() to say: stdin waits
            # in read() until there is.
            self._send(connection)
            return not connection.blocked
        data = connection.receive()
        if data is not None:
            connection.handle(data)
        if data is None or connection.stub.session.phase is Phase.ENDED:
            self._drop()
        else:
            self._send(connection)
        return data != b""

    def _send(self, connection: Connection) -> None:
        """Send what can be sent now.

        While output is stuck nothing more is read: the debugger has to take its replies first.
        """
        blocked = not connection.flush()
        if blocked != connection.blocked:
            self._unwatch(connection.waits_for)
            connection.blocked = blocked
            events = select.POLLOUT if blocked else _IN
            self._watch(connection.waits_for, self._on_bytes, events)

    def _drop(self) -> None:
        """The debugger is gone."""
        connection = self._connection
        assert connection is not None
        connection.flush()
        self._unwatch(connection.waits_for)
        connection.socket.close()
        if connection.stub.session.phase not in (Phase.DETACHED, Phase.ENDED):
            self.target.detach()
        self._connection = None  # only now is the next one welcome

    def _say_goodbye(self) -> None:
        connection = self._connection
        if connection is None or self._final is None:
            return
        if connection.stub.owes_reply:
            connection.send_stop(self._final)
        connection.flush()


def _tell_of(late: frozenset[int]) -> None:
    names = ", ".join(f"vcpu-{n}" for n in sorted(late))
    print(f"gdb: {names} does not stop (does the console block?)", file=sys.stderr)


def _listen(address: Address) -> socket.socket:
    """A listening socket.  Raises OSError, with a message that names the address."""
    try:
        if address.path:
            return _bound(socket.AF_UNIX, address.path)
        family, _, _, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        return _bound(family, target)
    except UnicodeError:  # from the encoding of names in the DNS: a..b
        raise OSError(
            errno.EINVAL, f"cannot listen at {address}: no host can have that name"
        ) from None
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen at {address}: {_advice(error, address)}"
        ) from None


def _bound(family: int, target: object) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)  # type: ignore[arg-type]
        listener.listen(16)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _advice(error: OSError, address: Address) -> str:
    if error.errno != errno.EADDRINUSE:
        return error.strerror or str(error)
    if address.path:
        return "it exists; choose another, or remove it if nobody listens there"
    return "it is in use; choose another, or port 0 for a free one"

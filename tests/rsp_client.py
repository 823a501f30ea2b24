"""A small client of the GDB Remote Serial Protocol, and a machine for it to debug.

`RspClient` is blocking and impatient: whatever does not come within PATIENCE fails the test.  It
keeps no state of the guest, so a test sees exactly what the server said.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pyvmm.boot import Image, Mode, Segment
from pyvmm.debug import Address, DebugServer, parse_address
from pyvmm.machine import Machine
from pyvmm.rsp import Event, Link, encode
from pyvmm.stop import Stop
from tests.support import PATIENCE

BASE = 0x100000  # where the guests made here are loaded
RAM = 4 << 20  # bytes
COUNTERS = 0x20000  # GPA; 64 bytes for each vCPU

RIP, EFLAGS, RSP = 16, 17, 7  # numbers of registers in the 64-bit target description
RSI, RDI = 4, 5


class Closed(Exception):
    """The server has closed the connection."""


class Refused(Exception):
    """An E reply; the text says why if the server says so."""


@dataclass
class StopReply:
    """T, W, X or N with what it says; `vcpu_id` is the thread, less one."""

    kind: str
    signal: int = 0
    vcpu_id: int = -1
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def rip(self) -> int:
        """What the stop reply says RIP is (64-bit layout)."""
        return int.from_bytes(bytes.fromhex(self.fields["10"]), "little")

    def __contains__(self, name: str) -> bool:
        return name in self.fields


def parse_stop(payload: bytes) -> StopReply:
    """T05thread:1;swbreak:;... or W00 or X0b"""
    text = payload.decode()
    kind = text[:1]
    if kind == "N":
        return StopReply(kind)
    assert kind in ("T", "W", "X"), text
    stop = StopReply(kind, int(text[1:3], 16))
    if kind != "T":
        return stop
    for pair in filter(None, text[3:].split(";")):
        name, _, value = pair.partition(":")
        stop.fields[name] = value
    stop.vcpu_id = int(stop.fields["thread"].rpartition(".")[2], 16) - 1
    return stop


class RspClient:
    """One connection.  A context manager: leaving it closes the socket without a word."""

    def __init__(
        self,
        address: Address,
        *,
        features: str = "swbreak+;hwbreak+",
        no_acks: bool = True,
        handshake: bool = True,
    ) -> None:
        """Connect; with `handshake` also exchange features and leave acknowledgements behind."""
        self.console = ""  # what the server wanted the user to read
        if address.path:
            self.socket = socket.socket(socket.AF_UNIX)
            target: Any = address.path
        else:
            self.socket = socket.socket()
            target = (address.host, address.port)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(target)
        if not address.path:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link = Link()
        self._received: deque[bytes | Event] = deque()  # and not asked for yet
        self.features: dict[str, str] = {}
        if handshake:
            tokens = self.ask(f"qSupported:{features}").decode().split(";")
            self.features = dict(token.partition("=")[::2] for token in tokens)
            if no_acks:
                assert self.ask("QStartNoAckMode") == b"OK"
                self._link.acks = False

    def __enter__(self) -> RspClient:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Vanish: no detach."""
        self.socket.close()

    # --- packets ---

    def send(self, payload: str | bytes) -> None:
        """Send a packet and do not wait."""
        data = payload.encode("latin-1") if isinstance(payload, str) else payload
        self._link.send(data)
        self._flush()

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def _flush(self) -> None:
        data = self._link.take_output()
        if data:
            self.socket.sendall(data)

    def receive(self, timeout: float = PATIENCE) -> bytes:
        """The next packet.  Raises Closed, and TimeoutError when nothing comes."""
        deadline = time.monotonic() + timeout
        while not self._received:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionError:
                data = b""
            if not data:
                raise Closed
            self._received += self._link.receive(data)
        self._flush()
        event = self._received.popleft()
        assert isinstance(event, bytes), event
        return event

    def ask(self, payload: str | bytes) -> bytes:
        """Send a packet and return the reply."""
        self.send(payload)
        return self.receive()

    def ok(self, payload: str | bytes) -> None:
        """Send a packet whose reply is to be OK.  Raises Refused."""
        reply = self.ask(payload)
        if reply != b"OK":
            raise Refused(reply.decode(errors="replace"))

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes for so long."""
        try:
            self.receive(seconds)
        except TimeoutError:
            return True
        return False

    # --- running ---

    def go(self, packet: str = "vCont;c") -> None:
        """Resume; the stop reply is owed."""
        self.send(packet)

    def wait_stop(self, timeout: float = PATIENCE) -> StopReply:
        """The stop reply that is owed.  Raises Refused."""
        payload = self.receive(timeout)
        while payload.startswith(b"O"):  # text for the user, such as why the guest has crashed
            self.console += bytes.fromhex(payload[1:].decode()).decode()
            payload = self.receive(timeout)
        if payload.startswith(b"E"):
            raise Refused(payload.decode(errors="replace"))
        return parse_stop(payload)

    def resume(self, packet: str = "vCont;c") -> StopReply:
        """Resume and wait for the stop."""
        self.go(packet)
        return self.wait_stop()

    def step(self, vcpu_id: int = 0) -> StopReply:
        """One instruction of one vCPU; the others stay parked."""
        return self.resume(f"vCont;s:{vcpu_id + 1:x}")

    def interrupt(self) -> None:
        """^C"""
        self.socket.sendall(b"\x03")

    def break_in(self) -> StopReply:
        """^C and its stop reply."""
        self.interrupt()
        return self.wait_stop()

    def why(self) -> StopReply:
        """`?`"""
        return parse_stop(self.ask("?"))

    # --- looking and changing ---

    def select(self, vcpu_id: int) -> None:
        """Hg"""
        self.ok(f"Hg{vcpu_id + 1:x}")

    def register(self, number: int, vcpu_id: int | None = None) -> int:
        """One register of the selected vCPU, or of `vcpu_id`, which is selected then."""
        if vcpu_id is not None:
            self.select(vcpu_id)
        reply = self.ask(f"p{number:x}").decode()
        if reply.startswith("E"):
            raise Refused(reply)
        return int.from_bytes(bytes.fromhex(reply), "little")

    def set_register(
        self, number: int, value: int, vcpu_id: int | None = None, size: int = 8
    ) -> None:
        """The same, written; `size` in bytes."""
        if vcpu_id is not None:
            self.select(vcpu_id)
        self.ok(f"P{number:x}={value.to_bytes(size, 'little').hex()}")

    def read(self, address: int, length: int) -> bytes:
        """`m`.  Raises Refused."""
        reply = self.ask(f"m{address:x},{length:x}").decode()
        if reply.startswith("E"):
            raise Refused(reply)
        return bytes.fromhex(reply)

    def read_u64(self, address: int) -> int:
        """A 64-bit number in memory."""
        return int.from_bytes(self.read(address, 8), "little")

    def write(self, address: int, data: bytes) -> None:
        """`M`.  Raises Refused."""
        self.ok(f"M{address:x},{len(data):x}:{data.hex()}")

    def insert(self, address: int, kind: int = 0, length: int = 1) -> None:
        """`Z`.  Raises Refused."""
        self.ok(f"Z{kind},{address:x},{length:x}")

    def remove(self, address: int, kind: int = 0, length: int = 1) -> None:
        """`z`.  Raises Refused."""
        self.ok(f"z{kind},{address:x},{length:x}")

    def monitor(self, command: str) -> str:
        """`monitor`: what it prints."""
        text, reply = b"", self.ask(b"qRcmd," + command.encode().hex().encode())
        while reply != b"OK":
            assert reply.startswith(b"O"), reply
            text, reply = text + bytes.fromhex(reply[1:].decode()), self.receive()
        return text.decode()

    def detach(self) -> None:
        """`D`, then close."""
        self.ok("D")
        self.close()


def flat_image(code: bytes, mode: Mode = Mode.LONG, gpa: int = BASE) -> Image:
    """A guest made of `code`, entered at its first byte."""
    return Image("guest", "test", mode, gpa, (Segment(gpa, code, len(code)),))


class Debuggee:
    """A machine with a debug server on a free port, run on a thread.  A context manager."""

    def __init__(
        self,
        guest: bytes | Image | Path,
        *,
        cpus: int = 1,
        irqchip: bool = False,
        wait: bool = True,
        where: str = "127.0.0.1:0",
        catch_int3: bool = False,
        prepare: Callable[[Machine], None] | None = None,
        symbols: str | None = None,
        memory: int = RAM,
        **machine: Any,
    ) -> None:
        """`prepare` is called before the machine runs: for devices and memory contents.

        What is not named here is for Machine.
        """
        image = flat_image(guest) if isinstance(guest, bytes) else guest
        self.machine = Machine(image, cpus=cpus, memory=memory, irqchip=irqchip, **machine)
        if prepare is not None:
            prepare(self.machine)
        try:
            self.server = DebugServer(
                self.machine,
                parse_address(where),
                wait=wait,
                catch_int3=catch_int3,
                symbols=symbols,
            )
        except BaseException:
            self.machine.close()
            raise
        self.vm = self.machine.vm
        self.stop: Stop | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.stop = self.machine.run()
            if self.stop.final:  # as the command line does
                self.server.finish(self.stop.status)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Debuggee:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self, **options: Any) -> RspClient:
        """A client."""
        return RspClient(self.server.address, **options)

    def wait_end(self) -> Stop:
        """Wait until the VM has ended, and the debugger has been told."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the VM does not end"
        if self.error is not None:
            raise self.error
        assert self.stop is not None
        return self.stop

    def close(self) -> None:
        """End everything, whatever state it is in."""
        if self._thread.is_alive():
            self.machine.interrupt()
            self._thread.join(PATIENCE)
        try:
            self.server.close()
        finally:
            self.machine.close()
        if self.error is not None:
            raise self.error

    # --- what the guest really has, without the debugger ---

    def memory(self, gpa: int = 0, length: int | None = None) -> bytes:
        """Guest memory as it is, patched bytes and all; to the end of it without `length`."""
        return self.vm.memory.read(gpa, RAM - gpa if length is None else length)

    def counter(self, vcpu_id: int = 0) -> int:
        """The counter of a vCPU that runs COUNT (see below)."""
        return int.from_bytes(self.memory(COUNTERS + 64 * vcpu_id, 8), "little")

    def wait_counts(self, vcpu_id: int = 0) -> None:
        """Wait until a vCPU counts on."""
        before = self.counter(vcpu_id)
        self.wait_for(lambda: self.counter(vcpu_id) != before, f"vCPU {vcpu_id} does not count")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.error is None, self.error
            assert time.monotonic() < deadline, f"waited in vain: {what}"
            time.sleep(0.0005)


# Each vCPU counts in a counter of its own, for ever.
#   shl edi, 6; add edi, COUNTERS
# 1: nop
#   inc qword [rdi]
#   jmp 1b
COUNT = bytes.fromhex("c1e706 81c700000200 90 48ff07 ebfa")
COUNT_NOP, COUNT_INC, COUNT_JMP = BASE + 9, BASE + 10, BASE + 13


def frame(payload: bytes) -> bytes:
    """A packet as bytes on the wire."""
    return encode(payload)

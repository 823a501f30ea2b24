"""The debug server as a service: where it listens, who may come, how sessions and the VM end."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from pyvmm.debug import Address, DebugServer, parse_address
from pyvmm.hostprobe import host
from pyvmm.machine import Machine
from pyvmm.rsp import Decoder, escape
from pyvmm.stop import StopReason
from tests.conftest import GUESTS, REPOSITORY
from tests.rsp_client import (
    BASE,
    COUNT,
    COUNT_NOP,
    COUNTERS,
    PATIENCE,
    RIP,
    Closed,
    Debuggee,
    Refused,
    RspClient,
    flat_image,
    frame,
    parse_stop,
)
from tests.support import requires

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
COMMAND = (sys.executable, "-m", "pyvmm")

kvm = pytest.mark.kvm


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("1234", Address("127.0.0.1", 1234)),
        (":1234", Address("127.0.0.1", 1234)),
        ("0", Address("127.0.0.1", 0)),
        ("localhost:65535", Address("localhost", 65535)),
        ("0.0.0.0:1", Address("0.0.0.0", 1)),
        ("[::1]:5", Address("::1", 5)),
        ("tcp::1234", Address("127.0.0.1", 1234)),
        ("unix:/tmp/x", Address(path="/tmp/x")),
        ("stdio", Address()),
    ],
)
def test_addresses_that_are_understood(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "x", "65536", "-1", "1:2:x", "host:", "unix:", "unix:" + "x" * 108, "12 34", "0x10", "²"],
)
def test_addresses_that_are_refused_with_advice(text: str) -> None:
    with pytest.raises(ValueError, match=r"write PORT|needs a path"):
        parse_address(text)


# --- the command line ----------------------------------------------------------------------------


def pyvmm(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run pyvmm to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )


class Served:
    """pyvmm in the background with --gdb; `address` is what it says it listens at."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.address = Address()
        self.complaints = b""

    def read_address(self) -> None:
        """Parse the line that it prints when it is ready."""
        assert self.process.stderr is not None
        line = self.process.stderr.readline().decode()
        match = re.fullmatch(r"gdb: listening on (\S+)\n", line)
        assert match, line
        self.address = parse_address(match[1])

    def connect(self) -> RspClient:
        """A client."""
        return RspClient(self.address)

    def finish(self) -> tuple[int, str, str]:
        """Its exit status, and the rest of stdout and stderr."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out.decode(), err.decode()


@contextmanager
def served(*arguments: object, address: str = "0", listens: bool = True) -> Iterator[Served]:
    """pyvmm --gdb in the background, killed at the end."""
    process = subprocess.Popen(
        [*COMMAND, "--gdb", address, *map(str, arguments)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        server = Served(process)
        if listens:
            server.read_address()
        yield server
    finally:
        process.kill()
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


@pytest.mark.process
@pytest.mark.slow
@kvm
def test_a_bad_address_is_a_usage_error() -> None:
    for text in ("x", "99999", "unix:", "1.2.3.4:"):
        result = pyvmm("--gdb", text, GUESTS / "hello.bin")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1 and text in result.stderr


@pytest.mark.process
@kvm
def test_a_port_in_use_is_one_line_and_status_4() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = pyvmm("--gdb", port, GUESTS / "hello.bin")
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in result.stderr and "in use" in result.stderr


@pytest.mark.process
@kvm
@pytest.mark.parametrize(
    "address", ["192.0.2.1:1", "no.such.host.invalid:1", "a..b:1", "unix:/no/such/dir/s"]
)
def test_an_address_that_cannot_be_used_is_one_line_and_status_4(address: str) -> None:
    result = pyvmm("--gdb", address, GUESTS / "hello.bin")
    assert result.returncode == 4
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert address in result.stderr, "which address?"


@pytest.mark.process
@kvm
def test_it_waits_before_the_first_instruction_and_ends_with_the_guest() -> None:
    with served(GUESTS / "hello.bin") as server:
        with server.connect() as client:
            assert client.register(RIP) == BASE
            stop = client.resume()
            assert (stop.kind, stop.signal) == ("W", 0)
            with pytest.raises(Closed):
                client.receive()
        assert server.finish() == (0, "Hello from long mode!\n", "")


@pytest.mark.process
@kvm
def test_the_guests_exit_status_is_in_the_w_packet() -> None:
    with served(GUESTS / "exit.bin") as server, server.connect() as client:
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("W", 85)
        assert server.finish()[0] == 85


@pytest.mark.process
@kvm
def test_nowait_lets_the_guest_run_and_a_debugger_attach(tmp_path: Path) -> None:
    guest = tmp_path / "guest.bin"
    guest.write_bytes(COUNT)
    with served(guest, "--gdb-nowait") as server:
        deadline = time.monotonic() + PATIENCE
        while True:  # the debugger may be there again before the guest has executed anything
            with server.connect() as client:
                if client.read_u64(COUNTERS):
                    client.ask("k")
                    break
                assert time.monotonic() < deadline, "it does not run"
                client.detach()
        assert server.finish()[0] == 0


@pytest.mark.process
@kvm
def test_a_guest_that_ends_before_a_debugger_comes_ends_pyvmm() -> None:
    result = pyvmm("--gdb", "0", "--gdb-nowait", GUESTS / "hello.bin")
    assert (result.returncode, result.stdout) == (0, "Hello from long mode!\n")


@pytest.mark.process
@kvm
def test_kill_ends_pyvmm_with_status_0() -> None:
    for packet, reply in (("k", b"X09"), ("vKill;1", b"OK")):
        with served(GUESTS / "hello.bin") as server, server.connect() as client:
            assert client.ask(packet) == reply
            assert server.finish() == (0, "", "")


@pytest.mark.process
@kvm
def test_monitor_quit_ends_pyvmm() -> None:
    with served(GUESTS / "hello.bin") as server, server.connect() as client:
        client.monitor("quit")
        assert server.finish()[0] == 0


@pytest.mark.process
@kvm
def test_detach_lets_the_guest_run_to_its_end() -> None:
    with served(GUESTS / "hello.bin") as server, server.connect() as client:
        client.insert(0x100016)
        client.resume()
        client.detach()
        assert server.finish() == (0, "Hello from long mode!\n", "")


@pytest.mark.process
@kvm
def test_a_vanished_debugger_lets_the_guest_run_to_its_end() -> None:
    with served(GUESTS / "hello.bin") as server, server.connect() as client:
        client.insert(0x100016)
        client.resume()
        client.close()
        assert server.finish() == (0, "Hello from long mode!\n", "")


@pytest.mark.process
@kvm
def test_timeout_counts_while_the_debugger_waits() -> None:
    with served(GUESTS / "hello.bin", "--timeout", "3") as server, server.connect() as client:
        assert client.register(RIP) == BASE
        status, _, complaints = server.finish()
        assert status == 124 and "time limit" in complaints


@pytest.mark.process
@kvm
def test_timeout_without_a_debugger_ends_the_wait() -> None:
    with served(GUESTS / "hello.bin", "--timeout", "0.3") as server:
        assert server.finish()[0] == 124


@pytest.mark.process
@kvm
def test_timeout_while_the_guest_runs_is_told() -> None:
    with served(GUESTS / "counter.bin", "--timeout", "3") as server, server.connect() as client:
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("W", 124)
        assert server.finish()[0] == 124


@pytest.mark.process
@kvm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_a_signal_ends_pyvmm_while_a_debugger_is_there(number: int, running: bool) -> None:
    with served(GUESTS / "counter.bin") as server, server.connect() as client:
        if running:
            client.go()
            assert client.ask("qC").startswith(b"E"), "it runs"
        server.process.send_signal(number)
        assert server.finish()[0] == 128 + number
        if running:
            stop = client.wait_stop()
            assert (stop.kind, stop.signal) == ("W", 128 + number)


@pytest.mark.process
@kvm
def test_a_crash_stops_the_session_and_then_ends_it_with_the_report() -> None:
    with served(GUESTS / "triplefault.bin") as server, server.connect() as client:
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("T", 11)
        assert client.read(BASE, 2) == (GUESTS / "triplefault.bin").read_bytes()[:2]
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("X", 11)
        status, _, complaints = server.finish()
        assert status == 6 and "triple fault" in complaints


@pytest.mark.process
@kvm
def test_catch_int3_on_the_command_line() -> None:
    requires("breakpoint")
    with served(GUESTS / "int3.bin", "--gdb-catch-int3") as server, server.connect() as client:
        assert client.resume().rip == 0x100018
        assert client.resume().kind == "W"
        assert server.finish()[1].startswith("int3 at 0x100018, handler saw 0x100019\n")


@pytest.mark.process
@kvm
def test_unix_socket_serves_and_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "gdb.sock"
    with served(GUESTS / "hello.bin", address=f"unix:{path}") as server:
        assert stat.S_ISSOCK(path.stat().st_mode)
        with server.connect() as client:
            assert client.register(RIP) == BASE
            assert client.resume().kind == "W"
        assert server.finish()[0] == 0
    assert not path.exists()


@pytest.mark.process
@kvm
def test_unix_socket_that_exists_is_one_line_and_status_4(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("precious")
    result = pyvmm("--gdb", f"unix:{path}", GUESTS / "hello.bin")
    assert result.returncode == 4
    assert result.stderr.count("\n") == 1 and str(path) in result.stderr
    assert path.read_text() == "precious"


@pytest.mark.process
@kvm
def test_unix_socket_that_somebody_removed_is_no_error_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "gdb.sock"
    with served(GUESTS / "hello.bin", address=f"unix:{path}") as server, server.connect() as client:
        path.unlink()
        assert client.resume().kind == "W"
        assert server.finish() == (0, "Hello from long mode!\n", "")


class _Pipes:
    """The stdio of a pyvmm as a connection."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.process, self.decoder = process, Decoder()
        self.input, self.output, self.complaints = process.stdin, process.stdout, process.stderr

    def ask(self, payload: bytes) -> bytes:
        self.input.write(frame(payload))
        self.input.flush()
        return self.receive()

    def receive(self, *, acknowledge: bool = True) -> bytes:
        """The next packet."""
        while True:
            data = os.read(self.output.fileno(), 4096)
            assert data, "stdout was closed"
            for event in self.decoder.receive(data):
                if isinstance(event, bytes):
                    if acknowledge:
                        self.input.write(b"+")
                        self.input.flush()
                    return event


@pytest.fixture
def pipes() -> Iterator[_Pipes]:
    """Of a hello.bin that is debugged there."""
    with served(GUESTS / "hello.bin", address="stdio", listens=False) as server:
        yield _Pipes(server.process)


@pytest.mark.process
@kvm
def test_stdio_speaks_packets_there_and_prints_the_guests_output_on_stderr(
    pipes: _Pipes,
) -> None:
    assert b"PacketSize" in pipes.ask(b"qSupported:swbreak+")
    assert pipes.ask(b"p10") == b"0000100000000000"
    assert pipes.ask(b"vCont;c") == b"W00"
    assert pipes.process.wait(PATIENCE) == 0
    complaints = pipes.complaints.read().decode()
    assert "Hello from long mode!\n" in complaints and "Traceback" not in complaints


@pytest.mark.process
@kvm
def test_stdio_that_nobody_reads_is_not_waited_for(pipes: _Pipes) -> None:
    """Replies of more than a pipe holds: they come when somebody reads, and hold up nothing."""
    assert b"PacketSize" in pipes.ask(b"qSupported:swbreak+")
    data = bytes(range(256)) * 128
    assert pipes.ask(b"M110000,8000:" + data.hex().encode()) == b"OK"
    pipes.input.write((frame(b"m110000,8000") + frame(b"qC")) * 8)
    pipes.input.flush()
    time.sleep(0.2)
    assert pipes.ask(b"?") == data.hex().encode(), "the first reply"
    time.sleep(0.2)
    pipes.process.send_signal(signal.SIGTERM)
    assert pipes.process.wait(PATIENCE) == 143


@pytest.mark.process
@kvm
def test_stdio_that_is_read_late_is_not_waited_for_afterwards(pipes: _Pipes) -> None:
    """When the output has room again it does not follow that there is input."""
    assert b"PacketSize" in pipes.ask(b"qSupported:swbreak+")
    data = bytes(range(1, 17)) * 0x1000
    assert pipes.ask(b"X110000,8000:" + escape(data[:0x8000])) == b"OK"
    assert pipes.ask(b"X118000,8000:" + escape(data[0x8000:])) == b"OK"
    pipes.input.write(frame(b"m110000,10000"))
    pipes.input.flush()
    time.sleep(0.2)  # the pipe fills
    assert pipes.receive(acknowledge=False) == data.hex().encode()
    time.sleep(0.2)
    pipes.process.send_signal(signal.SIGTERM)
    assert pipes.process.wait(PATIENCE) == 143


@pytest.mark.process
@kvm
def test_stdio_that_is_closed_lets_the_guest_run_on(pipes: _Pipes) -> None:
    assert pipes.ask(b"p10") == b"0000100000000000"
    pipes.input.close()
    assert pipes.process.wait(PATIENCE) == 0
    assert b"Hello from long mode!\n" in pipes.complaints.read()


@pytest.mark.process
@kvm
def test_stdio_from_dev_null_is_a_debugger_that_has_gone() -> None:
    result = pyvmm("--gdb", "stdio", GUESTS / "hello.bin")
    assert result.returncode == 0
    assert "Hello from long mode!" in result.stderr and "Traceback" not in result.stderr


# --- one debugger at a time ----------------------------------------------------------------------


@kvm
def test_a_second_debugger_is_refused_and_the_first_is_not_disturbed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.go()
        for _ in range(20):
            with RspClient(debuggee.server.address, handshake=False) as second:
                refusal = second.ask("qSupported:swbreak+")
                assert refusal.startswith(b"E.") and b"one at a time" in refusal
                with pytest.raises(Closed):
                    second.receive()
        debuggee.wait_counts()
        assert client.silent()
        assert client.break_in().signal == 2
        client.detach()
        with debuggee.connect() as third:
            assert third.why().kind == "T"
    assert "second debugger was refused" in capfd.readouterr().err


@kvm
def test_a_debugger_whose_host_has_vanished_is_noticed() -> None:
    """The kernel asks it for a sign of life; how that goes on cannot be tried with one host."""
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        assert client.why().kind == "T"
        connection = debuggee.server._connection
        assert connection is not None and isinstance(connection.socket, socket.socket)
        option = connection.socket.getsockopt
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, interval, count = (option(socket.IPPROTO_TCP, getattr(socket, n)) for n in names)
        assert idle + interval * count <= 60, "seconds"


@kvm
def test_connections_that_say_nothing_do_not_pile_up() -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        silent = [RspClient(debuggee.server.address, handshake=False) for _ in range(30)]
        with pytest.raises(Closed):
            silent[-1].receive()
        assert client.register(RIP) == BASE
        assert len(debuggee.server._refused) < 10
        for connection in silent:
            connection.close()


@kvm
def test_the_next_debugger_gets_no_stale_reply_of_the_last() -> None:
    with Debuggee(COUNT) as debuggee:
        first = debuggee.connect()
        first.insert(COUNT_NOP)
        first.go()
        debuggee.wait_for(lambda: debuggee.server.run_control.stop is not None, "no stop")
        first.close()
        with debuggee.connect(handshake=False) as second:
            assert second.ask("qC") == b"QC1"
            assert second.silent()
            assert second.read(BASE, len(COUNT)) == COUNT


@kvm
def test_a_session_starts_from_scratch() -> None:
    """Nothing of a session survives: features, cursors, physical addresses, no-ack mode."""
    with Debuggee(COUNT, cpus=2) as debuggee:
        with debuggee.connect(features="swbreak+;multiprocess+") as first:
            first.ok("Hg2")
            first.ok("Qqemu.PhyMemMode:1")
            assert first.ask("qC") == b"QCp1.2"
        with debuggee.connect(features="") as second:
            assert second.ask("qC") == b"QC1"
            assert second.ask("qqemu.PhyMemMode") == b"0"
            assert "swbreak+" not in second.features


@kvm
def test_detach_and_attach_on_the_same_connection() -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.ok("!")
        client.ok("D;1")
        debuggee.wait_counts()
        assert client.resume("vAttach;1").signal == 5, "nobody has pressed ^C"
        before = debuggee.counter()
        time.sleep(0.02)
        assert debuggee.counter() == before
        client.go()
        debuggee.wait_counts()
        assert client.break_in().signal == 2


@kvm
@pytest.mark.parametrize("interrupt", [b"\x03", frame(b"vCtrlC")])
def test_an_interrupt_after_a_detach_stops_nobody(interrupt: bytes) -> None:
    """Nobody would be told of the stop."""
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.ok("D")
        client.send_raw(interrupt + frame(b"vMustReplyEmpty"))
        while client.receive() == b"OK":
            pass
        debuggee.wait_counts()
        client.close()
        debuggee.wait_counts()


@kvm
def test_resets_of_a_stopped_guest_leave_the_debugger_its_session() -> None:
    """While a reset holds the vCPUs packets about them may be refused, and nothing else."""
    packets = ("qThreadExtraInfo,1", "qXfer:threads:read::0,fff", "g", "qSupported:", "vCont;s:1")
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        for number in range(300):
            debuggee.machine.request_reset()
            packet = packets[number % len(packets)]
            reply = client.ask(packet)
            assert reply, packet
            if packet.startswith("vCont") and reply[:1] != b"E":
                assert parse_stop(reply).signal == 5
        debuggee.wait_for(lambda: not client.ask("g").startswith(b"E"), "it is never released")
        client.go()
        debuggee.wait_counts()
        assert client.break_in().signal == 2


@contextmanager
def stuck_in_a_device() -> Iterator[tuple[Debuggee, threading.Event, threading.Event]]:
    """A guest whose first instruction does not return from its device; what says so, and what
    lets it."""
    stuck, go_on = threading.Event(), threading.Event()

    def write(offset: int, size: int, value: int) -> None:
        stuck.set()
        assert go_on.wait(PATIENCE)

    out_then_count = bytes.fromhex("e610") + COUNT
    prepare = partial(Machine.on_port, port=0x10, write=write)
    with Debuggee(out_then_count, prepare=prepare) as debuggee:
        try:
            yield debuggee, stuck, go_on
        finally:
            go_on.set()


@kvm
def test_a_vcpu_that_does_not_stop_does_not_make_the_server_deaf(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stuck_in_a_device() as (debuggee, stuck, go_on), debuggee.connect() as client:
        client.go()
        assert stuck.wait(PATIENCE)
        monkeypatch.setattr("pyvmm.debug._STOP_SECONDS", 0.1)
        client.interrupt()
        assert client.silent(0.5)
        assert client.ask("vCtrlC") == b"OK"
        with debuggee.connect(handshake=False) as second:
            second.send("qC")
            assert second.receive().startswith(b"E.another debugger")
        go_on.set()
        assert client.wait_stop().signal == 2
        client.go()
        debuggee.wait_counts()
    assert capfd.readouterr().err.count("vcpu-0 does not stop") == 1


@kvm
def test_the_vm_can_be_killed_while_a_vcpu_does_not_stop() -> None:
    with stuck_in_a_device() as (debuggee, stuck, go_on), debuggee.connect() as client:
        client.go()
        assert stuck.wait(PATIENCE)
        client.interrupt()
        assert client.ask("k") == b"X09"
        go_on.set()
        assert debuggee.wait_end().reason is StopReason.KILLED


@kvm
def test_a_debugger_that_comes_while_a_vcpu_does_not_stop_is_turned_away(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stuck_in_a_device() as (debuggee, stuck, go_on):
        debuggee.connect().detach()
        assert stuck.wait(PATIENCE)
        with monkeypatch.context() as patch:
            patch.setattr("pyvmm.debug._STOP_SECONDS", 0.1)
            with debuggee.connect(handshake=False) as client, pytest.raises(Closed):
                client.receive()
        go_on.set()
        debuggee.wait_counts()
        debuggee.connect().detach()
        debuggee.wait_counts()
    assert "vcpu-0 does not stop" in capfd.readouterr().err


@kvm
def test_acknowledgements_and_retransmission() -> None:
    with Debuggee(COUNT) as debuggee:
        with RspClient(debuggee.server.address, handshake=False) as client:
            client.send_raw(b"$qC#00")  # a bad checksum
            assert client.socket.recv(1) == b"-"
            client.send_raw(frame(b"qC"))
            assert client.socket.recv(100) == b"+" + frame(b"QC1")
            client.send_raw(b"-")
            assert client.socket.recv(100) == frame(b"QC1")
            client.send_raw(b"+")


@kvm
def test_a_debugger_that_reads_nothing_does_not_stop_the_guest() -> None:
    with Debuggee(COUNT, cpus=2) as debuggee:
        client = debuggee.connect()
        client.send_raw(frame(b"m100000,8000") * 400 + frame(b"vCont;c"))
        time.sleep(0.1)
        client.close()
        debuggee.wait_counts(0)
        debuggee.wait_counts(1)


@kvm
def test_packets_in_pieces_of_one_byte() -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        for byte in frame(b"qC"):
            client.send_raw(bytes((byte,)))
            time.sleep(0.001)
        assert client.receive() == b"QC1"


# --- how the VM ends -----------------------------------------------------------------------------


@kvm
def test_a_crash_can_be_looked_at() -> None:
    """Registers, memory and monitor commands work at the crash; then the VM ends with X."""
    with Debuggee(GUESTS / "triplefault.bin") as debuggee, debuggee.connect() as client:
        stop = client.resume()
        assert (stop.kind, stop.signal, stop.vcpu_id) == ("T", 11, 0)
        assert client.why().signal == 11
        if host().crash_registers:
            assert client.register(RIP) == BASE + 7
            assert client.read(BASE + 7, 2) == b"\x0f\x0b"
        else:
            assert "resets a vCPU" in client.console
        assert "cr3" in client.monitor("regs")
        stop = client.resume()
        assert (stop.kind, stop.signal) == ("X", 11)
        assert debuggee.wait_end().reason is StopReason.CRASHED


@kvm
@pytest.mark.parametrize("packet", ["vCont;c", "vCont;s:1", "c", "s"])
def test_a_crashed_vm_ends_whatever_it_is_resumed_with(packet: str) -> None:
    requires("step")
    with Debuggee(GUESTS / "triplefault.bin") as debuggee, debuggee.connect() as client:
        assert client.resume().signal == 11
        assert client.resume(packet).kind == "X"
        assert debuggee.wait_end().reason is StopReason.CRASHED


@kvm
def test_an_unhandled_exit_stops_as_sigabrt() -> None:
    """Code in MMIO space: the host cannot fetch it, or sees nothing but ff ff."""
    jump_nowhere = bytes.fromhex("b8000000e0 ffe0")  # mov eax, 0xe0000000; jmp rax
    with Debuggee(jump_nowhere) as debuggee, debuggee.connect() as client:
        stop = client.resume()
        assert (stop.kind, stop.signal) in (("T", 6), ("T", 11))
        assert client.register(RIP) >= 0xE0000000 or stop.signal == 11
        assert client.resume().kind == "X"
        assert debuggee.wait_end().reason is StopReason.CRASHED


@kvm
def test_a_crash_without_a_debugger_ends_the_vm_at_once() -> None:
    with Debuggee(GUESTS / "triplefault.bin", wait=False) as debuggee:
        assert debuggee.wait_end().reason is StopReason.CRASHED


@kvm
def test_a_debugger_that_leaves_at_a_crash_ends_the_vm() -> None:
    for leave in (RspClient.detach, RspClient.close):
        with Debuggee(GUESTS / "triplefault.bin") as debuggee:
            client = debuggee.connect()
            client.resume()
            leave(client)
            assert debuggee.wait_end().reason is StopReason.CRASHED


@kvm
def test_a_crash_of_one_vcpu_stops_the_others() -> None:
    crash_on_1 = bytes.fromhex("85ff 7402 0f0b") + COUNT  # test edi,edi; jz 1f; ud2; 1:
    with Debuggee(crash_on_1, cpus=2) as debuggee, debuggee.connect() as client:
        stop = client.resume()
        assert (stop.kind, stop.signal, stop.vcpu_id) == ("T", 11, 1)
        before = debuggee.counter()
        time.sleep(0.02)
        assert debuggee.counter() == before
        assert client.resume().kind == "X"


@kvm
def test_kill_while_the_guest_runs() -> None:
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.go()
        debuggee.wait_counts()
        assert client.ask("k") == b"X09"
        assert debuggee.wait_end().reason is StopReason.KILLED


@kvm
def test_the_end_of_the_vm_is_told_with_the_process_to_who_asked_for_it() -> None:
    with Debuggee(GUESTS / "exit.bin") as debuggee:
        with debuggee.connect(features="multiprocess+") as client:
            assert client.ask("vCont;c") == b"W55;process:1"


@kvm
def test_a_vm_whose_other_vcpus_are_parked_ends_at_once() -> None:
    exit_on_0 = bytes.fromhex("85ff 7504 b02a e6f4") + COUNT  # test edi; jnz; mov al,42; out f4
    with Debuggee(exit_on_0, cpus=2) as debuggee, debuggee.connect() as client:
        stop = client.resume("vCont;c:1")
        assert (stop.kind, stop.signal) == ("W", 85)
        assert debuggee.wait_end().reason is StopReason.DEBUG_EXIT


@kvm
def test_closing_the_machine_in_any_state_leaves_nothing() -> None:
    for go in (None, "vCont;c", "vCont;s:1", "vCont;c:2"):
        with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
            client.insert(COUNT_NOP)
            if go is not None:
                client.go(go)


# --- as a library --------------------------------------------------------------------------------


@kvm
def test_a_server_that_is_never_run_can_be_closed() -> None:
    with Machine(flat_image(COUNT), memory=4 << 20) as machine:
        server = DebugServer(machine, parse_address("0"))
        assert server.address.port
        server.close()
        server.close()


@kvm
def test_a_port_in_use_raises_and_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with Machine(flat_image(COUNT), memory=4 << 20) as machine:
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(OSError, match="in use"):
                DebugServer(machine, Address(*taken.getsockname()))
            assert len(os.listdir("/proc/self/fd")) == before
            assert machine.debug_server is None
            assert machine.run(timeout=0.05).reason is StopReason.TIMEOUT, "as if never tried"


@kvm
def test_run_with_a_time_limit_goes_on_later() -> None:
    """The debugger's breakpoint is still there when run() is called again."""
    with Machine(flat_image(COUNT), memory=4 << 20) as machine:
        server = DebugServer(machine, parse_address("0"))
        try:
            stops = [machine.run(timeout=0.05)]
            with RspClient(server.address) as client:
                client.insert(COUNT_NOP)
                thread = threading.Thread(
                    target=lambda: stops.append(machine.run(timeout=PATIENCE))
                )
                thread.start()
                assert client.resume().rip == COUNT_NOP
                client.ask("k")
                thread.join()
            assert [stop.reason for stop in stops] == [StopReason.TIMEOUT, StopReason.KILLED]
        finally:
            server.close()


def assert_that_it_counts(machine: Machine) -> None:
    """It runs, and as if no debugger had ever been there."""
    assert machine.read_memory(BASE, len(COUNT), physical=True) == COUNT
    before = machine.read_memory(COUNTERS, 8, physical=True)
    for _ in range(100):
        assert machine.run(timeout=0.05).reason is StopReason.TIMEOUT
        if machine.read_memory(COUNTERS, 8, physical=True) != before:
            return
    raise AssertionError("the guest does not run")


@kvm
def test_a_machine_runs_on_without_its_debug_server() -> None:
    with Machine(flat_image(COUNT), memory=4 << 20) as machine:
        server = DebugServer(machine, parse_address("0"))
        machine.run(timeout=0.05)
        with RspClient(server.address) as client:
            client.insert(COUNT_NOP)
            client.go()
            machine.run(timeout=0.1)
            server.close()
        assert_that_it_counts(machine)


@kvm
def test_a_debug_server_can_be_closed_before_the_machine_runs() -> None:
    with Machine(flat_image(COUNT), memory=4 << 20) as machine:
        DebugServer(machine, parse_address("0")).close()
        assert_that_it_counts(machine)


@kvm
def test_refusals_have_words_where_the_client_can_show_them() -> None:
    with Debuggee(COUNT) as debuggee:
        with debuggee.connect(features="error-message+") as client:
            assert client.ask("mffffffffffff0000,4").startswith(b"E.")
        with debuggee.connect() as client:
            assert client.ask("mffffffffffff0000,4") == b"E0e"
            assert client.monitor("error").strip() != ""
            with pytest.raises(Refused):
                client.read(0xFFFFFFFFFFFF0000, 4)


@kvm
def test_monitor_helps() -> None:
    with Debuggee(COUNT, cpus=2) as debuggee, debuggee.connect() as client:
        commands = [line.split()[0] for line in client.monitor("help").splitlines()]
        for command in commands:
            if command in ("quit", "inject-nmi", "help", "translate"):
                continue
            assert client.monitor(command).strip(), command
        assert f"GPA {BASE:#x}" in client.monitor(f"translate {BASE:#x}")
        assert "unknown" in client.monitor("nonsense")
        assert "ambiguous" in client.monitor("re")
        assert "vCPU 1" in client.monitor("vcpus")
        assert "no vCPU" in client.monitor("regs 7")


@kvm
def test_whatever_is_typed_behind_monitor_is_answered_and_the_vm_lives() -> None:
    arguments = ("9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000, "-1", "0b2", "²", "٣", "\0", "/")
    arguments += ("/\0", "$", "$rsp", "$st0", "$no", "%s", "{}", "\x1b", "é" * 5000, "1 2", "on x")
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        commands = [line.split()[0] for line in client.monitor("help").splitlines()]
        commands.remove("quit")
        for command in (*commands, ""):
            for argument in arguments:
                assert client.monitor(f"{command} {argument}").strip(), (command, argument[:9])
        client.go()
        debuggee.wait_counts()


def test_stop_replies_are_parsed() -> None:
    stop = parse_stop(b"T05thread:p1.2;swbreak:;10:0900100000000000;")
    assert (stop.vcpu_id, stop.signal, stop.rip, "swbreak" in stop) == (1, 5, 0x100009, True)

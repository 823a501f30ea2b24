"""Processes with a GDB stub: pyvmm and QEMU with the same guest, in the same state.

pyvmm enters a flat binary in long mode by itself.  QEMU starts at the reset vector, as a PC does,
and gets a ROM of a few instructions instead of its BIOS that brings the guest to the same place:
64-bit mode, the same page tables, interrupts off, RIP at the binary.  So both stubs translate the
same addresses and step the same instructions.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import processes
from benchmarks.measure import PYVMM, Contenders, Sampler, Unavailable, unavailable
from benchmarks.rspclient import RIP, RspClient
from pyvmm.boot.entry import PAGE_TABLES_GPA, identity_map

QEMU = "QEMU"  # the contender's name
LOAD_GPA = 0x100000
_QEMU_PROGRAM = "qemu-system-x86_64"
MEMORY_MIB = 64  # of each guest
_PATIENCE = 20.0  # seconds that a server may take to start

# cli; no interrupt from the PICs: out 0x21, 0xff; out 0xa1, 0xff; lgdt cs:[_GDTR_AT]; CR4.PAE;
# CR3 = PAGE_TABLES_GPA; EFER.LME; CR0.PG and CR0.PE; jump to 0x08:LOAD_GPA.
_TO_LONG_MODE = bytes.fromhex(
    "fa b0ff e621 e6a1 2e660f01164800 66b820000000 0f22e0 66b800100000 0f22d8"
    "66b9800000c0 0f32 0d0001 0f30 0f20c0 660d01000080 0f22c0 66ea000010000800"
)
_GDTR_AT, _GDT_AT = 0x48, 0x50
# Null, and 64-bit code: selector 0x08, marked as accessed, because a ROM cannot be marked later.
_GDT = bytes(8) + bytes.fromhex("ffff0000009baf00")
_ROM_GPA, _ROM_BYTES = 0xFFFF0000, 0x10000
_RESET_AT = 0xFFF0  # where a processor begins


class Stub(NamedTuple):
    """A server that listens at `port` of 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int

    def cpu_seconds(self) -> float:
        """See processes.cpu_seconds()."""
        return processes.cpu_seconds(self.process)


@contextlib.contextmanager
def pyvmm(guest: Path, cpus: int = 1) -> Iterator[Stub]:
    """pyvmm, which waits for a debugger before the first instruction."""
    command = [sys.executable, "-m", "pyvmm", str(guest), "--gdb", "0", "--cpus", str(cpus)]
    # All vCPUs are to execute the guest; with an irqchip they would wait for a start-up IPI.
    command += ["--memory", f"{MEMORY_MIB}M", "--irqchip", "off"]
    with processes.started(command, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        if "listening" not in line:
            raise RuntimeError(f"pyvmm: {line}")
        yield Stub(process, int(line.rpartition(":")[2]))


@contextlib.contextmanager
def echo(reply_bytes: int) -> Iterator[Stub]:
    """The bare server (echo.py), whose every reply has so many bytes."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("echo.py"))]
    with processes.started([*command, str(reply_bytes)]) as process:
        assert process.stdout is not None
        yield Stub(process, int(process.stdout.readline()))


def qemu_program() -> str:
    """QEMU's name.  Raises Unavailable where it is not installed."""
    if shutil.which(_QEMU_PROGRAM) is None:
        raise Unavailable(f"no {_QEMU_PROGRAM} (apt install qemu-system-x86)")
    return _QEMU_PROGRAM


def qemu_command(folder: Path, guest: Path) -> list[str]:
    """A QEMU that runs `guest` as pyvmm does, with one vCPU.  Raises Unavailable."""
    rom, tables = folder / "qemu.rom", folder / "page-tables.bin"
    rom.write_bytes(_rom())
    tables.write_bytes(identity_map(PAGE_TABLES_GPA))
    return [
        *(qemu_program(), "-accel", "kvm", "-m", str(MEMORY_MIB)),
        *("-nodefaults", "-display", "none", "-bios", str(rom)),
        *("-device", f"loader,file={tables},addr={PAGE_TABLES_GPA},force-raw=on"),
        *("-device", f"loader,file={guest},addr={LOAD_GPA},force-raw=on"),
    ]


@contextlib.contextmanager
def qemu(folder: Path, guest: Path) -> Iterator[Stub]:
    """QEMU, which waits for a debugger at the reset vector.

    Raises Unavailable where it is not installed or does not start.
    """
    port = _free_port()
    command = [*qemu_command(folder, guest), "-S", "-gdb", f"tcp:127.0.0.1:{port}"]
    with processes.started(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + _PATIENCE
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"QEMU does not start: {processes.errors_of(process)}")
            time.sleep(0.01)
        yield Stub(process, port)


@contextlib.contextmanager
def contenders(
    folder: Path, guest: Path, sampler: Callable[[Stub, contextlib.ExitStack], Sampler]
) -> Iterator[Contenders]:
    """pyvmm and QEMU with `guest`, for all rounds, each with the sampler that is made for it.

    What `sampler` puts on the stack is left before the stub ends.
    """
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(pyvmm(guest))
        found: Contenders = {}
        try:
            found[PYVMM] = sampler(ours, stack)
        except Unavailable as reason:  # the debugger is missing
            found[PYVMM] = unavailable(str(reason))
        try:
            found[QEMU] = sampler(stack.enter_context(qemu(folder, guest)), stack)
        except (Unavailable, RuntimeError) as reason:
            found[QEMU] = unavailable(str(reason))
        yield found


def attached(stub: Stub, end: int) -> RspClient:
    """A client of `stub`, whose guest is stopped at an address from LOAD_GPA up to `end`."""
    client = RspClient(stub.port)
    deadline = time.monotonic() + _PATIENCE
    while not LOAD_GPA <= client.register(RIP) < end:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the guest hangs at {client.register(RIP):#x}")
        client.send(b"vCont;c")
        time.sleep(0.02)
        client.interrupt()
    return client


def _rom() -> bytes:
    rom = bytearray(_ROM_BYTES)
    gdtr = struct.pack("<HI", len(_GDT) - 1, _ROM_GPA + _GDT_AT)
    to_start = b"\xe9" + struct.pack("<H", _ROM_BYTES - _RESET_AT - 3)  # jmp, modulo 64 KiB
    for at, data in (0, _TO_LONG_MODE), (_GDTR_AT, gdtr), (_GDT_AT, _GDT), (_RESET_AT, to_start):
        rom[at : at + len(data)] = data
    return bytes(rom)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    """Whether a server is there; told without connecting, which a stub would take for a client."""
    wanted = f"{0x0100007F:08X}:{port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as table:
        return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in table)

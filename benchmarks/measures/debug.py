"""The debug server: pyvmm's GDB stub and QEMU's, asked the same by one and the same client.

Each stub is a process of its own with one and the same guest, stopped, in 64-bit mode with the same
page tables (stubs.py).  The client (rspclient.py) waits for each reply before it asks again, as gdb
does.  "By CPU time" counts the server's process alone: what the stub and the guest have used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import guests, processes, stubs
from benchmarks.bare import BARE
from benchmarks.measure import (
    PYVMM,
    Contenders,
    Context,
    Goal,
    Measure,
    Sample,
    Sampler,
    Unavailable,
)
from benchmarks.rspclient import RCX, RIP, RspClient, escaped_to_fit, framed
from benchmarks.stubs import LOAD_GPA, QEMU, Stub
from pyvmm.hypervisor import VM

# The guest: three instructions in a circle, then a counting loop, then data that no run-length
# encoding makes shorter.
_CIRCLE_GVA = LOAD_GPA
_COUNTING = bytes.fromhex("ffc9 75fc ebfe")  # here: dec ecx; jnz here; behind: jmp behind
_COUNTING_GVA, _BEHIND_GVA = LOAD_GPA + 0x10, LOAD_GPA + 0x14
_DATA_GVA, _DATA_BYTES = LOAD_GPA + 0x1000, 1 << 18

_G_BYTES = 1728  # of pyvmm's reply to `g`, on a processor with AVX
_SOFTWARE, _HARDWARE = 0, 1  # breakpoint kinds of Z packets


def _data(seed: int) -> bytes:
    return random.Random(seed).randbytes(_DATA_BYTES)


def _guest(folder: Path) -> Path:
    code = guests.circle().ljust(0x10, b"\0") + _COUNTING
    return guests.write_guest(folder, "debugged", code.ljust(0x1000, b"\0") + _data(0))


# What a sample does with a stub: so many of what is counted.  It is made for a client, once.
Work = Callable[[], float]
Prepare = Callable[[Context, RspClient], Work]


def rate(stub: Stub, work: Work) -> Sample:
    """How much work a second a stub does: of wall time, and of its own CPU time."""
    cpu, start = stub.cpu_seconds(), time.perf_counter()
    done = work()
    wall = time.perf_counter() - start
    return Sample(done / wall, done / (stub.cpu_seconds() - cpu))


def _sampler(
    prepare: Prepare, context: Context, stub: Stub, stack: contextlib.ExitStack
) -> Sampler:
    """Samples of a stub, with one client for all of them."""
    client = stack.enter_context(stubs.attached(stub, _DATA_GVA))
    return _sampler_of(stub, client, prepare(context, client))


def _sampler_of(stub: Stub, client: RspClient, work: Work) -> Sampler:
    def sample() -> Sample:
        client.set_register(RIP, _CIRCLE_GVA)
        return rate(stub, work)

    return sample


def _with_qemu(prepare: Prepare, context: Context) -> contextlib.AbstractContextManager[Contenders]:
    sampler = functools.partial(_sampler, prepare, context)
    return stubs.contenders(context.folder, _guest(context.folder), sampler)


@contextlib.contextmanager
def _registers_contenders(apart: bool, context: Context) -> Iterator[Contenders]:
    """All registers: a packet that costs so little that the packet itself is what counts.

    And where client and stub are: left to the scheduler, that would decide the figure.
    """
    sampler = functools.partial(_registers, apart, context)
    with (
        stubs.contenders(context.folder, _guest(context.folder), sampler) as contenders,
        stubs.echo(_G_BYTES) as server,
        RspClient(server.port) as client,
    ):
        yield {**contenders, BARE: _asked_for_registers(apart, context, server, client)}


def _registers(apart: bool, context: Context, stub: Stub, stack: contextlib.ExitStack) -> Sampler:
    client = stack.enter_context(stubs.attached(stub, _DATA_GVA))
    return _asked_for_registers(apart, context, stub, client)


def _asked_for_registers(apart: bool, context: Context, stub: Stub, client: RspClient) -> Sampler:
    count = context.scaled(1000)

    def work() -> float:
        for _ in range(count):
            client.ask(b"g")
        return count

    def sample() -> Sample:
        ours, *others = sorted(os.sched_getaffinity(0))
        if apart and not others:
            raise Unavailable("only one CPU here")
        theirs = others[0] if apart else ours
        with processes.bound(os.getpid(), ours), processes.bound(stub.process.pid, theirs):
            return rate(stub, work)

    return sample


def _memory_read(context: Context, client: RspClient) -> Work:
    """In the largest replies that the stub sends: 64 KiB, QEMU 2 KiB."""
    times, most = context.scaled(10), client.packet_size // 2

    def work() -> float:
        for _ in range(times):
            for at in range(0, _DATA_BYTES, most):
                length = min(most, _DATA_BYTES - at)
                reply = client.ask(b"m%x,%x" % (_DATA_GVA + at, length))
                if len(reply) != 2 * length:
                    raise RuntimeError(f"{len(reply)} digits for {length} bytes: {reply[:40]!r}")
        return times * _DATA_BYTES / 1e6

    return work


def _memory_write(context: Context, client: RspClient) -> Work:
    """As gdb does it: in binary where the stub takes that, in packets as large as it takes."""
    times, data = context.scaled(10), _data(1)
    in_binary = client.ask(b"X%x,0:" % _DATA_GVA) == b"OK"
    packets = [framed(payload) for payload in write_packets(data, client.packet_size, in_binary)]

    def work() -> float:
        for _ in range(times):
            for packet in packets:
                if (reply := client.ask_framed(packet)) != b"OK":
                    raise RuntimeError(f"{packet[:40]!r} was answered with {reply!r}")
        return times * _DATA_BYTES / 1e6

    return work


def write_packets(data: bytes, packet_size: int, in_binary: bool) -> list[bytes]:
    """The packets that write `data`."""
    room = packet_size - len(b"$M0123456789abcdef,01234567:#00")
    packets, at = [], 0
    while at < len(data):
        if in_binary:
            content, length = escaped_to_fit(data[at : at + room], room)
        else:
            length = min(room // 2, len(data) - at)
            content = data[at : at + length].hex().encode()
        name = b"X" if in_binary else b"M"
        packets.append(b"%b%x,%x:%b" % (name, _DATA_GVA + at, length, content))
        at += length
    return packets


def _steps(context: Context, client: RspClient) -> Work:
    count = context.scaled(500)

    def work() -> float:
        for _ in range(count):
            client.run(b"vCont;s:p1.1")
        return count

    return work


def _breakpoint_hits(context: Context, client: RspClient) -> Work:
    """Each hit as gdb goes on from one: breakpoint out, a step, breakpoint in, continue."""
    count = context.scaled(200)
    kind = _SOFTWARE if software_breakpoints_everywhere() else _HARDWARE
    place = b"%d,%x,1" % (kind, _CIRCLE_GVA)

    def work() -> float:
        client.command(b"Z" + place)
        for _ in range(count):
            client.command(b"z" + place)
            client.run(b"vCont;s:p1.1")
            client.command(b"Z" + place)
            client.run(b"vCont;c")
        if client.register(RIP) != _CIRCLE_GVA:
            raise RuntimeError("the guest stopped somewhere else")
        client.command(b"z" + place)
        return count

    return work


def software_breakpoints_everywhere() -> bool:
    """Whether QEMU's stub, too, can set them: where KVM reports an int3 as one."""
    with VM() as vm:
        return bool(vm.host.breakpoint_as_such)


_STEPS = "single steps"  # the contender's name


@contextlib.contextmanager
def _range_contenders(context: Context) -> Iterator[Contenders]:
    """pyvmm in two ways: a range, and a step and a stop reply for each instruction."""
    repeats = context.scaled(2500)
    with (
        stubs.pyvmm(_guest(context.folder)) as stub,
        stubs.attached(stub, _DATA_GVA) as client,
    ):

        def ranged() -> float:
            client.set_register(RCX, repeats)
            client.set_register(RIP, _COUNTING_GVA)
            client.run(b"vCont;r%x,%x:p1.1" % (_COUNTING_GVA, _BEHIND_GVA))
            if client.register(RIP) != _BEHIND_GVA:
                raise RuntimeError("the range was left before its end")
            return 2 * repeats

        yield {
            PYVMM: _sampler_of(stub, client, ranged),
            _STEPS: _sampler_of(stub, client, _steps(context, client)),
        }


ROUND_TRIP = "two processes that hand a packet to each other"
_ONE_STEP = "KVM_SET_GUEST_DEBUG and KVM_RUN for each instruction"

MEASURES = (
    Measure(
        "gdb-g",
        "packets/s",
        "How fast gdb gets all registers of a vCPU, as it does at each stop; on one CPU with it.",
        ROUND_TRIP,
        functools.partial(_registers_contenders, False),
        Goal(QEMU, at_least=1),
    ),
    Measure(
        "gdb-g-apart",
        "packets/s",
        "The same with gdb on another CPU: how fast the host wakes up one that is idle.",
        f"{ROUND_TRIP}, and the wake-ups of two idle CPUs",
        functools.partial(_registers_contenders, True),
    ),
    Measure(
        "gdb-memory",
        "MB/s",
        "How fast gdb reads guest memory (dump memory, x, find), as hex.",
        ROUND_TRIP,
        functools.partial(_with_qemu, _memory_read),
        Goal(QEMU, at_least=5),
    ),
    Measure(
        "gdb-memory-write",
        "MB/s",
        "How fast gdb writes guest memory (load, restore).",
        ROUND_TRIP,
        functools.partial(_with_qemu, _memory_write),
    ),
    Measure(
        "gdb-step",
        "steps/s",
        "How many instructions a second `stepi` executes, each with a stop reply.",
        f"{_ONE_STEP}, and {ROUND_TRIP}",
        functools.partial(_with_qemu, _steps),
        Goal(QEMU, at_least=1),
    ),
    Measure(
        "gdb-range-step",
        "steps/s",
        "How many instructions a second `step` and `next` go through within a line of source.",
        _ONE_STEP,
        _range_contenders,
        Goal(_STEPS, at_least=10),
    ),
    Measure(
        "gdb-breakpoint",
        "hits/s",
        "How often a second a breakpoint can be hit and gone on from, whatever the debugger.",
        f"an exit and a step for each hit, and {ROUND_TRIP} four times",
        functools.partial(_with_qemu, _breakpoint_hits),
        Goal(QEMU, at_least=1),
    ),
)

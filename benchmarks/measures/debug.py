"""The debug server: pyvmm's GDB stub and QEMU's, asked the same by one and the same client.

Each stub is a process of its own with one and the same guest, stopped, in 64-bit mode with the same
page tables (stubs.py).  The client (rspclient.py) waits for each reply before it asks again, as gdb
does.  "By CPU time" counts the server's process alone: what the stub and the guest have used.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import guests, stubs
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample, Unavailable
from benchmarks.rspclient import RCX, RIP, RspClient
from benchmarks.stubs import LOAD_GPA, QEMU, Stub
from pyvmm.hypervisor import VM

# The guest: three instructions in a circle, then a counting loop, then data that no run-length
# encoding makes shorter.
_CIRCLE = bytes.fromhex("48ffc0 90 ebfa")  # here: inc rax; nop; jmp here
_CIRCLE_GVA = LOAD_GPA
_COUNTING = bytes.fromhex("ffc9 75fc ebfe")  # here: dec ecx; jnz here; behind: jmp behind
_COUNTING_GVA, _BEHIND_GVA = LOAD_GPA + 0x10, LOAD_GPA + 0x14
_DATA_GVA, _DATA_BYTES = LOAD_GPA + 0x1000, 1 << 18

_HALTED = bytes.fromhex("fb f4 ebfd")  # sti; here: hlt; jmp here
_SPINNING = bytes.fromhex("ebfe")  # here: jmp here

_MEMORY_REPLY = {PYVMM: 1 << 16, QEMU: 0x7FE}  # bytes; the most that each sends in one packet
_SOFTWARE, _HARDWARE = 0, 1  # breakpoint kinds of Z packets


def _guest(folder: Path) -> Path:
    data = random.Random(0).randbytes(_DATA_BYTES)
    code = _CIRCLE.ljust(0x10, b"\0") + _COUNTING
    return guests.write_guest(folder, "debugged", code.ljust(0x1000, b"\0") + data)


# What a sample does with a stub: so many of what is counted.
Work = Callable[[RspClient, str], float]


def _rate(stub: Stub, client: RspClient, name: str, work: Work) -> Sample:
    """How much work a second a stub does: of wall time, and of its own CPU time."""
    client.set_register(RIP, _CIRCLE_GVA)
    cpu, start = stub.cpu_seconds(), time.perf_counter()
    done = work(client, name)
    wall = time.perf_counter() - start
    return Sample(done / wall, done / (stub.cpu_seconds() - cpu))


@contextlib.contextmanager
def _with_qemu(make_work: Callable[[Context], Work], context: Context) -> Iterator[Contenders]:
    """Both stubs, with a client attached to each for all rounds."""
    guest, work = _guest(context.folder), make_work(context)
    with contextlib.ExitStack() as stack:

        def sampler(name: str, stub: Stub) -> Callable[[], Sample]:
            client = stack.enter_context(stubs.attached(stub, _DATA_GVA))
            return lambda: _rate(stub, client, name, work)

        contenders = {PYVMM: sampler(PYVMM, stack.enter_context(stubs.pyvmm(guest)))}
        try:
            qemu = stack.enter_context(stubs.qemu(context.folder, guest))
            contenders[QEMU] = sampler(QEMU, qemu)
        except Unavailable as reason:
            contenders[QEMU] = functools.partial(_raise, reason)
        yield contenders


def _raise(reason: Unavailable) -> Sample:
    raise reason


def _all_registers(context: Context) -> Work:
    count = context.scaled(1000)

    def work(client: RspClient, name: str) -> float:
        for _ in range(count):
            client.ask(b"g")
        return count

    return work


def _memory(context: Context) -> Work:
    times = context.scaled(10)

    def work(client: RspClient, name: str) -> float:
        most = _MEMORY_REPLY[name]
        for _ in range(times):
            for at in range(0, _DATA_BYTES, most):
                length = min(most, _DATA_BYTES - at)
                reply = client.ask(b"m%x,%x" % (_DATA_GVA + at, length))
                if len(reply) != 2 * length:
                    raise RuntimeError(f"{len(reply)} digits for {length} bytes: {reply[:40]!r}")
        return times * _DATA_BYTES / 1e6

    return work


def _steps(context: Context) -> Work:
    count = context.scaled(500)

    def work(client: RspClient, name: str) -> float:
        for _ in range(count):
            client.run(b"vCont;s:p1.1")
        return count

    return work


def _breakpoint_hits(context: Context) -> Work:
    """Each hit as gdb goes on from one: breakpoint out, a step, breakpoint in, continue."""
    count = context.scaled(200)
    kind = _SOFTWARE if _software_breakpoints_everywhere() else _HARDWARE
    place = b"%d,%x,1" % (kind, _CIRCLE_GVA)

    def work(client: RspClient, name: str) -> float:
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


def _software_breakpoints_everywhere() -> bool:
    """Whether QEMU's stub, too, can set them: where KVM reports an int3 as one."""
    with VM() as vm:
        return vm.host.breakpoint_as_such


_STEPS = "single steps"  # the contender's name


@contextlib.contextmanager
def _range_contenders(context: Context) -> Iterator[Contenders]:
    """pyvmm in two ways: a range, and a step and a stop reply for each instruction."""
    repeats = context.scaled(2500)

    def ranged(client: RspClient, name: str) -> float:
        client.set_register(RCX, repeats)
        client.set_register(RIP, _COUNTING_GVA)
        client.run(b"vCont;r%x,%x:p1.1" % (_COUNTING_GVA, _BEHIND_GVA))
        if client.register(RIP) != _BEHIND_GVA:
            raise RuntimeError("the range was left before its end")
        return 2 * repeats

    stepped = _steps(context)
    with (
        stubs.pyvmm(_guest(context.folder)) as stub,
        stubs.attached(stub, _DATA_GVA) as client,
    ):
        yield {
            PYVMM: lambda: _rate(stub, client, PYVMM, ranged),
            _STEPS: lambda: _rate(stub, client, PYVMM, stepped),
        }


@contextlib.contextmanager
def _attach_contenders(context: Context) -> Iterator[Contenders]:
    """gdb as a user starts it, up to its first prompt and out again."""
    guest = guests.write_guest(context.folder, "halted", _HALTED)
    with contextlib.ExitStack() as stack:
        stub = stack.enter_context(stubs.pyvmm(guest))
        contenders: Contenders = {PYVMM: functools.partial(_attach, stub)}
        try:
            qemu = stack.enter_context(stubs.qemu(context.folder, guest))
            contenders[QEMU] = functools.partial(_attach, qemu)
        except Unavailable as reason:
            contenders[QEMU] = functools.partial(_raise, reason)
        yield contenders


def _attach(stub: Stub) -> Sample:
    """Milliseconds that gdb takes to attach, stop at its prompt, detach and end."""
    if shutil.which("gdb") is None:
        raise Unavailable("no gdb (apt install gdb)")
    command = ["gdb", "-nx", "-batch", "-ex", f"target remote 127.0.0.1:{stub.port}"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "-ex", "detach"], capture_output=True, text=True, check=False, timeout=60
    )
    wall = time.perf_counter() - start
    if "detached" not in done.stdout:
        raise RuntimeError(f"gdb: {done.stdout}{done.stderr}")
    return Sample(wall * 1e3)


_STOPS = 10  # a sample's value is their median
_SETTLE = 0.05  # seconds for all vCPUs to be where they are going


@contextlib.contextmanager
def _stop_contenders(code: bytes, cpus: int, context: Context) -> Iterator[Contenders]:
    """^C with `cpus` vCPUs, and `cpus` times as long as with one: what linear growth would be."""
    guest = guests.write_guest(context.folder, f"many-{code.hex()}", code)
    stops = context.scaled(_STOPS)
    with contextlib.ExitStack() as stack:

        def client_of(number: int) -> RspClient:
            return stack.enter_context(
                RspClient(stack.enter_context(stubs.pyvmm(guest, number)).port)
            )

        many = client_of(cpus)
        contenders = {PYVMM: lambda: Sample(_stop_latency(many, stops))}
        if cpus > 1:
            one = client_of(1)
            contenders[_linear(cpus)] = lambda: Sample(_stop_latency(one, stops) * cpus)
        yield contenders


def _linear(cpus: int) -> str:
    return f"{cpus} x one"  # the contender's name


def _stop_latency(client: RspClient, stops: int) -> float:
    """Milliseconds from ^C to the stop reply."""
    taken = []
    for _ in range(stops):
        client.send(b"vCont;c")
        time.sleep(_SETTLE)
        start = time.perf_counter()
        client.interrupt()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def _stop_measure(state: str, code: bytes, cpus: int) -> Measure:
    # When each of many spinning ones gets its turn is up to the host's scheduler.
    goal = Goal(_linear(cpus), at_most=1) if cpus > 1 and code == _HALTED else None
    if cpus == 64 and code == _HALTED:
        goal = Goal(at_most=5)
    return Measure(
        f"stop-all-{state}-{cpus}",
        "ms",
        f"How long ^C takes until gdb is told that {cpus} {state} vCPU(s) have stopped.",
        "a wake-up, or a signal, for each vCPU's thread, and their turns on the host's processors",
        functools.partial(_stop_contenders, code, cpus),
        goal,
    )


_ROUND_TRIP = "two processes that hand a packet to each other"
_ONE_STEP = "KVM_SET_GUEST_DEBUG and KVM_RUN for each instruction"

MEASURES = (
    Measure(
        "gdb-g",
        "packets/s",
        "How fast gdb gets all registers of a vCPU, as it does at each stop.",
        _ROUND_TRIP,
        functools.partial(_with_qemu, _all_registers),
        Goal(QEMU, at_least=1),
    ),
    Measure(
        "gdb-memory",
        "MB/s",
        "How fast gdb reads guest memory (dump memory, x, find), as hex.",
        _ROUND_TRIP,
        functools.partial(_with_qemu, _memory),
        Goal(QEMU, at_least=5),
    ),
    Measure(
        "gdb-step",
        "steps/s",
        "How many instructions a second `stepi` executes, each with a stop reply.",
        f"{_ONE_STEP}, and {_ROUND_TRIP}",
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
        "How often a second a breakpoint can be hit and gone on from: what a condition costs.",
        f"an exit and a step for each hit, and {_ROUND_TRIP} four times",
        functools.partial(_with_qemu, _breakpoint_hits),
        Goal(QEMU, at_least=1),
    ),
    Measure(
        "gdb-attach",
        "ms",
        "How long gdb takes from pressing enter to its prompt, and to quit.",
        "gdb's own start and end",
        _attach_contenders,
        Goal(QEMU, at_most=1),
    ),
    *(
        _stop_measure(state, code, cpus)
        for state, code in (("halted", _HALTED), ("spinning", _SPINNING))
        for cpus in (1, 2, 8, 32, 64)
    ),
)

"""Stopping all vCPUs of a guest: from gdb's ^C to the stop reply, with 1 to 64 of them."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator

from benchmarks import guests, stubs
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample
from benchmarks.rspclient import RspClient

_HALTED = bytes.fromhex("fb f4 ebfd")  # sti; here: hlt; jmp here
_SPINNING = bytes.fromhex("ebfe")  # here: jmp here

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


MEASURES = tuple(
    _stop_measure(state, code, cpus)
    for state, code in (("halted", _HALTED), ("spinning", _SPINNING))
    for cpus in (1, 2, 8, 32, 64)
)

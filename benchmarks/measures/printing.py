"""Printed bytes a second: what coalesced port I/O is for.

The guest prints in a loop without asking whether the port is ready.  pyvmm's figure includes
writing the bytes to a file descriptor (of /dev/null), as the command line does.  The C floor makes
an exit of each byte, and throws it away; "C coalesced" lets the kernel collect them, as pyvmm does,
and throws them away.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks import floor, guests
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample
from benchmarks.measures.exits import Marks
from pyvmm import Machine, StopReason
from pyvmm.console import Output


def _pyvmm(guest: Path, sink: int, count: int) -> Sample:
    written = 0
    with contextlib.closing(Output(sink)) as output:

        def count_and_write(data: bytes) -> None:
            nonlocal written
            written += len(data)
            output(data)

        with Machine(guest, output=count_and_write) as machine:
            marks = Marks(machine)
            stop = machine.run()
    assert stop.reason is StopReason.HALTED, stop
    assert written == count, f"{written} of {count} bytes were printed"
    wall, cpu = marks.seconds()
    return Sample(count / wall, count / cpu)


def _c(folder: Path, guest: Path, count: int, mode: str, number: int) -> Sample:
    ((wall, cpu),) = floor.run(folder, mode, guest, number)
    return Sample(count / wall, count / cpu)


@contextlib.contextmanager
def _contenders(port: int, context: Context) -> Iterator[Contenders]:
    count = context.scaled(100_000)
    guest = guests.write_guest(context.folder, f"print-{port:x}", guests.port_writes(count, port))
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield {
            PYVMM: lambda: _pyvmm(guest, sink, count),
            floor.FLOOR: lambda: _c(context.folder, guest, count, "exits", 1),
            "C coalesced": lambda: _c(context.folder, guest, count, "coalesced", port),
        }
    finally:
        os.close(sink)


_FLOOR = "one exit a byte, in C, with nothing done with the byte; and the same, coalesced"

MEASURES = (
    Measure(
        "print-debugcon",
        "bytes/s",
        "How fast a guest's log appears that is written to the debug console, port 0xE9.",
        _FLOOR,
        functools.partial(_contenders, 0xE9),
        Goal(floor.FLOOR, at_least=3),
    ),
    Measure(
        "print-com1",
        "bytes/s",
        "The same on the serial port, for a guest that does not poll its line status.",
        _FLOOR,
        functools.partial(_contenders, guests.COM1),
        Goal(floor.FLOOR, at_least=3),
    ),
)

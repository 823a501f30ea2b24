"""Start-up: `python3 -m pyvmm guests/hello.bin`, to its first byte on stdout and to its end.

The peer is a Python that does nothing but import what any VMM in Python needs.  The C floor runs
the same guest: what the kernel takes to make, run and free a VM.  Both Pythons are this one, with
the same flags, without the PYTHON* variables of the caller, and with their bytecode cached.

The `isolated` row uses -I -S: what a Python costs whose site-packages load nothing by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks import floor, processes
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample
from benchmarks.processes import ROOT

HELLO = ROOT / "guests" / "hello.bin"
PYTHON = "python3"  # the contender's name
BARE_IMPORTS = "import ctypes, mmap, threading, argparse"
BARE_AND_PRINT = f"{BARE_IMPORTS}; print('.', flush=True)", b".\n"  # the code, what it prints
_GREETING = b"Hello from long mode!\n"
_PATIENCE = 20.0  # seconds

# How a process is measured: its command, and what it prints.
Watch = Callable[[Sequence[str], bytes], Sample]


def _to_the_end(command: Sequence[str], expected: bytes) -> Sample:
    """Milliseconds from the start of a process to its end: wall and CPU time."""
    start = time.perf_counter()
    with processes.started(command) as process:
        assert process.stdout is not None and process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)  # wait() would not tell the CPU time
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or output != expected:
        raise RuntimeError(f"{' '.join(command)}: {process.returncode}, {errors.decode()}")
    return Sample(wall * 1e3, (used.ru_utime + used.ru_stime) * 1e3)


def _to_the_first_byte(command: Sequence[str], expected: bytes) -> Sample:
    """Milliseconds from the start of a process to the first byte on its stdout."""
    start = time.perf_counter()
    with processes.started(command) as process:
        processes.wait_for(process, expected[:1], _PATIENCE)
        wall = time.perf_counter() - start
        process.communicate()  # let it end by itself: to kill it leaves a VM to be freed meanwhile
    return Sample(wall * 1e3)


@contextlib.contextmanager
def _contenders(watch: Watch, flags: Sequence[str], context: Context) -> Iterator[Contenders]:
    python = processes.python(context.folder, *flags)
    code, printed = (BARE_IMPORTS, b"") if watch is _to_the_end else BARE_AND_PRINT
    program = ["-m", "pyvmm", str(HELLO)]
    if "-I" in flags:  # -I leaves the current folder out of sys.path
        main = (
            f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = [{str(HELLO)!r}]"
        )
        program = ["-c", f"{main}; runpy.run_module('pyvmm', run_name='__main__')"]
    yield {
        PYVMM: lambda: watch([*python, *program], _GREETING),
        PYTHON: lambda: watch([*python, "-c", code], printed),
        floor.FLOOR: lambda: watch(
            [str(floor.program(context.folder)), "start", str(HELLO)], _GREETING
        ),
    }


_FLOOR = "the same guest in C: making, running and freeing the VM"

MEASURES = (
    Measure(
        "start",
        "ms",
        "How long you wait for hello.bin, from pressing enter to the next prompt.",
        _FLOOR,
        functools.partial(_contenders, _to_the_end, ()),
        Goal(PYTHON, at_most=1.8),
    ),
    Measure(
        "start-isolated",
        "ms",
        "The same with a Python that loads no site-packages (-I -S).",
        _FLOOR,
        functools.partial(_contenders, _to_the_end, ("-I", "-S")),
    ),
    Measure(
        "first-byte",
        "ms",
        "How long you wait until hello.bin has printed the first letter of its greeting.",
        "the same guest in C: making the VM and running it up to there",
        functools.partial(_contenders, _to_the_first_byte, ()),
    ),
)

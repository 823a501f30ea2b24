"""Start-up: `python3 -m pyvmm guests/hello.bin` from process start to end.

The peer is a Python that does nothing but import what any VMM in Python needs.  The C floor runs
the same guest: what the kernel takes to make, run and free a VM.  Both Pythons are this one, with
the same flags, without the PYTHON* variables of the caller, and with their bytecode cached.

The `isolated` rows use -I -S: what a Python costs whose site-packages load nothing by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import floor
from benchmarks.measure import PYVMM, Contenders, Context, Goal, Measure, Sample

ROOT = Path(__file__).parents[2]
HELLO = ROOT / "guests" / "hello.bin"
PYTHON = "python3"  # the contender's name
BARE = "import ctypes, mmap, threading, argparse"
_GREETING = b"Hello from long mode!\n"


def _process(command: Sequence[str], environment: dict[str, str], expected: bytes) -> Sample:
    """Milliseconds from the start of a process to its end: wall and CPU time."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        output, errors = process.stdout.read(), process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)  # wait() would not tell the CPU time
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or output != expected:
        raise RuntimeError(f"{' '.join(command)}: {process.returncode}, {errors.decode()}")
    return Sample(wall * 1e3, (used.ru_utime + used.ru_stime) * 1e3)


@contextlib.contextmanager
def _contenders(flags: Sequence[str], context: Context) -> Iterator[Contenders]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    python = [sys.executable, *flags]
    # Also where the checkout cannot be written to; an option, because -I ignores the variable.
    python += ["-X", f"pycache_prefix={context.folder / 'pycache'}"]
    program = ["-m", "pyvmm", str(HELLO)]
    if "-I" in flags:  # -I leaves the current folder out of sys.path
        main = (
            f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = [{str(HELLO)!r}]"
        )
        program = ["-c", f"{main}; runpy.run_module('pyvmm', run_name='__main__')"]
    yield {
        PYVMM: lambda: _process([*python, *program], environment, _GREETING),
        PYTHON: lambda: _process([*python, "-c", BARE], environment, b""),
        floor.FLOOR: lambda: _process(
            [str(floor.program(context.folder)), "start", str(HELLO)], environment, _GREETING
        ),
    }


_FLOOR = "the same guest in C: making, running and freeing the VM"

MEASURES = (
    Measure(
        "start",
        "ms",
        "How long you wait for hello.bin, from pressing enter to the next prompt.",
        _FLOOR,
        functools.partial(_contenders, ()),
        Goal(PYTHON, at_most=1.8),
    ),
    Measure(
        "start-isolated",
        "ms",
        "The same with a Python that loads no site-packages (-I -S).",
        _FLOOR,
        functools.partial(_contenders, ("-I", "-S")),
    ),
)

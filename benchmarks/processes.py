"""Processes that are measured: how they are started, and when they have printed something.

A Python among them is the one that runs the benchmark, without the caller's PYTHON* variables.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """The caller's environment, but for what would change how a Python starts."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def python(folder: Path, *flags: str) -> list[str]:
    """A Python whose bytecode is cached in `folder`, also where the checkout is read-only."""
    # An option and not a variable, because -I ignores those.
    return [sys.executable, *flags, "-X", f"pycache_prefix={folder / 'pycache'}"]


@contextlib.contextmanager
def started(
    command: Sequence[str], *, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the root of the project, with a pipe as stderr; it is killed at the end."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(),
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def wait_for(process: subprocess.Popen[bytes], wanted: bytes, patience: float) -> bytes:
    """Return as soon as `process` has printed `wanted` to its stdout: what is read behind it.

    Raises RuntimeError when it ends before, or has not done so after `patience` seconds.
    """
    assert process.stdout is not None
    printed, descriptor = b"", process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + patience
    while wanted not in printed:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise RuntimeError(f"no {wanted.decode()!r} within {patience:g} s")
        data = os.read(descriptor, 1 << 16)
        if not data:
            raise RuntimeError(f"ended without {wanted.decode()!r}: {errors_of(process)}")
        printed = printed[-len(wanted) :] + data
    return printed.partition(wanted)[2]


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """The CPU time that its threads have used, a guest's instructions included."""
    total = 0
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


@contextlib.contextmanager
def bound(pid: int, cpu: int) -> Iterator[None]:
    """A process, with all threads that it has now, on one CPU, and then where it was before."""
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    before = [(thread, os.sched_getaffinity(thread)) for thread in threads]
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {cpu})
        yield
    finally:
        for thread, cpus in before:
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, cpus)


def errors_of(process: subprocess.Popen[bytes]) -> str:
    """The first line that a process that has ended, or is to end now, has written to stderr."""
    process.kill()
    assert process.stderr is not None
    lines = process.stderr.read().decode(errors="replace").splitlines()
    return next(iter(lines), "no message")

"""The C floor: runs floor.c, compiled once into the scratch folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks import gcc, guests
from benchmarks.measure import Unavailable

SOURCE = Path(__file__).with_name("floor.c")
FLOOR = "C"  # the contender's name
_SECONDS = 120  # more than any sample takes
_MISUSED = 2  # the exit status for a guest that does not do what floor.c expects of it


def program(folder: Path) -> Path:
    """The compiled floor, in `folder`.  Raises Unavailable where there is no working gcc."""
    known = [f"-DMARK_PORT={guests.MARK_PORT}", f"-DCOUNTER={guests.COUNTER_GPA}"]
    known += [f"-DSEQUENTIAL={guests.SEQUENTIAL_BYTES}", f"-DRANDOM={guests.RANDOM_BYTES}"]
    return gcc.compiled(SOURCE, folder / "floor", "-pthread", *known)


def run(folder: Path, mode: str, file: Path, number: int = 1) -> list[list[float]]:
    """Run the floor in one of its modes with a guest or a disk; the numbers of each line printed.

    Raises Unavailable with the floor's own message when this host refuses something, and
    RuntimeError when the guest is not one for this mode.
    """
    command = [str(program(folder)), mode, str(file), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if done.returncode == _MISUSED:
        raise RuntimeError(done.stderr.strip())
    if done.returncode:
        raise Unavailable(done.stderr.strip() or f"floor ended with status {done.returncode}")
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]

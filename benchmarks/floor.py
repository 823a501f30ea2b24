"""The C floor: compiles floor.c once, into the scratch folder, and runs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks import guests
from benchmarks.measure import Unavailable

SOURCE = Path(__file__).with_name("floor.c")
FLOOR = "C"  # the contender's name
_SECONDS = 120  # more than any sample takes
_MISUSED = 2  # the exit status for a guest that does not do what floor.c expects of it


def program(folder: Path) -> Path:
    """The compiled floor, in `folder`.  Raises Unavailable where there is no working gcc."""
    binary = folder / "floor"
    if binary.exists():
        return binary
    if shutil.which("gcc") is None:
        raise Unavailable("no gcc (apt install gcc libc6-dev)")
    known = [f"-DMARK_PORT={guests.MARK_PORT}", f"-DCOUNTER={guests.COUNTER_GPA}"]
    command = ["gcc", "-O2", "-pthread", *known, "-o", str(binary), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), "no message")
        raise Unavailable(f"gcc failed: {first}")
    return binary


def run(folder: Path, mode: str, guest: Path, number: int = 1) -> list[list[float]]:
    """Run the floor in one of its modes; the numbers that it prints, line by line.

    Raises Unavailable with the floor's own message when this host refuses something, and
    RuntimeError when the guest is not one for this mode.
    """
    command = [str(program(folder)), mode, str(guest), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if done.returncode == _MISUSED:
        raise RuntimeError(done.stderr.strip())
    if done.returncode:
        raise Unavailable(done.stderr.strip() or f"floor ended with status {done.returncode}")
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]

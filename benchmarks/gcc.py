"""Compiles the C sources of the benchmark, once each, into the scratch folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.measure import Unavailable


def compiled(source: Path, binary: Path, *flags: str) -> Path:
    """`binary`, made from `source` if it is not there.

    Raises Unavailable where there is no working gcc.
    """
    if binary.exists():
        return binary
    if shutil.which("gcc") is None:
        raise Unavailable("no gcc (apt install gcc libc6-dev)")
    command = ["gcc", "-O2", *flags, "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), "no message")
        raise Unavailable(f"gcc failed: {first}")
    return binary

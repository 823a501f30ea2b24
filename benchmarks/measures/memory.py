"""Peak memory: what a VM costs the host besides what its guest uses.

The guest prints a line and stays, so that all contenders can be looked at in the same moment: when
the line is there.  What is read is the kernel's own record, VmHWM of /proc/PID/status.  (ru_maxrss
of a child is no use: it begins with what its parent had when it started the child.)  All give the
guest 64 MiB, which count only where they are touched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import floor, guests, processes, stubs
from benchmarks.measure import PYVMM, Contenders, Context, Measure, Sample, Unavailable
from benchmarks.measures.start import BARE_AND_PRINT, PYTHON
from benchmarks.stubs import QEMU

_LINE = b"here\n"
_PATIENCE = 20.0  # seconds
_SETTLE = 0.1  # seconds; pyvmm registers its coalesced ports 20 ms after the start


def peak_mib(status: str) -> float:
    """The peak of a process's resident memory in MiB, from its /proc/PID/status."""
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) / 1024


def _peak(command: Sequence[str], printed: bytes = _LINE) -> Sample:
    with processes.started(command) as process:
        processes.wait_for(process, printed, _PATIENCE)
        time.sleep(_SETTLE)
        return Sample(peak_mib(Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")))


@contextlib.contextmanager
def _contenders(context: Context) -> Iterator[Contenders]:
    guest = guests.write_guest(context.folder, "says", guests.says(_LINE))
    python = processes.python(context.folder)
    code, printed = BARE_AND_PRINT

    def qemu() -> Sample:
        command = [*stubs.qemu_command(context.folder, guest), "-serial", "stdio"]
        try:
            return _peak(command)
        except RuntimeError as error:
            raise Unavailable(f"QEMU: {error}") from None

    yield {
        PYVMM: lambda: _peak([*python, "-m", "pyvmm", str(guest)]),
        PYTHON: lambda: _peak([*python, "-c", f"{code}; threading.Event().wait()"], printed),
        QEMU: qemu,
        floor.FLOOR: lambda: _peak([str(floor.program(context.folder)), "start", str(guest)]),
    }


MEASURES = (
    Measure(
        "peak-memory",
        "MiB",
        "How much of the host's memory a small guest's VM takes: how many of them fit.",
        "the same guest in C: the C library, the guest's pages that were touched, and page tables",
        _contenders,
    ),
)

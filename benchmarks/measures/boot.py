"""Boots: from the start of the process until the guest's kernel says that it is up.

A measure is a guest, the text that it prints when it is done, and the command of each contender.
QEMU brings its BIOS along, which loads the kernel; pyvmm puts it into memory by itself.  On a KVM
without VMX or SVM (kvm_pvm) that BIOS, 16-bit code, is emulated by the host's kernel, which takes
seconds: so QEMU runs without KVM, too ("TCG": it translates the guest's code by itself).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import processes, stubs
from benchmarks.measure import PYVMM, Contenders, Context, Measure, Sample, Unavailable
from benchmarks.processes import ROOT
from benchmarks.stubs import QEMU

_PATIENCE, _QUICK_PATIENCE = 30.0, 2.0  # seconds
TCG = "QEMU TCG"  # the contender's name


def _boot(command: Sequence[str], done: bytes, patience: float) -> Sample:
    """Milliseconds from the start of a process until it has printed `done`."""
    start = time.perf_counter()
    with processes.started(command) as process:
        processes.wait_for(process, done, patience)
        wall = time.perf_counter() - start
        process.communicate()  # let it power off: to kill it leaves a VM to be freed meanwhile
    return Sample(wall * 1e3)


def _qemu_boot(accelerator: str, arguments: Sequence[str], done: bytes, quick: bool) -> Sample:
    command = [stubs.qemu_program(), "-accel", accelerator, "-m", str(stubs.MEMORY_MIB)]
    command += ["-nodefaults", "-display", "none", "-serial", "stdio", *arguments]
    try:
        return _boot(command, done, _QUICK_PATIENCE if quick else _PATIENCE)
    except RuntimeError as error:
        raise Unavailable(f"{error}{' (--quick)' if quick else ''}") from None


@contextlib.contextmanager
def _contenders(kernel: Path, append: str, done: bytes, context: Context) -> Iterator[Contenders]:
    ours = [*processes.python(context.folder), "-m", "pyvmm", str(kernel), "--append", append]
    ours += ["-m", f"{stubs.MEMORY_MIB}M"]
    theirs = ["-kernel", str(kernel), "-append", append]
    yield {
        PYVMM: lambda: _boot(ours, done, _PATIENCE),
        QEMU: lambda: _qemu_boot("kvm", theirs, done, context.quick),
        TCG: lambda: _qemu_boot("tcg", theirs, done, context.quick),
    }


MEASURES = (
    Measure(
        "boot-multiboot",
        "ms",
        "How long a small kernel takes from pressing enter until its self-test has passed.",
        "20 to 30 ms: the test waits for three ticks of a timer of 100 Hz",
        functools.partial(_contenders, ROOT / "guests" / "multiboot.elf", "test", b"test: ok"),
    ),
)

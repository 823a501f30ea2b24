"""Boots: from the start of the process until the guest's kernel says that it is up.

A measure is a guest, the text that it prints when it is done, and the command of each contender.
QEMU brings its BIOS along, which loads the kernel; pyvmm puts it into memory by itself.  On a KVM
without VMX or SVM (kvm_pvm) that BIOS, 16-bit code, is emulated by the host's kernel, which takes
seconds: so QEMU runs without KVM, too ("TCG": it translates the guest's code by itself).  A Linux
takes minutes there, in any VMM, or ends on an instruction that KVM cannot emulate: each contender
is given up after some time, and its column says so.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import processes, stubs
from benchmarks.measure import (
    PYVMM,
    Contenders,
    Context,
    Goal,
    Measure,
    Sample,
    Sampler,
    Unavailable,
    unavailable,
)
from benchmarks.processes import ROOT
from benchmarks.stubs import QEMU

_PATIENCE, _QUICK_PATIENCE = 30.0, 2.0  # seconds
_LINUX_PATIENCE = 300.0  # where each instruction is translated
TCG = "QEMU TCG"  # the contender's name
MICROVM = "QEMU microvm"  # and that of QEMU's machine without a BIOS to wait for, and without PCI

_LINUX_MIB = 256
_BOOT_FOLDER = Path("/boot")  # where Debian puts its kernels


def _boot(command: Sequence[str], done: bytes, patience: float, *, ends: bool = True) -> Sample:
    """Milliseconds from the start of a process until it has printed `done`."""
    start = time.perf_counter()
    with processes.started(command) as process:
        processes.wait_for(process, done, patience)
        wall = time.perf_counter() - start
        if ends:
            process.communicate()  # let it: to kill it leaves a VM to be freed meanwhile
    return Sample(wall * 1e3)


def _boot_or_give_up(
    command: Sequence[str],
    done: bytes,
    context: Context,
    patience: float = _PATIENCE,
    *,
    ends: bool = True,
) -> Sample:
    """The same of a contender that may be too slow here."""
    patience = _QUICK_PATIENCE if context.quick else patience
    try:
        return _boot(command, done, patience, ends=ends)
    except RuntimeError as error:
        raise Unavailable(f"{error}{' (--quick)' if context.quick else ''}") from None


def _qemu(accelerator: str, mib: int, *arguments: str) -> list[str]:
    command = [stubs.qemu_program(), "-accel", accelerator, "-m", str(mib)]
    return [*command, "-nodefaults", "-display", "none", "-serial", "stdio", *arguments]


@contextlib.contextmanager
def _contenders(kernel: Path, append: str, done: bytes, context: Context) -> Iterator[Contenders]:
    mib = stubs.MEMORY_MIB
    ours = [*processes.python(context.folder), "-m", "pyvmm", str(kernel), "--append", append]
    ours += ["-m", f"{mib}M"]
    theirs = ["-kernel", str(kernel), "-append", append]
    yield {
        PYVMM: lambda: _boot(ours, done, _PATIENCE),
        QEMU: lambda: _boot_or_give_up(_qemu("kvm", mib, *theirs), done, context),
        TCG: lambda: _boot_or_give_up(_qemu("tcg", mib, *theirs), done, context),
    }


# --- Linux ---------------------------------------------------------------------------------------


def find_linux(context: Context, folder: Path = _BOOT_FOLDER) -> tuple[Path, Path, bytes]:
    """The kernel, its initrd, and the prompt of the shell in it.

    An initrd that the user names ends at a root's prompt.  The one that Debian has made for the
    kernel is stopped in the middle (break=top), at a prompt of its own.
    Raises Unavailable.
    """
    kernel = context.kernel or max(folder.glob("vmlinuz-*"), default=None, key=_age)
    if kernel is None:
        raise Unavailable(f"no {folder}/vmlinuz-*: give it with --kernel FILE")
    if context.initrd is not None:
        return kernel, context.initrd, b"# "
    initrd = folder / kernel.name.replace("vmlinuz-", "initrd.img-")
    if context.kernel is not None or not initrd.exists():
        raise Unavailable(f"no initrd for {kernel}: give it with --initrd FILE")
    return kernel, initrd, b"(initramfs) "


def _age(file: Path) -> float:
    return file.stat().st_mtime


@contextlib.contextmanager
def _linux(append: str, done: bytes | None, context: Context) -> Iterator[Contenders]:
    """Until `done`, or with None until the shell's prompt."""
    try:
        kernel, initrd, prompt = find_linux(context)
    except Unavailable as reason:
        yield {PYVMM: unavailable(str(reason))}
        return
    files = ["-initrd", str(initrd), "-append", append, "-kernel", str(kernel)]

    def boot(command: Sequence[str]) -> Sample:
        return _boot_or_give_up(command, done or prompt, context, _LINUX_PATIENCE, ends=False)

    def qemu(*machine: str) -> Sampler:
        return lambda: boot(_qemu("kvm", _LINUX_MIB, *machine, *files))

    ours = [*processes.python(context.folder), "-m", "pyvmm", str(kernel)]
    ours += ["--initrd", str(initrd), "--append", append, "-m", f"{_LINUX_MIB}M"]
    yield {PYVMM: lambda: boot(ours), MICROVM: qemu("-M", "microvm"), QEMU: qemu()}


_CONSOLE = "console=ttyS0 break=top"

MEASURES = (
    Measure(
        "boot-multiboot",
        "ms",
        "How long a small kernel takes from pressing enter until its self-test has passed.",
        "20 to 30 ms: the test waits for three ticks of a timer of 100 Hz",
        functools.partial(_contenders, ROOT / "guests" / "multiboot.elf", "test", b"test: ok"),
    ),
    Measure(
        "boot-linux-first-line",
        "ms",
        "How long a Linux takes from pressing enter until it says its version (earlyprintk).",
        "the kernel's own decompression, which the guest's processor does",
        functools.partial(_linux, f"{_CONSOLE} earlyprintk=ttyS0", b"Linux version"),
        Goal(MICROVM, at_most=1),
    ),
    Measure(
        "boot-linux-shell",
        "ms",
        "How long a Linux takes from pressing enter to the prompt of a shell in its initramfs.",
        "what the same kernel takes on the bare machine",
        functools.partial(_linux, f"{_CONSOLE} quiet", None),
        Goal(MICROVM, at_most=1),
    ),
)

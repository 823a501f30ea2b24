"""`monitor` commands about the kernel that a guest runs: its functions, and for Linux its log.

Each takes the target and the words behind the command, as all in monitor.py's table.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pyvmm.light import TYPE_CHECKING
from pyvmm.linux.kernel import LinuxError
from pyvmm.target import TargetError

if TYPE_CHECKING:
    from pyvmm.debugtarget import MachineTarget


@contextmanager
def _errors() -> Iterator[None]:
    """What cannot be found, or read, is told the debugger."""
    try:
        yield
    except LinuxError as error:
        raise TargetError(errno.ENOENT, str(error)) from None
    except OSError as error:
        message = f"{error.filename or 'the file'}: {error.strerror}"
        raise TargetError(error.errno or errno.EIO, message) from None


def where(target: MachineTarget, words: list[str]) -> str:
    """The function that each vCPU is in."""
    with _errors():
        return "\n".join(target.names.where())


def symbols(target: MachineTarget, words: list[str]) -> str:
    """Take the names of functions from a file."""
    if not words:
        raise TargetError(errno.EINVAL, "name a file, as System.map")
    with _errors():
        target.names.load(words[0])
    return where(target, [])


def kaslr(target: MachineTarget, words: list[str]) -> str:
    """Where a Linux kernel is, and what to type for that."""
    with _errors():
        kernel = target.names.kernel()
        place = f"the kernel begins at {kernel.base:#x}, GPA {kernel.gpa:#x}"
        offset = kernel.base - kernel.link_base
    if not offset:
        return f"{place}, where it was linked for; type\n  symbol-file vmlinux"
    return f"{place}, moved by {offset:#x}; type\n  symbol-file -o {offset:#x} vmlinux"


def dmesg(target: MachineTarget, words: list[str]) -> str:
    """The log of a Linux kernel, or its last messages."""
    from pyvmm.linux import printk

    count = _count(words) if words else 0  # 0: all
    with _errors():
        records = printk.read_log(target.names.kernel())
    return "\n".join(map(str, records[-count:])) or "the log is empty"


def _count(words: list[str]) -> int:
    try:
        count = int(words[0])
    except ValueError:  # which is also what Python says to thousands of digits
        count = 0
    if len(words) > 1 or count < 1:
        raise TargetError(errno.EINVAL, "say how many of the last messages, as 20")
    return count

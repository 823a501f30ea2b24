"""What the tests with Linux as a guest share: how it is found and booted, and its shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.boot import Image, read_image
from tests.hosts import linux, packages
from tests.support import requires

MIB = 1 << 20
MEMORY = 256 * MIB
BOOT = 240.0  # seconds; a kernel on an emulated processor takes 15 to 40
STEP = 60.0  # seconds, for a command
PROMPT = " # "


def find_or_skip(find: Callable[[Path], Path], scratch: Path) -> Path:
    """What one of tests.hosts' find() functions finds, below `scratch` if it has to be made."""
    try:
        return find(scratch)
    except packages.HostsError as error:
        pytest.skip(f"not there: {error}")


def find_linux(scratch: Path) -> Path:
    """The folder with the kernel, its initrd and e2fsck, where the host can run them."""
    requires("irqchip")
    requires("syscall-user")
    return find_or_skip(linux.find, scratch)


def linux_image(folder: Path, append: str = "", kernel: str = "vmlinuz") -> Image:
    """A kernel that prints on its serial port, with its initrd."""
    return read_image(
        str(folder / kernel),
        append=f"console=ttyS0 quiet panic=-1 {append}",
        initrd=str(folder / "initrd"),
    )


def shell_line(command: str) -> str:
    """What to type at the shell, so that succeeded() can tell how the command ended."""
    return f"{command}; echo status=$?"


def succeeded(command: str, printed: str) -> str:
    """What a command has printed, of all up to the next prompt; it must have succeeded."""
    output, _, status = printed.rpartition("status=")
    assert status.startswith("0"), f"{command}: {output}"
    return output.strip()

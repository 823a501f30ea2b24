"""A small Linux to be a guest: the hosts' own kernel, an initramfs with a shell, and e2fsck.

tests/test_linux.py boots it.  It is below FOLDER in the hosts; a machine with a KVM of its own
makes it from the same Debian packages.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tests.hosts import initrd, packages

FOLDER = Path("/linux")

# Drivers of pyvmm's devices that this kernel has as modules.
MODULES = ("virtio-mmio", "virtio-blk", "virtio-rng", "virtio-console")


def find(scratch: Path) -> Path:
    """Return the folder, made below scratch where there is none.  Raises HostsError."""
    if FOLDER.is_dir():
        return FOLDER
    wanted = packages.resolve()
    root = packages.fetch(wanted, packages.cache_folder() / packages.key(wanted))
    build(root, scratch / "linux")
    return scratch / "linux"


def build(root: Path, folder: Path) -> None:
    """Make the folder from root, the tree that packages.fetch() made.

    `vmlinuz` is the kernel, `initrd` what it begins with, `e2fsck` checks the host's files.
    Raises HostsError where an expected file is missing in root.
    """
    folder.mkdir()
    kernel = next((root / "boot").glob("vmlinuz-*"))
    shutil.copy(kernel, folder / "vmlinuz")
    shutil.copy(initrd.find(root, "sbin/e2fsck.static"), folder / "e2fsck")
    modules = root / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    with (folder / "initrd").open("wb") as file:
        archive = initrd.CpioWriter(file)
        for name in ("bin", "dev", "proc", "sys", "root", "modules"):
            archive.folder(name)
        archive.character_device("dev/console", 5, 1)
        init = Path(__file__).with_name("linux-init.sh").read_bytes()
        archive.file("init", init, executable=True)
        busybox = initrd.find(root, "bin/busybox").read_bytes()
        archive.file("bin/busybox", busybox, executable=True)
        order = list(initrd.modules(modules, MODULES))
        for name, content in order:
            archive.file(f"modules/{name}.ko", content)
        archive.file("modules/order", "\n".join(name for name, _ in order).encode())
        archive.finish()


def build_archive(root: Path, out: Path) -> None:
    """Write the archive that has the folder in a host."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, out.open("wb") as file:
        build(root, Path(scratch) / "linux")
        os.chmod(Path(scratch) / "linux/e2fsck", 0o755)
        archive = initrd.CpioWriter(file)
        archive.tree(Path(scratch) / "linux", FOLDER.name)
        archive.finish()

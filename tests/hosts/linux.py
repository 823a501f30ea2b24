"""Small Linuxes to be guests: a kernel, an initramfs with a shell, and e2fsck.

tests/test_linux.py boots them. One has the hosts' own kernel, Debian's cloud kernel. The other has
Debian's stock kernel, which is what a user has at hand: compressed with XZ, with drivers for
hardware that pyvmm has not, and what mounts a disk is a module. It is there as a bzImage, and
unpacked, which is what PVH boots. They are below FOLDER and STOCK_FOLDER in the hosts; a machine
with a KVM of its own makes them from the same Debian packages.
"""

from __future__ import annotations

import lzma
import os
import shutil
import struct
import tempfile
from pathlib import Path

from tests.hosts import initrd, packages

FOLDER = Path("/linux")
STOCK_FOLDER = Path("/stock")

# Drivers of pyvmm's devices that these kernels have as modules, and what only the stock kernel has
# as modules: ext4 mounts ext2, too, and asks for crc32c by a name that no dependency tells.
MODULES = ("virtio-mmio", "virtio-blk", "virtio-rng", "virtio-console")
STOCK_MODULES = (*MODULES, "crc32c-generic", "ext4")

# As much of the stock kernel's package as that needs.
STOCK_FILES = r"^/boot/vmlinuz-|/(virtio.*|crc32c_generic|crc16|mbcache|jbd2|ext4)\.ko"


def find(scratch: Path) -> Path:
    """Return the folder, made below scratch where there is none.  Raises HostsError."""
    if FOLDER.is_dir():
        return FOLDER
    _, root = _fetch()
    build(root, scratch / "linux")
    return scratch / "linux"


def find_stock(scratch: Path) -> Path:
    """Return the stock kernel's folder like find().  A slow host has none."""
    if STOCK_FOLDER.is_dir():
        return STOCK_FOLDER
    if FOLDER.is_dir():
        raise packages.HostsError("a slow host does without the stock one")
    wanted, root = _fetch()
    build(root, scratch / "stock", fetch_stock(wanted))
    return scratch / "stock"


def _fetch() -> tuple[dict[str, str], Path]:
    """Return what the hosts are made of: the packages, and their tree."""
    wanted = packages.resolve()
    return wanted, packages.fetch(wanted, packages.cache_folder() / packages.key(wanted))


def fetch_stock(wanted: dict[str, str]) -> Path:
    """Return a tree with the stock kernel that goes with the wanted packages, and its `vmlinux`."""
    stock = packages.stock_kernel(wanted)
    cache = packages.cache_folder() / packages.key(stock, STOCK_FILES)
    tree = packages.fetch(stock, cache, STOCK_FILES)
    # Once, and here: what takes this machine seconds takes an emulated processor minutes.
    if not (tree / "vmlinux").exists():
        partial = cache / f"incomplete.{os.getpid()}"
        partial.write_bytes(unpack_xz(_kernel(tree).read_bytes()))
        os.replace(partial, tree / "vmlinux")
    return tree


def unpack_xz(bzimage: bytes) -> bytes:
    """Return the vmlinux, an ELF file, in a bzImage that is compressed with XZ.

    Source: Linux, Documentation/arch/x86/boot.rst, for setup_sects, payload_offset and
    payload_length. The payload's last four bytes are not XZ's, but the size of what is in it.
    """
    (setup_sectors,) = struct.unpack_from("<B", bzimage, 0x1F1)
    offset, size = struct.unpack_from("<II", bzimage, 0x248)
    start = 512 * (1 + setup_sectors) + offset
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(bzimage[start : start + size])
    except lzma.LZMAError as error:
        raise packages.HostsError(f"the stock kernel is not compressed with XZ: {error}") from None


def build(root: Path, folder: Path, stock: Path | None = None) -> None:
    """Make the folder from root, the tree that packages.fetch() made.

    `vmlinuz` is the kernel, `initrd` what it begins with, `e2fsck` checks the host's files.
    With the tree of fetch_stock() the kernel is that one, and `vmlinux` the same unpacked.
    Raises HostsError where an expected file is missing.
    """
    folder.mkdir()
    kernel = _kernel(stock or root)
    shutil.copy(kernel, folder / "vmlinuz")
    if stock:
        shutil.copy(stock / "vmlinux", folder)
    shutil.copy(initrd.find(root, "sbin/e2fsck.static"), folder / "e2fsck")
    modules = kernel.parents[1] / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    with (folder / "initrd").open("wb") as file:
        archive = initrd.CpioWriter(file)
        for name in ("bin", "dev", "proc", "sys", "root", "modules"):
            archive.folder(name)
        archive.character_device("dev/console", 5, 1)
        init = Path(__file__).with_name("linux-init.sh").read_bytes()
        archive.file("init", init, executable=True)
        busybox = initrd.find(root, "bin/busybox").read_bytes()
        archive.file("bin/busybox", busybox, executable=True)
        order = list(initrd.modules(modules, STOCK_MODULES if stock else MODULES))
        for name, content in order:
            archive.file(f"modules/{name}.ko", content)
        archive.file("modules/order", "\n".join(name for name, _ in order).encode())
        archive.finish()


def build_archive(root: Path, out: Path, stock: Path | None = None) -> None:
    """Write the archive that has the folder in a host."""
    name = (STOCK_FOLDER if stock else FOLDER).name
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, out.open("wb") as file:
        build(root, Path(scratch) / name, stock)
        os.chmod(Path(scratch) / name / "e2fsck", 0o755)
        archive = initrd.CpioWriter(file)
        archive.tree(Path(scratch) / name, name)
        archive.finish()


def _kernel(tree: Path) -> Path:
    """Return the bzImage in the tree."""
    return next((tree / "boot").glob("vmlinuz-*"))

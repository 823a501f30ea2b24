"""Xen, a multiboot kernel that nobody here wrote: what tests/test_xen.py boots.

It is in the hosts; a machine with a KVM of its own takes it from the same Debian package.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from tests.hosts import initrd, packages

METAPACKAGE = "xen-system-amd64"
FILE = Path("/xen/xen")


def find(scratch: Path) -> Path:
    """Return the file, made below scratch where there is none.  Raises HostsError."""
    if FILE.exists():
        return FILE
    file = scratch / "xen"
    file.write_bytes(_fetch())
    return file


def build_archive(out: Path) -> None:
    """Write the archive that has the file in a host."""
    with out.open("wb") as archive:
        writer = initrd.CpioWriter(archive)
        writer.folder(FILE.parent.name)
        writer.file(str(FILE).lstrip("/"), _fetch())
        writer.finish()


def _fetch() -> bytes:
    wanted = packages.dependency(METAPACKAGE, r"xen-hypervisor-\d.*")
    only = r"^/boot/xen-.*\.gz$"
    root = packages.fetch(wanted, packages.cache_folder() / packages.key(wanted, only), only)
    return gzip.decompress(next((root / "boot").glob("xen-*.gz")).read_bytes())

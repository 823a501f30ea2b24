"""gdb in the hosts: Debian's gdb-minimal, which has no Python, and the libraries it is linked to.

These are forty: it can ask servers for symbols (libdebuginfod), over HTTP (libcurl), and that knows
all kinds of encryption and logins. The hosts have no network, but a program does not start without
the libraries it names. In Bochs they cost a boot four seconds, and all of gdb's start takes half of
a Python's: not enough for stand-ins.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.hosts import initrd, packages
from tests.hosts.packages import HostsError

PACKAGE = "gdb-minimal"
PROGRAM = "usr/bin/gdb"


def fetch() -> Path:
    """Return the tree with gdb and all libraries of its dependencies, unpacked in the cache."""
    wanted = packages.with_libraries(PACKAGE)
    return packages.fetch(wanted, packages.cache_folder() / packages.key(wanted))


def build_archive(root: Path, base: Path, out: Path) -> None:
    """Write the archive that adds gdb, from the tree of fetch(), to the host made from base."""
    there = {library.name for library in initrd.shared_libraries(base)}
    with out.open("wb") as file:
        archive = initrd.CpioWriter(file)
        archive.file(PROGRAM, (root / PROGRAM).read_bytes(), executable=True)
        for library in _libraries(root):
            if library.name not in there:
                archive.file(f"{initrd.LIBRARY_FOLDER}/{library.name}", library.read_bytes())
        archive.finish()


def _libraries(root: Path) -> Iterator[Path]:
    """Yield the shared libraries that gdb is loaded with, by the names programs ask for.

    Not all that the packages have: they are libraries of libraries' other programs, and plug-ins.
    """
    command = [*initrd.loader(root), "--inhibit-cache", "--list", str(root / PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [Path(name) for name in re.findall(r" => (/\S+) \(", done.stdout)]
    # The loader looks in this machine's folders, too, and that would work on no other machine.
    if done.returncode or not found or any(root not in file.parents for file in found):
        raise HostsError(f"{PACKAGE}: a library is missing: {(done.stdout + done.stderr).strip()}")
    yield from found

"""Debian packages: which ones the hosts are made of, and how they get into the cache folder.

Everything here runs as an ordinary user: ``apt-get download`` and ``dpkg -x`` need no root, and
nothing is installed. The emulators are different: they run on this machine, so they must be
installed, and check_installed() names those that are not.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

CACHE_VARIABLE = "PYVMM_HOSTS_CACHE"

# What must be installed here, host by host: package -> a file that shows that it is.
REQUIRED: dict[str, dict[str, str]] = {
    "amd": {"qemu-system-x86": "/usr/bin/qemu-system-x86_64", "seabios": "/usr/share/seabios"},
    "intel": {
        "bochs": "/usr/bin/bochs",
        "bochs-term": "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so",
        "bochsbios": "/usr/share/bochs/BIOS-bochs-latest",
        "vgabios": "/usr/share/vgabios/vgabios.bin",
        "isolinux": "/usr/lib/ISOLINUX/isolinux.bin",
        "syslinux-common": "/usr/lib/syslinux/modules/bios/ldlinux.c32",
        "xorriso": "/usr/bin/xorriso",
    },
}

# What the hosts are made of; downloaded, never installed. The cloud kernel has the same KVM modules
# as linux-image-amd64, no hardware drivers, and is compressed with LZ4 instead of XZ: Bochs spends
# seconds on it instead of a minute.
KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
PYTHON_METAPACKAGE = "python3"
LIBRARIES = (
    "libc6",
    "libffi8",
    "zlib1g",
    "libexpat1",
    "libbz2-1.0",
    "liblzma5",
    "libuuid1",
    "libcrypt1",
)


class HostsError(Exception):
    """Something the user can put right; the message says how."""


def check_installed(hosts: Iterable[str]) -> None:
    """Raise HostsError that names every package these hosts need and this machine lacks."""
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise HostsError(f"{tool} not found: the hosts are made of Debian packages")
    missing = [
        package
        for host in hosts
        for package, file in REQUIRED[host].items()
        if not Path(file).exists()
    ]
    if missing:
        raise HostsError(
            "missing Debian packages; as root: apt-get install --no-install-recommends "
            + " ".join(missing)
        )


def upstream_version(package: str) -> str:
    """Return an installed package's version without what Debian adds: 1:7.2+dfsg-7 is 7.2."""
    version = _run(["dpkg-query", "-W", "-f", "${Version}", package])
    match = re.match(r"(?:\d+:)?([\d.]+)", version)
    return match[1] if match else version


def cache_folder() -> Path:
    """Return the cache folder: $PYVMM_HOSTS_CACHE, or pyvmm-hosts in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyvmm-hosts"


def resolve() -> dict[str, str]:
    """Return the packages to fetch, name -> version, as the package lists have them now.

    Raises HostsError where the lists do not know one of them.
    """
    top = _show([KERNEL_METAPACKAGE, PYTHON_METAPACKAGE], "Depends")
    kernel = _dependency(top, KERNEL_METAPACKAGE, r"linux-image-\d.*")
    python = _dependency(top, PYTHON_METAPACKAGE, r"python3\.\d+")
    own = (f"{python}-minimal", f"lib{python}-minimal", f"lib{python}-stdlib")
    static = ("busybox-static", "e2fsck-static")
    return _show([kernel, *static, *own, *LIBRARIES], "Version")


def stock_kernel(packages: dict[str, str]) -> dict[str, str]:
    """Return the package of the stock kernel, name -> version, that goes with resolve()'s kernel.

    Debian builds both from one source package, in one version: there is nothing to look up.
    """
    name = next(name for name in packages if name.startswith("linux-image-"))
    return {name.replace("-cloud-", "-"): packages[name]}


def dependency(metapackage: str, pattern: str) -> dict[str, str]:
    """Return the package by this pattern that metapackage depends on: name -> version."""
    name = _dependency(_show([metapackage], "Depends"), metapackage, pattern)
    return _show([name], "Version")


def with_libraries(package: str) -> dict[str, str]:
    """Return a package and the libraries that it depends on, also by way of others: its version.

    Section "libs" is what has shared libraries; the others (debconf, dpkg) are for installing.
    """
    options = [f"--no-{kind}" for kind in UNUSED_RELATIONS]
    listed = _run(["apt-cache", "depends", "--recurse", *options, package], hint=UPDATE_HINT)
    # A package, then its relations, indented; <...> is a virtual one; a colon: not this machine's.
    names = [name for name in listed.splitlines() if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name)]
    sections = _show(names, "Section")
    return _show([name for name in names if name == package or sections[name] == "libs"], "Version")


UNUSED_RELATIONS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


def key(packages: dict[str, str], only: str = "") -> str:
    """Return a short name for this set of package versions, and for the part that fetch() keeps."""
    text = "".join(f"{name}={packages[name]}\n" for name in sorted(packages)) + only
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch(packages: dict[str, str], folder: Path, only: str = "") -> Path:
    """Download and unpack packages below folder; return the unpacked tree. Does nothing twice.

    With only, a regular expression, the tree keeps the files in whose paths ("/boot/...") it is
    found.
    """
    tree = folder / "root"
    if tree.is_dir():
        return tree
    incomplete = folder / f"incomplete.{os.getpid()}"
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir(parents=True)
    try:
        wanted = [f"{name}={version}" for name, version in packages.items()]
        _run(["apt-get", "download", "-q", *wanted], cwd=incomplete, hint=UPDATE_HINT)
        for package in sorted(incomplete.glob("*.deb")):
            _run(["dpkg", "-x", str(package), str(incomplete / "root")])
        for path in (incomplete / "root").rglob("*") if only else ():
            if path.is_file() and not re.search(only, f"/{path.relative_to(incomplete / 'root')}"):
                path.unlink()
        os.rename(incomplete / "root", tree)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    return tree


UPDATE_HINT = "the package lists may be missing or old; as root: apt-get update"


def _dependency(dependencies: dict[str, str], metapackage: str, pattern: str) -> str:
    """Return the package matching pattern that metapackage depends on."""
    for dependency in re.split(r"[,|]\s*", dependencies[metapackage]):
        name = dependency.split()[0]
        if re.fullmatch(pattern, name):
            return name
    raise HostsError(f"{metapackage} does not depend on {pattern}: not a Debian this tool knows")


def _show(names: list[str], field: str) -> dict[str, str]:
    """Return one field of each package's candidate version, from the package lists.

    One call for all of them: where apt keeps no cache of its lists, each costs a second.
    """
    shown = _run(["apt-cache", "show", "--no-all-versions", *names], hint=UPDATE_HINT)
    found: dict[str, str] = {}
    for stanza in shown.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)
        if field in fields:
            found[fields["Package"]] = fields[field]
    if missing := [name for name in names if name not in found]:
        raise HostsError(f"apt-cache show: no {field} of {' '.join(missing)}\n{UPDATE_HINT}")
    return found


def _run(command: list[str], cwd: Path | None = None, hint: str = "") -> str:
    """Run command to its end; return what it printed, or raise HostsError with its complaint."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        complaint = (done.stderr or done.stdout).strip()
        raise HostsError(f"{' '.join(command)}: {complaint}" + (f"\n{hint}" if hint else ""))
    return done.stdout

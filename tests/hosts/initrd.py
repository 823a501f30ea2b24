"""The hosts' root file system: what is in it, and the cpio archives that carry it.

Linux unpacks several archives one after the other from one initrd, each compressed or not. So the
big part (Python, pytest, kernel modules) is built once for a set of package versions and kept in
the cache; the checkout is a second, small archive made anew for each run.

The archives are written here rather than by cpio(1): the format is one fixed header a file, and
writing it in Python needs neither root (for /dev/console) nor another package.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tests.hosts.packages import LIBRARIES, HostsError

CHECKOUT = Path(__file__).resolve().parents[2]
CHECKOUT_PARTS = ("pyvmm", "tests", "guests", "docs", "pyproject.toml")
MODULES = ("kvm-amd", "kvm-intel")
LIBRARY_FOLDER = "usr/lib/x86_64-linux-gnu"

# Parts of the standard library that no test uses and that would only cost memory and time to load.
UNUSED = re.compile(
    r"/(pydoc_data|turtle.*|idlelib|lib2to3|ensurepip|tkinter|test|sqlite3|config-3.*"
    r"|_codecs_(jp|hk|cn|kr|tw|iso2022).*|_sqlite3.*|_curses.*|_test.*|.*\.a)(/|$)"
)


class CpioWriter:
    """Writes a cpio archive in the kernel's "newc" format.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0

    def folder(self, name: str) -> None:
        """Add an empty folder."""
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file."""
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device node."""
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def tree(self, source: Path, name: str) -> None:
        """Add source and everything below it as name."""
        if source.is_symlink():
            self.link(name, os.readlink(source))
        elif source.is_dir():
            self.folder(name)
            for child in sorted(source.iterdir()):
                self.tree(child, f"{name}/{child.name}")
        else:
            self.file(name, source.read_bytes(), executable=os.access(source, os.X_OK))

    def finish(self) -> None:
        """End the archive; the next one may follow it."""
        self._inode = -1
        self._entry("TRAILER!!!", 0)

    def _entry(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file system (2), device (2),
        # length of the name, checksum. The inode only tells hard links apart, and there are none.
        # A fixed time makes the archive depend on its content alone.
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._out.write(_padded(header + encoded) + _padded(content))


def base_name() -> str:
    """Return the file name of the cached archive: it changes with what build_base() would write."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for distribution in _pytest_distributions():
        digest.update(f"{distribution.name}={distribution.version}\n".encode())
    return f"initrd-{digest.hexdigest()[:16]}"


def build_base(root: Path, kernel_release: str, out: Path) -> None:
    """Write the archive of everything but the checkout.

    root is the tree packages.fetch() made, kernel_release names its kernel ("6.1.0-56-...").
    Raises HostsError where pytest is missing here or an expected file is missing in root.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        python = _copy_python(root, Path(scratch))
        partial = Path(scratch) / "initrd"
        with partial.open("wb") as file:
            archive = CpioWriter(file)
            for folder in ("bin", "dev", "proc", "sys", "root", "etc", "modules", "usr"):
                archive.folder(folder)
            archive.character_device("dev/console", 5, 1)
            archive.link("lib64", "usr/lib")
            archive.link("lib", "usr/lib")
            archive.file("bin/busybox", find(root, "bin/busybox").read_bytes(), executable=True)
            archive.link("bin/python3", f"/usr/bin/{python.name}")
            archive.tree(Path(scratch) / "usr/bin", "usr/bin")
            archive.tree(Path(scratch) / "usr/lib", "usr/lib")
            archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
            archive.file("etc/group", b"root:x:0:\n")
            archive.file("etc/hosts", b"127.0.0.1 localhost emulated-host\n")
            order = list(modules(root / "lib/modules" / kernel_release, MODULES))
            for name, content in order:
                archive.file(f"modules/{name}.ko", content)
            archive.file("modules/order", "\n".join(name for name, _ in order).encode())
            archive.finish()
        os.replace(partial, out)


def build_checkout(root: Path, out: Path) -> None:
    """Write the archive of /init and the checkout (the work tree)."""
    with tempfile.TemporaryDirectory() as scratch, out.open("wb") as file:
        copy = Path(scratch) / "checkout"
        copy.mkdir()
        for name in _checkout_files():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, copy / name)
        _compile(root, copy, "/checkout", keep_sources=True)
        archive = CpioWriter(file)
        init = Path(__file__).with_name("init.sh").read_bytes()
        archive.file("init", init, executable=True)
        archive.tree(copy, "checkout")
        archive.finish()


def build_job(command: str, out: Path) -> None:
    """Write the archive of the shell command that the host runs."""
    with out.open("wb") as file:
        archive = CpioWriter(file)
        archive.file("job", command.encode() + b"\n")
        archive.finish()


def _checkout_files() -> list[str]:
    """Return the checkout's files that git knows or would add, relative to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    done = subprocess.run(
        [*command, *CHECKOUT_PARTS], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HostsError(f"git ls-files: {done.stderr.strip()}")
    names = set(done.stdout.split("\0")) - {""}
    return sorted(name for name in names if (CHECKOUT / name).is_file())


def _copy_python(root: Path, scratch: Path) -> Path:
    """Copy interpreter, libraries and pytest to scratch; return the interpreter."""
    interpreter = next((root / "usr/bin").glob("python3.*"))
    (scratch / "usr/bin").mkdir(parents=True)
    shutil.copy(interpreter, scratch / "usr/bin")
    library = scratch / LIBRARY_FOLDER
    library.mkdir(parents=True)
    for file in shared_libraries(root):
        shutil.copy(file, library / file.name)
    (scratch / "usr/lib/ld-linux-x86-64.so.2").symlink_to("x86_64-linux-gnu/ld-linux-x86-64.so.2")
    standard = scratch / "usr/lib" / interpreter.name
    shutil.copytree(
        root / "usr/lib" / interpreter.name,
        standard,
        ignore=lambda folder, names: [name for name in names if UNUSED.search(f"/{name}")],
        ignore_dangling_symlinks=True,
    )
    # Debian's interpreter looks for add-on packages here; a "site-packages" it would not find.
    addons = scratch / "usr/lib/python3/dist-packages"
    for distribution in _pytest_distributions():
        _copy_distribution(distribution, addons)
    for folder in (standard, addons):
        _compile(root, folder, f"/usr/lib/{folder.relative_to(scratch / 'usr/lib')}")
    return interpreter


def shared_libraries(root: Path) -> Iterator[Path]:
    """Yield the shared libraries of LIBRARIES, by the names programs ask for."""
    found = 0
    for folder in ("lib/x86_64-linux-gnu", LIBRARY_FOLDER):
        for file in sorted((root / folder).glob("*.so.*")):
            found += 1
            yield file
    if found < len(LIBRARIES):
        raise HostsError(f"{root}: only {found} shared libraries; remove it and start again")


def _pytest_distributions() -> list[importlib.metadata.Distribution]:
    """Return pytest, pytest-timeout and what they need, from this interpreter's environment."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = ["pytest", "pytest-timeout"]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise HostsError(
                f"this Python has no {name}: pip install pytest pytest-timeout"
            ) from None
        for requirement in found[name].requires or ():
            # "; ..." are conditions: other systems, older Pythons, optional extras.
            if ";" not in requirement:
                match = re.match(r"[A-Za-z0-9._-]+", requirement)
                assert match
                wanted.append(match[0].lower())
    return list(found.values())


def _copy_distribution(distribution: importlib.metadata.Distribution, target: Path) -> None:
    """Copy a pure Python distribution's files."""
    for file in distribution.files or ():
        outside = file.parts[0] == ".."
        # Pygments has a file for each of 500 languages; pytest colours Python and diffs.
        lexer = file.match("pygments/lexers/*.py") and file.stem not in PYGMENTS_LEXERS
        if outside or lexer or "__pycache__" in file.parts or "tests" in file.parts:
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(file.locate()), target / file)


PYGMENTS_LEXERS = ("__init__", "_mapping", "python", "diff")


def _compile(root: Path, folder: Path, inside: str, *, keep_sources: bool = False) -> None:
    """Compile Python sources below folder, which will be inside in the host, with its Python.

    An emulated processor takes minutes for what this one does in seconds. Without their sources,
    the compiled files go where the sources were. "unchecked-hash" files are valid whatever a
    source's time: nothing in the host changes sources.
    """
    interpreter = next((root / "usr/bin").glob("python3.*"))
    command = [*loader(root), str(interpreter)]
    options = ["-q", "-f", "-j0", "--invalidation-mode", "unchecked-hash", "-s", str(folder)]
    options += ["-p", inside] + ([] if keep_sources else ["-b"])
    done = subprocess.run(
        [*command, "-m", "compileall", *options, str(folder)],
        env={"PYTHONHOME": str(root / "usr"), "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    # A file of the checkout that does not compile is for the tests to report.
    if done.returncode and not keep_sources:
        raise HostsError(f"compileall {inside}: {(done.stdout + done.stderr).strip()}")
    if not keep_sources:
        for source in folder.rglob("*.py"):
            source.unlink()


def loader(root: Path) -> list[str]:
    """Return the command that runs what follows it, a program below root, on root's libraries."""
    program = find(root, "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    paths = [root / "lib/x86_64-linux-gnu", root / LIBRARY_FOLDER]
    return [str(program), "--library-path", ":".join(map(str, paths))]


def modules(folder: Path, wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield modules and those they need, name and content, in an order to load them."""
    files = {file.name.split(".")[0].replace("_", "-"): file for file in folder.rglob("*.ko*")}
    done: set[str] = set()

    def load(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done:
            return
        done.add(name)
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        # The kernel's build notes a module's needs in its .modinfo section.
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in match[1].decode().split(",") if match and match[1] else ():
            yield from load(needed.replace("_", "-"))
        yield name, _unsigned(content)

    for name in wanted:
        if name not in files:
            raise HostsError(f"{folder}: no module {name}")
        yield from load(name)


def _unsigned(module: bytes) -> bytes:
    """Return a kernel module without its signature, which costs seconds to verify in Bochs.

    Source: Linux, scripts/sign-file.c: signature, struct module_signature (12 bytes, the last four
    are the signature's length in bytes, big-endian), magic string.
    """
    if not module.endswith(SIGNATURE_MAGIC):
        return module
    end = len(module) - len(SIGNATURE_MAGIC)
    (length,) = struct.unpack(">I", module[end - 4 : end])
    return module[: end - 12 - length]


SIGNATURE_MAGIC = b"~Module signature appended~\n"


def find(root: Path, name: str) -> Path:
    """Return name below root, or below its usr (Debian 13 moved /lib and /bin there)."""
    for file in (root / name, root / "usr" / name):
        if file.exists():
            return file
    raise HostsError(f"{root}: no {name}")


def _padded(data: bytes) -> bytes:
    """Return data padded with zeros to a multiple of 4 bytes."""
    return data + bytes(-len(data) % 4)

"""Boot protocols: from a file to an `Image`, one module for each kind of file.

`PROTOCOLS` is the whole story: the kinds are asked in this order whether the file is one of theirs,
and the first that says yes loads it. To add one, write a module with `recognise` and `load`, and
add its row before all that would take its files too (a multiboot kernel is an ELF file as well).
"""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Sequence
from types import ModuleType

from pyvmm.boot.image import (
    GIB,
    Image,
    ImageError,
    LoadOptions,
    Mode,
    Module,
    Segment,
    check_fits,
    finish_image,
    real_mode_entry,
)
from pyvmm.light import NamedTuple

__all__ = [
    "PROTOCOLS",
    "BootProtocol",
    "Image",
    "ImageError",
    "LoadOptions",
    "Mode",
    "Module",
    "Segment",
    "check_fits",
    "finish_image",
    "read_image",
    "real_mode_entry",
]


class BootProtocol(NamedTuple):
    """A kind of file: `recognise(contents)` tells one, `load(name, contents, options)` reads it.

    Both are in the module `module`, which is imported only for a file that has `mark` near its
    beginning, as all of this kind have.
    Some guests can be given other files with it: modules, or an initrd.
    """

    module: str
    mark: bytes
    takes_modules: bool = False
    takes_initrd: bool = False

    def recognise(self, contents: bytes) -> bool:
        """Whether the file is of this kind."""
        return self.mark in contents[:MARKED_BYTES] and bool(self._code().recognise(contents))

    def load(self, name: str, contents: bytes, options: LoadOptions) -> Image:
        """The file as an image.  Raises ImageError."""
        image: Image = self._code().load(name, contents, options)
        return image

    def _code(self) -> ModuleType:
        return importlib.import_module(f"pyvmm.boot.{self.module}")


MARKED_BYTES = 8192  # how far from the beginning a mark may be: a multiboot header's limit

PROTOCOLS = (
    BootProtocol("linux", b"HdrS", takes_initrd=True),
    # These two are ELF files, mostly.
    BootProtocol("multiboot", b"\x02\xb0\xad\x1b", takes_modules=True),
    BootProtocol("pvh", b"\x7fELF", takes_initrd=True),
    BootProtocol("elf", b"\x7fELF"),
    BootProtocol("flat", b""),  # takes anything: the last one
)

MAX_IMAGE_BYTES = GIB  # a kernel with all of its debug information is smaller; a disk image is not


def read_image(
    path: str | os.PathLike[str],
    *,
    mode: Mode | None = None,
    load: int | None = None,
    entry: int | None = None,
    append: str = "",
    modules: Sequence[str] = (),
    initrd: str | os.PathLike[str] | None = None,
) -> Image:
    """Read the guest in the file `path`; `load` and `entry` are gpas, None where not asked for.

    `append` is the guest's command line. Each of `modules` is a file for the guest, "FILE args":
    the first space ends the file's name, and the guest gets all of it. `initrd` is the file with
    the root file system that Linux begins with.
    Raises ImageError, with a message of one line, when a file cannot be read or used.
    """
    name = _shown(os.fspath(path))
    contents = _read_file(os.fspath(path), name, "guest image")
    protocol = next(protocol for protocol in PROTOCOLS if protocol.recognise(contents))
    image = protocol.load(name, contents, LoadOptions(mode, load, entry))
    if modules and not protocol.takes_modules:
        raise ImageError(
            f"{name}: this {image.kind} file cannot be given modules; only a multiboot kernel can"
        )
    if initrd is not None and not protocol.takes_initrd:
        raise ImageError(
            f"{name}: this {image.kind} file cannot be given an initrd; only a Linux kernel can"
        )
    return image._replace(
        append=append,
        modules=tuple(_read_module(string.split(" ", 1)[0], string) for string in modules),
        initrd=None if initrd is None else _read_module(os.fspath(initrd), "", "Linux initrd"),
    )


def _read_module(path: str, string: str, what: str = "module") -> Module:
    name = _shown(path)
    return Module(name, string, _read_file(path, name, what))


def _shown(path: str) -> str:
    """The path as error messages show it: a newline in a file's name must not break them."""
    return path if path.isprintable() else repr(path)


def _read_file(path: str, name: str, what: str) -> bytes:
    """The contents of a regular file of a believable size.

    Errors show it as `name`, and say that it should be a `what`.
    """
    try:
        # Looked at before it is opened: opening a FIFO waits, and some devices act on it.
        size = _check_regular(os.stat(path), name, what)
        with open(path, "rb", opener=_open_at_once) as file:
            size = _check_regular(os.fstat(file.fileno()), name, what)
            return file.read(size)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file; give the path of a {what}") from None
    except PermissionError:
        raise ImageError(f"{name}: permission denied; make the file readable") from None
    except ValueError:  # a null byte in the path, the only one that os.stat refuses by itself
        raise ImageError(f"{name}: not a file name") from None
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: the path may have become a FIFO since it was looked at."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_regular(status: os.stat_result, name: str, what: str) -> int:
    """The file's size in bytes; raises ImageError unless it is a regular file worth reading."""
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: a directory; give the path of a {what} in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: a pipe, socket or device; copy the {what} to a regular file")
    if status.st_size == 0:
        raise ImageError(f"{name}: the file is empty; build the {what} again")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ImageError(
            f"{name}: {status.st_size} bytes are too many for a {what} (at most "
            f"{MAX_IMAGE_BYTES}); strip its debug information; a whole disk does not fit"
        )
    return status.st_size

"""Packets that hand out documents and the one file: qXfer and vFile.

`qXfer:OBJECT:read:ANNEX:OFFSET,LENGTH` reads a document in pieces; the reply begins with `m` (more
follows) or `l` (last). A document is made when its first piece is asked for and kept until the
next time, so that its pieces fit together even if the VM changes in between.

`vFile` is how gdb fetches the executable whose path `qXfer:exec-file` has told it. That one file
can be opened, read, asked for its size and closed; everything else does not exist.

Source: Debugging with GDB, appendix "GDB Remote Serial Protocol", sections "General Query Packets"
and "Host I/O Packets"; the layout of `struct stat` and the error numbers in section "File-I/O
Remote Protocol Extension".
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pyvmm import targetxml
from pyvmm.registers import Architecture
from pyvmm.session import MAX_DATA, PacketError, Session, parse_hex, split_numbers, unhex
from pyvmm.target import ExecFile

# ---- Documents ----


def _features(session: Session, annex: bytes) -> bytes:
    """The target description. To read it is to agree on it: the layout is chosen anew."""
    if annex != b"target.xml":
        raise PacketError("the only target description is target.xml")
    session.choose_layout()
    return targetxml.target_description(session.layout)


def _threads(session: Session, annex: bytes) -> bytes:
    target = session.target
    return targetxml.thread_list(
        (session.format_thread(n), n, target.describe(n)) for n in target.vcpu_ids()
    )


def _memory_map(session: Session, annex: bytes) -> bytes:
    return targetxml.memory_map(session.target.memory_map() or ())


def _exec_file(session: Session, annex: bytes) -> bytes:
    """The path of the executable; the annex, a process id, can only be ours."""
    exec_file = _the_file(session)
    return _path(exec_file) if exec_file else b""


def _the_file(session: Session) -> ExecFile | None:
    """The executable, unless gdb could not use it with the description that it has: of an ELF32
    whose code is 64-bit by now it only says that it does not recognize the file."""
    exec_file = session.target.exec_file()
    wide = session.layout.architecture is Architecture.X86_64
    return exec_file if exec_file and (exec_file.bits == 64 or not wide) else None


def _path(exec_file: ExecFile) -> bytes:
    return exec_file.path.encode(errors="surrogateescape")


@dataclass(frozen=True)
class Document:
    """What qXfer can read. gdb warns of a document that is offered and then empty: so it is
    offered only if `exists`."""

    name: bytes
    make: Callable[[Session, bytes], bytes]
    exists: Callable[[Session], bool] = lambda session: True


DOCUMENTS = (
    Document(b"features", _features),
    Document(b"threads", _threads),
    Document(b"memory-map", _memory_map, lambda session: session.target.memory_map() is not None),
    Document(b"exec-file", _exec_file, lambda session: _the_file(session) is not None),
)


def offered(session: Session) -> list[Document]:
    """The documents that this target has."""
    return [document for document in DOCUMENTS if document.exists(session)]


def read_document(session: Session, args: bytes) -> bytes:
    """qXfer:OBJECT:read:ANNEX:OFFSET,LENGTH"""
    name, _, rest = args.partition(b":")
    operation, _, rest = rest.partition(b":")
    found = next((document for document in DOCUMENTS if document.name == name), None)
    if not found or not found.exists(session) or operation != b"read":
        return b""  # unknown, like a packet that does not exist
    annex, _, numbers = rest.rpartition(b":")
    offset, length = split_numbers(numbers, 2)
    if offset == 0:
        session.documents[name] = found.make(session, annex)
    document = session.documents.get(name, b"")
    if offset > len(document):
        raise PacketError("the offset is beyond the end")
    end = offset + min(length, MAX_DATA - 1)
    return (b"l" if end >= len(document) else b"m") + document[offset:end]


# ---- The one file ----

_ENOENT, _EBADF, _EINVAL, _EMFILE, _EROFS, _EIO = 2, 9, 22, 24, 30, 5
_MAX_OPEN = 16
_O_RDONLY = 0
# st_dev, ino, mode, nlink, uid, gid, rdev; size, blksize, blocks; atime, mtime, ctime: big-endian.
_STAT = struct.Struct(">7I3Q3I")


class _FileError(Exception):
    """An operation that fails with an errno of the File-I/O protocol."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


def _result(number: int, data: bytes | None = None) -> bytes:
    return b"F%x" % number + (b"" if data is None else b";" + data)


def _set_filesystem(session: Session, args: bytes) -> bytes:
    """setfs:PROCESS: whose view of the file system; there is one file in all of them."""
    parse_hex(args)
    return _result(0)


def _open(session: Session, args: bytes) -> bytes:
    """open:HEXPATH,FLAGS,MODE"""
    text, _, numbers = args.partition(b",")
    flags, _mode = split_numbers(numbers, 2)
    path = unhex(text)
    exec_file = _the_file(session)
    if not exec_file or path != _path(exec_file):
        raise _FileError(_ENOENT)
    if flags != _O_RDONLY:
        raise _FileError(_EROFS)
    if len(session.open_files) == _MAX_OPEN:
        raise _FileError(_EMFILE)
    descriptor = next(n for n in range(_MAX_OPEN) if n not in session.open_files)
    session.open_files[descriptor] = exec_file
    return _result(descriptor)


def _pread(session: Session, args: bytes) -> bytes:
    """pread:DESCRIPTOR,COUNT,OFFSET"""
    descriptor, count, offset = split_numbers(args, 3)
    exec_file = _opened(session, descriptor)
    try:
        data = exec_file.pread(offset, min(count, MAX_DATA - 16))
    except (OSError, OverflowError):  # the file is gone, or the offset is beyond what files can be
        raise _FileError(_EIO) from None
    return _result(len(data), data)


def _fstat(session: Session, args: bytes) -> bytes:
    """fstat:DESCRIPTOR"""
    size = _opened(session, parse_hex(args)).size
    mode = stat.S_IFREG | 0o444
    return _result(
        _STAT.size, _STAT.pack(0, 0, mode, 1, 0, 0, 0, size, 512, -(-size // 512), 0, 0, 0)
    )


def _close(session: Session, args: bytes) -> bytes:
    """close:DESCRIPTOR"""
    descriptor = parse_hex(args)
    _opened(session, descriptor)
    del session.open_files[descriptor]
    return _result(0)


def _opened(session: Session, descriptor: int) -> ExecFile:
    if descriptor not in session.open_files:
        raise _FileError(_EBADF)
    return session.open_files[descriptor]


_FILE_OPERATIONS: dict[bytes, Callable[[Session, bytes], bytes]] = {
    b"setfs": _set_filesystem,
    b"open": _open,
    b"pread": _pread,
    b"fstat": _fstat,
    b"close": _close,
}


def file_operation(session: Session, args: bytes) -> bytes:
    """vFile:OPERATION:ARGUMENTS; F and a result, or F-1 and an errno."""
    name, _, rest = args.partition(b":")
    operation = _FILE_OPERATIONS.get(name)
    if not operation:
        return b""
    try:
        return operation(session, rest)
    except _FileError as error:
        return b"F-1,%x" % error.errno
    except PacketError:
        return b"F-1,%x" % _EINVAL

"""A file or block device of the host that is a disk of the guest's: raw sectors, no format.

What write() returns from is in the host's page cache: it survives the end of the VM, but not that
of the host.  After flush() it is on the disk.  A flush that has failed may have lost data that
nobody can find any more, so all later ones fail, too.

A disk that can be written belongs to one VM: the file is locked (flock) until close().  Those that
are only read can be shared.  QEMU has locks of its own, which these do not see.
Source: the kernel's <linux/falloc.h> for the two requests that make zeros.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence

from pyvmm.devices.virtqueue import total

SECTOR = 512

# Of all file systems that can do fallocate(), for whose modes Python has no function.
FS_IOC_UNRESVSP64 = 0x4030582B  # punch a hole: it reads as zeros and takes no room
FS_IOC_ZERO_RANGE = 0x40305839  # zeros that have their room on the disk
_SPACE_RESV = struct.Struct(
    "@hhqqiI16x"
)  # type, whence, start, bytes, two unused; struct's padding
_ZEROS = bytes(1 << 20)


class Disk:
    """An open disk.  Methods raise OSError; offsets and sizes are in bytes."""

    def __init__(self, path: str, *, readonly: bool = False) -> None:
        """Raises OSError, or ValueError for a file that cannot be a disk."""
        self.path, self.readonly = path, readonly
        # O_NONBLOCK only means that what is no disk, as a pipe, is not waited for.
        flags = os.O_RDONLY if readonly else os.O_RDWR
        try:
            self._fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if not readonly and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                hint = f"{error.strerror}; to only read it, name it {path},ro"
                raise OSError(error.errno, hint, path) from None
            raise
        try:
            self.size = self._find_size()
            self._lock()
        except BaseException:
            self.close()
            raise
        self._lost_data = False

    def _find_size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ValueError(f"{self.path}: neither a file nor a block device")
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not size or size % SECTOR:
            raise ValueError(f"{self.path}: {size} bytes: a disk is made of sectors of {SECTOR}")
        return size

    def _lock(self) -> None:
        kind = fcntl.LOCK_SH if self.readonly else fcntl.LOCK_EX
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another VM uses this disk", self.path) from None

    def close(self) -> None:
        """Unlock and close; closing again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill the buffers."""
        if os.preadv(self._fd, buffers, offset) != total(buffers):
            raise OSError(errno.EIO, "the file has become shorter", self.path)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers."""
        if os.pwritev(self._fd, buffers, offset) != total(buffers):
            raise OSError(errno.ENOSPC, "no room for all of it", self.path)

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        if self._lost_data:
            raise OSError(errno.EIO, "a flush has failed before", self.path)
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._lost_data = True
            raise

    def discard(self, offset: int, size: int) -> None:
        """Give the room back to the host, if it can take it; the data are of no use any more."""
        self._allocate(FS_IOC_UNRESVSP64, offset, size)

    def write_zeros(self, offset: int, size: int, *, keep_room: bool) -> None:
        """Make it zeros, which may be without room of their own unless `keep_room`."""
        request = FS_IOC_ZERO_RANGE if keep_room else FS_IOC_UNRESVSP64
        if self._allocate(request, offset, size):
            return
        for start in range(offset, offset + size, len(_ZEROS)):
            piece = memoryview(_ZEROS)[: offset + size - start]
            self.write([piece], start)

    def _allocate(self, request: int, offset: int, size: int) -> bool:
        """Ask the file system; whether it knows how to do it."""
        try:
            fcntl.ioctl(self._fd, request, _SPACE_RESV.pack(0, os.SEEK_SET, offset, size, 0, 0))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return False
            raise
        return True


def parse(argument: str) -> Disk:
    """The disk that `FILE` or `FILE,ro` names.  Raises as Disk does."""
    path = argument.removesuffix(",ro")
    return Disk(path, readonly=path != argument)

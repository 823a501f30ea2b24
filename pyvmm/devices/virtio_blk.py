"""A virtio block device: the guest's disk.

A request is a chain: a header (what, and which sector), data to read or to write, and a status byte
at the end.  One thread does them one after the other, each as one system call straight into or out
of guest memory.  Whatever goes wrong on the host becomes a status, which the guest's driver turns
into an I/O error of the program that wanted it.

The disk has a write cache, the host's: a write that is done is not yet on the disk, and the guest
must send a flush to be sure (VIRTIO_BLK_F_FLUSH).  For a driver that does not know of it, each
write is flushed before it is reported as done.

Left out: several queues, geometry and topology, switching the cache off, secure erase.
Source: Virtual I/O Device (VIRTIO) Version 1.2, "Block Device".
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable

from pyvmm.devices.virtio import VirtioDevice
from pyvmm.devices.virtqueue import Buffers, Chain, QueueError, Virtqueue, fill, split, total
from pyvmm.disk import SECTOR, Disk

VIRTIO_ID_BLOCK = 2

VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_BLK_SIZE = 1 << 2, 1 << 5, 1 << 6
VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES = 1 << 9, 1 << 13, 1 << 14

VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID = 0, 1, 4, 8
VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES = 11, 13
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP = 0, 1, 2

QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2  # buffers of a request, without header and status
ID_BYTES = 20
MAX_RANGES = 32  # of one discard or write-zeroes request
MAX_RANGE_SECTORS = 1 << 17  # 64 MiB: where zeros must really be written, not too long a time

# capacity, seg_max, blk_size; for discard: sectors, ranges, alignment; for write zeroes: sectors,
# ranges, may_unmap.  What is between belongs to features that we have not.
_CONFIG = struct.Struct("<Q4xI4xI12x3I2IB3x")
_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_RANGE = struct.Struct("<QII")  # sector, sectors, flags

_BATCH_SECONDS = 0.001  # for how long an interrupt may wait for more requests to be done


class _Failed(Exception):
    """The request cannot be done: an I/O error."""


class _Unsupported(Exception):
    """The request is one that this device does not know."""


class VirtioBlk(VirtioDevice):
    """A block device on a Disk, which it closes."""

    device_id = VIRTIO_ID_BLOCK
    queue_sizes = (QUEUE_SIZE,)
    slow = True

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._sectors = disk.size // SECTOR
        self.features = VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH
        if disk.readonly:
            self.features |= VIRTIO_BLK_F_RO
        else:
            self.features |= VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
        limits = (MAX_RANGE_SECTORS, MAX_RANGES, 1)
        self.config = _CONFIG.pack(self._sectors, SEG_MAX, SECTOR, *limits, *limits)
        # Each is given sector, readable and writable data; returns how many bytes it has written.
        self._handlers: dict[int, Callable[[int, Buffers, Buffers], int]] = {
            VIRTIO_BLK_T_IN: self._read,
            VIRTIO_BLK_T_OUT: self._write,
            VIRTIO_BLK_T_FLUSH: self._flush,
            VIRTIO_BLK_T_GET_ID: self._get_id,
            VIRTIO_BLK_T_DISCARD: self._discard,
            VIRTIO_BLK_T_WRITE_ZEROES: self._write_zeroes,
        }

    def close(self) -> None:
        """Close the disk."""
        self._disk.close()

    def serve(self, number: int, queue: Virtqueue) -> None:
        """Do the requests; one interrupt for those that are done soon after each other."""
        due = time.monotonic() + _BATCH_SECONDS
        for chain in queue.chains():
            queue.push(chain, self._request(chain))
            now = time.monotonic()
            if now > due:
                queue.notify()
                due = now + _BATCH_SECONDS

    def _request(self, chain: Chain) -> int:
        """Do one; returns how many bytes were written, from the first on."""
        header, data_out = split(chain.readable, _HEADER.size)
        if total(header) < _HEADER.size or not chain.writable:
            raise QueueError("a request without a header or a status")
        *data_in, last = chain.writable
        if len(last) > 1:
            data_in.append(last[:-1])
        kind, _, sector = _HEADER.unpack(b"".join(header))
        written, result = 0, VIRTIO_BLK_S_OK
        try:
            written = self._handlers.get(kind, _unsupported)(sector, data_out, data_in)
        except (OSError, _Failed):
            result = VIRTIO_BLK_S_IOERR
        except _Unsupported:
            result = VIRTIO_BLK_S_UNSUPP
        last[-1] = result
        return written + 1 if written == total(data_in) else written

    # --- one function for each kind of request ---------------------------------------------------

    def _read(self, sector: int, data_out: Buffers, data_in: Buffers) -> int:
        size = total(data_in)
        self._disk.read(data_in, self._place(sector, size))
        return size

    def _write(self, sector: int, data_out: Buffers, data_in: Buffers) -> int:
        self._check_writable()
        self._disk.write(data_out, self._place(sector, total(data_out)))
        self._written()
        return 0

    def _flush(self, sector: int, data_out: Buffers, data_in: Buffers) -> int:
        self._disk.flush()
        return 0

    def _get_id(self, sector: int, data_out: Buffers, data_in: Buffers) -> int:
        """The file's name, as far as there is room."""
        name = os.path.basename(self._disk.path).encode("ascii", "replace")
        return fill(data_in, name[:ID_BYTES].ljust(ID_BYTES, b"\0"))

    def _discard(self, sector: int, data_out: Buffers, data_in: Buffers) -> int:
        for offset, size, flags in self._ranges(data_out):
            if flags:
                raise _Unsupported
            self._disk.discard(offset, size)
        self._written()
        return 0

    def _write_zeroes(self, sector: int, data_out: Buffers, data_in: Buffers) -> int:
        for offset, size, flags in self._ranges(data_out):
            if flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP:
                raise _Unsupported
            self._disk.write_zeros(offset, size, keep_room=not flags)
        self._written()
        return 0

    # --- what they share -------------------------------------------------------------------------

    def _place(self, sector: int, size: int) -> int:
        """The offset of `sector`, from which `size` bytes must be on the disk."""
        if size % SECTOR or sector + size // SECTOR > self._sectors:
            raise _Failed
        return sector * SECTOR

    def _ranges(self, data_out: Buffers) -> list[tuple[int, int, int]]:
        """Offset, size and flags of each range of a discard or a write-zeroes request."""
        self._check_writable()
        size = total(data_out)
        if not 0 < size <= MAX_RANGES * _RANGE.size or size % _RANGE.size:
            raise _Failed
        ranges = []
        for sector, sectors, flags in _RANGE.iter_unpack(b"".join(data_out)):
            if sectors > MAX_RANGE_SECTORS:
                raise _Failed
            ranges.append((self._place(sector, sectors * SECTOR), sectors * SECTOR, flags))
        return ranges

    def _check_writable(self) -> None:
        if self._disk.readonly:
            raise _Failed

    def _written(self) -> None:
        """After each change: a driver that will never flush relies on our having done it."""
        if not self.transport.has(VIRTIO_BLK_F_FLUSH):
            self._disk.flush()


def _unsupported(sector: int, data_out: Buffers, data_in: Buffers) -> int:
    raise _Unsupported

"""KVM's own statistics of a vCPU: exits by cause, counted by the kernel at no cost to the guest.

Source: api.rst, "KVM_GET_STATS_FD": a header, the object's id, descriptors, then the values.
"""

from __future__ import annotations

import ctypes
import os

from pyvmm import handles, kvm


class Statistic:
    """One number of one VM or vCPU, to be read often."""

    def __init__(self, handle: handles.Handle, name: str) -> None:
        """Raises KvmError where the kernel has no statistics (before 5.14), KeyError for a name
        that it does not know."""
        self._fd = handle.stats_fd()
        try:
            self._offset = _offsets(self._fd)[name]
        except KeyError:
            os.close(self._fd)
            raise

    def read(self) -> int:
        """The value now."""
        return int.from_bytes(os.pread(self._fd, 8, self._offset), "little")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def read(handle: handles.Handle) -> dict[str, int]:
    """The statistics of a VM or vCPU by name; histograms are left out.  Raises KvmError."""
    fd = handle.stats_fd()
    try:
        return {
            name: int.from_bytes(os.pread(fd, 8, offset), "little")
            for name, offset in _offsets(fd).items()
        }
    finally:
        os.close(fd)


def _offsets(fd: int) -> dict[str, int]:
    """Where in `fd` the value of each statistic is."""
    header = kvm.kvm_stats_header.from_buffer_copy(
        os.pread(fd, ctypes.sizeof(kvm.kvm_stats_header), 0)
    )
    stride = ctypes.sizeof(kvm.kvm_stats_desc) + header.name_size
    descriptors = os.pread(fd, stride * header.num_desc, header.desc_offset)
    offsets: dict[str, int] = {}
    for start in range(0, len(descriptors), stride):
        desc = kvm.kvm_stats_desc.from_buffer_copy(descriptors, start)
        if desc.size != 1:
            continue
        name_at = start + ctypes.sizeof(kvm.kvm_stats_desc)
        name = descriptors[name_at : start + stride].split(b"\0")[0].decode()
        offsets[name] = header.data_offset + desc.offset
    return offsets

"""KVM's own statistics of a vCPU: exits by cause, counted by the kernel at no cost to the guest.

Source: api.rst, "KVM_GET_STATS_FD": a header, the object's id, descriptors, then the values.
"""

from __future__ import annotations

import ctypes
import os

from pyvmm import kvm


def read(handle: kvm.Handle) -> dict[str, int]:
    """The statistics of a VM or vCPU by name; histograms are left out.  Raises KvmError."""
    fd = handle.stats_fd()
    try:
        header = kvm.kvm_stats_header.from_buffer_copy(
            os.pread(fd, ctypes.sizeof(kvm.kvm_stats_header), 0)
        )
        stride = ctypes.sizeof(kvm.kvm_stats_desc) + header.name_size
        descriptors = os.pread(fd, stride * header.num_desc, header.desc_offset)
        values: dict[str, int] = {}
        for start in range(0, len(descriptors), stride):
            desc = kvm.kvm_stats_desc.from_buffer_copy(descriptors, start)
            if desc.size != 1:
                continue
            name_at = start + ctypes.sizeof(kvm.kvm_stats_desc)
            name = descriptors[name_at : start + stride].split(b"\0")[0].decode()
            data = os.pread(fd, 8, header.data_offset + desc.offset)
            values[name] = int.from_bytes(data, "little")
        return values
    finally:
        os.close(fd)

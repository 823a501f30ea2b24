"""Coalesced port writes: the kernel collects them in a ring instead of leaving the guest for each.

The ring is one page, shared by all vCPUs of a VM and found at a fixed offset of any vCPU's map
(api.rst, KVM_REGISTER_COALESCED_MMIO).  The kernel moves `last`, we move `first`; when the ring is
full a write leaves the guest as usual.  Whoever handles an exit drains the ring first, so coalesced
output is never reordered against an exit; machine.py also drains it on a timer, for a guest that
prints and then computes.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import struct
import threading
from collections.abc import Callable

from pyvmm import kvm

_ENTRY = struct.Struct("<QIIB7x")  # struct kvm_coalesced_mmio; our zones take single bytes
_RING_OFFSET = kvm.KVM_COALESCED_MMIO_PAGE_OFFSET * mmap.PAGESIZE
_ENTRIES_OFFSET = _RING_OFFSET + ctypes.sizeof(kvm.kvm_coalesced_mmio_ring)
_CAPACITY = (mmap.PAGESIZE - ctypes.sizeof(kvm.kvm_coalesced_mmio_ring)) // _ENTRY.size


class CoalescedPorts:
    """The reader of the ring: `sinks` maps a port to what takes the bytes written to it."""

    def __init__(
        self, vm: kvm.VmHandle, map: mmap.mmap, sinks: dict[int, Callable[[bytes], None]]
    ) -> None:
        self._map, self._sinks = map, sinks
        self._lock = threading.Lock()  # one reader at a time: guards `first`
        self._ring = kvm.kvm_coalesced_mmio_ring.from_buffer(map, _RING_OFFSET)
        for port in sinks:
            vm.coalesce(port, 1, pio=True)

    def drain(self) -> None:
        """Hand everything in the ring to the sinks, in the order in which it was written."""
        ring = self._ring
        if ring.first == ring.last:
            return
        with self._lock:
            first, last = ring.first, ring.last
            entries = self._entries(first, last)
            ring.first = last
            # Sinks are called with the lock held: that is what keeps two drainers in order.
            for port, run in itertools.groupby(entries, key=lambda entry: entry[0]):
                self._sinks[port](bytes(value for _, _, _, value in run))

    def _entries(self, first: int, last: int) -> list[tuple[int, int, int, int]]:
        def between(start: int, end: int) -> list[tuple[int, int, int, int]]:
            data = self._map[
                _ENTRIES_OFFSET + start * _ENTRY.size : _ENTRIES_OFFSET + end * _ENTRY.size
            ]
            return list(_ENTRY.iter_unpack(data))

        if first <= last:
            return between(first, last)
        return between(first, _CAPACITY) + between(0, last)

    def close(self) -> None:
        """Let go of the map, which cannot be closed before."""
        del self._ring, self._map

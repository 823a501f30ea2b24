"""Coalesced port writes: the kernel collects them in a ring instead of leaving the guest for each.

The ring is one page, shared by all vCPUs of a VM and found at a fixed offset of any vCPU's map
(api.rst, KVM_REGISTER_COALESCED_MMIO).  The kernel moves `last`, we move `first`; when the ring is
full a write leaves the guest as usual.  Whoever handles an exit drains the ring first, so coalesced
output is never reordered against an exit; a Drainer also does so 50 times a second, for a guest
that prints and then computes.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import operator
import struct
import threading
from collections.abc import Callable

from pyvmm import handles, kvm

_ENTRY = struct.Struct("<QIIB7x")  # struct kvm_coalesced_mmio; our zones take single bytes
_VALUE_OFFSET = kvm.kvm_coalesced_mmio.data.offset
_RING_OFFSET = kvm.KVM_COALESCED_MMIO_PAGE_OFFSET * mmap.PAGESIZE
_ENTRIES_OFFSET = _RING_OFFSET + ctypes.sizeof(kvm.kvm_coalesced_mmio_ring)
_CAPACITY = (mmap.PAGESIZE - ctypes.sizeof(kvm.kvm_coalesced_mmio_ring)) // _ENTRY.size


_port = operator.itemgetter(0)


class CoalescedPorts:
    """The reader of the ring: `sinks` maps a port to what takes the bytes written to it."""

    def __init__(
        self, vm: handles.VmHandle, map: mmap.mmap, sinks: dict[int, Callable[[bytes], None]]
    ) -> None:
        self._map, self._sinks = map, sinks
        self._lock = threading.Lock()  # one reader at a time: guards `first`
        self._ring = kvm.kvm_coalesced_mmio_ring.from_buffer(map, _RING_OFFSET)
        self._vm = vm
        self._start_lock = threading.Lock()  # guards the next two; a leaf
        self._started = False
        self._excluded: set[int] = set()

    def start(self) -> None:
        """Let the kernel collect from now on; again: does nothing.  Raises KvmError.

        Not done at once: freeing a VM waits for the grace period that this begins in the kernel,
        15 ms that a guest which prints a line and ends would wait for nothing.
        """
        with self._start_lock:
            if not self._started:
                self._started = True
                for port in self._sinks.keys() - self._excluded:
                    self._vm.coalesce(port, 1, pio=True)

    def exclude(self, port: int) -> None:
        """From now on each write to `port` leaves the guest at once."""
        with self._start_lock:
            if port in self._sinks and port not in self._excluded:
                self._excluded.add(port)
                if self._started:
                    self._vm.coalesce(port, 1, pio=True, stop=True)

    def drain(self) -> None:
        """Hand everything in the ring to the sinks, in the order in which it was written."""
        ring = self._ring
        if ring.first == ring.last:
            return
        with self._lock:
            first, last = ring.first, ring.last
            # Sinks are called with the lock held, and `first` moves only when all is printed: so
            # whoever finds the ring empty knows that everything before its own exit is out.
            try:
                self._hand_out(self._entries(first, last))
            finally:
                ring.first = last

    def _entries(self, first: int, last: int) -> bytes:
        """The entries from `first` up to `last`, as they lie in memory."""

        def between(start: int, end: int) -> bytes:
            size = _ENTRY.size
            return self._map[_ENTRIES_OFFSET + start * size : _ENTRIES_OFFSET + end * size]

        if first <= last:
            return between(first, last)
        return between(first, _CAPACITY) + between(0, last)

    def _hand_out(self, entries: bytes) -> None:
        if not entries:  # somebody else has drained the ring while we waited for the lock
            return
        # A guest that prints much prints to one port: then no byte is looked at by itself.
        size, count = _ENTRY.size, len(entries) // _ENTRY.size
        low, high = entries[::size], entries[1::size]
        if low.count(low[0]) == count == high.count(high[0]):
            self._sinks[low[0] | high[0] << 8](entries[_VALUE_OFFSET::size])
            return
        for port, run in itertools.groupby(_ENTRY.iter_unpack(entries), key=_port):
            self._sinks[port](bytes(value for _, _, _, value in run))

    def close(self) -> None:
        """Let go of the map, which cannot be closed before."""
        del self._ring, self._map


class Drainer(threading.Thread):
    """Drains the ring for a guest that prints and then makes no exits for a while."""

    _SECONDS = 0.02

    def __init__(self, ports: CoalescedPorts, on_error: Callable[[Exception], None]) -> None:
        super().__init__(name="drain", daemon=True)
        self._ports, self._on_error = ports, on_error
        self._stopped = threading.Event()

    def run(self) -> None:
        """The thread's body."""
        try:
            while not self._stopped.wait(self._SECONDS):
                self._ports.start()
                self._ports.drain()
        except Exception as error:
            self._on_error(error)

    def stop(self, timeout: float) -> None:
        """End the thread; what it is printing is printed first."""
        self._stopped.set()
        self.join(timeout)

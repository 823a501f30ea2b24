"""A virtio entropy source: the host's random numbers for the guest.

The guest offers buffers, and they are filled.  The host's generator does not run dry, so nothing
limits how much a guest may ask for, only how much it gets at a time.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Entropy Device".
"""

from __future__ import annotations

import os

from pyvmm.devices.virtio import VirtioDevice
from pyvmm.devices.virtqueue import Virtqueue, fill, total

VIRTIO_ID_RNG = 4

MAX_BYTES = 4096  # of one chain; the driver is told how many it got


class VirtioRng(VirtioDevice):
    """An entropy source."""

    device_id = VIRTIO_ID_RNG
    queue_sizes = (16,)

    def serve(self, number: int, queue: Virtqueue) -> None:
        """Fill the buffers."""
        for chain in queue.chains():
            size = min(total(chain.writable), MAX_BYTES)
            queue.push(chain, fill(chain.writable, os.getrandom(size)))

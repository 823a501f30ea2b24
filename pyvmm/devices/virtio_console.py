"""A virtio console: a terminal for the guest, with a size (hvc0 in Linux).

Of its two queues the guest fills one with empty buffers, to be filled with input, and puts what it
prints into the other.  Output is printed on the thread of the vCPU that notifies us of it: Linux
spins until its buffer comes back, so another thread would only take longer, and a second processor.

Left out: several ports, and the emergency write.
Source: Virtual I/O Device (VIRTIO) Version 1.2, "Console Device".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from pyvmm.devices.virtio import VirtioDevice
from pyvmm.devices.virtqueue import Virtqueue, fill

VIRTIO_ID_CONSOLE = 3
VIRTIO_CONSOLE_F_SIZE = 1 << 0

RECEIVE, TRANSMIT = range(2)  # the queues

_CONFIG = struct.Struct("<HHI")  # columns, rows, ports (of a feature that we have not)
_INPUT_BYTES = 4096  # how much input may wait for the guest
_OUTPUT_BYTES = 1 << 16  # how much is printed at a time


class VirtioConsole(VirtioDevice):
    """A console that sends to `transmit` and receives what receive() is given."""

    device_id = VIRTIO_ID_CONSOLE
    features = VIRTIO_CONSOLE_F_SIZE
    queue_sizes = (16, 64)

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        on_room: Callable[[], None] = lambda: None,
        columns: int = 80,
        rows: int = 25,
    ) -> None:
        """`on_room` is called when input that was held up has gone."""
        self._transmit, self._on_room = transmit, on_room
        self.config = _CONFIG.pack(columns, rows, 0)
        self._lock = threading.Lock()  # a leaf: guards the input
        self._input = bytearray()

    def begin(self) -> None:
        """Linux reads the size only when it is told that it has changed."""
        self.transport.change_config(self.config)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest that its terminal has another size now."""
        self.transport.change_config(_CONFIG.pack(columns, rows, 0))

    def receive(self, data: bytes) -> int:
        """Let the guest receive `data`; returns how many bytes were taken: all that had room()."""
        with self._lock:
            taken = data[: self.room()]
            self._input += taken
        self.transport.serve(RECEIVE)
        return len(taken)

    def room(self) -> int:
        """How many more bytes should be given to receive() now."""
        return _INPUT_BYTES - len(self._input)

    def reset(self) -> None:
        """Forget input that was not read."""
        with self._lock:
            self._input.clear()
        self._on_room()

    def serve(self, number: int, queue: Virtqueue) -> None:
        """Print what the guest has sent, or give it what was typed."""
        if number == TRANSMIT:
            self._print(queue)
        else:
            self._deliver(queue)

    def _print(self, queue: Virtqueue) -> None:
        for chain in queue.chains():
            for buffer in chain.readable:
                for start in range(0, len(buffer), _OUTPUT_BYTES):
                    self._transmit(bytes(buffer[start : start + _OUTPUT_BYTES]))
            queue.push(chain, 0)

    def _deliver(self, queue: Virtqueue) -> None:
        was_full = not self.room()
        while self._input and (chain := queue.next_chain()):
            with self._lock:
                written = fill(chain.writable, self._input)
                del self._input[:written]
            queue.push(chain, written)
        if was_full and self.room():
            self._on_room()

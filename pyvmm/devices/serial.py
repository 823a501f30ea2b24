"""COM1: a 16550 UART, polled.

Enough for a driver that probes the chip, sets a baud rate, waits for "transmitter empty" and for
"data ready".  A transmitted byte is out at once, so the transmitter is always empty.  Interrupts
are not raised (yet): IER and MCR keep what is written.
Source: National Semiconductor PC16550D data sheet, "Registers".
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pyvmm.devices.bytewise import BytewiseDevice

COM1_PORT = 0x3F8

# Register offsets; 0 and 1 are the divisor latch while LCR bit 7 (DLAB) is set.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCRATCH = range(8)

LCR_DLAB = 0x80
LSR_DATA_READY = 0x01
LSR_OVERRUN = 0x02
LSR_TRANSMITTER_EMPTY = 0x60  # holding register and shift register
IIR_NONE_PENDING = 0x01
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 0x01, 0x02
MCR_LOOPBACK = 0x10
MSR_READY = 0xB0  # carrier, data set ready, clear to send

FIFO_BYTES = 16


class Serial(BytewiseDevice):
    """A UART that sends to `transmit` and receives what receive() is given."""

    size = 8

    def __init__(
        self, transmit: Callable[[bytes], None], on_room: Callable[[], None] = lambda: None
    ) -> None:
        """`on_room` is called when a full receiver FIFO can take more."""
        self._transmit, self._on_room = transmit, on_room
        self._lock = threading.Lock()  # guards all below
        self._received: deque[int] = deque()
        self._divisor = 1  # 115200 baud
        self._fifo = 0
        self._registers = {IER: 0, LCR: 0x03, MCR: 0, SCRATCH: 0}

    def receive(self, data: bytes) -> int:
        """Let the guest receive `data`; returns how many bytes found room in the FIFO."""
        with self._lock:
            taken = data[: FIFO_BYTES - len(self._received)]
            self._received.extend(taken)
            return len(taken)

    def room(self) -> int:
        """How many more bytes receive() would take now."""
        return FIFO_BYTES - len(self._received)

    def read_byte(self, offset: int) -> int:
        """A register of the UART."""
        with self._lock:
            was_full = len(self._received) == FIFO_BYTES
            value = self._read_register(offset)
            room_again = was_full and len(self._received) < FIFO_BYTES
        if room_again:
            self._on_room()
        return value

    def _read_register(self, offset: int) -> int:
        if self._registers[LCR] & LCR_DLAB and offset in (DATA, IER):
            return self._divisor >> 8 * offset & 0xFF
        if offset == DATA:
            return self._received.popleft() if self._received else 0
        if offset == IIR_FCR:
            return IIR_NONE_PENDING | (IIR_FIFO_ENABLED if self._fifo & FCR_ENABLE else 0)
        if offset == LSR:
            return LSR_TRANSMITTER_EMPTY | (LSR_DATA_READY if self._received else 0)
        if offset == MSR:
            return self._modem_status()
        return self._registers[offset]

    def _modem_status(self) -> int:
        mcr = self._registers[MCR]
        if not mcr & MCR_LOOPBACK:
            return MSR_READY
        # In loopback the four outputs appear at the four inputs: DTR, RTS, OUT1, OUT2.
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def write_byte(self, offset: int, value: int) -> None:
        """A register of the UART."""
        sent = b""
        with self._lock:
            if self._registers[LCR] & LCR_DLAB and offset in (DATA, IER):
                kept = self._divisor & (0xFF00 if offset == DATA else 0x00FF)
                self._divisor = kept | value << 8 * offset
            elif offset == DATA:
                if self._registers[MCR] & MCR_LOOPBACK:
                    self._received.append(value)
                    while len(self._received) > FIFO_BYTES:
                        self._received.pop()
                else:
                    sent = bytes((value,))
            elif offset == IIR_FCR:
                self._fifo = value
                if value & FCR_CLEAR_RECEIVER:
                    self._received.clear()
            elif offset in self._registers:
                self._registers[offset] = value & 0x0F if offset == IER else value
        if sent:
            self._transmit(sent)  # outside of the lock: a full pipe must not stop other vCPUs

    def write_many(self, data: bytes) -> None:
        """Bytes that were written to the data register one after the other."""
        with self._lock:
            plain = not (self._registers[LCR] & LCR_DLAB or self._registers[MCR] & MCR_LOOPBACK)
        if plain:
            self._transmit(data)
        else:
            for value in data:
                self.write_byte(DATA, value)

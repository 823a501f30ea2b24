"""COM1: a 16550A UART with FIFOs and interrupts.

A transmitted byte is out at once, so the transmitter is always empty, and its interrupt is pending
again after each byte.  The line has no noise: of the errors there is only overrun, and that only
in loopback, because input waits until there is room for it.  Baud rate and framing are kept, and
have no effect.

On a PC the interrupt goes through a gate that MCR's OUT2 opens.  Here, as in QEMU, it is always
open: kernels that were tried in QEMU only, xv6 among them, forget to open it.
Source: National Semiconductor PC16550D data sheet, "Registers".
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pyvmm.devices.bytewise import BytewiseDevice

COM1_PORT = 0x3F8
COM1_IRQ = 4

# Register offsets; 0 and 1 are the divisor latch while LCR bit 7 (DLAB) is set.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCRATCH = range(8)

IER_RECEIVED, IER_TRANSMITTER, IER_LINE, IER_MODEM = 0x01, 0x02, 0x04, 0x08
# The sources of an interrupt.  The timeout is for input that stays below the trigger level.
IIR_MODEM, IIR_NONE, IIR_TRANSMITTER, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT = 0, 1, 2, 4, 6, 0x0C
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 0x01, 0x02
TRIGGER_BYTES = 1, 4, 8, 14  # chosen by FCR's bits 6 and 7
LCR_DLAB = 0x80
MCR_LOOPBACK = 0x10
IER_BITS, MCR_BITS = 0x0F, 0x1F  # those that a 16550 has
LSR_DATA_READY, LSR_OVERRUN = 0x01, 0x02
LSR_TRANSMITTER_EMPTY = 0x60  # holding register and shift register
MSR_READY = 0xB0  # carrier, data set ready, clear to send
MSR_RING = 0x40

FIFO_BYTES = 16


class Serial(BytewiseDevice):
    """A UART that sends to `transmit` and receives what receive() is given.

    `on_transmit_interrupt` may be replaced.  It is called with True when the driver begins to wait
    for transmitter interrupts and with False when it stops: meanwhile each byte should come here
    at once, because it leads to the next interrupt.
    """

    size = 8

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        on_room: Callable[[], None] = lambda: None,
        irq: Callable[[bool], None] = lambda level: None,
    ) -> None:
        """`on_room` is called when a full receiver can take more; `irq` sets the interrupt line."""
        self._transmit, self._on_room, self._irq = transmit, on_room, irq
        self.on_transmit_interrupt: Callable[[bool], None] = lambda wanted: None
        self._lock = threading.Lock()  # guards all below
        self._irq_level = False
        self._power_on()

    def _power_on(self) -> None:
        self._received: deque[int] = deque()  # one byte, or the FIFO's 16
        self._held_back: deque[int] = deque()  # input, while the receiver is in loopback
        self._errors = 0  # as in LSR
        self._transmitter_pending = False  # the interrupt "transmitter empty"
        self._modem_changes = 0  # as in MSR
        self._divisor = 1  # 115200 baud
        self._fifo = 0  # what FCR was set to; 0: the FIFOs are off
        self._registers = {IER: 0, LCR: 0x03, MCR: 0, SCRATCH: 0}

    def reset(self) -> None:
        """Back to the state at power-on; input that was not read is forgotten."""
        with self._lock:
            wanted = self._registers[IER] & IER_TRANSMITTER
            self._power_on()
            self._update_irq()
        if wanted:
            self.on_transmit_interrupt(False)
        self._on_room()

    def receive(self, data: bytes) -> int:
        """Let the guest receive `data`; returns how many bytes were taken: all that had room()."""
        with self._lock:
            queue = self._held_back if self._registers[MCR] & MCR_LOOPBACK else self._received
            taken = data[: FIFO_BYTES - len(queue)]
            queue.extend(taken)
            self._update_irq()
            return len(taken)

    def room(self) -> int:
        """How many more bytes should be given to receive() now."""
        if self._registers[MCR] & MCR_LOOPBACK:
            return 0
        return max(0, (FIFO_BYTES if self._fifo else 1) - len(self._received))

    def read_byte(self, offset: int) -> int:
        """A register of the UART."""
        if offset == DATA:
            return self._read_data()
        with self._lock:
            value = self._read_register(offset)
            self._update_irq()
        return value

    def _read_data(self) -> int:
        with self._lock:
            if self._registers[LCR] & LCR_DLAB:
                return self._divisor & 0xFF
            if not self._received:
                return 0
            was_full = not self.room()
            value = self._received.popleft()
            if not self._fifo:
                self._set_irq(False)  # each byte is an interrupt, even if the next is here already
            self._update_irq()
            room_again = was_full and self.room() > 0
        if room_again:
            self._on_room()
        return value

    def _read_register(self, offset: int) -> int:
        if offset == IER and self._registers[LCR] & LCR_DLAB:
            return self._divisor >> 8
        if offset == IIR_FCR:
            source = self._interrupt_source()
            if source == IIR_TRANSMITTER:
                self._transmitter_pending = False
            return source | (IIR_FIFO_ENABLED if self._fifo else 0)
        if offset == LSR:
            errors, self._errors = self._errors, 0
            return LSR_TRANSMITTER_EMPTY | errors | (LSR_DATA_READY if self._received else 0)
        if offset == MSR:
            changes, self._modem_changes = self._modem_changes, 0
            return self._modem_lines() | changes
        return self._registers[offset]

    def _modem_lines(self) -> int:
        mcr = self._registers[MCR]
        if not mcr & MCR_LOOPBACK:
            return MSR_READY
        # In loopback the four outputs appear at the four inputs: DTR, RTS, OUT1, OUT2.
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def write_byte(self, offset: int, value: int) -> None:
        """A register of the UART."""
        if offset == DATA:
            self.write_many(bytes((value,)))
            return
        with self._lock:
            was_full, wanted_before = not self.room(), self._registers[IER] & IER_TRANSMITTER
            self._write_register(offset, value)
            self._update_irq()
            room_again = was_full and self.room() > 0
            wanted = self._registers[IER] & IER_TRANSMITTER
        if room_again:
            self._on_room()
        if wanted != wanted_before:
            self.on_transmit_interrupt(wanted != 0)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == IER and self._registers[LCR] & LCR_DLAB:
            self._divisor = self._divisor & 0x00FF | value << 8
        elif offset == IER:
            if value & ~self._registers[IER] & IER_TRANSMITTER:
                self._transmitter_pending = True
            self._registers[IER] = value & IER_BITS
        elif offset == IIR_FCR:
            self._write_fifo_control(value)
        elif offset == MCR:
            self._write_modem_control(value & MCR_BITS)
        elif offset in self._registers:
            self._registers[offset] = value

    def _write_fifo_control(self, value: int) -> None:
        if not value & FCR_ENABLE:
            value = 0  # the other bits count only together with this one
        if value & FCR_CLEAR_RECEIVER or (self._fifo and not value):
            self._received.clear()
        self._fifo = value

    def _write_modem_control(self, value: int) -> None:
        lines_before, before = self._modem_lines(), self._registers[MCR]
        self._registers[MCR] = value
        # Of the ring indicator only the end is reported.
        changed = (lines_before ^ self._modem_lines()) & ~(self._modem_lines() & MSR_RING)
        self._modem_changes |= changed >> 4
        # A guest that tests its UART expects to read what it has sent, and not the user's input.
        if value & ~before & MCR_LOOPBACK:
            self._held_back, self._received = self._received, deque()
        elif before & ~value & MCR_LOOPBACK:
            self._received = deque([*self._received, *self._held_back][:FIFO_BYTES])
            self._held_back = deque()

    def write_many(self, data: bytes) -> None:
        """Bytes that were written to the data register one after the other."""
        with self._lock:
            if self._registers[LCR] & LCR_DLAB:
                for value in data:
                    self._divisor = self._divisor & 0xFF00 | value
                return
            self._transmitter_pending = False
            self._update_irq()
            enabled = self._registers[IER]
            looped = self._registers[MCR] & MCR_LOOPBACK
            if looped:
                self._receive_own(data)
        if not looped:
            self._transmit(data)  # outside of the lock: a full pipe must not stop other vCPUs
        if enabled:
            with self._lock:
                self._transmitter_pending = True
                self._update_irq()

    def _receive_own(self, data: bytes) -> None:
        for value in data:
            if len(self._received) >= (FIFO_BYTES if self._fifo else 1):
                self._errors = LSR_OVERRUN
                if self._fifo:
                    continue  # a full FIFO keeps what it has
                self._received.clear()
            self._received.append(value)

    def _interrupt_source(self) -> int:
        """The enabled source of highest priority that is pending, as IIR has it."""
        enabled = self._registers[IER]
        if enabled & IER_LINE and self._errors:
            return IIR_LINE
        if enabled & IER_RECEIVED and self._received:
            enough = len(self._received) >= TRIGGER_BYTES[self._fifo >> 6]
            return IIR_RECEIVED if enough else IIR_TIMEOUT
        if enabled & IER_TRANSMITTER and self._transmitter_pending:
            return IIR_TRANSMITTER
        if enabled & IER_MODEM and self._modem_changes:
            return IIR_MODEM
        return IIR_NONE

    def _update_irq(self) -> None:
        self._set_irq(self._interrupt_source() != IIR_NONE)

    def _set_irq(self, level: bool) -> None:
        if level != self._irq_level:
            self._irq_level = level
            self._irq(level)

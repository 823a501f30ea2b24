"""COM1, as real drivers find and use it.

The probes follow what Linux's 8250 driver does to a port (drivers/tty/serial/8250/8250_port.c,
autoconfig() and autoconfig_16550a()), written down here as reads and writes.
"""

from __future__ import annotations

import threading

import pytest

from pyvmm.devices.serial import (
    DATA,
    FIFO_BYTES,
    IER,
    IER_LINE,
    IER_MODEM,
    IER_RECEIVED,
    IER_TRANSMITTER,
    IIR_FCR,
    IIR_FIFO_ENABLED,
    IIR_LINE,
    IIR_MODEM,
    IIR_NONE,
    IIR_RECEIVED,
    IIR_TIMEOUT,
    IIR_TRANSMITTER,
    LCR,
    LSR,
    LSR_DATA_READY,
    LSR_OVERRUN,
    LSR_TRANSMITTER_EMPTY,
    MCR,
    MSR,
    SCRATCH,
    Serial,
)

FIFO_ON, FIFO_OFF = 0x01, 0x00


class Port:
    """A UART and what it did, with byte accesses as a driver makes them."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.line = False  # the interrupt line
        self.edges = 0  # how often the line rose: what an edge-triggered controller sees
        self.rooms = 0  # how often the UART said that it has room again
        self.waits: list[bool] = []  # what it said about transmitter interrupts
        self.uart = Serial(self.sent.extend, self._count_room, self._set_line)
        self.uart.on_transmit_interrupt = self.waits.append

    def _count_room(self) -> None:
        self.rooms += 1

    def _set_line(self, level: bool) -> None:
        assert level != self.line
        self.line = level
        self.edges += level

    def source(self) -> int:
        """IIR without the FIFO bits."""
        return self.read(IIR_FCR) & 0x0F

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)


@pytest.fixture
def port() -> Port:
    return Port()


# --- sending and receiving -----------------------------------------------------------------------


def test_a_byte_that_is_sent_is_out_at_once(port: Port) -> None:
    for byte in b"hi\0\xff":
        assert port.read(LSR) & LSR_TRANSMITTER_EMPTY == LSR_TRANSMITTER_EMPTY
        port.write(DATA, byte)
    assert port.sent == b"hi\0\xff"


def test_bytes_that_come_together_are_sent_together(port: Port) -> None:
    port.uart.write_many(b"a whole line\n")
    assert port.sent == b"a whole line\n"


def test_without_input_there_is_no_data_ready_and_data_reads_zero(port: Port) -> None:
    assert port.read(LSR) & LSR_DATA_READY == 0
    assert port.read(DATA) == 0


def test_input_is_read_in_order_while_data_is_ready(port: Port) -> None:
    port.uart.receive(b"abc")
    got = bytearray()
    while port.read(LSR) & LSR_DATA_READY:
        got.append(port.read(DATA))
    assert got == b"abc"


def test_the_fifo_takes_sixteen_bytes_and_says_how_many_it_took(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    assert port.uart.room() == FIFO_BYTES == 16
    assert port.uart.receive(b"0123456789") == 10
    assert port.uart.room() == 6
    assert port.uart.receive(b"abcdefghij") == 6
    assert port.uart.receive(b"x") == 0
    assert bytes(port.read(DATA) for _ in range(16)) == b"0123456789abcdef"
    assert port.read(LSR) & LSR_DATA_READY == 0
    assert port.uart.room() == 16


def test_clearing_the_receiver_forgets_input(port: Port) -> None:
    port.uart.receive(b"old")
    port.write(IIR_FCR, 0x03)  # enable, clear receiver
    assert port.read(LSR) & LSR_DATA_READY == 0
    port.uart.receive(b"n")
    assert port.read(DATA) == ord("n")


def test_clearing_the_transmitter_keeps_input(port: Port) -> None:
    port.uart.receive(b"x")
    port.write(IIR_FCR, 0x05)
    assert port.read(DATA) == ord("x")


def test_an_access_of_two_bytes_reaches_two_registers(port: Port) -> None:
    port.write(LCR, 0x83)
    port.uart.write(DATA, 2, 0x000C)  # the divisor in one go, as some firmware does
    assert (port.read(DATA), port.read(IER)) == (0x0C, 0x00)
    assert port.uart.read(DATA, 2) == 0x000C


def test_an_access_over_the_end_reads_all_ones_there(port: Port) -> None:
    port.write(SCRATCH, 0x5A)
    assert port.uart.read(SCRATCH, 2) == 0xFF5A
    port.uart.write(SCRATCH, 4, 0x11223344)
    assert port.read(SCRATCH) == 0x44


def test_senders_and_receivers_in_many_threads_lose_nothing() -> None:
    port = Port()

    def send(byte: int) -> None:
        for _ in range(500):
            port.write(DATA, byte)
            port.read(LSR)

    threads = [threading.Thread(target=send, args=(byte,)) for byte in b"abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(port.sent) == sorted(b"abcd" * 500)


# --- the receiver, with and without its FIFO ---------------------------------------------------


def test_without_the_fifo_there_is_room_for_one_byte(port: Port) -> None:
    assert port.uart.room() == 1
    port.uart.receive(b"a")
    assert port.uart.room() == 0
    assert port.read(DATA) == ord("a")
    assert port.uart.room() == 1


def test_input_that_had_room_is_not_lost_when_the_fifo_was_off_all_the_time(port: Port) -> None:
    # The terminal's thread asked for room while the guest had its FIFO on for a moment.
    assert port.uart.receive(b"0123456789abcdefg") == 16
    assert port.uart.room() == 0
    assert bytes(port.read(DATA) for _ in range(17)) == b"0123456789abcdef\0"


def test_switching_the_fifo_off_forgets_what_was_in_it(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    port.uart.receive(b"abc")
    port.write(IIR_FCR, FIFO_OFF)
    assert port.read(LSR) & LSR_DATA_READY == 0
    assert port.uart.room() == 1


def test_a_fifo_that_is_off_cannot_be_cleared(port: Port) -> None:
    port.uart.receive(b"a")
    port.write(IIR_FCR, 0xC6)  # without the enable bit the others mean nothing
    assert port.read(DATA) == ord("a")
    assert port.source() == IIR_NONE


def test_who_waits_for_room_is_told_when_a_byte_was_read(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    port.uart.receive(bytes(16))
    port.rooms = 0
    for _ in range(16):
        port.read(LSR)
        port.read(DATA)
    assert port.rooms == 1


@pytest.mark.parametrize(
    "offset_value",
    [(IIR_FCR, 0x03), (IIR_FCR, FIFO_OFF), (MCR, 0x00)],
    ids=["FIFO cleared", "FIFO off", "out of loopback"],
)
def test_who_waits_for_room_is_told_when_there_is_some(
    port: Port, offset_value: tuple[int, int]
) -> None:
    port.write(IIR_FCR, FIFO_ON)
    if offset_value[0] == MCR:
        port.write(MCR, 0x10)
    else:
        port.uart.receive(bytes(16))
    assert port.uart.room() == 0
    port.rooms = 0
    port.write(*offset_value)
    assert port.uart.room() > 0
    assert port.rooms == 1


def test_an_overrun_of_the_holding_register_replaces_the_byte(port: Port) -> None:
    port.write(MCR, 0x10)
    port.uart.write_many(b"abc")
    assert port.read(LSR) & 0x0F == LSR_DATA_READY | LSR_OVERRUN
    assert port.read(LSR) & 0x0F == LSR_DATA_READY  # reading cleared the error
    assert bytes(port.read(DATA) for _ in range(2)) == b"c\0"


def test_an_overrun_of_the_fifo_loses_the_new_byte(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    port.write(MCR, 0x10)
    port.uart.write_many(b"0123456789abcdef")
    assert port.read(LSR) & LSR_OVERRUN == 0
    port.write(DATA, ord("x"))
    assert port.read(LSR) & LSR_OVERRUN
    assert port.read(LSR) & LSR_OVERRUN == 0
    assert bytes(port.read(DATA) for _ in range(17)) == b"0123456789abcdef\0"


def test_input_waits_while_the_guest_tests_its_uart_in_loopback(port: Port) -> None:
    port.write(IIR_FCR, 0xC7)
    port.uart.receive(b"typed")
    port.write(MCR, 0x1E)  # the loopback test of OSDev's wiki
    assert port.uart.room() == 0
    assert port.uart.receive(b" before") == 7  # there was room a moment ago
    port.write(DATA, 0xAE)
    assert port.read(DATA) == 0xAE
    assert port.read(LSR) & LSR_DATA_READY == 0
    port.write(MCR, 0x0F)
    assert bytes(port.read(DATA) for _ in range(12)) == b"typed before"


def test_what_was_sent_in_loopback_can_be_read_after_it(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    port.uart.receive(b"input")
    port.write(MCR, 0x10)
    port.uart.write_many(b"own ")
    port.write(MCR, 0x00)
    assert bytes(port.read(DATA) for _ in range(9)) == b"own input"


def test_going_in_and_out_of_loopback_heaps_nothing_up(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    for _ in range(10):
        port.uart.receive(bytes(100))
        port.write(MCR, 0x10)
        port.uart.receive(bytes(100))
        port.uart.write_many(bytes(100))
        port.write(MCR, 0x00)
    left = 0
    while port.read(LSR) & LSR_DATA_READY:
        port.read(DATA)
        left += 1
    assert left == FIFO_BYTES


# --- interrupts ----------------------------------------------------------------------------------

ALL = IER_RECEIVED | IER_TRANSMITTER | IER_LINE | IER_MODEM


def make_everything_pending(port: Port) -> None:
    port.write(IIR_FCR, 0x41)  # trigger level 4
    port.write(MCR, 0x10)
    port.uart.write_many(bytes(17))


@pytest.mark.parametrize(
    ("enabled", "source"),
    [
        (ALL, IIR_LINE),
        (ALL & ~IER_LINE, IIR_RECEIVED),
        (IER_TRANSMITTER | IER_MODEM, IIR_TRANSMITTER),
        (IER_MODEM, IIR_MODEM),
        (IER_LINE, IIR_LINE),
        (0, IIR_NONE),
    ],
)
def test_of_the_enabled_sources_the_most_urgent_is_reported(
    port: Port, enabled: int, source: int
) -> None:
    make_everything_pending(port)
    port.write(IER, enabled)
    assert port.read(IIR_FCR) == source | IIR_FIFO_ENABLED
    if source != IIR_TRANSMITTER:  # which is cleared by being reported
        assert port.line == (source != IIR_NONE)


def test_each_source_is_cleared_by_its_own_register_and_the_next_one_appears(port: Port) -> None:
    make_everything_pending(port)
    port.write(IER, ALL)
    seen = [port.source()]
    port.read(LSR)
    seen.append(port.source())
    for _ in range(13):
        port.read(DATA)
    seen.append(port.source())  # three bytes are below the trigger level
    for _ in range(3):
        port.read(DATA)
    seen += [port.source(), port.source()]
    port.read(MSR)
    seen.append(port.source())
    assert seen == [IIR_LINE, IIR_RECEIVED, IIR_TIMEOUT, IIR_TRANSMITTER, IIR_MODEM, IIR_NONE]
    assert not port.line
    assert port.edges == 1  # it was high all the time


def test_a_masked_source_stays_pending(port: Port) -> None:
    port.write(IER, IER_RECEIVED)
    port.uart.receive(b"x")
    assert port.line
    port.write(IER, 0)
    assert not port.line
    assert port.source() == IIR_NONE
    port.write(IER, IER_RECEIVED)
    assert port.line


@pytest.mark.parametrize(
    ("fifo_control", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14), (0xC0, 1)]
)
def test_below_the_trigger_level_input_counts_as_timed_out(
    port: Port, fifo_control: int, trigger: int
) -> None:
    port.write(IIR_FCR, fifo_control)
    port.write(IER, IER_RECEIVED)
    for count in range(1, 17):
        port.uart.receive(b"x")
        assert port.line
        assert port.source() == (IIR_RECEIVED if count >= trigger else IIR_TIMEOUT)


def test_without_the_fifo_each_byte_is_an_interrupt_of_its_own(port: Port) -> None:
    port.write(IER, IER_RECEIVED)
    port.uart.receive(b"abc")
    got = bytearray()
    while port.edges > len(got):  # a handler that reads one byte
        got.append(port.read(DATA))
    assert got == b"abc"
    assert not port.line


def test_the_transmitter_interrupts_at_once_when_that_is_enabled(port: Port) -> None:
    port.write(IER, IER_TRANSMITTER)
    assert port.line
    assert port.source() == IIR_TRANSMITTER
    assert not port.line  # reading IIR has cleared it
    assert port.source() == IIR_NONE
    port.write(IER, IER_TRANSMITTER | IER_RECEIVED)  # was enabled already: nothing new
    assert port.source() == IIR_NONE
    port.write(IER, 0)
    port.write(IER, IER_TRANSMITTER)
    assert port.source() == IIR_TRANSMITTER


def test_iir_does_not_clear_the_transmitter_s_interrupt_when_it_reports_another(port: Port) -> None:
    port.write(IER, IER_TRANSMITTER | IER_RECEIVED)
    port.uart.receive(b"x")
    assert port.source() == IIR_RECEIVED
    port.read(DATA)
    assert port.source() == IIR_TRANSMITTER


@pytest.mark.parametrize("reads_iir", [True, False])
def test_each_sent_byte_is_followed_by_an_interrupt(port: Port, reads_iir: bool) -> None:
    """A driver that sends a byte in each interrupt, whether or not it asks why it was called."""
    text = bytearray(b"one at a time")
    port.write(IER, IER_TRANSMITTER)
    handled = 0
    while port.edges > handled:
        handled += 1
        if reads_iir:
            assert port.source() == IIR_TRANSMITTER
        if text:
            port.write(DATA, text.pop(0))
        else:
            port.write(IER, 0)
    assert port.sent == b"one at a time"
    assert handled == len(port.sent) + 1


def test_bytes_that_come_together_are_followed_by_one_interrupt(port: Port) -> None:
    port.write(IER, IER_TRANSMITTER)
    port.source()
    port.edges = 0
    port.uart.write_many(b"coalesced")
    assert port.edges == 1
    assert port.source() == IIR_TRANSMITTER


def test_the_byte_is_out_before_the_interrupt_says_so() -> None:
    events: list[object] = []
    uart = Serial(events.append, irq=events.append)
    uart.write(IER, 1, IER_TRANSMITTER)
    uart.read(IIR_FCR, 1)
    uart.write(DATA, 1, ord("x"))
    assert events == [True, False, b"x", True]


def test_while_a_driver_waits_for_transmitter_interrupts_it_is_said_so(port: Port) -> None:
    for value in (IER_RECEIVED, IER_RECEIVED | IER_TRANSMITTER, IER_TRANSMITTER, 0, 0):
        port.write(IER, value)
    assert port.waits == [True, False]
    port.write(LCR, 0x80)
    port.write(IER, IER_TRANSMITTER)  # half of a divisor
    assert port.waits == [True, False]


def test_callbacks_may_use_the_uart() -> None:
    # Switching coalesced output off hands over what was collected, and that is for this UART.
    sent = bytearray()

    def type_more() -> None:
        uart.receive(b"y")

    uart = Serial(sent.extend, on_room=type_more)
    uart.on_transmit_interrupt = lambda wanted: uart.write_many(b"late")
    uart.receive(b"x")
    uart.read(DATA, 1)
    uart.write(IER, 1, IER_TRANSMITTER)
    assert sent == b"late"
    assert uart.read(DATA, 1) == ord("y")


@pytest.mark.parametrize("modem_control", [0x00, 0x08, 0x10, 0x18])
def test_interrupts_arrive_whatever_the_modem_outputs_are(port: Port, modem_control: int) -> None:
    # On a PC OUT2 is a gate.  QEMU has none, and xv6, for example, never opens it.
    port.write(MCR, modem_control)
    port.read(MSR)
    port.write(IER, IER_TRANSMITTER)
    assert port.line


def test_in_loopback_what_is_sent_makes_interrupts_too(port: Port) -> None:
    port.write(MCR, 0x10)
    port.read(MSR)
    port.write(IER, IER_RECEIVED | IER_LINE)
    assert not port.line
    port.write(DATA, 1)
    assert port.source() == IIR_RECEIVED
    port.write(DATA, 2)
    assert port.source() == IIR_LINE
    port.read(LSR)
    port.read(DATA)
    assert not port.line


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (0x10, 0x11, 0x02),  # DTR is seen as "data set ready"
        (0x11, 0x10, 0x02),
        (0x10, 0x12, 0x01),  # RTS as "clear to send"
        (0x10, 0x14, 0x00),  # OUT1 as the ring indicator, of which the beginning is not reported
        (0x14, 0x10, 0x04),  # but the end
        (0x10, 0x18, 0x08),  # OUT2 as carrier
        (0x15, 0x1A, 0x0F),
        (0x1F, 0x1F, 0x00),
        (0x00, 0x10, 0x0B),  # carrier, data set ready and clear to send go away
        (0x00, 0x0F, 0x00),  # nobody is there to see our outputs
    ],
)
def test_changed_modem_lines_are_reported_once(
    port: Port, before: int, after: int, changes: int
) -> None:
    port.write(MCR, before)
    port.read(MSR)
    port.write(IER, IER_MODEM)
    assert not port.line
    port.write(MCR, after)
    assert port.line == (changes != 0)
    assert port.read(MSR) & 0x0F == changes
    assert port.read(MSR) & 0x0F == 0
    assert not port.line


def test_a_reset_of_a_polled_port_says_nothing_about_interrupts(port: Port) -> None:
    port.write(IER, IER_RECEIVED)
    port.uart.reset()
    assert port.waits == []
    assert port.edges == 0


def test_after_a_reset_it_is_as_new(port: Port) -> None:
    make_everything_pending(port)
    port.write(IER, ALL)
    port.write(LCR, 0x9B)
    port.write(SCRATCH, 0x5A)
    port.uart.reset()
    assert not port.line
    assert port.waits == [True, False]
    assert port.uart.room() == 1
    assert [port.read(offset) for offset in range(8)] == [0, 0, 0x01, 0x03, 0, 0x60, 0xB0, 0]


# --- the divisor latch ---------------------------------------------------------------------------


def test_the_divisor_is_behind_dlab_and_nothing_is_sent_meanwhile(port: Port) -> None:
    port.write(IER, 0x05)
    port.write(LCR, 0x83)
    port.write(DATA, 0x34)
    port.write(IER, 0x12)
    assert (port.read(DATA), port.read(IER)) == (0x34, 0x12)
    port.write(LCR, 0x03)
    assert port.sent == b""
    assert port.read(IER) == 0x05
    assert port.read(LCR) == 0x03


def test_reading_the_divisor_takes_no_input(port: Port) -> None:
    port.uart.receive(b"x")
    port.write(LCR, 0x80)
    port.read(DATA)
    port.write(LCR, 0x03)
    assert port.read(DATA) == ord("x")


def test_coalesced_bytes_that_are_a_divisor_are_not_sent(port: Port) -> None:
    # The kernel collects writes to port 0 of the UART without knowing about DLAB.
    port.write(LCR, 0x83)
    port.uart.write_many(b"\x01\x0c")
    assert port.sent == b""
    assert port.read(DATA) == 0x0C
    port.write(LCR, 0x03)
    port.uart.write_many(b"x")
    assert port.sent == b"x"


# --- probes of real drivers ----------------------------------------------------------------------


def test_a_driver_that_asks_for_the_scratch_register_finds_it(port: Port) -> None:
    for value in (0xA5, 0x5A, 0x00, 0xFF):
        port.write(SCRATCH, value)
        assert port.read(SCRATCH) == value


def test_ier_keeps_the_four_bits_that_a_16550_has(port: Port) -> None:
    port.write(IER, 0)
    assert port.read(IER) == 0
    port.write(IER, 0x0F)
    assert port.read(IER) == 0x0F
    port.write(IER, 0x4F)  # bit 6 would be UUE, of an XScale
    assert port.read(IER) == 0x0F


def test_linux_s_loopback_test_passes(port: Port) -> None:
    port.write(MCR, 0x10 | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)


@pytest.mark.parametrize(
    ("output", "line"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)]
)
def test_in_loopback_each_modem_output_is_seen_at_its_input(
    port: Port, output: int, line: int
) -> None:
    port.write(MCR, 0x10 | output)
    assert port.read(MSR) & 0xF0 == line


def test_in_loopback_what_is_sent_is_received_and_goes_nowhere_else(port: Port) -> None:
    port.write(MCR, 0x1E)
    port.write(DATA, 0xAE)
    assert port.read(LSR) & LSR_DATA_READY
    assert port.read(DATA) == 0xAE
    assert port.sent == b""
    port.write(IIR_FCR, FIFO_ON)
    port.uart.write_many(b"ab")  # coalesced
    assert (port.read(DATA), port.read(DATA)) == (ord("a"), ord("b"))
    assert port.sent == b""
    port.write(MCR, 0x0F)
    port.write(DATA, ord("x"))
    assert port.sent == b"x"


def test_in_loopback_the_fifo_does_not_grow_without_end(port: Port) -> None:
    port.write(IIR_FCR, FIFO_ON)
    port.write(MCR, 0x10)
    for byte in range(100):
        port.write(DATA, byte)
    assert bytes(port.read(DATA) for _ in range(FIFO_BYTES)) == bytes(range(FIFO_BYTES))
    assert port.read(LSR) & LSR_DATA_READY == 0


def test_outside_of_loopback_the_modem_is_ready(port: Port) -> None:
    assert port.read(MSR) & 0xB0 == 0xB0  # carrier, data set ready, clear to send


def test_linux_takes_it_for_a_16550a(port: Port) -> None:
    port.write(LCR, 0xBF)  # CONF_MODE_B
    port.write(IIR_FCR, 0)  # EFR, on chips that have one
    port.write(LCR, 0)
    port.write(IIR_FCR, 0x01)
    assert port.read(IIR_FCR) >> 6 == 3  # FIFOs that work
    # autoconfig_16550a(): none of the better chips.
    port.write(LCR, 0x80)
    assert port.read(IIR_FCR) != 0  # an EFR would read zero
    port.write(LCR, 0xBF)
    assert port.read(IIR_FCR) != 0
    # National's super I/O has EXCR1 here, whose bit 4 follows MCR's.
    seen = []
    for mcr in (0x00, 0x10):
        port.write(LCR, 0)
        port.write(MCR, mcr)
        port.write(LCR, 0xE0)
        seen.append(port.read(IIR_FCR) & 0x10)
    assert seen[0] == seen[1]
    port.write(LCR, 0)
    port.write(MCR, 0)
    # A TI16750 has 64-byte FIFOs.
    port.write(IIR_FCR, 0x21)
    assert port.read(IIR_FCR) & 0xE0 == 0xC0
    # 16650 and later have automatic flow control in MCR.
    port.write(MCR, 0xFF)
    assert port.read(MCR) == 0x1F


def test_freebsd_measures_a_fifo_of_sixteen_bytes(port: Port) -> None:
    # uart_dev_ns8250.c, ns8250_bus_probe(): send in loopback until there is an overrun.
    port.write(MCR, 0x10)
    port.write(IIR_FCR, 0x07)
    count = 0
    while not port.read(LSR) & LSR_OVERRUN:
        port.write(DATA, 0)
        count += 1
        assert count < 260
    assert count - 1 == 16


def test_linux_finds_the_interrupt(port: Port) -> None:
    # autoconfig_irq(): which line rises when all is enabled and a byte is sent?
    port.write(MCR, 0x0C)
    port.write(MCR, 0x00)
    port.write(MCR, 0x0B)
    port.write(IER, 0x0F)
    for register in (LSR, DATA, IIR_FCR, MSR):
        port.read(register)
    assert not port.line
    port.edges = 0
    port.write(DATA, 0xFF)
    assert port.edges == 1


def test_with_the_fifo_off_iir_says_so_and_no_interrupt_is_pending(port: Port) -> None:
    assert port.read(IIR_FCR) == 0x01
    port.write(IIR_FCR, 0x01)
    assert port.read(IIR_FCR) == 0xC1
    port.write(IIR_FCR, 0x00)
    assert port.read(IIR_FCR) == 0x01


def test_linux_finds_no_transmit_bugs(port: Port) -> None:
    # serial8250_do_startup(): is the transmitter's interrupt there again when it is re-enabled,
    # and can "transmitter empty" be seen in both registers?
    for _ in range(2):
        port.write(IER, 0x02)
        assert port.read(IIR_FCR) & 1 == 0
        port.write(IER, 0)
    port.write(IER, 0x02)
    assert port.read(LSR) & 0x40
    assert port.read(IIR_FCR) & 1 == 0
    port.write(IER, 0)
    assert port.read(LSR) != 0xFF  # "no such port"


def test_line_and_modem_status_cannot_be_written(port: Port) -> None:
    before = port.read(LSR), port.read(MSR)
    port.write(LSR, 0xFF)
    port.write(MSR, 0xFF)
    assert (port.read(LSR), port.read(MSR)) == before


def test_a_newly_built_port_is_set_to_eight_bits_and_dlab_is_off(port: Port) -> None:
    assert port.read(LCR) == 0x03
    assert port.read(IER) == 0


# --- abuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_access_of_any_width_and_value_harms_it(port: Port, size: int) -> None:
    values = (0, (1 << 8 * size) - 1, 0x0123456789ABCDEF, 0xDEADBEEF1C83E07F)
    for value in values:
        for offset in [*range(8), *reversed(range(8))]:
            port.uart.write(offset, size, value)
            port.uart.receive(b"abcdefghijklmnopqrst")
            for other in range(8):
                assert 0 <= port.uart.read(other, size) < 1 << 8 * size
    port.uart.write_many(b"")


def test_a_stream_of_input_arrives_whole_while_interrupts_are_used() -> None:
    data = bytes(range(256)) * 4
    got = bytearray()
    room, called = threading.Event(), threading.Event()

    def set_line(level: bool) -> None:
        if level:
            called.set()

    uart = Serial(bytes, room.set, set_line)
    uart.write(IIR_FCR, 1, 0x81)
    uart.write(IER, 1, IER_RECEIVED)

    def type_it() -> None:
        rest = data
        while rest:
            room.clear()
            if uart.room():
                rest = rest[uart.receive(rest[: uart.room()]) :]
            elif not room.wait(20):
                return

    typist = threading.Thread(target=type_it)
    typist.start()
    while len(got) < len(data) and called.wait(20):
        called.clear()
        while uart.read(IIR_FCR, 1) & 1 == 0:
            got.append(uart.read(DATA, 1))
    typist.join(20)
    assert got == data

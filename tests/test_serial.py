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
    IIR_FCR,
    LCR,
    LSR,
    LSR_DATA_READY,
    LSR_TRANSMITTER_EMPTY,
    MCR,
    MSR,
    SCRATCH,
    Serial,
)


class Port:
    """A UART and what it sent, with byte accesses as a driver makes them."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.uart = Serial(self.sent.extend)

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
    port.uart.write_many(b"ab")  # coalesced
    assert (port.read(DATA), port.read(DATA)) == (ord("a"), ord("b"))
    assert port.sent == b""
    port.write(MCR, 0x0F)
    port.write(DATA, ord("x"))
    assert port.sent == b"x"


def test_in_loopback_the_fifo_does_not_grow_without_end(port: Port) -> None:
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


def test_with_the_fifo_off_iir_says_so_and_no_interrupt_is_pending(port: Port) -> None:
    assert port.read(IIR_FCR) == 0x01
    port.write(IIR_FCR, 0x01)
    assert port.read(IIR_FCR) == 0xC1
    port.write(IIR_FCR, 0x00)
    assert port.read(IIR_FCR) == 0x01


def test_linux_finds_no_transmit_bugs(port: Port) -> None:
    # serial8250_do_startup(): THRE interrupt test.
    port.write(IER, 0x02)
    first = port.read(IIR_FCR) & 1
    port.write(IER, 0)
    port.write(IER, 0x02)
    assert port.read(IIR_FCR) & 1 == first
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

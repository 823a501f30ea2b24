"""The VGA's ports, as drivers of a text screen use them."""

from __future__ import annotations

import random
import threading

import pytest

from pyvmm.devices.vga import COLUMNS, VGA_PORT, Vga

# Ports as a driver's author knows them.
ATTRIBUTE, ATTRIBUTE_READ, MISC_WRITE, SEQUENCER, DAC_MASK = 0x3C0, 0x3C1, 0x3C2, 0x3C4, 0x3C6
DAC_READ_INDEX, DAC_WRITE_INDEX, DAC_DATA = 0x3C7, 0x3C8, 0x3C9
FEATURE_READ, MISC_READ, GRAPHICS = 0x3CA, 0x3CC, 0x3CE
CRTC_INDEX, CRTC_DATA, STATUS = 0x3D4, 0x3D5, 0x3DA
DISPLAY_DISABLED, VERTICAL_RETRACE = 0x01, 0x08


class Driver:
    """Port accesses, as a driver makes them."""

    def __init__(self) -> None:
        self.vga = Vga()

    def inb(self, port: int) -> int:
        return self.vga.read(port - VGA_PORT, 1)

    def outb(self, port: int, value: int) -> None:
        self.vga.write(port - VGA_PORT, 1, value)

    def outw(self, port: int, value: int) -> None:
        self.vga.write(port - VGA_PORT, 2, value)

    def crtc(self, index: int, value: int) -> None:
        self.outb(CRTC_INDEX, index)
        self.outb(CRTC_DATA, value)

    def move_cursor(self, row: int, column: int) -> None:
        cell = row * COLUMNS + column
        self.crtc(0x0F, cell & 0xFF)
        self.crtc(0x0E, cell >> 8)


@pytest.fixture
def driver() -> Driver:
    return Driver()


# --- cursor and scrolling ------------------------------------------------------------------------


def test_the_cursor_is_at_the_top_left_of_a_new_screen(driver: Driver) -> None:
    assert (driver.vga.cursor, driver.vga.start) == (0, 0)


def test_the_cursor_goes_where_a_driver_puts_it(driver: Driver) -> None:
    driver.move_cursor(12, 34)
    assert driver.vga.cursor == 12 * 80 + 34


def test_a_driver_reads_back_where_the_cursor_is(driver: Driver) -> None:
    driver.move_cursor(24, 79)
    driver.outb(CRTC_INDEX, 0x0E)
    high = driver.inb(CRTC_DATA)
    driver.outb(CRTC_INDEX, 0x0F)
    assert high << 8 | driver.inb(CRTC_DATA) == 24 * 80 + 79
    assert driver.inb(CRTC_INDEX) == 0x0F


def test_index_and_data_may_be_written_together(driver: Driver) -> None:
    driver.outw(CRTC_INDEX, 0x070E)
    driver.outw(CRTC_INDEX, 0xCF0F)
    assert driver.vga.cursor == 0x07CF


@pytest.mark.parametrize(
    ("start", "end", "visible"),
    [
        (0x0D, 0x0E, True),  # an underline, as the BIOS leaves it
        (0x00, 0x0F, True),  # a block
        (0x0F, 0x0F, True),  # one scan line
        (0x20, 0x0F, False),  # bit 5: off
        (0x2D, 0x0E, False),
        (0x0F, 0x00, False),  # ends before it starts
        (0x1E, 0x1F, False),  # below the character
        (0x0E, 0x6F, True),  # bits 5 and 6 of the end are the skew
        (0xCE, 0x0F, True),  # bits that are nothing
    ],
)
def test_the_cursor_is_seen_where_its_scan_lines_are(
    driver: Driver, start: int, end: int, visible: bool
) -> None:
    driver.move_cursor(1, 2)
    driver.crtc(0x0A, start)
    driver.crtc(0x0B, end)
    assert driver.vga.cursor == (82 if visible else None)


def test_a_cursor_that_is_shown_again_has_kept_its_place(driver: Driver) -> None:
    driver.move_cursor(3, 4)
    driver.crtc(0x0A, 0x20)
    driver.crtc(0x0A, 0x0D)
    assert driver.vga.cursor == 3 * 80 + 4


def test_the_start_address_is_where_the_screen_begins(driver: Driver) -> None:
    driver.crtc(0x0C, 0x12)
    driver.crtc(0x0D, 0x34)
    assert driver.vga.start == 0x1234


# --- the status ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [DISPLAY_DISABLED, VERTICAL_RETRACE])
@pytest.mark.parametrize("readers", [1, 2])
def test_nobody_waits_long_for_a_retrace_or_its_end(driver: Driver, bit: int, readers: int) -> None:
    for wanted in (bit, 0, bit, 0):
        for _ in range(4):
            status = driver.inb(STATUS)
            for _ in range(readers - 1):  # another vCPU waits, too
                driver.inb(STATUS)
            if status & bit == wanted:
                break
        else:
            pytest.fail(f"bit {bit:#x} never became {wanted:#x}")


def test_in_a_vertical_retrace_the_display_is_disabled(driver: Driver) -> None:
    seen = {driver.inb(STATUS) for _ in range(12)}
    assert seen == {0, DISPLAY_DISABLED, DISPLAY_DISABLED | VERTICAL_RETRACE}


# --- registers that keep what is written ---------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "index", "mode_3"),
    [
        (SEQUENCER, 0x02, 0x03),  # text is in planes 0 and 1
        (SEQUENCER, 0x04, 0x02),
        (GRAPHICS, 0x05, 0x10),
        (GRAPHICS, 0x06, 0x0E),  # text memory at 0xB8000
        (CRTC_INDEX, 0x01, 79),  # the last column
        (CRTC_INDEX, 0x09, 0x4F),  # 16 scan lines a character
        (CRTC_INDEX, 0x13, 40),  # words a line
    ],
)
def test_a_driver_finds_mode_3_and_can_change_it(
    driver: Driver, port: int, index: int, mode_3: int
) -> None:
    driver.outb(port, index)
    assert driver.inb(port + 1) == mode_3
    driver.outb(port + 1, 0x5A)
    assert driver.inb(port + 1) == 0x5A
    assert driver.inb(port) == index


@pytest.mark.parametrize("port", [SEQUENCER, GRAPHICS, CRTC_INDEX])
@pytest.mark.parametrize("index", [0x19, 0x80, 0xFF])
def test_there_is_nothing_behind_the_last_register(driver: Driver, port: int, index: int) -> None:
    driver.outb(port, index)
    driver.outb(port + 1, 0x5A)
    assert driver.inb(port + 1) == 0


def test_misc_output_says_that_it_is_a_colour_display(driver: Driver) -> None:
    assert driver.inb(MISC_READ) & 0x01
    driver.outb(MISC_WRITE, 0xE3)
    assert driver.inb(MISC_READ) == 0xE3
    assert driver.inb(MISC_WRITE) == 0  # input status 0


def test_feature_control_is_written_where_the_status_is_read(driver: Driver) -> None:
    driver.outb(STATUS, 0x02)
    assert driver.inb(FEATURE_READ) == 0x02


@pytest.mark.parametrize("port", [0x3CB, 0x3CD, 0x3D0, 0x3D8, 0x3DF])
def test_where_a_vga_has_no_register_all_ones_are_read(driver: Driver, port: int) -> None:
    driver.outb(port, 0x12)
    assert driver.inb(port) == 0xFF


# --- the attribute controller --------------------------------------------------------------------


def attribute(driver: Driver, index: int) -> int:
    """Read an attribute controller's register, with the screen left on."""
    driver.inb(STATUS)
    driver.outb(ATTRIBUTE, 0x20 | index)
    return driver.inb(ATTRIBUTE_READ)


def test_the_attribute_controller_takes_index_and_data_in_turn(driver: Driver) -> None:
    driver.inb(STATUS)
    for index, value in ((0x01, 0x3F), (0x10, 0x04), (0x13, 0x08)):
        driver.outb(ATTRIBUTE, index)
        driver.outb(ATTRIBUTE, value)
    driver.outb(ATTRIBUTE, 0x20)
    assert [attribute(driver, index) for index in (0x01, 0x10, 0x13)] == [0x3F, 0x04, 0x08]


def test_reading_the_status_makes_the_next_attribute_write_an_index(driver: Driver) -> None:
    driver.inb(STATUS)
    driver.outb(ATTRIBUTE, 0x30)
    driver.inb(STATUS)
    driver.outb(ATTRIBUTE, 0x31)
    assert driver.inb(ATTRIBUTE) == 0x31
    driver.inb(STATUS)
    assert attribute(driver, 0x10) == 0x0C  # nothing was written


def test_blinking_can_be_switched_off_as_drivers_do_it(driver: Driver) -> None:
    mode = attribute(driver, 0x10)
    assert mode & 0x08
    driver.outb(ATTRIBUTE, mode & ~0x08)
    assert attribute(driver, 0x10) == mode & ~0x08


def test_an_attribute_register_that_does_not_exist_reads_zero(driver: Driver) -> None:
    driver.inb(STATUS)
    driver.outb(ATTRIBUTE, 0x1F)
    driver.outb(ATTRIBUTE, 0x55)
    assert attribute(driver, 0x1F) == 0


# --- the palette ---------------------------------------------------------------------------------


def test_palette_entries_are_written_and_read_one_after_the_other(driver: Driver) -> None:
    driver.outb(DAC_WRITE_INDEX, 16)
    for component in (1, 2, 3, 4, 5, 0xFF):
        driver.outb(DAC_DATA, component)
    assert driver.inb(DAC_WRITE_INDEX) == 18
    driver.outb(DAC_READ_INDEX, 16)
    assert [driver.inb(DAC_DATA) for _ in range(6)] == [1, 2, 3, 4, 5, 0x3F]  # six bits each


def test_the_palette_wraps_after_its_last_entry(driver: Driver) -> None:
    driver.outb(DAC_WRITE_INDEX, 255)
    for component in (10, 11, 12, 13):
        driver.outb(DAC_DATA, component)
    driver.outb(DAC_READ_INDEX, 0)
    assert driver.inb(DAC_DATA) == 13


def test_the_palette_says_whether_it_is_read_or_written(driver: Driver) -> None:
    driver.outb(DAC_READ_INDEX, 0)
    assert driver.inb(DAC_READ_INDEX) == 3
    driver.outb(DAC_WRITE_INDEX, 0)
    assert driver.inb(DAC_READ_INDEX) == 0


def test_the_palette_mask_is_kept(driver: Driver) -> None:
    assert driver.inb(DAC_MASK) == 0xFF
    driver.outb(DAC_MASK, 0x0F)
    assert driver.inb(DAC_MASK) == 0x0F


# --- reset and nonsense --------------------------------------------------------------------------


def test_reset_forgets_everything(driver: Driver) -> None:
    fresh = [driver.inb(port) for port in range(VGA_PORT, STATUS)]
    driver.move_cursor(5, 5)
    driver.crtc(0x0C, 1)
    for port in range(VGA_PORT, STATUS):
        driver.outb(port, 0x55)
    driver.vga.reset()
    assert [driver.inb(port) for port in range(VGA_PORT, STATUS)] == fresh
    assert (driver.vga.cursor, driver.vga.start) == (0, 0)
    assert attribute(driver, 0x10) == 0x0C


def test_nonsense_from_several_vcpus_is_survived() -> None:
    vga = Vga()
    errors: list[Exception] = []

    def scribble(seed: int) -> None:
        numbers = random.Random(seed)
        try:
            for _ in range(3000):
                offset, size = numbers.randrange(Vga.size), numbers.choice((1, 2, 4, 8))
                vga.write(offset, size, numbers.getrandbits(8 * size))
                assert 0 <= vga.read(offset, size) < 1 << 8 * size
                assert 0 <= vga.start <= 0xFFFF
                assert 0 <= (vga.cursor or 0) <= 0xFFFF
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=scribble, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)

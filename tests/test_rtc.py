"""The CMOS clock and RAM, as kernels read and set them."""

from __future__ import annotations

import calendar
import random
import threading
import time

import pytest

from pyvmm.devices.rtc import (
    A_UPDATE_IN_PROGRESS,
    B_24_HOURS,
    B_BINARY,
    B_SET,
    C_UPDATE_ENDED,
    CENTURY,
    D_VALID,
    DATA,
    DAY,
    HOURS,
    INDEX,
    MINUTES,
    MONTH,
    REGISTER_A,
    REGISTER_B,
    REGISTER_C,
    REGISTER_D,
    SECONDS,
    WEEKDAY,
    YEAR,
    Rtc,
    seconds_since_1970,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

TIME = SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY
BCD, BCD_12_HOURS, BINARY, BINARY_12_HOURS = B_24_HOURS, 0, B_24_HOURS | B_BINARY, B_BINARY


def utc(text: str) -> int:
    """Seconds since 1970 of "2024-02-29 23:59:58"."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


class Cmos:
    """The chip behind its two ports, with a host clock that stands still until it is moved."""

    def __init__(self, text: str = "2024-02-29 23:59:58", below: int = 64 * MIB) -> None:
        self.host = float(utc(text))
        self.rtc = Rtc(below, now=lambda: self.host)

    def read(self, index: int) -> int:
        self.rtc.write(INDEX, 1, index)
        return self.rtc.read(DATA, 1)

    def write(self, index: int, value: int) -> None:
        self.rtc.write(INDEX, 1, index)
        self.rtc.write(DATA, 1, value)

    def number(self, index: int, size: int) -> int:
        """`size` cells from `index` on, little-endian."""
        return sum(self.read(index + n) << 8 * n for n in range(size))

    def time(self) -> tuple[int, ...]:
        """Second, minute, hour, day, month, year and century, as the registers have them."""
        return tuple(self.read(index) for index in TIME)

    def set_time(self, values: tuple[int, ...], mode: int = BCD) -> None:
        """Set the clock the way the data sheet says."""
        self.write(REGISTER_B, mode | B_SET)
        for index, value in zip(TIME, values, strict=True):
            self.write(index, value)
        self.write(REGISTER_B, mode)


@pytest.fixture
def cmos() -> Cmos:
    return Cmos()


# --- reading the time ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (BCD, (0x58, 0x59, 0x23, 0x29, 0x02, 0x24, 0x20)),
        (BCD_12_HOURS, (0x58, 0x59, 0x91, 0x29, 0x02, 0x24, 0x20)),
        (BINARY, (58, 59, 23, 29, 2, 24, 20)),
        (BINARY_12_HOURS, (58, 59, 0x80 | 11, 29, 2, 24, 20)),
    ],
)
def test_clock_shows_the_host_s_utc_as_register_b_says(
    cmos: Cmos, mode: int, expected: tuple[int, ...]
) -> None:
    cmos.write(REGISTER_B, mode)
    assert cmos.time() == expected


def test_clock_starts_in_bcd_and_24_hours(cmos: Cmos) -> None:
    assert cmos.read(REGISTER_B) == BCD


def test_clock_counts_into_the_next_month(cmos: Cmos) -> None:
    cmos.host += 2
    assert cmos.time() == (0x00, 0x00, 0x00, 0x01, 0x03, 0x24, 0x20)
    cmos.host += 61
    assert cmos.time() == (0x01, 0x01, 0x00, 0x01, 0x03, 0x24, 0x20)


@pytest.mark.parametrize(
    ("hour", "expected"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_12_hour_clock_has_no_hour_0(hour: int, expected: int) -> None:
    cmos = Cmos(f"2024-01-01 {hour:02}:00:00")
    cmos.write(REGISTER_B, BCD_12_HOURS)
    assert cmos.read(HOURS) == expected


@pytest.mark.parametrize(
    ("day", "expected"), [("2024-03-03", 1), ("2024-03-04", 2), ("2024-03-09", 7)]
)
def test_week_begins_on_sunday(day: str, expected: int) -> None:
    assert Cmos(f"{day} 12:00:00").read(WEEKDAY) == expected


def test_century_changes_with_the_year() -> None:
    cmos = Cmos("1999-12-31 23:59:59")
    assert (cmos.read(CENTURY), cmos.read(YEAR)) == (0x19, 0x99)
    cmos.host += 1
    assert (cmos.read(CENTURY), cmos.read(YEAR)) == (0x20, 0x00)


def test_nmi_mask_in_the_index_is_no_part_of_it(cmos: Cmos) -> None:
    assert cmos.read(0x80 | MINUTES) == 0x59


def test_index_cannot_be_read(cmos: Cmos) -> None:
    cmos.read(MINUTES)
    assert cmos.rtc.read(INDEX, 1) == 0xFF


def test_index_and_data_can_be_written_in_one_go(cmos: Cmos) -> None:
    cmos.rtc.write(INDEX, 2, 0x5A00 | 0x40)
    assert cmos.read(0x40) == 0x5A


def test_a_real_host_clock_is_the_default() -> None:
    rtc = Rtc(64 * MIB)
    rtc.write(INDEX, 1, CENTURY)
    assert rtc.read(DATA, 1) >= 0x20


# --- the update cycle ----------------------------------------------------------------------------


def test_update_is_in_progress_just_before_the_seconds_change(cmos: Cmos) -> None:
    shown = []
    second = cmos.host
    for after in (0.0, 0.5, 0.997, 0.998, 0.9999, 1.0, 1.001):
        cmos.host = second + after
        shown.append(bool(cmos.read(REGISTER_A) & A_UPDATE_IN_PROGRESS))
    assert shown == [False, False, False, True, True, False, False]


def test_seconds_change_when_the_update_is_over(cmos: Cmos) -> None:
    cmos.host += 0.999
    assert cmos.read(REGISTER_A) & A_UPDATE_IN_PROGRESS
    assert cmos.read(SECONDS) == 0x58
    cmos.host += 0.001
    assert not cmos.read(REGISTER_A) & A_UPDATE_IN_PROGRESS
    assert cmos.read(SECONDS) == 0x59


@pytest.mark.parametrize("look", [10e-6, 300e-6, 0.0019, 0.01, 0.3, 1.7])
def test_a_driver_that_waits_for_an_update_sees_it_however_slowly_it_looks(
    cmos: Cmos, look: float
) -> None:
    """Wait until UIP is 1 and then until it is 0: old Linux kernels do, to be exact."""
    began = cmos.host
    cmos.read(REGISTER_A)
    for bit in (A_UPDATE_IN_PROGRESS, 0):
        while cmos.read(REGISTER_A) & A_UPDATE_IN_PROGRESS != bit:
            cmos.host += look
            assert cmos.host < began + 2 + 10 * look, "the driver hangs"


def test_a_driver_that_looks_twice_gets_a_time_that_agrees(cmos: Cmos) -> None:
    """Read between updates, and again until both are the same: what OSDev's wiki shows."""

    def read_between_updates() -> tuple[int, ...]:
        while cmos.read(REGISTER_A) & A_UPDATE_IN_PROGRESS:
            cmos.host += 100e-6
        values = []
        for index in TIME:
            cmos.host += 100e-6  # each access is an exit
            values.append(cmos.read(index))
        return tuple(values)

    cmos.host += 1.9975  # two and a half milliseconds before the end of the month
    last, now = read_between_updates(), read_between_updates()
    while last != now:
        last, now = now, read_between_updates()
    assert now == (0x00, 0x00, 0x00, 0x01, 0x03, 0x24, 0x20)


def test_there_is_no_update_while_the_guest_sets_the_clock(cmos: Cmos) -> None:
    cmos.write(REGISTER_B, BCD | B_SET)
    for _ in range(30):
        cmos.host += 0.0999
        assert not cmos.read(REGISTER_A) & A_UPDATE_IN_PROGRESS


def test_register_a_keeps_rate_and_divider_but_not_the_update_bit(cmos: Cmos) -> None:
    assert cmos.read(REGISTER_A) == 0x26
    cmos.write(REGISTER_A, 0xFF)
    assert cmos.read(REGISTER_A) == 0x7F


def test_register_c_tells_of_an_update_once(cmos: Cmos) -> None:
    assert cmos.read(REGISTER_C) == 0
    cmos.host += 1
    assert cmos.read(REGISTER_C) == C_UPDATE_ENDED
    assert cmos.read(REGISTER_C) == 0


def test_registers_c_and_d_cannot_be_written(cmos: Cmos) -> None:
    for index, expected in ((REGISTER_C, 0), (REGISTER_D, D_VALID)):
        cmos.write(index, 0x55)
        assert cmos.read(index) == expected


# --- setting the time ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        (BCD, (0x30, 0x45, 0x21, 0x28, 0x02, 0x31, 0x20)),
        (BCD_12_HOURS, (0x30, 0x45, 0x89, 0x28, 0x02, 0x31, 0x20)),
        (BCD_12_HOURS, (0x30, 0x45, 0x12, 0x28, 0x02, 0x31, 0x20)),  # a quarter to one, at night
        (BINARY, (30, 45, 21, 28, 2, 31, 20)),
        (BINARY_12_HOURS, (30, 45, 0x80 | 12, 28, 2, 31, 20)),
    ],
)
def test_clock_goes_on_from_the_time_that_the_guest_sets(
    cmos: Cmos, mode: int, values: tuple[int, ...]
) -> None:
    cmos.set_time(values, mode)
    assert cmos.time() == values
    cmos.host += 5
    second = 0x35 if not mode & B_BINARY else 35
    assert cmos.time() == (second, *values[1:])


def test_a_guest_can_set_binary_time_and_read_it_in_bcd(cmos: Cmos) -> None:
    cmos.set_time((30, 45, 21, 31, 12, 99, 19), BINARY)
    cmos.write(REGISTER_B, BCD)
    assert cmos.time() == (0x30, 0x45, 0x21, 0x31, 0x12, 0x99, 0x19)
    assert cmos.read(WEEKDAY) == 6  # a Friday


def test_clock_stands_still_while_it_is_set(cmos: Cmos) -> None:
    cmos.write(REGISTER_B, BCD | B_SET)
    cmos.host += 100
    assert cmos.read(SECONDS) == 0x58
    cmos.write(REGISTER_B, BCD)
    assert cmos.time() == (0x58, 0x59, 0x23, 0x29, 0x02, 0x24, 0x20)
    cmos.host += 1
    assert cmos.read(SECONDS) == 0x59


def test_a_register_that_is_written_without_stopping_the_clock_is_set_alone(cmos: Cmos) -> None:
    cmos.write(MINUTES, 0x07)
    assert cmos.time() == (0x58, 0x07, 0x23, 0x29, 0x02, 0x24, 0x20)
    cmos.host += 2
    assert cmos.time() == (0x00, 0x08, 0x23, 0x29, 0x02, 0x24, 0x20)


def test_day_of_the_week_follows_from_the_date(cmos: Cmos) -> None:
    assert cmos.read(WEEKDAY) == 5
    cmos.write(WEEKDAY, 1)
    assert cmos.read(WEEKDAY) == 5


def test_a_date_that_does_not_exist_becomes_one_that_does(cmos: Cmos) -> None:
    cmos.set_time((0x75, 0x99, 0x23, 0x31, 0x02, 0x23, 0x20))
    assert cmos.time() == (0x15, 0x40, 0x00, 0x04, 0x03, 0x23, 0x20)


def test_time_survives_a_reset_and_interrupt_enables_do_not(cmos: Cmos) -> None:
    cmos.set_time((0x30, 0x45, 0x21, 0x28, 0x02, 0x31, 0x20))
    cmos.write(0x40, 0xAA)
    cmos.write(REGISTER_B, BCD | 0x70)
    cmos.rtc.reset()
    assert cmos.time() == (0x30, 0x45, 0x21, 0x28, 0x02, 0x31, 0x20)
    assert cmos.read(0x40) == 0xAA
    assert cmos.read(REGISTER_B) == BCD


@pytest.mark.parametrize(
    "text",
    [
        "1970-01-01 00:00:00",
        "1999-12-31 23:59:59",
        "2000-02-29 12:00:00",
        "2000-03-01 00:00:00",
        "2024-02-29 23:59:59",
        "2038-01-19 03:14:08",
        "2100-02-28 23:59:59",
        "2100-03-01 00:00:00",
        "9999-12-31 23:59:59",
    ],
)
def test_seconds_since_1970_agree_with_the_standard_library(text: str) -> None:
    assert seconds_since_1970(*time.strptime(text, "%Y-%m-%d %H:%M:%S")[:6]) == utc(text)


# --- RAM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "above", "extended_kib", "above_16m", "above_4g"),
    [
        (1 * MIB, 0, 0, 0, 0),
        (8 * MIB, 0, 7 * 1024, 0, 0),
        (16 * MIB, 0, 15 * 1024, 0, 0),
        (64 * MIB, 0, 63 * 1024, 48 * 16, 0),
        (65 * MIB, 0, 0xFFFF, 49 * 16, 0),
        (3 * GIB, 2 * GIB, 0xFFFF, 0xBF00, 0x8000),  # what QEMU -machine pc -m 5G has
        (3 * GIB, 1 << 41, 0xFFFF, 0xBF00, 0xFFFFFF),  # more than fits
    ],
)
def test_memory_size_is_where_firmware_has_it(
    below: int, above: int, extended_kib: int, above_16m: int, above_4g: int
) -> None:
    cmos = Cmos()
    cmos.rtc = Rtc(below, above)
    assert cmos.number(0x15, 2) == 640
    assert cmos.number(0x17, 2) == cmos.number(0x30, 2) == extended_kib
    assert cmos.number(0x34, 2) == above_16m
    assert cmos.number(0x5B, 3) == above_4g


def test_the_rest_of_the_ram_is_the_guest_s(cmos: Cmos) -> None:
    free = [n for n in range(0x0E, 0x80) if n != CENTURY]
    for index in free:
        cmos.write(index, index ^ 0xA5)
    assert [cmos.read(index) for index in free] == [index ^ 0xA5 for index in free]


# --- nonsense ------------------------------------------------------------------------------------


def test_no_access_is_too_strange(cmos: Cmos) -> None:
    rng = random.Random(1)
    for _ in range(5000):
        offset, size = rng.randrange(2), rng.choice((1, 1, 1, 2, 4, 8))
        cmos.host += rng.random() * rng.choice((1e-4, 1, 1e6))
        if rng.random() < 0.3:
            assert 0 <= cmos.rtc.read(offset, size) < 1 << 8 * size
        else:  # mostly the clock's own registers
            index = rng.choice((*TIME, *range(16), rng.randrange(256)))
            cmos.rtc.write(offset, size, rng.getrandbits(8 * size - 8) << 8 | index)


@pytest.mark.parametrize("mode", [BCD, BCD_12_HOURS, BINARY, BINARY_12_HOURS])
@pytest.mark.parametrize("value", [0x00, 0x7F, 0x80, 0xAA, 0xFF])
def test_any_value_can_be_set_as_time_in_any_mode(cmos: Cmos, mode: int, value: int) -> None:
    cmos.set_time((value,) * len(TIME), mode)
    assert len(cmos.time()) == len(TIME)
    cmos.write(REGISTER_B, mode ^ B_BINARY)
    assert len(cmos.time()) == len(TIME)


def test_vcpus_may_use_the_clock_at_the_same_time(cmos: Cmos) -> None:
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(500):
                cmos.rtc.write(INDEX, 2, rng.getrandbits(16))
                cmos.rtc.read(DATA, 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []

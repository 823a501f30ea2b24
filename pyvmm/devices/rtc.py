"""The CMOS clock and its battery-backed RAM, ports 0x70 (which register) and 0x71 (its value).

The time is the host's (UTC) plus an offset, which is 0 until the guest sets the clock.  The RAM
says how much memory there is, where SeaBIOS and QEMU have that; the rest is the guest's to use.

Left out: interrupts (IRQ 8), with the alarm and the periodic flag, so register C only tells of
updates; the divider bits of register A, which keep what is written; bit 7 of port 0x70, which masks
NMIs on a PC.  The day of the week is computed from the date, whatever is written there.
Source: Motorola MC146818A data sheet, "Registers" and "Update Cycle"; QEMU's hw/i386/pc.c and
SeaBIOS's src/hw/rtc.h for the RAM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.devices.bytewise import BytewiseDevice

CMOS_PORT = 0x70

INDEX, DATA = range(2)  # offsets of the ports

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR, REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = range(6, 14)
BASE_MEMORY_KIB = 0x15  # 2 bytes: below 640 KiB
EXTENDED_MEMORY_KIB = 0x17, 0x30  # 2 bytes each: above 1 MiB, as far as they can count
MEMORY_ABOVE_16M = 0x34  # 2 bytes: in units of 64 KiB, below 4 GiB
MEMORY_ABOVE_4G = 0x5B  # 3 bytes: in units of 64 KiB
CENTURY = 0x32  # the FADT names it to the guest

A_UPDATE_IN_PROGRESS = 0x80
A_32768_HZ_RATE_1024_HZ = 0x26  # what a PC's firmware sets
B_SET = 0x80  # the guest sets the clock: no updates
B_INTERRUPT_ENABLES = 0x70
B_BINARY, B_24_HOURS = 0x04, 0x02
C_UPDATE_ENDED = 0x10
D_VALID = 0x80  # the battery is not empty
HOURS_PM = 0x80

_TIME = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})
_CELLS = 128
_UPDATE_SECONDS = 244e-6 + 1984e-6  # "soon" and the update itself, at 32.768 kHz
_DAYS_TO_1970 = 719468  # from March 1 of the year 0


class Rtc(BytewiseDevice):
    """An MC146818 with 128 bytes.  It keeps time and RAM over a reset, as with a battery."""

    size = 2

    def __init__(
        self,
        memory_below_4g: int,
        memory_above_4g: int = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Both sizes of RAM in bytes; `now` gives seconds since 1970."""
        self._now = now
        self._lock = threading.Lock()  # guards all below
        self._index = 0
        self._offset = 0  # seconds by which the guest's clock is ahead of the host's
        self._last_update_shown = self._last_update_flagged = self._host_seconds()
        self._cells = bytearray(_CELLS)
        self._cells[REGISTER_A] = A_32768_HZ_RATE_1024_HZ
        self._cells[REGISTER_B] = B_24_HOURS
        self._cells[REGISTER_D] = D_VALID
        self._store(BASE_MEMORY_KIB, 2, min(memory_below_4g >> 10, 640))
        for cell in EXTENDED_MEMORY_KIB:
            self._store(cell, 2, (memory_below_4g - (1 << 20)) >> 10)
        self._store(MEMORY_ABOVE_16M, 2, (memory_below_4g - (16 << 20)) >> 16)
        self._store(MEMORY_ABOVE_4G, 3, memory_above_4g >> 16)

    def _store(self, cell: int, size: int, value: int) -> None:
        """Put `value`, or the nearest that `size` bytes can hold, into the RAM."""
        held = min(max(value, 0), (1 << 8 * size) - 1)
        self._cells[cell : cell + size] = held.to_bytes(size, "little")

    def reset(self) -> None:
        """What the RESET pin does: no interrupts any more.  Time and RAM stay."""
        with self._lock:
            self._index = 0
            self._cells[REGISTER_B] &= ~B_INTERRUPT_ENABLES
            self._last_update_flagged = self._host_seconds()

    # --- the ports -------------------------------------------------------------------------------

    def read_byte(self, offset: int) -> int:
        """The register that was chosen; the index itself cannot be read."""
        if offset == INDEX:
            return 0xFF
        with self._lock:
            return self._read_register(self._index)

    def _read_register(self, index: int) -> int:
        if index in _TIME and not self._cells[REGISTER_B] & B_SET:
            self._show_time()
        if index == REGISTER_A and self._update_in_progress():
            return self._cells[REGISTER_A] | A_UPDATE_IN_PROGRESS
        if index == REGISTER_C:
            return self._take_flags()
        return self._cells[index]

    def write_byte(self, offset: int, value: int) -> None:
        """Choose a register, or set the one that was chosen."""
        with self._lock:
            if offset == INDEX:
                self._index = value & _CELLS - 1
            else:
                self._write_register(self._index, value)

    def _write_register(self, index: int, value: int) -> None:
        running = not self._cells[REGISTER_B] & B_SET
        if index == REGISTER_B:
            if running and value & B_SET:
                self._show_time()  # which then stands still
            self._cells[index] = value
            if not running and not value & B_SET:
                self._adopt_time()
        elif index in _TIME and running:
            self._show_time()  # the registers that are not written must be of now
            self._cells[index] = value
            self._adopt_time()
        elif index == REGISTER_A:
            self._cells[index] = value & ~A_UPDATE_IN_PROGRESS
        elif index not in (REGISTER_C, REGISTER_D):
            self._cells[index] = value

    # --- updates ---------------------------------------------------------------------------------

    def _host_seconds(self) -> int:
        """Whole seconds of the host's clock: the guest's clock is updated when they change."""
        return int(self._now() // 1)

    def _update_in_progress(self) -> bool:
        """The UIP bit: an update is under way or has not been shown to the guest yet.

        Some drivers wait until they see an update begin.  A guest that cannot look every two
        milliseconds, because each look is an exit on a slow host, must see it nevertheless.
        """
        if self._cells[REGISTER_B] & B_SET:
            return False
        now = self._now()
        done, begun = int(now // 1), int((now + _UPDATE_SECONDS) // 1)
        shown, self._last_update_shown = self._last_update_shown, begun
        return begun != done or begun != shown

    def _take_flags(self) -> int:
        """Register C: was there an update since it was last read?"""
        flagged, self._last_update_flagged = self._last_update_flagged, self._host_seconds()
        return C_UPDATE_ENDED if self._last_update_flagged != flagged else 0

    # --- time in registers -----------------------------------------------------------------------

    def _show_time(self) -> None:
        """Set the time registers to the time of now."""
        now = time.gmtime(self._host_seconds() + self._offset)
        shown = {
            SECONDS: self._encode(now.tm_sec),
            MINUTES: self._encode(now.tm_min),
            HOURS: self._encode_hour(now.tm_hour),
            WEEKDAY: self._encode((now.tm_wday + 1) % 7 + 1),  # Sunday is 1
            DAY: self._encode(now.tm_mday),
            MONTH: self._encode(now.tm_mon),
            YEAR: self._encode(now.tm_year % 100),
            CENTURY: self._encode(now.tm_year // 100),
        }
        for index, value in shown.items():
            self._cells[index] = value & 0xFF

    def _adopt_time(self) -> None:
        """Let the clock go on from what the time registers say."""
        seconds = seconds_since_1970(
            self._decode(CENTURY) * 100 + self._decode(YEAR),
            self._decode(MONTH),
            self._decode(DAY),
            self._decode_hour(),
            self._decode(MINUTES),
            self._decode(SECONDS),
        )
        self._offset = seconds - self._host_seconds()

    def _encode(self, value: int) -> int:
        if self._cells[REGISTER_B] & B_BINARY:
            return value
        return value // 10 << 4 | value % 10

    def _encode_hour(self, hour: int) -> int:
        if self._cells[REGISTER_B] & B_24_HOURS:
            return self._encode(hour)
        pm, hour = divmod(hour, 12)
        return self._encode(hour or 12) | (HOURS_PM if pm else 0)

    def _decode(self, index: int, mask: int = 0xFF) -> int:
        value = self._cells[index] & mask
        if self._cells[REGISTER_B] & B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 0x0F)

    def _decode_hour(self) -> int:
        if self._cells[REGISTER_B] & B_24_HOURS:
            return self._decode(HOURS)
        pm = self._cells[HOURS] & HOURS_PM
        return self._decode(HOURS, HOURS_PM - 1) % 12 + (12 if pm else 0)


def seconds_since_1970(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int:
    """Seconds from 1970 to a UTC time.  Numbers too large for their field carry into the next.

    calendar.timegm() does the same, but its import would make every start longer.
    """
    # Years that begin in March have the leap day at their end, and their months' lengths repeat
    # every five months: 31, 30, 31, 30, 31, which are 153 days.
    year, month = divmod(year * 12 + month - 3, 12)
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1
    return ((days - _DAYS_TO_1970) * 24 + hour) * 3600 + minute * 60 + second

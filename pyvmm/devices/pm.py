"""Power management: the ACPI registers of QEMU's PC at port 0x600, and the reset port 0xCF9.

    0x600  PM1 status and enable, 2 bytes each
    0x604  PM1 control, 2 bytes: power-off, with 0x2000 for instance
    0x608  PM timer, 4 bytes: 24 bits at 3.579545 MHz, so it wraps every 4.7 s
    0xB004 PM1 control once more, where Bochs and old QEMUs have it
    0xCF9  reset control

The machine is always in ACPI mode (SCI_EN is 1, and there is no SMI command port).  Left out: the
SCI, so nothing in the enable register has an effect; buttons; sleep states other than S5; general
purpose events.
Source: ACPI specification, "ACPI Hardware Specification", "Fixed Hardware Features" and "PM1 Event
Grouping" ff.; Intel I/O Controller Hub (ICH) data sheet, "RST_CNT: Reset Control Register".
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.devices.bytewise import BytewiseDevice

PM1_EVENT_PORT = 0x600
PM1_CONTROL_PORT, OLD_PM1_CONTROL_PORT = 0x604, 0xB004
PM_TIMER_PORT = 0x608
RESET_CONTROL_PORT = 0xCF9

SCI_IRQ = 9  # for the FADT, which has to name one
S5_SLEEP_TYPE = 0  # for the DSDT's _S5: what SLP_TYP has to be to power off
RESET_VALUE = 0x06  # for the FADT: what to write to the reset port

PM_TIMER_HZ = 3_579_545
PM_TIMER_BITS = 24  # so the FADT leaves TMR_VAL_EXT clear

STATUS, ENABLE = 0, 2  # offsets in the event block
STATUS_TIMER = 0x0001  # TMR_STS: the timer's top bit has changed

CONTROL_SCI_EN = 0x0001
CONTROL_SLP_TYP_SHIFT = 10  # SLP_TYP: 3 bits
CONTROL_SLP_EN = 0x2000  # reads as 0

RESET_SYS_RST, RESET_RST_CPU, RESET_FULL_RST = 0x02, 0x04, 0x08


class PmTimer:
    """The PM timer: counts from power-on, whatever the guest does."""

    size = 4

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """`now_ns` gives nanoseconds since some time."""
        self._now_ns = now_ns
        self._start_ns = now_ns()

    def ticks(self) -> int:
        """Ticks since power-on, all of them: the guest sees the low PM_TIMER_BITS."""
        return (self._now_ns() - self._start_ns) * PM_TIMER_HZ // 1_000_000_000

    def read(self, offset: int, size: int) -> int:
        """The counter in one piece, which is why this is not made of bytes."""
        return (self.ticks() & (1 << PM_TIMER_BITS) - 1) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing to write."""


class Pm1Events(BytewiseDevice):
    """PM1 status and enable.  The one event that happens is the PM timer's."""

    size = 4

    def __init__(self, timer: PmTimer) -> None:
        self._timer = timer
        self._enable = bytearray(2)
        self._half_periods_seen = 0

    def reset(self) -> None:
        """No event pending or enabled."""
        self._enable[:] = bytes(2)
        self._half_periods_seen = self._half_periods()

    def _half_periods(self) -> int:
        """How often the top bit of the timer has changed."""
        return self._timer.ticks() >> PM_TIMER_BITS - 1

    def read_byte(self, offset: int) -> int:
        """Status or enable."""
        if offset >= ENABLE:
            return self._enable[offset - ENABLE]
        if offset == STATUS and self._half_periods() != self._half_periods_seen:
            return STATUS_TIMER
        return 0

    def write_byte(self, offset: int, value: int) -> None:
        """Ones clear bits of the status."""
        if offset >= ENABLE:
            self._enable[offset - ENABLE] = value
        elif offset == STATUS and value & STATUS_TIMER:
            self._half_periods_seen = self._half_periods()


class Pm1Control(BytewiseDevice):
    """PM1 control: calls `power_off` when the guest enters S5."""

    size = 2

    def __init__(self, power_off: Callable[[], None]) -> None:
        self._power_off = power_off
        self._control = bytearray(2)

    def reset(self) -> None:
        """All bits that can be written are 0."""
        self._control[:] = bytes(2)

    def read_byte(self, offset: int) -> int:
        """What was written, in ACPI mode."""
        return self._control[offset] | CONTROL_SCI_EN >> 8 * offset

    def write_byte(self, offset: int, value: int) -> None:
        """Power off, if this is what SLP_EN and SLP_TYP say; they are in the same byte."""
        written = value << 8 * offset
        self._control[offset] = (written & ~CONTROL_SLP_EN) >> 8 * offset
        if written & CONTROL_SLP_EN and written >> CONTROL_SLP_TYP_SHIFT & 7 == S5_SLEEP_TYPE:
            self._power_off()


class ResetControl(BytewiseDevice):
    """Calls `reset` when bit 2 goes from 0 to 1: 0x06, or 0x02 and then 0x06, or 0x0E.

    A machine knows one kind of reset, so the bits that choose between kinds are only kept.
    """

    size = 1

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._control = 0

    def reset(self) -> None:
        """All bits are 0, so the next 0x06 is a reset again."""
        self._control = 0

    def read_byte(self, offset: int) -> int:
        """What was written."""
        return self._control

    def write_byte(self, offset: int, value: int) -> None:
        """Reset the machine if the guest asks for it."""
        before = self._control
        self._control = value & (RESET_SYS_RST | RESET_RST_CPU | RESET_FULL_RST)
        if value & ~before & RESET_RST_CPU:
            self._reset()

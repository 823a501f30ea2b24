"""ACPI's power management registers and the reset port, as kernels use them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pyvmm.bus import Bus
from pyvmm.devices.pm import (
    ENABLE,
    OLD_PM1_CONTROL_PORT,
    PM1_CONTROL_PORT,
    PM1_EVENT_PORT,
    PM_TIMER_BITS,
    PM_TIMER_HZ,
    PM_TIMER_PORT,
    RESET_CONTROL_PORT,
    RESET_VALUE,
    S5_SLEEP_TYPE,
    STATUS,
    Pm1Control,
    Pm1Events,
    PmTimer,
    ResetControl,
)

SECOND = 1_000_000_000  # ns


class Ended(Exception):
    """What a machine's reset and power-off raise."""


class Machine:
    """The registers on a bus, with a clock that stands still until it is moved."""

    def __init__(self, *, raises: bool = False) -> None:
        self.now_ns = 123_456_789_000
        self.happened: list[str] = []
        self.timer = PmTimer(lambda: self.now_ns)
        self.events = Pm1Events(self.timer)
        self.control = Pm1Control(self.callback("power-off", raises))
        self.reset = ResetControl(self.callback("reset", raises))
        self.ports = Bus("port")
        self.ports.claim(PM1_EVENT_PORT, self.events.size, self.events, "PM1 events")
        self.ports.claim(PM1_CONTROL_PORT, self.control.size, self.control, "PM1 control")
        self.ports.claim(OLD_PM1_CONTROL_PORT, self.control.size, self.control, "PM1 control")
        self.ports.claim(PM_TIMER_PORT, self.timer.size, self.timer, "PM timer")
        self.ports.claim(RESET_CONTROL_PORT, self.reset.size, self.reset, "reset control")

    def callback(self, name: str, raises: bool) -> Callable[[], None]:
        def called() -> None:
            self.happened.append(name)
            if raises:
                raise Ended(name)

        return called


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- power-off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [0x604, 0xB004])
def test_writing_0x2000_powers_off(machine: Machine, port: int) -> None:
    machine.ports.write(port, 2, 0x2000)
    assert machine.happened == ["power-off"]


def test_acpica_s_way_powers_off_with_its_second_write(machine: Machine) -> None:
    control = machine.ports.read(PM1_CONTROL_PORT, 2) & ~0x3C00 | S5_SLEEP_TYPE << 10
    machine.ports.write(PM1_CONTROL_PORT, 2, control)
    assert machine.happened == []
    machine.ports.write(PM1_CONTROL_PORT, 2, control | 0x2000)
    assert machine.happened == ["power-off"]


def test_the_byte_with_the_sleep_bits_is_enough(machine: Machine) -> None:
    machine.ports.write(PM1_CONTROL_PORT + 1, 1, 0x20)
    assert machine.happened == ["power-off"]


@pytest.mark.parametrize("sleep_type", [n for n in range(8) if n != S5_SLEEP_TYPE])
def test_sleep_states_that_do_not_exist_do_nothing(machine: Machine, sleep_type: int) -> None:
    machine.ports.write(PM1_CONTROL_PORT, 2, sleep_type << 10 | 0x2000)
    assert machine.happened == []


def test_control_reads_as_written_without_sleep_enable_and_always_in_acpi_mode(
    machine: Machine,
) -> None:
    assert machine.ports.read(PM1_CONTROL_PORT, 2) == 0x0001
    machine.ports.write(PM1_CONTROL_PORT, 2, 0x3C02)
    assert machine.ports.read(PM1_CONTROL_PORT, 2) == 0x1C03
    machine.control.reset()
    assert machine.ports.read(PM1_CONTROL_PORT, 2) == 0x0001


def test_what_ends_the_machine_passes_through_the_device() -> None:
    machine = Machine(raises=True)
    with pytest.raises(Ended, match="power-off"):
        machine.ports.write(PM1_CONTROL_PORT, 2, 0x2000)
    with pytest.raises(Ended, match="reset"):
        machine.ports.write(RESET_CONTROL_PORT, 1, RESET_VALUE)
    assert machine.ports.read(RESET_CONTROL_PORT, 1) == RESET_VALUE


# --- reset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(0x06,), (0x0E,), (0x04,), (0x02, 0x06), (0x0A, 0x0E)])
def test_reset_bit_resets_once(machine: Machine, values: tuple[int, ...]) -> None:
    for value in values:
        machine.ports.write(RESET_CONTROL_PORT, 1, value)
    assert machine.happened == ["reset"]


@pytest.mark.parametrize("value", [0x00, 0x02, 0x08, 0x0A, 0xF1])
def test_without_the_reset_bit_nothing_is_reset(machine: Machine, value: int) -> None:
    machine.ports.write(RESET_CONTROL_PORT, 1, value)
    assert machine.happened == []
    assert machine.ports.read(RESET_CONTROL_PORT, 1) == value & 0x0E


def test_only_a_reset_bit_that_was_0_resets(machine: Machine) -> None:
    machine.ports.write(RESET_CONTROL_PORT, 1, 0x06)
    machine.ports.write(RESET_CONTROL_PORT, 1, 0x0E)
    assert machine.happened == ["reset"]
    machine.reset.reset()
    machine.ports.write(RESET_CONTROL_PORT, 1, 0x06)
    assert machine.happened == ["reset", "reset"]


def test_a_pci_address_that_lies_over_the_reset_port_resets_nothing(machine: Machine) -> None:
    machine.ports.write(0xCF8, 4, 0x8000_0600)
    assert machine.happened == []


# --- PM timer ------------------------------------------------------------------------------------


def test_timer_starts_at_0_and_counts_3579545_times_a_second(machine: Machine) -> None:
    assert machine.ports.read(PM_TIMER_PORT, 4) == 0
    machine.now_ns += SECOND
    assert machine.ports.read(PM_TIMER_PORT, 4) == PM_TIMER_HZ == 3_579_545


def test_timer_wraps_at_24_bits(machine: Machine) -> None:
    machine.now_ns += 10 * SECOND
    assert machine.ports.read(PM_TIMER_PORT, 4) == 35_795_450 % (1 << 24)
    assert PM_TIMER_BITS == 24


def test_timer_loses_no_tick_in_a_year(machine: Machine) -> None:
    machine.now_ns += 365 * 86400 * SECOND
    assert machine.timer.ticks() == 365 * 86400 * PM_TIMER_HZ


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2)])
def test_timer_can_be_read_in_parts(machine: Machine, offset: int, size: int) -> None:
    machine.now_ns += SECOND
    expected = PM_TIMER_HZ.to_bytes(4, "little")[offset : offset + size]
    assert machine.ports.read(PM_TIMER_PORT + offset, size) == int.from_bytes(expected, "little")


def test_timer_cannot_be_written(machine: Machine) -> None:
    machine.now_ns += SECOND
    machine.ports.write(PM_TIMER_PORT, 4, 0)
    assert machine.ports.read(PM_TIMER_PORT, 4) == PM_TIMER_HZ


def test_a_real_clock_is_the_default() -> None:
    timer = PmTimer()
    first = timer.ticks()
    assert 0 <= first <= timer.ticks()


# --- PM1 events ----------------------------------------------------------------------------------


def test_timer_status_is_set_each_time_the_top_bit_changes_and_cleared_by_a_one(
    machine: Machine,
) -> None:
    half_period_ns = (1 << 23) * SECOND // PM_TIMER_HZ + 1
    for _ in range(3):
        assert machine.ports.read(PM1_EVENT_PORT + STATUS, 2) == 0
        machine.now_ns += half_period_ns
        assert machine.ports.read(PM1_EVENT_PORT + STATUS, 2) == 1
        machine.ports.write(PM1_EVENT_PORT + STATUS, 2, 0xFFFE)
        assert machine.ports.read(PM1_EVENT_PORT + STATUS, 2) == 1
        machine.ports.write(PM1_EVENT_PORT + STATUS, 2, 0x0001)


def test_enable_keeps_what_is_written_until_a_reset(machine: Machine) -> None:
    machine.ports.write(PM1_EVENT_PORT + ENABLE, 2, 0x0521)
    assert machine.ports.read(PM1_EVENT_PORT + ENABLE, 2) == 0x0521
    assert machine.ports.read(PM1_EVENT_PORT, 4) == 0x0521_0000
    machine.events.reset()
    assert machine.ports.read(PM1_EVENT_PORT, 4) == 0


def test_a_reset_forgets_events(machine: Machine) -> None:
    machine.now_ns += 5 * SECOND
    machine.events.reset()
    assert machine.ports.read(PM1_EVENT_PORT + STATUS, 2) == 0


# --- nonsense ------------------------------------------------------------------------------------


def test_no_access_is_too_strange(machine: Machine) -> None:
    rng = random.Random(2)
    claimed = [c.start + n for c in machine.ports.claims for n in range(c.size)]
    for _ in range(5000):
        port, size = rng.choice(claimed), rng.choice((1, 2, 4, 8))
        machine.now_ns += rng.randrange(SECOND)
        machine.ports.write(port, size, rng.getrandbits(8 * size))
        assert 0 <= machine.ports.read(port, size) < 1 << 8 * size

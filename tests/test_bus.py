"""The bus: which device answers, and what the guest sees where none does."""

from __future__ import annotations

import logging

import pytest

from pyvmm.bus import Bus, CallbackDevice
from pyvmm.devices.bytewise import BytewiseDevice
from pyvmm.devices.debugcon import DebugConsole
from pyvmm.devices.debugexit import DebugExit


class Recorder:
    """A device that remembers what was done to it and reads as 0x11223344_55667788."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.calls.append(("read", offset, size))
        return 0x1122334455667788

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("write", offset, size, value))


@pytest.fixture
def bus() -> Bus:
    return Bus("port")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_an_unclaimed_address_reads_all_ones_and_ignores_writes(bus: Bus, size: int) -> None:
    assert bus.read(0x80, size) == (1 << 8 * size) - 1
    bus.write(0x80, size, 0)
    assert bus.read(0x80, size) == (1 << 8 * size) - 1


def test_an_unclaimed_address_is_logged_once(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyvmm")
    for _ in range(3):
        bus.read(0x80, 1)
        bus.write(0x80, 2, 0)
    bus.read(0x81, 1)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "0x80" in messages[0] and "port" in messages[0] and "0x81" in messages[1]


def test_a_guest_that_touches_everything_fills_neither_the_log_nor_our_memory(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyvmm")
    for address in range(0, 1 << 20, 32):
        bus.read(address, 1)
    assert len(caplog.records) <= 1000
    assert len(bus._found) <= 4096


def test_a_device_sees_offsets_into_its_own_range(bus: Bus) -> None:
    device = Recorder()
    bus.claim(0x3F8, 8, device, "COM1")
    assert bus.read(0x3FD, 1) == 0x88
    bus.write(0x3F8, 2, 0x1234)
    assert device.calls == [("read", 5, 1), ("write", 0, 2, 0x1234)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_device_cannot_give_more_than_the_guest_reads(bus: Bus, size: int) -> None:
    bus.claim(0x10, 8, Recorder(), "device")
    assert bus.read(0x10, size) == 0x1122334455667788 & (1 << 8 * size) - 1


@pytest.mark.parametrize("value", [-1, -2, 1 << 70])
def test_a_callback_s_odd_value_is_cut_to_what_fits(bus: Bus, value: int) -> None:
    bus.claim(0x10, 1, CallbackDevice(read=lambda offset, size: value), "callback")
    assert bus.read(0x10, 1) == value & 0xFF


def test_an_access_over_the_end_belongs_to_the_device_it_starts_in(bus: Bus) -> None:
    left, right = Recorder(), Recorder()
    bus.claim(0x10, 2, left, "left")
    bus.claim(0x12, 2, right, "right")
    bus.read(0x11, 4)
    bus.write(0x11, 2, 0xABCD)
    assert left.calls == [("read", 1, 4), ("write", 1, 2, 0xABCD)]
    assert right.calls == []


def test_an_access_that_starts_before_a_device_is_unclaimed(bus: Bus) -> None:
    device = Recorder()
    bus.claim(0x10, 2, device, "device")
    assert bus.read(0xF, 2) == 0xFFFF
    assert device.calls == []


@pytest.mark.parametrize(("start", "size"), [(0x3F8, 8), (0x3F0, 9), (0x3FF, 1), (0x3FA, 2)])
def test_two_devices_at_one_address_are_an_error_that_names_both(
    bus: Bus, start: int, size: int
) -> None:
    bus.claim(0x3F8, 8, Recorder(), "COM1")
    with pytest.raises(ValueError, match="for mine is taken by COM1"):
        bus.claim(start, size, Recorder(), "mine")
    assert len(bus.claims) == 1


def test_devices_may_be_side_by_side(bus: Bus) -> None:
    bus.claim(0x3F8, 8, Recorder(), "COM1")
    bus.claim(0x3F7, 1, Recorder(), "floppy")
    bus.claim(0x400, 1, Recorder(), "other")


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, -1), (-1, 2)])
def test_an_empty_or_negative_range_is_an_error(bus: Bus, start: int, size: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        bus.claim(start, size, Recorder(), "mine")


def test_a_device_that_is_claimed_later_is_found(bus: Bus) -> None:
    assert bus.read(0x10, 1) == 0xFF  # the lookup is remembered
    bus.claim(0x10, 1, Recorder(), "late")
    assert bus.read(0x10, 1) == 0x88


def test_callbacks_that_are_missing_behave_as_no_device(bus: Bus) -> None:
    bus.claim(0, 1, CallbackDevice(), "nothing")
    bus.write(0, 1, 1)
    assert bus.read(0, 4) == 0xFFFFFFFF


# --- the small devices ---------------------------------------------------------------------------


class Bytes(BytewiseDevice):
    size = 4

    def __init__(self) -> None:
        self.registers = [1, 2, 3, 4]

    def read_byte(self, offset: int) -> int:
        return self.registers[offset]

    def write_byte(self, offset: int, value: int) -> None:
        self.registers[offset] = value


def test_a_wide_access_is_made_of_bytes_at_consecutive_offsets() -> None:
    device = Bytes()
    assert device.read(0, 4) == 0x04030201
    assert device.read(3, 4) == 0xFFFFFF04  # over the end: all ones
    device.write(2, 4, 0xAABBCCDD)
    assert device.registers == [1, 2, 0xDD, 0xCC]


def test_the_debug_console_prints_and_can_be_found() -> None:
    printed = bytearray()
    console = DebugConsole(printed.extend)
    assert console.read(0, 1) == 0xE9
    console.write(0, 1, ord("x"))
    console.write_many(b"yz")
    assert printed == b"xyz"


@pytest.mark.parametrize(
    ("value", "status"), [(0, 1), (1, 3), (0x2A, 85), (0x7F, 255), (0x80, 1), (0xFFFFFFFF, 255)]
)
def test_debug_exit_makes_an_odd_status(value: int, status: int) -> None:
    ended: list[int] = []
    DebugExit(ended.append).write(0, 4, value)
    assert ended == [status]

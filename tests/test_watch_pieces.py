"""Watchpoints in debug registers, without a host: objects of any size are watched in pieces."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.breakpoints import Breakpoints
from pyvmm.target import BreakpointKind, TargetError
from pyvmm.vcpurecord import HardwareBreakpoint

WRITE, READ, HARDWARE = BreakpointKind.WRITE, BreakpointKind.READ, BreakpointKind.HARDWARE


class FakeVm:
    """What Breakpoints asks of a VM for debug registers, on a host that has them."""

    def __init__(self) -> None:
        self.host = SimpleNamespace(hardware_breakpoint=True, watchpoint=True, breakpoint=True)
        self.registers: list[HardwareBreakpoint] = []
        self.guard, self.hlt_traps = None, set[int]()

    def vcpu_ids(self) -> range:
        return range(1)

    def set_capability(self, *_: object) -> None:
        """Only debug registers are looked at."""

    def set_hardware_breakpoints(self, vcpu_id: int, breakpoints: list[HardwareBreakpoint]) -> None:
        self.registers = breakpoints

    def read_virtual(self, vcpu_id: int, gva: int, length: int) -> bytes:
        return gva.to_bytes(8, "little")[:length]

    def watched(self) -> list[tuple[int, int]]:
        return [(register.gva, register.length) for register in self.registers]


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def breakpoints(vm: FakeVm) -> Breakpoints:
    fake: Any = vm
    return Breakpoints(fake)


@pytest.mark.parametrize(
    ("gva", "length", "pieces"),
    [
        (0x1000, 8, [(0x1000, 8)]),
        (0x1000, 16, [(0x1000, 8), (0x1008, 8)]),
        (0x1000, 32, [(0x1000, 8), (0x1008, 8), (0x1010, 8), (0x1018, 8)]),
        (0x1000, 3, [(0x1000, 2), (0x1002, 1)]),
        (0x1004, 8, [(0x1004, 4), (0x1008, 4)]),
        (0x1003, 6, [(0x1003, 1), (0x1004, 4), (0x1008, 1)]),
        ((1 << 64) - 16, 16, [((1 << 64) - 16, 8), ((1 << 64) - 8, 8)]),
    ],
)
def test_pieces_are_aligned_and_removed_together(
    vm: FakeVm, breakpoints: Breakpoints, gva: int, length: int, pieces: list[tuple[int, int]]
) -> None:
    breakpoints.insert_hardware(0, WRITE, gva, length)
    breakpoints.insert_hardware(0, WRITE, gva, length)  # twice is fine
    assert vm.watched() == pieces
    breakpoints.remove_hardware(WRITE, gva, length)
    assert vm.watched() == []


def test_all_or_nothing(vm: FakeVm, breakpoints: Breakpoints) -> None:
    breakpoints.insert_hardware(0, HARDWARE, 0x5001, 1)
    breakpoints.insert_hardware(0, WRITE, 0x1000, 8)
    before = vm.watched()
    for gva, length in ((0x2000, 24), (0x1003, 9), (0, 1 << 40)):
        with pytest.raises(TargetError, match=r"more debug registers than are free \(2\)") as error:
            breakpoints.insert_hardware(0, WRITE, gva, length)
        assert error.value.errno == errno.ENOSPC
    assert vm.watched() == before
    breakpoints.insert_hardware(0, WRITE, 0x2000, 16)
    with pytest.raises(TargetError, match="all four debug registers are in use"):
        breakpoints.insert_hardware(0, WRITE, 0x3000, 1)
    assert breakpoints.clear() == 3, "as many as the debugger has set"
    assert vm.watched() == []


def test_a_piece_that_two_objects_share_stays_until_both_are_removed(
    vm: FakeVm, breakpoints: Breakpoints
) -> None:
    breakpoints.insert_hardware(0, WRITE, 0x1000, 16)
    breakpoints.insert_hardware(0, WRITE, 0x1008, 8)
    breakpoints.insert_hardware(0, READ, 0x1008, 8)  # another kind: a register of its own
    assert vm.watched() == [(0x1000, 8), (0x1008, 8), (0x1008, 8)]
    breakpoints.remove_hardware(WRITE, 0x1000, 16)
    assert vm.watched() == [(0x1008, 8), (0x1008, 8)]
    breakpoints.remove_hardware(WRITE, 0x1008, 8)
    breakpoints.remove_hardware(WRITE, 0x1008, 8)
    assert [watch.kind for watch in breakpoints.watches] == [READ]


def test_each_piece_of_what_is_read_has_a_value_of_its_own(breakpoints: Breakpoints) -> None:
    breakpoints.insert_hardware(0, READ, 0x1000, 12)
    assert [watch.value for watch in breakpoints.watches] == [
        (0x1000).to_bytes(8, "little"),
        (0x1008).to_bytes(4, "little"),
    ]

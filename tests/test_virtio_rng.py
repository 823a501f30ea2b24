"""The entropy source."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from pyvmm.devices.virtio_rng import VirtioRng
from tests.virtio_driver import RAM, Driver, guest_memory


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A driver that is ready."""
    with guest_memory() as memory:
        driver = Driver(VirtioRng(), memory).start()
        yield driver
        driver.mmio.reset()


def test_it_is_an_entropy_source(driver: Driver) -> None:
    assert driver.get(0x008) == 4


def test_buffers_are_filled_with_the_host_s_random_numbers(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getrandom", lambda size: bytes(range(size)))
    queue = driver.queues[0]
    head = queue.offer([], [4, 6])
    driver.notify()
    assert queue.take() == [(head, 10)]
    assert queue.written(head) == bytes(range(10))
    assert driver.line


def test_no_two_answers_are_the_same(driver: Driver) -> None:
    queue = driver.queues[0]
    heads = [queue.offer([], [16]) for _ in range(4)]
    driver.notify()
    assert len({queue.written(head) for head in heads}) == 4


def test_a_driver_that_asks_for_much_gets_some(driver: Driver) -> None:
    queue = driver.queues[0]
    queue.describe(0, RAM // 2, RAM // 2, 2)
    queue.offer_head(0)
    driver.notify()
    ((_, written),) = queue.take()
    assert 0 < written <= RAM // 2
    assert any(driver.memory.read(RAM // 2, written))
    assert not any(driver.memory.read(RAM // 2 + written, RAM // 2 - written))


def test_a_chain_without_room_gets_nothing(driver: Driver) -> None:
    queue = driver.queues[0]
    queue.offer([b"only to read"])
    driver.notify()
    assert queue.take() == [(0, 0)]


@pytest.mark.parametrize("seed", range(5))
def test_it_survives_being_made_to_write_over_its_own_queue(driver: Driver, seed: int) -> None:
    random_numbers = random.Random(seed)
    for _ in range(50):
        queue = driver.queues[0]
        gpa = random_numbers.choice([queue.descriptors, queue.available, queue.used])
        queue.describe(0, gpa, random_numbers.choice([2, 64, 4096]), 2)
        queue.offer_head(0)
        driver.notify()
        driver.start()
    queue = driver.queues[0]
    head = queue.offer([], [8])
    driver.notify()
    assert queue.take() == [(head, 8)]

"""The virtio console: output, input that waits for the guest, and the size of the terminal."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest

from pyvmm import cli
from pyvmm.devices.virtio_console import VirtioConsole
from tests.support import PATIENCE
from tests.virtio_driver import RAM, Areas, Driver, guest_memory

RECEIVE, TRANSMIT = 0, 1
USED, CONFIG = 1, 2


class Terminal:
    """What is outside of the console."""

    def __init__(self) -> None:
        self.printed = bytearray()
        self.pieces: list[int] = []
        self.told_of_room = 0

    def transmit(self, data: bytes) -> None:
        self.printed += data
        self.pieces.append(len(data))

    def on_room(self) -> None:
        self.told_of_room += 1


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def console(terminal: Terminal) -> VirtioConsole:
    return VirtioConsole(terminal.transmit, terminal.on_room, 80, 25)


@pytest.fixture
def driver(console: VirtioConsole) -> Iterator[Driver]:
    """A driver that is ready, and has given no buffer for input."""
    with guest_memory() as memory:
        driver = Driver(console, memory).start()
        driver.acknowledge()
        yield driver
        driver.mmio.reset()


def give_buffers(driver: Driver, *sizes: int) -> list[int]:
    """Offer buffers for input; returns their heads."""
    heads = [driver.queues[RECEIVE].offer([], [size]) for size in sizes]
    driver.notify(RECEIVE)
    return heads


def received(driver: Driver) -> bytes:
    """The input that the guest has got since the last time."""
    queue: Areas = driver.queues[RECEIVE]
    return b"".join(queue.written(head)[:written] for head, written in queue.take())


# --- output --------------------------------------------------------------------------------------


def test_what_the_guest_sends_is_printed_at_once(driver: Driver, terminal: Terminal) -> None:
    queue = driver.queues[TRANSMIT]
    head = queue.offer([b"hello, ", b"world\n"])
    driver.notify(TRANSMIT)
    assert terminal.printed == b"hello, world\n"
    assert queue.take() == [(head, 0)]
    assert driver.acknowledge() == USED


def test_much_output_is_printed_in_pieces(driver: Driver, terminal: Terminal) -> None:
    queue = driver.queues[TRANSMIT]
    queue.describe(0, RAM // 2, RAM // 2)
    queue.offer_head(0)
    driver.notify(TRANSMIT)
    assert sum(terminal.pieces) == RAM // 2
    assert max(terminal.pieces) <= 1 << 16


def test_a_buffer_to_write_into_prints_nothing(driver: Driver, terminal: Terminal) -> None:
    queue = driver.queues[TRANSMIT]
    queue.offer([], [10])
    driver.notify(TRANSMIT)
    assert queue.take() == [(0, 0)]
    assert terminal.printed == b""


# --- input ---------------------------------------------------------------------------------------


def test_input_goes_into_the_guest_s_buffer(driver: Driver, console: VirtioConsole) -> None:
    (head,) = give_buffers(driver, 10)
    assert console.receive(b"abc") == 3
    assert driver.line
    assert driver.queues[RECEIVE].written(head)[:3] == b"abc"
    assert driver.queues[RECEIVE].take() == [(head, 3)]


def test_input_fills_as_many_buffers_as_it_needs(driver: Driver, console: VirtioConsole) -> None:
    give_buffers(driver, 2, 2, 2, 2)
    console.receive(b"abcde")
    assert received(driver) == b"abcde"
    console.receive(b"f")
    assert received(driver) == b"f"


def test_input_waits_until_there_are_buffers(driver: Driver, console: VirtioConsole) -> None:
    console.receive(b"typed early")
    assert not driver.line
    give_buffers(driver, 5)
    assert received(driver) == b"typed"
    give_buffers(driver, 100)
    assert received(driver) == b" early"


def test_input_waits_for_a_driver(console: VirtioConsole) -> None:
    with guest_memory() as memory:
        driver = Driver(console, memory)
        assert console.receive(b"very early") == 10
        driver.start()
        give_buffers(driver, 100)
        assert received(driver) == b"very early"
        driver.mmio.reset()


def test_no_more_is_taken_than_there_is_room_for(
    driver: Driver, console: VirtioConsole, terminal: Terminal
) -> None:
    room = console.room()
    assert console.receive(bytes(room - 1)) == room - 1
    assert console.room() == 1
    assert console.receive(b"abc") == 1
    assert (console.room(), console.receive(b"d")) == (0, 0)
    assert terminal.told_of_room == 0
    give_buffers(driver, 10)
    assert terminal.told_of_room == 1
    assert console.room() == 10
    give_buffers(driver, 10)
    assert terminal.told_of_room == 1  # only when there was none before


def test_input_is_taken_while_the_output_is_stuck(
    driver: Driver, console: VirtioConsole, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that reads the keyboard must never wait for one that prints."""
    stuck, go_on = threading.Event(), threading.Event()

    def transmit(data: bytes) -> None:
        stuck.set()
        assert go_on.wait(PATIENCE)

    monkeypatch.setattr(console, "_transmit", transmit)
    give_buffers(driver, 10)
    driver.queues[TRANSMIT].offer([b"x"])
    vcpu = threading.Thread(target=driver.notify, args=(TRANSMIT,))
    vcpu.start()
    assert stuck.wait(PATIENCE)
    assert console.receive(b"\x03") == 1
    assert received(driver) == b"\x03"
    go_on.set()
    vcpu.join(PATIENCE)


def test_a_buffer_that_cannot_be_written_gets_no_input(
    driver: Driver, console: VirtioConsole
) -> None:
    driver.queues[RECEIVE].offer([b"readable"])
    give_buffers(driver, 10)
    console.receive(b"abc")
    assert [written for _, written in driver.queues[RECEIVE].take()] == [0, 3]


def test_a_reset_of_the_machine_forgets_input(driver: Driver, console: VirtioConsole) -> None:
    console.receive(b"for the guest that was")
    driver.mmio.reset()
    console.reset()
    driver.start()
    give_buffers(driver, 100)
    assert received(driver) == b""


# --- the size ------------------------------------------------------------------------------------


def size(driver: Driver) -> tuple[int, int]:
    """Columns and rows, as the driver reads them."""
    return driver.mmio.read(0x100, 2), driver.mmio.read(0x102, 2)


def test_the_guest_knows_the_terminal_s_size(driver: Driver) -> None:
    assert driver.get(0x008) == 3
    assert driver.features() & 0xFF == 1
    assert size(driver) == (80, 25)


def test_a_driver_is_made_to_look_at_the_size_when_it_is_ready(driver: Driver) -> None:
    """Linux's reads it only after such an interrupt."""
    driver.start()
    assert driver.acknowledge() == CONFIG


def test_another_size_is_told_at_once(driver: Driver, console: VirtioConsole) -> None:
    console.resize(132, 50)
    assert driver.acknowledge() == CONFIG
    assert size(driver) == (132, 50)


def test_a_size_that_nobody_listens_to_is_there_later(console: VirtioConsole) -> None:
    with guest_memory() as memory:
        driver = Driver(console, memory)
        console.resize(132, 50)
        assert not driver.line
        driver.start()
        assert size(driver) == (132, 50)
        driver.mmio.reset()


@pytest.mark.parametrize("seed", range(5))
def test_a_console_survives_any_chains(
    driver: Driver, console: VirtioConsole, terminal: Terminal, seed: int
) -> None:
    random_numbers = random.Random(seed)
    for _ in range(200):
        queue = random_numbers.choice(driver.queues)
        queue.forget_buffers()
        parts = [random_numbers.randrange(1, 9) for _ in range(random_numbers.randrange(1, 4))]
        if random_numbers.random() < 0.5:
            queue.offer([bytes(part) for part in parts])
        else:
            queue.offer([], parts, indirect=random_numbers.random() < 0.5)
        if random_numbers.random() < 0.1:
            queue.describe(random_numbers.randrange(queue.size), RAM, 16, 7, 0)
        driver.notify(random_numbers.randrange(3))
        console.receive(random_numbers.randbytes(random_numbers.randrange(9)))
        for queue in driver.queues:
            queue.take()
        if driver.needs_reset or random_numbers.random() < 0.05:
            driver.start()
    driver.start()
    driver.queues[TRANSMIT].offer([b"the end"])
    driver.notify(TRANSMIT)
    assert terminal.printed.endswith(b"the end")


def test_a_terminal_s_other_size_is_told_once(
    driver: Driver, console: VirtioConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [os.terminal_size((80, 25))]
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: now[0])
    look = cli._WindowSize(console)
    look()
    assert driver.acknowledge() == 0
    now[0] = os.terminal_size((100, 30))
    look()
    assert (driver.acknowledge(), size(driver)) == (CONFIG, (100, 30))
    look()
    assert driver.acknowledge() == 0

"""The registers of a virtio device, and what a driver can do with them in the wrong order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from pyvmm.devices.virtio import VirtioDevice, VirtioMmio
from pyvmm.devices.virtqueue import Virtqueue, fill
from pyvmm.memory import GuestMemory
from tests.support import PATIENCE
from tests.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    RAM,
    VERSION_1,
    Areas,
    Driver,
    guest_memory,
)

USED, CONFIG = 1, 2  # reasons of an interrupt
INDIRECT_DESC = 1 << 28
OWN_FEATURE = 1 << 5
WIDTHS = (1, 2, 4, 8)


class Echo(VirtioDevice):
    """Returns what is in a chain; its second queue only counts."""

    device_id = 42
    features = OWN_FEATURE
    queue_sizes = (256, 16)
    config = b"configuration"

    def __init__(self) -> None:
        self.counted = 0
        self.chains_before_a_pause = 0
        self.pause, self.paused = threading.Event(), threading.Event()

    def serve(self, number: int, queue: Virtqueue) -> None:
        if number == 1:
            self.counted += 1
            return
        for chain in queue.chains():
            data = b"".join(bytes(buffer) for buffer in chain.readable)[:4096]
            queue.push(chain, fill(chain.writable, data))
            if self.chains_before_a_pause:
                self.chains_before_a_pause -= 1
                if not self.chains_before_a_pause:
                    self.paused.set()
                    assert self.pause.wait(PATIENCE)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory() as memory:
        yield memory


@pytest.fixture
def driver(memory: GuestMemory) -> Iterator[Driver]:
    """A driver that has done nothing yet."""
    driver = Driver(Echo(), memory)
    yield driver
    driver.mmio.reset()


def device(driver: Driver) -> Echo:
    found = driver.mmio.device
    assert isinstance(found, Echo)
    return found


# --- what it is ----------------------------------------------------------------------------------


def test_the_registers_say_what_it_is(driver: Driver) -> None:
    assert driver.get(0x000).to_bytes(4, "little") == b"virt"
    assert (driver.get(0x004), driver.get(0x008)) == (2, 42)
    assert driver.get(0x070) == 0


def test_a_device_offers_its_own_features_and_those_of_all_devices(driver: Driver) -> None:
    assert driver.features() == OWN_FEATURE | INDIRECT_DESC | VERSION_1
    for word in (2, 0xFFFF_FFFF):
        driver.set(0x014, word)
        assert driver.get(0x010) == 0


def test_only_queues_that_there_are_have_a_size(driver: Driver) -> None:
    sizes = []
    for number in (0, 1, 2, 0xFFFF_FFFF):
        driver.set(0x030, number)
        sizes.append((driver.get(0x034), driver.get(0x044)))
    assert sizes == [(256, 0), (16, 0), (0, 0), (0, 0)]


def test_there_is_no_shared_memory(driver: Driver) -> None:
    assert {driver.get(offset) for offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC)} == {0xFFFF_FFFF}


@pytest.mark.parametrize(
    "offset, size, text", [(0, 1, b"c"), (1, 2, b"on"), (4, 4, b"igur"), (5, 8, b"guration")]
)
def test_the_configuration_is_read_in_any_width(
    driver: Driver, offset: int, size: int, text: bytes
) -> None:
    assert driver.mmio.read(0x100 + offset, size).to_bytes(size, "little") == text


def test_behind_the_configuration_there_are_zeros(driver: Driver) -> None:
    assert driver.mmio.read(0x10C, 4).to_bytes(4, "little") == b"n\0\0\0"
    assert driver.mmio.read(0x1FC, 8) == 0


@pytest.mark.parametrize("offset, size", [(0, 1), (0, 2), (0, 8), (2, 4), (0x34, 2), (0x0F0, 4)])
def test_registers_that_are_not_there_read_zero(driver: Driver, offset: int, size: int) -> None:
    assert driver.mmio.read(offset, size) == 0


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features, agreed",
    [
        (VERSION_1, True),
        (VERSION_1 | OWN_FEATURE | INDIRECT_DESC, True),
        (OWN_FEATURE, False),  # a legacy driver
        (0, False),
        (VERSION_1 | 1 << 6, False),  # not offered
        (VERSION_1 | 1 << 63, False),
    ],
)
def test_a_driver_must_choose_version_1_and_what_is_offered(
    driver: Driver, features: int, agreed: bool
) -> None:
    assert driver.choose(features) == agreed


def test_features_are_chosen_once(driver: Driver) -> None:
    assert driver.choose(VERSION_1)
    driver.set(0x024, 0)
    driver.set(0x020, OWN_FEATURE)
    assert driver.mmio.has(VERSION_1)
    assert not driver.mmio.has(OWN_FEATURE)


def test_a_driver_that_was_refused_can_choose_again(driver: Driver) -> None:
    assert not driver.choose(VERSION_1 | 1 << 6)
    assert driver.choose(VERSION_1 | OWN_FEATURE)
    assert driver.mmio.has(OWN_FEATURE)


def test_a_device_does_nothing_for_a_driver_that_was_refused(driver: Driver) -> None:
    with pytest.raises(AssertionError):
        driver.start(OWN_FEATURE)
    driver.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    driver.notify(1)
    assert device(driver).counted == 0


# --- at work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_comes_back_with_an_interrupt(driver: Driver, indirect: bool) -> None:
    queue = driver.start().queues[0]
    head = queue.offer([b"hello, ", b"world"], [5, 20], indirect=indirect)
    driver.notify()
    assert driver.line
    assert queue.take() == [(head, 12)]
    assert queue.written(head)[:12] == b"hello, world"


def test_the_interrupt_is_high_until_all_its_reasons_are_acknowledged(driver: Driver) -> None:
    queue = driver.start().queues[0]
    queue.offer([b"x"], [1])
    driver.notify()
    driver.mmio.change_config(b"other")
    assert driver.get(0x060) == USED | CONFIG
    driver.set(0x064, USED)
    assert (driver.line, driver.get(0x060)) == (True, CONFIG)
    driver.set(0x064, 0xFFFF_FFFF)
    assert (driver.line, driver.get(0x060)) == (False, 0)


def test_what_was_not_acknowledged_is_another_edge(driver: Driver) -> None:
    """It may have come after the handler has looked, and where only edges count was not seen."""
    queue = driver.start().queues[0]
    queue.offer([b"x"], [1])
    driver.notify()
    seen = driver.get(0x060)
    driver.mmio.change_config(b"other")
    assert driver.interrupts == 1  # the line was high
    driver.set(0x064, seen)
    assert (driver.interrupts, driver.acknowledge()) == (2, CONFIG)
    assert driver.interrupts == 2


def test_a_driver_that_wants_no_interrupt_gets_none(driver: Driver) -> None:
    queue = driver.start().queues[0]
    queue.put(queue.available, 2, 1)
    queue.offer([b"x"], [1])
    driver.notify()
    assert queue.take() == [(0, 1)]
    assert not driver.line
    assert driver.get(0x060) == 0


def test_each_queue_is_looked_at_by_its_own_notification(driver: Driver) -> None:
    driver.start()
    for number in (1, 1, 2, 0xFFFF, 0xFFFF_FFFF):
        driver.notify(number)
    assert device(driver).counted == 2


def test_nothing_is_touched_before_the_driver_is_ready(driver: Driver) -> None:
    driver.choose(VERSION_1)
    queue = Areas(driver.memory, 0x10000, 8)
    driver.set_up_queue(0, queue)
    queue.offer([b"x"], [1])
    driver.notify()
    assert queue.take() == []
    driver.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    driver.notify()
    assert queue.take() == [(0, 1)]


def test_a_queue_that_is_not_ready_is_not_touched(driver: Driver) -> None:
    queue = driver.start().queues[0]
    driver.set(0x030, 0)
    driver.set(0x044, 0)
    assert driver.get(0x044) == 0
    queue.offer([b"x"], [1])
    driver.notify()
    assert queue.take() == []


def test_a_queue_can_be_set_up_again(driver: Driver) -> None:
    driver.start()
    driver.set(0x030, 0)
    driver.set(0x044, 0)
    queue = Areas(driver.memory, 0x80000, 4)
    driver.set_up_queue(0, queue)
    assert driver.get(0x044) == 1
    queue.offer([b"moved"], [5])
    driver.notify()
    assert queue.written(0) == b"moved"


def test_a_queue_in_use_cannot_be_moved(driver: Driver) -> None:
    queue = driver.start().queues[0]
    driver.set_up_queue(0, Areas(driver.memory, 0x80000, 4))
    queue.offer([b"here"], [4])
    driver.notify()
    assert queue.written(0) == b"here"


def test_the_bus_is_told_when_the_driver_is_ready_and_of_notifications(driver: Driver) -> None:
    heard: list[object] = []
    driver.mmio.on_ready = lambda: heard.append("ready")
    driver.mmio.on_notify = heard.append
    driver.start()
    driver.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)  # again
    driver.notify(1)
    assert heard == ["ready", 1]


# --- configuration changes -----------------------------------------------------------------------


def test_a_change_of_the_configuration_is_an_interrupt_and_another_generation(
    driver: Driver,
) -> None:
    driver.start()
    generation = driver.get(0x0FC)
    driver.mmio.change_config(b"new")
    assert driver.acknowledge() == CONFIG
    assert driver.get(0x0FC) != generation
    assert driver.mmio.read(0x100, 4) == int.from_bytes(b"new", "little")


def test_a_driver_that_is_not_ready_is_not_interrupted(driver: Driver) -> None:
    driver.mmio.change_config(b"new")
    assert not driver.line
    assert driver.get(0x060) == 0


# --- broken queues, and resets -------------------------------------------------------------------


def break_queue(driver: Driver) -> None:
    """Offer a chain that is outside of memory."""
    queue = driver.queues[0]
    queue.describe(0, RAM, 4)
    queue.offer_head(0)
    driver.notify()


def test_a_broken_queue_makes_the_device_ask_for_a_reset(driver: Driver) -> None:
    driver.start()
    break_queue(driver)
    assert driver.needs_reset
    assert driver.line
    assert driver.acknowledge() == CONFIG


def test_a_broken_device_does_nothing_more(driver: Driver) -> None:
    driver.start()
    break_queue(driver)
    driver.notify(1)
    assert device(driver).counted == 0
    driver.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)  # NEEDS_RESET is not its own
    assert driver.needs_reset


def test_what_was_done_before_the_queue_broke_is_reported(driver: Driver) -> None:
    queue = driver.start().queues[0]
    head = queue.offer([b"fine"], [4])
    queue.describe(7, RAM, 4)
    queue.offer_head(7)
    driver.notify()
    assert queue.take() == [(head, 4)]
    assert driver.acknowledge() == USED | CONFIG


def test_a_broken_device_works_after_a_reset(driver: Driver) -> None:
    driver.start()
    break_queue(driver)
    queue = driver.start().queues[0]
    assert not driver.needs_reset
    queue.offer([b"again"], [5])
    driver.notify()
    assert queue.written(0) == b"again"


@pytest.mark.parametrize("ready", [False, True])
def test_a_queue_that_cannot_be_enabled_breaks_the_device(driver: Driver, ready: bool) -> None:
    driver.choose(VERSION_1)
    if ready:
        driver.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    driver.set_up_queue(0, Areas(driver.memory, 0x10000, 5))
    assert driver.get(0x044) == 0
    assert driver.needs_reset
    assert driver.line == ready  # only a driver that is ready may be interrupted


def test_a_reset_forgets_everything(driver: Driver) -> None:
    queue = driver.start().queues[0]
    queue.offer([b"x"], [1])
    driver.notify()
    assert driver.line
    driver.set(0x070, 0)
    assert not driver.line
    assert (driver.get(0x070), driver.get(0x060)) == (0, 0)
    for number in (0, 1):
        driver.set(0x030, number)
        assert driver.get(0x044) == 0
    queue.offer([b"x"], [1])
    driver.notify()
    assert driver.get(0x060) == 0


def test_a_reset_waits_for_the_device_and_then_there_is_nothing_left_of_its_work(
    driver: Driver,
) -> None:
    queue = driver.start().queues[0]
    echo = device(driver)
    echo.chains_before_a_pause = 1
    for _ in range(3):
        queue.offer([b"x"], [1])
    worker = threading.Thread(target=driver.notify)
    worker.start()
    assert echo.paused.wait(PATIENCE)
    resetter = threading.Thread(target=driver.set, args=(0x070, 0))
    resetter.start()
    while driver.mmio.queues[0].ready:  # until the reset has begun
        resetter.join(0.001)
    assert resetter.is_alive()
    echo.pause.set()
    worker.join(PATIENCE)
    resetter.join(PATIENCE)
    assert len(queue.take()) == 1
    assert (driver.get(0x070), driver.get(0x060), driver.line) == (0, 0, False)


def test_a_device_that_breaks_during_a_reset_is_reset(driver: Driver) -> None:
    """The driver waits until Status reads 0, and so must see it."""
    queue = driver.start().queues[0]
    echo = device(driver)
    echo.chains_before_a_pause = 1
    queue.offer([b"x"], [1])
    worker = threading.Thread(target=driver.notify)
    worker.start()
    assert echo.paused.wait(PATIENCE)
    driver.mmio._need_reset()
    resetter = threading.Thread(target=driver.set, args=(0x070, 0))
    resetter.start()
    echo.pause.set()
    worker.join(PATIENCE)
    resetter.join(PATIENCE)
    assert driver.get(0x070) == 0


# --- nonsense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_every_offset_can_be_read_and_written_in_every_width(driver: Driver, width: int) -> None:
    for value in (0, 1, 0xFF, (1 << 8 * width) - 1):
        for offset in range(VirtioMmio.size):
            driver.mmio.write(offset, width, value)
            assert 0 <= driver.mmio.read(offset, width) < 1 << 8 * width


COMMON_REGISTERS = (
    *(0x014, 0x020, 0x024, 0x030, 0x038, 0x044, 0x050, 0x064, 0x070),
    *(0x080, 0x090, 0x0A0),
)


def wild_register(random_numbers: random.Random, driver: Driver) -> None:
    """Write something somewhere, often something that makes sense."""
    offset = random_numbers.choice([*COMMON_REGISTERS, random_numbers.randrange(VirtioMmio.size)])
    value = random_numbers.choice(
        [0, 1, 2, 4, 8, 15, 16, 0x4F, 256, 0x10000, 0x12000, 0x14000, RAM, 0xFFFF_FFFF]
    )
    width = random_numbers.choice([4, 4, 4, 4, 1, 2, 8])
    driver.mmio.write(offset, width, value)
    driver.mmio.read(offset, width)


def check_usable(driver: Driver) -> None:
    """Whatever was done to it, a driver can begin again."""
    queue = driver.start().queues[0]
    assert not driver.needs_reset
    head = queue.offer([b"still here"], [10])
    driver.notify()
    assert queue.written(head) == b"still here"


@pytest.mark.parametrize("seed", range(10))
def test_a_device_survives_any_registers_and_any_queues(driver: Driver, seed: int) -> None:
    random_numbers = random.Random(seed)
    for _ in range(100):
        if random_numbers.random() < 0.5:
            driver.start()
        for _ in range(40):
            if random_numbers.random() < 0.2:
                gpa = random_numbers.choice([0x10000, 0x12000, 0x14000, 0x30000])
                driver.memory.write(gpa, random_numbers.randbytes(64))
            wild_register(random_numbers, driver)
    check_usable(driver)


def test_a_device_survives_several_vcpus_at_once(driver: Driver) -> None:
    failures: list[BaseException] = []

    def vcpu(seed: int) -> None:
        random_numbers = random.Random(seed)
        try:
            for _ in range(2000):
                if random_numbers.random() < 0.05:
                    driver.mmio.write(0x070, 4, 0)
                wild_register(random_numbers, driver)
                driver.memory.write(0x10080, random_numbers.randbytes(8))
        except BaseException as error:
            failures.append(error)

    driver.start()
    threads = [threading.Thread(target=vcpu, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    check_usable(driver)

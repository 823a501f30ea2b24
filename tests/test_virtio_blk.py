"""The guest's disk: requests as a driver makes them, and what a driver or a host does wrong."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.devices.virtio_blk import VirtioBlk
from pyvmm.disk import Disk
from pyvmm.memory import GuestMemory
from tests.virtio_driver import FAR_GPA, RAM, VERSION_1, Driver, guest_memory

SECTOR, SECTORS = 512, 64
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_DISCARD, F_WRITE_ZEROES = (
    1 << bit for bit in (2, 5, 6, 9, 13, 14)
)
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 64 sectors, each full of its number."""
    file = tmp_path / "disk.img"
    file.write_bytes(b"".join(bytes((n,)) * SECTOR for n in range(SECTORS)))
    return file


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory() as memory:
        yield memory


@pytest.fixture
def attach(path: Path, memory: GuestMemory) -> Iterator[Callable[..., Driver]]:
    """Makes a driver of a disk."""
    drivers: list[Driver] = []

    def make(*, readonly: bool = False) -> Driver:
        drivers.append(Driver(VirtioBlk(Disk(str(path), readonly=readonly)), memory))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.mmio.reset()
        driver.mmio.device.close()


@pytest.fixture
def driver(attach: Callable[..., Driver]) -> Driver:
    """A driver that is ready."""
    return attach().start()


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def request(
    driver: Driver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0
) -> tuple[int, bytes]:
    """Make a request; the status, and what was read."""
    queue = driver.queues[0]
    queue.forget_buffers()
    readable = [header(kind, sector), data] if data else [header(kind, sector)]
    head = queue.offer(readable, [room, 1] if room else [1])
    gpa, _ = queue.writable[head][-1]
    queue.put(gpa, 1, 0xAA)
    driver.notify()
    ((returned, written),) = queue.take()
    assert returned == head
    answer = queue.written(head)
    if answer[-1] == OK and kind != GET_ID:
        assert written == room + 1
    return answer[-1], answer[:-1]


def ranges(*parts: tuple[int, int, int]) -> bytes:
    """Sector, sectors, flags."""
    return b"".join(struct.pack("<QII", *part) for part in parts)


# --- what it says of itself ----------------------------------------------------------------------


def test_the_configuration_tells_the_size_and_the_limits(driver: Driver) -> None:
    def number(offset: int, size: int) -> int:
        return driver.mmio.read(0x100 + offset, size)

    assert driver.get(0x008) == 2
    assert number(0, 4) | number(4, 4) << 32 == SECTORS
    assert number(12, 4) == 254  # segments: the queue without header and status
    assert number(20, 4) == SECTOR
    driver.set(0x030, 0)
    assert driver.get(0x034) == 256
    assert [number(offset, 4) for offset in (36, 40, 44)] == [1 << 17, 32, 1]  # discard
    assert [number(offset, 4) for offset in (48, 52)] == [1 << 17, 32]  # write zeroes
    assert number(56, 1) == 1  # which may unmap


@pytest.mark.parametrize("readonly", [False, True])
def test_only_a_disk_that_can_be_written_has_discard(
    attach: Callable[..., Driver], readonly: bool
) -> None:
    features = attach(readonly=readonly).features() & 0xFFFF_FFF
    always = F_SEG_MAX | F_BLK_SIZE | F_FLUSH
    assert features == always | (F_RO if readonly else F_DISCARD | F_WRITE_ZEROES)


def test_the_disk_has_its_file_s_name(driver: Driver) -> None:
    assert request(driver, GET_ID, room=20) == (OK, b"disk.img".ljust(20, b"\0"))
    assert request(driver, GET_ID, room=4) == (OK, b"disk")
    assert request(driver, GET_ID, room=30) == (OK, b"disk.img".ljust(30, b"\0"))


# --- reading and writing -------------------------------------------------------------------------


def test_sectors_are_read(driver: Driver) -> None:
    assert request(driver, IN, 5, room=2 * SECTOR) == (OK, b"\5" * SECTOR + b"\6" * SECTOR)
    assert request(driver, IN, SECTORS - 1, room=SECTOR) == (OK, b"\x3f" * SECTOR)


def test_sectors_are_written(driver: Driver, path: Path) -> None:
    assert request(driver, OUT, 7, b"x" * SECTOR * 3) == (OK, b"")
    after = path.read_bytes()
    assert after[7 * SECTOR : 10 * SECTOR] == b"x" * SECTOR * 3
    assert (after[7 * SECTOR - 1], after[10 * SECTOR]) == (6, 10)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_may_be_cut_into_buffers_anywhere(
    driver: Driver, path: Path, indirect: bool
) -> None:
    """Header, data and status need not have buffers of their own."""
    queue = driver.queues[0]
    whole = header(OUT, 1) + b"w" * SECTOR
    queue.offer([whole[:3], whole[3:20], whole[20:]], [1], indirect=indirect)
    driver.notify()
    assert path.read_bytes()[SECTOR : 2 * SECTOR] == b"w" * SECTOR
    head = queue.offer([header(IN, 1)[:9], header(IN, 1)[9:]], [100, 413], indirect=indirect)
    driver.notify()
    assert queue.written(head) == b"w" * SECTOR + bytes((OK,))
    assert [written for _, written in queue.take()] == [1, SECTOR + 1]


def test_requests_that_are_queued_together_are_one_interrupt(driver: Driver) -> None:
    queue = driver.queues[0]
    for sector in range(2):
        queue.offer([header(IN, sector)], [SECTOR, 1])
    driver.notify()
    assert len(queue.take()) == 2
    assert driver.interrupts == 1


def test_a_slow_request_does_not_hold_up_the_news_of_the_others(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))  # each takes a second
    queue = driver.queues[0]
    for sector in range(2):
        queue.offer([header(IN, sector)], [SECTOR, 1])
    told: list[int] = []
    driver.mmio.queues[0]._interrupt = lambda: told.append(len(queue.take()))
    driver.notify()
    assert told == [1, 1]


@pytest.mark.parametrize(
    "kind, sector, data, room",
    [
        (IN, SECTORS, b"", SECTOR),
        (IN, SECTORS - 1, b"", 2 * SECTOR),
        (IN, 2**64 - 1, b"", SECTOR),
        (IN, 2**55, b"", SECTOR),  # 512 times that is 0 in 64 bits
        (IN, 0, b"", 100),
        (IN, 0, b"", SECTOR + 1),
        (OUT, SECTORS, b"x" * SECTOR, 0),
        (OUT, SECTORS - 1, b"x" * SECTOR * 2, 0),
        (OUT, 2**55, b"x" * SECTOR, 0),
        (OUT, 0, b"x" * 511, 0),
    ],
)
def test_sectors_that_there_are_not_are_an_i_o_error(
    driver: Driver, path: Path, kind: int, sector: int, data: bytes, room: int
) -> None:
    before = path.read_bytes()
    assert request(driver, kind, sector, data, room)[0] == IOERR
    assert path.read_bytes() == before
    assert not driver.needs_reset


def test_a_read_that_failed_promises_no_data(driver: Driver) -> None:
    queue = driver.queues[0]
    queue.offer([header(IN, SECTORS)], [SECTOR, 1])
    driver.notify()
    assert [written for _, written in queue.take()] == [0]


@pytest.mark.parametrize("kind", [2, 3, 5, 10, 14, 15, 0x8000_0000, 0xFFFF_FFFF])
def test_requests_of_other_kinds_are_unsupported(driver: Driver, kind: int) -> None:
    assert request(driver, kind, 0, b"x" * SECTOR)[0] == UNSUPP
    assert request(driver, kind, 0, b"", SECTOR)[0] == UNSUPP


@pytest.mark.parametrize(
    "kind, data",
    [(OUT, b"x" * SECTOR), (DISCARD, ranges((0, 1, 0))), (WRITE_ZEROES, ranges((0, 1, 0)))],
)
def test_a_read_only_disk_is_never_changed(
    attach: Callable[..., Driver], path: Path, kind: int, data: bytes
) -> None:
    driver = attach(readonly=True).start()
    before = path.read_bytes()
    assert request(driver, kind, 0, data)[0] == IOERR
    assert path.read_bytes() == before
    assert request(driver, IN, 3, room=SECTOR) == (OK, b"\3" * SECTOR)


# --- flush ---------------------------------------------------------------------------------------


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each fdatasync."""
    made: list[int] = []
    monkeypatch.setattr(os, "fdatasync", made.append)
    return made


def test_a_flush_is_done_when_the_data_are_on_the_disk(driver: Driver, syncs: list[int]) -> None:
    assert request(driver, OUT, 0, b"x" * SECTOR)[0] == OK
    assert len(syncs) == 0
    assert request(driver, FLUSH)[0] == OK
    assert len(syncs) == 1


def test_for_a_driver_that_never_flushes_each_write_is_flushed(
    attach: Callable[..., Driver], syncs: list[int]
) -> None:
    driver = attach().start(VERSION_1)
    assert request(driver, OUT, 0, b"x" * SECTOR)[0] == OK
    assert request(driver, DISCARD, 0, ranges((0, 1, 0)))[0] == OK
    assert request(driver, WRITE_ZEROES, 0, ranges((0, 1, 0)))[0] == OK
    assert len(syncs) == 3
    assert request(driver, IN, 0, room=SECTOR)[0] == OK
    assert len(syncs) == 3


def test_a_flush_that_fails_is_reported(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert request(driver, FLUSH)[0] == IOERR
    monkeypatch.undo()
    assert request(driver, FLUSH)[0] == IOERR  # for good


# --- discard and write zeroes --------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_zeroes_are_written(driver: Driver, path: Path, flags: int) -> None:
    assert request(driver, WRITE_ZEROES, 0, ranges((2, 3, flags), (60, 4, flags)))[0] == OK
    zero = {n for n in range(SECTORS) if not any(path.read_bytes()[n * SECTOR :][:SECTOR])}
    assert zero == {0, 2, 3, 4, 60, 61, 62, 63}
    assert request(driver, IN, 2, room=SECTOR) == (OK, bytes(SECTOR))


def test_a_discard_touches_nothing_else(driver: Driver, path: Path) -> None:
    before = path.read_bytes()
    assert request(driver, DISCARD, 0, ranges((8, 8, 0)))[0] == OK
    after = path.read_bytes()
    assert after[: 8 * SECTOR] == before[: 8 * SECTOR]
    assert after[16 * SECTOR :] == before[16 * SECTOR :]


@pytest.mark.parametrize(
    "kind, data, status",
    [
        (DISCARD, ranges((0, 1, UNMAP)), UNSUPP),
        (DISCARD, ranges((0, 1, 2)), UNSUPP),
        (WRITE_ZEROES, ranges((0, 1, 2)), UNSUPP),
        (WRITE_ZEROES, ranges((0, 1, 0x8000_0001)), UNSUPP),
        (DISCARD, ranges((SECTORS, 1, 0)), IOERR),
        (DISCARD, ranges((0, SECTORS + 1, 0)), IOERR),
        (WRITE_ZEROES, ranges((2**64 - 1, 2, 0)), IOERR),
        (WRITE_ZEROES, ranges((0, 0xFFFF_FFFF, 0)), IOERR),
        (DISCARD, b"", IOERR),
        (DISCARD, b"short", IOERR),
        (WRITE_ZEROES, ranges((0, 1, 0)) + b"x", IOERR),
        (DISCARD, ranges((0, 1, 0)) * 33, IOERR),
        # Nothing is done when one of several cannot be.
        (WRITE_ZEROES, ranges((1, 1, 0), (SECTORS, 1, 0)), IOERR),
    ],
)
def test_ranges_that_cannot_be_are_refused(
    driver: Driver, path: Path, kind: int, data: bytes, status: int
) -> None:
    before = path.read_bytes()
    assert request(driver, kind, 0, data)[0] == status
    assert path.read_bytes() == before


# --- what a host does wrong ----------------------------------------------------------------------


def failing(number: int) -> Callable[..., int]:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_host_that_cannot_read_or_write_is_an_i_o_error(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(number))
        patch.setattr(os, "pwritev", failing(number))
        assert request(driver, IN, 0, room=SECTOR)[0] == IOERR
        assert request(driver, OUT, 0, b"x" * SECTOR)[0] == IOERR
    assert request(driver, OUT, 0, b"x" * SECTOR)[0] == OK
    assert not driver.needs_reset


def test_a_file_that_is_truncated_is_an_i_o_error_where_it_is_missing(
    driver: Driver, path: Path
) -> None:
    os.truncate(path, 10 * SECTOR)
    assert request(driver, IN, 9, room=SECTOR) == (OK, b"\x09" * SECTOR)
    assert request(driver, IN, 9, room=2 * SECTOR)[0] == IOERR
    assert request(driver, IN, 40, room=SECTOR)[0] == IOERR
    assert request(driver, OUT, 40, b"x" * SECTOR)[0] == OK  # and it is there again
    assert request(driver, IN, 40, room=SECTOR) == (OK, b"x" * SECTOR)


# --- what a driver does wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    "readable, writable",
    [
        ([], [1]),
        ([header(IN)[:15]], [SECTOR, 1]),
        ([header(OUT), b"x" * SECTOR], []),
        ([header(FLUSH)], []),
    ],
)
def test_a_request_without_header_or_status_breaks_the_device(
    driver: Driver, path: Path, readable: list[bytes], writable: list[int]
) -> None:
    before = path.read_bytes()
    driver.queues[0].offer(readable, writable)
    driver.notify()
    assert driver.needs_reset
    assert path.read_bytes() == before
    driver.start()
    assert request(driver, IN, 1, room=SECTOR)[0] == OK


def test_a_disk_may_be_read_over_the_queue_itself(driver: Driver, path: Path) -> None:
    """A driver that does it harms nobody but itself."""
    queue = driver.queues[0]
    path.write_bytes(random.Random(1).randbytes(SECTORS * SECTOR))
    queue.describe(0, queue.buffer(header(IN, 0)), 16, 1, 1)
    queue.describe(1, queue.descriptors, SECTOR, 3, 2)
    queue.describe(2, queue.buffer(b"?"), 1, 2)
    queue.offer_head(0)
    driver.notify()
    driver.memory.read(0, RAM)
    driver.start()
    assert request(driver, IN, 1, room=SECTOR)[0] == OK


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_survives_any_requests(driver: Driver, path: Path, seed: int) -> None:
    """No exception, a file as large as before, and a disk that works after a reset."""
    random_numbers = random.Random(seed)
    sectors = [0, 1, SECTORS - 1, SECTORS, 2**55, 2**64 - 1]
    kinds = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 2, 0xFFFF_FFFF]
    for _ in range(150):
        queue = driver.queues[0]
        queue.forget_buffers()
        readable = [header(random_numbers.choice(kinds), random_numbers.choice(sectors))]
        if random_numbers.random() < 0.5:
            size = random_numbers.choice([1, 16, 32, SECTOR, 2 * SECTOR, 4096])
            readable.append(random_numbers.randbytes(size))
        if random_numbers.random() < 0.1:
            readable[0] = readable[0][: random_numbers.randrange(1, 16)]
        writable = random_numbers.choice([[1], [SECTOR, 1], [511, 2], [100, 413], [SECTOR], []])
        queue.offer(readable, writable, indirect=random_numbers.random() < 0.3)
        if random_numbers.random() < 0.1:  # some descriptor leads elsewhere
            gpa = random_numbers.choice([0, RAM - 1, RAM, FAR_GPA, queue.used, queue.available])
            queue.describe(random_numbers.randrange(queue.size), gpa, 0x1000, 3, 1)
        driver.notify()
        queue.take()
        driver.acknowledge()
        if driver.needs_reset or random_numbers.random() < 0.05:
            driver.start()
    driver.start()
    assert request(driver, OUT, 3, b"x" * SECTOR)[0] == OK
    assert request(driver, IN, 3, room=SECTOR) == (OK, b"x" * SECTOR)
    assert path.stat().st_size == SECTORS * SECTOR

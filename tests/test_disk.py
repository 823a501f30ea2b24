"""Disks on the host: what can be one, who may use it, and what fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyvmm import disk
from pyvmm.disk import SECTOR, Disk

SECTORS = 64


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file of 64 sectors, each full of its number."""
    file = tmp_path / "disk.img"
    file.write_bytes(b"".join(bytes((n,)) * SECTOR for n in range(SECTORS)))
    return str(file)


def read(image: Disk, offset: int, size: int) -> bytes:
    data = bytearray(size)
    image.read([memoryview(data)], offset)
    return bytes(data)


def contents(path: str) -> bytes:
    return Path(path).read_bytes()


# --- what can be a disk --------------------------------------------------------------------------


def test_a_disk_is_as_large_as_its_file(path: str) -> None:
    image = disk.parse(path)
    assert (image.size, image.readonly, image.path) == (SECTORS * SECTOR, False, path)
    image.close()
    image.close()


def test_ro_makes_it_read_only(path: str) -> None:
    image = disk.parse(path + ",ro")
    assert (image.readonly, image.path) == (True, path)
    image.close()


def test_a_comma_may_be_in_a_name(tmp_path: Path) -> None:
    odd = tmp_path / "a,b"
    odd.write_bytes(bytes(SECTOR))
    image = disk.parse(f"{odd},ro")
    assert image.path == str(odd)
    image.close()


@pytest.mark.parametrize("size", [0, 1, 511, 513])
def test_a_file_that_is_not_made_of_sectors_is_refused(tmp_path: Path, size: int) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"odd: {size} bytes: a disk is made of sectors"):
        disk.parse(str(odd))


@pytest.mark.parametrize("suffix", ["", ",ro"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    missing = str(tmp_path / "missing.img")
    with pytest.raises(FileNotFoundError) as caught:
        disk.parse(missing + suffix)
    assert caught.value.filename == missing


@pytest.mark.parametrize("suffix", ["", ",ro"])
def test_what_is_neither_file_nor_block_device_is_refused(tmp_path: Path, suffix: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for odd in (str(pipe), "/dev/null"):
        with pytest.raises(ValueError, match="neither a file nor a block device"):
            disk.parse(odd + suffix)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        disk.parse(str(tmp_path))
    with pytest.raises(ValueError, match="neither a file nor a block device"):
        disk.parse(f"{tmp_path},ro")


def test_a_file_that_may_not_be_written_says_how_to_read_it(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def on_a_read_only_file_system(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system", name)
        return really_open(name, flags, *rest)

    monkeypatch.setattr(os, "open", on_a_read_only_file_system)
    with pytest.raises(OSError, match="Read-only file system; to only read it, name it") as caught:
        disk.parse(path)
    assert caught.value.filename == path
    disk.parse(path + ",ro").close()


# --- who may use it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second, allowed",
    [("", "", False), ("", ",ro", False), (",ro", "", False), (",ro", ",ro", True)],
)
def test_a_disk_that_can_be_written_has_one_user(
    path: str, first: str, second: str, allowed: bool
) -> None:
    image = disk.parse(path + first)
    try:
        if allowed:
            disk.parse(path + second).close()
        else:
            with pytest.raises(OSError, match="another VM uses this disk") as caught:
                disk.parse(path + second)
            assert caught.value.filename == path
    finally:
        image.close()
    disk.parse(path).close()


def test_a_disk_that_is_refused_leaves_nothing_open(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"x")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError):
        disk.parse(str(odd))
    assert os.listdir("/proc/self/fd") == before


# --- reading and writing -------------------------------------------------------------------------


def test_buffers_are_read_and_written_one_after_the_other(path: str) -> None:
    image = disk.parse(path)
    image.write([memoryview(b"a" * 100), memoryview(b"b" * 412)], SECTOR)
    first, second = bytearray(500), bytearray(524)
    image.read([memoryview(first), memoryview(second)], SECTOR)
    assert first + second == b"a" * 100 + b"b" * 412 + b"\2" * SECTOR
    image.close()
    assert contents(path)[SECTOR : 2 * SECTOR] == b"a" * 100 + b"b" * 412


def test_nothing_can_be_read_or_written(path: str) -> None:
    image = disk.parse(path)
    image.read([], 0)
    image.write([], 0)
    image.close()


def test_a_file_that_has_become_shorter_cannot_be_read(path: str) -> None:
    image = disk.parse(path)
    os.truncate(path, SECTOR + 10)
    assert read(image, 0, SECTOR) == bytes(SECTOR)
    with pytest.raises(OSError, match="shorter"):
        read(image, SECTOR, SECTOR)
    with pytest.raises(OSError, match="shorter"):
        read(image, 8 * SECTOR, SECTOR)
    image.close()


def test_a_write_for_which_there_is_only_some_room_fails(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = disk.parse(path)
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 100)
    with pytest.raises(OSError, match="no room"):
        image.write([memoryview(bytes(SECTOR))], 0)
    image.close()


def test_after_a_flush_has_failed_no_flush_succeeds(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports lost data once, and then forgets about it."""
    image = disk.parse(path)
    image.flush()
    with monkeypatch.context() as patch:

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "lost")

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="lost"):
            image.flush()
    with pytest.raises(OSError, match="failed before"):
        image.flush()
    image.close()


# --- zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_room", [False, True])
@pytest.mark.parametrize("supported", [False, True])
def test_zeros_are_written_whatever_the_file_system_can_do(
    path: str, monkeypatch: pytest.MonkeyPatch, supported: bool, keep_room: bool
) -> None:
    if not supported:
        refuse_ioctls(monkeypatch, errno.EOPNOTSUPP)
    image = disk.parse(path)
    image.write_zeros(3 * SECTOR, 40 * SECTOR, keep_room=keep_room)
    image.close()
    after = contents(path)
    assert len(after) == SECTORS * SECTOR
    assert after[3 * SECTOR : 43 * SECTOR] == bytes(40 * SECTOR)
    assert (after[3 * SECTOR - 1], after[43 * SECTOR]) == (2, 43)


def refuse_ioctls(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(fd: int, request: int, argument: bytes) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.ioctl", refuse)


def test_many_zeros_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * (3 << 20))
    refuse_ioctls(monkeypatch, errno.ENOTTY)
    image = disk.parse(str(large))
    image.write_zeros(SECTOR, (2 << 20) + SECTOR, keep_room=False)
    image.close()
    after = large.read_bytes()
    assert after.strip(b"\0") == after
    assert (after.index(0), after.rindex(0)) == (SECTOR, (2 << 20) + 2 * SECTOR - 1)


def test_a_discard_that_the_file_system_cannot_do_is_none(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_ioctls(monkeypatch, errno.ENOTTY)
    image = disk.parse(path)
    image.discard(0, SECTOR)
    image.close()


def test_a_full_disk_is_an_error_also_for_zeros(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_ioctls(monkeypatch, errno.ENOSPC)
    image = disk.parse(path)
    for keep_room in (False, True):
        with pytest.raises(OSError, match="No space"):
            image.write_zeros(0, SECTOR, keep_room=keep_room)
    image.close()


def test_a_discard_gives_room_back_where_the_file_system_can(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * (1 << 20))
    image = disk.parse(str(large))
    before = large.stat().st_blocks
    image.discard(0, 1 << 19)
    image.close()
    assert large.stat().st_size == 1 << 20
    hole = os.open(large, os.O_RDONLY)
    try:
        if large.read_bytes()[:1] == b"\0":  # it can
            assert large.stat().st_blocks < before
            assert os.lseek(hole, 0, os.SEEK_DATA) == 1 << 19
    finally:
        os.close(hole)

"""QEMU's fw_cfg, as a guest reads it.

The values, but for FW_CFG_ID (no DMA), and what accesses of other widths do are what QEMU 7.2
answered to the same accesses, with -m 5G -smp 3 -append "hello there" and a PVH kernel.
"""

from __future__ import annotations

import random
import threading

import pytest

from pyvmm.devices.fwcfg import (
    DATA,
    FW_CFG_CMDLINE_DATA,
    FW_CFG_CMDLINE_SIZE,
    FW_CFG_FILE_DIR,
    FW_CFG_ID,
    FW_CFG_MAX_CPUS,
    FW_CFG_NB_CPUS,
    FW_CFG_RAM_SIZE,
    FW_CFG_SIGNATURE,
    SELECTOR,
    FwCfg,
)

GIB = 1 << 30


def take(device: FwCfg, count: int) -> bytes:
    """The next `count` bytes of the item."""
    return bytes(device.read(DATA, 1) for _ in range(count))


def item(device: FwCfg, key: int, count: int) -> bytes:
    """The first `count` bytes of the item with this key."""
    device.write(SELECTOR, 2, key)
    return take(device, count)


@pytest.fixture
def fw_cfg() -> FwCfg:
    return FwCfg(5 * GIB, 3, b"hello there")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (FW_CFG_SIGNATURE, b"QEMU"),
        (FW_CFG_ID, b"\x01\0\0\0"),
        (FW_CFG_RAM_SIZE, b"\0\0\0\x40\x01\0\0\0"),
        (FW_CFG_NB_CPUS, b"\x03\0"),
        (FW_CFG_MAX_CPUS, b"\x03\0"),
        (FW_CFG_CMDLINE_SIZE, b"\x0c\0\0\0"),
        (FW_CFG_CMDLINE_DATA, b"hello there\0"),
        (FW_CFG_FILE_DIR, b"\0\0\0\0"),
    ],
)
def test_items_and_zeros_after_them(fw_cfg: FwCfg, key: int, expected: bytes) -> None:
    assert item(fw_cfg, key, len(expected) + 4) == expected + bytes(4)


def test_keys_are_qemu_s() -> None:
    assert (FW_CFG_SIGNATURE, FW_CFG_ID, FW_CFG_RAM_SIZE, FW_CFG_NB_CPUS) == (0, 1, 3, 5)
    assert (FW_CFG_MAX_CPUS, FW_CFG_FILE_DIR) == (0x0F, 0x19)
    assert (FW_CFG_CMDLINE_SIZE, FW_CFG_CMDLINE_DATA) == (0x14, 0x15)


@pytest.mark.parametrize("key", [0x02, 0x13, 0x20, 0x3FFF, 0x8000, 0x8003, 0xC000, 0xFFFF])
def test_keys_that_nobody_has_read_zeros(fw_cfg: FwCfg, key: int) -> None:
    assert item(fw_cfg, key, 8) == bytes(8)


def test_without_a_command_line_there_is_an_empty_one() -> None:
    device = FwCfg(1 << 20, 1)
    assert item(device, FW_CFG_CMDLINE_SIZE, 4) == b"\x01\0\0\0"
    assert item(device, FW_CFG_CMDLINE_DATA, 4) == bytes(4)


def test_selecting_begins_again_also_with_the_write_bit(fw_cfg: FwCfg) -> None:
    assert item(fw_cfg, FW_CFG_SIGNATURE, 2) == b"QE"
    assert item(fw_cfg, 0x4000 | FW_CFG_SIGNATURE, 4) == b"QEMU"


def test_both_ports_give_data(fw_cfg: FwCfg) -> None:
    fw_cfg.write(SELECTOR, 2, FW_CFG_SIGNATURE)
    assert bytes(fw_cfg.read(port, 1) for port in (SELECTOR, DATA, SELECTOR, DATA)) == b"QEMU"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_wide_reads_give_zero_and_take_nothing(fw_cfg: FwCfg, size: int) -> None:
    fw_cfg.write(SELECTOR, 2, FW_CFG_SIGNATURE)
    assert fw_cfg.read(SELECTOR, size) == fw_cfg.read(DATA, size) == 0
    assert take(fw_cfg, 4) == b"QEMU"


@pytest.mark.parametrize(
    ("offset", "size"), [(SELECTOR, 1), (SELECTOR, 4), (SELECTOR, 8), (DATA, 1), (DATA, 2)]
)
def test_only_a_write_of_two_bytes_to_the_selector_selects(
    fw_cfg: FwCfg, offset: int, size: int
) -> None:
    fw_cfg.write(SELECTOR, 2, FW_CFG_SIGNATURE)
    fw_cfg.write(offset, size, FW_CFG_NB_CPUS)
    assert take(fw_cfg, 4) == b"QEMU"


def test_after_power_on_and_reset_the_signature_is_selected(fw_cfg: FwCfg) -> None:
    assert take(fw_cfg, 4) == b"QEMU"
    item(fw_cfg, FW_CFG_RAM_SIZE, 3)
    fw_cfg.reset()
    assert take(fw_cfg, 4) == b"QEMU"


def test_no_access_is_too_strange(fw_cfg: FwCfg) -> None:
    rng = random.Random(3)
    for _ in range(5000):
        offset, size = rng.randrange(2), rng.choice((1, 2, 4, 8))
        fw_cfg.write(offset, size, rng.choice((rng.randrange(32), rng.getrandbits(8 * size))))
        assert 0 <= fw_cfg.read(offset, size) < 1 << 8 * size


def test_vcpus_may_read_at_the_same_time(fw_cfg: FwCfg) -> None:
    failures: list[BaseException] = []

    def use(key: int) -> None:
        try:
            for _ in range(500):
                item(fw_cfg, key, 6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(key,)) for key in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []

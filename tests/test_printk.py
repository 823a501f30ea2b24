"""The log of a Linux kernel is read from guest memory, whatever state its ring buffer is in."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from pyvmm.kvm import kvm_sregs
from pyvmm.linux.kernel import Kernel, LinuxError, find
from pyvmm.linux.printk import Record, read_log
from tests.linux_memory import KERNEL_GPA, LOG, PRB, SYMBOLS, Ram

RESERVED, COMMITTED, FINALIZED, REUSABLE = range(4)
COUNT_BITS, SIZE_BITS = 3, 8
COUNT, SIZE = 1 << COUNT_BITS, 1 << SIZE_BITS
# As Linux 6.1 has it; where the parts lie, from LOG on.
DESCRIPTORS, INFOS, TEXT, VMCOREINFO = LOG + 0x1000, LOG + 0x2000, LOG + 0x4000, LOG + 0x6000
FIRST = (1 << 62) - COUNT  # Linux lets it overflow soon


class Log:
    """A ring buffer, written as printk_ringbuffer.c does it."""

    def __init__(self, ram: Ram, *, shift: int = 0, exact_end: bool = False) -> None:
        """`shift`: fields lie that much higher.  `exact_end`: a text may end with the ring."""
        self.ram, self._shift, self._exact_end = ram, shift, exact_end
        self.head = FIRST - 1
        self.tail = FIRST
        self.position = -SIZE & (1 << 64) - 1  # this overflows soon, too

    def add(
        self, text: bytes, time: int = 0, state: int = FINALIZED, length: int | None = None
    ) -> None:
        self.head = self.head + 1 & (1 << 62) - 1
        begin, following = 3, 3  # NO_LPOS
        if text:
            begin = self.position
            block = -(-(8 + len(text)) // 8) * 8
            start = begin % SIZE
            if start + block > SIZE or (start + block == SIZE and not self._exact_end):
                start, begin_of_next = 0, (begin // SIZE + 1) * SIZE
                following = begin_of_next + block
            else:
                following = begin + block
            following &= (1 << 64) - 1
            self.ram.write(TEXT + start, struct.pack("<Q", self.head) + text)
            self.position = following
        at = self.head % COUNT
        descriptor = bytes(self._shift) + struct.pack(
            "<QQQ", self.head | state << 62, begin, following
        )
        self.ram.write(DESCRIPTORS + at * (24 + self._shift), descriptor)
        info = struct.pack("<QQHBBI", 0, time, len(text) if length is None else length, 0, 0, 0)
        self.ram.write(INFOS + at * (88 + self._shift), bytes(self._shift) + info)

    def finish(self) -> None:
        direct, shift = self.ram.direct, bytes(self._shift)
        self.ram.write(PRB, struct.pack("<Q", direct(LOG)))
        self.ram.write(
            LOG,
            shift
            + struct.pack("<I4xQQ", COUNT_BITS, direct(DESCRIPTORS), direct(INFOS))
            + struct.pack("<QQQ", self.head, self.tail, 0)
            + struct.pack("<I4xQQQ", SIZE_BITS, direct(TEXT), 0, 0),
        )

    def read(self) -> list[Record]:
        self.finish()
        return read_log(find(self.ram.memory, kvm_sregs()))


@pytest.fixture
def log() -> Log:
    return Log(Ram(offset=0x60_0000))


def test_messages_have_their_times_and_texts(log: Log) -> None:
    log.add(b"Linux version 6.1.0")
    log.add(b"Command line: quiet", 1_234_567)
    log.add(b"done", 98_765_432_109_876)
    assert [str(record) for record in log.read()] == [
        "[    0.000000] Linux version 6.1.0",
        "[    0.001234] Command line: quiet",
        "[98765.432109] done",
    ]


def test_each_line_of_a_message_has_its_time(log: Log) -> None:
    log.add(b"one\ntwo\n", 5_000_000_000)
    assert str(log.read()[0]) == "[    5.000000] one\n[    5.000000] two\n[    5.000000] "


def test_what_would_disturb_a_terminal_is_shown_as_a_number(log: Log) -> None:
    log.add(b"a\x1b[2J\tb\x00\xff" + "ä".encode())
    assert str(log.read()[0]) == "[    0.000000] a\\x1b[2J\tb\\x00�ä"


def test_an_empty_message_is_a_line(log: Log) -> None:
    log.add(b"")
    assert log.read() == [Record(0, "")]


def test_a_text_that_was_cut_is_as_long_as_it_is(log: Log) -> None:
    log.add(b"12345678", length=4)
    log.add(b"12345678", length=999)
    assert [record.text[:9] for record in log.read()] == ["1234", "12345678"]


def test_what_is_being_written_or_gone_is_left_out(log: Log) -> None:
    for state in (FINALIZED, RESERVED, COMMITTED, REUSABLE, FINALIZED):
        log.add(b"%d" % state, state=state)
    assert [record.text for record in log.read()] == ["2", "1", "2"]


@pytest.mark.parametrize("exact_end", [False, True])
@pytest.mark.parametrize("length", [1, 8, 24, 40, 56])
def test_the_rings_begin_anew(length: int, exact_end: bool) -> None:
    log = Log(Ram(), exact_end=exact_end)
    texts = [b"%d" % n + b"." * (length - 1) for n in range(10, 10 + 3 * COUNT)]
    for text in texts:
        log.add(text)
    fit = min(COUNT, SIZE // (8 + -(-(length + 1) // 8) * 8) - 1)
    log.tail = log.head - fit + 1 & (1 << 62) - 1
    assert [record.text.encode() for record in log.read()] == texts[-fit:]


def test_the_kernel_tells_where_its_fields_are() -> None:
    ram = Ram()
    log = Log(ram, shift=16)
    log.add(b"moved", 7_000_000)
    moved = {
        "OFFSET(printk_ringbuffer.desc_ring)": 16,
        "OFFSET(printk_ringbuffer.text_data_ring)": 64,
        "SIZE(prb_desc)": 40,
        "OFFSET(prb_desc.state_var)": 16,
        "OFFSET(prb_desc.text_blk_lpos)": 24,
        "SIZE(printk_info)": 104,
        "OFFSET(printk_info.ts_nsec)": 24,
        "OFFSET(printk_info.text_len)": 32,
    }
    told = "OSRELEASE=6.99.0\nPAGESIZE=4096\n" + "".join(f"{k}={v}\n" for k, v in moved.items())
    ram.write(VMCOREINFO, told.encode() + b"SYMBOL(prb)=ffffffff82a622c0\nOFFSET(x)=y\n")
    ram.write(PRB + 8, struct.pack("<Q", ram.direct(VMCOREINFO)))
    assert log.read() == [Record(7_000_000, "moved")]


@pytest.mark.parametrize("name", ["SIZE(prb_desc)", "SIZE(printk_info)"])
@pytest.mark.parametrize("size", [0, 1 << 20, 1 << 30])
def test_structures_of_no_possible_size_are_refused_before_they_are_read(
    log: Log, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    log.ram.write(VMCOREINFO, f"{name}={size}\n".encode())
    log.ram.write(PRB + 8, struct.pack("<Q", log.ram.direct(VMCOREINFO)))
    monkeypatch.setattr(Kernel, "read", refuse_much(Kernel.read))
    with pytest.raises(LinuxError, match="not of a kind that is known"):
        log.read()


def refuse_much(read: Callable[[Kernel, int, int], bytes]) -> Callable[[Kernel, int, int], bytes]:
    def read_little(kernel: Kernel, gva: int, length: int) -> bytes:
        assert length <= 1 << 16, "a guest makes the host read as much as it likes"
        return read(kernel, gva, length)

    return read_little


def test_a_number_of_thousands_of_digits_is_not_taken_for_an_offset(log: Log) -> None:
    log.add(b"sound")
    log.ram.write(VMCOREINFO, b"SIZE(prb_desc)=" + b"9" * 4000 + b"\n")
    log.ram.write(PRB + 8, struct.pack("<Q", log.ram.direct(VMCOREINFO)))
    assert log.read() == [Record(0, "sound")]


def test_messages_that_share_their_text_are_no_more_than_the_log_holds(log: Log) -> None:
    for _ in range(COUNT):
        log.position = -SIZE & (1 << 64) - 1
        log.add(b"x" * (SIZE // 2))
    assert sum(len(record.text) for record in log.read()) <= SIZE


def test_before_its_first_message_the_log_is_empty(log: Log) -> None:
    log.head = log.tail = 0
    assert log.read() == []


@pytest.mark.parametrize(("name", "missing"), [("prb", "prb"), ("vmcoreinfo_data", "vmcoreinfo")])
def test_another_kind_of_kernel_is_one_line(name: str, missing: str) -> None:
    ram = Ram(symbols=[symbol for symbol in SYMBOLS if symbol[2] != name])
    with pytest.raises(LinuxError, match=f"no symbol {missing}"):
        read_log(find(ram.memory, kvm_sregs()))


def test_damaged_logs_are_an_error_or_have_other_messages() -> None:
    ram = Ram()
    log = Log(ram)
    for number in range(5):
        log.add(b"message %d" % number)
    log.finish()
    kernel = find(ram.memory, kvm_sregs())
    sound = {place: ram.pages[ram_at(place) : ram_at(place) + 256] for place in (LOG, DESCRIPTORS)}
    rng = random.Random(1)
    for _ in range(300):
        for place, data in sound.items():
            damaged = bytearray(data)
            damaged[rng.randrange(96)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            ram.write(place, damaged)
        try:
            [str(record) for record in read_log(kernel)]
        except LinuxError as error:
            assert "\n" not in str(error)


def ram_at(offset: int) -> int:
    return KERNEL_GPA + offset

"""The kernel's log, as dmesg prints it, from the ring buffer in guest memory.

The buffer (`prb`) has three rings.  A descriptor says in which state a record is and where its text
lies, an info has its time and length, and the text lies in the data ring behind the number of its
descriptor.  Descriptors and infos of one record have the same number modulo the rings' size, and
those from tail_id to head_id are in use.

Where the fields are is told by the kernel, for the tools that read the memory of one that crashed:
vmcoreinfo, lines of text as "OFFSET(printk_info.ts_nsec)=8".  It writes them during its boot;
until then they are taken to be where they have always been.

Left out: Linux before 5.10, whose log is another one; who wrote a record (CONFIG_PRINTK_CALLER);
and that `dmesg -c` hides what is old.
Source: Linux, kernel/printk/printk_ringbuffer.c and .h, Documentation/admin-guide/kdump/
vmcoreinfo.rst, Documentation/admin-guide/kdump/gdbmacros.txt.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.light import NamedTuple
from pyvmm.linux.kernel import Kernel, LinuxError

# Bytes; what Linux 5.10 to 6.12 have on x86-64.
_LAYOUT = {
    "OFFSET(printk_ringbuffer.desc_ring)": 0,
    "OFFSET(printk_ringbuffer.text_data_ring)": 48,
    "OFFSET(prb_desc_ring.count_bits)": 0,
    "OFFSET(prb_desc_ring.descs)": 8,
    "OFFSET(prb_desc_ring.infos)": 16,
    "OFFSET(prb_desc_ring.head_id)": 24,
    "OFFSET(prb_desc_ring.tail_id)": 32,
    "SIZE(prb_desc)": 24,
    "OFFSET(prb_desc.state_var)": 0,
    "OFFSET(prb_desc.text_blk_lpos)": 8,
    "OFFSET(prb_data_blk_lpos.begin)": 0,
    "OFFSET(prb_data_blk_lpos.next)": 8,
    "SIZE(printk_info)": 88,
    "OFFSET(printk_info.ts_nsec)": 8,
    "OFFSET(printk_info.text_len)": 16,
    "OFFSET(prb_data_ring.size_bits)": 0,
    "OFFSET(prb_data_ring.data)": 8,
}
_ID_BITS = 62  # of state_var; the state is above them
_COMMITTED, _FINALIZED = 1, 2  # enum desc_state: the states of a record with text
_NO_DATA = 1  # in a position: the record has none
_ID_BYTES = 8  # before the text
_MAX_COUNT_BITS, _MAX_SIZE_BITS = 20, 25  # CONFIG_LOG_BUF_SHIFT is at most 25
_MAX_SIZE_OF = 256  # of a descriptor or an info, in bytes: there can be a million of each
_VMCOREINFO_BYTES = 4096
_MAX_DIGITS = 10  # of an offset or size


class Record(NamedTuple):
    """A message; `nanoseconds` since the kernel's clock began."""

    nanoseconds: int
    text: str

    def __str__(self) -> str:
        """Each line with its time."""
        seconds, rest = divmod(self.nanoseconds, 10**9)
        lines = self.text.split("\n")
        return "\n".join(f"[{seconds:5}.{rest // 1000:06}] {_printable(line)}" for line in lines)


def read_log(kernel: Kernel) -> list[Record]:
    """All that the log still holds, in order.  Raises LinuxError."""
    layout = _LAYOUT | _vmcoreinfo(kernel)
    buffer = kernel.number(kernel.gva("prb"))
    return list(_Ring(kernel, layout, buffer).records())


def _vmcoreinfo(kernel: Kernel) -> dict[str, int]:
    """What the kernel says of its structures; nothing if it has not got that far."""
    pointer = kernel.gva("vmcoreinfo_data")
    address = kernel.number(pointer)
    if not address:
        return {}
    told = {}
    for line in kernel.read(address, _VMCOREINFO_BYTES).split(b"\n"):
        name, _, value = line.partition(b"=")
        known = name.startswith((b"OFFSET(", b"SIZE("))
        if known and value.isdigit() and len(value) <= _MAX_DIGITS:
            told[name.decode("ascii", "replace")] = int(value)
    return told


class _Ring:
    """The ring buffer; read at once, because guest memory is read in pages."""

    def __init__(self, kernel: Kernel, layout: dict[str, int], buffer: int) -> None:
        self._layout = layout
        descriptors = buffer + layout["OFFSET(printk_ringbuffer.desc_ring)"]
        data = buffer + layout["OFFSET(printk_ringbuffer.text_data_ring)"]

        def field(struct: int, name: str, length: int = 8) -> int:
            return kernel.number(struct + layout[f"OFFSET({name})"], length)

        count_bits = field(descriptors, "prb_desc_ring.count_bits", 4)
        size_bits = field(data, "prb_data_ring.size_bits", 4)
        each, info = layout["SIZE(prb_desc)"], layout["SIZE(printk_info)"]
        sound = 0 < count_bits <= _MAX_COUNT_BITS and 0 < size_bits <= _MAX_SIZE_BITS
        if not (sound and 0 < each <= _MAX_SIZE_OF and 0 < info <= _MAX_SIZE_OF):
            raise LinuxError(f"the log at {buffer:#x} is not of a kind that is known")
        self._count, self._size = 1 << count_bits, 1 << size_bits
        self._first = field(descriptors, "prb_desc_ring.tail_id")
        self._last = field(descriptors, "prb_desc_ring.head_id")
        self._descriptors = kernel.read(
            field(descriptors, "prb_desc_ring.descs"), self._count * each
        )
        self._infos = kernel.read(field(descriptors, "prb_desc_ring.infos"), self._count * info)
        self._data = kernel.read(field(data, "prb_data_ring.data"), self._size)

    def records(self) -> Iterator[Record]:
        """Those whose text is whole, from the oldest one on; no more text than the ring holds."""
        mask = (1 << _ID_BITS) - 1
        left = self._size
        for number in range((self._last - self._first & mask) % self._count + 1):
            number = self._first + number & mask
            state = self._descriptor(number, "prb_desc.state_var")
            if state & mask != number or state >> _ID_BITS not in (_COMMITTED, _FINALIZED):
                continue
            text = self._text(
                self._descriptor(number, "prb_desc.text_blk_lpos", "prb_data_blk_lpos.begin"),
                self._descriptor(number, "prb_desc.text_blk_lpos", "prb_data_blk_lpos.next"),
                self._info(number, "printk_info.text_len", 2),
            )
            left -= len(text)
            if left < 0:  # damaged: texts lie one over the other
                return
            time = self._info(number, "printk_info.ts_nsec", 8)
            yield Record(time, text.decode("utf-8", "replace"))

    def _text(self, begin: int, following: int, length: int) -> bytes:
        """At most `length` bytes of what lies between two positions.

        Positions count on when the ring begins anew.
        """
        if begin & following & _NO_DATA:
            return b""
        start, end = begin % self._size, following % self._size or self._size
        if begin // self._size != (following - 1) // self._size:  # it had no room at the end
            start = 0
        start += _ID_BYTES
        return self._data[start : min(end, start + length)]

    def _descriptor(self, number: int, *fields: str) -> int:
        offset = sum(self._layout[f"OFFSET({field})"] for field in fields)
        at = number % self._count * self._layout["SIZE(prb_desc)"] + offset
        return int.from_bytes(self._descriptors[at : at + 8], "little")

    def _info(self, number: int, field: str, length: int) -> int:
        offset = self._layout[f"OFFSET({field})"]
        at = number % self._count * self._layout["SIZE(printk_info)"] + offset
        return int.from_bytes(self._infos[at : at + length], "little")


def _printable(line: str) -> str:
    """A line that does nothing to a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line)

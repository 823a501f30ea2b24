"""The registers a debugger sees: one table, from which everything about them is derived.

A row says how gdb calls a register, how wide it is and how it is shown. The packets `g G p P` and
the target description (targetxml.py) are made from the rows, so they cannot disagree. Values come
from and go to a plain mapping from name to value: int up to 64 bits, little-endian bytes above.

The names and their order are those of QEMU's x86-64 description, because scripts and other
debuggers count on them: general registers, rip, eflags, selectors, segment bases, control
registers, x87, SSE; then the high halves of the AVX registers, where the host has them.

A `Layout` is the choice of rows that one session uses. It never changes by itself: gdb cuts a `g`
reply by the description it has read, and a stub that answers with other widths after the guest
has changed its mode makes gdb fail with "Remote 'g' packet reply is too long". A new layout is
chosen when the debugger reads the description: when it connects, and when the user of gdb says
`unset tdesc filename`, which makes gdb read it again. So one session can follow a guest from real
mode to 64-bit mode.

Which layout is right (`architecture_for`), tried with gdb 13:

- If gdb has loaded an ELF, its class decides: gdb rejects a 64-bit description if it has loaded an
  ELF32 and a 32-bit one if it has loaded an ELF64, and then shows no registers at all. So a guest
  whose image is an ELF64 is X86_64 from its first instruction, whatever mode it starts in.
- Else the mode decides. X86_64 would not do for 32-bit code: gdb would decode it as 64-bit code and
  look for 8-byte return addresses, so that backtraces end after one frame. With I386 both work.
- In real mode I8086 makes gdb decode 16-bit instructions. (Not if an ELF32 is loaded, because gdb
  prefers the more capable i386: then the user says `set architecture i8086`.) gdb knows no
  segments: it reads code, and compares with its breakpoints, at the value of the program counter.
  So `eip` is the *linear* address, CS base + IP, there, and the register `ip` holds IP. Stepping
  and breakpoints then work with any CS.

Source: Debugging with GDB, appendix "Target Descriptions", section "i386 Features"; Intel SDM
vol. 1, "Basic Execution Environment" and "x87 FPU Programming".
"""

from __future__ import annotations

import struct
from binascii import hexlify
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from operator import itemgetter

Value = int | bytes
Values = Mapping[str, Value]

CORE = "org.gnu.gdb.i386.core"
SSE = "org.gnu.gdb.i386.sse"
AVX = "org.gnu.gdb.i386.avx"
REAL_MODE = "org.pyvmm.i8086"


class Architecture(Enum):
    """What the description says the processor is; the values are gdb's names."""

    I8086 = "i8086"
    I386 = "i386"
    X86_64 = "i386:x86-64"


class Bank:
    """Registers that are read together, because the kernel hands them out together.

    One bit each, as plain numbers: an IntFlag takes a hundred times as long to be combined, and
    that is done for each packet that reads registers.
    """

    GENERAL = 1  # struct kvm_regs
    SYSTEM = 2  # struct kvm_sregs
    MSR = 4
    FPU = 8  # x87 and SSE
    AVX = 16


@dataclass(frozen=True)
class Register:
    """One row. `source` is the name in the mapping of values, if it is not `name`."""

    name: str
    bits: int
    gdb_type: str
    feature: str
    bank: int  # of Bank
    group: str = ""  # gdb's register group, where gdb does not know by itself
    source: str = ""
    base: str = ""  # the segment base that gdb is told to add: see I8086 above

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.source or self.name)

    @property
    def size(self) -> int:
        """Bytes in a packet, before hex."""
        return self.bits // 8

    def get(self, values: Values) -> Value:
        """The value that the debugger is told. Raises KeyError if `values` does not have it."""
        value = values[self.source]
        if isinstance(value, bytes):
            return value
        if self.base:
            value += _integer(values[self.base])
        return value & ((1 << self.bits) - 1)

    def encode(self, values: Values) -> bytes:
        """The value in hex, or `xx` for each byte if `values` does not have it."""
        try:
            value = self.get(values)
        except KeyError:
            return b"xx" * self.size
        return hexlify(value if isinstance(value, bytes) else value.to_bytes(self.size, "little"))

    def decode(self, data: bytes, values: Values) -> dict[str, Value]:
        """What to write into the mapping so that the debugger reads `data` back.

        A 32-bit view of a 64-bit register clears the upper half, as a 32-bit move does.
        """
        if self.bits > 64:
            return {self.source: data}
        value = int.from_bytes(data, "little")
        if self.base:
            value = (value - _integer(values[self.base])) & ((1 << self.bits) - 1)
        return {self.source: value}


def _integer(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _rows(
    names: str, bits: int, gdb_type: str, feature: str, bank: int, group: str = ""
) -> list[Register]:
    return [Register(name, bits, gdb_type, feature, bank, group) for name in names.split()]


def _numbered(pattern: str, count: int) -> str:
    return " ".join(pattern.format(number) for number in range(count))


TABLE: tuple[Register, ...] = (
    *_rows("rax rbx rcx rdx rsi rdi", 64, "int64", CORE, Bank.GENERAL),
    *_rows("rbp rsp", 64, "data_ptr", CORE, Bank.GENERAL),
    *_rows("r8 r9 r10 r11 r12 r13 r14 r15", 64, "int64", CORE, Bank.GENERAL),
    *_rows("rip", 64, "code_ptr", CORE, Bank.GENERAL),
    *_rows("eflags", 32, "x86_eflags", CORE, Bank.GENERAL),
    *_rows("cs ss ds es fs gs", 32, "int32", CORE, Bank.SYSTEM),
    *_rows("fs_base gs_base", 64, "int64", CORE, Bank.SYSTEM),
    *_rows("k_gs_base", 64, "int64", CORE, Bank.MSR),
    *_rows("cr0", 64, "x86_cr0", CORE, Bank.SYSTEM),
    *_rows("cr2", 64, "int64", CORE, Bank.SYSTEM),
    *_rows("cr3", 64, "int64", CORE, Bank.SYSTEM),
    *_rows("cr4", 64, "x86_cr4", CORE, Bank.SYSTEM),
    *_rows("cr8", 64, "int64", CORE, Bank.SYSTEM),
    *_rows("efer", 64, "x86_efer", CORE, Bank.SYSTEM),
    *_rows(_numbered("st{}", 8), 80, "i387_ext", CORE, Bank.FPU),
    *_rows("fctrl fstat ftag fiseg fioff foseg fooff fop", 32, "int", CORE, Bank.FPU, "float"),
    *_rows(_numbered("xmm{}", 16), 128, "vec128", SSE, Bank.FPU),
    *_rows("mxcsr", 32, "x86_mxcsr", SSE, Bank.FPU, "vector"),
    *_rows(_numbered("ymm{}h", 16), 128, "uint128", AVX, Bank.AVX),
)

# The 32-bit processor's own order of its general registers.
_GENERAL_32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip")
_ONLY_64 = frozenset(
    _numbered("r{}", 16).split() + [name for n in range(8, 16) for name in (f"xmm{n}", f"ymm{n}h")]
)


def _narrow(rows: tuple[Register, ...]) -> tuple[Register, ...]:
    """The rows of a 32-bit processor: fewer, and what was 64 bits wide has 32."""
    row_of = {row.name: row for row in rows}
    general = [replace(row_of["r" + name[1:]], name=name) for name in _GENERAL_32]
    others = [
        row for row in rows if row.name not in _ONLY_64 and "e" + row.name[1:] not in _GENERAL_32
    ]
    return tuple(
        replace(row, bits=32, gdb_type=row.gdb_type.replace("int64", "int32"))
        if row.bits == 64
        else row
        for row in general + others
    )


class Layout:
    """The registers of one session, by their number: what `g` holds, and how."""

    def __init__(self, architecture: Architecture, avx: bool) -> None:
        self.architecture = architecture
        self.registers = _choose(architecture, avx)
        self.number_of = {row.name: number for number, row in enumerate(self.registers)}
        self.banks = 0
        for row in self.registers:
            self.banks |= row.bank
        wide = architecture is Architecture.X86_64
        # What a debugger wants to know first of all: program counter, stack and frame pointer.
        self.first = tuple(
            self.number_of[name] for name in ("rip rsp rbp" if wide else "eip esp ebp").split()
        )
        self.first_banks = 0
        for number in self.first:
            self.first_banks |= self.registers[number].bank
        self._struct = struct.Struct("<" + "".join(_FORMAT[row.bits] for row in self.registers))
        self._get_all = itemgetter(*(row.source for row in self.registers)) if wide else None
        self._get_first = itemgetter("rip", "rsp", "rbp") if wide else None
        self._first_text = b"".join(b"%02x:%%b;" % number for number in self.first)

    @property
    def size(self) -> int:
        """Bytes in `g`, before hex."""
        return self._struct.size

    def encode(self, values: Values) -> bytes:
        """All registers in hex; `xx` for each byte of a register that `values` does not have.

        Where every row is a plain value of its full width, one call packs them all: debuggers
        ask for them at each stop.
        """
        if self._get_all:
            try:
                return hexlify(self._struct.pack(*self._get_all(values)))
            except KeyError:
                pass
        return b"".join(row.encode(values) for row in self.registers)

    def encode_first(self, values: Values) -> bytes:
        """The registers of `first` as a stop reply tells them: `10:0000100000000000;`, ..."""
        if self._get_first:  # as above
            try:
                pc, stack, frame = map(_U64.pack, self._get_first(values))
                return self._first_text % (hexlify(pc), hexlify(stack), hexlify(frame))
            except KeyError:
                pass
        return self._first_text % tuple(self.registers[n].encode(values) for n in self.first)

    def decode(self, data: bytes, values: Values) -> dict[str, Value]:
        """What to write so that all registers read back as `data`: only what is not so already.

        gdb changes one register by writing all. Those it did not mean to change must not be
        written: some cannot be, and others lose what the debugger was not shown. Nor are those
        that it was told are unavailable. Raises ValueError if `data` has the wrong length.
        """
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes of registers instead of {self.size}")
        updates: dict[str, Value] = {}
        offset = 0
        for row in self.registers:
            part = data[offset : offset + row.size]
            offset += row.size
            current = row.encode(values)
            if current != hexlify(part) and not current.startswith(b"x"):
                updates |= row.decode(part, values)
        return updates


_U64 = struct.Struct("<Q")
_FORMAT = {32: "I", 64: "Q", 80: "10s", 128: "16s"}


def _choose(architecture: Architecture, avx: bool) -> tuple[Register, ...]:
    rows = tuple(row for row in TABLE if avx or row.feature != AVX)
    if architecture is Architecture.X86_64:
        return rows
    rows = _narrow(rows)
    if architecture is Architecture.I386:
        return rows
    linear = tuple(
        replace(row, base="cs_base", bank=row.bank | Bank.SYSTEM) if row.name == "eip" else row
        for row in rows
    )
    return (*linear, Register("ip", 32, "int32", REAL_MODE, Bank.GENERAL, "general", "rip"))


@cache
def layout(architecture: Architecture, avx: bool) -> Layout:
    """The layout for a processor, with or without the high halves of the AVX registers."""
    return Layout(architecture, avx)


def architecture_for(code_bits: int, image_bits: int | None) -> Architecture:
    """What to tell gdb that the processor is; the reasons are in the module's docstring.

    `code_bits`: how the processor decodes instructions now, 16, 32 or 64. `image_bits`: 32 or 64,
    the class of the image if it is an ELF (or is known to be a 64-bit kernel), else None.
    """
    if image_bits == 64 or code_bits == 64:
        return Architecture.X86_64
    return Architecture.I386 if code_bits == 32 else Architecture.I8086


_EMPTY = 0b11  # in the full tag word


def expand_tag_word(abridged: int, fstat: int, st: tuple[bytes, ...]) -> int:
    """The x87 tag word as gdb wants it, from the one bit a register that FXSAVE keeps.

    `st`: the contents of ST(0)..ST(7), 10 bytes each. A bit of `abridged` belongs to a physical
    register; ST(0) is the one that TOP, in `fstat`, names. Source: Intel SDM vol. 1, "x87 FPU Tag
    Word", and vol. 2A, "FXSAVE", table "Recreating FSAVE Format".
    """
    top = fstat >> 11 & 7
    full = 0
    for physical in range(8):
        tag = _tag(st[(physical - top) & 7]) if abridged >> physical & 1 else _EMPTY
        full |= tag << 2 * physical
    return full


def _tag(value: bytes) -> int:
    """0 valid, 1 zero, 2 special (infinity, NaN, denormal, unsupported)."""
    mantissa = int.from_bytes(value[:8], "little")
    exponent = int.from_bytes(value[8:10], "little") & 0x7FFF
    if exponent == 0 and mantissa == 0:
        return 1
    return 0 if 0 < exponent < 0x7FFF and mantissa >> 63 else 2


def abridge_tag_word(full: int) -> int:
    """The tag word as FXSAVE keeps it: bit n is 0 if physical register n is empty."""
    return sum(1 << n for n in range(8) if full >> 2 * n & 3 != _EMPTY)

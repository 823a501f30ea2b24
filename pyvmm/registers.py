"""The registers a debugger sees: one table, from which everything about them is derived.

A row says how gdb calls a register, how wide it is and how it is shown. The packets `g G p P` and
the target description (targetxml.py) are made from the rows, so they cannot disagree. What is read
of a vCPU is its *register file*: the registers of the table back to back, little-endian. So the
file in hex is the reply to `g`, and a slice of it the reply to `p`. What is written is a plain
mapping from name to value: int up to 64 bits, little-endian bytes above.

gdb knows no segments: it reads code, and compares with its breakpoints, at the value of the program
counter. So `rip` (and `eip`) is the *linear* address, CS base + RIP; in 64-bit mode, and with the
flat segments of most 32-bit code, that is RIP. Stepping and breakpoints then work with any CS.

The names and their order are those of QEMU's x86-64 description, because scripts and other
debuggers count on them: general registers, rip, eflags, selectors, segment bases, control
registers, x87, SSE; then the high halves of the AVX registers, where the host has them.

A `Layout` is the choice of rows that one session uses. It never changes by itself: gdb cuts a `g`
reply by the description it has read, and a stub that answers with other widths after the guest
has changed its mode makes gdb fail with "Remote 'g' packet reply is too long". A new layout is
chosen when the debugger reads the description: when it connects, and when the user of gdb says
`unset tdesc filename`, which makes gdb read it again. So one session can follow a guest from real
mode to 64-bit mode; if gdb has an ELF32 of it, with `set architecture i386:x86-64` afterwards.

Which layout is right (`architecture_for`), tried with gdb 13:

- If gdb has loaded an ELF, its class decides: gdb rejects a 64-bit description if it has loaded an
  ELF32 and a 32-bit one if it has loaded an ELF64, and then does not connect; unless the user has
  said `set architecture` before. So a guest whose image is an ELF64 is X86_64 from its first
  instruction, whatever mode it starts in.
- Else the mode decides. X86_64 would not do for 32-bit code: gdb would decode it as 64-bit code and
  look for 8-byte return addresses, so that backtraces end after one frame. With I386 both work.
- In compatibility mode a 64-bit kernel runs a 32-bit program, and what is debugged is the kernel:
  X86_64.
- In real mode I8086 makes gdb decode 16-bit instructions. (Not if an ELF32 is loaded, because gdb
  prefers the more capable i386: then the user says `set architecture i8086`.) It has a register
  `ip`, too, which holds IP.

Source: Debugging with GDB, appendix "Target Descriptions", section "i386 Features"; Intel SDM
vol. 1, "Basic Execution Environment" and "x87 FPU Programming".
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

RegisterFile = bytes
Value = int | bytes

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
    """One row. `source` is the name under which it is written, if it is not `name`."""

    name: str
    bits: int
    gdb_type: str
    feature: str
    bank: int  # of Bank
    group: str = ""  # gdb's register group, where gdb does not know by itself
    source: str = ""
    at: int = 0  # where it is in the register file, in bytes
    linear: bool = False  # CS base + the register, and so is what the file holds
    within_code: bool = False  # what the file holds, less CS base: the register itself

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.source or self.name)

    @property
    def size(self) -> int:
        """Bytes in a packet, before hex."""
        return self.bits // 8

    def read(self, file: RegisterFile) -> bytes:
        """What the debugger is told, before hex. A 32-bit view is the half that comes first."""
        data = file[self.at : self.at + self.size]
        return self._less_code_base(data, file) if self.within_code else data

    def encode(self, file: RegisterFile) -> bytes:
        """The value in hex."""
        return hexlify(self.read(file))

    def decode(self, data: bytes, file: RegisterFile) -> dict[str, Value]:
        """What to write so that the debugger reads `data` back.

        A 32-bit view of a 64-bit register clears the upper half, as a 32-bit move does.
        Raises ValueError for a program counter below the code segment.
        """
        if self.bits > 64:
            return {self.source: data}
        if self.linear:
            data = self._less_code_base(data, file)
        return {self.source: int.from_bytes(data, "little")}

    def _less_code_base(self, data: bytes, file: RegisterFile) -> bytes:
        base = int.from_bytes(file[_CODE_BASE_AT:], "little")
        value = int.from_bytes(data, "little") - base
        if value < 0:
            raise ValueError(f"{self.name} is below the code segment, which begins at {base:#x}")
        return value.to_bytes(self.size, "little")


def _rows(
    names: str, bits: int, gdb_type: str, feature: str, bank: int, group: str = ""
) -> list[Register]:
    return [Register(name, bits, gdb_type, feature, bank, group) for name in names.split()]


def _numbered(pattern: str, count: int) -> str:
    return " ".join(pattern.format(number) for number in range(count))


def _back_to_back(rows: Iterable[Register]) -> tuple[Register, ...]:
    placed: list[Register] = []
    at = 0
    for row in rows:
        placed.append(replace(row, at=at))
        at += row.size
    return tuple(placed)


_ROWS = (
    *_rows("rax rbx rcx rdx rsi rdi", 64, "int64", CORE, Bank.GENERAL),
    *_rows("rbp rsp", 64, "data_ptr", CORE, Bank.GENERAL),
    *_rows("r8 r9 r10 r11 r12 r13 r14 r15", 64, "int64", CORE, Bank.GENERAL),
    Register("rip", 64, "code_ptr", CORE, Bank.GENERAL | Bank.SYSTEM, linear=True),
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
TABLE = _back_to_back(_ROWS)
# Behind the table the file holds how far the program counter is from RIP: CS base, but 0 in 64-bit
# mode.
_CODE_BASE_AT = sum(row.size for row in TABLE)
FILE_SIZE = _CODE_BASE_AT + 8  # bytes


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
        self._first_text = b"".join(b"%02x:%%b;" % number for number in self.first)
        self.size = sum(row.size for row in self.registers)  # bytes in `g`, before hex
        # The file, up to here, as it is; 32-bit descriptions leave registers out and halve others.
        self._is_beginning = self.registers == TABLE[: len(self.registers)]

    def encode(self, file: RegisterFile) -> bytes:
        """All registers in hex."""
        if self._is_beginning:
            return hexlify(file[: self.size])
        return b"".join([row.encode(file) for row in self.registers])

    def encode_first(self, file: RegisterFile) -> bytes:
        """The registers of `first` as a stop reply tells them: `10:0000100000000000;`, ..."""
        return self._first_text % tuple([self.registers[n].encode(file) for n in self.first])

    def decode(self, data: bytes, file: RegisterFile) -> dict[str, Value]:
        """What to write so that all registers read back as `data`: only what is not so already.

        gdb changes one register by writing all. Those it did not mean to change must not be
        written: some cannot be, and others lose what the debugger was not shown. Raises ValueError
        if `data` has the wrong length.
        """
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes of registers instead of {self.size}")
        updates: dict[str, Value] = {}
        offset = 0
        for row in self.registers:
            part = data[offset : offset + row.size]
            offset += row.size
            if part != row.read(file):
                updates |= row.decode(part, file)
        return updates


def _choose(architecture: Architecture, avx: bool) -> tuple[Register, ...]:
    rows = tuple(row for row in TABLE if avx or row.feature != AVX)
    if architecture is Architecture.X86_64:
        return rows
    rows = _narrow(rows)
    if architecture is Architecture.I386:
        return rows
    eip = next(row for row in rows if row.name == "eip")
    ip = replace(eip, name="ip", gdb_type="int32", linear=False, within_code=True)
    return (*rows, replace(ip, feature=REAL_MODE, group="general"))


@cache
def layout(architecture: Architecture, avx: bool) -> Layout:
    """The layout for a processor, with or without the high halves of the AVX registers."""
    return Layout(architecture, avx)


def architecture_for(kernel_bits: int, image_bits: int | None) -> Architecture:
    """What to tell gdb that the processor is; the reasons are in the module's docstring.

    `kernel_bits`: 16, 32 or 64, by the processor's mode now; 64 also in compatibility mode.
    `image_bits`: 32 or 64, the class of the image's ELF, or 64 of a Linux image that is entered in
    64-bit mode; else None.
    """
    if image_bits == 64 or kernel_bits == 64:
        return Architecture.X86_64
    return Architecture.I386 if kernel_bits == 32 else Architecture.I8086


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

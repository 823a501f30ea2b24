"""Where the operands of an instruction are: its ModRM byte, what may follow, and its prefixes.

Only for 64-bit mode, and for general registers and memory.
Source: Intel SDM vol. 2A, "Instruction Format".
"""

from __future__ import annotations

from pyvmm.emulate import REGISTERS, CannotComplete, Cpu
from pyvmm.light import NamedTuple
from pyvmm.x86 import CpuMode

OPERAND_16, ADDRESS_32, FS, GS = 0x66, 0x67, 0x64, 0x65  # prefixes
REX_W, REX_R, REX_X, REX_B = 8, 4, 2, 1
_NEEDS_SIB = 4  # in ModRM's rm
_NO_INDEX = 4  # in SIB's index
_NO_BASE = 5  # in either's base, where mod is 0


class Operands(NamedTuple):
    """What a ModRM byte says: `reg` is a register's number, or belongs to the opcode.

    The other operand is register `rm`, or in memory at `gva`: one of these is None.
    `size` is the operands' in bytes, and `length` the whole instruction's.
    """

    reg: int
    rm: int | None
    gva: int | None
    size: int
    length: int


def decode(cpu: Cpu, prefixes: bytes, rest: bytes, opcode_bytes: int) -> Operands:
    """The operands of the instruction at RIP, whose ModRM byte follows `opcode_bytes` of `rest`.

    Raises CannotComplete outside of 64-bit mode and where bytes are missing.
    """
    if cpu.mode is not CpuMode.LONG or ADDRESS_32 in prefixes:
        raise CannotComplete("not 64-bit mode, or a 32-bit address")
    rex = prefixes[-1] & 0xF if prefixes and prefixes[-1] & 0xF0 == 0x40 else 0
    size = 8 if rex & REX_W else 2 if OPERAND_16 in prefixes else 4
    modrm, at = _number(rest, opcode_bytes, 1), opcode_bytes + 1
    mod, reg, rm = modrm >> 6, modrm >> 3 & 7 | (rex & REX_R) << 1, modrm & 7
    high = (rex & REX_B) << 3
    if mod == 3:
        return Operands(reg, rm | high, None, size, len(prefixes) + at)
    gva, base = 0, rm
    if rm == _NEEDS_SIB:
        sib, at = _number(rest, at, 1), at + 1
        index, base = sib >> 3 & 7 | (rex & REX_X) << 2, sib & 7
        if index != _NO_INDEX:
            gva = register(cpu, index) << (sib >> 6)
    displacement_bytes = (0, 1, 4)[mod]
    if mod == 0 and base == _NO_BASE:
        displacement_bytes = 4
    else:
        gva += register(cpu, base | high)
    displacement = _number(rest, at, displacement_bytes)
    sign = 1 << 8 * displacement_bytes >> 1
    length = len(prefixes) + at + displacement_bytes
    gva += (displacement ^ sign) - sign
    if mod == 0 and rm == _NO_BASE:  # relative to the next instruction
        gva += cpu.regs.rip + length
    if FS in prefixes or GS in prefixes:
        gva += cpu.sregs.fs.base if FS in prefixes else cpu.sregs.gs.base
    return Operands(reg, None, gva & 0xFFFFFFFFFFFFFFFF, size, length)


def _number(rest: bytes, at: int, size: int) -> int:
    piece = rest[at : at + size]
    if len(piece) < size:
        raise CannotComplete("the end of the instruction is not known")
    return int.from_bytes(piece, "little")


def register(cpu: Cpu, number: int) -> int:
    """The value of a general register, all 64 bits."""
    return int(getattr(cpu.regs, REGISTERS[number]))


def read(cpu: Cpu, operands: Operands) -> int:
    """The value of the operand that is not `reg`.  Raises what Cpu.read raises."""
    if operands.gva is not None:
        return int.from_bytes(cpu.read(operands.gva, operands.size), "little")
    assert operands.rm is not None
    return register(cpu, operands.rm) & (1 << 8 * operands.size) - 1


def write_register(cpu: Cpu, number: int, size: int, value: int) -> None:
    """Write the low `size` bytes of a general register; 4 bytes clear those above, 2 do not."""
    kept = register(cpu, number) & ~0xFFFF if size == 2 else 0
    setattr(cpu.regs, REGISTERS[number], kept | value & (1 << 8 * size) - 1)

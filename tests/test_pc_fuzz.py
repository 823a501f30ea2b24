"""Guests that write and read nonsense, seeded and bounded: at ports and at MMIO addresses, in every
width, from several processors at once.

Whatever a guest does, no vCPU's thread meets an exception, and nothing is written to guest memory
that the guest did not write there itself.  A guest may reset its machine, switch it off, or crash.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

import pytest

from pyvmm.boot import Image, Segment
from pyvmm.machine import Machine
from pyvmm.stop import StopReason
from tests.rsp_client import RAM
from tests.smp_guests import SLEEP, increment, out8, out16, smp_image, start_aps, u32
from tests.support import PATIENCE, cycles, requires, slowness

pytestmark = pytest.mark.kvm

CPUS = 3
PROGRAM = 0x200000  # GPA of the code that all processors run, with their number in EBP
TABLES = 0x40000  # GPA; what a processor's loops go through: TABLES + 0x1000 * its number
BUFFER, SINK = 0x60000, 0x70000  # GPA; what `rep outs` sends, and where `rep ins` writes
BOOT_PAGES = range(0x1000, 0xA000)  # page tables have accessed and dirty bits; the IDT is not used
DONE = 0x70F00  # GPA; how many processors have come to the end
STACKS = range(0x70000, 0x80000)  # and SINK
END = increment(DONE) + SLEEP

LAPIC, IOAPIC = 0xFEE00000, 0xFEC00000  # GPA

# What ends or resets the machine; they get a test of their own.
ENDS = {0x64, *range(0xF4, 0xF8), 0x604, 0x605, 0xB004, 0xB005, 0xCF9}

WIDTHS = (1, 2, 4)
_OUT = {1: "ee90", 2: "66ef", 4: "ef90"}
_IN = {1: "ec90", 2: "66ed", 4: "ed90"}
_OUTS = {1: "f36e90", 2: "66f36f", 4: "f36f90"}
_INS = {1: "f36c90", 2: "66f36d", 4: "f36d90"}


def _table(gpa: int) -> bytes:
    """mov r8d, ebp; shl r8d, 12; add r8d, gpa"""
    return bytes.fromhex("4189e8 41c1e00c 4181c0") + struct.pack("<I", gpa)


# A pseudo-random number in R9D: imul r9d, r9d, 1664525; add r9d, 1013904223
_NEXT_NUMBER = bytes.fromhex("4569c90d661900 4181c15ff36e3c")


def sweep(width: int, table: int) -> bytes:
    """An `out` of a random number and an `in` at each port of a table of ranges.

    A range is its first port, how many, and the distance between them, 16 bits each; none of 0
    ports is the last.
    """
    return _table(table) + bytes.fromhex(
        "410fb710 410fb74802 e326"  # 1: movzx edx, [r8]; movzx ecx, [r8 + 2]; jrcxz 3f
        f"{_NEXT_NUMBER.hex()} 4489c8 0fc8"  # 2: mov eax, r9d; bswap eax
        f"{_OUT[width]} {_IN[width]} 6641035004"  # out dx, al; in al, dx; add dx, [r8 + 4]
        "ffc9 75e0 4983c006 ebcf"  # dec ecx; jnz 2b; add r8, 6; jmp 1b; 3:
    )


def strings(width: int, table: int) -> bytes:
    """`rep outs` and `rep ins` with 33 repetitions at each port of a table, which 0 ends."""
    return _table(table) + bytes.fromhex(
        "410fb710 85d2 7420"  # 1: movzx edx, [r8]; test edx, edx; jz 2f
        f"b921000000 be{struct.pack('<I', BUFFER).hex()} {_OUTS[width]}"
        f"b921000000 bf{struct.pack('<I', SINK).hex()} {_INS[width]}"
        "4983c002 ebd8"  # add r8, 2; jmp 1b; 2:
    )


def mmio(gpas: range) -> bytes:
    """Writes and reads of 1, 2, 4 and 8 bytes at `gpas`, and for processor n, 4 * n further up."""
    # mov esi, ebp; shl esi, 2; add esi, first; mov ecx, count; 1: ...; mov rax, r9
    return (
        struct.pack("<5s2sIBI", b"\x89\xee\xc1\xe6\x02", b"\x81\xc6", gpas.start, 0xB9, len(gpas))
        + _NEXT_NUMBER
        + bytes.fromhex("4c89c8 8806 8a06 668906 668b06 8906 8b06 488906 488b06 81c6")
        + struct.pack("<I", gpas.step)
        + bytes.fromhex("ffc9 75d1")  # add esi, step; dec ecx; jnz 1b
    )


def guest(program: bytes, *tables: bytes) -> Image:
    """All processors run `program`; processor n finds the n-th of `tables`."""
    go = bytes.fromhex("89fd b8") + struct.pack("<I", PROGRAM) + b"\xff\xe0"  # mov ebp, edi; jmp
    image = smp_image(start_aps() + go, go)
    pieces = {PROGRAM: program, BUFFER: random.Random(1).randbytes(0x200)}
    pieces |= {TABLES + 0x1000 * n: table for n, table in enumerate(tables)}
    segments = tuple(Segment(gpa, data, len(data)) for gpa, data in pieces.items())
    return image._replace(segments=image.segments + segments)


def untouched(machine: Machine) -> list[bytes]:
    """Memory but for what the processors and the guest itself write to."""
    memory = machine.read_memory(0, RAM, physical=True)
    spans = [(0, BOOT_PAGES.start), (BOOT_PAGES.stop, STACKS.start), (STACKS.stop, RAM)]
    return [memory[start:end] for start, end in spans]


def run_to_the_end(image: Image, irqchip: bool) -> None:
    """All processors come to END, and memory is as it was."""
    with Machine(image, cpus=CPUS, memory=RAM, irqchip=irqchip) as machine:
        before = untouched(machine)
        stop = machine.run(timeout=2 * PATIENCE)
        assert stop.reason is StopReason.HALTED, stop
        assert u32(machine, DONE) == CPUS
        assert untouched(machine) == before


def ranges(ports: Iterable[int], stride: int = 1) -> bytes:
    """A table for sweep(): every `stride`-th of ascending `ports`."""
    table, first, count, last = b"", None, 0, None
    for port in ports:
        if first is None or last is None or port != last + stride:
            if first is not None:
                table += struct.pack("<3H", first, count, stride)
            first, count = port, 0
        count, last = count + 1, port
    assert first is not None
    return table + struct.pack("<3H", first, count, stride) + bytes(6)


def device_ports(machine: Machine) -> list[int]:
    """The ports of all devices and their neighbours, and all of a PC's traditional ones.

    (Not all of those on a slow host.)
    """
    ports = set(range(0, 0x400, 1 if slowness() < 4 else int(slowness())))
    for claim in machine.ports.claims:
        ports |= set(range(max(0, claim.start - 4), claim.start + claim.size + 4))
    return sorted(ports - ENDS)


@pytest.mark.parametrize("irqchip", [False, True], ids=["no irqchip", "irqchip"])
def test_nonsense_at_the_ports_of_devices_in_every_width(irqchip: bool) -> None:
    """All processors go through all of them at the same time, also with string instructions."""
    if irqchip:
        requires("irqchip")
    with Machine(guest(SLEEP), memory=RAM) as machine:
        table = ranges(device_ports(machine))
        claimed = [claim.start for claim in machine.ports.claims if claim.start not in ENDS]
    claimed = claimed[: cycles(len(claimed))]
    assert len(table) < 0x800
    table = table.ljust(0x800, b"\0") + struct.pack(f"<{len(claimed) + 1}H", *claimed, 0)
    program = b"".join(sweep(width, TABLES) for width in WIDTHS)
    program += b"".join(strings(width, TABLES + 0x800) for width in WIDTHS)
    run_to_the_end(guest(program + END, *[table] * CPUS), irqchip)


@pytest.mark.slow
def test_nonsense_at_every_port() -> None:
    """Each processor has a third of the ports, and each port its width."""
    requires("irqchip")
    stride = len(WIDTHS) * CPUS * max(1, int(slowness() / 2))
    program = b"".join(sweep(width, TABLES + 0x400 * n) for n, width in enumerate(WIDTHS))
    tables = []
    for vcpu_id in range(CPUS):
        firsts = [len(WIDTHS) * vcpu_id + n for n in range(len(WIDTHS))]
        ports = [(p for p in range(at, 0x10000, stride) if p not in ENDS) for at in firsts]
        tables.append(b"".join(ranges(of_width, stride).ljust(0x400, b"\0") for of_width in ports))
    run_to_the_end(guest(program + END, *tables), irqchip=True)


@pytest.mark.parametrize("irqchip", [False, True], ids=["no irqchip", "irqchip"])
def test_nonsense_at_mmio_addresses_in_every_width(irqchip: bool) -> None:
    """Everywhere above RAM but at the APICs, at another offset in a page each time."""
    if irqchip:
        requires("irqchip")
    step = 0x500FFF * max(1, int(slowness() / 4))
    below = mmio(range(RAM + 0xFFF, IOAPIC - 0x1000, step))
    above = mmio(range(LAPIC + 0x1000, (1 << 32) - 0x100, step // 16))
    run_to_the_end(guest(below + above + END), irqchip)


OTHERS = [0x60, 0x3F8, 0x3F9, 0x3FC, 0x70, 0x71, 0x600, 0x602]
HARMLESS_ENDS = {
    StopReason.HALTED,
    StopReason.POWERED_OFF,
    StopReason.DEBUG_EXIT,
    StopReason.EXIT_LIMIT,
    StopReason.TIMEOUT,
}
SEEDS = range(12)


def _access(chance: random.Random) -> bytes:
    """One access to a port that can end or reset the machine, or to its neighbours."""
    port = chance.choice([*sorted(ENDS), *OTHERS])
    value = chance.choice((chance.getrandbits(16), 0xFE, 0xD1, 0x06, 0x02, 0x2000, 0x3400))
    return chance.choice(
        (
            out8(port, value & 0xFF),
            out16(port, value),
            struct.pack("<2sHB", b"\x66\xba", port, 0xEC),  # in al, dx
            struct.pack("<2sHB", b"\x66\xba", port, 0xED),  # in eax, dx
        )
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_nonsense_at_the_ports_that_reset_and_end_the_machine(seed: int) -> None:
    requires("irqchip")
    chance = random.Random(seed)
    program = b"".join(_access(chance) for _ in range(200))
    with Machine(guest(program + SLEEP), cpus=CPUS, memory=RAM, irqchip=True) as machine:
        before = untouched(machine)
        stop = machine.run(timeout=PATIENCE, max_exits=max(20, cycles(100)))
        assert stop.reason in HARMLESS_ENDS, stop
        assert untouched(machine) == before


def _apic_access(chance: random.Random) -> bytes:
    """A read or write, of any width, at a register of an APIC, or beside it."""
    if chance.random() < 0.7:
        gpa = LAPIC + 0x10 * chance.randrange(0x40) + chance.choice((0, 0, 0, 1, 4))
    else:
        gpa = IOAPIC + chance.choice((0, 0x10, 0x10, 0x20, 0x40, 0x3))
    opcode = chance.choice(("8807", "668907", "8907", "488907", "8a07", "8b07", "488b07"))
    value = chance.choice((chance.getrandbits(32), chance.getrandbits(8), 0xC4500, 0x4608))
    return struct.pack("<BIBI", 0xBF, gpa, 0xB8, value) + bytes.fromhex(opcode)


@pytest.mark.parametrize("seed", SEEDS)
def test_nonsense_at_the_interrupt_controllers(seed: int) -> None:
    """It may send NMIs and INIT to anybody: the guest may crash or stop in the middle."""
    requires("irqchip")
    chance = random.Random(seed)
    program = b"".join(_apic_access(chance) for _ in range(300))
    with Machine(guest(program + SLEEP), cpus=CPUS, memory=RAM, irqchip=True) as machine:
        stop = machine.run(timeout=0.5)
        assert stop.reason in HARMLESS_ENDS | {StopReason.CRASHED}, stop

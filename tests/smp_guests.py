"""Guests with interrupts and several processors, made of a few pieces of machine code.

A guest is what its first processor does (64-bit code at BASE, with RBX = the local APIC), what the
others do once they are started (at AP, with their APIC id in EDI), and its interrupt handlers:

    image = smp_image(start_aps() + FOREVER, ap=COUNT)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from types import TracebackType

from pyvmm.boot import Image, Mode, Segment
from pyvmm.machine import Machine
from pyvmm.stop import Stop
from tests.rsp_client import BASE, COUNT, COUNTERS, RAM
from tests.support import PATIENCE, wait_until

AP = BASE + 0x800  # where the other processors' code is
HANDLERS = BASE + 0x1000  # GPA; of vector n: HANDLERS + 0x100 * n
TRAMPOLINE, IDT, IDT_POINTER = 0x8000, 0x9000, 0x9600
TICKS = 0x21000  # GPA; counted by TICK

LAPIC_ID, LAPIC_EOI, LAPIC_SPURIOUS, ICR_LOW, ICR_HIGH = 0x20, 0xB0, 0xF0, 0x300, 0x310
LAPIC_TIMER, TIMER_START, TIMER_DIVIDE = 0x320, 0x380, 0x3E0
INIT, SIPI, FIXED = 0x4500, 0x4600, 0x4000
OTHERS = 0xC0000
PERIODIC, BY_1 = 0x20000, 0xB
TIMER_VECTOR, NMI_VECTOR = 0x20, 2

FOREVER = bytes.fromhex("ebfe")  # jmp $
IDLE = bytes.fromhex("fb f4 ebfd")  # sti; 1: hlt; jmp 1b
SLEEP = bytes.fromhex("fa f4 ebfc")  # 1: cli; hlt; jmp 1b: for good, if no NMI comes
LOAD_IDT = bytes.fromhex("0f011c25") + struct.pack("<I", IDT_POINTER)
IRETQ = bytes.fromhex("48cf")
UD2 = bytes.fromhex("0f0b")


def increment(gpa: int) -> bytes:
    """lock inc dword [gpa]"""
    return bytes.fromhex("f0ff0425") + struct.pack("<I", gpa)


def until(gpa: int, value: int) -> bytes:
    """1: cmp dword [gpa], value; jne 1b"""
    return bytes.fromhex("833c25") + struct.pack("<IB", gpa, value) + b"\x75\xf6"


def lapic(register: int, value: int) -> bytes:
    """mov dword [rbx + register], value"""
    return bytes.fromhex("c783") + struct.pack("<II", register, value)


def out8(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al"""
    return struct.pack("<2sHBBB", b"\x66\xba", port, 0xB0, value, 0xEE)


def out16(port: int, value: int) -> bytes:
    """mov dx, port; mov ax, value; out dx, ax"""
    return struct.pack("<2sH2sH2s", b"\x66\xba", port, b"\x66\xb8", value, b"\x66\xef")


POWER_OFF = out16(0x604, 0x2000) + SLEEP
EOI = lapic(LAPIC_EOI, 0)
TICK = increment(TICKS) + EOI + IRETQ


def start_aps() -> bytes:
    """INIT and SIPI to all other processors."""
    start = lapic(ICR_LOW, OTHERS | SIPI | TRAMPOLINE >> 12)
    return lapic(ICR_LOW, OTHERS | INIT) + start + start


def start_ap(apic_id: int) -> bytes:
    """INIT and SIPI to one of them."""
    to = lapic(ICR_HIGH, apic_id << 24)
    return to + lapic(ICR_LOW, INIT) + to + lapic(ICR_LOW, SIPI | TRAMPOLINE >> 12)


def start_timer(nanoseconds: int = 1_000_000) -> bytes:
    """A tick every so often; KVM's local APIC counts nanoseconds."""
    return (
        LOAD_IDT
        + lapic(TIMER_DIVIDE, BY_1)
        + lapic(LAPIC_TIMER, PERIODIC | TIMER_VECTOR)
        + lapic(TIMER_START, nanoseconds)
    )


# Real mode, then 64-bit code with the page tables and the GDT that the first processor got:
#   lgdt cs:[...]; mov cr4, PAE | OSFXSR; mov cr3, 0x1000; EFER.LME; mov cr0, PG | PE
#   ss = 0x10, rbx = local APIC, which is switched on; edi = its id; esp = 0x80000 - id * 0x1000
#   mov eax, AP; jmp rax
_TRAMPOLINE = bytes.fromhex(
    "2e660f01163b0066b8200600000f22e066b8001000000f22d866b9800000c06631d266b8000100000f30"
    "66b8130000800f22c066ea4180000008001f0000700000"
    "b8100000008ed0bb0000e0fec783f0000000ff0100008b7b20c1ef1889f8c1e00cbc0000080029c4"
    f"b8{struct.pack('<I', AP).hex()}ffe0"
)


def _gate(handler: int) -> bytes:
    low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
    return struct.pack("<HHHHII", low, 0x08, 0x8E00, middle, high, 0)


def smp_image(bsp: bytes, ap: bytes = COUNT, handlers: Mapping[int, bytes] | None = None) -> Image:
    """A guest of these pieces; `handlers` by vector."""
    code = struct.pack("<BI", 0xBB, 0xFEE00000) + lapic(LAPIC_SPURIOUS, 0x1FF) + bsp
    assert len(code) <= AP - BASE and len(ap) <= HANDLERS - AP
    pieces = {TRAMPOLINE: _TRAMPOLINE, BASE: code, AP: ap}
    table = bytearray(0x30 * 16)
    for vector, handler in (handlers or {}).items():
        gpa = HANDLERS + 0x100 * vector
        table[vector * 16 : vector * 16 + 16] = _gate(gpa)
        pieces[gpa] = handler
    pieces[IDT] = bytes(table)
    pieces[IDT_POINTER] = struct.pack("<HQ", len(table) - 1, IDT)
    segments = tuple(Segment(gpa, data, len(data)) for gpa, data in pieces.items())
    return Image("guest", "test", Mode.LONG, BASE, segments)


def pc(image: Image, cpus: int = 1, **options: bool) -> Machine:
    """A machine with interrupt controllers for such a guest."""
    return Machine(image, cpus=cpus, memory=RAM, irqchip=True, **options)


def u32(machine: Machine, gpa: int) -> int:
    """A number in guest memory."""
    return int.from_bytes(machine.read_memory(gpa, 4, physical=True), "little")


def counter(machine: Machine, vcpu_id: int) -> int:
    """The counter of a vCPU that runs COUNT."""
    return u32(machine, COUNTERS + 64 * vcpu_id)


def wait_counts(machine: Machine, vcpu_id: int) -> None:
    """Wait until a vCPU that runs COUNT counts on."""
    before = counter(machine, vcpu_id)
    wait_until(lambda: counter(machine, vcpu_id) != before, f"vCPU {vcpu_id} counts")


class Running:
    """A machine that is run on a thread.  A context manager; closes the machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stop: Stop | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)

    def _run(self) -> None:
        try:
            self.stop = self.machine.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.machine.interrupt()
            self._thread.join(PATIENCE)
        finally:
            self.machine.close()
        if self.error is not None:
            raise self.error

    def wait_end(self) -> Stop:
        """Wait until the machine has ended by itself."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the VM does not end"
        if self.error is not None:
            raise self.error
        assert self.stop is not None
        return self.stop

"""Where a single-step goes when its instruction faults: traps on the guest's exception handlers.

A step is made with the processor's trap flag, and delivering an exception clears it.  So a step
over an instruction that faults would run away through the whole handler.  For the one entry that
makes the step, therefore, the first byte of each exception handler is replaced by an instruction
that leaves the guest: `hlt`, which does so on every host, or int3 where an in-kernel irqchip keeps
`hlt` to itself.  The step then ends before the handler's first instruction, where a processor with
an in-circuit debugger would end it.  The trap flag that the exception saved on the handler's stack
is taken out again.

The same traps make up for hosts that deliver the #DB of a step at CPL 3 to the guest: its handler
is trapped too, and the delivery is undone.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from pyvmm import x86
from pyvmm.emulate import CannotComplete, Cpu, load_descriptor
from pyvmm.kvm import kvm_regs, kvm_sregs
from pyvmm.light import NamedTuple
from pyvmm.memory import GuestMemory, Unchanged, VirtualMemory
from pyvmm.x86 import HLT, CpuMode

_EXCEPTIONS = 32
_MAX_INSTRUCTION = 15  # bytes
_SMALLEST_ENTRY = 4  # bytes of one vector in an IVT; IDTs have more


class _Handler(NamedTuple):
    vector: int
    gva: int
    gpa: int


class _Trap(NamedTuple):
    """Where a trap goes: byte `offset` of a slot's `pages`, at these addresses of the guest's."""

    gva: int
    gpa: int
    pages: mmap.mmap
    offset: int


class StepTraps:
    """The traps of one VM.  Planted and removed by the vCPU that steps."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        # What _handlers was made from: IDT and paging registers, and the handlers' own entries in
        # the page tables.
        self._key: object = None
        self._mappings = Unchanged(memory, ())
        self._handlers: list[_Handler] = []
        self._gvas: frozenset[int] = frozenset()  # of _handlers
        self._traps: list[_Trap] = []  # of _handlers: one for each GPA
        self._planted: dict[int, tuple[mmap.mmap, int, int]] = {}  # by GPA; and the guest's byte
        self._trap_byte = HLT
        # A gate that we made: GPA of the IDT entry, what was in it, the trap it leads to.
        self._lent: tuple[int, bytes, _Handler] | None = None

    def plant(self, cpu: Cpu, start: int, trap: int, *, lend_db_gate: bool = False) -> None:
        """Put the traps (HLT or INT3) in place, but not into the instruction at GVA `start`.

        `lend_db_gate`: a guest without a handler for #DB gets a gate for this step.
        """
        self._trap_byte = trap
        planted = self._planted
        for gva, gpa, pages, offset in self._find_traps(cpu):
            if not 0 <= gva - start < _MAX_INSTRUCTION:
                planted[gpa] = pages, offset, pages[offset]
                pages[offset] = trap
        if lend_db_gate and all(h.vector != x86.VECTOR_DB for h in self._handlers):
            self._lend_db_gate(cpu)

    def _place(self, handler: _Handler) -> _Trap:
        slot = self._memory.find(handler.gpa)
        return _Trap(handler.gva, handler.gpa, slot.pages, handler.gpa - slot.gpa)

    def _lend_db_gate(self, cpu: Cpu) -> None:
        """Make a gate for vector 1, a copy of another one.

        Without one the step's #DB would become a double fault.  It leads to the second byte of that
        other one's handler, where nobody goes but through this gate.
        """
        model = next((h for h in self._handlers if h.gpa in self._planted), None)
        size, table = _entry_size(cpu), cpu.sregs.idt
        if model is None or table.limit < 2 * size - 1 or size != 16 or model.gpa & 0xFFF == 0xFFF:
            return
        trap = _Handler(x86.VECTOR_DB, model.gva + 1, model.gpa + 1)
        gate = bytearray(cpu.read(table.base + model.vector * size, size))
        gate[0:2] = (trap.gva & 0xFFFF).to_bytes(2, "little")
        gate[6:12] = (trap.gva >> 16).to_bytes(6, "little")
        at = table.base + x86.VECTOR_DB * size
        gpa = VirtualMemory(self._memory, cpu.sregs).translate(at)
        self._lent = gpa, self._memory.read(gpa, size), trap
        self._memory.write(gpa, gate)
        _, gpa, pages, offset = self._place(trap)
        self._planted[gpa] = pages, offset, pages[offset]
        pages[offset] = self._trap_byte

    def remove(self) -> None:
        """Put the guest's bytes back."""
        if self._lent is not None:
            self._memory.write(*self._lent[:2])
            self._lent = None
        for pages, offset, byte in self._planted.values():
            # Not if the guest has written there: then its byte is the newer one.
            if pages[offset] == self._trap_byte:
                pages[offset] = byte
        self._planted.clear()

    @property
    def length(self) -> int:
        """How far RIP is behind a trap that has left the guest, in bytes."""
        return 1 if self._trap_byte == HLT else 0

    def may_have_left(self, gva: int) -> bool:
        """Whether a trap may be what left the guest with its program counter at `gva`."""
        gva -= self.length
        return gva in self._gvas or (self._lent is not None and gva == self._lent[2].gva)

    def hit(self, cpu: Cpu, start_rip: int, *, db_delivered: bool) -> bool:
        """Whether a vCPU that just left the guest is in a planted trap.

        Either the step's own #DB was delivered to the guest (`db_delivered`); or the frame on the
        stack says that the instruction at `start_rip` was interrupted, which tells a fault from a
        jump to behind the handler's first byte.
        """
        gva = x86.linear_address(cpu.sregs.cs.base, cpu.regs.rip - self.length, cpu.mode)
        traps = self._handlers if self._lent is None else [*self._handlers, self._lent[2]]
        vectors = [h.vector for h in traps if h.gva == gva and h.gpa in self._planted]
        if db_delivered and x86.VECTOR_DB in vectors:
            return True  # and the frame names the next instruction, wherever that is
        saved_rips = frame(cpu)[:2] if vectors else []  # one may be an error code
        return any(0 <= rip - start_rip <= _MAX_INSTRUCTION for rip in saved_rips)

    def _find_traps(self, cpu: Cpu) -> list[_Trap]:
        """Traps for the handlers that the IDT names now.

        They are found anew when it changes, or where they are mapped: a trap at an old place would
        be in memory that is something else's by now.
        """
        sregs = cpu.sregs
        limit = sregs.idt.limit
        if limit < _SMALLEST_ENTRY - 1:
            return []
        entry_size = _entry_size(cpu)
        size = min(limit + 1, _EXCEPTIONS * entry_size)
        if size < entry_size:
            return []
        try:
            idt = cpu.read(sregs.idt.base, size)
        except Exception:  # no IDT that could be read: nothing to trap
            return []
        key = (idt, cpu.mode, sregs.cr0, sregs.cr3, sregs.cr4, sregs.gdt.base)
        if key != self._key or not self._mappings.holds():
            virtual = VirtualMemory(self._memory, sregs)
            pages = {gva & ~0xFFF for _, gva in _handler_addresses(cpu, idt)}
            entries = {gpa: data for gva in pages for gpa, data in virtual.entries(gva)}
            self._mappings = Unchanged(self._memory, entries.items())
            table = range(
                sregs.idt.base, sregs.idt.base + size
            )  # an IVT full of zeros names itself
            self._key = key
            self._handlers = [
                h for h in _handlers(cpu, virtual, idt, self._memory) if h.gva not in table
            ]
            self._gvas = frozenset(handler.gva for handler in self._handlers)
            self._traps = list({h.gpa: self._place(h) for h in self._handlers}.values())
        return self._traps


def _entry_size(cpu: Cpu) -> int:
    if cpu.mode is CpuMode.REAL:
        return _SMALLEST_ENTRY
    return 16 if cpu.sregs.efer & x86.EFER_LMA else 8


def _handlers(
    cpu: Cpu, virtual: VirtualMemory, idt: bytes, memory: GuestMemory
) -> Iterator[_Handler]:
    """The handlers of the IDT or IVT whose first byte is in RAM."""
    for vector, gva in _handler_addresses(cpu, idt):
        try:
            gpa = virtual.translate(gva)
            memory.find(gpa)
        except Exception:  # not mapped now, or not RAM: it cannot be trapped
            continue
        yield _Handler(vector, gva, gpa)


def _handler_addresses(cpu: Cpu, idt: bytes) -> Iterator[tuple[int, int]]:
    if cpu.mode is CpuMode.REAL:
        for vector, (offset, selector) in enumerate(
            struct.iter_unpack("<HH", idt[: len(idt) & ~3])
        ):
            yield vector, (selector << 4) + offset
        return
    size = _entry_size(cpu)
    for vector in range(len(idt) // size):
        gate = idt[vector * size : (vector + 1) * size]
        low, high = struct.unpack("<QQ", gate.ljust(16, b"\0"))
        present, kind = low >> 47 & 1, low >> 40 & 0x1F
        offset = low & 0xFFFF
        if kind in (x86.TYPE_INTERRUPT_GATE, x86.TYPE_TRAP_GATE):
            offset |= low >> 32 & 0xFFFF0000 | (high & 0xFFFFFFFF) << 32
        elif kind not in (x86.TYPE_INTERRUPT_GATE16, x86.TYPE_TRAP_GATE16):
            continue
        if present:
            try:
                base = 0 if size == 16 else load_descriptor(cpu, low >> 16 & 0xFFFF).base
            except CannotComplete:
                continue
            yield vector, base + offset


def _word_size(cpu: Cpu) -> int:
    """How many bytes a handler's frame has for each value."""
    return 8 if cpu.mode is CpuMode.LONG else 2 if cpu.mode is CpuMode.REAL else 4


def frame(cpu: Cpu) -> list[int]:
    """The six values on top of the stack of a handler that was just entered."""
    size = _word_size(cpu)
    stack = x86.linear_address(cpu.sregs.ss.base, cpu.regs.rsp, cpu.mode)
    values = []
    for n in range(6):
        try:
            values.append(int.from_bytes(cpu.read(stack + n * size, size), "little"))
        except Exception:  # the stack ends before: then that value is not part of the frame
            values.append(0)
    return values


def gp_handler(memory: GuestMemory, cpu: Cpu) -> int | None:
    """The GPA of the guest's #GP handler; None if it has none, or knows no rings."""
    if cpu.mode is CpuMode.REAL:
        return None
    size = _entry_size(cpu)
    gate = cpu.sregs.idt.base + x86.VECTOR_GP * size
    try:
        if x86.VECTOR_GP * size + size - 1 > cpu.sregs.idt.limit:
            return None
        entry = bytes(x86.VECTOR_GP * size) + cpu.read(gate, size)
        found = _handlers(cpu, VirtualMemory(memory, cpu.sregs), entry, memory)
        return next((h.gpa for h in found if h.vector == x86.VECTOR_GP), None)
    except Exception:  # no IDT that could be read
        return None


def undo_fault(cpu: Cpu) -> bool:
    """Go back from the first instruction of a handler with an error code to what faulted in ring 3.

    False, with nothing changed, if it was not entered from there.
    """
    _, rip, cs, rflags, rsp, ss = frame(cpu)
    if cs & 3 != 3:
        return False
    try:
        cpu.sregs.cs, cpu.sregs.ss = load_descriptor(cpu, cs), load_descriptor(cpu, ss)
    except CannotComplete:
        return False
    cpu.regs.rip, cpu.regs.rsp = rip, rsp
    cpu.regs.rflags = rflags & ~x86.RFLAGS_RF
    return True


def undo_step_delivery(cpu: Cpu, before: kvm_sregs) -> bool:
    """Go back from the #DB handler, to which the host has delivered a step at CPL 3, as iret does.

    False, with nothing changed, if that led from segments to others that are not in the GDT.
    """
    rip, cs, rflags, rsp, ss = frame(cpu)[:5]
    try:
        code = before.cs if cs == before.cs.selector else load_descriptor(cpu, cs)
        stack = before.ss if ss == before.ss.selector else load_descriptor(cpu, ss)
    except CannotComplete:
        return False
    cpu.sregs.cs, cpu.sregs.ss = code, stack
    cpu.regs.rip, cpu.regs.rsp = rip, rsp
    cpu.regs.rflags = rflags & ~x86.RFLAGS_TF
    return True


def clear_saved_tf(cpu: Cpu, before: kvm_regs) -> None:
    """At the first instruction of a handler: take TF out of the flags that the exception saved."""
    size, values = _word_size(cpu), frame(cpu)
    error_code = int(values[0] != before.rip and values[1] == before.rip)
    saved = values[error_code + 2]
    if saved & x86.RFLAGS_TF:
        stack = x86.linear_address(cpu.sregs.ss.base, cpu.regs.rsp, cpu.mode)
        cleared = (saved & ~x86.RFLAGS_TF).to_bytes(size, "little")
        cpu.write(stack + (error_code + 2) * size, cleared)

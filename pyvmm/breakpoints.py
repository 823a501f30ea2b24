"""The breakpoints of a debugger: instructions patched in guest memory, and debug registers.

A software breakpoint is a byte of the guest's code replaced by a one-byte instruction that leaves
the guest: int3 where the host lets that happen, else hlt (vm.breakpoint_instruction decides).  It
is kept by GPA, where it was put in: there a vCPU meets it, whatever the address it came by, and
there it is taken out, whatever the debugger's GVA is mapped to by then.

Nobody but the vCPUs sees the patches: reads of guest memory by the debugger go through hide(), and
writes through write(), which changes the saved byte of a patched one.

In ring 3 a planted hlt raises #GP, so the first byte of the guest's #GP handler holds one, too: the
*guard*.  Where a debugger has a breakpoint, guard and patch are the same hlt.

Changed only while all vCPUs are parked, by the debug server's thread (or by a reset); vCPU threads
ask at() and only_written(), which keeps what a read-watchpoint's place held last.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from pyvmm.errors import GuestMemoryError
from pyvmm.hypervisor import VM
from pyvmm.paging import Fault, FaultReason, PagingRegisters, TranslationFault, gva_end
from pyvmm.steptraps import gp_handler
from pyvmm.target import BreakpointKind, TargetError
from pyvmm.vcpurecord import (
    ACCESS,
    EXECUTE,
    WRITE,
    Capability,
    Guard,
    HardwareBreakpoint,
)
from pyvmm.x86 import HLT, CpuMode

_DEBUG_REGISTERS = 4  # DR0 to DR3
_REAL_MODE_END = 1 << 20  # GVA; (the 64 KiB behind it that real mode could reach hold no code)

_DEBUG_REGISTER_KIND = {
    BreakpointKind.HARDWARE: EXECUTE,
    BreakpointKind.WRITE: WRITE,
    BreakpointKind.READ: ACCESS,  # x86 cannot watch for reads only: see only_written()
    BreakpointKind.ACCESS: ACCESS,
}


@dataclass
class Patch:
    """A patched byte: `instruction` in place of the guest's `original`.

    `gvas` are the addresses that the debugger knows it by: several if a page is mapped twice.
    """

    original: int
    instruction: int
    gvas: set[int]


@dataclass
class Watch:
    """A hardware breakpoint, or a piece of a watchpoint that one debug register can watch.

    `value` is what was there when it was last looked at.  `wanted` are the (gva, length) that the
    debugger knows it by: several if what it watches overlaps.
    """

    kind: BreakpointKind
    gva: int
    length: int
    value: bytes = b""
    wanted: set[tuple[int, int]] = field(default_factory=set)


def _split(gva: int, length: int) -> list[tuple[int, int]]:
    """(gva, length) of what debug registers can watch: 8, 4, 2 or 1 aligned bytes.

    It ends when there are more pieces than registers.
    """
    pieces: list[tuple[int, int]] = []
    while length and len(pieces) <= _DEBUG_REGISTERS:
        size = next(size for size in (8, 4, 2, 1) if size <= length and not gva % size)
        pieces.append((gva, size))
        gva, length = gva + size, length - size
    return pieces


class Breakpoints:
    """All breakpoints of one VM."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._patches: dict[int, Patch] = {}  # by GPA
        self._catch_int3 = False
        self.watches: list[Watch] = []  # entry n is in debug register n of every vCPU

    def at(self, vcpu_id: int, gva: int) -> bool:
        """Whether a software breakpoint is what a vCPU executes at `gva`.

        Also under another GVA than the debugger's: the guest may have the page mapped twice.
        """
        if not self._patches:
            return False
        try:
            return self._vm.translate(vcpu_id, gva) in self._patches
        except Exception:  # not mapped any more
            return any(gva in patch.gvas for patch in self._patches.values())

    def insert_software(self, vcpu_id: int, gva: int) -> None:
        """Patch the byte at `gva`; inserting twice is fine.

        Raises TargetError where nothing is mapped, and VmError where no instruction leaves the
        guest.  If the guest has remapped `gva` since the first time, then both bytes are patched.
        """
        vcpu_id = self._who_executes(vcpu_id, gva)
        try:
            if gva >= gva_end(PagingRegisters.of(self._vm.cpu(vcpu_id).sregs)):
                # A kernel that is linked high, and not there yet: it would wrap around, into other
                # code.  (A debugger that was told of a 32-bit processor sends no such address.)
                raise TranslationFault(gva, Fault(FaultReason.TOO_WIDE))
            gpa = self._vm.translate(vcpu_id, gva)
            self._vm.memory.find(gpa)
        except (TranslationFault, GuestMemoryError):
            raise TargetError(
                errno.EFAULT, f"nothing is mapped at {gva:#x} yet: use hbreak"
            ) from None
        patch = self._patches.get(gpa)
        if patch is not None and self._is_there(gpa, patch):
            patch.gvas.add(gva)
            return
        gvas = {gva} if patch is None else {gva, *patch.gvas}  # the guest has loaded other code
        patch = Patch(self._guests_byte(gpa), self._vm.breakpoint_instruction(vcpu_id), gvas)
        self._patches[gpa] = patch
        self._vm.memory.write(gpa, bytes((patch.instruction,)))
        if patch.instruction == HLT:
            self._vm.hlt_traps.add(gpa)
        self._guard_user_mode(vcpu_id)
        self.tell_all()

    def prepare_to_run(self, vcpu_id: int) -> None:
        """`vcpu_id` is one of those that run now; memory and the IDT may be other than before."""
        self._guard_user_mode(vcpu_id)
        for watch in self.watches:
            if watch.kind is BreakpointKind.READ:  # the debugger may have written there
                watch.value = self._value(vcpu_id, watch.gva, watch.length)

    def _guests_byte(self, gpa: int) -> int:
        return self.hide(gpa, self._vm.memory.read(gpa, 1))[0]

    def _who_executes(self, vcpu_id: int, gva: int) -> int:
        """Whose mode and page tables count: not those of a vCPU in real mode for all that it cannot
        reach, because that is what a processor is in that has not been started."""
        vm = self._vm
        if gva >= _REAL_MODE_END and vm.cpu(vcpu_id).mode is CpuMode.REAL:
            others = (n for n in vm.vcpu_ids() if vm.cpu(n).mode is not CpuMode.REAL)
            return next(others, vcpu_id)
        return vcpu_id

    def plant_again(self) -> None:
        """Memory was loaded anew: patch it where the bytes are those that were patched before.

        Elsewhere is code that the guest has put there itself, and has not yet this time.
        """
        self._lift_guard()
        for gpa, patch in list(self._patches.items()):
            if self._vm.memory.read(gpa, 1)[0] == patch.original:
                self._vm.memory.write(gpa, bytes((patch.instruction,)))

    def remove_software(self, gva: int) -> None:
        """Put the guest's byte back; removing what is not there is fine."""
        for gpa, patch in list(self._patches.items()):
            patch.gvas.discard(gva)
            if not patch.gvas:
                self._take_out(gpa)
        if not self._patches:
            self.tell_all()

    def _take_out(self, gpa: int) -> None:
        patch = self._patches.pop(gpa)
        guard = self._vm.guard
        if guard is not None and guard.gpa == gpa:
            guard.original = patch.original
        elif self._is_there(gpa, patch):
            self._vm.memory.write(gpa, bytes((patch.original,)))
        self._vm.hlt_traps.discard(gpa)
        if not self._vm.hlt_traps:
            self._lift_guard()

    def _guard_user_mode(self, vcpu_id: int) -> None:
        """Make planted hlts work in ring 3, too, if the guest has a #GP handler by now.

        That of `vcpu_id`, or, where it has none, of another one.  To be asked for again before the
        guest runs: it may have loaded another IDT.
        """
        vm = self._vm
        if not vm.hlt_traps:
            return
        handlers = (gp_handler(vm.memory, vm.cpu(n)) for n in (vcpu_id, *vm.vcpu_ids()))
        gpa = next((gpa for gpa in handlers if gpa is not None), None)
        if gpa is None or (vm.guard is not None and vm.guard.gpa == gpa):
            return
        self._lift_guard()
        vm.guard = Guard(gpa, self._guests_byte(gpa))
        vm.memory.write(gpa, bytes((HLT,)))

    def _lift_guard(self) -> None:
        guard, self._vm.guard = self._vm.guard, None
        if guard is None or guard.gpa in self._patches:
            return
        if self._vm.memory.read(guard.gpa, 1)[0] == HLT:
            self._vm.memory.write(guard.gpa, bytes((guard.original,)))

    def _is_there(self, gpa: int, patch: Patch) -> bool:
        """Whether the patch is still in memory: the guest may have loaded other code meanwhile."""
        return self._vm.memory.read(gpa, 1)[0] == patch.instruction

    def insert_hardware(self, vcpu_id: int, kind: BreakpointKind, gva: int, length: int) -> None:
        """Use debug registers of every vCPU: one, or as many as a watched range needs.

        Raises TargetError, with nothing done, when there are not enough left.
        """
        length = 1 if kind is BreakpointKind.HARDWARE else length
        host = self._vm.host
        works = host.hardware_breakpoint if kind is BreakpointKind.HARDWARE else host.watchpoint
        if not works:
            if kind is BreakpointKind.HARDWARE:
                raise TargetError(errno.ENOTSUP, "hardware breakpoints never hit on this host")
            raise TargetError(
                errno.ENOTSUP,
                "watchpoints never hit on this host: in gdb, set can-use-hw-watchpoints 0",
            )
        pieces = _split(gva, length)
        there = [w for w in self.watches if w.kind is kind and (w.gva, w.length) in pieces]
        free, needed = _DEBUG_REGISTERS - len(self.watches), len(pieces) - len(there)
        if needed > free:
            raise TargetError(
                errno.ENOSPC,
                f"{length} bytes at {gva:#x} need more debug registers than are free ({free})"
                if free
                else "all four debug registers are in use",
            )
        for watch in there:
            watch.wanted.add((gva, length))
            pieces.remove((watch.gva, watch.length))
        for piece in pieces:
            watch = Watch(kind, *piece, wanted={(gva, length)})
            if kind is BreakpointKind.READ:  # the others are not asked whether it has changed
                watch.value = self._value(vcpu_id, *piece)
            self.watches.append(watch)
        if pieces:
            self.tell_all()

    def remove_hardware(self, kind: BreakpointKind, gva: int, length: int) -> None:
        """Free the debug registers; removing what is not there is fine."""
        length = 1 if kind is BreakpointKind.HARDWARE else length
        for watch in self.watches:
            if watch.kind is kind:
                watch.wanted.discard((gva, length))
        kept = [watch for watch in self.watches if watch.wanted]
        if len(kept) != len(self.watches):
            self.watches = kept
            self.tell_all()

    def _value(self, vcpu_id: int, gva: int, length: int) -> bytes:
        try:
            return self._vm.read_virtual(vcpu_id, gva, length)
        except Exception:  # not mapped yet: nothing to compare with
            return b""

    def only_written(self, vcpu_id: int, watch: Watch) -> bool:
        """Whether a read-watchpoint's hit was a write: then its value has changed.

        (A write of the same value cannot be told from a read, and is reported as one.)
        """
        if watch.kind is not BreakpointKind.READ:
            return False
        before, watch.value = watch.value, self._value(vcpu_id, watch.gva, watch.length)
        return watch.value != before

    def tell_all(self) -> None:
        """Make every vCPU's capabilities and debug registers what the lists ask for."""
        on = bool(self._patches) or self._catch_int3
        in_hardware = [
            HardwareBreakpoint(w.gva, _DEBUG_REGISTER_KIND[w.kind], w.length) for w in self.watches
        ]
        for vcpu_id in self._vm.vcpu_ids():
            if not on or self._vm.host.breakpoint:
                self._vm.set_capability(vcpu_id, Capability.BPT_EXIT, on)
            self._vm.set_hardware_breakpoints(vcpu_id, in_hardware)

    @property
    def catch_int3(self) -> bool:
        """Whether the guest's own int3 stops, too."""
        return self._catch_int3

    @catch_int3.setter
    def catch_int3(self, on: bool) -> None:
        self._catch_int3 = on
        self.tell_all()

    def clear(self) -> int:
        """Remove every breakpoint; returns how many there were."""
        count = sum(len(patch.gvas) for patch in self._patches.values())
        count += len({(watch.kind, wanted) for watch in self.watches for wanted in watch.wanted})
        for gpa in list(self._patches):
            self._take_out(gpa)
        self.watches = []
        self.tell_all()
        return count

    def hide(self, gpa: int, data: bytes) -> bytes:
        """`data`, which was read at `gpa`, with the guest's own bytes instead of ours."""
        ours = [(at, p.instruction, p.original) for at, p in self._patches.items()]
        if guard := self._vm.guard:
            ours.append((guard.gpa, HLT, guard.original))
        inside = [row for row in ours if gpa <= row[0] < gpa + len(data)]
        if not inside:
            return data
        clean = bytearray(data)
        for at, instruction, original in inside:
            if data[at - gpa] == instruction:  # else the guest's byte is the newer one
                clean[at - gpa] = original
        return bytes(clean)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory under the patches: they stay, and hold the new bytes."""
        patched = bytearray(data)
        for at, patch in self._patches.items():
            if gpa <= at < gpa + len(data):
                patch.original = data[at - gpa]
                patched[at - gpa] = patch.instruction
        guard = self._vm.guard
        if guard is not None and gpa <= guard.gpa < gpa + len(data):
            guard.original = data[guard.gpa - gpa]
            patched[guard.gpa - gpa] = HLT
        self._vm.memory.write(gpa, patched)

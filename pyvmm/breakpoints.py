"""The breakpoints of a debugger: instructions patched in guest memory, and debug registers.

A software breakpoint is a byte of the guest's code replaced by a one-byte instruction that leaves
the guest: int3 where the host lets that happen, else hlt (vm.breakpoint_instruction decides).  It
is kept by GPA, where it was put in: there a vCPU meets it, whatever the address it came by, and
there it is taken out, whatever the debugger's GVA is mapped to by then.

Nobody but the vCPUs sees the patches: reads of guest memory by the debugger go through hide(), and
writes through write(), which changes the saved byte of a patched one.

Used only while all vCPUs are parked, by the debug server's thread; vCPU threads only ask at().
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pyvmm.hypervisor import VM
from pyvmm.steptraps import gp_handler
from pyvmm.target import BreakpointKind, TargetError
from pyvmm.vcpurecord import (
    ACCESS,
    EXECUTE,
    WRITE,
    Capability,
    Guard,
    HardwareBreakpoint,
    VmError,
)

HLT = 0xF4

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
    """A hardware breakpoint or watchpoint; `value` is what was there when it was last looked at."""

    kind: BreakpointKind
    gva: int
    length: int
    value: bytes = b""


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
        """Patch the byte at `gva`; inserting twice is fine.  Raises TargetError.

        If the guest has remapped `gva` since the first time, then both bytes are patched.
        """
        try:
            gpa = self._vm.translate(vcpu_id, gva)
            self._vm.memory.find(gpa)
        except Exception:
            raise TargetError(
                errno.EFAULT, f"nothing is mapped at {gva:#x} yet: use hbreak"
            ) from None
        if gpa in self._patches:
            self._patches[gpa].gvas.add(gva)
            return
        try:
            instruction = self._vm.breakpoint_instruction(vcpu_id)
        except VmError as error:
            raise TargetError(errno.ENOTSUP, error.message) from None
        original = self._vm.memory.read(gpa, 1)[0]
        self._patches[gpa] = Patch(original, instruction, {gva})
        self._vm.memory.write(gpa, bytes((instruction,)))
        if instruction == HLT:
            self._vm.hlt_traps.add(gpa)
        self.guard_user_mode(vcpu_id)
        self.tell_all()

    def plant_again(self) -> None:
        """Memory was loaded anew: patch it where the bytes are those that were patched before.

        Elsewhere is code that the guest has put there itself, and has not yet this time.
        """
        self._lift_guard()
        for gpa, patch in self._patches.items():
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
        if self._is_there(gpa, patch):
            self._vm.memory.write(gpa, bytes((patch.original,)))
        self._vm.hlt_traps.discard(gpa)
        if not self._vm.hlt_traps:
            self._lift_guard()

    def guard_user_mode(self, vcpu_id: int) -> None:
        """Make planted hlts work in ring 3, too, if the guest has a #GP handler by now.

        To be asked for again before the guest runs: it may have loaded another IDT.
        """
        if not self._vm.hlt_traps:
            return
        gpa = gp_handler(self._vm.memory, self._vm.cpu(vcpu_id))
        if self._vm.guard is not None and self._vm.guard.gpa == gpa:
            return
        self._lift_guard()
        if gpa is not None and gpa not in self._patches:
            self._vm.guard = Guard(gpa, self._vm.memory.read(gpa, 1)[0])
            self._vm.memory.write(gpa, bytes((HLT,)))

    def _lift_guard(self) -> None:
        guard, self._vm.guard = self._vm.guard, None
        if guard is not None and self._vm.memory.read(guard.gpa, 1)[0] == HLT:
            self._vm.memory.write(guard.gpa, bytes((guard.original,)))

    def _is_there(self, gpa: int, patch: Patch) -> bool:
        """Whether the patch is still in memory: the guest may have loaded other code meanwhile."""
        return self._vm.memory.read(gpa, 1)[0] == patch.instruction

    def insert_hardware(self, vcpu_id: int, kind: BreakpointKind, gva: int, length: int) -> None:
        """Use a debug register of every vCPU.  Raises TargetError when there is none left."""
        length = 1 if kind is BreakpointKind.HARDWARE else length
        if any((w.kind, w.gva, w.length) == (kind, gva, length) for w in self.watches):
            return
        if gva % length:
            raise TargetError(errno.EINVAL, f"{length} bytes are watched at a multiple of {length}")
        host = self._vm.host
        works = host.hardware_breakpoint if kind is BreakpointKind.HARDWARE else host.watchpoint
        if not works:
            if kind is BreakpointKind.HARDWARE:
                raise TargetError(errno.ENOTSUP, "hardware breakpoints never hit on this host")
            raise TargetError(
                errno.ENOTSUP,
                "watchpoints never hit on this host: in gdb, set can-use-hw-watchpoints 0",
            )
        if len(self.watches) == 4:
            raise TargetError(errno.ENOSPC, "all four debug registers are in use")
        watch = Watch(kind, gva, length)
        if kind is BreakpointKind.READ:  # the others are not asked whether it has changed
            watch.value = self._value(vcpu_id, gva, length)
        self.watches.append(watch)
        self.tell_all()

    def remove_hardware(self, kind: BreakpointKind, gva: int, length: int) -> None:
        """Free the debug register; removing what is not there is fine."""
        length = 1 if kind is BreakpointKind.HARDWARE else length
        kept = [w for w in self.watches if (w.kind, w.gva, w.length) != (kind, gva, length)]
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
        for vcpu_id in self._vm.vcpu_ids():
            self.tell(vcpu_id)

    def tell(self, vcpu_id: int) -> None:
        """The same for one vCPU, also for one that is new."""
        on = bool(self._patches) or self._catch_int3
        if not on or self._vm.host.breakpoint:
            self._vm.set_capability(vcpu_id, Capability.BPT_EXIT, on)
        self._vm.set_hardware_breakpoints(
            vcpu_id,
            [
                HardwareBreakpoint(w.gva, _DEBUG_REGISTER_KIND[w.kind], w.length)
                for w in self.watches
            ],
        )

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
        count = sum(len(patch.gvas) for patch in self._patches.values()) + len(self.watches)
        for gpa in list(self._patches):
            self._take_out(gpa)
        self.watches = []
        self.tell_all()
        return count

    def hide(self, gpa: int, data: bytes) -> bytes:
        """`data`, which was read at `gpa`, with the guest's own bytes instead of ours."""
        inside = [at for at in self._patches if gpa <= at < gpa + len(data)]
        guard = self._vm.guard
        if guard is not None and gpa <= guard.gpa < gpa + len(data):
            data = data[: guard.gpa - gpa] + bytes((guard.original,)) + data[guard.gpa - gpa + 1 :]
        if not inside:
            return data
        clean = bytearray(data)
        for at in inside:
            patch = self._patches[at]
            if clean[at - gpa] == patch.instruction:  # else the guest's byte is the newer one
                clean[at - gpa] = patch.original
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

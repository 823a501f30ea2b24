"""The breakpoints of a debugger: instructions patched in guest memory, and debug registers.

A software breakpoint is a byte of the guest's code replaced by a one-byte instruction that leaves
the guest: int3 where the host lets that happen, else hlt (vm.breakpoint_instruction decides).  It
is *found* by the GVA the debugger gave, and *taken out* where it was put in, by GPA: the guest may
have mapped the address to something else in between.

Nobody but the vCPUs sees the patches: reads of guest memory by the debugger go through hide(), and
writes through write(), which changes the saved byte of a patched one.

Used only while all vCPUs are parked, by the debug server's thread; vCPU threads only ask at().
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pyvmm.hypervisor import VM
from pyvmm.target import BreakpointKind, TargetError
from pyvmm.vcpurecord import ACCESS, EXECUTE, WRITE, Capability, HardwareBreakpoint, VmError

HLT = 0xF4

_DEBUG_REGISTER_KIND = {
    BreakpointKind.HARDWARE: EXECUTE,
    BreakpointKind.WRITE: WRITE,
    BreakpointKind.READ: ACCESS,  # x86 cannot watch for reads only: see only_written()
    BreakpointKind.ACCESS: ACCESS,
}


@dataclass(frozen=True)
class Patch:
    """A software breakpoint: `instruction` at `gpa` in place of the guest's `original` byte."""

    gva: int
    gpa: int
    original: int
    instruction: int


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
        self._patches: dict[int, Patch] = {}  # by GVA
        self._catch_int3 = False
        self.watches: list[Watch] = []  # entry n is in debug register n of every vCPU

    def at(self, vcpu_id: int, gva: int) -> bool:
        """Whether a software breakpoint is what a vCPU would execute at `gva`.

        Also under another GVA than the debugger's: the guest may have the page mapped twice.
        """
        if gva in self._patches:
            return True
        if not self._patches:
            return False
        try:
            gpa = self._vm.translate(vcpu_id, gva)
        except Exception:  # not mapped any more
            return False
        return any(patch.gpa == gpa for patch in self._patches.values())

    def insert_software(self, vcpu_id: int, gva: int) -> None:
        """Patch the byte at `gva`; inserting twice is fine.  Raises TargetError."""
        if gva in self._patches:
            return
        try:
            gpa = self._vm.translate(vcpu_id, gva)
            self._vm.memory.find(gpa)
        except Exception:
            raise TargetError(
                errno.EFAULT, f"nothing is mapped at {gva:#x} yet: use hbreak"
            ) from None
        twin = next((patch for patch in self._patches.values() if patch.gpa == gpa), None)
        if twin is not None:  # the same byte under another address
            self._patches[gva] = Patch(gva, gpa, twin.original, twin.instruction)
            return
        try:
            instruction = self._vm.breakpoint_instruction(vcpu_id)
        except VmError as error:
            raise TargetError(errno.ENOTSUP, error.message) from None
        original = self._vm.memory.read(gpa, 1)[0]
        self._patches[gva] = Patch(gva, gpa, original, instruction)
        self._vm.memory.write(gpa, bytes((instruction,)))
        if instruction == HLT:
            self._vm.hlt_traps.add(gpa)
        self.tell_all()

    def remove_software(self, gva: int) -> None:
        """Put the guest's byte back; removing what is not there is fine."""
        patch = self._patches.pop(gva, None)
        if patch is None or any(p.gpa == patch.gpa for p in self._patches.values()):
            return
        # Only if the patch is still there: the guest may have loaded other code meanwhile.
        if self._vm.memory.read(patch.gpa, 1)[0] == patch.instruction:
            self._vm.memory.write(patch.gpa, bytes((patch.original,)))
        self._vm.hlt_traps.discard(patch.gpa)
        if not self._patches:
            self.tell_all()

    def insert_hardware(self, vcpu_id: int, kind: BreakpointKind, gva: int, length: int) -> None:
        """Use a debug register of every vCPU.  Raises TargetError when there is none left."""
        if any((w.kind, w.gva, w.length) == (kind, gva, length) for w in self.watches):
            return
        length = 1 if kind is BreakpointKind.HARDWARE else length
        if gva % length:
            raise TargetError(errno.EINVAL, f"{length} bytes are watched at a multiple of {length}")
        host = self._vm.host
        works = host.hardware_breakpoint if kind is BreakpointKind.HARDWARE else host.watchpoint
        if not works:
            what = "hardware breakpoints" if kind is BreakpointKind.HARDWARE else "watchpoints"
            raise TargetError(errno.ENOTSUP, f"{what} never hit on this host (see monitor probe)")
        if len(self.watches) == 4:
            raise TargetError(errno.ENOSPC, "all four debug registers are in use")
        self.watches.append(Watch(kind, gva, length, self._value(vcpu_id, gva, length)))
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
        if self._vm.host.breakpoint:
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
        count = len(self._patches) + len(self.watches)
        for gva in list(self._patches):
            self.remove_software(gva)
        if self.watches:
            self.watches = []
            self.tell_all()
        return count

    def hide(self, gpa: int, data: bytes) -> bytes:
        """`data`, which was read at `gpa`, with the guest's own bytes instead of ours."""
        inside = [p for p in self._patches.values() if gpa <= p.gpa < gpa + len(data)]
        if not inside:
            return data
        clean = bytearray(data)
        for patch in inside:
            clean[patch.gpa - gpa] = patch.original
        return bytes(clean)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory under the patches: they stay, and hold the new bytes."""
        patched = bytearray(data)
        for gva, patch in list(self._patches.items()):
            if gpa <= patch.gpa < gpa + len(data):
                original = data[patch.gpa - gpa]
                self._patches[gva] = Patch(gva, patch.gpa, original, patch.instruction)
                patched[patch.gpa - gpa] = patch.instruction
        self._vm.memory.write(gpa, patched)

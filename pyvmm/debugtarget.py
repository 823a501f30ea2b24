"""A machine as the stub's Target: what packets ask for, done with run control and the hypervisor.

Everything here runs on the debug server's thread.  Unless target.py says otherwise a method is
called only while all vCPUs are parked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

from pyvmm import debugstate, paging, x86
from pyvmm.boot.image import Mode
from pyvmm.errors import GuestMemoryError
from pyvmm.handles import VcpuHandle
from pyvmm.kvm import kvm_regs, kvm_sregs
from pyvmm.light import TYPE_CHECKING
from pyvmm.mappings import MappedRange, mappings
from pyvmm.memory import VirtualMemory
from pyvmm.names import Names
from pyvmm.registers import Architecture, RegisterFile, Value, architecture_for
from pyvmm.runcontrol import RunControl
from pyvmm.symbols import elf_bits
from pyvmm.target import (
    Action,
    ActionKind,
    BreakpointKind,
    ExecFile,
    MemoryRegion,
    StopReport,
    TargetError,
)
from pyvmm.vcpurecord import VmError

if TYPE_CHECKING:
    from pyvmm.machine import Machine

# What a mode says of the kernel: in compatibility mode a 64-bit one runs a 32-bit program.
_KERNEL_BITS = {
    x86.CpuMode.LONG: 64,
    x86.CpuMode.COMPAT32: 64,
    x86.CpuMode.COMPAT16: 64,
    x86.CpuMode.PROTECTED32: 32,
}
# Of all 64-bit addresses: a region of 1 << 64 bytes does not fit into gdb's numbers.
_HALF = 1 << 63
_PATIENCE_SECONDS = 10.0  # how long a detach waits for the vCPUs to park
_ALL_PERMISSIONS = paging.Permissions(writable=True, user=True, no_execute=False)


class _Errors:
    """Whatever the layers below refuse becomes an error that the debugger is told."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if isinstance(error, VmError):
            raise TargetError(error.errno or errno.EIO, error.message) from None
        if isinstance(error, OSError):
            raise TargetError(error.errno or errno.EIO, error.strerror or str(error)) from None
        if isinstance(error, (GuestMemoryError, paging.TranslationFault)):
            raise TargetError(errno.EFAULT, str(error)) from None


_errors = _Errors()


class MachineTarget:
    """Implements target.Target."""

    def __init__(
        self,
        machine: Machine,
        run_control: RunControl,
        symbols: str | None,
        on_kill: Callable[[], None],
    ) -> None:
        """`symbols` is the path of an ELF file to hand to the debugger, if there is one."""
        self.machine = machine
        self.vm = machine.vm
        self.run_control = run_control
        self._on_kill = on_kill
        self._symbols = symbols if symbols and elf_bits(symbols) else None
        # By vcpu_id, and good until something changes: see _forget().
        self._views: dict[int, VirtualMemory] = {}
        self._registers: dict[int, tuple[int, RegisterFile]] = {}
        machine.on_reset(self._forget)
        self.names = Names(self.vm, self._symbols, is_linux=machine.image.is_linux)
        machine.on_reset(self.names.forget_kernel)
        self.last_error = ""

    # --- what it is ---

    def vcpu_ids(self) -> Sequence[int]:
        """See Target."""
        return self.vm.vcpu_ids()

    def describe(self, vcpu_id: int) -> str:
        """See Target."""
        with _errors:
            handle, state = self.vm.state(vcpu_id), self.vm.run_state(vcpu_id)
        sregs, regs = handle.get(kvm_sregs), handle.get(kvm_regs)
        mode = x86.cpu_mode(sregs, regs.rflags)
        level = "" if mode is x86.CpuMode.REAL else f", CPL {sregs.ss.dpl}"
        return f"{state}{level}, {mode.value}"

    def architecture(self) -> Architecture:
        """See Target."""
        mode = x86.cpu_mode(self._first_vcpu().get(kvm_sregs))
        return architecture_for(_KERNEL_BITS.get(mode, 16), self._image_bits())

    def _image_bits(self) -> int | None:
        if self._symbols:
            return elf_bits(self._symbols)
        image = self.machine.image
        return 64 if image.is_linux and image.mode is Mode.LONG else None

    def has_avx(self) -> bool:
        """See Target."""
        return debugstate.has_avx(self._first_vcpu())

    def _first_vcpu(self) -> VcpuHandle:
        # Not state(), which refuses a vCPU that a reset holds: what it is can be asked then, too.
        return self.vm.handle_of(self.vm.vcpu_ids()[0])

    def exec_file(self) -> ExecFile | None:
        """See Target."""
        if self._symbols is None:
            return None
        path, bits = self._symbols, elf_bits(self._symbols)

        def pread(offset: int, length: int) -> bytes:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(length)

        try:
            return ExecFile(path, bits, os.stat(path).st_size, pread) if bits else None
        except OSError:  # removed since
            return None

    def moved_base(self) -> int | None:
        """See Target."""
        return self.names.moved_base()

    def memory_map(self) -> Sequence[tuple[int, int]] | None:
        """Where there can ever be memory: anywhere.

        Not only at the canonical addresses of now, and in real mode not only below 4 GiB: the guest
        may turn on 64-bit mode, or 5-level paging, and gdb asks once.
        """
        return [(0, _HALF), (_HALF, _HALF)]

    # --- registers and memory ---

    def read_registers(self, vcpu_id: int, banks: int) -> RegisterFile:
        """See Target."""
        registers = self._registers
        known, file = registers.get(vcpu_id, (0, b""))
        if banks & ~known:
            known |= banks
            with _errors:
                file = debugstate.read(self.vm.state(vcpu_id), known)
            registers[vcpu_id] = known, file
        return file

    def _forget(self) -> None:
        """The guest runs, or something was written: what was read of it may have changed.

        A reset comes on another thread: what is being read then is kept in the old ones.
        """
        self._views, self._registers = {}, {}

    def write_registers(self, vcpu_id: int, updates: Mapping[str, Value]) -> None:
        """See Target."""
        self._forget()
        with _errors:
            debugstate.write(self.vm.state(vcpu_id), updates, lambda: self.vm.host.paging32)
            if "rip" in updates:
                self.vm.go_on_at_rip(vcpu_id)

    def view(self, vcpu_id: int) -> VirtualMemory:
        """Guest memory as a vCPU sees it."""
        views = self._views
        view = views.get(vcpu_id)
        if view is None:
            with _errors:
                sregs = self.vm.state(vcpu_id).get(kvm_sregs)
            view = views[vcpu_id] = VirtualMemory(self.vm.memory, sregs)
        return view

    def _pieces(self, vcpu_id: int, gva: int, length: int) -> Iterator[tuple[int, int]]:
        """(gpa, bytes) pieces of [gva, gva + length), which does not wrap around.

        Raises TranslationFault or GuestMemoryError where nothing is, after the pieces before it.
        """
        view = self.view(vcpu_id)
        yield from view.pieces(gva, min(length, view.gva_end - gva))
        if gva + length > view.gva_end:
            fault = paging.Fault(paging.FaultReason.TOO_WIDE)
            raise paging.TranslationFault(max(gva, view.gva_end), fault)

    def read_memory(self, vcpu_id: int, gva: int, length: int) -> bytes:
        """See Target."""
        return self._read_pieces(self._pieces(vcpu_id, gva, length))

    def read_physical(self, gpa: int, length: int) -> bytes:
        """See Target."""
        return self._read_pieces(iter([(gpa, length)]))

    def _read_pieces(self, pieces: Iterator[tuple[int, int]]) -> bytes:
        """What is readable of (gpa, bytes) pieces, up to the first gap."""
        found: list[bytes] = []
        try:
            for gpa, size in pieces:
                readable = self._readable(gpa, size)
                data = self.vm.memory.read(gpa, readable)
                found.append(self.run_control.breakpoints.hide(gpa, data))
                if readable < size:
                    break
        except (GuestMemoryError, paging.TranslationFault) as error:
            if not found:
                raise TargetError(errno.EFAULT, str(error)) from None
        return b"".join(found)

    def _readable(self, gpa: int, size: int) -> int:
        """How many of `size` bytes at `gpa` are RAM.  Raises GuestMemoryError if not one is."""
        return min(size, self.vm.memory.find(gpa).end - gpa)

    def write_memory(self, vcpu_id: int, gva: int, data: bytes) -> None:
        """See Target."""
        with _errors:
            pieces = list(self._pieces(vcpu_id, gva, len(data)))
            self._write_pieces(pieces, data)

    def write_physical(self, gpa: int, data: bytes) -> None:
        """See Target."""
        with _errors:
            self._write_pieces([(gpa, len(data))], data)

    def _write_pieces(self, pieces: list[tuple[int, int]], data: bytes) -> None:
        for gpa, size in pieces:  # all or nothing
            self.vm.memory.find(gpa, size)
        self._forget()  # what is written may be a page table
        offset = 0
        for gpa, size in pieces:
            self.run_control.breakpoints.write(gpa, data[offset : offset + size])
            offset += size

    def memory_region(self, vcpu_id: int, gva: int) -> MemoryRegion:
        """See Target.  A region is what is mapped alike in a row, as far as there is RAM behind."""
        with _errors:
            sregs = self.vm.state(vcpu_id).get(kvm_sregs)
        registers = paging.PagingRegisters.of(sregs)
        page, looked_up_to = gva & ~0xFFF, 1 << 64
        if not sregs.cr0 & x86.CR0_PG:
            ranges = [
                MappedRange(slot.gpa, slot.gpa, slot.size, 1 << 12, _ALL_PERMISSIONS)
                for slot in self.vm.memory.slots
                if slot.end > page and slot.gpa < paging.gva_end(registers)
            ]
            ranges.sort()
        else:
            read = self.vm.memory.read
            found_ranges, next_gva = mappings(read, registers, start_gva=page, max_ranges=1)
            ranges, looked_up_to = list(found_ranges), next_gva or looked_up_to
        if not ranges:
            return MemoryRegion(page, looked_up_to - page, "")
        found = ranges[0]
        if found.gva > page:
            return MemoryRegion(page, found.gva - page, "")
        offset = page - found.gva
        length = found.length - offset
        gpa = found.gpa + offset
        try:
            slot = self.vm.memory.find(gpa)
        except GuestMemoryError:  # mapped, but a device or nothing: not to be read
            beyond = (slot.gpa - gpa for slot in self.vm.memory.slots if slot.gpa > gpa)
            return MemoryRegion(page, min([length, *beyond]), "")
        permissions = found.permissions
        text = "r" + "w" * permissions.writable + "x" * (not permissions.no_execute)
        return MemoryRegion(page, min(length, slot.end - gpa), text)

    # --- breakpoints ---

    def insert_breakpoint(self, kind: BreakpointKind, vcpu_id: int, gva: int, length: int) -> None:
        """See Target."""
        with _errors:
            if kind is BreakpointKind.SOFTWARE:
                self.run_control.breakpoints.insert_software(vcpu_id, gva)
            else:
                self.run_control.breakpoints.insert_hardware(vcpu_id, kind, gva, length)

    def remove_breakpoint(self, kind: BreakpointKind, vcpu_id: int, gva: int, length: int) -> None:
        """See Target."""
        with _errors:
            if kind is BreakpointKind.SOFTWARE:
                self.run_control.breakpoints.remove_software(gva)
            else:
                self.run_control.breakpoints.remove_hardware(kind, gva, length)

    # --- running ---

    def stop_report(self) -> StopReport:
        """See Target."""
        return self.run_control.stop or StopReport(self.vm.vcpu_ids()[0])

    def resume(self, actions: Mapping[int, Action], newcomers_run: bool) -> None:
        """See Target."""
        with _errors:
            for vcpu_id, action in actions.items():
                if action.kind is ActionKind.CONTINUE:
                    continue
                user = self.vm.state(vcpu_id).get(kvm_sregs).ss.dpl == 3
                if user and not (self.vm.host.step_user or self.vm.host.step_user_delivered):
                    raise TargetError(errno.ENOTSUP, "this host cannot single-step in ring 3")
            self._forget()
            self.run_control.resume(actions, newcomers_run)

    def interrupt(self) -> bool:
        """See Target."""
        return self.run_control.interrupt()

    def detach(self) -> None:
        """See Target."""
        self._forget()
        self.run_control.interrupt()  # where it runs: take out breakpoints while nobody executes
        self.run_control.wait_stopped(_PATIENCE_SECONDS)
        self.run_control.detach()

    def attach(self) -> None:
        """See Target."""
        self.run_control.attach()

    def kill(self) -> None:
        """See Target."""
        self._on_kill()

    def monitor(self, command: str, vcpu_id: int) -> str:
        """See Target."""
        from pyvmm import monitor

        with _errors:
            try:
                return monitor.execute(self, command, vcpu_id)
            except ValueError as error:  # what Python says to most that a user can type wrongly
                raise TargetError(errno.EINVAL, str(error)) from None

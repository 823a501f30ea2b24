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
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm import kvm_regs, kvm_sregs
from pyvmm.light import TYPE_CHECKING
from pyvmm.mappings import MappedRange, mappings
from pyvmm.memory import VirtualMemory
from pyvmm.names import Names
from pyvmm.registers import Architecture, Value, architecture_for
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

_CODE_BITS = {
    x86.CpuMode.LONG: 64,
    x86.CpuMode.PROTECTED32: 32,
    x86.CpuMode.COMPAT32: 32,
}
_CANONICAL_HALF = 1 << 47
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
        self._registers: dict[int, tuple[int, dict[str, Value]]] = {}
        machine.on_reset(self._forget)
        self.names = Names(self.vm, self._symbols, is_linux=machine.image.is_linux)
        machine.on_reset(self.names.forget_kernel)
        self.last_error = ""  # why the last packet was refused, for `monitor`

    # --- what it is ---

    def vcpu_ids(self) -> Sequence[int]:
        """See Target."""
        return self.vm.vcpu_ids()

    def describe(self, vcpu_id: int) -> str:
        """See Target."""
        handle = self.vm.state(vcpu_id)
        sregs, regs = handle.get(kvm_sregs), handle.get(kvm_regs)
        state = self.vm.run_state(vcpu_id)
        mode = x86.cpu_mode(sregs, regs.rflags)
        level = "" if mode is x86.CpuMode.REAL else f", CPL {sregs.ss.dpl}"
        return f"{state}{level}, {mode.value}"

    def architecture(self) -> Architecture:
        """See Target."""
        mode = x86.cpu_mode(self.vm.state(self.vm.vcpu_ids()[0]).get(kvm_sregs))
        image_bits = elf_bits(self._symbols) if self._symbols else None
        return architecture_for(_CODE_BITS.get(mode, 16), image_bits)

    def has_avx(self) -> bool:
        """See Target."""
        return debugstate.has_avx(self.vm.state(self.vm.vcpu_ids()[0]))

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
        """Where there can ever be memory: RAM, and nothing else, at any virtual address."""
        if self.architecture() is not Architecture.X86_64:
            return [(0, 1 << 32)]
        return [(0, _CANONICAL_HALF), ((1 << 64) - _CANONICAL_HALF, _CANONICAL_HALF)]

    # --- registers and memory ---

    def read_registers(self, vcpu_id: int, banks: int) -> dict[str, Value]:
        """See Target."""
        known, values = self._registers.get(vcpu_id, (0, {}))
        missing = banks & ~known
        if missing:
            with _errors:
                values = values | debugstate.read(self.vm.state(vcpu_id), missing)
            self._registers[vcpu_id] = known | missing, values
        return values

    def _forget(self) -> None:
        """The guest runs, or something was written: what was read of it may have changed."""
        self._views.clear()
        self._registers.clear()

    def write_registers(self, vcpu_id: int, updates: Mapping[str, Value]) -> None:
        """See Target."""
        self._forget()
        with _errors:
            debugstate.write(self.vm.state(vcpu_id), updates)
            if "rip" in updates:
                self.vm.go_on_at_rip(vcpu_id)

    def view(self, vcpu_id: int) -> VirtualMemory:
        """Guest memory as a vCPU sees it."""
        view = self._views.get(vcpu_id)
        if view is None:
            with _errors:
                sregs = self.vm.state(vcpu_id).get(kvm_sregs)
            view = self._views[vcpu_id] = VirtualMemory(self.vm.memory, sregs)
        return view

    def read_memory(self, vcpu_id: int, gva: int, length: int) -> bytes:
        """See Target."""
        return self._read_pieces(self.view(vcpu_id).pieces(gva, length))

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
            pieces = list(self.view(vcpu_id).pieces(gva, len(data)))
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
        page = gva & ~0xFFF
        if not sregs.cr0 & x86.CR0_PG:
            ranges = [
                MappedRange(slot.gpa, slot.gpa, slot.size, 1 << 12, _ALL_PERMISSIONS)
                for slot in self.vm.memory.slots
                if slot.end > page
            ]
            ranges.sort()
        else:
            read = self.vm.memory.read
            ranges = list(mappings(read, registers, start_gva=page, max_ranges=1).ranges)
        if not ranges:
            return MemoryRegion(page, (1 << 64) - page, "")
        found = ranges[0]
        if found.gva > page:
            return MemoryRegion(page, found.gva - page, "")
        offset = page - found.gva
        length = found.length - offset
        try:
            slot = self.vm.memory.find(found.gpa + offset)
        except GuestMemoryError:  # mapped, but a device or nothing: not to be read
            return MemoryRegion(page, length, "")
        permissions = found.permissions
        text = "r" + "w" * permissions.writable + "x" * (not permissions.no_execute)
        return MemoryRegion(page, min(length, slot.end - found.gpa - offset), text)

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
        for vcpu_id, action in actions.items():
            if action.kind is ActionKind.CONTINUE:
                continue
            user = self.vm.state(vcpu_id).get(kvm_sregs).ss.dpl == 3
            if user and not (self.vm.host.step_user or self.vm.host.step_user_delivered):
                raise TargetError(errno.ENOTSUP, "this host cannot single-step in ring 3")
        self._forget()
        with _errors:
            self.run_control.resume(actions, newcomers_run)

    def interrupt(self) -> None:
        """See Target."""
        self.run_control.interrupt()

    def detach(self) -> None:
        """See Target."""
        self._forget()
        self.run_control.interrupt()  # where it runs: take out breakpoints while nobody executes
        self.run_control.wait_stopped(_PATIENCE_SECONDS)
        self.run_control.detach()

    def kill(self) -> None:
        """See Target."""
        self._on_kill()

    def monitor(self, command: str) -> str:
        """See Target."""
        from pyvmm import monitor

        with _errors:
            try:
                return monitor.execute(self, command)
            except ValueError as error:  # what Python says to most that a user can type wrongly
                raise TargetError(errno.EINVAL, str(error)) from None


_PATIENCE_SECONDS = 10.0

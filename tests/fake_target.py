"""A target that is not there, for the tests of the stub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyvmm.registers import TABLE, Architecture, Bank, RegisterFile, Value
from pyvmm.rsp import PACKET_SIZE
from pyvmm.session import MAX_DATA
from pyvmm.target import (
    Action,
    BreakpointKind,
    ExecFile,
    MemoryRegion,
    StopReport,
    Target,
    TargetError,
)

GDB = b"qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+;no-resumed+;xmlRegisters=i386"
RAM_SIZE = 0x40000  # bytes at GVA 0, and GPA = GVA + 0x1000


def packets(text: str) -> list[bytes]:
    """Packets with white space between them."""
    return text.encode().split()


def register_file(values: Mapping[str, Value]) -> RegisterFile:
    """The register file of a vCPU with these values, named as in the table, and `code_base`."""
    sizes = {row.name: row.size for row in TABLE} | {"code_base": 8}
    return b"".join(
        value if isinstance(value := values[name], bytes) else value.to_bytes(size, "little")
        for name, size in sizes.items()
    )


class FakeTarget:
    """A VM that does nothing but remember what it was asked, and is strict about when."""

    def __init__(self, vcpus: int = 2) -> None:
        self.vcpus = vcpus
        self.stopped = True
        self.last_error = ""
        self.calls: list[tuple[object, ...]] = []
        self.arch = Architecture.X86_64
        self.report = StopReport(0)
        self.ram = bytearray(RAM_SIZE)
        self.ranges: list[tuple[int, int]] | None = None
        self.base: int | None = None
        self.file: ExecFile | None = None
        self.refuse_registers = self.refuse_resume = False
        self.registers: list[dict[str, Value]] = [
            {
                row.name: (vcpu_id << 8 | number) if row.bits <= 64 else bytes([number]) * row.size
                for number, row in enumerate(TABLE)
            }
            | {"code_base": 0}
            for vcpu_id in range(vcpus)
        ]

    def _parked(self, vcpu_id: int = 0) -> None:
        assert self.stopped, "asked while the guest runs"
        assert 0 <= vcpu_id < self.vcpus, "a vCPU that does not exist"

    def vcpu_ids(self) -> Sequence[int]:
        return range(self.vcpus)

    def describe(self, vcpu_id: int) -> str:
        self._parked(vcpu_id)
        return "halted, CPL <0>"

    def architecture(self) -> Architecture:
        self._parked()
        return self.arch

    def has_avx(self) -> bool:
        return False

    def exec_file(self) -> ExecFile | None:
        return self.file

    def moved_base(self) -> int | None:
        return self.base

    def memory_map(self) -> Sequence[tuple[int, int]] | None:
        return self.ranges

    def read_registers(self, vcpu_id: int, banks: int) -> RegisterFile:
        self._parked(vcpu_id)
        if self.refuse_registers:
            raise TargetError(5, "the registers are gone")
        unasked = {row.name: 0 for row in TABLE if not row.bank & banks}
        if not banks & Bank.SYSTEM:
            unasked["code_base"] = 0
        return register_file(self.registers[vcpu_id] | unasked)

    def write_registers(self, vcpu_id: int, updates: Mapping[str, Value]) -> None:
        self._parked(vcpu_id)
        if "cr0" in updates:
            raise TargetError(22, "CR0.PG needs CR0.PE #1")
        self.calls.append(("write_registers", vcpu_id, dict(updates)))
        values = self.registers[vcpu_id]
        values.update(updates)
        if "rip" in updates:  # what is read is linear
            code_base, rip = values["code_base"], updates["rip"]
            assert isinstance(code_base, int) and isinstance(rip, int)
            values["rip"] = code_base + rip

    def read_memory(self, vcpu_id: int, gva: int, length: int) -> bytes:
        self._parked(vcpu_id)
        assert 0 < length <= MAX_DATA
        assert 0 <= gva <= (1 << 64) - length
        if gva >= RAM_SIZE:
            raise TargetError(14, f"nothing is mapped at {gva:#x}")
        return bytes(self.ram[gva : gva + length])

    def write_memory(self, vcpu_id: int, gva: int, data: bytes) -> None:
        self._parked(vcpu_id)
        assert data and gva + len(data) <= 1 << 64
        if gva + len(data) > RAM_SIZE:
            raise TargetError(14, f"nothing is mapped at {RAM_SIZE:#x}")
        self.ram[gva : gva + len(data)] = data

    def read_physical(self, gpa: int, length: int) -> bytes:
        if gpa < 0x1000:
            raise TargetError(14, f"no RAM at {gpa:#x}")
        return self.read_memory(0, gpa - 0x1000, length)

    def write_physical(self, gpa: int, data: bytes) -> None:
        if gpa < 0x1000:
            raise TargetError(14, f"no RAM at {gpa:#x}")
        self.write_memory(0, gpa - 0x1000, data)

    def memory_region(self, vcpu_id: int, gva: int) -> MemoryRegion:
        self._parked(vcpu_id)
        if gva < RAM_SIZE:
            return MemoryRegion(0, RAM_SIZE, "rwx")
        return MemoryRegion(RAM_SIZE, (1 << 64) - RAM_SIZE, "")

    def insert_breakpoint(self, kind: BreakpointKind, vcpu_id: int, gva: int, length: int) -> None:
        self._parked(vcpu_id)
        assert length in (1, 2, 4, 8) or (kind > 1 and 0 < length <= (1 << 64) - gva)
        if kind is BreakpointKind.HARDWARE:
            raise TargetError(28, "all 4 hardware breakpoints are in use")
        self.calls.append(("insert", kind, vcpu_id, gva, length))

    def remove_breakpoint(self, kind: BreakpointKind, vcpu_id: int, gva: int, length: int) -> None:
        self._parked(vcpu_id)
        self.calls.append(("remove", kind, vcpu_id, gva, length))

    def stop_report(self) -> StopReport:
        self._parked()
        return self.report

    def resume(self, actions: Mapping[int, Action], newcomers_run: bool) -> None:
        self._parked()
        assert actions and set(actions) <= set(self.vcpu_ids())
        if self.refuse_resume:
            raise TargetError(95, "this host cannot single-step in ring 3")
        self.stopped = False
        self.calls.append(("resume", dict(actions), newcomers_run))

    def interrupt(self) -> bool:
        self.calls.append(("interrupt",))
        return True

    def detach(self) -> None:
        self.stopped = False
        self.calls.append(("detach",))

    def attach(self) -> None:
        assert not self.stopped
        self.calls.append(("attach",))

    def kill(self) -> None:
        self.calls.append(("kill",))

    def monitor(self, command: str, vcpu_id: int) -> str:
        self._parked(vcpu_id)
        if command == "vcpu":
            return f"{vcpu_id}\n"
        if command == "quiet":
            return ""
        if command == "long":
            return "x" * PACKET_SIZE
        if command == "fail":
            raise TargetError(22, "there is no monitor command fail")
        return f"you said {command}\n"


def _fake_is_a_target(fake: FakeTarget) -> Target:
    return fake  # checked by mypy

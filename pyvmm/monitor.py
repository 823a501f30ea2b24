"""gdb's `monitor` commands: what the protocol has no packet for.

`COMMANDS` is the table; `monitor help` is made from it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from pyvmm import monitor_kernel, paging, report
from pyvmm.kvm import kvm_regs, kvm_sregs
from pyvmm.light import TYPE_CHECKING, NamedTuple
from pyvmm.mappings import mappings
from pyvmm.registers import TABLE
from pyvmm.target import TargetError
from pyvmm.vcpu import StopVm

if TYPE_CHECKING:
    from pyvmm.debugtarget import MachineTarget


class Command(NamedTuple):
    """A row: `arguments` is what the help shows; if it is empty, there are none.

    Two of them mean something: a VCPU at the end is filled in if it is missing, and a FILE is the
    rest of the line, spaces and all.
    """

    name: str
    arguments: str
    help: str
    run: Callable[[MachineTarget, list[str]], str]


_VCPU, _FILE = "[VCPU]", "FILE"


def execute(target: MachineTarget, line: str, vcpu_id: int) -> str:
    """Run a command line; names may be cut short while they are unique.

    `vcpu_id`: of the thread that the user has selected, where the line names none.
    """
    name, *rest = line.split(maxsplit=1) or ["help"]
    found = [c for c in COMMANDS if c.name == name] or [
        c for c in COMMANDS if c.name.startswith(name)
    ]
    if len(found) != 1:
        what = "ambiguous" if found else "unknown"
        raise TargetError(errno.EINVAL, f"{name}: {what} command; try `monitor help`")
    command = found[0]
    if rest and not command.arguments:
        raise TargetError(errno.EINVAL, f"{command.name} takes no argument")
    wanted = command.arguments.split()
    words = [text.rstrip() for text in rest] if wanted == [_FILE] else "".join(rest).split()
    if wanted[-1:] == [_VCPU] and len(words) == len(wanted) - 1:
        words.append(str(vcpu_id))
    return command.run(target, words).rstrip("\n") + "\n"


def _number(words: list[str], what: str, example: str) -> int:
    if len(words) != 1:
        raise TargetError(errno.EINVAL, f"name one {what}, as {example}")
    try:
        return int(words[0], 0) & 0xFFFFFFFFFFFFFFFF
    except ValueError:
        raise TargetError(errno.EINVAL, f"{words[0]!r} is no {what}: write {example}") from None


# gdb's own names for two registers: it does not compute the arguments of `monitor` by itself.
_GDB_NAMES = {"pc": "rip", "sp": "rsp"}


def _address(target: MachineTarget, words: list[str], vcpu_id: int) -> int:
    """A GVA, as a number or as a 64-bit register of a vCPU with its value, `$rsp`."""
    if len(words) != 1 or not words[0].startswith("$"):
        return _number(words, "address", "0x1000 or $rsp")
    name = _GDB_NAMES.get(words[0][1:], words[0][1:])
    row = next((row for row in TABLE if row.name == name and row.bits <= 64), None)
    if row is None:
        raise TargetError(errno.EINVAL, f"{words[0]!r} is no register that can hold an address")
    return int.from_bytes(row.read(target.read_registers(vcpu_id, row.bank)), "little")


def _vcpu(target: MachineTarget, words: list[str]) -> int:
    """The vCPU that the words name."""
    vcpu_id = _number(words, "vCPU", "0")
    if vcpu_id not in target.vcpu_ids():
        raise TargetError(errno.EINVAL, f"there is no vCPU {words[0]}")
    return vcpu_id


def _help(target: MachineTarget, words: list[str]) -> str:
    rows = [(f"{c.name} {c.arguments}".rstrip(), c.help) for c in COMMANDS]
    width = max(len(usage) for usage, _ in rows)
    lines = [f"{usage:<{width}}  {text}" for usage, text in rows]
    return "\n".join([*lines, f"Without {_VCPU}: the one of the thread that is selected."])


def _regs(target: MachineTarget, words: list[str]) -> str:
    handle = target.vm.state(_vcpu(target, words))
    return report.registers(handle.get(kvm_regs), handle.get(kvm_sregs))


def _paging_registers(target: MachineTarget, vcpu_id: int) -> paging.PagingRegisters:
    return paging.PagingRegisters.of(target.vm.state(vcpu_id).get(kvm_sregs))


def _translate(target: MachineTarget, words: list[str]) -> str:
    vcpu_id = _vcpu(target, words[1:]) if words else 0
    gva = _address(target, words[:1], vcpu_id)
    registers = _paging_registers(target, vcpu_id)
    walk = paging.walk(target.vm.memory.read, registers, gva)
    if walk.mode is paging.PagingMode.NONE:
        return f"GPA {gva:#x}: paging is off, addresses are physical"
    lines = [f"{walk.gva:#x} by {walk.mode.value}, cr3 {registers.cr3:#x}"]
    for step in walk.steps:
        lines.append(
            f"  {step.name:<6} at GPA {step.entry_gpa:#x} = {step.value:#018x}  "
            f"{' '.join(step.flags)}"
        )
    if walk.gpa is None:
        lines.append(f"not mapped: {walk.fault}")
    else:
        lines.append(f"GPA {walk.gpa:#x}, {walk.permissions}, {_size(walk.page_bytes)} page")
    return "\n".join(lines)


def _pagetables(target: MachineTarget, words: list[str]) -> str:
    registers = _paging_registers(target, _vcpu(target, words))
    if not registers.cr0 & paging.CR0_PG:
        return "paging is off: addresses are physical"
    found = mappings(target.vm.memory.read, registers, max_ranges=500)
    lines = [
        f"{m.gva:#018x} - {m.gva + m.length:#018x}  GPA {m.gpa:#x}  {m.permissions}  "
        f"{_size(m.page_bytes)} pages"
        for m in found.ranges
    ]
    if found.next_gva is not None:
        lines.append("... (more than fits here)")
    return "\n".join(lines) or "nothing is mapped"


def _size(count: int) -> str:
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if count >= 1 << shift and not count & (1 << shift) - 1:
            return f"{count >> shift}{unit}"
    return str(count)


def _exits(target: MachineTarget, words: list[str]) -> str:
    from pyvmm import stats

    lines = []
    for vcpu_id in target.vcpu_ids():
        counts = stats.read(target.vm.state(vcpu_id))
        shown = [f"  {name:<28} {value}" for name, value in counts.items() if value]
        lines += [f"vCPU {vcpu_id}, since it was created:", *(shown or ["  none"])]
    return "\n".join(lines)


def _memory(target: MachineTarget, words: list[str]) -> str:
    lines = [
        f"{slot.gpa:#012x} - {slot.end:#012x}  {_size(slot.size)} "
        + ("ROM" if slot.readonly else "RAM")
        for slot in target.vm.memory.slots
    ]
    for bus in (target.machine.ports, target.machine.mmio):
        for claim in bus.claims:
            lines.append(
                f"{bus.name} {claim.start:#x} - {claim.start + claim.size:#x}  {claim.name}"
            )
    return "\n".join(lines)


def _vcpus(target: MachineTarget, words: list[str]) -> str:
    lines = []
    for vcpu_id in target.vcpu_ids():
        rip = target.vm.state(vcpu_id).get(kvm_regs).rip
        lines.append(f"vCPU {vcpu_id}: rip {rip:#x}, {target.describe(vcpu_id)}")
    return "\n".join(lines)


def _screen(target: MachineTarget, words: list[str]) -> str:
    lines = target.machine.screen().text()
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines) or "the screen is blank"


def _probe(target: MachineTarget, words: list[str]) -> str:
    from pyvmm import hostprobe, probereport

    host = target.vm.host
    return probereport.table({f.name: f.measure(host) for f in hostprobe.FINDINGS})


def _inject_nmi(target: MachineTarget, words: list[str]) -> str:
    vcpu_id = _vcpu(target, words)
    target.vm.inject_nmi(vcpu_id)
    return f"vCPU {vcpu_id} takes an NMI when it runs"


def _reset_breakpoints(target: MachineTarget, words: list[str]) -> str:
    count = target.run_control.breakpoints.clear()
    what = "breakpoint" if count == 1 else "breakpoints"
    return f"{count} {what} removed (gdb does not know: delete them there, too)"


def _reset(target: MachineTarget, words: list[str]) -> str:
    try:
        target.machine.request_reset()
    except StopVm:
        raise TargetError(errno.ENOTSUP, "this machine is not to reset (--no-reboot)") from None
    if target.run_control.wait_stopped(_RESET_SECONDS):
        raise TargetError(errno.ETIMEDOUT, "the machine is not reset yet: is it being run?")
    return "the machine is reset (gdb does not know: maintenance flush register-cache)"


_RESET_SECONDS = 10.0


def _catch_int3(target: MachineTarget, words: list[str]) -> str:
    breakpoints = target.run_control.breakpoints
    if words not in ([], ["on"], ["off"]):
        raise TargetError(errno.EINVAL, "catch-int3: on or off")
    if words:
        if words[0] == "on" and not target.vm.host.breakpoint:
            raise TargetError(errno.ENOTSUP, "on this host an int3 does not leave the guest")
        breakpoints.catch_int3 = words[0] == "on"
    return f"the guest's own int3 {'stops' if breakpoints.catch_int3 else 'goes to the guest'}"


def _error(target: MachineTarget, words: list[str]) -> str:
    return target.last_error or "no packet was refused"


def _quit(target: MachineTarget, words: list[str]) -> str:
    target.kill()
    return "the VM ends"


COMMANDS = (
    Command("help", "", "this list", _help),
    Command("regs", _VCPU, "all registers, with control registers and descriptor tables", _regs),
    Command(
        "translate",
        f"GVA|$REG {_VCPU}",
        "the walk through the page tables, level by level",
        _translate,
    ),
    Command("pagetables", _VCPU, "everything that the page tables map", _pagetables),
    Command("exits", "", "how often each vCPU has left the guest, and why", _exits),
    Command("memory", "", "RAM and the devices in guest-physical memory and at ports", _memory),
    Command("vcpus", "", "where each vCPU is, and in which mode", _vcpus),
    Command("where", "", "the function that each vCPU is in", monitor_kernel.where),
    Command(
        "symbols",
        _FILE,
        "take the names of functions from a System.map or an ELF",
        monitor_kernel.symbols,
    ),
    Command("kaslr", "", "where Linux has moved itself, and what gdb wants", monitor_kernel.kaslr),
    Command("dmesg", "[COUNT]", "the log of a Linux guest, or its end", monitor_kernel.dmesg),
    Command("screen", "", "what the text screen at 0xb8000 shows", _screen),
    Command("probe", "", "what this host's KVM can and cannot do", _probe),
    Command("catch-int3", "[on|off]", "stop at the guest's own int3", _catch_int3),
    Command("inject-nmi", _VCPU, "raise a non-maskable interrupt", _inject_nmi),
    Command("reset", "", "reset the machine, and stay before its first instruction", _reset),
    Command("reset-breakpoints", "", "take out all breakpoints", _reset_breakpoints),
    Command("error", "", "why the last packet was refused, in words", _error),
    Command("quit", "", "end the VM", _quit),
)

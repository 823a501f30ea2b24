"""What a person is shown of a vCPU: its registers, the bytes at RIP, and what an exit means."""

from __future__ import annotations

from pyvmm import emulate, exits, x86
from pyvmm.kvm import kvm_regs, kvm_segment, kvm_sregs
from pyvmm.light import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.hostprobe import HostProbe
    from pyvmm.hypervisor import VM

_GENERAL = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rbp", "rsp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
_FLAGS = [
    "CF",
    "",
    "PF",
    "",
    "AF",
    "",
    "ZF",
    "SF",
    "TF",
    "IF",
    "DF",
    "OF",
    "",
    "",
    "NT",
    "",
    "RF",
    "VM",
    "AC",
    "VIF",
    "VIP",
    "ID",
]
_BYTES_SHOWN = 16

RESET_BY_HOST = (
    "This host's KVM resets a vCPU at a triple fault: what follows is the state after the reset, "
    "and where the guest was is lost."
)


def crash(vm: VM, vcpu_id: int, exit: exits.Exit) -> str:
    """What is to be said of an exit that the guest cannot go on from; several lines."""
    cpu = vm.cpu(vcpu_id)
    lost = isinstance(exit, exits.Shutdown) and not vm.host.crash_registers
    limit = None if lost else host_limit(cpu, vm.host)
    lines = (
        explain(exit, cpu),
        *([RESET_BY_HOST] if lost else []),
        *([limit] if limit else []),
        registers(cpu.regs, cpu.sregs),
        code_bytes(cpu),
    )
    return "\n".join(lines)


def vcpu(vm: VM, vcpu_id: int) -> str:
    """State and registers of a vCPU, which must not run; several lines."""
    state = vm.run_state(vcpu_id)
    if not vm.started(vcpu_id):
        return f"vCPU {vcpu_id}, {state}"
    cpu = vm.cpu(vcpu_id)
    shown = registers(cpu.regs, cpu.sregs)
    return f"vCPU {vcpu_id}, {state}:\n{shown}\n{code_bytes(cpu)}"


def registers(regs: kvm_regs, sregs: kvm_sregs) -> str:
    """All registers of a vCPU, several lines."""
    mode = x86.cpu_mode(sregs, regs.rflags)
    flags = " ".join(n for bit, n in enumerate(_FLAGS) if n and regs.rflags >> bit & 1)
    lines = [
        f"rip {regs.rip:#018x}  rflags {regs.rflags:#x} [{flags}]  CPL {sregs.ss.dpl}, {mode.value}"
    ]
    for row in _GENERAL:
        lines.append("  ".join(f"{name:<3} {getattr(regs, name):#018x}" for name in row))
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"):
        lines.append(f"{name:<3} {segment(getattr(sregs, name))}")
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        lines.append(f"{name:<3} base {table.base:#018x}  limit {table.limit:#06x}")
    control = ("cr0", "cr2", "cr3", "cr4", "efer")
    lines.append("  ".join(f"{name} {getattr(sregs, name):#x}" for name in control))
    return "\n".join(lines)


def segment(segment: kvm_segment) -> str:
    """A segment register, one line."""
    if segment.unusable:
        return f"{segment.selector:#06x} unusable"
    bits = 64 if segment.l else 32 if segment.db else 16
    kind = "system" if not segment.s else f"{bits}-bit code" if segment.type & 8 else "data"
    return (
        f"{segment.selector:#06x}  base {segment.base:#018x}  limit {segment.limit:#010x}  "
        f"{kind}, DPL {segment.dpl}{'' if segment.present else ', not present'}"
    )


def code_bytes(cpu: emulate.Cpu) -> str:
    """The bytes at RIP, one line."""
    code = cpu.fetch(_BYTES_SHOWN)
    return f"bytes at rip: {code.hex(' ') or 'not readable (nothing is mapped there)'}"


def host_limit(cpu: emulate.Cpu, host: HostProbe) -> str | None:
    """What this host cannot do, if that is what the guest tried when it crashed."""
    switches_paging_on = cpu.fetch(3)[:2] == b"\x0f\x22" and not cpu.sregs.cr0 & x86.CR0_PG
    if switches_paging_on and cpu.mode is x86.CpuMode.PROTECTED32 and not host.paging32:
        return "This host's KVM has no paging in 32-bit mode: see `pyvmm --probe`, paging32."
    return None


def explain(exit: exits.Exit, cpu: emulate.Cpu) -> str:
    """What an exit that ended the guest probably means, one or two sentences."""
    if isinstance(exit, exits.Shutdown):
        idt = "" if cpu.sregs.idt.limit else " Its IDT is empty: the first exception does that."
        return (
            "A triple fault: an exception could not be delivered, nor the double fault about it."
            f"{idt} Look at cr2 (a page fault's address), the IDT and the stack."
        )
    if isinstance(exit, exits.InternalError):
        return _explain_internal_error(exit)
    if isinstance(exit, exits.FailEntry):
        return (
            f"The processor refused to enter the guest (reason "
            f"{exit.hardware_entry_failure_reason:#x}): its registers are not a valid state. "
            "Look at the segments and control registers."
        )
    return "pyvmm does not handle this exit."


def _explain_internal_error(exit: exits.InternalError) -> str:
    if exit.suberror != 1:
        return f"KVM gave up (internal error {exit.suberror}): often a broken IDT, TSS or stack."
    if not exit.instruction.strip(b"\0"):
        return "KVM could not emulate the bytes at rip: they are zeros. The guest ran into nothing."
    return (
        f"KVM could not emulate the instruction {exit.instruction.hex(' ')}. Either rip left the "
        "code, or this host cannot run that instruction here: see `pyvmm --probe`."
    )

"""The registers of a vCPU by name: which kernel structure each one lives in.

`Register` is the table; its rows are all there is to add a register.  Pseudo-registers, which no
kernel structure holds, are handled by the hypervisor layer.
"""

from __future__ import annotations

from enum import Enum

from pyvmm import x86
from pyvmm.handles import VcpuHandle
from pyvmm.kvm import kvm_debugregs, kvm_regs, kvm_sregs
from pyvmm.light import Any


class Register(Enum):
    """A register of a vCPU.  Selectors are CS, SS, ...; the rest of a segment CS_BASE and so on."""

    RAX = (kvm_regs, "rax")
    RBX = (kvm_regs, "rbx")
    RCX = (kvm_regs, "rcx")
    RDX = (kvm_regs, "rdx")
    RSI = (kvm_regs, "rsi")
    RDI = (kvm_regs, "rdi")
    RBP = (kvm_regs, "rbp")
    RSP = (kvm_regs, "rsp")
    R8 = (kvm_regs, "r8")
    R9 = (kvm_regs, "r9")
    R10 = (kvm_regs, "r10")
    R11 = (kvm_regs, "r11")
    R12 = (kvm_regs, "r12")
    R13 = (kvm_regs, "r13")
    R14 = (kvm_regs, "r14")
    R15 = (kvm_regs, "r15")
    RIP = (kvm_regs, "rip")
    RFLAGS = (kvm_regs, "rflags")
    CR0 = (kvm_sregs, "cr0")
    CR2 = (kvm_sregs, "cr2")
    CR3 = (kvm_sregs, "cr3")
    CR4 = (kvm_sregs, "cr4")
    CR8 = (kvm_sregs, "cr8")
    EFER = (kvm_sregs, "efer")
    APIC_BASE = (kvm_sregs, "apic_base")
    CS = (kvm_sregs, "cs", "selector")
    CS_BASE = (kvm_sregs, "cs", "base")
    CS_LIMIT = (kvm_sregs, "cs", "limit")
    SS = (kvm_sregs, "ss", "selector")
    SS_BASE = (kvm_sregs, "ss", "base")
    SS_LIMIT = (kvm_sregs, "ss", "limit")
    DS = (kvm_sregs, "ds", "selector")
    DS_BASE = (kvm_sregs, "ds", "base")
    DS_LIMIT = (kvm_sregs, "ds", "limit")
    ES = (kvm_sregs, "es", "selector")
    ES_BASE = (kvm_sregs, "es", "base")
    ES_LIMIT = (kvm_sregs, "es", "limit")
    FS = (kvm_sregs, "fs", "selector")
    FS_BASE = (kvm_sregs, "fs", "base")
    FS_LIMIT = (kvm_sregs, "fs", "limit")
    GS = (kvm_sregs, "gs", "selector")
    GS_BASE = (kvm_sregs, "gs", "base")
    GS_LIMIT = (kvm_sregs, "gs", "limit")
    TR = (kvm_sregs, "tr", "selector")
    TR_BASE = (kvm_sregs, "tr", "base")
    TR_LIMIT = (kvm_sregs, "tr", "limit")
    LDT = (kvm_sregs, "ldt", "selector")
    LDT_BASE = (kvm_sregs, "ldt", "base")
    LDT_LIMIT = (kvm_sregs, "ldt", "limit")
    GDT_BASE = (kvm_sregs, "gdt", "base")
    GDT_LIMIT = (kvm_sregs, "gdt", "limit")
    IDT_BASE = (kvm_sregs, "idt", "base")
    IDT_LIMIT = (kvm_sregs, "idt", "limit")
    DR0 = (kvm_debugregs, "db", 0)
    DR1 = (kvm_debugregs, "db", 1)
    DR2 = (kvm_debugregs, "db", 2)
    DR3 = (kvm_debugregs, "db", 3)
    DR6 = (kvm_debugregs, "dr6")
    DR7 = (kvm_debugregs, "dr7")
    KERNEL_GS_BASE = ("msr", x86.MSR_KERNEL_GS_BASE)
    # How many bytes behind RIP a re-injected #BP returns to (run control: the VM-entry
    # instruction-length field).  It exists only in the hypervisor layer.
    GUEST_ENTRY_INST_LENGTH = ("pseudo",)


def get(vcpu: VcpuHandle, register: Register) -> int:
    """Read a register (not a pseudo-register) of a vCPU that is not in KVM_RUN."""
    where, *path = register.value
    if where == "msr":
        return vcpu.get_msrs(path)[0]
    value: Any = vcpu.get(where)
    for step in path:
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return int(value)


def set(vcpu: VcpuHandle, register: Register, value: int) -> None:
    """Write a register (not a pseudo-register) of a vCPU that is not in KVM_RUN.

    Writing a selector in real mode moves the segment's base with it, as the processor does; in
    other modes only the selector changes: the descriptor table is not read.
    Raises OverflowError when `value` does not fit, KvmError when KVM refuses it.
    """
    where, *path = register.value
    if where == "msr":
        vcpu.set_msrs({path[0]: value})
        return
    state = vcpu.get(where)
    holder: Any = state
    for step in path[:-1]:
        holder = getattr(holder, step)
    field = path[-1]
    if isinstance(field, int):
        holder[field] = value
        written = holder[field]
    else:
        setattr(holder, field, value)
        written = getattr(holder, field)
    if written != value:  # ctypes wraps silently
        raise OverflowError(f"{value:#x} does not fit into {register.name}")
    if field == "selector" and not state.cr0 & x86.CR0_PE:
        holder.base = value << 4
    vcpu.set(state)

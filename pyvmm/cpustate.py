"""The registers of a vCPU by name: which kernel structure each one lives in.

`Register` is the table; its rows are all there is to add a register.  Pseudo-registers, which no
kernel structure holds, are handled by the hypervisor layer.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from pyvmm import x86
from pyvmm.kvm import VcpuHandle, kvm_debugregs, kvm_regs, kvm_sregs

_GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags"),
)
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")

_ROWS: dict[str, tuple[Any, ...]] = {
    **{name.upper(): (kvm_regs, name) for name in _GENERAL},
    **{name.upper(): (kvm_sregs, name) for name in _CONTROL},
    **{name.upper(): (kvm_sregs, name, "selector") for name in _SEGMENTS},
    **{f"{name.upper()}_BASE": (kvm_sregs, name, "base") for name in _SEGMENTS},
    **{f"{name.upper()}_LIMIT": (kvm_sregs, name, "limit") for name in _SEGMENTS},
    **{f"{name.upper()}_BASE": (kvm_sregs, name, "base") for name in ("gdt", "idt")},
    **{f"{name.upper()}_LIMIT": (kvm_sregs, name, "limit") for name in ("gdt", "idt")},
    **{f"DR{n}": (kvm_debugregs, "db", n) for n in range(4)},
    "DR6": (kvm_debugregs, "dr6"),
    "DR7": (kvm_debugregs, "dr7"),
    "KERNEL_GS_BASE": ("msr", x86.MSR_KERNEL_GS_BASE),
    # How many bytes behind RIP a re-injected #BP returns to (run-control: the VM-entry
    # instruction-length field).  It exists only in the hypervisor layer.
    "GUEST_ENTRY_INST_LENGTH": ("pseudo",),
}

Register = Enum("Register", _ROWS)  # type: ignore[misc]
Register.__doc__ = "A register of a vCPU.  Selectors are CS, SS, ...; CR0, CS_BASE, DR6 and so on."


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

"""What CPUID tells the guest: what KVM supports on this host, and where in the machine a vCPU is.

One socket, as many cores as there are vCPUs, one thread a core; the APIC id is the vcpu_id.
Source: Intel SDM vol. 2A, "CPUID" (leaves 1, 4, 0xB, 0x1F) and vol. 3A, "Detecting Hardware
Multi-Threading Support and Topology"; AMD APM vol. 3, "Obtaining Processor Information Via the
CPUID Instruction" (leaves 0x80000001, 0x80000008, 0x8000001D, 0x8000001E).
"""

from __future__ import annotations

from pyvmm import kvm
from pyvmm.light import Any

_LEVEL_THREAD, _LEVEL_CORE = 1 << 8, 2 << 8  # leaf 0xB, ECX: the level's type
_HTT = 1 << 28  # leaf 1, EDX: more than one logical processor in the package
_CMPXCHG16B = 1 << 13  # leaf 1, ECX
_TSC_DEADLINE = 1 << 24  # leaf 1, ECX: a mode of the LAPIC timer
_HYPERVISOR = 1 << 31  # leaf 1, ECX: there are KVM's own leaves, from 0x40000000 on
_CMP_LEGACY = 1 << 1  # leaf 0x80000001, ECX: the same on AMD, as cores


def add_core_level(cpuid: Any) -> None:
    """Add to `cpuid`, KVM's supported entries, the level of cores: KVM lists the first level only,
    of threads, and a guest takes that for a processor that tells nothing of its topology."""
    listed = {(entry.function, entry.index) for entry in cpuid.entries[: cpuid.header.nent]}
    for leaf in (0xB, 0x1F):
        if (leaf, 0) in listed and (leaf, 1) not in listed:
            cpuid.entries[cpuid.header.nent] = kvm.kvm_cpuid_entry2(
                leaf, 1, kvm.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            )
            cpuid.header.nent += 1


def hide_cmpxchg16b(cpuid: Any) -> None:
    """For kernels on a host where it cannot be executed at CPL 0, whatever KVM calls supported."""
    for entry in cpuid.entries[: cpuid.header.nent]:
        if entry.function == 1:
            entry.ecx &= ~_CMPXCHG16B


def describe(cpuid: Any, vcpu_id: int, cpus: int, *, irqchip: bool) -> None:
    """Change `cpuid`, KVM's supported entries, to what vCPU `vcpu_id` of `cpus` is to see.

    `irqchip`: the LAPIC is in the kernel, and with it the TSC deadline timer, which KVM leaves out
    of what it calls supported.
    """
    id_bits = (cpus - 1).bit_length()
    for entry in cpuid.entries[: cpuid.header.nent]:
        if entry.function == 1:
            entry.ebx = entry.ebx & 0x0000FFFF | min(cpus, 255) << 16 | (vcpu_id & 0xFF) << 24
            entry.ecx = entry.ecx & ~_TSC_DEADLINE | _TSC_DEADLINE * irqchip | _HYPERVISOR
            entry.edx = entry.edx & ~_HTT | _HTT * (cpus > 1)
        elif entry.function in (4, 0x8000001D) and entry.eax & 0x1F:  # a cache
            last_level = (entry.eax >> 5 & 7) >= 3
            sharing = (1 << id_bits) - 1 if last_level else 0
            cores = min((1 << id_bits) - 1, 63) if entry.function == 4 else 0
            entry.eax = entry.eax & 0x3FFF | min(sharing, 0xFFF) << 14 | cores << 26
        elif entry.function in (0xB, 0x1F):
            entry.eax, entry.ebx, entry.ecx = _level(entry.index, id_bits, cpus)
            entry.edx = vcpu_id
        elif entry.function == 0x80000001:
            entry.ecx = entry.ecx & ~_CMP_LEGACY | _CMP_LEGACY * (cpus > 1)
        elif entry.function == 0x80000008:
            entry.ecx = entry.ecx & ~0xF0FF | (cpus - 1) & 0xFF | id_bits << 12
        elif entry.function == 0x8000001E:
            entry.eax, entry.ebx, entry.ecx = vcpu_id, vcpu_id & 0xFF, 0


def _level(index: int, id_bits: int, cpus: int) -> tuple[int, int, int]:
    """EAX, EBX and ECX of one level of leaf 0xB: bits to shift, processors below, type."""
    if index == 0:
        return 0, 1, _LEVEL_THREAD
    if index == 1:
        return id_bits, cpus, _LEVEL_CORE | 1
    return 0, 0, index

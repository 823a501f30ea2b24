"""The ABI of /dev/kvm: structs, constants, ioctl numbers, and the one door to the kernel.

Every name here is the kernel's, letter for letter, so that you can grep it in the kernel's
Documentation/virt/kvm/api.rst and in <linux/kvm.h>.  ioctl numbers are *derived* from the sizes of
the structs, as the C macros do; tests/test_kvm_abi.py compiles a C program that checks each size,
offset and number against the system's header.

Left out on purpose: any policy.  This module knows how to ask the kernel, not what to ask for.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from ctypes import (
    c_char,
    c_int,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)

from pyvmm.light import Any

# --- structs ---------------------------------------------------------------------------------
# `__slots__ = ()` makes a misspelt field an AttributeError instead of a silent new attribute.
# Scalars read from a struct are copies; nested structs are live views of the kernel's memory.


class kvm_userspace_memory_region(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class kvm_regs(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    ]


class kvm_segment(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class kvm_dtable(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, kvm_dtable) for name in ("gdt", "idt")),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class kvm_fpu(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_xsave(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("region", c_uint32 * 1024)]


class kvm_xcr(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class kvm_xcrs(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", kvm_xcr * 16),
        ("padding", c_uint64 * 16),
    ]


class kvm_msr_entry(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class kvm_msrs(ctypes.Structure):  # entries[] follow: see flexible()
    __slots__ = ()
    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class kvm_msr_list(ctypes.Structure):  # indices[] follow
    __slots__ = ()
    _fields_ = [("nmsrs", c_uint32)]


class kvm_cpuid_entry2(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    ]


class kvm_cpuid2(ctypes.Structure):  # entries[] follow
    __slots__ = ()
    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class _kvm_vcpu_events_exception(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        *((name, c_uint8) for name in ("injected", "nr", "has_error_code", "pending")),
        ("error_code", c_uint32),
    ]


class _kvm_vcpu_events_interrupt(ctypes.Structure):
    __slots__ = ()
    _fields_ = [(name, c_uint8) for name in ("injected", "nr", "soft", "shadow")]


class _kvm_vcpu_events_nmi(ctypes.Structure):
    __slots__ = ()
    _fields_ = [(name, c_uint8) for name in ("injected", "pending", "masked", "pad")]


class _kvm_vcpu_events_smi(ctypes.Structure):
    __slots__ = ()
    _fields_ = [(name, c_uint8) for name in ("smm", "pending", "smm_inside_nmi", "latched_init")]


class kvm_vcpu_events(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("exception", _kvm_vcpu_events_exception),
        ("interrupt", _kvm_vcpu_events_interrupt),
        ("nmi", _kvm_vcpu_events_nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _kvm_vcpu_events_smi),
        ("triple_fault_pending", c_uint8),  # the header's triple_fault.pending
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class kvm_debugregs(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class kvm_guest_debug(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("control", c_uint32),
        ("pad", c_uint32),
        ("debugreg", c_uint64 * 8),  # the header's arch.debugreg
    ]


class kvm_mp_state(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("mp_state", c_uint32)]


class kvm_signal_mask(ctypes.Structure):  # sigset[len] follows
    __slots__ = ()
    _fields_ = [("len", c_uint32)]


class kvm_translation(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        *((name, c_uint8) for name in ("valid", "writeable", "usermode")),
        ("pad", c_uint8 * 5),
    ]


class kvm_interrupt(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("irq", c_uint32)]


class kvm_irq_level(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class kvm_irqchip(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", c_uint8 * 512)]


class kvm_irq_routing_irqchip(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class _kvm_irq_routing_target(ctypes.Union):
    __slots__ = ()
    _fields_ = [("irqchip", kvm_irq_routing_irqchip), ("pad", c_uint32 * 8)]


class kvm_irq_routing_entry(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", _kvm_irq_routing_target),
    ]


class kvm_irq_routing(ctypes.Structure):  # entries[] follow
    __slots__ = ()
    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]


class kvm_lapic_state(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("regs", c_uint8 * 1024)]


class kvm_pit_config(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class kvm_pit_channel_state(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("count", c_uint32),
        ("latched_count", c_uint16),
        *((name, c_uint8) for name in ("count_latched", "status_latched", "status", "read_state")),
        *((name, c_uint8) for name in ("write_state", "write_latch", "rw_mode", "mode")),
        *((name, c_uint8) for name in ("bcd", "gate")),
        ("count_load_time", c_int64),
    ]


class kvm_pit_state2(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("channels", kvm_pit_channel_state * 3),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 9),
    ]


class kvm_ioeventfd(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class kvm_irqfd(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        *((name, c_uint32) for name in ("fd", "gsi", "flags", "resamplefd")),
        ("pad", c_uint8 * 16),
    ]


class kvm_coalesced_mmio_zone(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32)]


class kvm_coalesced_mmio(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("phys_addr", c_uint64),
        ("len", c_uint32),
        ("pio", c_uint32),
        ("data", c_uint8 * 8),
    ]


class kvm_coalesced_mmio_ring(ctypes.Structure):  # coalesced_mmio[] follow
    __slots__ = ()
    _fields_ = [("first", c_uint32), ("last", c_uint32)]


class kvm_enable_cap(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    ]


class kvm_stats_header(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        (name, c_uint32)
        for name in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset")
    ]


class kvm_stats_desc(ctypes.Structure):  # name[name_size] follows
    __slots__ = ()
    _fields_ = [
        ("flags", c_uint32),
        ("exponent", c_int16),
        ("size", c_uint16),
        ("offset", c_uint32),
        ("bucket_size", c_uint32),
    ]


# --- struct kvm_run: the page shared with the kernel, one a vCPU -------------------------------


class _kvm_run_hw(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("hardware_exit_reason", c_uint64)]


class _kvm_run_fail_entry(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _kvm_run_io(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class kvm_debug_exit_arch(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("exception", c_uint32),
        ("pad", c_uint32),
        ("pc", c_uint64),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
    ]


class _kvm_run_mmio(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    ]


class _kvm_run_internal(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _kvm_run_emulation_failure(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _kvm_run_system_event(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _kvm_run_exit(ctypes.Union):
    __slots__ = ()
    _fields_ = [
        ("hw", _kvm_run_hw),
        ("fail_entry", _kvm_run_fail_entry),
        ("io", _kvm_run_io),
        ("debug", kvm_debug_exit_arch),
        ("mmio", _kvm_run_mmio),
        ("internal", _kvm_run_internal),
        ("emulation_failure", _kvm_run_emulation_failure),
        ("system_event", _kvm_run_system_event),
        ("padding", c_char * 256),
    ]


class kvm_sync_regs(ctypes.Structure):
    __slots__ = ()
    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]


class _kvm_run_sync(ctypes.Union):
    __slots__ = ()
    _fields_ = [("regs", kvm_sync_regs), ("padding", c_char * 2048)]


class kvm_run(ctypes.Structure):
    __slots__ = ()
    _anonymous_ = ("exit",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _kvm_run_exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", _kvm_run_sync),
    ]


# --- ioctl numbers ---------------------------------------------------------------------------
# asm-generic/ioctl.h: direction in bits 30-31, size of the argument in 16-29, type in 8-15.

KVMIO = 0xAE
_IOC_WRITE, _IOC_READ = 1, 2


def _IO(nr: int) -> int:
    return KVMIO << 8 | nr


def _IOW(nr: int, argument: Any) -> int:
    return _IOC_WRITE << 30 | ctypes.sizeof(argument) << 16 | KVMIO << 8 | nr


def _IOR(nr: int, argument: Any) -> int:
    return _IOC_READ << 30 | ctypes.sizeof(argument) << 16 | KVMIO << 8 | nr


def _IOWR(nr: int, argument: Any) -> int:
    return _IOW(nr, argument) | _IOR(nr, argument)


KVM_GET_API_VERSION = _IO(0x00)
KVM_CREATE_VM = _IO(0x01)
KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _IO(0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(0x05, kvm_cpuid2)

KVM_CREATE_VCPU = _IO(0x41)
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _IO(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(0x48, c_uint64)
KVM_CREATE_IRQCHIP = _IO(0x60)
KVM_IRQ_LINE = _IOW(0x61, kvm_irq_level)
KVM_GET_IRQCHIP = _IOWR(0x62, kvm_irqchip)
KVM_SET_IRQCHIP = _IOR(0x63, kvm_irqchip)  # _IOR in the header too: a historic mistake kept as ABI
KVM_REGISTER_COALESCED_MMIO = _IOW(0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = _IOW(0x68, kvm_coalesced_mmio_zone)
KVM_SET_GSI_ROUTING = _IOW(0x6A, kvm_irq_routing)
KVM_IRQFD = _IOW(0x76, kvm_irqfd)
KVM_CREATE_PIT2 = _IOW(0x77, kvm_pit_config)
KVM_SET_BOOT_CPU_ID = _IO(0x78)
KVM_IOEVENTFD = _IOW(0x79, kvm_ioeventfd)
KVM_GET_PIT2 = _IOR(0x9F, kvm_pit_state2)
KVM_SET_PIT2 = _IOW(0xA0, kvm_pit_state2)
KVM_ENABLE_CAP = _IOW(0xA3, kvm_enable_cap)

KVM_RUN = _IO(0x80)
KVM_GET_REGS = _IOR(0x81, kvm_regs)
KVM_SET_REGS = _IOW(0x82, kvm_regs)
KVM_GET_SREGS = _IOR(0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(0x84, kvm_sregs)
KVM_TRANSLATE = _IOWR(0x85, kvm_translation)
KVM_INTERRUPT = _IOW(0x86, kvm_interrupt)
KVM_GET_MSRS = _IOWR(0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK = _IOW(0x8B, kvm_signal_mask)
KVM_GET_FPU = _IOR(0x8C, kvm_fpu)
KVM_SET_FPU = _IOW(0x8D, kvm_fpu)
KVM_GET_LAPIC = _IOR(0x8E, kvm_lapic_state)
KVM_SET_LAPIC = _IOW(0x8F, kvm_lapic_state)
KVM_SET_CPUID2 = _IOW(0x90, kvm_cpuid2)
KVM_GET_CPUID2 = _IOWR(0x91, kvm_cpuid2)
KVM_GET_MP_STATE = _IOR(0x98, kvm_mp_state)
KVM_SET_MP_STATE = _IOW(0x99, kvm_mp_state)
KVM_NMI = _IO(0x9A)
KVM_SET_GUEST_DEBUG = _IOW(0x9B, kvm_guest_debug)
KVM_GET_VCPU_EVENTS = _IOR(0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = _IOW(0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = _IOR(0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = _IOW(0xA2, kvm_debugregs)
KVM_GET_XSAVE = _IOR(0xA4, kvm_xsave)
KVM_SET_XSAVE = _IOW(0xA5, kvm_xsave)
KVM_GET_XCRS = _IOR(0xA6, kvm_xcrs)
KVM_SET_XCRS = _IOW(0xA7, kvm_xcrs)
KVM_GET_STATS_FD = _IO(0xCE)
KVM_GET_XSAVE2 = _IOR(0xCF, kvm_xsave)

# --- constants -------------------------------------------------------------------------------

KVM_API_VERSION = 12

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_WATCHDOG = 21
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_NOTIFY = 37

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

KVM_GUESTDBG_ENABLE = 0x00000001
KVM_GUESTDBG_SINGLESTEP = 0x00000002
KVM_GUESTDBG_USE_SW_BP = 0x00010000
KVM_GUESTDBG_USE_HW_BP = 0x00020000
KVM_GUESTDBG_INJECT_DB = 0x00040000
KVM_GUESTDBG_INJECT_BP = 0x00080000
KVM_GUESTDBG_BLOCKIRQ = 0x00100000

KVM_VCPUEVENT_VALID_NMI_PENDING = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 0x02
KVM_VCPUEVENT_VALID_SHADOW = 0x04
KVM_VCPUEVENT_VALID_SMM = 0x08
KVM_VCPUEVENT_VALID_PAYLOAD = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x20

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2

KVM_IRQ_ROUTING_IRQCHIP = 1

KVM_PIT_SPEAKER_DUMMY = 1

KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1

KVM_COALESCED_MMIO_PAGE_OFFSET = 2  # of the vCPU's map, in pages

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # the kernel's spelling

KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2

KVM_STATS_UNIT_MASK = 0xF0

KVM_CAP_IRQCHIP = 0
KVM_CAP_HLT = 1
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MP_STATE = 14
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_SET_GUEST_DEBUG = 23
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_SYNC_REGS = 74
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_COALESCED_PIO = 162
KVM_CAP_EXCEPTION_PAYLOAD = 164
KVM_CAP_SET_GUEST_DEBUG2 = 195
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_XSAVE2 = 208

# For error messages and for exits that nobody handles: 0xAE80 -> "KVM_RUN", 5 -> "KVM_EXIT_HLT".
IOCTL_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == KVMIO
}
EXIT_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}

# --- the one door ----------------------------------------------------------------------------

# Through ctypes and not fcntl.ioctl: that one retries EINTR from Python 3.14 on (a kicked KVM_RUN
# would never return) and before that holds the GIL for buffers over 1024 bytes.  CDLL, unlike
# PyDLL, releases the GIL around each call, so other threads run while a guest does.
_libc = ctypes.CDLL(None, use_errno=True)
_libc_ioctl = _libc["ioctl"]
_libc_ioctl.argtypes = (c_int, c_ulong, c_void_p)
_libc_ioctl.restype = c_int
# For what is called often, with small ints or a pointer: converting by argtypes costs 0.3 us.
ioctl_of_ints = _libc["ioctl"]


class KvmError(OSError):
    """The kernel refused an ioctl.  `errno` is the kernel's; the message names the ioctl."""


def ioctl(fd: int, request: int, argument: Any = None) -> int:
    """Call ioctl(2) on `fd`; return its non-negative result.

    `argument` is None, an int, or a ctypes object of the size that `request` encodes (or larger: of
    a struct with a flexible array the number encodes the header only).
    Raises KvmError with the kernel's errno, naming the ioctl.
    """
    if isinstance(argument, (ctypes.Structure, ctypes._SimpleCData, ctypes.Array)):
        encoded = request >> 16 & 0x3FFF
        if ctypes.sizeof(argument) < encoded:
            raise ValueError(f"{IOCTL_NAMES[request]}: argument smaller than {encoded} bytes")
        argument = ctypes.addressof(argument)  # the caller's reference keeps it alive
    result: int = _libc_ioctl(fd, request, argument)
    if result < 0:
        raise failure(request)
    return result


def failure(request: int) -> KvmError:
    """The error for the ioctl `request`, which has just failed on this thread."""
    number = ctypes.get_errno()
    name = IOCTL_NAMES.get(request, hex(request))
    return KvmError(number, f"{name}: {os.strerror(number)}")


def run(vcpu_fd: int) -> bool:
    """KVM_RUN: enter the guest until it exits.  True when it did, False when it was interrupted.

    An interruption (EINTR: a kick, or `immediate_exit`) is a value and not an error.  `kvm_run` is
    valid only after True.  EAGAIN is how KVM says that a vCPU waited for its start-up IPI and was
    interrupted: for the caller the same as EINTR.
    """
    if _libc_ioctl(vcpu_fd, KVM_RUN, None) == 0:
        return True
    check_interrupted()
    return False


def check_interrupted() -> None:
    """Raise KvmError unless the KVM_RUN that just failed on this thread was only interrupted."""
    number = ctypes.get_errno()
    if number != errno.EINTR and number != errno.EAGAIN:
        raise KvmError(number, f"KVM_RUN: {os.strerror(number)}")


@functools.cache
def flexible(header: type, entry: Any, count: int) -> Any:
    """A struct of `header` followed by `count` times `entry`, for the kernel's flexible arrays."""
    fields = [("header", header), ("entries", entry * count)]
    # A kvm_signal_mask's sigset follows its header without padding; _pack_ changes no other one.
    return type(header.__name__, (ctypes.Structure,), {"_pack_": 1, "_fields_": fields})

"""A vCPU's registers for the debugger: the kernel's structures <-> the register file.

What the file holds is in registers.py.  x87, SSE and AVX state go through XSAVE: KVM_SET_FPU
forgets MXCSR.
Used only while the vCPU is parked.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Callable, Mapping
from operator import itemgetter

from pyvmm import handles, kvm, x86
from pyvmm.kvm import kvm_regs, kvm_segment, kvm_sregs, kvm_xsave
from pyvmm.registers import Bank, RegisterFile, Value, abridge_tag_word, expand_tag_word

_GENERAL = {
    name: "rflags" if name == "eflags" else name
    for name in (
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
        *(f"r{n}" for n in range(8, 16)),
        *("rip", "eflags"),
    )
}
_SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_SYSTEM = {*_SELECTORS, *_CONTROL, "fs_base", "gs_base"}

# The XSAVE area in standard format (Intel SDM vol. 1, "XSAVE Area"): offset and bytes.
_XSAVE = {
    "fctrl": (0, 2),
    "fstat": (2, 2),
    "ftag": (4, 1),  # abridged
    "fop": (6, 2),
    "fioff": (8, 4),
    "fiseg": (12, 2),
    "fooff": (16, 4),
    "foseg": (20, 2),
    "mxcsr": (24, 4),
    **{f"st{n}": (32 + 16 * n, 10) for n in range(8)},
    **{f"xmm{n}": (160 + 16 * n, 16) for n in range(16)},
    **{f"ymm{n}h": (576 + 16 * n, 16) for n in range(16)},
}
_XSTATE_BV_AT = 512
_X87, _SSE, _AVX = 1, 2, 4  # bits of XSTATE_BV


# ---- Reading: slices of the structures, in the order of the table ----


def _slice(kind: type[kvm_regs | kvm_sregs], first: str, last: str = "") -> slice:
    """From one field to another, each of 64 bits."""
    return slice(getattr(kind, first).offset, getattr(kind, last or first).offset + 8)


def _in_xsave(first: str, last: str = "") -> slice:
    offset, size = _XSAVE[last or first]
    return slice(_XSAVE[first][0], offset + size)


def _selector(segment: str) -> slice:
    start = getattr(kvm_sregs, segment).offset + kvm_segment.selector.offset
    return slice(start, start + 2)


_general = itemgetter(
    *(_slice(kvm_regs, "rax", "rdi"), _slice(kvm_regs, "rbp"), _slice(kvm_regs, "rsp")),
    *(_slice(kvm_regs, "r8", "rip"), slice(kvm_regs.rflags.offset, kvm_regs.rflags.offset + 4)),
)
_selectors = itemgetter(*map(_selector, _SELECTORS))
# kvm_segment begins with its base.
_bases = itemgetter(*(_slice(kvm_sregs, name) for name in ("fs", "gs")))
_control = _slice(kvm_sregs, "cr0", "efer")
_cs_base = _slice(kvm_sregs, "cs")
_st = itemgetter(*(_in_xsave(f"st{n}") for n in range(8)))
_x87_words = struct.Struct("<HHBxHIH2xIH")  # FCW FSW FTW FOP FIP FCS FDP FDS
_xmm, _mxcsr, _ymm = _in_xsave("xmm0", "xmm15"), _in_xsave("mxcsr"), _in_xsave("ymm0h", "ymm15h")


def read(vcpu: handles.VcpuHandle, banks: int) -> RegisterFile:
    """The register file, with zeros for what is not in `banks` (of registers.Bank, added up).

    It ends behind the general registers if only they are asked for, as at each stop.
    """
    regs, sregs = vcpu.get_bytes(kvm_regs), vcpu.get_bytes(kvm_sregs)
    code_base = _code_base(sregs)
    if code_base:
        there = kvm_regs.from_buffer_copy(regs)
        there.rip = there.rip + code_base & 0xFFFFFFFF
        regs = bytes(there)
    general = b"".join(_general(regs))
    if banks == Bank.GENERAL:
        return general
    kernel_gs_base = vcpu.get_msrs([x86.MSR_KERNEL_GS_BASE])[0] if banks & Bank.MSR else 0
    fpu = banks & (Bank.FPU | Bank.AVX)
    area = vcpu.get_bytes(kvm_xsave) if fpu else bytes(kvm_xsave())
    selectors = b"\0\0".join((*_selectors(sregs), b""))  # in packets they have 32 bits
    return b"".join(
        (
            general,
            selectors,
            *_bases(sregs),
            kernel_gs_base.to_bytes(8, "little"),
            sregs[_control],
            _x87_and_sse(area),
            area[_ymm],
            code_base.to_bytes(8, "little"),
        )
    )


def _code_base(sregs: bytes) -> int:
    """How much is added to RIP: the base of CS, but in 64-bit mode there is none."""
    base = int.from_bytes(sregs[_cs_base], "little")
    if base and x86.cpu_mode(kvm_sregs.from_buffer_copy(sregs)) is x86.CpuMode.LONG:
        return 0
    return base


def _x87_and_sse(area: bytes) -> bytes:
    st = _st(area)
    fcw, fsw, ftw, fop, fip, fcs, fdp, fds = _x87_words.unpack_from(area)
    tags = expand_tag_word(ftw, fsw, st)
    words = struct.pack("<8I", fcw, fsw, tags, fcs, fip, fds, fdp, fop)
    return b"".join((*st, words, area[_xmm], area[_mxcsr]))


# ---- Writing, by name ----

_WITHOUT_DESCRIPTORS = (x86.CpuMode.REAL, x86.CpuMode.V8086)


def write(
    vcpu: handles.VcpuHandle,
    updates: Mapping[str, Value],
    has_paging32: Callable[[], bool] = lambda: True,
) -> None:
    """Write some registers: all, or none and OSError if a value does not fit or KVM refuses it.

    `has_paging32`: asked only if it matters, because the host has to be probed for it.
    """
    for name, value in updates.items():
        if name in _16_BITS and _int(value) >> 16:
            raise OSError(errno.EINVAL, f"the register {name} has 16 bits")
    undo: list[Callable[[], None]] = []
    some: dict[str, Value] = {}
    try:
        for names, write_some in (
            (_GENERAL.keys(), _write_general),
            (_SYSTEM, functools.partial(_write_system, has_paging32)),
            ({"k_gs_base"}, _write_msr),
            (_XSAVE.keys(), _write_xsave),
        ):
            some = {name: value for name, value in updates.items() if name in names}
            if some:
                undo.append(write_some(vcpu, some))
    except OSError as error:
        for put_back in reversed(undo):
            put_back()
        if isinstance(error, kvm.KvmError) and error.errno == errno.EINVAL:
            raise OSError(error.errno, f"KVM refuses this value of {', '.join(some)}") from None
        raise


# In packets these have 32 bits.
_16_BITS = frozenset((*_SELECTORS, "fctrl", "fstat", "ftag", "fiseg", "foseg", "fop"))


def _write_general(vcpu: handles.VcpuHandle, updates: Mapping[str, Value]) -> Callable[[], None]:
    regs = vcpu.get(kvm_regs)
    before = kvm_regs.from_buffer_copy(regs)
    for name, value in updates.items():
        setattr(regs, _GENERAL[name], value)
    vcpu.set(regs)
    return lambda: vcpu.set(before)


def _write_system(
    has_paging32: Callable[[], bool], vcpu: handles.VcpuHandle, updates: Mapping[str, Value]
) -> Callable[[], None]:
    sregs = vcpu.get(kvm_sregs)
    before = kvm_sregs.from_buffer_copy(sregs)
    is_protected = x86.cpu_mode(sregs, vcpu.get(kvm_regs).rflags) not in _WITHOUT_DESCRIPTORS
    for name, value in updates.items():
        if name in _SELECTORS:
            segment = getattr(sregs, name)
            segment.selector = value
            if not is_protected:  # as the processor does in real and virtual-8086 mode
                segment.base = segment.selector << 4
        elif name.endswith("_base"):
            getattr(sregs, name[:2]).base = value
        else:
            setattr(sregs, name, value)
    switches_paging_on = sregs.cr0 & ~before.cr0 & x86.CR0_PG
    if switches_paging_on and not sregs.efer & x86.EFER_LME and not has_paging32():
        # Such a host says yes, keeps CR0.PG clear, and its vCPU dies at the next entry.
        raise OSError(errno.ENOTSUP, "this host has no paging in 32-bit mode")
    vcpu.set(sregs)
    try:
        _check_taken_over(vcpu.get(kvm_sregs), before, updates)
    except OSError:
        vcpu.set(before)
        raise
    return lambda: vcpu.set(before)


def _check_taken_over(now: kvm_sregs, before: kvm_sregs, updates: Mapping[str, Value]) -> None:
    """Raise OSError if KVM has said yes, but has kept a bit of a control register as it was.

    Hosts do that with what they cannot do: some know no paging outside of 64-bit mode.
    """
    for name in _CONTROL:
        if name in updates:
            wanted, old, new = _int(updates[name]), getattr(before, name), getattr(now, name)
            if ignored := (wanted ^ old) & (wanted ^ new):
                raise OSError(
                    errno.ENOTSUP, f"this host cannot change bits {ignored:#x} of {name} here"
                )


def _write_msr(vcpu: handles.VcpuHandle, updates: Mapping[str, Value]) -> Callable[[], None]:
    before = vcpu.get_msrs([x86.MSR_KERNEL_GS_BASE])[0]
    vcpu.set_msrs({x86.MSR_KERNEL_GS_BASE: _int(updates["k_gs_base"])})
    return lambda: vcpu.set_msrs({x86.MSR_KERNEL_GS_BASE: before})


def _write_xsave(vcpu: handles.VcpuHandle, updates: Mapping[str, Value]) -> Callable[[], None]:
    before = vcpu.get(kvm_xsave)
    area = bytearray(before)
    (components,) = struct.unpack_from("<Q", area, _XSTATE_BV_AT)
    for name, value in updates.items():
        if name == "ftag":
            value = abridge_tag_word(_int(value))
        offset, size = _XSAVE[name]
        data = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        area[offset : offset + size] = data
        components |= _AVX if name.startswith("ymm") else _X87 | _SSE
    struct.pack_into("<Q", area, _XSTATE_BV_AT, components)
    vcpu.set(kvm_xsave.from_buffer(area))
    return lambda: vcpu.set(before)


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value


def has_avx(vcpu: handles.VcpuHandle) -> bool:
    """Whether the guest's CPUID says that it has AVX."""
    cpuid = kvm.flexible(kvm.kvm_cpuid2, kvm.kvm_cpuid_entry2, 256)()
    cpuid.header.nent = 256
    try:
        vcpu.ioctl(kvm.KVM_GET_CPUID2, cpuid)
    except OSError:
        return False
    leaves = (e for e in cpuid.entries[: cpuid.header.nent] if e.function == 1)
    return any(leaf.ecx >> 28 & 1 for leaf in leaves)

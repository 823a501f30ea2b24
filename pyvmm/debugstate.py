"""A vCPU's registers as the debugger's table names them: structures <-> a mapping.

The table itself is registers.py.  x87, SSE and AVX state go through XSAVE: KVM_SET_FPU forgets
MXCSR.
Used only while the vCPU is parked.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Callable, Mapping

from pyvmm import handles, kvm, x86
from pyvmm.kvm import kvm_regs, kvm_sregs, kvm_xsave
from pyvmm.registers import Bank, Value, Values, abridge_tag_word, expand_tag_word

_GENERAL = {
    name: "rflags" if name == "eflags" else name
    for name in (
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
        *(f"r{n}" for n in range(8, 16)),
        *("rip", "eflags"),
    )
}
# The fields of struct kvm_regs, all of 64 bits, under the debugger's names.
_KVM_REGS = tuple(field[0].replace("rflags", "eflags") for field in kvm_regs._fields_)
_KVM_REGS_STRUCT = struct.Struct(f"<{len(_KVM_REGS)}Q")
_SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")

# The XSAVE area in standard format (Intel SDM vol. 1, "XSAVE Area").
_LEGACY = struct.Struct("<HHBxHIH2xIH2xI")  # FCW FSW FTW FOP FIP FCS FDP FDS MXCSR
_X87_AT, _XMM_AT, _XSTATE_BV_AT, _YMM_AT = 32, 160, 512, 576
_X87, _SSE, _AVX = 1, 2, 4  # bits of XSTATE_BV


def read(vcpu: handles.VcpuHandle, banks: int) -> dict[str, Value]:
    """The registers of `banks` (of registers.Bank, added up) by name."""
    values: dict[str, Value] = {}
    if banks & Bank.GENERAL:  # asked for at each stop: all in one go
        registers = _KVM_REGS_STRUCT.unpack(vcpu.get_bytes(kvm_regs))
        values.update(zip(_KVM_REGS, registers, strict=True))
    if banks & Bank.SYSTEM:
        sregs = vcpu.get(kvm_sregs)
        for name in _SELECTORS:
            values[name] = getattr(sregs, name).selector
        for name in _CONTROL:
            values[name] = getattr(sregs, name)
        values["fs_base"], values["gs_base"] = sregs.fs.base, sregs.gs.base
        values["cs_base"] = sregs.cs.base
    if banks & Bank.MSR:
        values["k_gs_base"] = vcpu.get_msrs([x86.MSR_KERNEL_GS_BASE])[0]
    if banks & (Bank.FPU | Bank.AVX):
        values.update(_read_xsave(bytes(vcpu.get(kvm_xsave))))
    return values


@functools.lru_cache(maxsize=64)  # one for each vCPU: it seldom changes from one stop to the next
def _read_xsave(area: bytes) -> Mapping[str, Value]:
    fcw, fsw, ftw, fop, fip, fcs, fdp, fds, mxcsr = _LEGACY.unpack_from(area)
    st = tuple(area[_X87_AT + 16 * n : _X87_AT + 16 * n + 10] for n in range(8))
    values: dict[str, Value] = {f"st{n}": st[n] for n in range(8)}
    values.update(fctrl=fcw, fstat=fsw, ftag=expand_tag_word(ftw, fsw, st), fop=fop)
    values.update(fioff=fip, fiseg=fcs, fooff=fdp, foseg=fds, mxcsr=mxcsr)
    for n in range(16):
        values[f"xmm{n}"] = area[_XMM_AT + 16 * n : _XMM_AT + 16 * n + 16]
        values[f"ymm{n}h"] = area[_YMM_AT + 16 * n : _YMM_AT + 16 * n + 16]
    return values


def write(vcpu: handles.VcpuHandle, updates: Mapping[str, Value]) -> None:
    """Write some registers: all, or none and OSError if a value does not fit or KVM refuses it."""
    for name, value in updates.items():
        if name in _16_BITS and _int(value) >> 16:
            raise OSError(errno.EINVAL, f"the register {name} has 16 bits")
    undo: list[Callable[[], None]] = []
    try:
        for names, write_some in (
            (_GENERAL.keys(), _write_general),
            ({*_SELECTORS, *_CONTROL, "fs_base", "gs_base"}, _write_system),
            ({"k_gs_base"}, _write_msr),
        ):
            some = {name: value for name, value in updates.items() if name in names}
            if some:
                undo.append(write_some(vcpu, some))
        fpu = {
            n: v for n, v in updates.items() if n[:2] in ("st", "xm", "ym", "mx") or n in _X87_WORDS
        }
        if fpu:
            _write_xsave(vcpu, fpu)
    except OSError:
        for put_back in reversed(undo):
            put_back()
        raise


_X87_WORDS = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
# In packets these have 32 bits.
_16_BITS = frozenset((*_SELECTORS, *_X87_WORDS)) - {"fioff", "fooff"}


def _write_general(vcpu: handles.VcpuHandle, updates: Values) -> Callable[[], None]:
    regs = vcpu.get(kvm_regs)
    before = kvm_regs.from_buffer_copy(regs)
    for name, value in updates.items():
        setattr(regs, _GENERAL[name], value)
    vcpu.set(regs)
    return lambda: vcpu.set(before)


def _write_system(vcpu: handles.VcpuHandle, updates: Values) -> Callable[[], None]:
    sregs = vcpu.get(kvm_sregs)
    before = kvm_sregs.from_buffer_copy(sregs)
    for name, value in updates.items():
        if name in _SELECTORS:
            segment = getattr(sregs, name)
            segment.selector = value
            if not sregs.cr0 & x86.CR0_PE:  # as the processor does in real mode
                segment.base = segment.selector << 4
        elif name.endswith("_base"):
            getattr(sregs, name[:2]).base = value
        else:
            setattr(sregs, name, value)
    vcpu.set(sregs)
    try:
        _check_taken_over(vcpu.get(kvm_sregs), before, updates)
    except OSError:
        vcpu.set(before)
        raise
    return lambda: vcpu.set(before)


def _check_taken_over(now: kvm_sregs, before: kvm_sregs, updates: Values) -> None:
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


def _write_msr(vcpu: handles.VcpuHandle, updates: Values) -> Callable[[], None]:
    before = vcpu.get_msrs([x86.MSR_KERNEL_GS_BASE])[0]
    vcpu.set_msrs({x86.MSR_KERNEL_GS_BASE: _int(updates["k_gs_base"])})
    return lambda: vcpu.set_msrs({x86.MSR_KERNEL_GS_BASE: before})


def _write_xsave(vcpu: handles.VcpuHandle, updates: Values) -> None:
    area = vcpu.get(kvm_xsave)
    data = bytearray(area)
    values = {**_read_xsave(bytes(data)), **updates}
    components = int.from_bytes(data[_XSTATE_BV_AT : _XSTATE_BV_AT + 8], "little")
    st = tuple(_bytes(values[f"st{n}"]) for n in range(8))
    words = [values[name] for name in ("fctrl", "fstat")]
    _LEGACY.pack_into(
        data,
        0,
        *words,
        abridge_tag_word(_int(values["ftag"])),
        *(values[name] for name in ("fop", "fioff", "fiseg", "fooff", "foseg", "mxcsr")),
    )
    for n in range(8):
        data[_X87_AT + 16 * n : _X87_AT + 16 * n + 10] = st[n]
    for n in range(16):
        data[_XMM_AT + 16 * n : _XMM_AT + 16 * n + 16] = _bytes(values[f"xmm{n}"])
    components |= _X87 | _SSE
    if any(name.startswith("ymm") for name in updates):
        components |= _AVX
        for n in range(16):
            data[_YMM_AT + 16 * n : _YMM_AT + 16 * n + 16] = _bytes(values[f"ymm{n}h"])
    data[_XSTATE_BV_AT : _XSTATE_BV_AT + 8] = components.to_bytes(8, "little")
    vcpu.set(kvm_xsave.from_buffer(data))


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _bytes(value: Value) -> bytes:
    assert isinstance(value, bytes)
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

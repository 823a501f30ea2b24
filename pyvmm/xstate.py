"""XRSTOR in software, for x87, SSE and AVX state.

The processor's state is here as KVM_GET_XSAVE gives it: an XSAVE area in the standard form, whose
XSTATE_BV tells which components are not in their initial state (XINUSE).  An area in guest memory
may also have the compacted form, where a component lies right behind the one before it.

Left out: AVX-512 and all later components, and XSAVE.
Source: Intel SDM vol. 1, "Managing State Using the XSAVE Feature Set".
"""

from __future__ import annotations

import struct

from pyvmm.emulate import CannotComplete

X87, SSE, AVX = 1 << 0, 1 << 1, 1 << 2
KNOWN = X87 | SSE | AVX
COMPACTED = 1 << 63  # in XCOMP_BV
HEADER, HEADER_BYTES = 512, 64
AVX_START = HEADER + HEADER_BYTES  # in both forms, because it is the first component there
ALIGNMENT = 64

# Where a component is: (start, end); x87 state lies around MXCSR and its mask.
_PIECES = {
    X87: ((0, 24), (32, 160)),
    SSE: ((160, 416),),
    AVX: ((AVX_START, AVX_START + 256),),
}
_INITIAL_FCW, _INITIAL_MXCSR = b"\x7f\x03", b"\x80\x1f\0\0"


def area_bytes(rfbm: int) -> int:
    """How many bytes of an area matter when these components are asked for."""
    return AVX_START + (256 if rfbm & AVX else 0)


def requested(xcr0: int, edx: int, eax: int) -> int:
    """RFBM: the components that EDX:EAX asks for, of those that are enabled."""
    if xcr0 & ~KNOWN:
        raise CannotComplete("a component that is not known here")
    return xcr0 & ((edx & 0xFFFFFFFF) << 32 | eax & 0xFFFFFFFF)


def restore(state: bytearray, area: bytes, rfbm: int, xcr0: int) -> None:
    """Change `state` to what XRSTOR makes of it with `area`, area_bytes() of guest memory.

    Raises CannotComplete where XRSTOR raises #GP.
    """
    xstate_bv, xcomp_bv, reserved = struct.unpack_from("<QQQ", area, HEADER)
    compacted = bool(xcomp_bv & COMPACTED)
    allowed = xcomp_bv & xcr0 if compacted else xcr0
    if (
        xstate_bv & ~allowed
        or reserved
        or (xcomp_bv & ~COMPACTED & ~xcr0)
        or (xcomp_bv and not compacted)
    ):
        raise CannotComplete("#GP: a bad header")
    (in_use,) = struct.unpack_from("<Q", state, HEADER)
    for bit, pieces in _PIECES.items():
        if rfbm & bit:
            in_use = in_use & ~bit | xstate_bv & bit
            for start, end in pieces:
                loaded = area[start:end] if xstate_bv & bit else bytes(end - start)
                state[start:end] = loaded
    if rfbm & X87 and not xstate_bv & X87:
        state[0:2] = _INITIAL_FCW
    if rfbm & SSE if compacted else rfbm & (SSE | AVX):
        loaded = area[24:28] if xstate_bv & SSE or not compacted else _INITIAL_MXCSR
        if int.from_bytes(loaded, "little") & ~int.from_bytes(state[28:32], "little"):
            raise CannotComplete("#GP: reserved bits of MXCSR")
        state[24:28] = loaded
        if loaded != _INITIAL_MXCSR:
            in_use |= SSE  # KVM_SET_XSAVE would leave MXCSR alone otherwise
    struct.pack_into("<Q", state, HEADER, in_use)

"""The XML documents that the debugger reads: registers, threads, memory.

Made from the same rows that answer the packets, so that no description says more or less than what
works. Everything here is ASCII.

Source: Debugging with GDB, appendix "Target Descriptions", section "Target Description Format";
appendix "GDB Remote Serial Protocol", sections "Thread List Format" and "Memory Map Format".
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import groupby
from operator import attrgetter
from xml.sax.saxutils import escape

from pyvmm.registers import Layout, Register

# Flag registers as gdb prints them: each field with its bit, or its lowest and highest bit.
# Source: Intel SDM vol. 3A, "System Flags and Fields in the EFLAGS Register" and "Control
# Registers"; vol. 1, "MXCSR Control and Status Register"; AMD APM vol. 2, "Extended Feature Enable
# Register (EFER)".
_FLAGS = {
    "x86_eflags": "CF:0 PF:2 AF:4 ZF:6 SF:7 TF:8 IF:9 DF:10 OF:11 IOPL:12-13 NT:14 RF:16 VM:17"
    " AC:18 VIF:19 VIP:20 ID:21",
    "x86_cr0": "PE:0 MP:1 EM:2 TS:3 ET:4 NE:5 WP:16 AM:18 NW:29 CD:30 PG:31",
    "x86_cr4": "VME:0 PVI:1 TSD:2 DE:3 PSE:4 PAE:5 MCE:6 PGE:7 PCE:8 OSFXSR:9 OSXMMEXCPT:10"
    " UMIP:11 LA57:12 VMXE:13 SMXE:14 FSGSBASE:16 PCIDE:17 OSXSAVE:18 SMEP:20 SMAP:21 PKE:22"
    " CET:23 PKS:24",
    "x86_efer": "SCE:0 LME:8 LMA:10 NXE:11 SVME:12 LMSLE:13 FFXSR:14 TCE:15",
    "x86_mxcsr": "IE:0 DE:1 ZE:2 OE:3 UE:4 PE:5 DAZ:6 IM:7 DM:8 ZM:9 OM:10 UM:11 PM:12 RC:13-14"
    " FZ:15",
}

# The ways to look at an XMM register, with gdb's own names: member, element type, how many.
_VECTOR = (
    ("v4_float", "ieee_single", 4),
    ("v2_double", "ieee_double", 2),
    ("v16_int8", "int8", 16),
    ("v8_int16", "int16", 8),
    ("v4_int32", "int32", 4),
    ("v2_int64", "int64", 2),
)


def _vector_type() -> Iterable[str]:
    for member, element, count in _VECTOR:
        yield f'<vector id="{member}" type="{element}" count="{count}"/>'
    yield '<union id="vec128">'
    for member, _, _ in _VECTOR:
        yield f'<field name="{member}" type="{member}"/>'
    yield '<field name="uint128" type="uint128"/>'
    yield "</union>"


def _flags_type(row: Register) -> Iterable[str]:
    """The type of a flag register, cut to the width that the register has in this layout."""
    yield f'<flags id="{row.gdb_type}" size="{row.size}">'
    for field in _FLAGS[row.gdb_type].split():
        name, _, bits = field.partition(":")
        low, _, high = bits.partition("-")
        end = min(int(high or low), row.bits - 1)
        yield f'<field name="{name}" start="{low}" end="{end}"/>'
    yield "</flags>"


def _types(rows: Iterable[Register]) -> Iterable[str]:
    seen: set[str] = set()
    for row in rows:
        if row.gdb_type in seen:
            continue
        seen.add(row.gdb_type)
        if row.gdb_type in _FLAGS:
            yield from _flags_type(row)
        elif row.gdb_type == "vec128":
            yield from _vector_type()


@cache
def target_description(layout: Layout) -> bytes:
    """target.xml: the architecture and each register, in the order of `g`."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        '<target version="1.0">',
        f"<architecture>{layout.architecture.value}</architecture>",
        "<osabi>none</osabi>",
    ]
    for feature, grouped in groupby(layout.registers, attrgetter("feature")):
        rows = list(grouped)
        lines += [f'<feature name="{feature}">', *_types(rows)]
        for row in rows:
            group = f' group="{row.group}"' if row.group else ""
            number = layout.number_of[row.name]
            lines.append(
                f'<reg name="{row.name}" bitsize="{row.bits}" type="{row.gdb_type}"'
                f' regnum="{number}"{group}/>'
            )
        lines.append("</feature>")
    lines.append("</target>\n")
    return "\n".join(lines).encode()


def thread_list(threads: Iterable[tuple[str, int, str]]) -> bytes:
    """The threads: the id as packets write it, the vCPU (which is also the `core`), its state."""
    lines = ['<?xml version="1.0"?>', "<threads>"]
    for thread_id, vcpu_id, state in threads:
        attributes = f'id="{thread_id}" core="{vcpu_id}" name="vCPU {vcpu_id}"'
        lines.append(f"<thread {attributes}>{escape(state)}</thread>")
    lines.append("</threads>\n")
    return "\n".join(lines).encode("ascii", "xmlcharrefreplace")


def memory_map(regions: Iterable[tuple[int, int]]) -> bytes:
    """RAM as (start, length) in bytes."""
    lines = ['<?xml version="1.0"?>', "<memory-map>"]
    lines += [f'<memory type="ram" start="{s:#x}" length="{n:#x}"/>' for s, n in regions]
    lines.append("</memory-map>\n")
    return "\n".join(lines).encode()

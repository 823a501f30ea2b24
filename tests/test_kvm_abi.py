"""pyvmm/kvm.py against the kernel's own header: every size, offset, constant and ioctl number.

A C program that includes <linux/kvm.h> prints what the compiler makes of each name in kvm.py.
Where there is no compiler or no header, the values printed by the same program before, in
abi/golden.json, are used.  To make that file again: python3 -m tests.test_kvm_abi
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import handles, kvm

GOLDEN = Path(__file__).parent / "abi" / "golden.json"

# Where the header nests deeper than kvm.py does.
PATHS_IN_HEADER = {
    "kvm_guest_debug.debugreg": "arch.debugreg",
    "kvm_vcpu_events.triple_fault_pending": "triple_fault.pending",
    "kvm_run.exit.debug": "debug.arch",
}

# Structs and fields that an older header lacks or lays out otherwise, and a macro that came with
# them.  A name here stands for all that begin with it.
NEWER = {
    "kvm_stats_header": "KVM_CAP_BINARY_STATS_FD",
    "kvm_stats_desc": "KVM_STATS_TYPE_LINEAR_HIST",
    "kvm_coalesced_mmio.pio": "KVM_CAP_COALESCED_PIO",
    "kvm_coalesced_mmio_zone.pio": "KVM_CAP_COALESCED_PIO",
    "kvm_vcpu_events.exception.pending": "KVM_VCPUEVENT_VALID_PAYLOAD",
    "kvm_vcpu_events.exception_": "KVM_VCPUEVENT_VALID_PAYLOAD",
    "kvm_vcpu_events.triple_fault_pending": "KVM_VCPUEVENT_VALID_TRIPLE_FAULT",
    "kvm_vcpu_events.reserved": "KVM_VCPUEVENT_VALID_TRIPLE_FAULT",
    "kvm_run.exit.emulation_failure": "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES",
    "kvm_run.exit.system_event": "KVM_CAP_SYSTEM_EVENT_DATA",
    "kvm_run.flags": "KVM_RUN_X86_SMM",
    "kvm_run.immediate_exit": "KVM_CAP_IMMEDIATE_EXIT",
    "kvm_run.padding1": "KVM_CAP_IMMEDIATE_EXIT",
}


def structs() -> dict[str, type[ctypes.Structure]]:
    """The structs of kvm.py that have a name in the header."""
    return {
        name: value
        for name, value in vars(kvm).items()
        if name.startswith("kvm_")
        and isinstance(value, type)
        and issubclass(value, ctypes.Structure)
    }


def constants() -> dict[str, int]:
    """The constants and ioctl numbers of kvm.py."""
    return {
        name: value
        for name, value in vars(kvm).items()
        if name.startswith(("KVM_", "KVMIO")) and isinstance(value, int)
    }


def fields(kind: Any, path: str) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of every field of `kind`, in bytes.

    Also of the structs in it that have no name in the header; those that have one are compared
    by themselves.
    """
    for name, field_kind in kind._fields_:
        field = getattr(kind, name)
        yield f"{path}.{name}", field.offset, field.size
        if hasattr(field_kind, "_fields_") and field_kind.__name__.startswith("_"):
            for inner, offset, size in fields(field_kind, f"{path}.{name}"):
                yield inner, field.offset + offset, size


def ours() -> dict[str, int]:
    """What kvm.py says, under the names that the C program prints."""
    values = constants()
    for name, kind in structs().items():
        values[f"sizeof {name}"] = ctypes.sizeof(kind)
        for path, offset, size in fields(kind, name):
            values[f"offsetof {path}"], values[f"sizeof {path}"] = offset, size
    for anonymous in ("offsetof kvm_run.exit", "sizeof kvm_run.exit"):
        del values[anonymous]  # the union of exits has no name in C; its members are there
    return values


def path_in_header(path: str) -> str:
    """`kvm_run.exit.mmio.len` -> `mmio.len`: what offsetof() takes."""
    return PATHS_IN_HEADER.get(path) or path.partition(".")[2].removeprefix("exit.")


def c_program() -> str:
    """Prints `value name` for each name in ours() that the header has."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/kvm.h>"]
    lines += ["int main(void)", "{"]
    for name in ours():
        kind, _, path = name.rpartition(" ")
        struct = path.partition(".")[0]
        if not kind:
            expression, needs = name, name
        else:
            needs = next((m for n, m in NEWER.items() if path.startswith(n)), "")
            inner = path_in_header(path)
            if kind == "offsetof":
                expression = f"offsetof(struct {struct}, {inner})"
            elif "." in path:
                expression = f"sizeof(((struct {struct} *)0)->{inner})"
            else:
                expression = f"sizeof(struct {struct})"
        statement = f'    printf("%lu {name}\\n", (unsigned long)({expression}));'
        lines += [f"#ifdef {needs}", statement, "#endif"] if needs else [statement]
    return "\n".join([*lines, "    return 0;", "}", ""])


def compiled() -> dict[str, int] | None:
    """What the system's header says; None where there is no compiler or no header."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "abi.c"), Path(directory, "abi")
        source.write_text("#include <linux/kvm.h>\n")
        has_header = subprocess.run([compiler, "-E", source], capture_output=True, timeout=30)
        if has_header.returncode:
            return None
        source.write_text(c_program())
        subprocess.run([compiler, "-o", program, source], check=True, timeout=60)
        printed = subprocess.run([program], check=True, capture_output=True, text=True, timeout=10)
    pairs = (line.split(" ", 1) for line in printed.stdout.splitlines())
    return {name: int(value) for value, name in pairs}


@pytest.fixture(scope="module")
def header() -> dict[str, int]:
    values = compiled()
    return golden() if values is None else values


def golden() -> dict[str, int]:
    values: dict[str, int] = json.loads(GOLDEN.read_text())
    return values


def differing(left: dict[str, int], right: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {
        name: (left[name], right[name])
        for name in left.keys() & right.keys()
        if left[name] != right[name]
    }


def test_sizes_offsets_and_numbers_are_those_of_the_kernel_header(header: dict[str, int]) -> None:
    assert differing(ours(), header) == {}


def test_golden_values_are_those_of_the_kernel_header(header: dict[str, int]) -> None:
    assert differing(golden(), header) == {}


def test_golden_values_cover_every_name() -> None:
    assert ours().keys() - golden().keys() == set(), "run python3 -m tests.test_kvm_abi"
    assert golden().keys() - ours().keys() == set()


def test_the_header_knows_nearly_every_name(header: dict[str, int]) -> None:
    # An older header lacks some; one that lacks most means that the C program is wrong.
    assert len(header.keys() & ours().keys()) > 0.9 * len(ours())


def test_every_struct_of_kvm_py_is_compared() -> None:
    compared = set(structs().values())

    def add(kind: Any) -> None:
        compared.add(kind)
        for _, field_kind in kind._fields_:
            if hasattr(field_kind, "_fields_"):
                add(field_kind)

    for kind in list(compared):
        add(kind)
    defined = {
        value
        for value in vars(kvm).values()
        if isinstance(value, type) and issubclass(value, (ctypes.Structure, ctypes.Union))
    }
    assert {kind.__name__ for kind in defined - compared} <= {"Structure", "Union"}


def test_every_struct_refuses_a_misspelt_field() -> None:
    for name, kind in structs().items():
        with pytest.raises(AttributeError):
            kind().misspelt = 1
        assert "__slots__" in vars(kind), name


def test_each_ioctl_number_encodes_the_size_of_its_struct() -> None:
    for kind, requests in handles.VCPU_STATE.items():
        for request in requests:
            assert request >> 16 & 0x3FFF == ctypes.sizeof(kind), kvm.IOCTL_NAMES[request]


def test_ioctls_and_exits_have_names_for_messages() -> None:
    assert kvm.IOCTL_NAMES[kvm.KVM_RUN] == "KVM_RUN"
    assert kvm.IOCTL_NAMES[kvm.KVM_SET_USER_MEMORY_REGION] == "KVM_SET_USER_MEMORY_REGION"
    assert kvm.EXIT_NAMES[kvm.KVM_EXIT_IO] == "KVM_EXIT_IO"
    assert kvm.EXIT_NAMES[kvm.KVM_EXIT_UNKNOWN] == "KVM_EXIT_UNKNOWN"
    assert kvm.EXIT_NAMES[kvm.KVM_EXIT_EXCEPTION] == "KVM_EXIT_EXCEPTION"


def test_no_two_ioctls_share_a_number() -> None:
    numbers = [v for n, v in constants().items() if v >> 8 & 0xFF == kvm.KVMIO and n != "KVMIO"]
    assert len(numbers) == len(set(numbers)) == len(kvm.IOCTL_NAMES)


def test_a_failed_ioctl_names_itself_and_carries_the_errno() -> None:
    with open("/dev/null") as file, pytest.raises(kvm.KvmError, match="KVM_GET_API_VERSION") as e:
        kvm.ioctl(file.fileno(), kvm.KVM_GET_API_VERSION)
    assert e.value.errno == 25  # ENOTTY


def test_an_argument_smaller_than_the_ioctl_says_is_refused_before_the_kernel_sees_it() -> None:
    with pytest.raises(ValueError, match="KVM_GET_SREGS"):
        kvm.ioctl(-1, kvm.KVM_GET_SREGS, kvm.kvm_regs())


def test_a_flexible_array_follows_its_header_without_a_gap() -> None:
    msrs = kvm.flexible(kvm.kvm_msrs, kvm.kvm_msr_entry, 3)
    assert msrs.entries.offset == 8 and ctypes.sizeof(msrs) == 8 + 3 * 16
    mask = kvm.flexible(kvm.kvm_signal_mask, ctypes.c_uint8, 8)
    assert mask.entries.offset == 4 and ctypes.sizeof(mask) == 12


@pytest.mark.kvm
def test_the_map_of_a_vcpu_holds_kvm_run_and_the_coalesced_ring() -> None:
    system = handles.SystemHandle()
    try:
        size = system.vcpu_mmap_size()
    finally:
        system.close()
    assert size >= ctypes.sizeof(kvm.kvm_run)
    assert size >= (kvm.KVM_COALESCED_MMIO_PAGE_OFFSET + 1) * 4096


@pytest.mark.kvm
def test_a_handle_is_closed_once() -> None:
    system = handles.SystemHandle()
    vm = system.create_vm()
    vcpu = vm.create_vcpu(0, system.vcpu_mmap_size())
    for handle in (vcpu, vm, system) * 2:
        handle.close()
    assert (vcpu.fd, vm.fd, system.fd) == (-1, -1, -1)


@pytest.mark.kvm
def test_state_that_is_written_reads_back() -> None:
    system = handles.SystemHandle()
    vm = system.create_vm()
    vcpu = vm.create_vcpu(0, system.vcpu_mmap_size())
    try:
        vcpu.set(kvm.kvm_regs(rax=0x1234, rip=0xFFF0, rflags=2))
        assert vcpu.get(kvm.kvm_regs).rax == 0x1234
        fpu = vcpu.get(kvm.kvm_fpu)
        fpu.xmm[3][:] = bytes(range(16))
        vcpu.set(fpu)
        assert bytes(vcpu.get(kvm.kvm_fpu).xmm[3]) == bytes(range(16))
        vcpu.set_msrs({0xC0000102: 0x1000})  # KERNEL_GS_BASE
        assert vcpu.get_msrs([0xC0000102]) == [0x1000]
        with pytest.raises(kvm.KvmError, match="0x12345678"):
            vcpu.get_msrs([0x12345678])
    finally:
        for handle in (vcpu, vm, system):
            handle.close()


if __name__ == "__main__":
    found = compiled()
    if found is None:
        sys.exit("no C compiler, or no <linux/kvm.h>")
    GOLDEN.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")

"""What a debugger is told of a Linux guest that has no symbol file.

The kernel is one that tests/linux_memory.py makes up; it executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.kvm import kvm_sregs
from pyvmm.machine import Machine
from tests.conftest import GUESTS
from tests.gdb_client import gdb_batch, needs_gdb
from tests.linux_memory import DIRECT_MAP, KERNEL_GPA, LINK_BASE, LOG, PAGE_TABLES, PRB, Ram
from tests.rsp_client import PATIENCE, RIP, Debuggee, RspClient, flat_image
from tests.test_printk import Log

pytestmark = pytest.mark.kvm

RESET = bytes.fromhex("66baf90c b006 ee f4")  # mov dx, 0xcf9; mov al, 6; out; hlt
MOVED = 0x1460_0000
START_KERNEL = LINK_BASE + MOVED + 0x1000


def with_kernel(offset: int = MOVED, messages: int = 3, is_linux: bool = True) -> Debuggee:
    """A Linux guest in which a kernel lies, which has moved itself by `offset`."""

    def prepare(machine: Machine) -> None:
        ram = Ram(offset=offset)
        log = Log(ram)
        for number in range(messages):
            log.add(b"message %d" % number, number * 10**9)
        log.finish()
        end = KERNEL_GPA + (2 << 20)
        machine.vm.memory.write(KERNEL_GPA, ram.pages[KERNEL_GPA:end])

    return Debuggee(flat_image(RESET)._replace(is_linux=is_linux), prepare=prepare)


def use_kernels_page_tables(debuggee: Debuggee) -> None:
    """As a kernel that runs: the guest's own do not have it."""
    debuggee.wait_for(lambda: debuggee.vm.debug_cpus() == {0}, "it waits for a debugger")
    assert not debuggee.vm.wait_parked((0,), PATIENCE)
    handle = debuggee.vm.state(0)
    sregs = handle.get(kvm_sregs)
    sregs.cr3 = KERNEL_GPA + PAGE_TABLES
    handle.set(sregs)


@pytest.fixture
def client() -> Iterator[RspClient]:
    with with_kernel() as debuggee, debuggee.connect() as client:
        yield client


def test_where_names_the_kernels_functions_and_says_whose_names_they_are(client: RspClient) -> None:
    client.set_register(RIP, START_KERNEL + 4)
    assert client.monitor("where") == (
        "vCPU 0: at start_kernel+0x4\nnames: the kernel's own symbol table (kallsyms)\n"
    )


def test_kaslr_is_told_as_what_gdb_wants(client: RspClient) -> None:
    assert client.monitor("kaslr") == (
        "the kernel begins at 0xffffffff95600000, GPA 0x200000, moved by 0x14600000; type\n"
        "  symbol-file -o 0x14600000 vmlinux\n"
    )


def test_gdb_is_told_when_it_connects() -> None:
    with with_kernel() as debuggee, debuggee.connect() as client:
        assert client.ask("qOffsets") == b"", "its page tables do not have it yet"
        use_kernels_page_tables(debuggee)
        assert client.ask("qOffsets") == b"TextSeg=ffffffff95600000"


@pytest.mark.process
@needs_gdb
def test_gdb_itself_moves_the_file_that_it_was_given() -> None:
    with with_kernel() as debuggee:
        use_kernels_page_tables(debuggee)
        text = gdb_batch(
            None,
            "set architecture i386:x86-64",
            f"file {GUESTS}/loops.elf",
            f"target remote {debuggee.server.address}",
            "info address _start",
        )
    # The file's first segment is linked for 0x100000, where _start is.
    assert f"is a function at address {LINK_BASE + MOVED:#x}." in text, text


def test_a_kernel_that_has_not_moved_needs_nothing() -> None:
    with with_kernel(offset=0) as debuggee, debuggee.connect() as client:
        assert "where it was linked for; type\n  symbol-file vmlinux" in client.monitor("kaslr")
        use_kernels_page_tables(debuggee)
        assert client.ask("qOffsets") == b""


def test_dmesg_shows_all_or_the_last_messages(client: RspClient) -> None:
    lines = [f"[    {n}.000000] message {n}\n" for n in range(3)]
    assert client.monitor("dmesg") == "".join(lines)
    assert client.monitor("dmesg 2") == "".join(lines[1:])
    assert client.monitor("dmesg 99") == "".join(lines)


@pytest.mark.parametrize("count", ["0", "-1", "x", "1 2", "²"])
def test_a_count_of_messages_that_is_none_is_refused_with_advice(
    client: RspClient, count: str
) -> None:
    assert client.monitor(f"dmesg {count}") == "say how many of the last messages, as 20\n"
    assert "message 2" in client.monitor("dmesg 1")


def test_before_the_first_message_dmesg_says_so() -> None:
    with with_kernel(messages=0) as debuggee, debuggee.connect() as client:
        assert client.monitor("dmesg") == "the log is empty\n"


def test_a_file_that_the_user_names_goes_before(client: RspClient, tmp_path: Path) -> None:
    path = tmp_path / "System.map of  mine"
    path.write_text(f"{START_KERNEL:x} T mine\n")
    client.set_register(RIP, START_KERNEL + 1)
    assert client.monitor(f"symbols {path}") == f"vCPU 0: at mine+0x1\nnames: {path}\n"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "/no/such/file"])
def test_what_is_no_file_with_symbols_is_one_line(client: RspClient, path: str) -> None:
    answer = client.monitor(f"symbols {path}")
    assert path in answer and answer.count("\n") == 1


@pytest.mark.parametrize("start_kernel", [START_KERNEL - MOVED, START_KERNEL])
def test_a_file_of_a_kernel_that_has_moved_fits_as_it_was_linked_and_as_it_runs(
    client: RspClient, tmp_path: Path, start_kernel: int
) -> None:
    path = tmp_path / "System.map"
    path.write_text(f"{start_kernel:x} T start_kernel\n{start_kernel + 16:x} T mine\n")
    client.set_register(RIP, START_KERNEL + 18)
    assert client.monitor(f"symbols {path}") == f"vCPU 0: at mine+0x2\nnames: {path}\n"


def test_after_a_reset_the_kernel_is_looked_for_anew() -> None:
    with with_kernel() as debuggee, debuggee.connect() as client:
        assert "moved by" in client.monitor("kaslr")
        resets: list[None] = []
        debuggee.machine.on_reset(lambda: resets.append(None))
        client.go()
        debuggee.wait_for(lambda: bool(resets), "it resets the machine")
        client.break_in()
        assert "no symbol table of a 64-bit Linux kernel" in client.monitor("kaslr")
        assert "names: none" in client.monitor("where")


def test_in_another_guest_a_kernel_is_looked_for_only_when_it_is_asked_for() -> None:
    with with_kernel(is_linux=False) as debuggee, debuggee.connect() as client:
        use_kernels_page_tables(debuggee)
        client.set_register(RIP, START_KERNEL)
        assert client.ask("qOffsets") == b""
        assert "names: none" in client.monitor("where")
        assert "moved by" in client.monitor("kaslr")
        assert "at start_kernel" in client.monitor("where")


def test_a_damaged_kernel_is_one_line(client: RspClient) -> None:
    client.write(KERNEL_GPA + PRB, bytes(8))
    assert client.monitor("dmesg").count("\n") == 1
    client.write(KERNEL_GPA + PRB, (DIRECT_MAP + KERNEL_GPA + LOG).to_bytes(8, "little"))
    client.write(KERNEL_GPA + LOG, b"\xff" * 4)
    assert "not of a kind that is known" in client.monitor("dmesg")

"""A machine as the stub's target: what it says of itself, and its memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from pyvmm import debugstate, kvm, x86
from pyvmm.boot import Mode
from pyvmm.handles import VcpuHandle
from pyvmm.machine import Machine
from pyvmm.registers import RegisterFile
from tests.rsp_client import BASE, COUNT, RAM, RIP, Debuggee, Refused, RspClient, flat_image
from tests.support import HALT

pytestmark = pytest.mark.kvm


def with_sregs(change: Callable[[kvm.kvm_sregs], None]) -> Callable[[Machine], None]:
    """For Debuggee's `prepare`: the first vCPU, with other system registers."""

    def prepare(machine: Machine) -> None:
        handle = machine.vm.handle_of(0)
        sregs = handle.get(kvm.kvm_sregs)
        change(sregs)
        handle.set(sregs)

    return prepare


def architecture(client: RspClient) -> str:
    """What the target description says."""
    text = client.ask("qXfer:features:read:target.xml:0,1000").decode()
    match = re.search("<architecture>(.*)</architecture>", text)
    assert match
    return match[1]


# ---- What it is ----


@pytest.mark.parametrize("db", [0, 1])
def test_a_64_bit_kernel_stays_one_while_it_runs_a_32_bit_program(db: int) -> None:
    def compatibility_mode(sregs: kvm.kvm_sregs) -> None:
        sregs.cs.l, sregs.cs.db = 0, db

    with Debuggee(COUNT, prepare=with_sregs(compatibility_mode)) as debuggee:
        with debuggee.connect() as client:
            assert (
                "compatibility" in bytes.fromhex(client.ask("qThreadExtraInfo,1").decode()).decode()
            )
            assert architecture(client) == "i386:x86-64"


def test_a_64_bit_linux_is_one_in_whatever_mode_it_is() -> None:
    def real_mode(sregs: kvm.kvm_sregs) -> None:
        sregs.cr0, sregs.efer, sregs.cs.l = x86.CR0_ET, 0, 0

    for is_linux, expected in ((True, "i386:x86-64"), (False, "i8086")):
        image = flat_image(COUNT)._replace(is_linux=is_linux)
        with Debuggee(image, prepare=with_sregs(real_mode)) as debuggee:
            with debuggee.connect() as client:
                assert architecture(client) == expected


@pytest.mark.parametrize("mode", list(Mode))
def test_memory_can_be_anywhere_in_whatever_mode_the_guest_begins(mode: Mode) -> None:
    """gdb asks once; the guest may switch to 64-bit mode, or to 5-level paging, afterwards."""
    with Debuggee(flat_image(HALT, mode, 0x8000)) as debuggee, debuggee.connect() as client:
        document = client.ask("qXfer:memory-map:read::0,1000")[1:]
        regions = [
            (int(memory.get("start", ""), 0), int(memory.get("length", ""), 0))
            for memory in ElementTree.fromstring(document).findall("memory")
        ]
        assert regions == [(0, 1 << 63), (1 << 63, 1 << 63)]


# ---- Memory ----


HIGH = 0xFFFF_FFFF_0010_0000  # where 64-bit kernels are linked; 0x100000 when it is cut to 32 bits


@pytest.mark.parametrize("gva", [0x1_0010_0000, HIGH])
@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.REAL])
def test_what_a_32_bit_processor_cannot_address_does_not_wrap_around(mode: Mode, gva: int) -> None:
    """A kernel's high half before it has turned on 64-bit mode."""
    with Debuggee(flat_image(HALT, mode, 0x8000)) as debuggee, debuggee.connect() as client:
        before = debuggee.memory()
        for ask in (
            lambda: client.insert(gva),
            lambda: client.read(gva, 4),
            lambda: client.write(gva, b"code"),
        ):
            with pytest.raises(Refused, match="E0e"):
                ask()
        assert "outside of 64-bit mode addresses have 32 bits" in client.monitor("error")
        with pytest.raises(Refused):
            client.insert(gva)
        assert "use hbreak" in client.monitor("error")
        assert debuggee.memory() == before
        assert client.ask(f"qMemoryRegionInfo:{gva:x}").endswith(b"size:%x;" % ((1 << 64) - gva))


def test_a_read_ends_where_32_bits_do() -> None:
    def add_rom(machine: Machine) -> None:
        machine.vm.memory.add_slot(0xFFFF_F000, 0x1000)

    image = flat_image(HALT, Mode.PROTECTED)
    with Debuggee(image, prepare=add_rom) as debuggee, debuggee.connect() as client:
        assert client.read(0xFFFF_FFFC, 8) == bytes(4)
        client.write(0xFFFF_FFFC, b"last")
        with pytest.raises(Refused):
            client.write(0xFFFF_FFFC, b"too long")
        assert client.read(0xFFFF_FFFC, 4) == b"last"
        assert debuggee.memory(length=8) == bytes(8)


def test_a_region_without_ram_ends_where_there_is_ram_again() -> None:
    """One large page, of which only a part is RAM at its end."""
    hole, ram = RAM, RAM + 0x10_0000

    def add_ram(machine: Machine) -> None:
        machine.vm.memory.add_slot(ram, 0x1000)

    with Debuggee(COUNT, prepare=add_ram) as debuggee, debuggee.connect() as client:

        def region(gva: int) -> bytes:
            return client.ask(f"qMemoryRegionInfo:{gva:x}")

        assert region(hole) == b"start:%x;size:%x;" % (hole, ram - hole)
        assert region(ram) == b"start:%x;size:1000;permissions:rwx;" % ram
        assert region(ram + 0x1000).startswith(b"start:%x;" % (ram + 0x1000))


# ---- Registers ----


def test_registers_that_were_read_during_a_reset_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library can ask for a reset at any time: it is made on the machine's own thread."""
    with Debuggee(COUNT) as debuggee, debuggee.connect() as client:
        client.set_register(RIP, BASE + 1)
        read = debugstate.read

        def read_before_the_reset(vcpu: VcpuHandle, banks: int) -> RegisterFile:
            monkeypatch.undo()
            file = read(vcpu, banks)
            debuggee.machine.request_reset()
            debuggee.wait_for(lambda: resets == [None], "it is reset")
            return file

        resets: list[None] = []
        debuggee.machine.on_reset(lambda: resets.append(None))
        monkeypatch.setattr(debugstate, "read", read_before_the_reset)
        assert client.register(RIP) == BASE + 1
        assert client.register(RIP) == BASE

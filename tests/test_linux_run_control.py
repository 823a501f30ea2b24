"""The debugger on a Linux that runs: one guest with a shell, and a client of the debug server.

Nothing of the kernel is known before but what it says itself: the addresses are from its symbol
table, as `monitor where` reads it, and from /proc/kallsyms.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.devices.virtio_rng import VirtioRng
from pyvmm.linux.kernel import Kernel
from pyvmm.machine import Machine
from pyvmm.names import Names
from pyvmm.target import SIGINT
from tests.linux_guest import (
    BOOT,
    MEMORY,
    PROMPT,
    STEP,
    find_linux,
    linux_image,
    shell_line,
    succeeded,
)
from tests.rsp_client import RSP, Closed, Debuggee, StopReply
from tests.support import cycles, requires

pytestmark = [pytest.mark.kvm, pytest.mark.slow, pytest.mark.timeout(1200)]

SOFTWARE, HARDWARE, WRITE = 0, 1, 2  # kinds of breakpoints in Z packets
CS = 18  # number of a register in the 64-bit target description
CPUS = 2

COMPUTE = "while true; do true; done"  # to type; it executes nothing but the shell itself

# Where the timer interrupt, and any other, enters the kernel.
INTERRUPT_ENTRIES = ("asm_sysvec_", "asm_common_interrupt", "irq_entries_start")


class Shell:
    """A Linux that waits at its prompt, and the debugger that is attached to it."""

    def __init__(self, folder: Path) -> None:
        self._output = bytearray()  # guarded by _changed
        self._changed = threading.Condition()
        self._seen = 0
        keys, self._typed = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._keys = keys
        self.debuggee = Debuggee(
            linux_image(folder, append="nokaslr"),
            cpus=CPUS,
            memory=MEMORY,
            irqchip=True,
            virtio=[VirtioRng()],
            output=self._print,
            prepare=lambda machine: machine.connect_input(keys),
        )
        self.client = self.debuggee.connect()
        self.client.go()
        self.wait_for("a shell on rootfs\r\n", BOOT)
        self.wait_for(PROMPT)
        self.kernel = self._find_kernel(self.debuggee.machine)

    def _find_kernel(self, machine: Machine) -> Kernel:
        self.client.break_in()
        names = Names(machine.vm, None, is_linux=True)
        kernel = names.kernel()
        self.client.go()
        return kernel

    def close(self) -> None:
        self.client.close()
        self.debuggee.close()
        os.close(self._keys)
        os.close(self._typed)

    # --- its console ---

    def _print(self, data: bytes) -> None:
        with self._changed:
            self._output += data
            self._changed.notify_all()

    def wait_for(self, text: str, timeout: float = STEP) -> str:
        """What is printed up to the end of `text`."""
        wanted = text.encode()
        with self._changed:
            if self._changed.wait_for(lambda: wanted in self._output[self._seen :], timeout):
                end = self._output.index(wanted, self._seen) + len(wanted)
                printed = self._output[self._seen : end].decode(errors="replace")
                self._seen = end
                return printed
            tail = bytes(self._output[-2000:])
        raise AssertionError(f"{text!r} is not printed: {tail!r}\n{self._why_silent()}")

    def _why_silent(self) -> str:
        """Whether the guest is stopped or has ended, and where it is."""
        try:
            try:
                said = str(self.client.wait_stop(0.1))
            except TimeoutError:  # it runs
                said = str(self.client.break_in())
            where = "\n".join(map(self.client.monitor, ("where", "regs 0", "regs 1", "exits")))
        except (Closed, TimeoutError) as error:
            return f"{error!r}: {self.debuggee.stop} {self.debuggee.error}"
        return f"{said}\n{where}"

    def type(self, command: str) -> None:
        """Type a line, and wait until the guest has echoed it."""
        os.write(self._typed, f"{command}\n".encode())
        self.wait_for("\n")

    def run(self, command: str) -> str:
        """What a command prints; it must succeed."""
        self.type(shell_line(command))
        return succeeded(command, self.wait_for(PROMPT))

    def interrupt(self) -> None:
        """^C at the console, and the prompt."""
        os.write(self._typed, b"\x03")
        self.wait_for(PROMPT)

    # --- the debugger ---

    def stopped(self) -> StopReply:
        return self.client.wait_stop(STEP)

    def break_in_program(self) -> int:
        """Stop the guest while a vCPU executes a program; returns which one."""
        for attempt in range(12):
            time.sleep(0.001 * 2**attempt)  # longer each time: the kernel has things to do, too
            assert self.client.break_in().signal == SIGINT
            for vcpu_id in range(CPUS):
                if self.client.register(CS, vcpu_id) & 3 == 3:
                    return vcpu_id
            self.client.go()
        raise AssertionError("no vCPU is ever in a program")

    def function(self, rip: int) -> str:
        """The name of the kernel's function there; empty elsewhere."""
        return (self.kernel.code().name(rip) or "").partition("+")[0]

    def works(self) -> None:
        """The guest runs, and nothing has hurt it."""
        assert self.run("echo $((6*7))") == "42"
        assert self.run("dmesg | grep -cE 'Oops|segfault|general protection' || true") == "0"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(find_linux(tmp_path_factory.mktemp("linux")))
    yield shell
    shell.close()


@pytest.fixture
def shell(shared: Shell) -> Iterator[Shell]:
    """At its prompt before and after."""
    shared.works()
    yield shared
    shared.works()


def test_an_idle_guest_is_stopped_where_it_idles(shell: Shell) -> None:
    places = []
    for attempt in range(12):
        shell.client.break_in()
        places.append(shell.client.monitor("where"))
        shell.client.go()
        if "halted at" in places[-1] or "idle" in places[-1]:
            return
        time.sleep(0.001 * 2**attempt)  # longer each time: it may have had work to finish
    raise AssertionError(places)


def test_a_program_is_stopped_while_it_computes(shell: Shell) -> None:
    shell.type(COMPUTE)
    assert shell.break_in_program() in range(CPUS)
    shell.client.go()
    shell.interrupt()


def test_a_thousand_steps_never_land_in_an_interrupt(shell: Shell) -> None:
    shell.type(COMPUTE)
    vcpu_id = shell.break_in_program()
    functions = set()
    for _ in range(max(200, cycles(1000))):
        functions.add(shell.function(shell.client.step(vcpu_id).rip))
    shell.client.go()
    shell.interrupt()
    assert not [name for name in functions if name.startswith(INTERRUPT_ENTRIES)], functions


def test_a_breakpoint_in_the_kernel_and_to_the_end_of_its_function(shell: Shell) -> None:
    """As gdb does it: break, continue, finish."""
    requires("breakpoint")
    client, entry = shell.client, shell.kernel.gva("do_sys_openat2")
    client.break_in()
    client.insert(entry)
    client.go()
    shell.type("cat /proc/version /proc/version /proc/version")
    for _ in range(3):
        stop = shell.stopped()
        assert "swbreak" in stop and stop.rip == entry
        client.select(stop.vcpu_id)
        stack = client.register(RSP)
        caller = client.read_u64(stack)
        client.remove(entry)
        assert client.step(stop.vcpu_id).rip > entry
        client.insert(caller)
        stop = client.resume()
        client.remove(caller)
        client.select(stop.vcpu_id)
        assert (stop.rip, client.register(RSP)) == (caller, stack + 8)
        client.insert(entry)
        client.go()
    client.break_in()
    client.remove(entry)
    client.go()
    assert shell.wait_for(PROMPT).count("Linux version") == 3


def test_a_breakpoint_in_a_module(shell: Shell) -> None:
    requires("breakpoint")
    line = shell.run("grep ' virtio_read.*virtio_rng' /proc/kallsyms")
    entry = int(line.split()[0], 16)
    shell.client.break_in()
    shell.client.insert(entry)
    shell.client.go()
    shell.type("head -c 4096 /dev/hwrng >/dev/null")
    assert shell.stopped().rip == entry
    shell.client.remove(entry)
    shell.client.go()
    shell.wait_for(PROMPT)


def test_a_watchpoint_on_a_variable_of_the_kernel(shell: Shell) -> None:
    requires("watchpoint")
    client, jiffies = shell.client, shell.kernel.gva("jiffies")
    client.break_in()
    client.insert(jiffies, WRITE, 8)
    before = client.read_u64(jiffies)
    client.go()
    stop = client.wait_stop(BOOT)
    assert int(stop.fields["watch"], 16) == jiffies
    assert client.read_u64(jiffies) > before
    client.remove(jiffies, WRITE, 8)
    client.go()


def test_a_hardware_breakpoint_before_the_kernel_is_unpacked(shared: Shell) -> None:
    """The last one: it boots the kernel anew, and leaves it there."""
    requires("hw-breakpoint")
    client, start_kernel = shared.client, shared.kernel.gva("start_kernel")
    client.break_in()
    client.insert(start_kernel, HARDWARE)
    client.go()
    shared.type("reboot -f")
    stop = client.wait_stop(BOOT)
    assert "hwbreak" in stop and stop.rip == start_kernel
    assert (stop.vcpu_id, shared.function(stop.rip)) == (0, "start_kernel")
    assert "start_kernel" in client.monitor("where")
    assert "not started" in client.monitor("where")

"""The debug server as a user meets it: gdb itself, attached to pyvmm's stub and to QEMU's.

Other than in debug.py, what is asked is gdb's choice, and differs: stop replies that bring along
the registers that it looks at first save it a packet, and so does a stub that wants no
acknowledgements.  gdb's own time is in the figures.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import time
from types import TracebackType

from benchmarks import guests, stubs
from benchmarks.measure import Contenders, Context, Goal, Measure, Sample, Sampler, Unavailable
from benchmarks.measures.debug import ROUND_TRIP, rate, software_breakpoints_everywhere
from benchmarks.stubs import LOAD_GPA, QEMU, Stub


class Gdb:
    """A gdb that is attached to a stub and takes commands.  A context manager."""

    def __init__(self, stub: Stub) -> None:
        self._process = subprocess.Popen(
            [_gdb(), "-nx", "-q"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.do("set confirm off", "set pagination off", f"target remote 127.0.0.1:{stub.port}")

    def __enter__(self) -> Gdb:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def do(self, *commands: str) -> str:
        """What gdb has printed when it is through with these."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n".join((*commands, f"echo {_DONE}\\n", "")))
        self._process.stdin.flush()
        lines: list[str] = []
        while not lines or _DONE not in lines[-1]:
            lines.append(self._process.stdout.readline())
            if not lines[-1]:
                raise RuntimeError(f"gdb has ended: {''.join(lines)}")
        return "".join(lines)


_DONE = "<done>"


def _gdb() -> str:
    program = shutil.which("gdb")
    if program is None:
        raise Unavailable("no gdb (apt install gdb)")
    return program


def _attach(stub: Stub, stack: contextlib.ExitStack) -> Sampler:
    """Milliseconds that gdb takes to attach, stop at its prompt, detach and end."""

    def sample() -> Sample:
        command = [_gdb(), "-nx", "-batch", "-ex", f"target remote 127.0.0.1:{stub.port}"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "-ex", "detach"], capture_output=True, text=True, check=False, timeout=60
        )
        wall = time.perf_counter() - start
        if "detached" not in done.stdout:
            raise RuntimeError(f"gdb: {done.stdout}{done.stderr}")
        return Sample(wall * 1e3)

    return sample


def _attach_contenders(context: Context) -> contextlib.AbstractContextManager[Contenders]:
    halted = bytes.fromhex("fb f4 ebfd")  # sti; here: hlt; jmp here
    guest = guests.write_guest(context.folder, "halted", halted)
    return stubs.contenders(context.folder, guest, _attach)


def _conditions(count: int, stub: Stub, stack: contextlib.ExitStack) -> Sampler:
    """A breakpoint whose condition is false each time but the last."""
    with stubs.attached(stub, LOAD_GPA + len(guests.circle())) as client:  # QEMU has to get there
        client.command(b"D;1")
    gdb = stack.enter_context(Gdb(stub))
    command = "break" if software_breakpoints_everywhere() else "hbreak"
    gdb.do(f"{command} *{LOAD_GPA} if $rax == {count}")

    def work() -> float:
        printed = gdb.do("set var $rax = 0", f"set var $pc = {LOAD_GPA}", "continue", "print $rax")
        if f"= {count}\n" not in printed:
            raise RuntimeError(f"gdb: {printed}")
        return count

    return lambda: rate(stub, work)


def _condition_contenders(context: Context) -> contextlib.AbstractContextManager[Contenders]:
    guest = guests.write_guest(context.folder, "circle", guests.circle())
    sampler = functools.partial(_conditions, context.scaled(300))
    return stubs.contenders(context.folder, guest, sampler)


MEASURES = (
    Measure(
        "gdb-condition",
        "hits/s",
        "How often a second gdb finds the condition of `break ... if $rax == N` false and goes on.",
        f"an exit and a step for each hit, {ROUND_TRIP} four to six times, and gdb's own time",
        _condition_contenders,
    ),
    Measure(
        "gdb-attach",
        "ms",
        "How long gdb takes from pressing enter to its prompt, and to quit.",
        "gdb's own start and end",
        _attach_contenders,
        Goal(QEMU, at_most=1),
    ),
)

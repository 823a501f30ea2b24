"""Real debuggers against real guests: a pyvmm in the background, gdb in batch, gdb by its MI.

    with serving(tmp_path, "loops.bin") as guest:
        text = gdb_batch(guest, "break inner", "continue", "backtrace")

    with serving(tmp_path, "loops.bin") as guest, Gdb() as gdb:
        gdb.connect(guest)
        gdb.execute("break inner")
        assert gdb.resume("-exec-continue")["reason"] == "breakpoint-hit"

MI is the protocol by which editors drive gdb: a command is a line, each answer is a record. Source:
Debugging with GDB, chapter "The GDB/MI Interface", section "GDB/MI Output Syntax".
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest

from tests.conftest import GUESTS, REPOSITORY
from tests.support import PATIENCE

# gdb must neither ask a server in the network for symbols nor read what its user has configured;
# and warnings of the Python in it are not ours.
_NOT_FOR_GDB = ("DEBUGINFOD_URLS", "PYTHONDEVMODE", "PYTHONWARNINGS")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in _NOT_FOR_GDB},
    "PYTHONPATH": str(REPOSITORY),
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
}
# By default it waits two seconds for a reply; a loaded machine can take longer to start a pyvmm.
_SETTINGS = ("set debuginfod enabled off", f"set remotetimeout {PATIENCE:g}")
_GDB = ("gdb", "-nx", "-q", *(word for line in _SETTINGS for word in ("-iex", line)))

needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
needs_lldb = pytest.mark.skipif(shutil.which("lldb") is None, reason="lldb is not installed")


# ---- The guest ----


class Serving:
    """A pyvmm that serves a debugger."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, directory: Path) -> None:
        self.process, self.address, self._directory = process, address, directory

    @property
    def output(self) -> str:
        """What the guest has printed so far."""
        return (self._directory / "stdout").read_text(errors="replace")

    @property
    def messages(self) -> str:
        """What pyvmm itself has printed so far, on stderr."""
        return (self._directory / "stderr").read_text(errors="replace")

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(PATIENCE)

    @property
    def ended(self) -> bool:
        """Whether pyvmm has ended by itself."""
        return self.process.poll() is not None


def pyvmm_command(image: str | Path, *options: object) -> list[str]:
    """The command line; a name without a directory is one of guests/."""
    path = GUESTS / image if isinstance(image, str) else image
    return [sys.executable, "-m", "pyvmm", str(path), *map(str, options)]


@contextlib.contextmanager
def serving(
    directory: Path, image: str | Path, *options: object, at: str = "0"
) -> Iterator[Serving]:
    """A guest that waits for a debugger `at` an address; killed at the end."""
    with (directory / "stdout").open("wb") as out, (directory / "stderr").open("wb") as err:
        process = subprocess.Popen(
            pyvmm_command(image, "--gdb", at, *options),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **ENVIRONMENT},
        )
    try:
        address = _wait_for_address(directory / "stderr", process)
        yield Serving(process, address, directory)
    finally:
        process.kill()
        process.wait(PATIENCE)


def _wait_for_address(stderr: Path, process: subprocess.Popen[bytes]) -> str:
    def look() -> str | None:
        found = re.search(r"gdb: listening on (?:unix:)?(.+)\n", stderr.read_text())
        assert found or process.poll() is None, stderr.read_text()
        return found[1] if found else None

    address = wait_for(look, "pyvmm does not listen")
    assert isinstance(address, str)
    return address


def wait_for(condition: Callable[[], object], what: str) -> object:
    """Wait until `condition()` is true and return it; fail with `what` if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain: {what}"
        time.sleep(0.005)
    return value


# ---- gdb in batch ----


def gdb_batch(guest: Serving | str | None, *commands: str, connect: str = "target remote") -> str:
    """Connect to `guest`, execute commands, and quit; all that gdb printed.

    A command that fails ends neither gdb nor the test.
    """
    if guest is not None:
        address = guest.address if isinstance(guest, Serving) else guest
        commands = (f"{connect} {address}", *commands)
    return run_debugger(*_GDB, "-batch", *(w for command in commands for w in ("-ex", command)))


def run_debugger(*command: str) -> str:
    """Run a debugger that ends by itself; all that it printed."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        timeout=2 * PATIENCE,
    )
    return result.stdout


# ---- gdb by its machine interface ----


class GdbError(Exception):
    """gdb refused a command; the text is what its user reads."""


class Record(NamedTuple):
    """A line of gdb: `kind` is `^` a result, `*` or `=` something happened, `~ @ &` text."""

    kind: str
    name: str  # "done", "stopped", ...; of text: the text
    values: dict[str, Any]
    token: str = ""


class Gdb:
    """A gdb that is driven through its machine interface.  A context manager."""

    def __init__(self, *options: str) -> None:
        # In a session of its own: a ^C for gdb must not reach pytest, nor one of pytest's gdb.
        self.process = subprocess.Popen(
            [*_GDB, "--interpreter=mi3", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        self._unread = b""
        self._commands = 0
        self.text = ""  # all that gdb has printed for its user
        self.log = ""  # its echo of commands, its errors, and what `set debug` asks for
        self._stops: list[dict[str, Any]] = []  # that nobody has waited for yet
        self.events: list[Record] = []  # all others
        for setting in ("confirm off", "width 0", "height 0", "mi-async on"):
            self.command(f"-gdb-set {setting}")

    def __enter__(self) -> Gdb:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End gdb as `kill -9` does."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self._in.close()
        self._out.close()

    def connect(self, guest: Serving, how: str = "remote") -> None:
        """`target remote`, and wait until gdb shows where the guest is."""
        self.command(f"-target-select {how} {guest.address}")
        self.wait_stop()

    def command(self, text: str) -> dict[str, Any]:
        """Execute an MI command; the values of its result.  Raises GdbError."""
        self._commands += 1
        token = str(self._commands)
        self._in.write(f"{token}{text}\n".encode())
        self._in.flush()
        while True:
            record = self._next_record()
            if record.kind == "^" and record.token == token:
                if record.name == "error":
                    raise GdbError(record.values.get("msg", ""))
                return record.values

    def execute(self, text: str) -> str:
        """Execute a command as its user would type it; what gdb prints.  Raises GdbError.

        Not for commands that let the guest run: see resume().
        """
        before = len(self.text)
        self.command(f"-interpreter-exec console {_quote(text)}")
        return self.text[before:]

    def evaluate(self, expression: str) -> str:
        """The value of an expression, as gdb prints it."""
        value = self.command(f"-data-evaluate-expression {_quote(expression)}")["value"]
        assert isinstance(value, str)
        return value

    def number(self, expression: str) -> int:
        """The value of an expression, as an unsigned number; also of registers made of flags."""
        return int(self.execute(f"output/x {expression}"), 16)

    def resume(self, text: str) -> dict[str, Any]:
        """Execute a command that lets the guest run (MI or the user's); how it stopped."""
        if text.startswith("-"):
            self.command(text)
        else:
            self.command(f"-interpreter-exec console {_quote(text)}")
        return self.wait_stop()

    def wait_stop(self) -> dict[str, Any]:
        """The next stop: `reason`, `frame`, `thread-id` ..."""
        while not self._stops:
            self._next_record()
        return self._stops.pop(0)

    def memory(self, address: int, length: int) -> bytes:
        """Guest memory."""
        result = self.command(f"-data-read-memory-bytes {address:#x} {length}")
        return bytes.fromhex("".join(piece["contents"] for piece in result["memory"]))

    def interrupt_by_signal(self) -> None:
        """What ^C in gdb's terminal does."""
        self.process.send_signal(signal.SIGINT)

    def _next_record(self) -> Record:
        record = parse_record(self._next_line())
        if record.kind in "~@&":
            if record.kind == "&":
                self.log += record.name
            else:
                self.text += record.name
        elif (record.kind, record.name) == ("*", "stopped"):
            self._stops.append(record.values)
        elif record.kind in "*=":
            self.events.append(record)
        return record

    def _next_line(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._out], [], [], left)[0]
            assert ready, f"gdb says nothing for {PATIENCE:g} s; it said:\n{self.text}"
            data = os.read(self._out.fileno(), 1 << 16)
            assert data, f"gdb has ended; it said:\n{self.text}"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")


def write(gdb: Gdb, address: int, data: bytes) -> None:
    """Write guest memory."""
    gdb.command(f"-data-write-memory-bytes {address:#x} {data.hex()}")


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# ---- Reading MI ----

_RECORD = re.compile(r"(\d*)([\^*=+])([\w-]+)(?:,(.*))?$")
_NAME = re.compile(r"[\w-]+=")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"(?:\\[0-7]{3})+|\\.")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "e": "\x1b"}


def parse_record(line: str) -> Record:
    """One line.  What is no record (the `(gdb)` prompt, a guest's output) is text of kind `@`."""
    if line[:1] in ("~", "@", "&") and _STRING.fullmatch(line[1:]):
        return Record(line[0], _unescape(line[2:-1]), {})
    found = _RECORD.match(line)
    if not found:
        return Record("@", "" if line.strip() == "(gdb)" else line + "\n", {})
    token, kind, name, rest = found.groups()
    return Record(kind, name, _results(rest or "", 0)[0], token)


def _unescape(text: str) -> str:
    def replace(found: re.Match[str]) -> str:
        if found[0][1] in "01234567" and len(found[0]) > 2:  # UTF-8, each byte in octal
            return bytes(int(n, 8) for n in found[0][1:].split("\\")).decode(errors="replace")
        return _ESCAPES.get(found[0][1], found[0][1])

    return _ESCAPE.sub(replace, text)


def _results(text: str, at: int) -> tuple[dict[str, Any], int]:
    """`name=value,name=value`."""
    results: dict[str, Any] = {}
    while (found := _NAME.match(text, at)) is not None:
        value, at = _value(text, found.end())
        name = found[0][:-1]
        results[name] = value
        if text[at : at + 1] != ",":
            break
        at += 1
    return results, at


def _value(text: str, at: int) -> tuple[Any, int]:
    """A string, `{results}`, or a list `[values]` or `[results]` (whose names say nothing)."""
    if text[at] == '"':
        found = _STRING.match(text, at)
        assert found is not None, f"no end of a string: {text[at:]}"
        return _unescape(found[1]), found.end()
    if text[at] == "{":
        results, at = _results(text, at + 1)
        assert text[at] == "}", text[at:]
        return results, at + 1
    assert text[at] == "[", text[at:]
    values: list[Any] = []
    at += 1
    while text[at] != "]":
        name = _NAME.match(text, at)
        value, at = _value(text, name.end() if name else at)
        values.append(value)
        at += text[at] == ","
    return values, at + 1

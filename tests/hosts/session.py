"""One boot of one host: start the emulator, follow its second serial port, end it.

The protocol on that port is init.sh's: ``@@begin``, the command's output, ``@@status N``, a base64
tar.gz of the files it left in /results, ``@@end``. ``@@error TEXT`` may come before the first.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import pty
import re
import select
import subprocess
import tarfile
import tempfile
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts.machines import MACHINES, Boot
from tests.hosts.packages import HostsError


@dataclass
class Result:
    """What came back from one host; times are in seconds of this machine since the start."""

    host: str
    status: int | None = None  # of the command; None where it did not end
    output: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # of the host's /results
    boot_seconds: float = 0.0
    seconds: float = 0.0
    failure: str = ""  # why the host itself failed; empty where it did not


def run(
    host: str,
    kernel: Path,
    initrd: Path,
    timeout: float,
    stop: threading.Event,
    on_line: Callable[[str], None],
) -> Result:
    """Boot host, let its job run to the end, return what came back.

    timeout is in seconds, of the whole boot. on_line gets each line of the command's output as it
    arrives. When stop is set by another thread, the host is ended as if its time were up.
    """
    result = Result(host)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pyvmm-hosts.") as folder:
        boot = Boot(kernel, initrd, Path(folder))
        with _emulator(MACHINES[host](boot), boot) as process:
            payload = ""
            for line in _lines(boot.wire, process, started + timeout, stop):
                result.seconds = time.monotonic() - started
                if line == "@@begin":
                    result.boot_seconds = result.seconds
                elif line.startswith("@@error "):
                    on_line(line)
                elif line.startswith("@@status "):
                    result.status = int(line.split()[1])
                elif line == "@@end":
                    result.files = _unpack(payload)
                    return result
                elif result.status is not None:
                    payload += line
                else:
                    result.output += line + "\n"
                    on_line(line)
            result.seconds = time.monotonic() - started
            result.failure = _why(process, boot, timeout, stop)
    return result


@contextmanager
def _emulator(command: list[str], boot: Boot) -> Iterator[subprocess.Popen[bytes]]:
    """Run an emulator in a terminal of its own (Bochs draws on one); end it on the way out."""
    master, slave = pty.openpty()
    boot.console.touch()
    boot.wire.touch()
    try:
        process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=boot.folder,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
    finally:
        os.close(slave)
    screen = threading.Thread(target=_drain, args=(master, boot.folder / "screen"), daemon=True)
    screen.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        screen.join()
        os.close(master)


def _drain(master: int, file: Path) -> None:
    """Keep what the emulator prints, so that it never waits for a reader.

    Bochs with its internal debugger draws on another terminal, which it makes itself and names: it
    stops for ever when 20 KB of its drawing have not been read there, after some six minutes.
    """
    printed, drawing = b"", None
    with file.open("wb") as out:
        while True:
            ready, _, _ = select.select([master] if drawing is None else [master, drawing], [], [])
            try:
                if drawing in ready:
                    os.read(drawing, 65536)
                if master not in ready:
                    continue
                data = os.read(master, 65536)
            except OSError:  # EIO: the last process that had a terminal open has ended
                break
            if not data:
                break
            out.write(data)
            out.flush()
            if drawing is None:
                printed += data
                if match := SCREEN_LINE.search(printed):
                    drawing = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
                    tty.setraw(drawing)  # no echo: that would be keys pressed on Bochs's keyboard
    if drawing is not None:
        os.close(drawing)


SCREEN_LINE = re.compile(rb'Bochs connected to screen "(/dev/pts/\d+)"')


def _lines(
    file: Path, process: subprocess.Popen[bytes], deadline: float, stop: threading.Event
) -> Iterator[str]:
    """Yield the lines of a growing file, until the process ends, the deadline passes or stop."""
    rest = b""
    with file.open("rb") as stream:
        while True:
            ended = process.poll() is not None  # asked first, so that what came before is read
            data = stream.read()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.decode("utf-8", "replace").rstrip("\r")
            if ended or time.monotonic() > deadline or stop.is_set():
                return
            if not data:
                stop.wait(0.1)


def _why(
    process: subprocess.Popen[bytes], boot: Boot, timeout: float, stop: threading.Event
) -> str:
    """Say why a host sent no end marker, with the last lines of its console."""
    if stop.is_set():
        return "interrupted"
    if process.poll() is None:
        reason = f"no end within {timeout:.0f} s"
    else:
        reason = f"the emulator ended with status {process.returncode}"
    for name in ("console", "screen", "bochs.log"):
        file = boot.folder / name
        if file.exists() and (text := file.read_text("utf-8", "replace").strip()):
            tail = "\n  ".join(text.splitlines()[-15:])
            reason += f"\n  -- end of {name} --\n  {tail}"
    return reason


def _unpack(payload: str) -> dict[str, bytes]:
    """Return the files in a base64 tar.gz, by name."""
    try:
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(payload)), mode="r:gz") as archive:
            return {
                member.name.removeprefix("./"): stream.read()
                for member in archive
                if (stream := archive.extractfile(member))
            }
    except (binascii.Error, tarfile.TarError, EOFError, OSError) as error:
        raise HostsError(f"the results came out damaged: {error}") from error

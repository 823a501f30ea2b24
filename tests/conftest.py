"""Shared by all tests: what needs /dev/kvm is marked `kvm`, and nothing may be left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GUESTS = REPOSITORY / "guests"


def pytest_configure() -> None:
    """Let signals reach what the tests start, also where a shell runs them in the background."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _not_ignored)


def _not_ignored(number: int, frame: FrameType | None) -> None:
    """For the processes that are started from here, this is no handler: they have the default."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip KVM tests where there is no KVM, and only there."""
    if os.path.exists("/dev/kvm"):
        return
    for item in items:
        if "kvm" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="there is no /dev/kvm on this machine"))


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every KVM test returns the file descriptors and threads that it used."""
    if "kvm" not in request.keywords:
        yield
        return
    fds, threads = open_fds(), set(threading.enumerate())
    yield
    assert not [t for t in threading.enumerate() if t not in threads], "a thread was left behind"
    assert open_fds() == fds, "a file descriptor was left behind"


def open_fds() -> set[str]:
    """What this process has open, without the descriptor that is used to look."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listdir used
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found

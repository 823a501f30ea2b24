"""The command line: ``python3 -m tests.hosts amd intel``."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hosts import gdb, initrd, linux, packages, report, session, xen
from tests.hosts.machines import MACHINES
from tests.hosts.packages import HostsError

# What runs inside without --run. The probe's JSON comes back even where the tests fail.
# Plain assertions: pytest would compile the tests anew, which takes an emulated processor a minute.
TESTS = """\
python3 -m pyvmm --probe --json >$RESULTS/probe.json || echo "@@error the probe failed"
python3 -m pytest -m '{marks}' -v -o timeout=600 --assert=plain \\
    -p no:cacheprovider -p tests.hosts.quirks --junit-xml=$RESULTS/junit.xml {arguments}
"""

# Where Bochs would take hours: to start a Python takes it five seconds.
SLOW_HOSTS = ("intel",)


def main() -> int:
    """Run what the command line says; return the exit status: 0 where every host succeeded."""
    arguments = _arguments()
    if arguments.list_packages:
        print(" ".join(name for host in packages.REQUIRED.values() for name in host))
        return 0
    # A terminated tool must end its emulators as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        results = _run_hosts(arguments)
    except HostsError as error:
        print(f"tests.hosts: {error}", file=sys.stderr)
        return 2
    for result in results:
        unreported = arguments.run or result.failure
        if not unreported and (skips := report.wrong_skips(result)):
            result.failure = "\n  ".join(["skipped what must run here:", *skips])
    if arguments.output:
        report.save(results, arguments.output)
    if not arguments.run:
        print(report.table(results))
    # Last, where whoever has only the end of a log finds it.
    for result in results:
        if result.status and not arguments.run:
            print(f"\n---- {result.host} ----\n{report.complaints(result)}")
        if result.failure:
            print(f"{result.host}: {result.failure}", file=sys.stderr)
    return 0 if all(result.status == 0 and not result.failure for result in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.hosts",
        description="Run the KVM tests, or a command, on emulated KVM hosts.",
        epilog="What follows -- goes to pytest.",
    )
    parser.add_argument("hosts", nargs="*", metavar="HOST", help=" or ".join(sorted(MACHINES)))
    parser.add_argument(
        "--list-packages", action="store_true", help="print the Debian packages that are needed"
    )
    parser.add_argument("--run", metavar="COMMAND", help="run this shell command, not the tests")
    parser.add_argument(
        "--all", action="store_true", help="on a slow host also what is left out there"
    )
    parser.add_argument("--timeout", type=float, default=1500, metavar="SECONDS", help="a host's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="hosts at a time")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="save what came back here")
    own, pytest = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, pytest = own[:split], own[split + 1 :]
    arguments = parser.parse_args(own)
    arguments.pytest = pytest
    arguments.hosts = list(dict.fromkeys(arguments.hosts))
    unknown = [host for host in arguments.hosts if host not in MACHINES]
    if unknown or not (arguments.hosts or arguments.list_packages):
        parser.error(f"name hosts: {' and '.join(sorted(MACHINES))}")
    return arguments


def _job(host: str, arguments: argparse.Namespace) -> str:
    """The shell command that host runs."""
    if arguments.run:
        return str(arguments.run)
    everything = arguments.all or host not in SLOW_HOSTS
    tests = arguments.pytest or _test_files(everything)
    marks = "kvm" if everything else "kvm and not slow"
    return TESTS.format(marks=marks, arguments=shlex.join(tests))


def _test_files(everything: bool) -> list[str]:
    """The files with KVM tests: only to collect all the others takes Bochs minutes.

    Not those that need lldb, which the hosts do not have, and without everything not those that
    start a process in each test.
    """
    left_out = "needs_lldb" if everything else "process"
    found = []
    for path in sorted(Path("tests").glob("test_*.py")):
        text = path.read_text()
        of_all_tests = re.search(rf"^pytestmark = .*({left_out})", text, re.MULTILINE)
        if "pytest.mark.kvm" in text and not of_all_tests:
            found.append(str(path))
    return found


def _run_hosts(arguments: argparse.Namespace) -> list[session.Result]:
    """Build what the hosts need and run them; return their results in the order asked for."""
    packages.check_installed(arguments.hosts)
    jobs = {host: _job(host, arguments) for host in arguments.hosts}
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="pyvmm-hosts.") as folder:
        kernel, archives = _build(jobs, Path(folder), everything=arguments.all)

        def run(host: str) -> session.Result:
            _progress(host, "booting")
            on_line = Progress(host, show=bool(arguments.run))
            result = session.run(host, kernel, archives[host], arguments.timeout, stop, on_line)
            _progress(
                host,
                f"status {result.status}, {result.boot_seconds:.0f} s to boot, "
                f"{result.seconds:.0f} s in all",
            )
            return result

        with ThreadPoolExecutor(max_workers=max(1, arguments.jobs)) as pool:
            try:
                return list(pool.map(run, arguments.hosts))
            except BaseException:
                stop.set()  # so that no emulator outlives this process
                raise


def _build(jobs: dict[str, str], folder: Path, *, everything: bool) -> tuple[Path, dict[str, Path]]:
    """Return the kernel, and for each host the initrd with its job in it, made in folder.

    everything: slow hosts get Linux as a guest, too, but never with the stock kernel.
    """
    wanted = packages.resolve()
    cache = packages.cache_folder() / packages.key(wanted)
    if not (cache / "root").is_dir():
        _progress("build", f"fetching {len(wanted)} Debian packages into {cache}")
    root = packages.fetch(wanted, cache)
    kernel = next((root / "boot").glob("vmlinuz-*"))
    base = cache / initrd.base_name()
    if not base.exists():
        _progress("build", "making the initrd")
        initrd.build_base(root, kernel.name.removeprefix("vmlinuz-"), base)
    initrd.build_checkout(root, folder / "checkout")
    linux.build_archive(root, folder / "linux")
    if any(host not in SLOW_HOSTS for host in jobs):
        stock = linux.fetch_stock(wanted)
        linux.build_archive(root, folder / "stock", stock)
    gdb.build_archive(gdb.fetch(), root, folder / "gdb")
    xen.build_archive(folder / "xen")
    archives = {host: folder / f"initrd-{host}" for host in jobs}
    left_out = ("stock",) if everything else ("linux", "stock")  # of slow hosts
    for host, archive in archives.items():
        initrd.build_job(jobs[host], folder / "job")
        with archive.open("wb") as out:
            parts = ("gdb", "xen", "linux", "stock", "checkout", "job")
            for part in (base, *(folder / name for name in parts)):
                if part.name in left_out and host in SLOW_HOSTS:
                    continue
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out)
    return kernel, archives


class Progress:
    """Takes a host's output line by line: shows it, or counts the tests in it."""

    def __init__(self, host: str, *, show: bool) -> None:
        self._host = host
        self._show = show
        self._counts: dict[str, int] = {}
        self._told = time.monotonic()

    def __call__(self, line: str) -> None:
        """Take one line."""
        if self._show:
            print(f"{self._host}| {line}", flush=True)
            return
        if line.startswith("@@error "):
            _progress(self._host, line.removeprefix("@@error "))
        outcome = report.outcome_of(line)
        if outcome is None:
            return
        self._counts[outcome] = self._counts.get(outcome, 0) + 1
        if outcome in ("FAILED", "ERROR"):
            _progress(self._host, line)
        elif time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            _progress(self._host, report.counted(self._counts))


PROGRESS_SECONDS = 10


def _progress(who: str, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {who}: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""The supported-hosts table of the README, from what the runs brought back.

    python3 -m tests.hosts amd intel --output DIR
    python3 -m tests.hosts.supported DIR            # prints the table
    python3 -m tests.hosts.supported DIR --write    # and puts it into README.md

The columns are the emulated hosts whose results are in DIR, and this machine if it has /dev/kvm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent.parent / "README.md"
BEGIN, END = "<!-- hosts: begin -->", "<!-- hosts: end -->"

HOSTS = {
    "intel": "kvm_intel (on Bochs)",
    "amd": "kvm_amd (on QEMU's software SVM)",
    "here": "kvm_pvm",
}

Findings = dict[str, bool]


def _plain(name: str) -> Callable[[Findings], str]:
    return lambda found: "yes" if found[name] else "no"


# What a user can do, and how it follows from the probe's findings.
ROWS: dict[str, Callable[[Findings], str]] = {
    "64-, 32- and 16-bit guests": lambda f: (
        "yes" if f["long-mode"] and f["protected-mode"] and f["real-mode"] else "no"
    ),
    "the guest's own int3": _plain("own-int3"),
    "`break` at CPL 0": lambda f: "yes" if f["breakpoint"] else "yes (a planted hlt)",
    "`break` at CPL 3": lambda f: "yes" if f["breakpoint-user"] else "yes (a guard on #GP)",
    "`stepi` at CPL 0": _plain("step"),
    "`stepi` at CPL 3": _plain("step-user"),
    "`hbreak` at CPL 0": _plain("hw-breakpoint"),
    "`hbreak` at CPL 3": _plain("hw-breakpoint-user"),
    "`watch`": _plain("watchpoint"),
    "interrupts in 32-bit kernels": _plain("iret32"),
    "page tables in 32-bit kernels": _plain("paging32"),
}


def main() -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.hosts.supported")
    parser.add_argument("folder", type=Path, help="what tests.hosts --output has filled")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    probes = {
        host: json.loads((arguments.folder / host / "probe.json").read_text())
        for host in HOSTS
        if (arguments.folder / host / "probe.json").exists()
    }
    tests = {host: _tests(arguments.folder / host / "junit.xml") for host in probes}
    if os.path.exists("/dev/kvm"):
        command = [sys.executable, "-m", "pyvmm", "--probe", "--json"]
        probes["here"] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    text = table(probes, tests)
    print(text)
    if arguments.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return 0


def table(probes: dict[str, Any], tests: dict[str, str]) -> str:
    """The table in Markdown."""
    lines = [
        "| | " + " | ".join(HOSTS[host] for host in probes) + " |",
        "|---" * (len(probes) + 1) + "|",
        "| Linux | "
        + " | ".join(probe["kernel"].split("-")[0] for probe in probes.values())
        + " |",
    ]
    for title, judge in ROWS.items():
        cells = (judge(probe["findings"]) for probe in probes.values())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    cells = (tests.get(host, "the whole suite") for host in probes)
    lines.append("| tests | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tests(path: Path) -> str:
    """How the tests went: "640 passed, 3 skipped"."""
    if not path.exists():
        return "none"
    suite = next(ElementTree.parse(path).iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return f"{passed} passed, {failed} failed, {count['skipped']} skipped"


if __name__ == "__main__":
    sys.exit(main())

"""The supported-hosts table of the README, from what the runs brought back.

    python3 -m tests.hosts amd intel --all --output DIR
    python3 -m pytest -m kvm --junit-xml=DIR/here/junit.xml
    python3 -m tests.hosts.supported DIR            # prints the table
    python3 -m tests.hosts.supported DIR --write    # and puts it into README.md

The columns are the emulated hosts whose results are in DIR, and this machine if it has /dev/kvm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent.parent / "README.md"
BEGIN, END = "<!-- hosts: begin -->", "<!-- hosts: end -->"

HOSTS = {"intel": "kvm_intel", "amd": "kvm_amd", "here": "kvm_pvm"}

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
    if os.path.exists("/dev/kvm"):
        command = [sys.executable, "-m", "pyvmm", "--probe", "--json"]
        probes["here"] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    text = table(probes, arguments.folder)
    print(text)
    if arguments.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return 0


def table(probes: dict[str, Any], folder: Path) -> str:
    """The table in Markdown."""
    outcomes = {host: _outcomes(folder / host / "junit.xml") for host in probes}
    rows = {
        "": [HOSTS[host] for host in probes],
        "---": ["---"] * len(probes),
        "Linux": [_version(probe["kernel"]) for probe in probes.values()],
        "on": [_read(folder / host / "emulator.txt", "-") for host in probes],
    }
    for title, judge in ROWS.items():
        rows[title] = [judge(probe["findings"]) for probe in probes.values()]
    rows["several processors"] = [_several_processors(found) for found in outcomes.values()]
    rows["KVM tests"] = [_counted(found) for found in outcomes.values()]
    return "\n".join(f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows.items())


def _version(release: str) -> str:
    """A kernel release without the words in it: 6.1.0-56-cloud-amd64 is 6.1.0-56."""
    match = re.match(r"[\d.]+(-\d+)?", release)
    return match[0] if match else release


def _read(path: Path, default: str) -> str:
    return path.read_text().strip() if path.exists() else default


def _outcomes(path: Path) -> list[tuple[str, str]]:
    """Module and outcome of each test in a JUnit XML; nothing where there is none."""
    if not path.exists():
        return []
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in NOT_PASSED), "passed")
        found.append((case.get("classname", ""), outcome))
    return found


NOT_PASSED = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def _several_processors(outcomes: list[tuple[str, str]]) -> str:
    """The probe takes KVM's word for it, so what counts is how the tests went."""
    told = {outcome for module, outcome in outcomes if module == "tests.test_smp"}
    if not told:
        return "not tested"
    return "yes" if told == {"passed"} else "no"


def _counted(outcomes: list[tuple[str, str]]) -> str:
    """How the tests went: "640 passed, 0 failed, 3 skipped"."""
    words = [NOT_PASSED.get(outcome, "passed") for _, outcome in outcomes]
    told = ", ".join(f"{words.count(word)} {word}" for word in ("passed", "failed", "skipped"))
    return told if words else "not run"


if __name__ == "__main__":
    sys.exit(main())

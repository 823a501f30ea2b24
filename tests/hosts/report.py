"""What came back from the hosts, as one table: test by host."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from tests.hosts import machines
from tests.hosts.session import Result

# A line of "pytest -v": "tests/test_x.py::test_name[parameter] PASSED [ 10%]"
OUTCOME_LINE = re.compile(r"(\S+)\.py::(.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
WORDS = {"PASSED": "passed", "SKIPPED": "skipped"}  # failures are to be seen at once

# The reasons for which a test may skip. The emulated kvm_intel has everything that the host probe
# looks for, and nothing else proves the tests of breakpoint exits, re-injection, watchpoints and
# ring 3: that something is missing is no reason there.
NOT_THERE = "no Linux kernel"
MAY_SKIP = {
    "intel": re.compile(rf"host probe: \S+ is there|{NOT_THERE}"),
    "amd": re.compile(f"host probe: |{NOT_THERE}"),
}


def outcome_of(line: str) -> str | None:
    """Return the outcome in a line of pytest's output ("PASSED"), None where it holds none."""
    match = OUTCOME_LINE.match(line)
    return match[3] if match else None


def counted(counts: Mapping[str, int]) -> str:
    """Return counts as words: "12 passed, 1 failed"."""
    return ", ".join(f"{count} {name.lower()}" for name, count in counts.items())


def table(results: Sequence[Result]) -> str:
    """Return the table: a row a test, a column a host, then reasons for all but "passed"."""
    outcomes = {result.host: _outcomes(result) for result in results}
    tests = sorted({test for by_test in outcomes.values() for test in by_test})
    width = max(map(len, ["test", *tests]))
    lines = [f"{'test':{width}}" + "".join(f"  {result.host:8}" for result in results)]
    reasons = []
    for test in tests:
        cells = [outcomes[result.host].get(test, ("-", "")) for result in results]
        lines.append(f"{test:{width}}" + "".join(f"  {outcome:8}" for outcome, _ in cells))
        reasons += [
            f"{result.host}: {test} {outcome}: {reason}"
            for result, (outcome, reason) in zip(results, cells, strict=True)
            if reason
        ]
    lines.append("")
    for result in results:
        counts: dict[str, int] = {}
        for outcome, _ in outcomes[result.host].values():
            counts[outcome] = counts.get(outcome, 0) + 1
        told = counted(counts) or "no test results"
        lines.append(f"{result.host}: {told}; {result.boot_seconds:.0f} s to boot, "
                     f"{result.seconds:.0f} s in all")  # fmt: skip
    return "\n".join(line.rstrip() for line in lines + reasons)


def complaints(result: Result) -> str:
    """Return what pytest said about failures: its output without the list of tests and outcomes."""
    lines = result.output.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"=+ (FAILURES|ERRORS) =+", line):
            return "\n".join(lines[number:])
    return "\n".join(lines[-20:])


def wrong_skips(result: Result) -> list[str]:
    """Return the tests that this host skipped without a reason that it may have."""
    return [
        f"{test}: {reason}"
        for test, (outcome, reason) in _outcomes(result).items()
        if outcome == "skipped" and not MAY_SKIP[result.host].match(reason)
    ]


def save(results: Sequence[Result], folder: Path) -> None:
    """Write each host's output, files and the emulator's name to folder/HOST/."""
    for result in results:
        own = folder / result.host
        own.mkdir(parents=True, exist_ok=True)
        (own / "output.txt").write_text(result.output)
        (own / "emulator.txt").write_text(machines.emulator(result.host))
        for name, content in result.files.items():
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            (own / name).write_bytes(content)


def _outcomes(result: Result) -> dict[str, tuple[str, str]]:
    """Return outcome and reason of each test, from a host's JUnit XML or what it got to print."""
    content = result.files.get("junit.xml")
    if content is None:
        lines = filter(None, map(OUTCOME_LINE.match, result.output.splitlines()))
        return {
            f"{line[1].replace('/', '.')}::{line[2]}": (WORDS.get(line[3], line[3]), "")
            for line in lines
        }
    found = {}
    for case in ElementTree.fromstring(content).iter("testcase"):
        outcome, reason = "passed", ""
        for kind, word in (("failure", "FAILED"), ("error", "ERROR"), ("skipped", "skipped")):
            if (element := case.find(kind)) is not None:
                outcome, reason = word, (element.get("message") or "").split("\n")[0]
        found[f"{case.get('classname')}::{case.get('name')}"] = (outcome, reason)
    return found

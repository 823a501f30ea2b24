"""Results for people, as one table, and for machines, as JSON.  (chart.py draws them.)"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import PYVMM, Measure, Result, Spread

# Between these lines of a document is what `--markdown FILE` has written there.
BEGIN = "<!-- measured: written by python3 -m benchmarks -->"
END = "<!-- end of measured -->"

_KVM_MODULES = ("kvm_intel", "kvm_amd", "kvm_pvm")


def number(value: float) -> str:
    """A figure with three digits that matter: 128,000, 93.1, 0.87."""
    if value >= 1000:
        digits = len(str(int(value)))
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(figures: Spread | None) -> str:
    """Median and, in brackets, lowest and highest; nothing for None."""
    if figures is None:
        return ""
    return f"{number(figures.median)} ({number(figures.low)}-{number(figures.high)})"


def _verdict(result: Result) -> str:
    met = result.goal_met()
    if met is None:
        return "" if result.measure.goal is None else "?"
    return "reached" if met else "MISSED"


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """A line for each measure and peer; what belongs to the measure is only on its first."""
    rows = [["measure", "unit", PYVMM, "peer", "its figure", "ratio", "by CPU time", "goal", ""]]
    for result in results:
        measure = result.measure
        first = [measure.name, measure.unit, spread(result.value(PYVMM))]
        if PYVMM in result.unavailable:
            first[2] = result.unavailable[PYVMM]
        goal = measure.goal
        for peer in result.peers or [""]:
            figure = result.unavailable.get(peer) or spread(result.value(peer))
            ratios = [spread(result.ratio(peer)), spread(result.cpu_ratio(peer))]
            # The goal stands beside the peer that it names, or on the first line if it names none.
            here = goal is not None and (goal.peer == peer or (not goal.peer and bool(first[0])))
            rows.append(
                [
                    *first,
                    peer,
                    figure,
                    *ratios,
                    *([str(goal), _verdict(result)] if here else ["", ""]),
                ]
            )
            first = ["", "", ""]
    return rows


def table(results: Sequence[Result]) -> str:
    """Medians (lowest-highest), aligned in columns."""
    rows = _rows(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def where(host: dict[str, Any]) -> str:
    """When and where it was measured, in a line."""
    parts = [host["date"], f"Linux {host['kernel']}", *host["kvm"], f"{host['cpus']} CPUs"]
    parts += [f"Python {host['python']}", *([f"QEMU {host['qemu']}"] if host["qemu"] else [])]
    return ", ".join([*parts, f"load {host['load']:.1f}"])


def explanation(rounds: int, *, quick: bool) -> str:
    """What the table shows, in a line."""
    figures = f"Median (lowest-highest) of {rounds} rounds; ratio = {PYVMM} / peer, round by round."
    return f"{figures} No figures to quote: --quick." if quick else figures


def markdown(results: Sequence[Result], captions: Sequence[str], chart: str | None = None) -> str:
    """The same table in Markdown, below `captions` and, if given, the picture at `chart`."""
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in _rows(results))
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    picture = [f"![How many times better than its peers {PYVMM} is]({chart})", ""] if chart else []
    paragraphs = [line for caption in captions for line in (caption, "")]
    return "\n".join([*paragraphs, *picture, *lines])


def replace_measured(document: str, text: str) -> str:
    """`document` with `text` between its lines BEGIN and END.  Raises ValueError without those."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"a line {BEGIN!r} and one {END!r} are needed")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def description(measure: Measure) -> str:
    """What a measure is, what it means to the user, and what its floor and its goal are."""
    lines = [f"{measure.name} ({measure.unit}): {measure.meaning}", f"    floor: {measure.floor}"]
    if measure.goal is not None:
        lines.append(f"    goal: {measure.goal}{'' if measure.goal.peer else ' ' + measure.unit}")
    return "\n".join(lines)


def host() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.date.today().isoformat(),
        "kernel": platform.release().partition("-")[0],
        "kvm": [name for name in _KVM_MODULES if Path("/sys/module", name).exists()],
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "qemu": _qemu_version(),
        "load": os.getloadavg()[0],
    }


def _qemu_version() -> str | None:
    """`QEMU emulator version 7.2.22 (Debian ...)`: the number."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        return None
    words = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False
    ).stdout.split()
    return words[3] if len(words) > 3 else "of unknown version"


def as_json(results: Sequence[Result], host: dict[str, Any]) -> dict[str, Any]:
    """Everything: each sample, and the medians and ratios that the table shows."""
    return {"host": host, "measures": [_measure_as_json(result) for result in results]}


def _measure_as_json(result: Result) -> dict[str, Any]:
    measure = result.measure
    contenders: dict[str, Any] = {}
    for name in result.contenders:
        if name in result.unavailable:
            contenders[name] = {"unavailable": result.unavailable[name]}
            continue
        contenders[name] = {
            "samples": [sample._asdict() for sample in result.samples[name]],
            "value": _spread_as_json(result.value(name)),
        }
        if name != PYVMM:
            contenders[name]["ratio"] = _spread_as_json(result.ratio(name))
            contenders[name]["cpu_ratio"] = _spread_as_json(result.cpu_ratio(name))
    return {
        "name": measure.name,
        "unit": measure.unit,
        "meaning": measure.meaning,
        "floor": measure.floor,
        "goal": measure.goal and measure.goal._asdict(),
        "goal_met": result.goal_met(),
        "contenders": contenders,
    }


def _spread_as_json(figures: Spread | None) -> dict[str, float] | None:
    return None if figures is None else figures._asdict()

"""Results for people, as one table, and for machines, as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import PYVMM, Result, Spread


def number(value: float) -> str:
    """A figure with three digits that matter: 128,000, 93.1, 0.87."""
    if value >= 1000:
        digits = len(str(int(value)))
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{number(spread.median)} ({number(spread.low)}-{number(spread.high)})"


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
        first = [measure.name, measure.unit, _spread(result.value(PYVMM))]
        if PYVMM in result.unavailable:
            first[2] = result.unavailable[PYVMM]
        goal = measure.goal
        for peer in result.peers or [""]:
            figure = result.unavailable.get(peer) or _spread(result.value(peer))
            ratios = [_spread(result.ratio(peer)), _spread(result.cpu_ratio(peer))]
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


def legend(results: Sequence[Result]) -> str:
    """What each measure means."""
    return "\n".join(
        f"{r.measure.name}: {r.measure.meaning}\n    floor: {r.measure.floor}" for r in results
    )


def host() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Everything: each sample, and the medians and ratios that the table shows."""
    return {"host": host(), "measures": [_measure_as_json(result) for result in results]}


def _measure_as_json(result: Result) -> dict[str, Any]:
    measure = result.measure
    contenders: dict[str, Any] = {}
    for name in (*result.samples, *result.unavailable):
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


def _spread_as_json(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread._asdict()

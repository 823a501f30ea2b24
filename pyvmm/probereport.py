"""`--probe`: the findings of hostprobe.py as a table for people, or as JSON for machines."""

from __future__ import annotations

import json
import platform
import sys

from pyvmm.hostprobe import FINDINGS, HostProbe, host
from pyvmm.stop import STATUS_FAILED, STATUS_OK, STATUS_USAGE


def main(device: str, required: list[str], *, as_json: bool) -> int:
    """Print all findings, or check those `required`; returns the exit status.

    Raises OSError when there is no KVM to probe.
    """
    unknown = [name for name in required if name not in {finding.name for finding in FINDINGS}]
    if unknown:
        names = ", ".join(finding.name for finding in FINDINGS)
        print(
            f"pyvmm: --require: no finding {', '.join(unknown)}; there are {names}", file=sys.stderr
        )
        return STATUS_USAGE
    probe = host(device)
    results = {finding.name: finding.measure(probe) for finding in FINDINGS}
    print(_json(probe, results) if as_json else table(results))
    missing = [name for name in required if not results[name]]
    if missing:
        print(f"pyvmm: this host lacks {', '.join(missing)}", file=sys.stderr)
        return STATUS_FAILED
    return STATUS_OK


def _json(probe: HostProbe, results: dict[str, bool]) -> str:
    facts = {
        "kernel": platform.release(),
        "findings": results,
        "int3_natively_delivered": probe.own_int3_native,
        "breakpoint_injection": probe.injection.name.lower(),
    }
    return json.dumps(facts, indent=2)


def table(results: dict[str, bool]) -> str:
    """The findings in plain words."""
    name_width = max(len(finding.name) for finding in FINDINGS)
    title_width = max(len(finding.title) for finding in FINDINGS)
    lines = [f"{'NAME':<{name_width}}  {'WHAT':<{title_width}}  {'':<3}  WHAT IT MEANS"]
    for finding in FINDINGS:
        works = results[finding.name]
        lines.append(
            f"{finding.name:<{name_width}}  {finding.title:<{title_width}}  "
            f"{'yes' if works else 'NO':<3}  {finding.good if works else finding.bad}"
        )
    return "\n".join(lines)

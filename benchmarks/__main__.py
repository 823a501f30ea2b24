"""`python3 -m benchmarks`: run the measures and print the table."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.measure import Context, Measure, run
from benchmarks.measures import MEASURES

ROUNDS, QUICK_ROUNDS = 9, 3


def main() -> int:
    """Returns the exit status: 0 also where a goal is missed, for figures depend on the host."""
    arguments = _arguments()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    results = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-benchmarks-") as folder:
        context = Context(Path(folder), arguments.quick)
        for measure in arguments.only:
            print(f"{measure.name} ...", file=sys.stderr, flush=True)
            results.append(run(measure, context, rounds))
    print(f"Median (lowest-highest) of {rounds} rounds; ratio = pyvmm / peer, round by round.\n")
    print(report.table(results))
    print(f"\n{report.legend(results)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(results), indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks",
        description="Measure pyvmm beside its peers, in turns. docs/benchmarks.md explains.",
    )
    parser.add_argument(
        "--only", type=_named, default=MEASURES, metavar="NAME,...",
        help=f"these measures only: {', '.join(m.name for m in MEASURES)}",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a few seconds, not figures to quote"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help=f"samples of each ({ROUNDS})")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything to FILE as well"
    )
    return parser.parse_args()


def _named(text: str) -> tuple[Measure, ...]:
    """The measures of a comma-separated list, in the table's order."""
    names = set(text.split(","))
    unknown = names - {measure.name for measure in MEASURES}
    if unknown:
        raise argparse.ArgumentTypeError(f"no measure {', '.join(sorted(unknown))}")
    return tuple(measure for measure in MEASURES if measure.name in names)


if __name__ == "__main__":
    sys.exit(main())

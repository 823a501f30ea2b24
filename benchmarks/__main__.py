"""`python3 -m benchmarks`: run the measures and print the table."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks import chart, report
from benchmarks.measure import PYVMM, Context, Measure, Result, run
from benchmarks.measures import MEASURES

ROUNDS, QUICK_ROUNDS = 9, 3
_STDOUT = Path("-")


def main() -> int:
    """Returns the exit status: 0 also where a goal is missed, for figures depend on the host.

    1 where a measure could not be made at all.
    """
    arguments = _arguments()
    if arguments.list:
        print("\n".join(map(report.description, arguments.only)))
        return 0
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    host = report.host()  # before: the load is to be that of others
    results, failed = [], False
    with tempfile.TemporaryDirectory(prefix="pyvmm-benchmarks-") as folder:
        context = Context(Path(folder), arguments.quick, arguments.kernel, arguments.initrd)
        for measure in arguments.only:
            print(f"{measure.name} ...", file=sys.stderr, flush=True)
            try:
                results.append(run(measure, context, rounds))
            except Exception as error:  # the others are worth having all the same
                traceback.print_exc()
                results.append(Result(measure, (PYVMM,), unavailable={PYVMM: f"failed: {error}"}))
                failed = True
    captions = [report.where(host), report.explanation(rounds, quick=arguments.quick)]
    if arguments.svg:
        arguments.svg.write_text(chart.svg(results, captions[0]), encoding="utf-8")
    if arguments.json:
        text = json.dumps(report.as_json(results, host), indent=1)
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    if arguments.markdown is not None:
        _write_markdown(arguments.markdown, arguments.svg, results, captions)
    if arguments.markdown != _STDOUT:
        print("\n".join(captions), report.table(results), "", sep="\n\n", end="")
        print("\n".join(map(report.description, arguments.only)))
    return 1 if failed else 0


def _write_markdown(
    file: Path, svg: Path | None, results: list[Result], captions: list[str]
) -> None:
    """Into the document `file`, which refers to the chart; or to stdout."""
    if file == _STDOUT:
        print(report.markdown(results, captions))
        return
    picture = None if svg is None else os.path.relpath(svg, file.parent)
    text = report.markdown(results, captions, picture)
    document = file.read_text(encoding="utf-8")  # again: it may have changed in these minutes
    file.write_text(report.replace_measured(document, text), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks",
        description="Measure pyvmm beside its peers, in turns. docs/benchmarks.md explains.",
    )
    parser.add_argument("--list", action="store_true", help="say what is measured, and measure not")
    parser.add_argument(
        "--only", type=named, default=MEASURES, metavar="NAME,...",
        help=f"these measures only: {', '.join(m.name for m in MEASURES)}",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a minute, not figures to quote"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help=f"samples of each ({ROUNDS})")
    parser.add_argument(
        "--kernel", type=existing_file, metavar="FILE",
        help="the Linux to boot (else the latest in /boot)",
    )  # fmt: skip
    parser.add_argument(
        "--initrd", type=existing_file, metavar="FILE",
        help="its initrd, which is to end at a root's shell",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios into FILE")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", nargs="?", const=_STDOUT,
        help="write the table into FILE, between its lines that say so; without FILE print it",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.markdown not in (None, _STDOUT):
        try:  # now, and not after minutes
            report.replace_measured(arguments.markdown.read_text(encoding="utf-8"), "")
        except (OSError, ValueError) as error:
            parser.error(f"--markdown {arguments.markdown}: {error}")
    if not arguments.list and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        parser.error("/dev/kvm is missing, or may not be used")
    return arguments


def named(text: str) -> tuple[Measure, ...]:
    """The measures of a comma-separated list, in the table's order."""
    names = set(text.split(","))
    unknown = names - {measure.name for measure in MEASURES}
    if unknown:
        raise argparse.ArgumentTypeError(f"no measure {', '.join(sorted(unknown))}")
    return tuple(measure for measure in MEASURES if measure.name in names)


def existing_file(text: str) -> Path:
    """The file, by an absolute path: the processes that are measured are started elsewhere."""
    path = Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no file {text}")
    return path


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())

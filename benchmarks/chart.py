"""Results as a picture: an SVG chart of how much better than each peer pyvmm is, or worse.

The scale is logarithmic, with a line at 1, "as good as the peer"; to the right of it pyvmm is
better.  So where less is better (times, memory) the chart shows 1 / ratio of the table.  A bar is
the median, its whisker the lowest and highest of the rounds, a diamond the goal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from benchmarks.measure import PYVMM, Measure, Result, Spread
from benchmarks.report import spread

_ROW, _TOP, _BOTTOM = 18, 66, 30  # pixels
_LEFT, _PLOT, _RIGHT = 300, 440, 150  # labels, bars, figures
_WIDTH = _LEFT + _PLOT + _RIGHT
_MARGIN = 12

# The colours of the reader's theme, with a background of its own.  Plain rules and no variables,
# which only browsers know; a viewer that does not know @media shows the light ones.
_STYLE = """
text { font: 12px sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: bold; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.paper { fill: #ffffff; }
.better { fill: #1a7f64; }
.worse { fill: #bc4c00; }
.grid { stroke: #d1d9e0; }
.one { stroke: #1f2328; }
.whisker { stroke: #1f2328; }
.goal { fill: #ffffff; stroke: #1f2328; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .paper { fill: #0d1117; }
  .better { fill: #2f9e7a; }
  .worse { fill: #d0722c; }
  .grid { stroke: #3d444d; }
  .one { stroke: #e6edf3; }
  .whisker { stroke: #e6edf3; }
  .goal { fill: #0d1117; stroke: #e6edf3; }
}
"""

_Scale = Callable[[float], float]  # from "times better" to pixels


class Bar(NamedTuple):
    """A row of the chart: how many times better than a peer pyvmm is, and is to be."""

    measure: str  # its name; empty if the row above has it
    peer: str
    times: Spread
    goal: float | None


def bars(results: Sequence[Result]) -> list[Bar]:
    """A row for each ratio there is."""
    rows = []
    for result in results:
        name = result.measure.name
        for peer in result.peers:
            ratio = result.ratio(peer)
            if ratio is not None and ratio.low > 0:
                rows.append(
                    Bar(name, peer, times_better(result.measure, ratio), _goal(result, peer))
                )
                name = ""
    return rows


def times_better(measure: Measure, ratio: Spread) -> Spread:
    """A ratio pyvmm / peer as "so many times better"."""
    if not measure.less_is_better:
        return ratio
    return Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def _goal(result: Result, peer: str) -> float | None:
    goal = result.measure.goal
    if goal is None or goal.peer != peer:
        return None
    # at_most is about what is the less the better.
    return goal.at_least if goal.at_least is not None else goal.at_most and 1 / goal.at_most


def svg(results: Sequence[Result], caption: str) -> str:
    """The chart, as the text of an SVG file."""
    rows = bars(results)
    low, high = _range(rows)
    height = _TOP + _ROW * len(rows) + _BOTTOM

    def x(times: float) -> float:
        share = (math.log10(times) - low) / (high - low)
        return round(_LEFT + _PLOT * min(max(share, 0.0), 1.0), 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">',
        f"<title>How many times better than its peers {PYVMM} is</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        _text(_MARGIN, 22, f"How many times better than its peers {PYVMM} is", "title"),
        _text(_MARGIN, 40, caption),
        *_grid(low, high, x, height),
    ]
    for number, bar in enumerate(rows):
        lines += _bar(bar, x, _TOP + _ROW * number)
    legend = "Right of 1: better than the peer. Bar: median; whisker: all rounds; diamond: goal."
    return "\n".join([*lines, _text(_MARGIN, height - 8, legend), "</svg>", ""])


def _range(rows: Sequence[Bar]) -> tuple[int, int]:
    """The powers of ten between which everything lies."""
    shown = [1.0, *(row.goal for row in rows if row.goal is not None)]
    shown += [end for row in rows for end in (row.times.low, row.times.high)]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    return min(low, -1), max(high, 1)


def _grid(low: int, high: int, x: _Scale, height: int) -> list[str]:
    top, bottom = _TOP - 4, height - _BOTTOM + 4
    lines = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        kind = "one" if power == 0 else "grid"
        lines.append(f'<line class="{kind}" x1="{at}" y1="{top}" x2="{at}" y2="{bottom}"/>')
        lines.append(_text(at, top - 4, f"{10.0**power:g}", "middle"))
    return lines


def _bar(bar: Bar, x: _Scale, top: int) -> list[str]:
    middle, base = top + _ROW / 2, top + _ROW - 5
    one, end = x(1), x(bar.times.median)
    kind = "better" if bar.times.median >= 1 else "worse"
    low, high = x(bar.times.low), x(bar.times.high)
    lines = [
        _text(_MARGIN, base, bar.measure),
        _text(_LEFT - _MARGIN, base, bar.peer, "end"),
        f'<rect class="{kind}" x="{min(one, end)}" y="{top + 3}" '
        f'width="{abs(end - one):.1f}" height="{_ROW - 6}"/>',
        f'<line class="whisker" x1="{low}" y1="{middle}" x2="{high}" y2="{middle}"/>',
        _text(_LEFT + _PLOT + _MARGIN, base, spread(bar.times)),
    ]
    if bar.goal is not None:
        at = x(bar.goal)
        corners = ((at, middle - 5), (at + 5, middle), (at, middle + 5), (at - 5, middle))
        points = " ".join(f"{a:g},{b:g}" for a, b in corners)
        lines.append(f'<polygon class="goal" points="{points}"/>')
    return lines


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(text)}</text>'

"""What a measure is, and how it is run: in turns, so that a noisy host is noisy to all alike.

A measure has *contenders*: pyvmm, and the peers that it is compared with.  A round takes one sample
of each; the ratio of pyvmm to a peer is formed for each round, and the median of the ratios is what
counts.  Where CPU time can be told, the ratio is formed of that too: it hardly sees other load.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PYVMM = "pyvmm"  # the contender that the others are peers of


class Unavailable(Exception):
    """A contender cannot run on this host; the message says why, for its column of the table."""


class Sample(NamedTuple):
    """One figure, in the measure's unit; `cpu` is the same by CPU time, None where meaningless."""

    value: float
    cpu: float | None = None


class Context(NamedTuple):
    """What a measure's contenders are given: a scratch folder, and whether to be quick.

    And the user's own Linux, where one is named.
    """

    folder: Path
    quick: bool
    kernel: Path | None = None
    initrd: Path | None = None

    def scaled(self, count: int) -> int:
        """How many repetitions to make where a full run makes `count`."""
        return max(1, count // 10) if self.quick else count


Sampler = Callable[[], Sample]
Contenders = dict[str, Sampler]


def unavailable(reason: str) -> Sampler:
    """The sampler of a contender that is known not to run here."""

    def sampler() -> Sample:
        raise Unavailable(reason)

    return sampler


class Goal(NamedTuple):
    """What pyvmm is to reach: a ratio to `peer`, or with no peer a value in the measure's unit.

    `at_least` or `at_most` is given, not both.
    """

    peer: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Whether `value` reaches the goal."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is None or value <= self.at_most

    def __str__(self) -> str:
        sign, number = (">=", self.at_least) if self.at_most is None else ("<=", self.at_most)
        return f"{sign} {number:g}" + (f" x {self.peer}" if self.peer else "")


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    `meaning` tells the user in one sentence what the figure is to them, `floor` what the kernel
    alone costs there.  `contenders` is a context manager: it prepares what all rounds need, yields
    a sampler for each contender, and tidies up.  One that cannot run here raises Unavailable from
    its sampler.
    """

    name: str
    unit: str
    meaning: str
    floor: str
    contenders: Callable[[Context], contextlib.AbstractContextManager[Contenders]]
    goal: Goal | None = None

    @property
    def less_is_better(self) -> bool:
        """Whether it measures time or memory.  All else is so many of something a second."""
        return not self.unit.endswith("/s")


class Spread(NamedTuple):
    """Median, lowest and highest of several figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Raises statistics.StatisticsError for an empty list."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Result:
    """What was measured: for each contender a sample a round, or why it has none."""

    measure: Measure
    contenders: tuple[str, ...] = ()  # in the order in which they are shown
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def value(self, contender: str) -> Spread | None:
        """A contender's figure over the rounds; None where it could not run."""
        samples = self.samples.get(contender)
        return Spread.of([sample.value for sample in samples]) if samples else None

    def ratio(self, peer: str) -> Spread | None:
        """pyvmm to `peer`, formed for each round."""
        return self._ratio(peer, lambda sample: sample.value)

    def cpu_ratio(self, peer: str) -> Spread | None:
        """The same by CPU time; None where that cannot be told."""
        return self._ratio(peer, lambda sample: sample.cpu)

    def _ratio(self, peer: str, figure: Callable[[Sample], float | None]) -> Spread | None:
        ours = map(figure, self.samples.get(PYVMM, []))
        theirs = map(figure, self.samples.get(peer, []))
        pairs = zip(ours, theirs)  # noqa: B905  # strict= would fail for a peer that dropped out
        ratios = [mine / its for mine, its in pairs if mine is not None and its]
        return Spread.of(ratios) if ratios else None

    @property
    def peers(self) -> list[str]:
        """The contenders other than pyvmm, those that could not run as well."""
        return [name for name in self.contenders if name != PYVMM]

    def goal_met(self) -> bool | None:
        """Whether the goal is reached; None where there is none, or nothing to tell it by."""
        goal = self.measure.goal
        if goal is None:
            return None
        spread = self.ratio(goal.peer) if goal.peer else self.value(PYVMM)
        return None if spread is None else goal.met(spread.median)


def run(measure: Measure, context: Context, rounds: int) -> Result:
    """Take `rounds` samples of each contender, in turns, after one of each that does not count."""
    with measure.contenders(context) as contenders:
        result = Result(measure, tuple(contenders))
        waiting = dict(contenders)
        for number in range(rounds + 1):
            for name, sampler in list(waiting.items()):
                try:
                    sample = sampler()
                except Unavailable as reason:
                    result.unavailable[name] = str(reason)
                    del waiting[name]
                    continue
                if number > 0:  # the first warms caches up, and writes Python's bytecode
                    result.samples.setdefault(name, []).append(sample)
    return result

"""Metrics with their intervals, as files and tables have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.task import TaskResult

# Split name -> its predictions and what the tasks said of them.
Results = Mapping[str, tuple[Predictions, TaskResult]]


@dataclass(frozen=True)
class Score:
    """One metric of one split."""

    split: str
    metric: str
    value: float
    lo: float | None  # ends of the interval; None without one
    hi: float | None
    n: int  # specimens that it rests on

    @property
    def name(self) -> str:
        """`<split>/<task>/<metric>`."""
        return f"{self.split}/{self.metric}"


def scores(results: Results, bootstrap: Bootstrap) -> list[Score]:
    """Every metric of every split, in order."""
    return [
        Score(split, name, value, *interval(result, name, bootstrap),
              result.numbers.get(name, len(predictions)))
        for split, (predictions, result) in results.items()
        for name, value in result.metrics.items()
    ]  # fmt: skip


def interval(
    result: TaskResult, name: str, bootstrap: Bootstrap
) -> tuple[float | None, float | None]:
    """The ends of a metric's interval; None where it has none."""
    if name in result.intervals:
        lo, hi = result.intervals[name]
    elif name in result.resampled:
        lo, hi = bootstrap.interval(result.resampled[name])
    else:
        return None, None
    return (None, None) if math.isnan(lo) else (lo, hi)

"""What a task is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from slidevlm.batch import Predictions


@dataclass
class TaskResult:
    """Numbers by flat name (`image_to_text/R@10`), and details that JSON can hold.

    `resampled` has, for a metric that was bootstrapped, its R values on the resamples
    ([R] float64, NaN where it is not defined), from which intervals and paired tests are made.
    `intervals` has those that come from elsewhere, such as the spread over episodes; `numbers`
    how many specimens a metric rests on, where that is not the whole split. `columns` say
    something of each of the N specimens, "" where there is nothing to say.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    resampled: dict[str, np.ndarray] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)


Task = Callable[[Predictions], TaskResult]


def merge(results: Sequence[TaskResult]) -> TaskResult:
    """What several tasks say as one; two that say the same are a bug."""
    merged = TaskResult()
    for result in results:
        twice = merged.metrics.keys() & result.metrics.keys()
        assert not twice, f"two tasks report {sorted(twice)}"
        for part in fields(TaskResult):
            getattr(merged, part.name).update(getattr(result, part.name))
    return merged

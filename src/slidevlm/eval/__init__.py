"""Evaluation: one pass gives Predictions, tasks turn them into numbers.

A task is a function `Predictions -> TaskResult`. Adding one touches one file in `tasks/`.
"""

from __future__ import annotations

from collections.abc import Sequence

from slidevlm.batch import Predictions
from slidevlm.eval.task import Task, TaskResult

__all__ = ["Task", "TaskResult", "evaluate"]


def evaluate(predictions: Predictions, tasks: Sequence[Task]) -> TaskResult:
    """Run every task and merge what they say; two tasks with one name are a bug."""
    merged = TaskResult({f"loss/{name}": value for name, value in predictions.losses.items()}, {})
    for task in tasks:
        result = task(predictions)
        twice = merged.metrics.keys() & result.metrics.keys()
        assert not twice, f"two tasks report {sorted(twice)}"
        merged.metrics.update(result.metrics)
        merged.details.update(result.details)
        merged.resampled.update(result.resampled)
        merged.intervals.update(result.intervals)
        merged.numbers.update(result.numbers)
        merged.columns.update(result.columns)
    return merged

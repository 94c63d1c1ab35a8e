"""Evaluation: one pass gives Predictions, tasks turn them into numbers.

A task is a function `Predictions -> TaskResult`. Adding one: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from slidevlm.batch import Predictions
from slidevlm.eval.task import Task, TaskResult, merge

__all__ = ["Task", "TaskResult", "evaluate"]


def evaluate(predictions: Predictions, tasks: Sequence[Task]) -> TaskResult:
    """Run every task and merge what they say; two tasks with one name are a bug."""
    losses = TaskResult({f"loss/{name}": value for name, value in predictions.losses.items()})
    return merge([losses, *(task(predictions) for task in tasks)])

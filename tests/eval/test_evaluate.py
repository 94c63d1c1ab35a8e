"""What several tasks say is one result."""

from __future__ import annotations

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.eval import TaskResult, evaluate

SHOWN = Predictions(
    ("s0",), ("p0",), ("r",), np.zeros(1, np.int64), None, None, losses={"caption": 1.5}
)


def task(name: str):
    def run(predictions: Predictions) -> TaskResult:
        return TaskResult({f"{name}/n": float(len(predictions))}, {name: [1]})

    return run


def test_losses_and_every_task_are_merged() -> None:
    result = evaluate(SHOWN, [task("a"), task("b")])
    assert result.metrics == {"loss/caption": 1.5, "a/n": 1.0, "b/n": 1.0}
    assert result.details == {"a": [1], "b": [1]}
    assert evaluate(SHOWN, []) == TaskResult({"loss/caption": 1.5}, {})


def test_tasks_with_one_name_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match=r"two tasks report \['a/n'\]"):
        evaluate(SHOWN, [task("a"), task("a")])


def test_what_a_task_returns_is_not_changed() -> None:
    kept = TaskResult({"a/n": 1.0}, {})
    evaluate(SHOWN, [lambda _: kept, task("b")])
    assert kept == TaskResult({"a/n": 1.0}, {}) and SHOWN.losses == {"caption": 1.5}

"""Paired comparison: what is no difference is none, what is one is found, Holm's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.compare import Difference, compare, with_holm
from slidevlm.eval.task import TaskResult

BOOTSTRAP = Bootstrap(999, seed=1)


def result(values: np.ndarray) -> TaskResult:
    """The mean of per-specimen values."""
    units = [str(i) for i in range(len(values))]
    found = BOOTSTRAP.values(units, lambda counts: {"m": values @ counts / counts.sum(0)})
    return TaskResult({"m": float(values.mean())}, resampled=found.values)


def test_a_run_beside_itself() -> None:
    one = result(np.random.default_rng(0).random(50))
    (found,) = compare("test", one, one, BOOTSTRAP)
    assert (found.difference, found.lo, found.hi, found.p) == (0, 0, 0, 1)


def test_pairing_sees_what_two_intervals_do_not() -> None:
    random = np.random.default_rng(0)
    base = random.random(60)
    better = base + 0.03 + 0.01 * random.random(60)
    one, two = result(better), result(base)
    assert BOOTSTRAP.interval(one.resampled["m"])[0] < two.metrics["m"], "intervals overlap"
    (found,) = compare("test", one, two, BOOTSTRAP)
    assert found.p == pytest.approx(2 / 1000) and 0 < found.lo < found.difference < found.hi
    (turned,) = compare("test", two, one, BOOTSTRAP)
    assert turned.p == found.p and turned.lo == pytest.approx(-found.hi)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    random = np.random.default_rng(3)
    values = []
    for _ in range(200):
        base = random.random(40)
        one, two = (result(base + random.normal(0, 0.1, 40)) for _ in range(2))
        values.append(compare("test", one, two, BOOTSTRAP)[0].p)
    for level in (0.1, 0.3, 0.6):
        assert abs(np.mean(np.array(values) <= level) - level) < 0.1


def test_only_what_both_have_and_is_defined() -> None:
    nan = np.full(999, np.nan)
    one = TaskResult({"a": 1.0, "b": 2.0, "c": 3.0}, resampled={"a": nan, "b": nan + 1})
    two = TaskResult({"a": 1.0, "c": 3.0}, resampled={"a": np.ones(999), "c": nan})
    (found,) = compare("test", one, two, BOOTSTRAP)
    assert found.metric == "a" and math.isnan(found.p) and math.isnan(found.lo)


def test_holm() -> None:
    """The example of the definition: 0.01, 0.04, 0.03, 0.005 of four."""
    p = [0.01, 0.04, math.nan, 0.03, 0.005]
    found = with_holm([Difference("t", str(i), 0, 0, 0, 0, v) for i, v in enumerate(p)])
    expected = [0.03, 0.06, math.nan, 0.06, 0.02]
    assert [d.p_holm for d in found] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert with_holm([]) == []

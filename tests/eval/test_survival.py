"""Survival: the concordance index pair by pair, and the Cox model against one that has a signal."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval import survival as module
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.survival import SurvivalTable, concordance, fit_cox, read_survival
from slidevlm.eval.tasks.survival import fit_survival

NEEDS_EXTRA = pytest.mark.skipif(
    importlib.util.find_spec("sksurv") is None, reason="needs the extra survival"
)


def slow(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    right = pairs = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                right += 1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0
    return right / pairs if pairs else math.nan


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("elements", [1, 30, 10**7])
def test_concordance_of_resamples_with_ties(n: int, elements: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    random = np.random.default_rng(n)
    time, risk = random.integers(1, 6, n).astype(float), random.integers(0, 4, n).astype(float)
    event = random.random(n) < 0.6
    counts = np.stack([np.bincount(random.integers(n, size=n), minlength=n) for _ in range(20)], 1)
    found = concordance(time, event, risk, counts)
    for r in range(20):
        drawn = np.repeat(np.arange(n), counts[:, r])
        expected = slow(time[drawn], event[drawn], risk[drawn])
        assert found[r] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@NEEDS_EXTRA
def test_concordance_is_that_of_scikit_survival() -> None:
    from sksurv.metrics import concordance_index_censored

    random = np.random.default_rng(0)
    time, risk = random.integers(1, 30, 80).astype(float), np.round(random.random(80), 1)
    event = random.random(80) < 0.5
    expected = concordance_index_censored(event, time, risk)[0]
    found = concordance(time, event, risk, np.ones((80, 1)))[0]
    assert found == pytest.approx(expected, abs=1e-12)


def cohort(n: int, seed: int) -> tuple[Predictions, dict[str, tuple[float, bool]]]:
    """The first direction of an embedding makes the hazard."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 5))
    time = random.exponential(np.exp(-1.5 * x[:, 0]))
    event = random.random(n) < 0.7
    names = tuple(f"s{seed}_{i}" for i in range(n))
    rows = {s: (float(t), bool(e)) for s, t, e in zip(names, time, event, strict=True)}
    return Predictions(names, names, names, np.arange(n), x.astype(np.float32), None), rows


@NEEDS_EXTRA
def test_a_signal_is_found_and_noise_is_not() -> None:
    (train, a), (test, b) = cohort(150, 0), cohort(100, 1)
    task = fit_survival(train, SurvivalTable("death", a | b), Bootstrap(40))
    result = task(test)
    (name,) = result.metrics
    assert name == "survival/death/concordance" and result.metrics[name] > 0.7
    lo, hi = Bootstrap(40).interval(result.resampled[name])
    assert 0.6 < lo < result.metrics[name] < hi
    assert task(train).metrics == {}, "what taught the model is not judged"
    random = np.random.default_rng(5)
    train.image_embedding = random.normal(size=(150, 5)).astype(np.float32)
    noise = fit_survival(train, SurvivalTable("death", a | b), Bootstrap())
    assert abs(noise(test).metrics[name] - 0.5) < 0.2


@NEEDS_EXTRA
def test_any_seed_of_the_arguments_makes_folds() -> None:
    random = np.random.default_rng(0)
    names = np.array([f"p{i}" for i in range(30)])
    x, time = random.normal(size=(30, 3)), random.integers(1, 30, 30).astype(float)
    assert fit_cox(x, time, random.random(30) < 0.7, names, seed=10**18).penalty > 0


@NEEDS_EXTRA
def test_too_few_events() -> None:
    n = np.array([str(i) for i in range(6)])
    event = np.array([True, *[False] * 5])
    with pytest.raises(DataError, match="fewer than 2 patients"):
        fit_cox(np.eye(6), np.arange(6.0), event, n, seed=0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("installed")
def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "death.csv"
    path.write_text("patient,time,event\np1,12.5,1\np2,3,FALSE\np1,12.5,1.0\n")
    table = read_survival(path)
    assert table == SurvivalTable("death", {"p1": (12.5, True), "p2": (3.0, False)})
    assert table.of("s", "p1") == (12.5, True) and table.of("p2", "x") == (3.0, False)
    assert table.of("s", "x") is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,days,event\np,1,1\n", "needs the columns time, event"),
        ("patient,time,event\np,-1,1\n", "has time '-1' and event '1'"),
        ("patient,time,event\np,nan,1\n", "has time 'nan'"),
        ("patient,time,event\np,1,dead\n", "event 'dead'"),
        ("patient,time,event\np,1,1\np,2,1\n", "two rows that differ"),
        ("patient,time,event\n", "no rows"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_survival(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"slidevlm\[survival\]"):
        read_survival(tmp_path / "t.csv")

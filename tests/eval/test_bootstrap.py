from __future__ import annotations

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.errors import ConfigError
from slidevlm.eval import bootstrap as module
from slidevlm.eval.bootstrap import Bootstrap


def _all(bootstrap: Bootstrap, units: list[str]) -> np.ndarray:
    return np.concatenate(list(bootstrap.blocks(units)))


def test_a_resample_draws_as_many_units_as_there_are() -> None:
    counts = _all(Bootstrap(50, seed=3), list("abcdefg"))
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert len(np.unique(counts, axis=0)) > 40


def test_specimens_of_a_patient_are_drawn_together() -> None:
    units = ["p", "q", "p", "r", "q", "p"]
    counts = _all(Bootstrap(200), units)
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, 0] == counts[:, 5]).all()
    assert (counts[:, 1] == counts[:, 4]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()


def test_counts_are_those_of_a_multinomial() -> None:
    counts = _all(Bootstrap(20_000, seed=1), list("abcd"))
    assert np.abs(counts.mean(0) - 1).max() < 0.03
    assert np.abs(counts.var(0) - 0.75).max() < 0.03  # n p (1 - p)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [str(i) for i in range(11)]
    whole = _all(Bootstrap(30, seed=5), units)
    monkeypatch.setattr(module, "_COUNTS", 40)
    parts = list(Bootstrap(30, seed=5).blocks(units))
    assert len(parts) == 10
    assert (np.concatenate(parts) == whole).all()


def test_the_seed_alone_decides() -> None:
    units = list("abcdefgh")
    assert (_all(Bootstrap(9, seed=1), units) == _all(Bootstrap(9, seed=1), units)).all()
    assert (_all(Bootstrap(9, seed=1), units) != _all(Bootstrap(9, seed=2), units)).any()


def test_interval_is_that_of_the_percentiles() -> None:
    values = np.arange(101.0)
    assert Bootstrap(101, 0.9).interval(values) == pytest.approx((5.0, 95.0))
    with_gaps = np.concatenate([values, [np.nan] * 7])
    assert Bootstrap(108, 0.9).interval(with_gaps) == pytest.approx((5.0, 95.0))
    assert np.isnan(Bootstrap(2).interval(np.array([np.nan, np.nan]))).all()


def test_the_unit_says_what_is_drawn() -> None:
    none = np.zeros((2, 1), np.float32)
    split = Predictions(("s", "t"), ("p", "p"), ("", ""), np.arange(2), none, none)
    assert Bootstrap(2).units(split) == ("p", "p")
    assert Bootstrap(2, unit="specimen").units(split) == ("s", "t")
    with pytest.raises(ConfigError, match="a patient or a specimen, not 'slide'"):
        Bootstrap(2, unit="slide")


def test_one_resample_is_none() -> None:
    assert not Bootstrap(1) and not Bootstrap(0) and Bootstrap(2)
    assert not Bootstrap(1).values(("a", "b"), lambda counts: {"sum": counts.sum(0)}).values
    assert list(Bootstrap(5).blocks([])) == []


@pytest.mark.parametrize("bad", [{"resamples": -1}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Bootstrap(**bad)  # type: ignore[arg-type]

"""--save-best: names, directions, what counts as better."""

from __future__ import annotations

import math

import pytest

from slidevlm.errors import ConfigError
from slidevlm.train.best import Best

KNOWN = ["val/loss/caption", "val/image_to_text/R@10", "val/image_to_text/median_rank", "val/odd"]


@pytest.mark.parametrize(
    ("wanted", "values", "expected"),
    [
        ("val/image_to_text/R@10", [0.1, 0.3, 0.2, 0.3], [True, True, False, False]),
        ("val/loss/caption", [3.0, 2.0, 2.5, math.nan, 1.0], [True, True, False, False, True]),
        ("val/image_to_text/median_rank", [3.0, 4.0], [True, False]),
        ("val/odd:min", [3.0, 4.0, 2.0], [True, False, True]),
        ("val/odd:max", [3.0, 4.0, 2.0], [True, True, False]),
        ("val/loss/caption:max", [3.0, 4.0], [True, True]),
    ],
)
def test_better(wanted: str, values: list[float], expected: list[bool]) -> None:
    best = Best(wanted, KNOWN)
    assert [best.improves({best.name: value}) for value in values] == expected


def test_a_metric_that_an_evaluation_lacks_changes_nothing() -> None:
    best = Best("val/odd:max", KNOWN)
    assert not best.improves({}) and best.state() == {}


def test_it_goes_on_from_a_checkpoint_and_can_be_undone() -> None:
    best = Best("val/odd:max", KNOWN, {"val/odd": 2.0})
    assert not best.improves({"val/odd": 1.0}) and best.improves({"val/odd": 3.0})
    assert best.state() == {"val/odd": 3.0}
    best.undo()
    assert best.state() == {"val/odd": 2.0}
    assert Best("val/odd:max", KNOWN, {"val/other": 9.0}).improves({"val/odd": 1.0})


def test_unknown_names_and_directions() -> None:
    with pytest.raises(ConfigError, match="(?s)did you mean val/image_to_text/R@10.*val/odd"):
        Best("val/image_to_text/R@1", KNOWN)
    with pytest.raises(ConfigError, match=r"has that metric\. It has:\n  val/"):
        Best("bleu", KNOWN)
    with pytest.raises(ConfigError, match="write val/odd:max or val/odd:min"):
        Best("val/odd", KNOWN)

"""The task that scores generated reports: what it hands to the scores, and its own two numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.eval.tasks.captions import captions
from slidevlm.eval.text_metrics import bleu, cider, rouge

NAMES = {
    *(f"captions/{n}" for n in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")),
    "captions/length_ratio",
    "captions/most_frequent_share",
}


def predictions(generated: tuple[str, ...] | None, reports: tuple[str, ...]) -> Predictions:
    names = tuple(f"s{i}" for i in range(len(reports)))
    return Predictions(
        names, names, reports, np.arange(len(reports)), None, None, generated=generated
    )


def test_scores_are_those_of_the_tokens() -> None:
    generated = ("Breast, biopsy; carcinoma grade II.", "Normal colon.", "normal COLON")
    reports = ("Breast biopsy: carcinoma, grade I", "Normal colon!", "Polyp of the colon")
    metrics = captions(predictions(generated, reports)).metrics
    assert set(metrics) == NAMES
    ours = [
        ["breast", "biopsy", "carcinoma", "grade", "ii"],
        ["normal", "colon"],
        ["normal", "colon"],
    ]
    theirs = [
        ["breast", "biopsy", "carcinoma", "grade", "i"],
        ["normal", "colon"],
        ["polyp", "of", "the", "colon"],
    ]
    for module in (bleu, rouge, cider):
        for name, value in module.score(module.statistics(ours, theirs)).items():
            assert metrics[f"captions/{name}"] == value
    assert metrics["captions/bleu_1"] == pytest.approx(math.exp(1 - 11 / 9) * 7 / 9, abs=1e-8)
    assert metrics["captions/length_ratio"] == 9 / 11
    # As written: texts that differ in any letter are two.
    assert metrics["captions/most_frequent_share"] == 1 / 3


def test_generated_and_true_are_not_exchanged() -> None:
    few, many = ("a",), ("a b c d",)
    assert captions(predictions(few, many)).metrics["captions/length_ratio"] == 0.25
    assert captions(predictions(many, few)).metrics["captions/length_ratio"] == 4
    assert captions(predictions(many, few)).metrics["captions/bleu_1"] == pytest.approx(0.25)


def test_one_report_for_every_slide_is_seen() -> None:
    reports = tuple(f"report {i}" for i in range(4))
    metrics = captions(predictions(("x", "x", "y", "x"), reports)).metrics
    assert metrics["captions/most_frequent_share"] == 0.75


def test_perfect_reports() -> None:
    reports = ("tumour of the left lung", "normal tissue of the colon")
    metrics = captions(predictions(reports, reports)).metrics
    for name in ("bleu_1", "bleu_4", "rouge_l", "length_ratio"):
        assert metrics[f"captions/{name}"] == pytest.approx(1.0, abs=1e-8)
    assert metrics["captions/cider"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("generated", "reports"),
    [(("", ""), ("a report", "another")), (("text", "."), ("...", "!")), (("",), (".",))],
)
def test_empty_texts_give_numbers(generated: tuple[str, ...], reports: tuple[str, ...]) -> None:
    metrics = captions(predictions(generated, reports)).metrics
    assert set(metrics) == NAMES
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["captions/rouge_l"] == metrics["captions/cider"] == 0.0


def test_without_generated_reports_it_is_a_mistake_to_ask() -> None:
    with pytest.raises(AssertionError, match="generated reports"):
        captions(predictions(None, ("a",)))

"""The task that scores generated reports: what it hands to the scores, and its own two numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.tasks.captions import Captions
from slidevlm.eval.text_metrics import bleu, cider, rouge

NAMES = {
    f"captions/{name}"
    for name in (
        *(f"bleu_{n}" for n in (1, 2, 3, 4)),
        *("rouge_l", "cider", "cider_plain", "meteor_exact_stem", "keyword_jaccard"),
        *("exact_match", "same_tokens", "repetition_4", "distinct_1", "distinct_2"),
        *("length_ratio", "most_frequent_share"),
        *(
            f"clinical/{field}/{score}"
            for field in ("site", "procedure", "type", "grade", "stage", "margin", "lymph_nodes")
            for score in ("precision", "recall", "f1")
        ),
    )
}


def predictions(generated: tuple[str, ...] | None, reports: tuple[str, ...]) -> Predictions:
    names = tuple(f"s{i}" for i in range(len(reports)))
    return Predictions(
        names, names, reports, np.arange(len(reports)), None, None, generated=generated
    )


def test_scores_are_those_of_the_tokens() -> None:
    generated = ("Breast, biopsy; carcinoma grade II.", "Normal colon.", "normal COLON")
    reports = ("Breast biopsy: carcinoma, grade I", "Normal colon!", "Polyp of the colon")
    metrics = Captions()(predictions(generated, reports)).metrics
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
    expected = {
        **bleu.finish(bleu.statistics(ours, theirs).sum(0)),
        "rouge_l": rouge.statistics(ours, theirs).mean(),
        "cider": cider.statistics(ours, theirs)[:, 0].mean(),
    }
    for name, value in expected.items():
        assert metrics[f"captions/{name}"] == pytest.approx(float(value), abs=1e-12)
    assert metrics["captions/bleu_1"] == pytest.approx(math.exp(1 - 11 / 9) * 7 / 9, abs=1e-8)
    assert metrics["captions/length_ratio"] == 9 / 11
    # As written: texts that differ in any letter are two.
    assert metrics["captions/most_frequent_share"] == 1 / 3


def test_generated_and_true_are_not_exchanged() -> None:
    few, many = ("a",), ("a b c d",)
    assert Captions()(predictions(few, many)).metrics["captions/length_ratio"] == 0.25
    assert Captions()(predictions(many, few)).metrics["captions/length_ratio"] == 4
    assert Captions()(predictions(many, few)).metrics["captions/bleu_1"] == pytest.approx(0.25)


def test_one_report_for_every_slide_is_seen() -> None:
    reports = tuple(f"report {i}" for i in range(4))
    metrics = Captions()(predictions(("x", "x", "y", "x"), reports)).metrics
    assert metrics["captions/most_frequent_share"] == 0.75


def test_perfect_reports() -> None:
    reports = ("tumour of the left lung", "normal tissue of the colon")
    metrics = Captions()(predictions(reports, reports)).metrics
    for name in ("bleu_1", "bleu_4", "rouge_l", "length_ratio"):
        assert metrics[f"captions/{name}"] == pytest.approx(1.0, abs=1e-8)
    assert metrics["captions/cider"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("generated", "reports"),
    [(("", ""), ("a report", "another")), (("text", "."), ("...", "!")), (("",), (".",))],
)
def test_empty_texts_give_numbers(generated: tuple[str, ...], reports: tuple[str, ...]) -> None:
    metrics = Captions()(predictions(generated, reports)).metrics
    assert set(metrics) == NAMES
    undefined = {name for name, value in metrics.items() if not math.isfinite(value)}
    assert undefined <= {n for n in NAMES if "/clinical/" in n or "/distinct_" in n}
    assert metrics["captions/rouge_l"] == metrics["captions/cider"] == 0.0


def test_without_generated_reports_it_is_a_mistake_to_ask() -> None:
    with pytest.raises(AssertionError, match="generated reports"):
        Captions()(predictions(None, ("a",)))


def test_intervals_of_every_score_by_patient() -> None:
    reports = tuple(f"lung, biopsy; adenoma, grade {i % 3 + 1}" for i in range(12))
    generated = (*reports[1:], "colon")
    result = Captions(Bootstrap(50))(predictions(generated, reports))
    assert result.metrics.keys() == NAMES
    whole = {"distinct_1", "distinct_2", "most_frequent_share"}  # have no interval
    assert result.resampled.keys() == NAMES - {f"captions/{name}" for name in whole}
    low, high = Bootstrap(50).interval(result.resampled["captions/rouge_l"])
    assert low < result.metrics["captions/rouge_l"] < high
    assert len(result.columns["captions/rouge_l"]) == 12
    mean = sum(result.columns["captions/rouge_l"]) / 12
    assert result.metrics["captions/rouge_l"] == pytest.approx(mean)
    again = Captions(Bootstrap(50))(predictions(generated, reports))
    for name, values in result.resampled.items():
        assert np.array_equal(values, again.resampled[name], equal_nan=True)

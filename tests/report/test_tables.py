"""Tables of scores in every form."""

from __future__ import annotations

import math

import pytest

from slidevlm.eval.compare import Difference
from slidevlm.eval.scores import Score
from slidevlm.report.tables import difference_table, score_table

LONG = "zero_shot/a_label_file_with_a_very_long_name/single_prompt/balanced_accuracy"
SCORES = [
    Score("test", "image_to_text/R@10", 0.5, 0.412, 0.588, 191),
    Score("test", "image_to_text/mean_rank", 123.4, 99.5, 150.2, 191),
    Score("test", LONG, math.nan, None, None, 191),
]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_table_fits_the_terminal(width: int) -> None:
    lines = score_table(SCORES, "table", width).splitlines()
    needed = 16 + 5 + 14 + 3 + 6  # the other columns, and as little of the names as is shown
    assert max(map(len, lines)) <= max(width, needed)
    assert lines[0].split() == ["metric", "value", "interval", "n"]
    assert lines[2] == "test: image_to_text" and lines[3].split()[0] == "R@10"
    assert "0.412 to 0.588" in lines[3] and lines[4].split()[:2] == ["mean_rank", "123"]
    assert len(lines) == 7 and lines[6].split()[-2:] == ["-", "191"]
    assert ("balanced_accuracy" in lines[6]) == (width >= 60)
    assert (lines[5] == "test: " + LONG.rpartition("/")[0]) == (width >= 80)


def test_a_task_is_named_again_for_another_split() -> None:
    two = [Score(s, "loss/caption", 1.5, None, None, 7) for s in ("val", "test")]
    lines = score_table(two, "table").splitlines()
    assert lines[0].split() == ["metric", "value", "n"], "no interval, no column"
    assert [x for x in lines if "loss" in x] == ["val: loss", "test: loss"]


def test_a_task_is_named_once_though_another_lies_between() -> None:
    names = ("captions/bleu_1", "captions/clinical/site/f1", "captions/distinct_1")
    found = score_table([Score("val", n, 0.5, None, None, 7) for n in names], "table")
    assert [line.split()[0] for line in found.splitlines()[2:]] == [
        *("val:", "bleu_1", "distinct_1", "val:", "f1")
    ]


def test_markdown() -> None:
    lines = score_table([Score("a|b", "m", 0.25, 0.2, 0.3, 9)], "markdown").splitlines()
    assert lines == [
        "| split | metric | value | interval | n |",
        "| --- | --- | --- | --- | --- |",
        "| a\\|b | m | 0.250 | 0.200 to 0.300 | 9 |",
    ]


def test_latex() -> None:
    lines = score_table(SCORES, "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{llrrr}" and lines[-1] == r"\end{tabular}"
    assert lines[4] == r"test & image\_to\_text/R@10 & 0.500 & 0.412 to 0.588 & 191 \\"
    odd = score_table([Score(r"a&b\~", "50%", 1, None, None, 1)], "latex")
    assert r"a\&b\textbackslash{}\textasciitilde{} & 50\%" in odd


def test_differences() -> None:
    found = [Difference("test", "image_to_text/MRR", 0.5, 0.25, 0.1, 0.4, 0.002, 0.01)]
    lines = difference_table(found, "table").splitlines()
    assert lines[2] == "test: image_to_text"
    values = "MRR 0.500 0.250 0.250 0.100 to 0.400 0.002 0.010"
    assert lines[3].split() == values.split()

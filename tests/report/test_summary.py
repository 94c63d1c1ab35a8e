"""The results page, read by a Markdown parser as a reader's would."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from slidevlm.batch import Predictions
from slidevlm.data.reports import normalise
from slidevlm.eval.task import TaskResult
from slidevlm.report.summary import summary

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NASTY = [
    "<script>alert(1)</script>",
    "a <b>bold</b> &lt;claim&gt; &copy;",
    "*emphasis* **strong** _under_ __lines__ ~~gone~~",
    "`code` ``more`` ```",
    "![image](http://x.y/z.png) [link](javascript:alert(1)) [ref][1]",
    "<http://auto.link> <me@x.org>",
    "line\n# heading\n\n> quote\n\n- item\n\n1. one\n\n    code\n\n***\n===\n---",
    "line\r# heading\r\r> quote\r\n\r\n+ item\x0b\x0c\x85\u2028# more",
    "| a | b |\n|---|---|\n| c | d |",
    "ends with a backslash \\",
    "\\*already escaped\\* \\",
    "<!-- comment",
    "]]> <![CDATA[ <?php",
    "# | > & < ~ ! [ ] ( ) { } $x^2$",
]


def predictions(
    reports: list[str], generated: list[str] | None = None, names: list[str] | None = None
) -> Predictions:
    ids = tuple(names or (f"s{i}" for i in range(len(reports))))
    written = None if generated is None else tuple(generated)
    return Predictions(ids, ids, tuple(reports), np.arange(len(ids)), None, None, generated=written)


def page(result: TaskResult, shown: Predictions | None = None, split: str = "test") -> str:
    return summary("coca_tiny", {split: (shown or predictions(["a", "b"]), result)})


def inline(text: str) -> list[list[Token]]:
    """The contents of every paragraph, heading, item and cell."""
    return [token.children or [] for token in PARSER.parse(text) if token.type == "inline"]


def read(children: list[Token]) -> str:
    return "".join(child.content for child in children)


def items(text: str) -> list[str]:
    """The list items, which must be nothing but text."""
    tokens = PARSER.parse(text)
    found = []
    for before, token in itertools.pairwise(tokens):
        if token.type == "inline" and before.type == "paragraph_open" and before.hidden:
            assert {child.type for child in token.children} <= {"text"}, token.content
            found.append(read(token.children))
    return found


def table(text: str, number: int) -> list[list[str]]:
    tokens = PARSER.parse(text)
    start = [i for i, token in enumerate(tokens) if token.type == "table_open"][number]
    rows: list[list[str]] = []
    for token in itertools.takewhile(lambda token: token.type != "table_close", tokens[start:]):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(read(token.children or []))
    return rows


def shape(text: str) -> list[str]:
    """What the page is made of, whatever the texts in it say."""
    return [token.type for token in PARSER.parse(text)]


@pytest.mark.parametrize("text", NASTY)
def test_nothing_in_a_report_acts(text: str) -> None:
    content = page(TaskResult(), predictions([text, "b"], ["a", text]))
    assert items(content) == [
        "generated: a",
        f"true: {normalise(text)}",
        f"generated: {normalise(text)}",
        "true: b",
    ]
    assert shape(content) == shape(page(TaskResult(), predictions(["a", "b"], ["a", "b"])))
    assert not re.search(r"(?<!\\)<", content), "no tag can begin, whatever reads the page"


@settings(max_examples=200, deadline=None)
@given(st.text("\\`*__[]()<>&#!|~$:/.@-+=1aab \n\r\t", max_size=30))
def test_no_mixture_acts(text: str) -> None:
    content = page(TaskResult(), predictions(["b"], [text]))
    assert items(content) == [f"generated: {normalise(text)}".strip(), "true: b"]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("see https://x.org/a", r"see https\://x.org/a"),
        ("see WWW.x.org", r"see WWW\.x.org"),
        ("mailto:a", r"mailto\:a"),
        ("ask @someone", r"ask \@someone"),
        ("~gone~ $x$", r"\~gone\~ \$x\$"),
    ],
)
def test_what_only_github_acts_upon(text: str, written: str) -> None:
    assert f"- generated: {written}\n" in page(TaskResult(), predictions(["b"], [text]))


def test_plain_reports_are_left_as_they_are() -> None:
    text = "Breast, core-needle biopsy; grade II (Tubule formation: 3, Nuclear: 2): 1.5 cm, 2/12."
    assert f"- true: {text}\n" in page(TaskResult(), predictions([text], ["x"]))


@pytest.mark.parametrize("name", ["a|b", "<i>x</i>", "*a*", "_a_", "`a`", "a_b", "ER+ (>1%)"])
def test_names_of_classes_specimens_and_splits_are_data_too(name: str) -> None:
    details = {name: {"classes": [name, "other"], "confusion_matrix": [[1, 2], [3, 4]]}}
    result = TaskResult({f"zero_shot/{name}/accuracy": 0.5}, details)
    content = page(result, predictions(["r"], ["g"], [name]), split=name)
    assert table(content, 0)[1] == [f"zero_shot/{name}/accuracy", "0.500"]
    assert table(content, 1) == [["", name, "other"], [name, "1", "2"], ["other", "3", "4"]]
    texts = [read(children) for children in inline(content)]
    assert f"{name}: 1 specimens" in texts
    assert f"{name}: true class (row), predicted class (column)" in texts
    assert texts.count(name) == 3  # above the reports, and of the table's row and column
    kinds = {child.type for children in inline(content) for child in children}
    assert kinds <= {"text", "strong_open", "strong_close"}


def test_metrics_and_what_is_not_defined() -> None:
    metrics = {
        "image_to_text/R@10": 0.45,
        "mean_rank": 123.4,
        "small": 99.9949,
        "zero": 0.0,
        "kappa": -0.1234,
        "auroc": math.nan,
        "loss": math.inf,
    }
    content = page(TaskResult(metrics))
    assert table(content, 0) == [
        ["metric", "value"],
        ["image_to_text/R@10", "0.450"],
        ["mean_rank", "123"],
        ["small", "99.995"],
        ["zero", "0.000"],
        ["kappa", "-0.123"],
        ["auroc", "not defined"],
        ["loss", "inf"],
    ]
    assert "| image_to_text/R@10 | 0.450 |" in content, "readable as it stands too"


def test_the_confusion_matrix_has_true_classes_in_rows() -> None:
    details = {
        "zero_shot/organ": {"classes": ["A", "B"], "confusion_matrix": [[5, 1], [0, 7]]},
        "other": {"specimens": 3},
    }
    content = page(TaskResult({}, details))
    assert "### zero_shot/organ: true class (row), predicted class (column)" in content
    assert table(content, 1) == [["", "A", "B"], ["A", "5", "1"], ["B", "0", "7"]]
    assert "other" not in content


def test_every_split_under_the_name_of_the_model() -> None:
    one, two = predictions(["a"]), predictions(["a", "b", "c"])
    content = summary(
        "coca_stage_1",
        {"val": (one, TaskResult({"x": 1.0})), "test": (two, TaskResult({"x": 2.0}))},
    )
    assert content.startswith("# Results of coca_stage_1\n")
    assert content.index("## val: 1 specimens") < content.index("## test: 3 specimens")
    assert [table(content, i)[1] for i in (0, 1)] == [["x", "1.000"], ["x", "2.000"]]
    assert content.endswith("\n") and not content.endswith("\n\n\n")
    assert "Generated reports" not in content, "none were generated"


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 4]),
        (9, [0, 1, 3, 5, 7]),
        (100, [0, 20, 40, 60, 80]),
    ],
)
def test_five_reports_from_all_over_the_split(n: int, shown: list[int]) -> None:
    reports = [f"true{i}" for i in range(n)]
    content = page(TaskResult(), predictions(reports, [f"written{i}" for i in range(n)]))
    expected = [text for i in shown for text in (f"generated: written{i}", f"true: true{i}")]
    assert items(content) == expected
    assert re.findall(r"^\*\*s(\d+)\*\*$", content, re.MULTILINE) == [str(i) for i in shown]

"""What is found in reports, written as pathologists write; the YAML of users; the three scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidevlm.errors import ConfigError
from slidevlm.eval.text_metrics import clinical
from slidevlm.eval.text_metrics.clinical import Extractor, read_extractor


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return read_extractor()


FOUND = [
    (
        "Breast, left, core needle biopsy: Invasive carcinoma of no special type, grade II",
        {"site": {"breast"}, "procedure": {"biopsy"}, "type": {"invasive ductal carcinoma"},
         "grade": {"grade 2"}},
    ),
    (
        "Prostate, radical prostatectomy: acinar adenocarcinoma, Gleason score 3+4=7, pT2cN0Mx. "
        "Surgical margins are free of tumor.",
        {"site": {"prostate"}, "procedure": {"prostatectomy"},
         "type": {"acinar adenocarcinoma", "adenocarcinoma"}, "grade": {"gleason 7"},
         "stage": {"T2c", "N0", "Mx"}, "margin": {"negative"}},
    ),
    (
        "Lung, right upper lobe, lobectomy: squamous cell carcinoma, moderately differentiated. "
        "Three of the lymph nodes: metastatic carcinoma in 3/12 lymph nodes.",
        {"site": {"lung"}, "procedure": {"lobectomy"},
         "type": {"squamous cell carcinoma", "metastatic"}, "grade": {"grade 2"},
         "lymph nodes": {"positive", "positive 3/12"}},
    ),
    (
        "Colon, biopsy: no evidence of malignancy. Chronic colitis.",
        {"site": {"colon"}, "procedure": {"biopsy"}, "type": {"no malignancy", "inflammation"}},
    ),
    ("Negative for adenocarcinoma.", {"type": set()}),
    ("No metastatic carcinoma in 5 lymph nodes.", {"lymph nodes": {"negative"}, "type": set()}),
    ("No evidence of metastatic disease in ten lymph nodes.",
     {"lymph nodes": {"negative"}, "type": set()}),
    ("Lymph nodes: a focus of metastatic carcinoma in one node.",
     {"lymph nodes": {"positive"}, "type": {"metastatic"}}),
    ("No tumor at inked resection margin.", {"procedure": {"resection"}, "margin": {"negative"}}),
    ("Carcinoma is not present at the margin.", {"margin": {"negative"}}),
    ("Vascular invasion not identified Surgical margins: free. Tumor is at the deep margin.",
     {"margin": {"negative", "positive"}}),
    ("ypT2 ypN1 ypM0", {"stage": {"T2", "N1", "M0"}}),
    ("pT2aN1bM0; TxNxMx; pTisN0", {"stage": {"T2a", "N1b", "M0", "Tx", "Nx", "Mx", "Tis", "N0"}}),
    ("2.5 cm x 3 cm x 1 cm 0 mm, less than 1 mm, an 0.8 cm focus", {"stage": set()}),
    ("Kidney: CLEAR CELL carcinoma, Grade: III, stage III.",
     {"site": {"kidney"}, "type": {"clear cell carcinoma"}, "grade": {"grade 3"},
      "stage": {"stage 3"}}),
    ("", {}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "found"), FOUND)
def test_what_is_found(extractor: Extractor, text: str, found: dict[str, set[str]]) -> None:
    values = extractor(text)
    assert set(values) == {
        "site", "procedure", "type", "grade", "stage", "margin", "lymph nodes"
    }  # fmt: skip
    assert {k: set(v) for k, v in values.items() if v or k in found} == found


def test_line_breaks_do_not_matter(extractor: Extractor) -> None:
    assert extractor("no evidence\nof   malignancy")["type"] == {"no malignancy"}


MINE = """
negation: '\\bno\\s*$'
fields:
  colour:
    negated: skip
    values: {red: '\\bred\\b', 'shade {1}': '\\bshade (i+|\\d)'}
  step:
    roman: true
    values: {'{1}': 'step (i+|\\d)'}
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    extractor = read_extractor(path)
    assert extractor("Red, shade II; step II") == {"colour": {"red", "shade ii"}, "step": {"2"}}
    assert extractor("no red; step 3") == {"colour": frozenset(), "step": {"3"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a mapping"),
        ("fields: {}", "needs fields"),
        ("fields: {a: {values: {x: '('}}}", "a: x: .* is not a regular expression"),
        ("fields: {a: {values: {x: 3}}}", "is not an expression"),
        ("fields: {a: {}}", "needs values"),
        ("fields: {a: {values: {x: y}, colour: 1}}", "does not know colour"),
        ("fields: {a: {values: {x: y}, roman: 1}}", "roman is true or false"),
        ("fields: {a: {values: {x: y}, negated: no}}", "negated is skip or count"),
        (
            "fields: {a: {values: {'x {2}': '(y)'}}}",
            r"a: x \{2\}: \{2\} stands for a group .* has 1",
        ),
        ("fields: {a: {values: {'x {0}': '(y)'}}}", "stands for a group"),
        ("fields: [", "is not plain YAML"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_extractor(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_extractor(tmp_path / "nowhere.yaml")


def test_precision_recall_and_f1_count_values_of_all_reports() -> None:
    ours = [{"a": frozenset("xy")}, {"a": frozenset("x")}, {"a": frozenset()}]
    theirs = [{"a": frozenset("x")}, {"a": frozenset("yz")}, {"a": frozenset()}]
    rows = clinical.statistics(ours, theirs, ["a"])
    assert rows[:, 0].tolist() == [[1, 2, 1], [0, 1, 2], [0, 0, 0]]
    found = clinical.finish(rows.sum(0), ["a"])
    assert found["clinical/a/precision"] == pytest.approx(1 / 3)
    assert found["clinical/a/recall"] == pytest.approx(1 / 3)
    assert found["clinical/a/f1"] == pytest.approx(2 / 6)
    nothing = clinical.finish(np.zeros((1, 3)), ["lymph nodes"])
    assert np.isnan(nothing["clinical/lymph_nodes/f1"])

"""Tokens of reports against those that Stanford's PTBTokenizer gives through pycocoevalcap."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.eval.text_metrics.ptb import tokenize

# As recorded from pycocoevalcap 1.2 (CoreNLP 3.4.1), tokens joined by spaces.
RECORDED = {
    "": "",
    " \n\t ": "",
    "Breast, core-needle biopsy;": "breast core-needle biopsy",
    "sono-guided core biopsy; 1. Carcinoma of no special type, grade II (Nuclear grade: 3)":
        "sono-guided core biopsy 1 carcinoma of no special type grade ii -lrb- nuclear grade 3 "
        "-rrb-",
    "A. INVASIVE PROSTATIC ADENOCARCINOMA, GLEASON SCORE 3 + 4 - 7. B. ":
        "a. invasive prostatic adenocarcinoma gleason score 3 + 4 7 b.",
    "3+4=7": "3 +4 = 7",
    "0.5 cm, 3/12 nodes.": "0.5 cm 3/12 nodes",
    "0.2-0.3 cm": "0.2-0 .3 cm",
    "3. B. The specimen is": "3 b the specimen is",
    "per Dr. Smith's note, cannot assess": "per dr. smith 's note can not assess",
    "NO. 1 labelled, none; No. Date": "no. 1 labelled none no date",
    "submitted. Al. Frozen section": "submitted al. frozen section",
    "LESION I. RT. UPPER LOBE 1.": "lesion i. rt. upper lobe 1",
    "Surgical margins., free": "surgical margins. free",
    "don't, won't, can't; patient's 12 o'clock": "do n't wo n't ca n't patient 's 12 o'clock",
    "\u201cquoted\u201d \"x\" \u2018y\u2019 \u2013 \u2014 -- --- ... ..": "quoted x y",
    "HER2/neu HER-2/neu ER+/PR- T1-T2": "her2/neu her-2 / neu er + / pr t1-t2",
    "H&E 50% <5 >=10 5\u03bcm 1\u00bd": "h&e 50 % < 5 > = 10 5\u03bcm 1 1/2",
    "cm.macroscopic C.Received": "cm.macroscopic c.received",
    "** *bold* #1 #positive": "** * bold * # 1 #positive",
    "seen in'total, represen'tative": "seen i n'total represe n'tative",
    "present IN OM$ of the sun@ary @iscrer": "present in om$ of the sun@ary @iscrer",
    "[see] {x}": "-lsb- see -rsb- -lcb- x -rcb-",
}  # fmt: skip


@pytest.mark.parametrize("text", list(RECORDED))
def test_recorded_tokens(text: str) -> None:
    assert " ".join(tokenize(text)) == RECORDED[text]


def original(texts: list[str]) -> list[list[str]]:
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    found = module.PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in enumerate(texts)})
    return [found[i][0].split() for i in range(len(texts))]


def test_recorded_tokens_are_those_of_the_original() -> None:
    texts = [text for text in RECORDED if text.strip()]
    assert [" ".join(t) for t in original(texts)] == [RECORDED[text] for text in texts]


def test_reports_of_a_challenge_equal_the_original(shared: Path) -> None:
    path = shared / "oracles/captions/reg2025_pairs.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = list({text for row in csv.reader(file) for text in row if text.strip()})
    assert len(texts) > 300
    assert [tokenize(text) for text in texts] == original(texts)


def test_scanned_reports_equal_the_original_but_for_few(shared: Path) -> None:
    """Text with the errors of character recognition, in which anything stands beside anything."""
    import h5py

    texts = []
    with h5py.File(shared / "data/tcga/tcga.h5") as file:
        for path in file["case-index/case_paths"].asstr()[()]:
            texts += [file[f"{path}/{name}"].asstr()[()] for name in ("report", "diagnosis")]
    texts = list(dict.fromkeys(texts))
    theirs = original(texts)
    same = sum(tokenize(a) == b for a, b in zip(texts, theirs, strict=True))
    assert same >= 0.97 * len(texts)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_gives_tokens_without_spaces(text: str) -> None:
    tokens = tokenize(text)
    assert all(token and not any(c.isspace() for c in token) for token in tokens)
    assert all(token == token.lower() for token in tokens)
    assert tokenize(f"  {text}\n") == tokens

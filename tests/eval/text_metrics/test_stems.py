"""Porter2 stems: the algorithm's published examples, and a library where it is installed."""

from __future__ import annotations

import pytest

from slidevlm.eval.text_metrics.stems import stem

# From the examples of snowballstem.org and of Porter's description.
STEMS = {
    "consign": "consign", "consigned": "consign", "consigning": "consign", "consist": "consist",
    "consistency": "consist", "consolation": "consol", "consolations": "consol",
    "conspicuous": "conspicu", "conspired": "conspir", "knack": "knack", "knackeries": "knackeri",
    "kneeling": "kneel", "knightly": "knight", "knives": "knive", "knots": "knot",
    "caresses": "caress", "ties": "tie", "cries": "cri", "gas": "gas", "gaps": "gap",
    "agreed": "agre", "hopping": "hop", "hoping": "hope", "falling": "fall", "luxuriated": "luxuri",
    "by": "by", "say": "say", "cry": "cri", "generously": "generous", "communism": "communism",
    "skies": "sky", "dying": "die", "news": "news", "exceed": "exceed", "relational": "relat",
    "nodes": "node", "invasive": "invas", "invasion": "invas", "metastases": "metastas",
    "metastatic": "metastat", "differentiation": "differenti", "differentiated": "differenti",
    "adenocarcinomas": "adenocarcinoma", "tumor's": "tumor", "y": "y", "is": "is", "": "",
}  # fmt: skip


@pytest.mark.parametrize("word", list(STEMS))
def test_stems(word: str) -> None:
    assert stem(word) == STEMS[word]


def test_library() -> None:
    """METEOR has the first form of the algorithm; later ones know a few more exceptions."""
    snowball = pytest.importorskip("snowballstemmer").stemmer("english")
    words = [w + s for w in STEMS if len(w) > 3 for s in ("", "s", "ed", "ing", "ly", "ness", "al")]
    different = [w for w in words if stem(w) != snowball.stemWord(w)]
    assert len(different) <= len(words) // 50, different

"""All scores at once: what each is, and resamples of arrays against texts counted again."""

from __future__ import annotations

import numpy as np
import pytest

from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.text_metrics import bleu, cider, meteor, rouge
from slidevlm.eval.text_metrics.ptb import tokenize
from slidevlm.eval.text_metrics.scoring import Scoring

ORGANS = ("lung", "breast", "colon", "kidney")
TYPES = ("adenocarcinoma", "papillary carcinoma", "no evidence of malignancy", "adenoma")


# Scores of the whole of the reports, which have no resamples.
DIVERSITY = {"most_frequent_share", "distinct_1", "distinct_2"}


def corpus(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    draw = np.random.default_rng(seed)

    def report() -> str:
        organ, kind = draw.choice(ORGANS), draw.choice(TYPES)
        return f"{organ}, biopsy; {kind}, grade {draw.integers(1, 4)}. seen by dr. a."

    return [report() for _ in range(n)], [report() for _ in range(n)]


def test_scores_are_those_of_the_parts() -> None:
    generated, references = corpus(30)
    found = Scoring().count(generated, references).scores()
    ours, theirs = ([tokenize(t) for t in texts] for texts in (generated, references))
    expected = {
        **bleu.finish(bleu.statistics(ours, theirs).sum(0)),
        "rouge_l": rouge.statistics(ours, theirs).mean(),
        "cider": cider.statistics(ours, theirs)[:, 0].mean(),
        "cider_plain": cider.statistics(ours, theirs)[:, 1].mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-12)
    sums = meteor.statistics(ours, theirs).sum(0)
    assert found["meteor_exact_stem"] == pytest.approx(float(meteor.finish(sums)))
    assert found["length_ratio"] == sum(map(len, ours)) / sum(map(len, theirs))
    same = np.mean([a == b for a, b in zip(generated, references, strict=True)])
    assert found["exact_match"] == pytest.approx(same)
    most = max(generated.count(t) for t in generated)
    assert found["most_frequent_share"] == pytest.approx(most / 30)
    for n in (1, 2):
        grams = [tuple(t[i : i + n]) for t in ours for i in range(len(t) - n + 1)]
        assert found[f"distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams))


def test_by_hand() -> None:
    generated = ["a b c d a b c d", "lung: adenoma", "x"]
    references = ["a b c d", "Lung - adenoma", "lung"]
    found = Scoring().count(generated, references).scores()
    assert found["repetition_4"] == pytest.approx((1 / 5 + 0 + 0) / 3)
    assert found["exact_match"] == 0 and found["same_tokens"] == pytest.approx(1 / 3)
    assert found["keyword_jaccard"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["clinical/site/precision"] == 1 and found["clinical/site/recall"] == 1 / 2
    assert found["most_frequent_share"] == pytest.approx(1 / 3)
    assert found["distinct_1"] == pytest.approx(7 / 11)
    assert "reg2025" not in found, "there is no embedder"


@pytest.mark.parametrize("seed", [0, 1])
def test_resamples_equal_texts_counted_again(seed: int) -> None:
    generated, references = corpus(25, seed)
    patients = [f"p{i // 2}" for i in range(25)]
    counted = Scoring().count(generated, references)
    bootstrap = Bootstrap(20, seed=seed)
    drawn = bootstrap.values(patients, counted.values).values
    ours, theirs = ([tokenize(t) for t in texts] for texts in (generated, references))
    known = cider.statistics(ours, theirs)  # rarity is that in all references
    assert drawn.keys() == counted.scores().keys() - DIVERSITY
    for r, counts in enumerate(np.concatenate(list(bootstrap.blocks(patients)))):
        rows = np.repeat(np.arange(25), counts)
        again = Scoring().count([generated[i] for i in rows], [references[i] for i in rows])
        for name, value in again.scores().items():
            if name in DIVERSITY:
                continue
            expected = value
            if name.startswith("cider"):
                expected = known[rows, int(name == "cider_plain")].mean()
            assert drawn[name][r] == pytest.approx(expected, abs=1e-9, nan_ok=True), name


def test_resamples_look_less_diverse_than_what_they_are_of() -> None:
    """Why diversity has no interval: the value is not among those of the resamples."""
    generated = [f"report {i} of case{i}" for i in range(60)]
    value = Scoring().count(generated, generated).scores()
    drawn = []
    for counts in np.concatenate(list(Bootstrap(50).blocks([str(i) for i in range(60)]))):
        texts = [generated[i] for i in np.repeat(np.arange(60), counts)]
        drawn.append(Scoring().count(texts, texts).scores())
    assert max(d["distinct_1"] for d in drawn) < value["distinct_1"]
    assert min(d["most_frequent_share"] for d in drawn) > value["most_frequent_share"]


def test_reg2025_is_the_weighted_sum_of_its_parts() -> None:
    generated, references = corpus(12)

    def embed(texts):
        return np.array([[len(t), t.count("a"), t.count("e")] for t in texts], dtype=float)

    scoring = Scoring(embed=embed, entities=lambda text: frozenset(tokenize(text)[:2]))
    found = scoring.count(generated, references).scores()
    total = 0.0
    for a, b in zip(generated, references, strict=True):
        one = Scoring().count([a], [b]).scores()
        names = set(tokenize(a)[:2]), set(tokenize(b)[:2])
        key = len(names[0] & names[1]) / len(names[0] | names[1])
        x, y = embed([a])[0], embed([b])[0]
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        total += 0.15 * (one["rouge_l"] + one["bleu_4"]) + 0.4 * key + 0.3 * cosine
    assert found["reg2025"] == pytest.approx(total / 12, abs=1e-9)
    perfect = scoring.count(references, references).scores()
    assert perfect["reg2025"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [("", ""), ("", "lung"), ("lung", ""), ("...", "!")])
def test_empty_texts_give_numbers(a: str, b: str) -> None:
    found = Scoring().count([a], [b]).scores()
    undefined = {name for name, value in found.items() if np.isnan(value)}
    assert undefined <= {n for n in found if n.startswith(("clinical/", "distinct_"))}

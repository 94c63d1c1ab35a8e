"""Zero-shot classification against scikit-learn on probabilities written out one by one."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
import sklearn.metrics as sk

from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import log_odds
from slidevlm.eval.prompts import Labels, Prompts
from slidevlm.eval.tasks.zero_shot import ClassTexts, ZeroShot, centres, embed_prompts

CLASSES = ("A", "B", "C", "D")
FOR_ALL = {
    "accuracy",
    "balanced_accuracy",
    "f1_macro",
    "f1_weighted",
    "auroc_ovr",
    "auroc_ovo",
    "cohen_kappa",
}
FOR_TWO = {"precision", "recall", "specificity", "average_precision"}


def labels_of(name: str, classes: dict[str, str]) -> Labels:
    return Labels(name, {specimen: (c,) for specimen, c in classes.items()})


def zero_shot(
    embeddings: np.ndarray,
    classes: Sequence[str],
    labels: Labels,
    bootstrap: Bootstrap = Bootstrap(),  # noqa: B008 (frozen)
) -> ZeroShot:
    """The task with one prompt a class."""
    return ZeroShot(
        ClassTexts(tuple(classes), tuple(e[None] for e in embeddings)), labels, bootstrap
    )


def unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def predictions(image: np.ndarray, scale: float = 5.0) -> Predictions:
    names = tuple(f"s{i}" for i in range(len(image)))
    patients = tuple(f"p{i}" for i in range(len(image)))
    return Predictions(names, patients, names, np.arange(len(image)), image, None, scale)


def labels_for(classes: Sequence[str], n: int, seed: int = 0) -> Labels:
    drawn = np.random.default_rng(seed).integers(0, len(classes), n)
    return labels_of("task", {f"s{i}": classes[c] for i, c in enumerate(drawn)})


def probabilities(image: np.ndarray, embeddings: np.ndarray, scale: float) -> np.ndarray:
    rows = []
    for slide in image:
        cosines = [math.fsum(float(a) * float(b) for a, b in zip(slide, e)) for e in embeddings]  # noqa: B905
        powers = [math.exp(scale * cosine) for cosine in cosines]
        rows.append([power / math.fsum(powers) for power in powers])
    return np.array(rows)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_metrics_are_those_of_scikit_learn(classes: int, scale: float) -> None:
    image, embeddings = unit((80, 6), 1), unit((classes, 6), 2)
    labels = labels_for(CLASSES[:classes], 80)
    metrics = zero_shot(embeddings, CLASSES[:classes], labels)(predictions(image, scale)).metrics
    p = probabilities(image, embeddings, scale)
    truth = np.array([CLASSES.index(labels.classes[f"s{i}"][0]) for i in range(80)])
    guess = p.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(truth, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, guess),
        "f1_macro": sk.f1_score(truth, guess, average="macro"),
        "f1_weighted": sk.f1_score(truth, guess, average="weighted"),
        "auroc_ovr": sk.roc_auc_score(truth, p if classes > 2 else p[:, 1], multi_class="ovr"),
        "auroc_ovo": sk.roc_auc_score(truth, p if classes > 2 else p[:, 1], multi_class="ovo"),
        "cohen_kappa": sk.cohen_kappa_score(truth, guess),
    }
    if classes == 2:
        expected |= {
            "precision": sk.precision_score(truth, guess),
            "recall": sk.recall_score(truth, guess),
            "specificity": sk.recall_score(truth, guess, pos_label=0),
            "average_precision": sk.average_precision_score(truth, p[:, 1]),
        }
    if classes == 4:
        expected["top_3_accuracy"] = sk.top_k_accuracy_score(truth, p, k=3)
    expected = {f"zero_shot/task/{name}": value for name, value in expected.items()}
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_which_metrics_there_are() -> None:
    for classes, names in ((2, FOR_ALL | FOR_TWO), (3, FOR_ALL)):
        task = zero_shot(unit((classes, 6), 2), CLASSES[:classes], labels_for(CLASSES[:classes], 9))
        found = task(predictions(unit((9, 6), 1))).metrics
        assert set(found) == {f"zero_shot/task/{name}" for name in names}


def test_details() -> None:
    image = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    labels = labels_of("organ", {"s0": "A", "s1": "B", "s2": "B"})
    result = zero_shot(np.eye(3, dtype=np.float32), CLASSES[:3], labels)(predictions(image))
    details = result.details["zero_shot/organ"]
    per_class = details.pop("per_class")
    assert details == {
        "classes": ["A", "B", "C"],
        "confusion_matrix": [[1, 0, 0], [1, 1, 0], [0, 0, 0]],
        "specimens": 3,
        "without_label": 1,
    }
    b = {
        "specimens": 2,
        "predicted": 1,
        "precision": 1.0,
        "recall": 0.5,
        "f1": 2 / 3,
        "auroc": 0.75,
    }
    assert per_class["B"] == pytest.approx(b, abs=1e-12)
    assert per_class["C"]["specimens"] == 0 and math.isnan(per_class["C"]["recall"])
    assert result.metrics["zero_shot/organ/accuracy"] == 2 / 3
    assert result.metrics["zero_shot/organ/balanced_accuracy"] == 3 / 4


@pytest.mark.parametrize("names", list(itertools.permutations("XYZ")))
def test_the_order_of_classes_changes_nothing(names: tuple[str, ...]) -> None:
    """The same classes under names that sort otherwise."""
    image, embeddings = unit((60, 5), 3), unit((3, 5), 4)
    rename = dict(zip("ABC", names, strict=True))
    known = labels_for("ABC", 60)
    plain = zero_shot(embeddings, tuple("ABC"), known)(predictions(image))
    order = np.argsort(names)
    renamed = zero_shot(
        embeddings[order],
        tuple(np.array(names)[order].tolist()),
        labels_of("task", {s: rename[c] for s, (c,) in known.classes.items()}),
    )(predictions(image))
    assert renamed.metrics == pytest.approx(plain.metrics, abs=1e-12)
    before = np.array(plain.details["zero_shot/task"]["confusion_matrix"])
    after = np.array(renamed.details["zero_shot/task"]["confusion_matrix"])
    assert np.array_equal(after, before[np.ix_(order, order)])


def test_of_two_classes_the_second_is_positive() -> None:
    image = np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 1]]
    labels = labels_of("t", dict(zip(("s0", "s1", "s2", "s3", "s4"), "AABBB", strict=True)))
    metrics = zero_shot(np.eye(2, dtype=np.float32), ("A", "B"), labels)(predictions(image)).metrics
    assert metrics["zero_shot/t/precision"] == 1.0
    assert metrics["zero_shot/t/recall"] == 2 / 3
    assert metrics["zero_shot/t/specificity"] == 1.0


def test_the_temperature_reaches_the_probabilities() -> None:
    """With three classes, what others score changes who comes first at another temperature."""
    embeddings = np.eye(3, dtype=np.float32)
    image = np.array([[0.5, 0.49, -0.9], [0.5, 0.3, 0.3]], dtype=np.float32)
    labels = labels_of("t", {"s0": "A", "s1": "B"})

    def auroc(scale: float) -> float:
        task = zero_shot(embeddings, CLASSES[:3], labels)
        return task(predictions(image, scale)).metrics["zero_shot/t/auroc_ovr"]

    for scale in (0.5, 100.0):
        p = probabilities(image, embeddings, scale)
        expected = (float(p[0, 0] > p[1, 0]) + float(p[1, 1] > p[0, 1])) / 2
        assert auroc(scale) == expected
    assert auroc(0.5) != auroc(100.0)


def test_scores_that_round_to_certainty_keep_their_order() -> None:
    """exp(-60) is lost beside 1: as probabilities these specimens would all tie."""
    cosine = np.array([0.99, 0.9, 0.8, 0.7])
    image = np.stack([np.sqrt(1 - cosine**2), cosine], 1).astype(np.float32)
    embeddings = np.array([[-1, 0], [0, 1]], dtype=np.float32)
    assert len(set(probabilities(image, embeddings, 100.0)[:, 1])) == 1
    labels = labels_of("t", dict(zip(("s0", "s1", "s2", "s3"), "BBAA", strict=True)))
    metrics = zero_shot(embeddings, ("A", "B"), labels)(predictions(image, 100.0)).metrics
    gap = image @ (embeddings[1] - embeddings[0])
    expected = sk.roc_auc_score([1, 1, 0, 0], gap)
    assert metrics["zero_shot/t/auroc_ovr"] == expected
    assert metrics["zero_shot/t/average_precision"] == sk.average_precision_score([1, 1, 0, 0], gap)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_log_odds_of_the_softmax(classes: int) -> None:
    logits = np.random.default_rng(classes).normal(0, 3, (20, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(log_odds(logits), np.log(p / (1 - p)), rtol=0, atol=1e-10)
    extreme = log_odds(np.array([[1e4] + [0.0] * (classes - 1)]))
    assert np.isfinite(extreme).all() and extreme[0, 0] > 9e3 > extreme[0, 1]


def test_specimens_without_a_label_are_left_out() -> None:
    image, embeddings = unit((30, 6), 1), unit((3, 6), 2)
    some = labels_for(CLASSES[:3], 20)
    with_others = zero_shot(embeddings, CLASSES[:3], some)(predictions(image))
    alone = zero_shot(embeddings, CLASSES[:3], some)(predictions(image[:20]))
    assert with_others.metrics == pytest.approx(alone.metrics, abs=1e-12)
    assert with_others.details["zero_shot/task"]["without_label"] == 10
    assert alone.details["zero_shot/task"]["without_label"] == 0


def test_labels_under_patient_and_specimen() -> None:
    image = np.eye(2, dtype=np.float32)
    labels = labels_of("t", {"p0/s0": "A", "s1": "B", "p7/s1": "A"})
    result = zero_shot(np.eye(2, dtype=np.float32), ("A", "B"), labels)(predictions(image))
    assert result.details["zero_shot/t"]["confusion_matrix"] == [[1, 0], [0, 1]]


def test_no_labelled_specimen(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("slidevlm"), "propagate", True)
    task = zero_shot(unit((2, 6), 2), ("A", "B"), labels_of("organ", {"other": "A"}))
    result = task(predictions(unit((3, 6), 1)))
    assert result.metrics == {} and result.details == {}
    assert "zero_shot/organ: no specimen of this split has a label" in caplog.text


def test_one_specimen_and_one_class() -> None:
    metrics = zero_shot(unit((2, 6), 2), ("A", "B"), labels_of("t", {"s0": "A"}))(
        predictions(unit((1, 6), 1))
    ).metrics
    assert math.isnan(metrics["zero_shot/t/auroc_ovr"])
    assert math.isnan(metrics["zero_shot/t/recall"])
    assert metrics["zero_shot/t/accuracy"] in (0.0, 1.0)


def test_slides_that_are_not_numbers_give_no_metric(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("slidevlm"), "propagate", True)
    image = unit((5, 6), 1)
    image[2] = np.nan
    task = zero_shot(unit((2, 6), 2), ("A", "B"), labels_for("AB", 5))
    result = task(predictions(image))
    assert len(result.metrics) == 11 and all(math.isnan(v) for v in result.metrics.values())
    assert result.details == {}
    assert "1 slide embeddings are not finite" in caplog.text
    unlabelled = zero_shot(unit((2, 6), 2), ("A", "B"), labels_of("t", {"s0": "A", "s1": "B"}))
    assert unlabelled(predictions(image)).metrics["zero_shot/t/accuracy"] in (0.0, 0.5, 1.0)


# --- class embeddings ------------------------------------------------------------------------


def test_prompts_are_averaged_and_normalised() -> None:
    texts = {"x": [1.0, 0.0, 0.0], "y": [0.0, 0.6, 0.8], "z": [0.0, 0.0, 1.0]}
    asked: list[str] = []

    def embed(wanted: Sequence[str]) -> np.ndarray:
        asked.extend(wanted)
        return np.array([texts[t] for t in wanted], dtype=np.float32)

    prompts = Prompts(("A", "B", "C"), (("x", "y"), ("z",), ("x", "x", "z")))
    found = centres(embed_prompts(prompts, embed).rows)
    expected = []
    for row in ([0.5, 0.3, 0.4], [0, 0, 1], [2 / 3, 0, 1 / 3]):
        expected.append(np.array(row) / math.sqrt(sum(v * v for v in row)))
    np.testing.assert_allclose(found, np.array(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found.dtype == np.float32
    assert sorted(asked) == ["x", "y", "z"], "each text is embedded once"


def test_the_mean_of_normalised_prompts_is_not_the_normalised_sum_of_raw_ones() -> None:
    """Long prompts must not outweigh short ones: what comes in has length 1 already."""
    raw = np.array([[10.0, 0.0], [0.0, 1.0]])
    normalised = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    found = centres(
        embed_prompts(
            Prompts(("A", "B"), (("long", "short"), ("long",))),
            lambda texts: normalised[[("long", "short").index(t) for t in texts]],
        ).rows
    )
    np.testing.assert_allclose(found, [[math.sqrt(0.5)] * 2, [1, 0]], atol=1e-6)


# --- ensembles, spread over prompts, multi-label tasks ----------------------------------------


def ensemble_of(n: tuple[int, ...], kind: str = "mean", **more: object) -> ClassTexts:
    rows = tuple(unit((k, 6), 10 + i) for i, k in enumerate(n))
    return ClassTexts(CLASSES[: len(n)], rows, ensemble=kind, **more)  # type: ignore[arg-type]


def test_the_sum_of_probabilities_is_that_of_a_softmax_over_prompts() -> None:
    texts, image = ensemble_of((1, 4, 2), "probabilities"), unit((30, 6), 1)
    p = probabilities(image, np.concatenate(texts.rows), 8.0)
    expected = np.stack([p[:, 0], p[:, 1:5].sum(1), p[:, 5:].sum(1)], 1)
    logits = texts.logits(image, 8.0)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    other = ensemble_of((1, 4, 2)).logits(image, 8.0)
    assert (other.argmax(1) != logits.argmax(1)).any(), "else the kinds would not differ"


def test_one_prompt_a_class_is_the_same_either_way() -> None:
    image = unit((30, 6), 1)
    a, b = (ensemble_of((1, 1, 1), kind).logits(image, 9.0) for kind in ("mean", "probabilities"))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_spread_over_single_prompts() -> None:
    """Two prompts of one class, one of the other: two choices there are."""
    image, labels = unit((40, 6), 1), labels_for("AB", 40)
    rows = (unit((2, 6), 3), unit((1, 6), 4))
    task = ZeroShot(ClassTexts(("A", "B"), rows), labels, Bootstrap(0, 0.9))
    result = task(predictions(image))
    single = [
        zero_shot(np.stack([row, rows[1][0]]), "AB", labels)(predictions(image)).metrics[
            "zero_shot/task/balanced_accuracy"
        ]
        for row in rows[0]
    ]
    spread = result.details["zero_shot/task"]["prompt_sensitivity"]
    assert spread["of"] == "single_prompt" and spread["draws"] == 50
    assert [spread["least"], spread["most"]] == pytest.approx(sorted(single), abs=1e-12)
    name = "zero_shot/task/single_prompt/balanced_accuracy"
    assert result.metrics[name] == spread["median"]
    assert result.intervals[name] == pytest.approx(tuple(sorted(single)), abs=1e-12)


def test_spread_over_the_ensembles_of_a_file() -> None:
    image, labels = unit((40, 6), 1), labels_for("AB", 40)
    rows = (unit((3, 6), 3), unit((2, 6), 4))
    sets = ((np.array([0, 2]), np.array([1])), (np.array([1]), np.array([0, 1])))
    result = ZeroShot(ClassTexts(("A", "B"), rows, sets), labels)(predictions(image))
    single = []
    for one in sets:
        embeddings = centres([r[i] for r, i in zip(rows, one, strict=True)])
        metrics = zero_shot(embeddings, "AB", labels)(predictions(image)).metrics
        single.append(metrics["zero_shot/task/balanced_accuracy"])
    spread = result.details["zero_shot/task"]["prompt_sensitivity"]
    assert spread["of"] == "ensemble" and spread["draws"] == 2
    assert [spread["least"], spread["most"]] == pytest.approx(sorted(single), abs=1e-12)


def test_one_prompt_a_class_has_no_spread() -> None:
    result = zero_shot(unit((2, 6), 2), "AB", labels_for("AB", 9))(predictions(unit((9, 6), 1)))
    assert "prompt_sensitivity" not in result.details["zero_shot/task"]
    assert not any("single_prompt" in name for name in result.metrics)


def test_a_multi_label_task() -> None:
    random = np.random.default_rng(0)
    image, embeddings = unit((60, 6), 1), unit((4, 6), 2)
    member = random.random((60, 4)) < 0.3
    member[:, 3] = False  # a class that never occurs
    found = {f"s{i}": tuple(np.array(CLASSES)[row].tolist()) for i, row in enumerate(member)}
    del found["s59"]
    labels = Labels("signs", found, several=True)
    bootstrap = Bootstrap(25, seed=1)
    split = predictions(image)
    result = zero_shot(embeddings, CLASSES, labels, bootstrap)(split)
    p = probabilities(image, embeddings, 5.0)[:59]
    area = [sk.roc_auc_score(member[:59, c], p[:, c]) for c in range(3)]
    precision = [sk.average_precision_score(member[:59, c], p[:, c]) for c in range(3)]
    assert result.metrics == pytest.approx(
        {
            "zero_shot/signs/auroc_macro": np.mean(area),
            "zero_shot/signs/average_precision_macro": np.mean(precision),
        },
        abs=1e-12,
    )
    details = result.details["zero_shot/signs"]
    assert details["without_label"] == 1 and details["per_class"]["D"]["specimens"] == 0
    assert details["per_class"]["B"]["auroc"] == pytest.approx(area[1], abs=1e-12)
    counts = np.concatenate(list(bootstrap.blocks(split.patient_ids[:59])))
    for r in range(25):
        drawn = np.repeat(np.arange(59), counts[r])
        there = [c for c in range(3) if member[drawn, c].any()]
        expected = np.mean([sk.roc_auc_score(member[drawn, c], p[drawn, c]) for c in there])
        value = result.resampled["zero_shot/signs/auroc_macro"][r]
        assert value == pytest.approx(expected, abs=1e-12)

"""Evaluation beside the straightforward loop over scikit-learn, in one run; memory at 50,000.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py            # times, N = 2,000
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --memory   # peak memory, N = 50,000

The loops do what evaluators usually do: draw indices, and compute the metric of what was drawn.
They run for a few resamples and are extrapolated to 1,000.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import sklearn.metrics as sk

from slidevlm.batch import Predictions
from slidevlm.eval import Task, evaluate
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import Classification, classify
from slidevlm.eval.prompts import Labels
from slidevlm.eval.tasks.few_shot import FewShot
from slidevlm.eval.tasks.probe import fit_probes
from slidevlm.eval.tasks.retrieval import Retrieval
from slidevlm.eval.tasks.slide_retrieval import SlideRetrieval
from slidevlm.eval.tasks.zero_shot import ClassTexts, ZeroShot

R = 1000  # resamples


def cohort(
    n: int, width: int, classes: int, seed: int = 0
) -> tuple[Predictions, Labels, np.ndarray]:
    """Embeddings that know something of reports and classes; few reports are shared."""
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, n)
    means = random.normal(size=(classes, width)).astype(np.float32)
    image = means[y] + 2 * random.normal(size=(n, width)).astype(np.float32)
    text = image + 2 * random.normal(size=(n, width)).astype(np.float32)
    names = tuple(f"s{seed}_{i}" for i in range(n))
    patients = tuple(f"p{seed}_{i * 9 // 10}" for i in range(n))
    reports = ("an invasive carcinoma of some organ with free margins",) * n
    ids = random.integers(0, 20 * n, n)
    labels = Labels("classes", {s: (f"class {c:02}",) for s, c in zip(names, y, strict=True)})
    found = Predictions(names, patients, reports, ids, _unit(image), _unit(text), 14.3)
    return found, labels, y


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def seconds(run: Callable[[], object]) -> float:
    """Of the better of two runs."""
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def loop_retrieval(predictions: Predictions, resamples: int) -> None:
    """Both ways: ranks of what was drawn from the similarities, then the metrics."""
    image, text = predictions.image_embedding, predictions.text_embedding
    assert image is not None and text is not None
    scores, random = image @ text.T, np.random.default_rng(0)
    for _ in range(resamples):
        drawn = random.integers(len(scores), size=len(scores))
        for table in (scores[drawn], scores.T[drawn]):
            order = np.argsort(-table, axis=1)
            ranks = 1 + (order == drawn[:, None]).argmax(1)
            _ = [np.mean(ranks <= k) for k in (1, 5, 10)]
            _ = [np.mean(ranks), np.median(ranks), np.mean(1 / ranks)]


def loop_classification(y: np.ndarray, scores: np.ndarray, resamples: int) -> None:
    """The metrics of `Classification` by scikit-learn."""
    random = np.random.default_rng(0)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    for _ in range(resamples):
        drawn = random.integers(len(y), size=len(y))
        truth, chance = y[drawn], p[drawn]
        guess = chance.argmax(1)
        sk.accuracy_score(truth, guess)
        sk.balanced_accuracy_score(truth, guess)
        sk.f1_score(truth, guess, average="macro")
        sk.f1_score(truth, guess, average="weighted")
        sk.cohen_kappa_score(truth, guess)
        sk.top_k_accuracy_score(truth, chance, k=3)
        sk.top_k_accuracy_score(truth, chance, k=5)
        sk.roc_auc_score(truth, chance, multi_class="ovr")
        sk.roc_auc_score(truth, chance, multi_class="ovo")


def times() -> None:
    """A table of seconds for 1,000 resamples."""
    n, classes, few = 2000, 10, 3
    predictions, _, y = cohort(n, 512, classes)
    scores = 3 * np.random.default_rng(1).random((n, classes)) + np.eye(classes)[y]
    units, bootstrap = [str(i) for i in range(n)], Bootstrap(R, unit="specimen")
    plain = seconds(lambda: Retrieval()(predictions))
    task = Classification(y, scores, [str(c) for c in range(classes)])
    rows = [
        (
            "retrieval both ways, N = 2,000, E = 512",
            seconds(lambda: Retrieval(bootstrap)(predictions)),
            seconds(lambda: loop_retrieval(predictions, few)) * R / few,
        ),
        (
            "zero-shot metrics with both AUROC, N = 2,000, 10 classes",
            seconds(lambda: classify("t", y, scores, task.classes, units, bootstrap)),
            seconds(lambda: loop_classification(y, scores, few)) * R / few,
        ),
    ]
    print(f"1,000 resamples{'':44s} seconds   the loop   times")
    for name, ours, theirs in rows:
        print(f"{name:58s} {ours:8.2f} {theirs:10.1f} {theirs / ours:7.0f}")
    print(f"(of the first, {plain:.2f} s are the ranks themselves)")


def memory() -> None:
    """Peak memory of all tasks at N = 50,000, in a process of its own."""
    began = time.perf_counter()
    code = "import benchmarks.evaluation as b; b.everything(50_000)"
    subprocess.run([sys.executable, "-c", code], check=True)
    print(f"altogether {time.perf_counter() - began:.0f} s")


def everything(n: int) -> None:
    """Every task that needs no generated report, with 1,000 resamples."""
    classes, width, bootstrap = 15, 256, Bootstrap(R)
    predictions, labels, y = cohort(n, width, classes)
    train, train_labels, _ = cohort(2000, width, classes, seed=1)
    names = tuple(sorted(labels.names))
    image = predictions.image_embedding
    assert image is not None
    texts = tuple(_unit(image[y == c][:7]) for c in range(classes))
    both = Labels("classes", {**labels.classes, **train_labels.classes})
    examples = {
        c: tuple(s for s in train.specimen_ids if both.classes[s] == (c,))[:16] for c in names
    }
    tasks: dict[str, Callable[[], Task | None]] = {
        "retrieval": lambda: Retrieval(bootstrap),
        "zero-shot": lambda: ZeroShot(ClassTexts(names, texts), labels, bootstrap),
        "slide retrieval": lambda: SlideRetrieval(labels, bootstrap),
        "few-shot": lambda: FewShot("few", train, examples, both, bootstrap),
        "probes": lambda: fit_probes(train, (), both, bootstrap),
    }
    for name, make in tasks.items():
        began = time.perf_counter()
        task = make()
        assert task is not None
        found = evaluate(predictions, [task])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{name:16s} {len(found.metrics):3d} metrics  {time.perf_counter() - began:6.0f} s  "
            f"peak so far {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    memory() if "--memory" in sys.argv else times()

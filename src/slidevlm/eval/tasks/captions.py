"""Generated reports against the true ones."""

from __future__ import annotations

from collections import Counter

from slidevlm.batch import Predictions
from slidevlm.eval.task import TaskResult
from slidevlm.eval.text_metrics import bleu, cider, rouge
from slidevlm.eval.text_metrics.ngrams import tokenize


def captions(predictions: Predictions) -> TaskResult:
    """BLEU-1..4, ROUGE-L, CIDEr, length ratio, and the share of the most frequent report.

    A share near 1 tells that the model writes one report for every slide.
    """
    assert predictions.generated is not None, "this task needs generated reports"
    ours = [tokenize(text) for text in predictions.generated]
    theirs = [tokenize(text) for text in predictions.reports]
    values: dict[str, float] = {}
    for score in (bleu, rouge, cider):
        values |= score.score(score.statistics(ours, theirs))
    written = sum(len(t) for t in ours)
    values["length_ratio"] = written / max(1, sum(len(t) for t in theirs))
    values["most_frequent_share"] = Counter(predictions.generated).most_common(1)[0][1] / len(ours)
    return TaskResult({f"captions/{name}": value for name, value in values.items()})

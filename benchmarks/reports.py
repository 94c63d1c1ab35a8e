"""Scores of a tcga run's generated reports, with intervals, beside two baselines.

    slidevlm train --config examples/tcga.yaml --name tcga
    python -m benchmarks.reports logs/tcga [DATA]

DATA is the folder of the data, by default ../shared/data/tcga. The baselines: for every slide the
same report, made of the most frequent words of the training reports, as many as these have in the
median (an unconditional model); and the report of the training specimen whose mean feature is
nearest (cosine of standardised means). Intervals are of 1,000 resamples of patients, 95 %; the last
column is the share of resamples on which the run scores higher than the frequent words, and than
the nearest report.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from benchmarks.tcga import Cohort
from sklearn.preprocessing import StandardScaler, normalize

from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.text_metrics.ptb import tokenize
from slidevlm.eval.text_metrics.scoring import Scoring

_LESS_IS_BETTER = ("repetition_4", "most_frequent_share")
_NO_SCORE = ("length_ratio", "distinct_1", "distinct_2")


def frequent_words(reports: list[str]) -> str:
    """The most frequent words, as many as a report has in the median."""
    texts = [tokenize(report) for report in reports]
    counts = Counter(word for text in texts for word in text)
    length = int(np.median([len(text) for text in texts]))
    return " ".join(word for word, _ in counts.most_common(length))


def nearest(cohort: Cohort) -> list[str]:
    """The report of the nearest training specimen, for each of the test split."""
    width = cohort.matrix("train").shape[1] // 2  # mean, then deviation
    train, test = (cohort.matrix(split)[:, :width] for split in ("train", "test"))
    scaler = StandardScaler().fit(train)
    near = normalize(scaler.transform(test)) @ normalize(scaler.transform(train)).T
    return [cohort.texts("train")[i] for i in near.argmax(1)]


def main() -> None:
    """Print the table."""
    run = Path(sys.argv[1])
    cohort = Cohort(Path(sys.argv[2] if len(sys.argv) > 2 else "../shared/data/tcga"))
    written = {
        c["id"]: c["generated"] for c in json.loads((run / "captions_test.json").read_text())
    }
    truth, ids = cohort.texts("test"), cohort.ids["test"]
    texts = {
        run.name: [written[i] for i in ids],
        "frequent words": [frequent_words(cohort.texts("train"))] * len(ids),
        "nearest report": nearest(cohort),
    }
    start = time.perf_counter()
    counted = {name: Scoring().count(reports, truth) for name, reports in texts.items()}
    bootstrap = Bootstrap(1000)
    patients = [specimen[:12] for specimen in ids]
    drawn = {name: bootstrap.values(patients, c.values).values for name, c in counted.items()}
    values = {name: c.scores() for name, c in counted.items()}
    print(f"| score | {' | '.join(texts)} | run higher |")
    print("|---" * (len(texts) + 2) + "|")
    for score in values[run.name]:
        cells = []
        for name in texts:
            cell = f"{values[name][score]:.3f}"
            if score in drawn[name]:
                low, high = bootstrap.interval(drawn[name][score])
                cell += f" ({low:.3f} to {high:.3f})"
            cells.append(cell)
        shares = ["-"] * (len(texts) - 1)
        if score in drawn[run.name]:
            ours = drawn[run.name][score]
            shares = [f"{np.mean(ours > drawn[name][score]):.3f}" for name in list(texts)[1:]]
        note = " (less is better)" if score in _LESS_IS_BETTER else ""
        note = " (no order)" if score in _NO_SCORE else note
        print(f"| {score}{note} | {' | '.join(cells)} | {', '.join(shares)} |")
    print(f"\n{time.perf_counter() - start:.1f} s to score and resample", file=sys.stderr)


if __name__ == "__main__":
    main()

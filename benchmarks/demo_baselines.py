"""What simple baselines reach on the demo cohort, beside chance.

    python benchmarks/demo_baselines.py [FOLDER]

A logistic regression on the mean feature of a bag, and one that is told which tiles are tumour
(mean of those, their share, and how near they come to the tissue's edge). Balanced accuracy on
the test split.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slidevlm.data.synthetic import DemoCohort, Truth, draw_bag, draw_prototypes, synthesize

FIRST_TUMOUR = 7  # index into TISSUES


def vectors(truth: Truth, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean feature [64], and what one who knows the tumour tiles sees [66]."""
    bag = draw_bag(truth, draw_prototypes(seed), seed)
    features = bag.features.astype(np.float64)
    tumour = bag.tissue >= FIRST_TUMOUR
    names = np.array(bag.slides)
    reach = []
    for slide in np.unique(names):
        rows = names == slide
        place = bag.positions[rows] - bag.positions[rows].mean(0)
        distance = np.hypot(*place.T)
        reach.append((distance * tumour[rows]).max() / distance.max())
    known = np.concatenate([features[tumour].mean(0), [tumour.mean(), np.mean(reach)]])
    return features.mean(0), known


def main() -> None:
    """Print the table."""
    seed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "cohort"
        cohort: DemoCohort = synthesize(folder, seed=seed)
        truths = [Truth(**t) for t in json.loads((folder / "truth.json").read_text())]
        members = {s: set(cohort.split(s).read_text().split()) for s in ("train", "test")}
    rows = [vectors(t, seed) for t in truths]
    print(f"{'task':10s} {'chance':>7s} {'mean feature':>13s} {'tumour known':>13s}")
    for task in ("organ", "diagnosis", "grade", "margin"):
        y = np.array([str(getattr(t, task)) for t in truths])
        train, test = (
            np.array([t.specimen in members[s] for t in truths]) for s in ("train", "test")
        )
        scores = []
        for kind in (0, 1):
            x = np.stack([r[kind] for r in rows])
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
            probe.fit(x[train], y[train])
            scores.append(balanced_accuracy_score(y[test], probe.predict(x[test])))
        print(f"{task:10s} {1 / len(set(y)):7.2f} {scores[0]:13.2f} {scores[1]:13.2f}")


if __name__ == "__main__":
    main()

"""What simple baselines reach on the demo cohort, beside chance.

    python benchmarks/demo_baselines.py [SEED ...]

Three logistic regressions, trained on the train split, as balanced accuracy on the test split:
on the mean feature of a bag; on the mean feature of its tumour tiles, as if these were known; on
that and a few figures of where those tiles lie. What only the third can tell is spatial. With
several seeds: mean, and lowest to highest. The cohort's README quotes seeds 0 to 4.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slidevlm.data.synthetic import (
    DIAGNOSES,
    TILE_UM,
    TISSUES,
    SyntheticBag,
    Truth,
    draw_bag,
    draw_prototypes,
    draw_truths,
    synthesize,
)

PROBES = ("mean feature", "tumour known", "and its place")
TASKS = ("organ", "diagnosis", "grade", "margin", "focality")


def label(truth: Truth, task: str) -> str:
    """The class of a specimen in a task."""
    if task == "focality":
        return "unifocal" if truth.foci == 1 else "multifocal"
    return str(getattr(truth, task))


def places(bag: SyntheticBag, tumour: np.ndarray) -> np.ndarray:
    """[3] means over slides: reach of the tumour to the tissue's edge (two ways), and spread."""
    names = np.array(bag.slides)
    figures = []
    for slide in np.unique(names):
        rows = names == slide
        tiles = np.rint(bag.positions[rows] / TILE_UM).astype(int)
        # The outline is a deformed circle, so a tile's place is compared to those at its angle.
        offset = tiles - tiles.mean(0)
        distance = np.hypot(*offset.T)
        sector = (np.arctan2(*offset.T) * 12 / np.pi).astype(int) % 24
        outline = np.array([distance[sector == k].max(initial=1.0) for k in range(24)])
        reach = (distance / outline[sector])[tumour[rows]]
        spread = tiles[tumour[rows]].std(0).mean() / np.sqrt(tumour[rows].sum())
        figures.append((distance[tumour[rows]].max() / distance.max(), reach.max(), spread))
    return np.asarray(np.mean(figures, axis=0))


def vectors(truth: Truth, prototypes: dict[str, np.ndarray], seed: int) -> list[np.ndarray]:
    """What each of `PROBES` sees of a specimen."""
    bag = draw_bag(truth, prototypes, seed)
    features = bag.features.astype(np.float64)
    kinds = np.array(TISSUES)[bag.tissue]
    tumour = np.isin(kinds, list(DIAGNOSES)) | (kinds == "necrosis")
    known = features[np.isin(kinds, list(DIAGNOSES))].mean(0)
    shares = [tumour.mean(), (kinds == "necrosis").sum() / tumour.sum()]
    known = np.concatenate([known, shares])
    return [features.mean(0), known, np.concatenate([known, places(bag, tumour)])]


def measure(seed: int, specimens: int = 480) -> np.ndarray:
    """Balanced accuracies [TASKS, PROBES] of a cohort."""
    with tempfile.TemporaryDirectory() as scratch:
        cohort = synthesize(Path(scratch) / "cohort", specimens=specimens, seed=seed)
        split = {
            name: set(cohort.split(name).read_text().split()) for name in ("train", "val", "test")
        }
    truths = draw_truths(specimens, seed)
    train, test = (np.array([t.specimen in split[s] for t in truths]) for s in ("train", "test"))
    prototypes = draw_prototypes(seed)
    seen = [np.stack(x) for x in zip(*(vectors(t, prototypes, seed) for t in truths), strict=True)]
    scores = np.empty((len(TASKS), len(PROBES)))
    for row, task in enumerate(TASKS):
        y = np.array([label(t, task) for t in truths])
        for column, x in enumerate(seen):
            probe = make_pipeline(
                StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
            )
            probe.fit(x[train], y[train])
            scores[row, column] = balanced_accuracy_score(y[test], probe.predict(x[test]))
    return scores


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore", FutureWarning)
    seeds = [int(a) for a in sys.argv[1:]] or [0]
    scores = np.stack([measure(seed) for seed in seeds])  # [seeds, TASKS, PROBES]
    chance = {"organ": 1 / 3, "diagnosis": 1 / len(DIAGNOSES), "grade": 1 / 3}
    print(f"{'task':10s} {'chance':>6s}" + "".join(f"{name:>19s}" for name in PROBES))
    for row, task in enumerate(TASKS):
        cells = [f"{chance.get(task, 1 / 2):6.2f}"]
        for values in scores[:, row].T:
            span = f" ({values.min():.2f}-{values.max():.2f})" if len(seeds) > 1 else ""
            cells.append(f"{values.mean():.2f}{span}".rjust(18))
        print(f"{task:10s} " + " ".join(cells))


if __name__ == "__main__":
    main()

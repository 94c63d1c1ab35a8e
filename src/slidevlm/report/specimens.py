"""The specimens of an evaluation, for the page: texts, classes, scores, map, neighbours.

Tables are columns; classes and specimens are numbers, so that a page of thousands stays small.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.errors import DataError
from slidevlm.eval.stored import FILE, load
from slidevlm.report.embedding_map import nearest, pca, umap

NEIGHBOURS = 5
SHOWN = 5_000  # of a run: 20 to 40 MB of reports, which a browser still opens and searches at once
_ROC_POINTS = 200
_MAPPED = 10  # embeddings that UMAP needs; its neighbourhoods are of 15, or of all there are
Columns = dict[str, list[str]]


@dataclass(frozen=True)
class _Row:
    """A specimen and the split it is of."""

    split: str
    number: int  # within its split
    judged: bool  # False: of a split that tasks only learnt from


def specimens(path: Path, wanted: Collection[str] = ()) -> dict[str, Any]:
    """Everything that the page says of specimens, from `predictions.npz` and the CSV beside it.

    The specimens that tasks learnt from (the training split, few-shot examples) are on the map
    too, each once. Of more than `SHOWN` so many are taken, at equal distances, judged ones first;
    `of` has how many each split has, and ROC curves are of all.

    Args:
        path: of the predictions.
        wanted: names of specimens that are taken in any case.

    Raises:
        DataError: a file that cannot be read, or the two of different evaluations.
    """
    stored = load(path)
    prefix = path.name.removesuffix(FILE)
    columns = _read_csv(path.with_name(f"{prefix}predictions.csv"))
    everything = {**stored.references, **stored.splits}
    every = [_Row(s, i, True) for s, p in stored.splits.items() for i in range(len(p))]
    if columns is not None:
        ids = [everything[row.split].specimen_ids[row.number] for row in every]
        if columns["specimen"] != ids:
            raise DataError(
                f"{path} and the predictions.csv beside it are of different evaluations; evaluate "
                "the run again"
            )
    known = {p.specimen_ids[i] for p in stored.splits.values() for i in range(len(p))}
    learnt: list[_Row] = []
    for split, predictions in stored.references.items():
        for i, specimen in enumerate(predictions.specimen_ids):
            if specimen not in known:
                known.add(specimen)
                learnt.append(_Row(split, i, False))
    sizes = Counter(row.split for row in (*every, *learnt))
    asked = frozenset(wanted)
    kept = _spread(len(every), SHOWN)
    if asked and len(kept) < len(every):
        also = [i for i, r in enumerate(every) if _name(everything, r) in asked]
        kept = sorted({*kept, *also})
    rows = [every[i] for i in kept]
    rows += [learnt[i] for i in _spread(len(learnt), max(0, SHOWN - len(kept)))]
    names = list(sizes)  # also of splits that had no room
    generated = [_text(everything, row, "generated") for row in rows]
    tasks = [] if columns is None else _tasks(columns, kept, len(rows))
    return {
        "judged": len(kept),
        "splits": names,
        "of": [sizes[name] for name in names],
        "split": [names.index(row.split) for row in rows],
        "id": [_name(everything, row) for row in rows],
        "patient": [everything[row.split].patient_ids[row.number] for row in rows],
        "report": [everything[row.split].reports[row.number] for row in rows],
        "generated": generated if any(g is not None for g in generated) else None,
        "numbers": {} if columns is None else _numbers(columns, kept, len(rows)),
        "tasks": tasks,
        **_geometry(everything, rows),
    }


def _spread(count: int, most: int) -> Sequence[int]:
    """At most so many of `range(count)`, at equal distances."""
    return range(count) if count <= most else [i * count // most for i in range(most)]


def _name(everything: Mapping[str, Predictions], row: _Row) -> str:
    return everything[row.split].specimen_ids[row.number]


def _text(everything: Mapping[str, Predictions], row: _Row, name: str) -> str | None:
    found = getattr(everything[row.split], name)
    return None if found is None else found[row.number]


def _read_csv(path: Path) -> Columns | None:
    """Columns by name; None without the file."""
    if not path.is_file():
        return None
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # long reports; the default is 128 KB
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({error})") from error
    if "specimen" not in header or any(len(row) != len(header) for row in rows):
        raise DataError(f"{path} is not a table of predictions; evaluate the run again")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _numbers(columns: Columns, kept: Sequence[int], total: int) -> dict[str, list[float | None]]:
    """Ranks and scores of single specimens."""
    names = [n for n in columns if n.endswith("/rank") or n.startswith("captions/")]
    return {name: _padded([_float(columns[name][i]) for i in kept], total) for name in names}


def _padded(values: Sequence[Any], total: int, fill: Any = None) -> list[Any]:
    return [*values, *[fill] * (total - len(values))]


def _float(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _tasks(columns: Columns, kept: Sequence[int], total: int) -> list[dict[str, Any]]:
    """Classification tasks: true and predicted class, probabilities, ROC curves of each split."""
    found = []
    for column in columns:
        name, _, kind = column.rpartition("/")
        if kind != "label" or f"{name}/predicted" not in columns:
            continue
        label, predicted = columns[column], columns[f"{name}/predicted"]
        start = f"{name}/probability/"
        scored = [c.removeprefix(start) for c in columns if c.startswith(start)]
        classes = scored or sorted({*label, *predicted} - {""})
        number = {c: i for i, c in enumerate(classes)}
        chances = np.array([[_nan(v) for v in columns[start + c]] for c in scored])
        found.append(
            {
                "name": name,
                "classes": classes,
                "label": _padded([number.get(label[i], -1) for i in kept], total, -1),
                "predicted": _padded([number.get(predicted[i], -1) for i in kept], total, -1),
                "probability": [
                    _padded([_float(f"{row[i]:.3g}") for i in kept], total) for row in chances
                ],
                "roc": _rocs(columns["split"], label, classes, chances) if scored else {},
            }
        )
    return found


def _nan(word: str) -> float:
    return float(word) if word else float("nan")


def _rocs(
    splits: Sequence[str], label: Sequence[str], classes: Sequence[str], chances: np.ndarray
) -> dict[str, list[dict[str, Any] | None]]:
    """split -> a curve a class, one against all others; None where it is not defined."""
    found: dict[str, list[dict[str, Any] | None]] = {}
    truth, of = np.array(label), np.array(splits)
    for split in dict.fromkeys(splits):
        rows = np.flatnonzero((of == split) & (truth != ""))
        found[split] = [
            roc(truth[rows] == name, chances[c][rows]) for c, name in enumerate(classes)
        ]
    return found


def roc(positive: np.ndarray, score: np.ndarray) -> dict[str, Any] | None:
    """The ROC curve of [n] bool by [n] scores: false and true positive rates from (0, 0) to (1, 1).

    Equal scores are one point. None where a class is empty or a score not finite.
    """
    n = int(positive.sum())
    if n in (0, len(positive)) or not np.isfinite(score).all():
        return None
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    true = np.concatenate([[0.0], hits[last] / n])
    false = np.concatenate([[0.0], (last + 1 - hits[last]) / (len(score) - n)])
    area = float(((false[1:] - false[:-1]) * (true[1:] + true[:-1])).sum() / 2)
    # Points within a straight line say nothing.
    bent = np.flatnonzero(np.abs(np.diff(false)[1:] * np.diff(true)[:-1]
                                 - np.diff(true)[1:] * np.diff(false)[:-1]) > 1e-12)  # fmt: skip
    kept = np.unique(np.concatenate([[0], bent + 1, [len(true) - 1]]))
    if len(kept) > _ROC_POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, _ROC_POINTS).round().astype(int)]
    return {
        "x": [round(float(v), 4) for v in false[kept]],
        "y": [round(float(v), 4) for v in true[kept]],
        "auc": round(area, 4),
        "n": n,
    }


def _geometry(everything: Mapping[str, Predictions], rows: Sequence[_Row]) -> dict[str, Any]:
    """Maps of the slide embeddings, nearest slides, nearest reports."""
    parts = [(everything[row.split], row.number) for row in rows]
    if not rows or any(p.image_embedding is None or p.text_embedding is None for p, _ in parts):
        return {"maps": [], "near": None, "found": None, "umap": "none"}
    image = np.stack([p.image_embedding[i] for p, i in parts])  # type: ignore[index]
    text = np.stack([p.text_embedding[i] for p, i in parts])  # type: ignore[index]
    maps, state = [pca(image)], "small"
    if np.isfinite(image).all(axis=1).sum() >= _MAPPED:
        other = umap(image)
        state = "there" if other is not None else "not installed"
        maps += [] if other is None else [other]
    near: list[list[list[float]]] = []
    found: list[list[list[float]]] = []
    for split in dict.fromkeys(row.split for row in rows if row.judged):
        mine = [i for i, row in enumerate(rows) if row.judged and row.split == split]
        near += nearest(image[mine], image[mine], mine, NEIGHBOURS, skip_self=True)
        found += nearest(image[mine], text[mine], mine, NEIGHBOURS, skip_self=False)
    return {"maps": maps, "near": near, "found": found, "umap": state}

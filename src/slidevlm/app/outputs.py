"""The files of an evaluation, each with what its numbers come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidevlm.batch import Predictions
from slidevlm.config import Config, given_values
from slidevlm.data.formats.slide_vectors import write_slide_vectors
from slidevlm.documents import Table, finite
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.scores import Results, Score, scores
from slidevlm.eval.stored import FILE, Stored, save
from slidevlm.eval.task import TaskResult
from slidevlm.files import replacing
from slidevlm.report.summary import summary
from slidevlm.run import Run, environment

# Of no consequence for the numbers.
_NOT_SETTINGS = ("logs", "name", "workers", "report_to", "log_every_n_steps")


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    metrics: dict[str, float]  # by <split>/<task>/<metric>
    results: Results = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # where it was written


def metrics_json(folder: Path | None, metrics: Mapping[str, float]) -> str:
    """A JSON document of a run's folder and metrics; null where one is not defined."""
    content = {"folder": None if folder is None else str(folder), "metrics": metrics}
    return json.dumps(finite(content), indent=1)


def about(
    config: Config, model: torch.nn.Module | None, splits: Mapping[str, Predictions]
) -> dict[str, Any]:
    """Hashes of model and data, settings, versions: the origin of every file.

    The hash of the data is that of specimens, patients and reports; features are not read for it.
    """
    given = {k: v for k, v in given_values(config).items() if k not in _NOT_SETTINGS}
    evaluation = config.evaluation
    machine = environment()
    return {
        "model": config.model_name,
        "model_hash": None if model is None else model_hash(model),
        "data_hash": {name: data_hash(split) for name, split in splits.items()},
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()},
        "bootstrap": {
            "resamples": evaluation.eval_metric_bootstraps,
            "confidence": evaluation.eval_metric_ci,
            "unit": evaluation.bootstrap_unit,
            "seed": evaluation.seed,
        },
        "versions": {"python": machine["python"], **machine["packages"]},
    }


def model_hash(model: torch.nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_hash(split: Predictions) -> str:
    """SHA-256 of the specimens of a split, their patients and reports, in any order."""
    rows = sorted(zip(split.specimen_ids, split.patient_ids, split.reports, strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass(frozen=True)
class Outputs:
    """Writes an evaluation into a run folder.

    Args:
        run: the folder; nothing is written where it has none.
        prefix: of the names of files that a training in the same folder may have too.
        bootstrap: of the intervals.
    """

    run: Run
    prefix: str
    bootstrap: Bootstrap

    def write(self, name: str, model: str, results: Results, stored: Stored) -> Outcome:
        """All files; `name` is that of the summary, `model` stands in its title."""
        found = scores(results, self.bootstrap)
        outcome = Outcome({s.name: s.value for s in found}, results, found, stored.about)
        if self.run.folder is None:
            return outcome
        details = {split: result.details for split, (_, result) in results.items()}
        content = {"about": stored.about, "metrics": outcome.metrics, "details": details}
        self.run.write_json(f"{name}.json", content)
        page = summary(model, results, self.bootstrap)
        self.run.write(f"{name}.md", page + _origin(stored.about))
        self._json("metrics.json", stored, {"metrics": table(found)})
        self._tasks(stored, results, found)
        save(stored, self.run.folder / f"{self.prefix}{FILE}")
        self.run.write(f"{self.prefix}predictions.csv", _csv(stored, results))
        return outcome

    def embeddings(self, stored: Stored) -> None:
        """A file in TRIDENT's layout for each specimen, and one `.npz` of all."""
        if self.run.folder is None:
            return
        for name, split in stored.splits.items():
            folder = self.run.folder / f"{self.prefix}embeddings" / name
            write_slide_vectors(
                folder, split.specimen_ids, _known(split.image_embedding), _flat(stored.about)
            )
            arrays = {
                "specimen_ids": np.array(split.specimen_ids),
                "patient_ids": np.array(split.patient_ids),
                "image_embedding": _known(split.image_embedding),
                "text_embedding": _known(split.text_embedding),
                "about": np.array(json.dumps(stored.about)),
            }
            # Not `with_suffix`: a split may have a dot in its name.
            with replacing(folder.with_name(f"{name}.npz")) as new, new.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]

    def _json(self, name: str, stored: Stored, content: dict[str, Any]) -> None:
        self.run.write_json(f"{self.prefix}{name}", {"about": stored.about, **content})

    def _tasks(self, stored: Stored, results: Results, found: list[Score]) -> None:
        for split, (_, result) in results.items():
            for task, details in result.details.items():
                mine = [s for s in found if s.split == split and s.metric.startswith(f"{task}/")]
                content = {"split": split, "task": task, "metrics": table(mine), "details": details}
                self._json(f"tasks/{split}_{task.replace('/', '_')}.json", stored, content)


def table(found: list[Score]) -> dict[str, dict[str, float | int | None]]:
    """Metrics as files have them: flat names; value, ends of the interval, specimens."""
    return {s.name: {"value": s.value, "lo": s.lo, "hi": s.hi, "n": s.n} for s in found}


def _origin(about: dict[str, Any]) -> str:
    """The last lines of a page."""
    data = ", ".join(f"{split} `{value}`" for split, value in about["data_hash"].items())
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    return f"\nModel `{about['model_hash']}`; data {data}; {versions}.\n"


def _csv(stored: Stored, results: Results) -> str:
    """A row a specimen: reports and what each task said of it; the first row tells the origin."""
    names = list(dict.fromkeys(n for _, result in results.values() for n in result.columns))
    table = Table()
    table.writerow(["split", "specimen", "patient", "report", "generated", *names, "about"])
    origin = json.dumps(stored.about)
    for split, (predictions, result) in results.items():
        for row in _rows(split, predictions, result, names):
            table.writerow([*row, origin])
            origin = ""
    return table.text()


def _rows(
    split: str, predictions: Predictions, result: TaskResult, names: list[str]
) -> list[list[Any]]:
    generated = predictions.generated or ("",) * len(predictions)
    empty = [""] * len(predictions)
    columns = [result.columns.get(name, empty) for name in names]
    basic = (predictions.specimen_ids, predictions.patient_ids, predictions.reports, generated)
    return [[split, *row] for row in zip(*basic, *columns, strict=True)]


def _flat(origin: dict[str, Any]) -> dict[str, str]:
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in origin.items()}


def _known(embeddings: np.ndarray | None) -> np.ndarray:
    assert embeddings is not None, "an evaluation embeds everything"
    return embeddings


def newest_predictions(place: Path) -> Path | None:
    """The stored predictions that `place` names: a file, a folder of one, or a run's last ones."""
    if place.is_file():
        return place
    names = (FILE, f"evaluation_{FILE}")
    found = [place / n for n in names] + [
        path for n in names for path in place.glob(f"evaluation-*/{n}")
    ]
    there = [path for path in found if path.is_file()]
    return max(there, key=lambda path: path.stat().st_mtime_ns) if there else None

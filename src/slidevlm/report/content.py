"""What stands on the page of a run, as plain values for JSON.

Everything comes from the files of the run folder and of its newest evaluation; a part whose file is
missing is left out, and `lacking` says which command makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from slidevlm import __version__
from slidevlm.config import GROUPS, declarations, flag_of
from slidevlm.documents import finite, json_of, yaml_of
from slidevlm.errors import DataError
from slidevlm.eval.stored import FILE
from slidevlm.models.attention_maps import followed
from slidevlm.report.specimens import specimens
from slidevlm.run import METRICS

_POINTS = 1500  # of a learning curve; more cannot be told apart on a screen
_DETAILS = ("queries", "without_target", "without_label", "specimens", "resamples_redrawn")


@dataclass(frozen=True)
class RunFiles:
    """Where the parts of a run lie."""

    name: str
    folder: Path  # of the training, or of an evaluation that stands alone
    predictions: Path | None  # of the newest evaluation; its other files lie beside it
    check: Path | None = None  # check.json of `data check`


def content(
    runs: Sequence[RunFiles], attention: Sequence[Mapping[str, Any] | None] = ()
) -> dict[str, Any]:
    """The page of one run, or of two side by side.

    Args:
        runs: one or two.
        attention: of each run, as `app.page_attention` makes it; None or nothing: without.

    Raises:
        DataError: a file that cannot be read.
    """
    shown = [_run(f, seen) for f, seen in zip_longest(runs, attention)]
    found = {
        "version": __version__,
        "runs": shown,
        "comparison": _comparison(runs[0], shown) if len(runs) > 1 else None,
    }
    return finite(found)


def _run(files: RunFiles, attention: Mapping[str, Any] | None) -> dict[str, Any]:
    evaluation = _evaluation(files)
    seen = [] if attention is None else [one["id"] for one in attention["specimens"]]
    table = None if files.predictions is None else specimens(files.predictions, seen)
    curves = _curves(files.folder / METRICS)
    check = None if files.check is None else _json(files.check)
    run = {
        "name": files.name,
        "folder": str(files.folder),
        "settings": _settings(files.folder / "config.yaml"),
        "model": _optional(files.folder / "model.json"),
        "environment": _optional(files.folder / "environment.json"),
        "curves": curves,
        "evaluation": evaluation,
        "specimens": table,
        "check": check,
        "attention": attention,
        "dropped": _lines(files.folder / "bad_specimens.txt"),
        "missing": {
            path.stem.removeprefix("missing_"): _lines(path)
            for path in sorted(files.folder.glob("missing_*.txt"))
        },
    }
    run["refused"] = _refused(run["model"])
    run["lacking"] = _lacking(files, run)
    return run


def _refused(model: Mapping[str, Any] | None) -> str | None:
    """Why the attention of a model (model.json) cannot be shown; None where it can, or may."""
    if model is None:
        return None
    slide = model.get("slide")
    if not slide:
        return "A language model reads no tiles: there is no attention to show."
    if followed(str(slide.get("type"))):
        return None
    return f"The slide encoder {slide.get('type')} has no attention over single tiles to show."


def _lacking(files: RunFiles, run: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the page could show too, and the command that makes it."""
    folder, found = str(files.folder), []

    def add(part: str, tab: str, command: str) -> None:
        found.append({"part": part, "tab": tab, "command": command})

    evaluate = f"slidevlm evaluate {folder}"
    table, evaluation = run["specimens"], run["evaluation"]
    if evaluation is None:
        add("an evaluation: metrics, specimens, the map", "tasks", evaluate)
    else:
        if evaluation["bootstrap"].get("resamples", 0) < 2:
            add("intervals", "tasks", f"{evaluate} --eval-metric-bootstraps 1000")
        if not any(task["details"].get("confusion_matrix") for task in evaluation["tasks"]):
            add(
                "classification",
                "tasks",
                f"{evaluate} --zsc-class-prompt-mapping PROMPTS.json "
                "--zsc-specimen-class-mapping LABELS.json",
            )
    if table is not None and table["generated"] is None:
        add("generated reports", "specimens", f"{evaluate} --save-captions")
    if run["attention"] is None and run["model"] and run["refused"] is None:
        add("where the model attends", "attention", f"slidevlm report {folder} --attention 8")
    if run["check"] is None:
        add(
            "the data check",
            "data",
            f"slidevlm data check --config {folder}/config.yaml --output {folder}/check",
        )
    return found


# -- settings ---------------------------------------------------------------------------------


def _settings(path: Path) -> list[dict[str, Any]] | None:
    """Each argument: group, flag, value, default, help; those of a later version without help."""
    if not path.is_file():
        return None
    try:
        given = yaml_of(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not plain YAML ({error})") from error
    if not isinstance(given, dict):
        raise DataError(f"{path} is not a mapping of argument names to values")
    rows = []
    for group, declared in GROUPS.items():
        for name, default, spec in declarations(declared):
            value = given.pop(name, default)
            rows.append(
                {
                    "group": group,
                    "flag": flag_of(name, spec),
                    "value": _word(value),
                    "default": spec.default_text or _word(default),
                    "given": _word(value) != _word(default),
                    "help": spec.help,
                }
            )
    rows += [
        {"group": "other", "flag": str(k), "value": _word(v), "default": "", "given": True,
         "help": "not an argument of this version"}
        for k, v in given.items()
    ]  # fmt: skip
    return rows


def _word(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_word(v)}" for k, v in value.items())
    return str(value)


# -- curves -----------------------------------------------------------------------------------


def _curves(path: Path) -> dict[str, Any] | None:
    """metrics.jsonl by kind: steps, epochs, and a list a metric."""
    if not path.is_file():
        return None
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json_of(line)
            kinds.setdefault(row["kind"], []).append(row)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    found = {kind: _columns(rows) for kind, rows in kinds.items()}
    return found or None


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    thinned = rows[:: max(1, -(-len(rows) // _POINTS))]
    if rows and thinned[-1] is not rows[-1]:
        thinned = [*thinned, rows[-1]]
    names = dict.fromkeys(name for row in rows for name in row)
    skipped = ("kind", "step", "epoch")
    return {
        "lines": len(rows),
        "step": [row.get("step") for row in thinned],
        "epoch": [row.get("epoch") for row in thinned],
        "values": {
            name: [short(row.get(name)) for row in thinned] for name in names if name not in skipped
        },
    }


# -- evaluation -------------------------------------------------------------------------------


def _evaluation(files: RunFiles) -> dict[str, Any] | None:
    """Metrics with intervals and the details of each task; None without an evaluation."""
    if files.predictions is None:
        return None
    prefix = files.predictions.name.removesuffix(FILE)
    path = files.predictions.with_name(f"{prefix}metrics.json")
    if not path.is_file():
        return None
    stored = _json(path)
    about = stored.get("about", {})
    metrics = []
    for name, row in stored.get("metrics", {}).items():
        split, _, rest = name.partition("/")
        task, _, metric = rest.rpartition("/")
        value, lo, hi = (short(row.get(key)) for key in ("value", "lo", "hi"))
        metrics.append(
            {"split": split, "task": task, "metric": metric, "value": value, "lo": lo, "hi": hi,
             "n": row.get("n")}
        )  # fmt: skip
    tasks = []
    for one in sorted(path.with_name(f"{prefix}tasks").glob("*.json")):
        task = _json(one)
        tasks.append({"split": task["split"], "task": task["task"],
                      "details": _details(task["details"])})  # fmt: skip
    return {
        "folder": str(files.predictions.parent),
        "about": about,
        "bootstrap": about.get("bootstrap", {}),
        "metrics": metrics,
        "tasks": tasks,
    }


def _details(details: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a task."""
    kept = {k: details[k] for k in (*_DETAILS, "classes", "confusion_matrix") if k in details}
    if "per_class" in details:
        kept["per_class"] = {
            name: {k: short(v) for k, v in row.items()}
            for name, row in details["per_class"].items()
        }
    return kept


def _comparison(files: RunFiles, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Paired differences that `evaluate --compare` has left; None where they are of other runs.

    What was compared is told by its values: paths may have moved, and a folder may have a newer
    evaluation than the one that was compared.
    """
    if files.predictions is None:
        return None
    path = files.predictions.with_name("comparison.json")
    if not path.is_file():
        return None
    stored = _json(path)
    rows = [
        {k: short(v) if isinstance(v, float) else v for k, v in row.items()}
        for row in stored["differences"]
    ]
    one, other = (_values(run) for run in runs)
    shared = [row for row in rows if f"{row['split']}/{row['metric']}" in one.keys() & other.keys()]
    for row in shared:
        name = f"{row['split']}/{row['metric']}"
        if (one[name], other[name]) != (row["value"], row["other"]):
            return None
    if not shared:
        return None
    return {"other": stored["other"], "differences": rows}


def _values(run: Mapping[str, Any]) -> dict[str, Any]:
    """`<split>/<task>/<metric>` -> value, as the page has it."""
    metrics = (run["evaluation"] or {}).get("metrics", [])
    return {f"{m['split']}/{m['task']}/{m['metric']}": m["value"] for m in metrics}


# -- files ------------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    try:
        return json_of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error


def _optional(path: Path) -> Any:
    return _json(path) if path.is_file() else None


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


def short(value: Any) -> Any:
    """A number with five significant digits: a page of thousands of specimens stays small."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value

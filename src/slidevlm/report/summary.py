"""A run's results as Markdown: tables of metrics, and reports to read."""

from __future__ import annotations

import math
from collections.abc import Mapping

from slidevlm.batch import Predictions
from slidevlm.eval.task import TaskResult

_EXAMPLES = 5


def summary(model: str, results: Mapping[str, tuple[Predictions, TaskResult]]) -> str:
    """Markdown of one evaluation.

    Args:
        model: its name.
        results: split name -> its predictions and metrics.
    """
    parts = [f"# Results of `{model}`", ""]
    for split, (predictions, result) in results.items():
        parts += [f"## {split}: {len(predictions)} specimens", ""]
        parts += ["| metric | value |", "|---|---|"]
        parts += [f"| {name} | {_number(value)} |" for name, value in result.metrics.items()]
        parts.append("")
        for name, details in result.details.items():
            if "confusion_matrix" in details:
                parts += _confusion(name, details["classes"], details["confusion_matrix"])
        parts += _examples(predictions)
    return "\n".join(parts) + "\n"


def _number(value: float) -> str:
    if math.isnan(value):
        return "not defined"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _confusion(name: str, classes: list[str], matrix: list[list[int]]) -> list[str]:
    lines = [f"### {name}: true class (row), predicted class (column)", ""]
    lines.append("| | " + " | ".join(classes) + " |")
    lines.append("|---" * (len(classes) + 1) + "|")
    for label, row in zip(classes, matrix, strict=True):
        lines.append(f"| **{label}** | " + " | ".join(str(n) for n in row) + " |")
    return [*lines, ""]


def _examples(predictions: Predictions) -> list[str]:
    if predictions.generated is None:
        return []
    # Spread over the split rather than its first ones, which may be of one hospital.
    stride = max(1, len(predictions) // _EXAMPLES)
    lines = ["### Generated reports", ""]
    for i in list(range(0, len(predictions), stride))[:_EXAMPLES]:
        lines += [
            f"**{predictions.specimen_ids[i]}**",
            "",
            f"- generated: {_plain(predictions.generated[i])}",
            f"- true: {_plain(predictions.reports[i])}",
            "",
        ]
    return lines


def _plain(text: str) -> str:
    """Reports are data: nothing in them may act as Markdown or HTML."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join("\\" + c if c in "\\`*_[]|#!" else c for c in escaped)

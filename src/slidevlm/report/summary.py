"""A run's results as Markdown: tables of metrics, and reports to read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from slidevlm.batch import Predictions
from slidevlm.data.reports import normalise
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.scores import interval
from slidevlm.eval.task import TaskResult

_EXAMPLES = 5
# What may open or close anything in Markdown, in GitHub's too (tables, strike-through, formulas),
# underscores and at-signs only where they are not within a word; and the start of bare addresses,
# which become links.
_ACTIVE = re.compile(
    r"[\\`*\[\]|#!<>&~$]|(?<![a-z0-9])[_@]|[_@](?![a-z0-9])|:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=www)\.",
    re.IGNORECASE | re.ASCII,
)


def summary(
    model: str,
    results: Mapping[str, tuple[Predictions, TaskResult]],
    bootstrap: Bootstrap = Bootstrap(),  # noqa: B008 (frozen)
) -> str:
    """Markdown of one evaluation.

    Args:
        model: its name.
        results: split name -> its predictions and metrics.
        bootstrap: of the intervals.
    """
    parts = [f"# Results of {_plain(model)}", ""]
    for split, (predictions, result) in results.items():
        parts += [f"## {_plain(split)}: {len(predictions)} specimens", ""]
        if bootstrap:
            units = len(set(bootstrap.units(predictions)))
            parts += [
                f"Intervals of {100 * bootstrap.confidence:g} % from {bootstrap.resamples} "
                f"resamples of {units} {bootstrap.unit}s.",
                "",
            ]
        parts += ["| metric | value |", "|---|---|"]
        parts += [
            f"| {_plain(name)} | {_number(value)}{_interval(result, name, bootstrap)} |"
            for name, value in result.metrics.items()
        ]
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


def _interval(result: TaskResult, name: str, bootstrap: Bootstrap) -> str:
    lo, hi = interval(result, name, bootstrap)
    return "" if lo is None or hi is None else f" ({_number(lo)} to {_number(hi)})"


def _confusion(name: str, classes: list[str], matrix: list[list[int]]) -> list[str]:
    lines = [f"### {_plain(name)}: true class (row), predicted class (column)", ""]
    lines.append("| | " + " | ".join(_plain(c) for c in classes) + " |")
    lines.append("|---" * (len(classes) + 1) + "|")
    for label, row in zip(classes, matrix, strict=True):
        lines.append(f"| **{_plain(label)}** | " + " | ".join(str(n) for n in row) + " |")
    return [*lines, ""]


def _examples(predictions: Predictions) -> list[str]:
    if predictions.generated is None:
        return []
    # Spread over the split rather than its first ones, which may be of one hospital.
    shown = min(_EXAMPLES, len(predictions))
    lines = ["### Generated reports", ""]
    for i in (number * len(predictions) // shown for number in range(shown)):
        lines += [
            f"**{_plain(predictions.specimen_ids[i])}**",
            "",
            f"- generated: {_plain(predictions.generated[i])}",
            f"- true: {_plain(predictions.reports[i])}",
            "",
        ]
    return lines


def _plain(text: str) -> str:
    """Reports and names are data: nothing in them may act as Markdown or HTML."""
    return _ACTIVE.sub(lambda found: "\\" + found[0], normalise(text))

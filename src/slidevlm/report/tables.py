"""Tables of scores: for a terminal, Markdown, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from slidevlm.eval.compare import Difference
from slidevlm.eval.scores import Score
from slidevlm.report.plain import printable

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_SHORTEST = 16  # a column of names is never narrower

Row = tuple[str, ...]


def number(value: float | None) -> str:
    """Three decimals, none from 100 on; "-" where a metric is not defined."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"


def score_table(scores: Sequence[Score], form: str, width: int = 100) -> str:
    """A row a metric: split, metric, value, interval (where any has one), specimens."""
    spread = any(s.lo is not None for s in scores)
    header: Row = ("split", "metric", "value", *(("interval",) if spread else ()), "n")
    rows = [
        (
            s.split,
            s.metric,
            number(s.value),
            *((_interval(s.lo, s.hi),) if spread else ()),
            str(s.n),
        )
        for s in scores
    ]
    return render(header, rows, form, width)


def difference_table(differences: Sequence[Difference], form: str, width: int = 100) -> str:
    """A row a metric: both values, the interval of the difference, p-values."""
    header: Row = ("split", "metric", "value", "other", "difference", "interval", "p", "p (Holm)")
    rows = [
        (
            d.split, d.metric, number(d.value), number(d.other), number(d.difference),
            _interval(d.lo, d.hi), number(d.p), number(d.p_holm),
        )
        for d in differences
    ]  # fmt: skip
    return render(header, rows, form, width)


def _interval(lo: float | None, hi: float | None) -> str:
    known = lo is not None and hi is not None and not math.isnan(lo)
    return f"{number(lo)} to {number(hi)}" if known else ""


def render(header: Row, rows: Sequence[Row], form: str, width: int) -> str:
    """A table in the form table, for a terminal, where no line is longer than `width` columns,
    markdown or latex.
    """
    rows = [tuple(map(printable, row)) for row in rows]  # names of classes are anybody's
    if form == "markdown":
        lines = [header, ("---",) * len(header), *rows]
        return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in lines)
    if form == "latex":
        body = [" & ".join(_latex(c) for c in row) + r" \\" for row in (header, *rows)]
        columns = "ll" + "r" * (len(header) - 2)
        begin = rf"\begin{{tabular}}{{{columns}}}"
        return "\n".join([begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline",
                          r"\end{tabular}"])  # fmt: skip
    return _terminal(header, rows, width)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def _terminal(header: Row, rows: Sequence[Row], width: int) -> str:
    """Split and task once above their metrics, so that names are whole on a narrow terminal too."""
    tasks: dict[str, list[Row]] = {}  # in their first rows' order: metrics of one may lie apart
    for row in rows:
        task = ": ".join(filter(None, (row[0], row[1].rpartition("/")[0])))
        tasks.setdefault(task, []).append(row)
    rows = [row for mine in tasks.values() for row in mine]
    cells = [(row[1].rpartition("/")[2], *row[2:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(("metric", *header[2:]), *cells, strict=True)]
    widths[0] += 2  # indented below the task
    rest = sum(widths[1:]) + 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(_SHORTEST, width - rest))
    lines = [_line(("metric", *header[2:]), widths), "-" * (widths[0] + rest)]
    left = iter(cells)
    for task, members in tasks.items():
        if task:
            lines.append(_short(task, max(width, widths[0] + rest)))
        for first, *others in islice(left, len(members)):
            lines.append(_line((f"  {first}", *others), widths))
    return "\n".join(lines)


def _line(cells: Row, widths: Sequence[int]) -> str:
    first, *others = (_short(cell, w) for cell, w in zip(cells, widths, strict=True))
    padded = [cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)]
    return "  ".join([first.ljust(widths[0]), *padded]).rstrip()


def _short(text: str, width: int) -> str:
    """The text, or its two ends: `zero_shot/spec...balanced_accuracy`."""
    if len(text) <= width:
        return text
    tail = (width - 3) * 2 // 3
    return text[: width - 3 - tail] + "..." + text[len(text) - tail :]

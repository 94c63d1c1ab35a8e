"""Tables of scores: for a terminal, Markdown, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slidevlm.eval.compare import Difference
from slidevlm.eval.scores import Score

FORMATS = ("table", "markdown", "latex")
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
    """A table in one of `FORMATS`; for a terminal no line is longer than `width` columns."""
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
    """Columns of their content's width; the second, of names, gives way, its middle left out."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rest = sum(widths) - widths[1] + 2 * (len(widths) - 1)
    widths[1] = min(widths[1], max(_SHORTEST, width - rest))
    lines = []
    for row in (header, *rows):
        cells = [_short(cell, widths[i]) for i, cell in enumerate(row)]
        padded = [
            cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])
            for i, cell in enumerate(cells)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _short(text: str, width: int) -> str:
    """The text, or its two ends: `zero_shot/spec...balanced_accuracy`."""
    if len(text) <= width:
        return text
    tail = (width - 3) * 2 // 3
    return text[: width - 3 - tail] + "..." + text[len(text) - tail :]

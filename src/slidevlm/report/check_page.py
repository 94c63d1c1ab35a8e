"""The report of `data check`: for a terminal, and as one HTML page that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from slidevlm.data.check import CheckReport, ClassTable, Cohort, Finding, Histogram
from slidevlm.report.plain import printable, shortened, table
from slidevlm.report.policy import closed, policy

_ORDER = {"error": 0, "warning": 1, "note": 2}
_SPLIT_HEADER = ("split", "identifiers", "specimens", "patients", "tiles", "reports", "truncated")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #222; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
th, td { text-align: left; padding: .2em .9em .2em 0; border-bottom: 1px solid #ddd;
  vertical-align: top; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: .15em 0 .5em; } summary { cursor: pointer; color: #555; }
.items { max-height: 20em; overflow: auto; background: #f6f6f6; padding: .4em .8em;
  font-family: ui-monospace, monospace; font-size: 13px; }
.error { color: #a40000; font-weight: 600; } .warning { color: #8a5a00; font-weight: 600; }
.note { color: #555; } .plot { height: 330px; }
"""


def terminal(report: CheckReport) -> str:
    """Everything found, the lists cut short."""
    parts = []
    if report.cohort is not None:
        parts.append(table(("cohort", ""), _cohort(report.cohort)))
    if report.splits:
        parts.append(table(_SPLIT_HEADER, _split_rows(report)))
    for one in report.classes:
        rows = [
            (name, *(counts[i] for counts in one.counts.values()))
            for i, name in enumerate(one.classes)
        ]
        parts.append(table((one.name, *one.counts), rows))
    lines = []
    for finding in _sorted(report.findings):
        lines.append(printable(f"{finding.level}: {finding.topic}: {finding.message}"))
        lines += [f"    {item}" for item in shortened(finding.items)]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else []), verdict(report)])


def verdict(report: CheckReport) -> str:
    """One line."""
    errors, warnings = report.count("error"), report.count("warning")
    if not errors and not warnings:
        return "nothing wrong was found"
    return f"errors: {errors}, warnings: {warnings}"


def page(report: CheckReport, plotly: str) -> str:
    """The page, with the library for its plots inside.

    Args:
        plotly: the source of plotly.js.
    """
    figures = [_histogram_figure(one) for one in report.histograms]
    figures += [_class_figure(one) for one in report.classes]
    calls = "".join(
        f'Plotly.newPlot("plot{i}",{_script(data)},{_script(layout)},'
        '{"displaylogo":false,"responsive":true});'
        for i, (data, layout) in enumerate(figures)
    )
    scripts = [closed(plotly), calls] if figures else []
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(*scripts))}">',
        f"<title>slidevlm data check</title><style>{_STYLE}</style></head><body>",
        f"<h1>Data check</h1><p>{html.escape(verdict(report))}</p>",
        "<h2>Findings</h2>",
        *(_finding(finding) for finding in _sorted(report.findings)),
    ]
    if report.cohort is not None:
        parts += ["<h2>Cohort</h2>", _table(("", ""), _cohort(report.cohort))]
    if report.splits:
        parts += ["<h2>Splits</h2>", _table(_SPLIT_HEADER, _split_rows(report))]
    if figures:
        parts.append("<h2>Distributions</h2>")
        parts += [f'<div class="plot" id="plot{i}"></div>' for i in range(len(figures))]
        parts += [f"<script>{script}</script>" for script in scripts]
    for one in report.classes:
        rows = [(n, *(c[i] for c in one.counts.values())) for i, n in enumerate(one.classes)]
        parts += [f"<h3>{html.escape(one.name)}</h3>", _table(("class", *one.counts), rows)]
    return "\n".join([*parts, "</body></html>", ""])


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: _ORDER[finding.level])


def _cohort(cohort: Cohort) -> list[tuple[str, str]]:
    least, median, most = cohort.length or (0, 0, 0)
    rows = [
        ("data", cohort.path),
        ("format", ", ".join(cohort.formats)),
        ("specimens", f"{cohort.specimens} of {cohort.patients} patients, {cohort.slides} slides"),
        ("tiles", f"{cohort.tiles}; a specimen {least} to {most}, median {median}"),
        ("feature width", ", ".join(map(str, cohort.widths))),
        ("type", ", ".join(cohort.dtypes)),
        ("tile encoder", ", ".join(cohort.encoders)),
        ("positions in", ", ".join(cohort.units) or "(no positions)"),
        ("checksums", f"{cohort.verified} compared" if cohort.verified else "(none in the file)"),
    ]
    return [(name, value) for name, value in rows if value]


def _split_rows(report: CheckReport) -> list[tuple[str | int, ...]]:
    return [
        (s.name, s.identifiers, s.specimens, s.patients, s.tiles, s.reports, s.truncated)
        for s in report.splits
    ]


def _finding(finding: Finding) -> str:
    text = (
        f'<p><span class="{finding.level}">{finding.level}</span> '
        f"{html.escape(finding.topic)}: {html.escape(finding.message)}</p>"
    )
    if not finding.items:
        return text
    items = "<br>".join(html.escape(item) for item in finding.items)
    return (
        f"{text}<details><summary>{len(finding.items)} listed</summary>"
        f'<div class="items">{items}</div></details>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def cell(value: object) -> str:
        kind = ' class="number"' if isinstance(value, int) else ""
        return f"<td{kind}>{html.escape(str(value))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _script(value: Any) -> str:
    """JSON that cannot end the script it stands in."""
    return json.dumps(value).replace("<", "\\u003c")  # which leaves ASCII alone


def _label(text: str) -> str:
    """A text of a plot: plotly reads a little HTML in them, such as links."""
    return html.escape(text)


def _histogram_figure(one: Histogram) -> tuple[list[Any], dict[str, Any]]:
    centres = [(low * high) ** 0.5 for low, high in zip(one.edges[:-1], one.edges[1:], strict=True)]
    widths = [high - low for low, high in zip(one.edges[:-1], one.edges[1:], strict=True)]
    ranges = [
        f"{low:.0f} to {high:.0f} {_label(one.unit)}"
        for low, high in zip(one.edges[:-1], one.edges[1:], strict=True)
    ]
    data = [
        {
            "type": "bar",
            "name": _label(name),
            "x": centres,
            "y": list(counts),
            "width": widths,
            "hovertext": ranges,
            "hoverinfo": "y+text+name",
        }
        for name, counts in one.counts.items()
    ]
    layout = _layout(one.title)
    layout["xaxis"] = {"type": "log", "title": {"text": _label(one.unit)}}
    if one.mark is not None:
        line = {"x0": one.mark, "x1": one.mark, "yref": "paper", "y0": 0, "y1": 1}
        layout["shapes"] = [{"type": "line", **line, "line": {"color": "#a40000", "dash": "dot"}}]
    return data, layout


def _class_figure(one: ClassTable) -> tuple[list[Any], dict[str, Any]]:
    data = []
    for name, counts in one.counts.items():
        total = max(1, sum(counts))
        data.append(
            {
                "type": "bar",
                "name": _label(name),
                "x": [_label(kind) for kind in one.classes],
                "y": [count / total for count in counts],
                "hovertext": [f"{count} of {total}" for count in counts],
                "hoverinfo": "x+text+name",
            }
        )
    layout = _layout(f"Classes of {one.name}")
    layout["barmode"] = "group"
    layout["xaxis"] = {"type": "category"}
    layout["yaxis"] = {"tickformat": ".0%", "title": {"text": "of the labels"}}
    return data, layout


def _layout(title: str) -> dict[str, Any]:
    return {
        "title": {"text": _label(title)},
        "barmode": "stack",
        "margin": {"t": 50, "r": 20, "b": 60, "l": 60},
        "yaxis": {"title": {"text": "specimens"}},
        "showlegend": True,
    }

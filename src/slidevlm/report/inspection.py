"""What `data inspect` found, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slidevlm.data.inspect import LOOKED_AT, BagRow, Inspection
from slidevlm.report.plain import printable, shortened, table

_BAGS = 10  # shown one by one
_WARNINGS = 10  # a problem that names its file is a warning of its own


def terminal(found: Inspection) -> str:
    """A summary, the first bags, warnings and hints."""
    lengths = found.lengths
    rows: list[tuple[str, str]] = [
        ("path", found.path),
        ("format", _counted(found.formats) or "(none known)"),
        ("bags", str(found.bags)),
    ]
    if found.specimens is not None:
        rows.append(("specimens", f"{found.specimens} of {found.patients} patients"))
    for kind, attributes in found.attributes.items():
        rows.append((f"{kind} (attributes)", ", ".join(attributes) or "(none)"))
    if lengths:
        spread = f"; a bag {min(lengths)} to {max(lengths)}, median {int(np.median(lengths))}"
        rows.append(("tiles N", f"{sum(lengths)}{spread if len(lengths) > 1 else ''}"))
    for name, values in (
        ("width D", found.widths),
        ("type", found.values("dtype")),
        ("positions in", found.values("unit") or {"(no positions)": len(lengths)}),
        ("tile encoder", found.values("encoder") or {"(not told)": len(lengths)}),
        ("tile size", found.values("tile_size") or {"(not told)": len(lengths)}),
        ("storage", found.values("storage")),
    ):
        if values:
            rows.append((name, _counted(values)))
    parts = [table(("what", ""), rows), _bags(found.rows)]
    if len(found.rows) < found.bags:
        parts.append(f"{LOOKED_AT} of {found.bags} bags were looked at, evenly spread")
    lines = []
    for text, names in list(found.warnings.items())[:_WARNINGS]:
        lines.append(f"warning: {printable(text)}")
        if names and len(names) < len(found.rows):
            lines.append(f"    {len(names)} of {len(found.rows)}: {', '.join(shortened(names))}")
    if len(found.warnings) > _WARNINGS:
        more = len(found.warnings) - _WARNINGS
        lines.append(f"... and {more} warnings more; --json has them all")
    lines += [f"hint: {hint}" for hint in found.hints]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _counted(values: Mapping[str, int]) -> str:
    """ "a" where all have a, else "a (3), b (2)"."""
    if len(values) == 1:
        return next(iter(values))
    shown = [f"{value} ({count})" for value, count in list(values.items())[:8]]
    return ", ".join(shown) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def _bags(rows: tuple[BagRow, ...]) -> str:
    shown: list[tuple[object, ...]] = [
        (
            row.name,
            "?" if row.length is None else row.length,
            "?" if row.width is None else row.width,
            row.facts.dtype or "",
            row.facts.unit or "",
        )
        for row in rows[:_BAGS]
    ]
    text = table(("bag", "N", "D", "type", "unit"), shown)
    return text + (f"\n... and {len(rows) - _BAGS} more" if len(rows) > _BAGS else "")

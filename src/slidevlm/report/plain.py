"""Tables and lists for a terminal; nothing in the data can act on it."""

from __future__ import annotations

from collections.abc import Sequence

_ITEMS = 5  # shown of what a finding lists


def printable(text: str) -> str:
    """One line without control characters: a name in a file must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their content; numbers to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [
        all(isinstance(row[i], int | float) for row in rows) and bool(rows)
        for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def shortened(items: Sequence[str], width: int = 160) -> list[str]:
    """The first few items, each cut to a line, and how many more there are."""
    lines = []
    for item in items[:_ITEMS]:
        text = printable(item)
        lines.append(text if len(text) <= width else text[: width - 3] + "...")
    if len(items) > _ITEMS:
        lines.append(f"... and {len(items) - _ITEMS} more")
    return lines

"""`slidevlm report`: the page of a run, or of two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from slidevlm.app.page import write_page
from slidevlm.run import configure_logging


@dataclass(frozen=True)
class Reporting:
    """What `slidevlm report` was asked for."""

    run: Path
    other: Path | None
    output: Path | None
    as_json: bool


def report(asked: Reporting) -> Path:
    """Write the page and say where it is.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    places = [asked.run] if asked.other is None else [asked.run, asked.other]
    path = write_page(places, asked.output)
    if asked.as_json:
        print(json.dumps({"page": str(path), "bytes": path.stat().st_size}))
        return path
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MB); open it in a browser")
    return path

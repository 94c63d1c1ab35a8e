"""The page of a run as one HTML file that asks the network for nothing.

Reports, identifiers and names of classes are data from elsewhere. They stand in the page as JSON
that no browser executes, the script sets them as text alone, and the page's own policy admits only
the scripts whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def render(content: Mapping[str, Any], plotly: str) -> str:
    """The page.

    Args:
        content: of `report.content.content`.
        plotly: the source of plotly.js.
    """
    # In one pass, so that nothing in the data is taken for a place of the template.
    script = _closed(_file("page.js"))
    plotly = _closed(plotly)
    names = " and ".join(run["name"] for run in content["runs"])
    parts = {
        "title": html.escape(names),
        "policy": html.escape(_policy(plotly, script)),
        "style": _file("page.css"),
        "data": as_json(content),
        "plotly": plotly,
        "script": script,
    }
    return _PLACE.sub(lambda place: parts[place[1]], _file("page.html"))


def as_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no text


def _file(name: str) -> str:
    return resources.files("slidevlm.report").joinpath(name).read_text(encoding="utf-8")


def _closed(script: str) -> str:
    """A script whose strings cannot end the element it stands in."""
    return re.sub("</(?=script)", "<\\/", script, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    # Plotly writes style attributes; images are the data of slides and of saved plots.
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )

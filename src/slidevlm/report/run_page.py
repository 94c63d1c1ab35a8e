"""The page of a run as one HTML file that asks the network for nothing.

Reports, identifiers and names of classes are data from elsewhere. They stand in the page as JSON
that no browser executes, the script sets them as text alone, and the page's own policy admits only
the scripts whose hashes it names.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from slidevlm.report.policy import closed, policy

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def render(content: Mapping[str, Any], plotly: str) -> str:
    """The page.

    Args:
        content: of `report.content.content`.
        plotly: the source of plotly.js.
    """
    # In one pass, so that nothing in the data is taken for a place of the template.
    script = closed(_file("page.js"))
    plotly = closed(plotly)
    names = " and ".join(run["name"] for run in content["runs"])
    parts = {
        "title": html.escape(names),
        "policy": html.escape(policy(plotly, script)),
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

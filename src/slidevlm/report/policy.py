"""What a page may do: the hashes of its own scripts are admitted, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re


def closed(script: str) -> str:
    """A script whose strings cannot end the element it stands in."""
    return re.sub("</(?=script)", "<\\/", script, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def policy(*scripts: str) -> str:
    """The Content-Security-Policy of a page with these scripts, as they stand in it."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    # Plotly writes style attributes; images are the data of slides and of saved plots.
    return (
        f"default-src 'none'; script-src {hashes or chr(39) + 'none' + chr(39)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )

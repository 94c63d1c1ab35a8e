"""The composition root: the only code that sees the whole Config and builds everything from it.

One file a decision; `runs.py` puts them together.
"""

from __future__ import annotations

from slidevlm.app.runs import train

__all__ = ["train"]

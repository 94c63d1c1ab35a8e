"""Tokens and n-grams, counted once for all scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_TOKEN = re.compile(r"\w+(?:[.\-/]\w+)*|[^\w\s]")


def tokenize(text: str) -> list[str]:
    """Lower-cased words and numbers, inner points, hyphens and slashes kept; no punctuation.

    Simpler than the Penn Treebank tokenizer that published caption scores use; scores of the
    two differ a little.
    """
    return [t for t in _TOKEN.findall(text.lower()) if t[0].isalnum()]


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))

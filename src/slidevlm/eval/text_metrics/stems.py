"""Porter's second English stemmer ("Porter2", snowballstem.org), which METEOR matches stems by."""

from __future__ import annotations

import re
from functools import lru_cache

_V = "aeiouy"
_DOUBLE = re.compile(r"(?:bb|dd|ff|gg|mm|nn|pp|rr|tt)$")
_LI = re.compile(r"[cdeghkmnrt]$")
_SHORT_END = re.compile(r"(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")
_REGION = re.compile(r"[aeiouy][^aeiouy]")
_SPECIAL = {
    "skis": "ski",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "idly": "idl",
    "gently": "gentl",
    "ugly": "ugli",
    "early": "earli",
    "only": "onli",
    "singly": "singl",
    **{w: w for w in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")},
}
_AFTER_1A = frozenset(
    ("inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed")
)
_STEP_2 = (
    ("ational", "ate"),
    ("ization", "ize"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("iveness", "ive"),
    ("tional", "tion"),
    ("biliti", "ble"),
    ("lessli", "less"),
    ("entli", "ent"),
    ("ation", "ate"),
    ("alism", "al"),
    ("aliti", "al"),
    ("ousli", "ous"),
    ("iviti", "ive"),
    ("fulli", "ful"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("abli", "able"),
    ("izer", "ize"),
    ("ator", "ate"),
    ("alli", "al"),
    ("bli", "ble"),
    ("ogi", "og"),
    ("li", ""),
)
_STEP_3 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("alize", "al"),
    ("icate", "ic"),
    ("iciti", "ic"),
    ("ative", ""),
    ("ical", "ic"),
    ("ness", ""),
    ("ful", ""),
)
_SUFFIXES = "ement ance ence able ible ment ant ent ism ate iti ous ive ize ion al er ic"
_STEP_4 = tuple(_SUFFIXES.split())


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """The stem of a lower-case word.

    >>> [stem(w) for w in ("invasion", "invasive", "carcinomas", "differentiated")]
    ['invas', 'invas', 'carcinoma', 'differenti']
    """
    if len(word) <= 2:
        return word
    if word in _SPECIAL:
        return _SPECIAL[word]
    word = word.removeprefix("'")
    word = re.sub(r"(^|[aeiouy])y", r"\1Y", word)
    r1 = _after_region(word, 0)
    for prefix in ("gener", "commun", "arsen"):
        if word.startswith(prefix):
            r1 = len(prefix)
    r2 = _after_region(word, r1)
    word = _step_1a(re.sub(r"(?:'s'|'s|')$", "", word))
    if word in _AFTER_1A:
        return word
    word = _step_1b(word, r1)
    word = re.sub(r"(?<=.[^aeiouy])[yY]$", "i", word)
    word = _step_2(word, r1)
    word = _step_3(word, r1, r2)
    word = _step_4(word, r2)
    return _step_5(word, r1, r2).lower()


def _after_region(word: str, start: int) -> int:
    found = _REGION.search(word, start)
    return found.end() if found else len(word)


def _step_1a(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith(("us", "ss")) or not word.endswith("s"):
        return word
    return word[:-1] if re.search(r"[aeiouy].+s$", word) else word


def _step_1b(word: str, r1: int) -> str:
    for suffix in ("eedly", "eed"):
        if word.endswith(suffix):
            start = len(word) - len(suffix)
            return word[:start] + "ee" if start >= r1 else word
    for suffix in ("ingly", "edly", "ing", "ed"):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            if not re.search("[aeiouy]", rest):
                return word
            if rest.endswith(("at", "bl", "iz")):
                return rest + "e"
            if _DOUBLE.search(rest):
                return rest[:-1]
            if r1 >= len(rest) and _SHORT_END.search(rest):
                return rest + "e"
            return rest
    return word


def _step_2(word: str, r1: int) -> str:
    for suffix, other in _STEP_2:
        if word.endswith(suffix):
            start = len(word) - len(suffix)
            rest = word[:start]
            fits = start >= r1
            if suffix == "ogi":
                fits = fits and rest.endswith("l")
            if suffix == "li":
                fits = fits and _LI.search(rest) is not None
            return rest + other if fits else word
    return word


def _step_3(word: str, r1: int, r2: int) -> str:
    for suffix, other in _STEP_3:
        if word.endswith(suffix):
            start = len(word) - len(suffix)
            return word[:start] + other if start >= (r2 if suffix == "ative" else r1) else word
    return word


def _step_4(word: str, r2: int) -> str:
    for suffix in _STEP_4:
        if word.endswith(suffix):
            start = len(word) - len(suffix)
            fits = start >= r2 and (suffix != "ion" or word[:start].endswith(("s", "t")))
            return word[:start] if fits else word
    return word


def _step_5(word: str, r1: int, r2: int) -> str:
    start = len(word) - 1
    if word.endswith("e"):
        short = _SHORT_END.search(word[:-1]) is not None
        return word[:-1] if start >= r2 or (start >= r1 and not short) else word
    if word.endswith("ll") and start >= r2:
        return word[:-1]
    return word

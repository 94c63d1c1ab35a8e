"""METEOR 1.5 (Denkowski and Lavie, 2014), English, with the parameters for ranking.

Words match when they are equal (weight 1) or have one stem (0.6). With METEOR's own data files
synonyms of WordNet (0.8) and paraphrases (0.6) match too, and its list of function words is used;
then it is the whole of METEOR 1.5, and the score is called `meteor`. Without, function words are a
list of our own and the score is called `meteor_exact_stem`.

The alignment covers most words by weight, in fewest chunks, with the least distance; beams of 40
search it.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.errors import DataError
from slidevlm.eval.text_metrics.stems import stem

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_EXACT, _STEM, _SYNONYM, _PARAPHRASE = 1.0, 0.6, 0.8, 0.6
_BEAM = 40

# Frequent words that say little by themselves; METEOR's list is of frequent words too.
_FREQUENT = (
    "a about after all also an and are as at be been but by can could first for from had has have "
    "he her his if in into is it its last more new no not of on one or other out over said she so "
    "some than that the their there they this time to two up was we were what when which who will "
    "with would you 's -lrb- -rrb-"
)
FUNCTION_WORDS = frozenset(_FREQUENT.split())


@dataclass(frozen=True)
class MeteorData:
    """Synonyms, paraphrases and function words of METEOR's own distribution.

    Args:
        function_words: words that weigh less.
        synonyms: word -> numbers of its sets of synonyms.
        paraphrases: phrase -> phrases that may stand for it.
    """

    function_words: frozenset[str] = FUNCTION_WORDS
    synonyms: dict[str, frozenset[str]] = field(default_factory=dict)
    paraphrases: dict[tuple[str, ...], set[tuple[str, ...]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the score is called."""
        return "meteor" if self.synonyms else "meteor_exact_stem"


def read_data(folder: Path) -> MeteorData:
    """The data of METEOR 1.5 from the folder that has meteor-1.5.jar and data/paraphrase-en.gz.

    Raises:
        DataError: a file is missing, or not what it should be.
    """
    jar, table = folder / "meteor-1.5.jar", folder / "data" / "paraphrase-en.gz"
    for file in (jar, table):
        if not file.is_file():
            raise DataError(
                f"METEOR's data: no {file}; give the folder of METEOR 1.5 with meteor-1.5.jar and "
                "data/paraphrase-en.gz (pycocoevalcap/meteor has both)"
            )
    try:
        with zipfile.ZipFile(jar) as archive:
            words = archive.read("function/english.words").decode().split()
            synsets = archive.read("synonym/english.synsets").decode().splitlines()
            exceptions = archive.read("synonym/english.exceptions").decode().splitlines()
        with gzip.open(table, "rt", encoding="utf-8") as pairs:
            lines = pairs.read().splitlines()
        synonyms = {w: frozenset(s.split()) for w, s in zip(synsets[::2], synsets[1::2])}  # noqa: B905
        for form, base in zip(exceptions[::2], exceptions[1::2]):  # noqa: B905
            if base in synonyms:
                synonyms[form] = synonyms.get(form, frozenset()) | synonyms[base]
        paraphrases: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for one, other in zip(lines[1::3], lines[2::3], strict=True):
            paraphrases.setdefault(tuple(one.split()), set()).add(tuple(other.split()))
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"METEOR's data in {folder} cannot be read: {error}") from error
    return MeteorData(frozenset(words), synonyms, paraphrases)


@dataclass(frozen=True)
class Match:
    """A run of words of the generated text that stands for one of the reference."""

    start: int
    length: int
    other: int  # where in the reference
    other_length: int
    weight: float


def statistics(
    generated: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    data: MeteorData = MeteorData(),
) -> np.ndarray:
    """[N, 6]: weighted words of both texts, weighted matches of both, matches, chunks."""
    rows = [_one(c, r, data) for c, r in zip(generated, references, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def finish(sums: np.ndarray) -> np.ndarray:
    """[..., 6] sums -> [...] METEOR, as of one text."""
    words, others, matched, other_matched, matches, chunks = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = matched / words, other_matched / others
        mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        penalty = _GAMMA * (chunks / matches) ** _BETA
        return np.nan_to_num((1 - penalty) * mean, nan=0.0)


def _one(candidate: Sequence[str], reference: Sequence[str], data: MeteorData) -> list[float]:
    found = align(candidate, reference, data)
    chunks, end = 0, (-1, -1)
    for match in found:
        chunks += (match.start, match.other) != end
        end = match.start + match.length, match.other + match.other_length
    ours, theirs = sum(m.length for m in found), sum(m.other_length for m in found)
    # The same text is one chunk, which costs nothing.
    whole = chunks == 1 and ours == len(candidate) and theirs == len(reference)
    return [
        _weigh(candidate, data),
        _weigh(reference, data),
        sum(m.weight * _weigh(candidate[m.start : m.start + m.length], data) for m in found),
        sum(m.weight * _weigh(reference[m.other : m.other + m.other_length], data) for m in found),
        (ours + theirs) / 2,
        0 if whole else chunks,
    ]


def _weigh(words: Sequence[str], data: MeteorData) -> float:
    function = sum(word in data.function_words for word in words)
    return _DELTA * (len(words) - function) + (1 - _DELTA) * function


# (-weighted words covered, chunks, distance, words of the candidate used as bits, where a match
# must begin to be of the same chunk: in candidate and reference; number; matches). Less is better.
# The matches are the last one and a link to those before; the number before them settles every tie.
_Path = tuple[float, int, int, int, int, int, int, Any]


def align(
    candidate: Sequence[str],
    reference: Sequence[str],
    data: MeteorData = MeteorData(),
) -> tuple[Match, ...]:
    """The best alignment, in the order of the reference, along which it is searched."""
    possible: list[list[Match]] = [[] for _ in reference]
    rivals = [0] * len(candidate)
    for match in (m for ms in _possible(candidate, reference, data) for m in ms):
        possible[match.other].append(match)
        for place in range(match.start, match.start + match.length):
            rivals[place] += 1
    waiting: list[list[_Path]] = [[] for _ in range(len(reference) + 1)]
    waiting[0] = [(0.0, 0, 0, 0, -1, -1, 0, None)]
    busy = number = 0  # words before `busy` may be within a phrase that began earlier
    for place, matches in enumerate(possible):
        # Of a pair without rivals nothing is gained by leaving it out.
        sure = len(matches) == 1 and rivals[matches[0].start] == 1 and place >= busy
        sure = sure and matches[0].length == matches[0].other_length == 1
        busy = max([busy, *(place + m.other_length for m in matches if m.other_length > 1)])
        for path in _best(waiting[place]):
            covered, chunks, distance, used, start, other, _, link = path
            for match in matches:
                bits = ((1 << match.length) - 1) << match.start
                if not used & bits:
                    number += 1
                    waiting[place + match.other_length].append(
                        (
                            covered - match.weight * (match.length + match.other_length),
                            chunks + (start != match.start or other != place),
                            distance + abs(match.start - place),
                            used | bits,
                            match.start + match.length,
                            place + match.other_length,
                            number,
                            (match, link),
                        )
                    )
            if not sure:
                waiting[place + 1].append(path)
    found, link = [], min(waiting[-1])[-1]
    while link is not None:
        match, link = link
        found.append(match)
    return tuple(reversed(found))


def _best(paths: list[_Path]) -> list[_Path]:
    """The beam: of paths with one future the best alone."""
    if len(paths) == 1:
        return paths
    kept: dict[tuple[int, int, int], _Path] = {}
    for path in sorted(paths):
        kept.setdefault(path[3:6], path)
        if len(kept) == _BEAM:
            break
    return list(kept.values())


def _possible(
    candidate: Sequence[str], reference: Sequence[str], data: MeteorData
) -> list[list[Match]]:
    """What the words of the candidate may be matched with, by where it begins."""
    where: dict[str, list[int]] = {}
    stems: dict[str, list[int]] = {}
    for j, word in enumerate(reference):
        where.setdefault(word, []).append(j)
        stems.setdefault(stem(word), []).append(j)
    found: list[list[Match]] = []
    for i, word in enumerate(candidate):
        weights = dict.fromkeys(where.get(word, ()), _EXACT)
        for j in stems.get(stem(word), ()):
            weights.setdefault(j, _STEM)
        mine = data.synonyms.get(word)
        if mine:
            for j, other in enumerate(reference):
                if mine & data.synonyms.get(other, frozenset()):
                    weights.setdefault(j, _SYNONYM)
        matches = [Match(i, 1, j, 1, w) for j, w in sorted(weights.items())]
        found.append(matches + _paraphrases(candidate, i, reference, data, weights))
    return found


def _paraphrases(
    candidate: Sequence[str],
    place: int,
    reference: Sequence[str],
    data: MeteorData,
    single: dict[int, float],
) -> list[Match]:
    if not data.paraphrases:
        return []
    found = []
    for length in range(1, min(7, len(candidate) - place) + 1):
        for other in data.paraphrases.get(tuple(candidate[place : place + length]), ()):
            n = len(other)
            for j in range(len(reference) - n + 1):
                if tuple(reference[j : j + n]) == other and not (length == n == 1 and j in single):
                    found.append(Match(place, length, j, n, _PARAPHRASE))
    return found

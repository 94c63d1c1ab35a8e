"""METEOR 1.5 (Denkowski and Lavie, 2014), English, with the parameters for ranking.

Words match when they are equal (weight 1) or have one stem (0.6). With METEOR's own data
synonyms of WordNet (0.8) and paraphrases (0.6) match too; then it is the whole of METEOR 1.5 and
the score is called `meteor`. Without it is called `meteor_exact_stem`.

Of the alignments that there may be METEOR takes what its search finds, so the search is part of the
score. It is kept here with its peculiarities, see `_search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from slidevlm.eval.text_metrics.meteor_data import MeteorData, Paraphrases
from slidevlm.eval.text_metrics.stems import stem

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_EXACT, _STEM, _SYNONYM, _PARAPHRASE = 1.0, 0.6, 0.8, 0.6
_BEAM = 40
_NOTHING = MeteorData()
_CHUNK, _WORD = 1 << 24, 1 << 48  # in the order of paths: more words, fewer chunks, less distance


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
    data: MeteorData = _NOTHING,
) -> np.ndarray:
    """[N, 6]: weighted words of both texts, weighted matches of both, matches, chunks.

    Raises:
        DataError: the paraphrases of `data` cannot be read.
    """
    pairs = list(zip(generated, references, strict=True))
    phrases = data.paraphrases({word for pair in pairs for text in pair for word in text})
    rows = [_one(candidate, reference, data, phrases) for candidate, reference in pairs]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def finish(sums: np.ndarray) -> np.ndarray:
    """[..., 6] sums -> [...] METEOR, as of one text."""
    words, others, matched, other_matched, matches, chunks = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = matched / words, other_matched / others
        mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        penalty = _GAMMA * (chunks / matches) ** _BETA
        return np.nan_to_num((1 - penalty) * mean, nan=0.0)


def _one(
    candidate: Sequence[str], reference: Sequence[str], data: MeteorData, phrases: Paraphrases
) -> list[float]:
    found = align(candidate, reference, data, phrases)
    chunks, end = 0, (-1, -1)
    for match in found:
        chunks += (match.start, match.other) != end
        end = match.start + match.length, match.other + match.other_length
    ours, theirs = sum(m.length for m in found), sum(m.other_length for m in found)
    # A text that is matched as a whole is one chunk, which costs nothing, in a corpus neither.
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


def align(
    candidate: Sequence[str],
    reference: Sequence[str],
    data: MeteorData = _NOTHING,
    phrases: Paraphrases | None = None,
) -> tuple[Match, ...]:
    """The alignment that METEOR 1.5 takes, in the order of the reference.

    Args:
        phrases: the paraphrases of these words; by default they are read from `data`.
    """
    if phrases is None:
        phrases = data.paraphrases({*candidate, *reference})
    possible = _possible(candidate, reference, data, phrases)
    covered = [0] * len(candidate), [0] * len(reference)
    for match in (m for matches in possible for m in matches):
        for place in range(match.start, match.start + match.length):
            covered[0][place] += 1
        for place in range(match.other, match.other + match.other_length):
            covered[1][place] += 1
    fixed = [_without_rivals(matches, covered) for matches in possible]
    return _search(possible, fixed)


def _without_rivals(matches: Sequence[Match], covered: tuple[list[int], list[int]]) -> bool:
    """Is there one match here, and no other of any of its words? Then it is never left out."""
    if len(matches) != 1:
        return False
    m = matches[0]
    ours = covered[0][m.start : m.start + m.length]
    theirs = covered[1][m.other : m.other + m.other_length]
    return set(ours) == set(theirs) == {1}


# Rank (less is better), next word of the reference, word of the candidate after the last match (-1:
# no chunk is open), words of the candidate used as bits, matches: the last and those before.
_Path = tuple[int, int, int, int, Any]


def _search(possible: Sequence[Sequence[Match]], fixed: Sequence[bool]) -> tuple[Match, ...]:
    """METEOR's beam search, word by word of the reference; ties stay in order of discovery.

    Best are most words by weight, in fewest chunks, with the least distance, but
    - the weighted words of a match are rounded down: one by stem or synonym alone counts as none;
    - a chunk counts when it has ended;
    - the distance of a match is charged to the path that leaves it out, and to those that take
      another match of this word later on, instead of to the path that takes it;
    - of the paths with the same words used all are kept, so that they fill the beam.
    """
    paths: list[_Path] = [(0, 0, -1, 0, None)]
    for place, matches in enumerate(possible):
        paths.sort(key=itemgetter(0))
        after: list[_Path] = []
        steps = [_step(match) for match in matches]
        for path in paths[:_BEAM]:
            rank, word, end, used, link = path
            if word > place:  # within a phrase
                after.append(path)
                continue
            for match, bits, gain, distance in steps:
                if used & bits:
                    continue
                broken = end not in (-1, match.start)
                after.append(
                    (
                        rank - gain + broken * _CHUNK + fixed[place] * distance,
                        place + match.other_length,
                        match.start + match.length,
                        used | bits,
                        (match, link),
                    )
                )
                rank += distance
            if not fixed[place]:
                after.append((rank + (end != -1) * _CHUNK, place + 1, -1, used, link))
        paths = after
    paths.sort(key=itemgetter(0))
    link = min(paths[:_BEAM], key=lambda p: p[0] + (p[2] != -1) * _CHUNK)[-1]
    found = []
    while link is not None:
        match, link = link
        found.append(match)
    return tuple(reversed(found))


def _step(match: Match) -> tuple[Match, int, int, int]:
    """A match, its words of the candidate as bits, its gain in rank and its distance."""
    words = int(match.weight * match.length) + int(match.weight * match.other_length)
    bits = ((1 << match.length) - 1) << match.start
    return match, bits, words * _WORD, abs(match.start - match.other)


def _possible(
    candidate: Sequence[str],
    reference: Sequence[str],
    data: MeteorData,
    phrases: Paraphrases,
) -> list[list[Match]]:
    """What may be matched with the words of the reference, by where it begins there.

    A pair that matches in several ways is there several times, as in METEOR; so are paraphrases,
    which are looked up from both texts. Of equal texts only equal words are matched.
    """
    found: list[list[Match]] = [[] for _ in reference]
    where = _places(candidate)
    for j, word in enumerate(reference):
        found[j] += [Match(i, 1, j, 1, _EXACT) for i in where.get(word, ())]
    if list(candidate) == list(reference):
        return found
    where = _places([stem(word) for word in candidate])
    for j, word in enumerate(reference):
        others = (i for i in where.get(stem(word), ()) if candidate[i] != word)
        found[j] += [Match(i, 1, j, 1, _STEM) for i in others]
    if data.synsets:
        mine = [data.synonyms(word) for word in candidate]
        for j, word in enumerate(reference):
            sets = data.synonyms(word)
            others = (i for i, s in enumerate(mine) if sets & s and candidate[i] != word)
            found[j] += [Match(i, 1, j, 1, _SYNONYM) for i in others]
    for j, n, i, m in _paraphrased(reference, candidate, phrases):
        found[j].append(Match(i, m, j, n, _PARAPHRASE))
    for i, m, j, n in _paraphrased(candidate, reference, phrases):
        found[j].append(Match(i, m, j, n, _PARAPHRASE))
    return found


def _places(words: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, word in enumerate(words):
        found.setdefault(word, []).append(place)
    return found


def _paraphrased(
    text: Sequence[str],
    other: Sequence[str],
    phrases: Paraphrases,
) -> list[tuple[int, int, int, int]]:
    """Start and length of phrases of `text` and of what stands for them in `other`."""
    if not phrases:
        return []
    longest = max(map(len, phrases))
    where = _places(other)
    found = []
    for i in range(len(text)):
        for m in range(1, min(longest, len(text) - i) + 1):
            for phrase in phrases.get(tuple(text[i : i + m]), ()):
                n = len(phrase)
                found += [
                    (i, m, j, n)
                    for j in where.get(phrase[0], ())
                    if tuple(other[j : j + n]) == phrase
                ]
    return found

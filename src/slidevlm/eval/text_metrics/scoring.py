"""All scores of generated reports against the true ones, counted once and resampled as arrays.

Each score is a function of sums over reports, or of which reports are there; so a bootstrap is a
product of counts and statistics, and no text is looked at again. CIDEr's document frequencies are
those of all references, also on a resample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from slidevlm.eval.text_metrics import bleu, cider, clinical, meteor, rouge
from slidevlm.eval.text_metrics.clinical import Extractor, read_extractor
from slidevlm.eval.text_metrics.meteor_data import MeteorData
from slidevlm.eval.text_metrics.ngrams import ngrams
from slidevlm.eval.text_metrics.ptb import tokenize

# n texts -> [n, E]; what a text names -> its entities.
Embed = Callable[[Sequence[str]], np.ndarray]
Entities = Callable[[str], frozenset[str]]

_BLOCK = 20_000_000  # numbers of a block of resamples of single n-grams


@dataclass(frozen=True)
class Scoring:
    """How reports are scored.

    Args:
        extractor: of clinical values.
        meteor: data for METEOR; without its own, matches are exact or by stem.
        embed: for REG2025's score, which is not computed without.
        entities: for its keywords; by default the clinical values of a report.
    """

    extractor: Extractor = field(default_factory=read_extractor)
    meteor: MeteorData = field(default_factory=MeteorData)
    embed: Embed | None = None
    entities: Entities | None = None

    def count(self, generated: Sequence[str], references: Sequence[str]) -> Counted:
        """Count everything that the scores of these N pairs of texts need."""
        ours, theirs = ([tokenize(t) for t in texts] for texts in (generated, references))
        said, meant = ([self.extractor(t) for t in texts] for texts in (generated, references))
        fields = list(self.extractor.fields)
        means = _means(generated, references, ours, theirs)
        means["rouge_l"] = rouge.statistics(ours, theirs)
        means["cider"], means["cider_plain"] = cider.both(ours, theirs).T
        counted = bleu.statistics(ours, theirs)
        named = self._named(generated, said), self._named(references, meant)
        means["keyword_jaccard"] = np.array([_jaccard(a, b) for a, b in zip(*named, strict=True)])
        if self.embed is not None:
            means["embedding_similarity"] = _similarity(self.embed, generated, references)
            alone = bleu.finish(counted)["bleu_4"]
            means["reg2025"] = (
                0.15 * (means["rouge_l"] + alone)
                + 0.4 * means["keyword_jaccard"]
                + 0.3 * means["embedding_similarity"]
            )
        return Counted(
            bleu=counted,
            meteor=meteor.statistics(ours, theirs, self.meteor),
            meteor_name=self.meteor.name,
            clinical=clinical.statistics(said, meant, fields),
            fields=tuple(fields),
            means=means,
            lengths=np.array([[len(a), len(b)] for a, b in zip(ours, theirs, strict=True)]),
            texts=np.unique(np.asarray(generated, dtype=object), return_inverse=True)[1],
            grams={n: _Grams.of(ours, n) for n in (1, 2)},
        )

    def _named(
        self, texts: Sequence[str], values: Sequence[Mapping[str, frozenset[str]]]
    ) -> list[frozenset[str]]:
        if self.entities is not None:
            return [self.entities(text) for text in texts]
        return [frozenset(f"{f}: {v}" for f, vs in each.items() for v in vs) for each in values]


@dataclass(frozen=True)
class _Grams:
    """Which reports have which distinct n-gram, as pairs ordered by n-gram."""

    reports: np.ndarray  # [P] number of the report
    starts: np.ndarray  # [G] where each n-gram's pairs begin
    totals: np.ndarray  # [N] n-grams of each report

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], n: int) -> _Grams:
        number: dict[tuple[str, ...], int] = {}
        pairs = [
            (number.setdefault(gram, len(number)), i)
            for i, text in enumerate(texts)
            for gram in ngrams(text, n)
        ]
        table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
        starts = np.flatnonzero(np.diff(table[:, 0], prepend=-1))
        totals = np.array([max(0, len(t) - n + 1) for t in texts], dtype=np.float64)
        return cls(table[:, 1], starts, totals)

    def distinct(self, counts: np.ndarray) -> np.ndarray:
        """[N, R] counts -> [R] distinct n-grams over all n-grams; NaN without any."""
        total = self.totals @ counts
        found = np.zeros(counts.shape[1])
        step = max(1, _BLOCK // max(1, len(self.reports)))
        for start in range(0, counts.shape[1] if len(self.starts) else 0, step):
            there = counts[self.reports, start : start + step] > 0
            found[start : start + step] = np.logical_or.reduceat(there, self.starts, axis=0).sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(found / total)


@dataclass(frozen=True)
class Counted:
    """What the scores of N pairs need; `values` turns counts of the pairs into scores."""

    bleu: np.ndarray  # [N, 10]
    meteor: np.ndarray  # [N, 6]
    meteor_name: str
    clinical: np.ndarray  # [N, F, 3]
    fields: tuple[str, ...]
    means: dict[str, np.ndarray]  # name -> [N], of which the mean is the score
    lengths: np.ndarray  # [N, 2] tokens, generated and true
    texts: np.ndarray  # [N] number of the generated text: equal texts, equal numbers
    grams: dict[int, _Grams]

    def __len__(self) -> int:
        return len(self.bleu)

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[N, R], how often each pair counts -> [R] values of every score."""
        weights = np.ascontiguousarray(counts.T, dtype=np.float64)  # [R, N]
        total = weights.sum(1)
        found = dict(bleu.finish(weights @ self.bleu))
        stacked = weights @ np.stack(list(self.means.values()), axis=1) / total[:, None]
        means = dict(zip(self.means, stacked.T, strict=True))
        found["rouge_l"] = means.pop("rouge_l")
        found[self.meteor_name] = meteor.finish(weights @ self.meteor)
        found |= means
        lengths = weights @ self.lengths
        found["length_ratio"] = lengths[:, 0] / np.maximum(lengths[:, 1], 1)
        order = np.argsort(self.texts, kind="stable")
        starts = np.flatnonzero(np.diff(self.texts[order], prepend=-1))
        found["most_frequent_share"] = (
            np.add.reduceat(weights[:, order], starts, axis=1).max(1) / total
        )
        found |= {f"distinct_{n}": g.distinct(counts) for n, g in self.grams.items()}
        flat = weights @ self.clinical.reshape(len(self), -1)
        return found | clinical.finish(flat.reshape(-1, len(self.fields), 3), self.fields)

    def scores(self) -> dict[str, float]:
        """Of all pairs, each once."""
        return {k: float(v[0]) for k, v in self.values(np.ones((len(self), 1))).items()}


def _means(
    generated: Sequence[str],
    references: Sequence[str],
    ours: Sequence[Sequence[str]],
    theirs: Sequence[Sequence[str]],
) -> dict[str, np.ndarray]:
    pairs = list(zip(ours, theirs, strict=True))
    texts = zip(generated, references, strict=True)
    return {
        "exact_match": np.array([" ".join(a.split()) == " ".join(b.split()) for a, b in texts])
        * 1.0,
        "same_tokens": np.array([a == b for a, b in pairs], dtype=np.float64),
        "repetition_4": np.array([_repetition(a, 4) for a in ours], dtype=np.float64),
    }


def _repetition(tokens: Sequence[str], n: int) -> float:
    """Share of a text's n-grams that it has had before (Welleck et al., 2020)."""
    total = len(tokens) - n + 1
    return 1 - len(ngrams(tokens, n)) / total if total > 0 else 0.0


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Of two sets; 1 where both are empty."""
    return len(a & b) / len(a | b) if a | b else 1.0


def _similarity(embed: Embed, generated: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[N] cosines; 0 for an embedding of length 0."""
    a, b = (np.asarray(embed(texts), dtype=np.float64) for texts in (generated, references))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.where(norms > 0, norms, 1.0))

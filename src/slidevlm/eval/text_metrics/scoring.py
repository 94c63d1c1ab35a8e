"""All scores of generated reports against the true ones, counted once and resampled as arrays.

Each score is a function of sums over reports, or of which reports are there; so a bootstrap is a
product of counts and statistics, and no text is looked at again. CIDEr's document frequencies are
those of all references, also on a resample.

`most_frequent_share` and `distinct_n` have no resamples. They are about how often texts recur, and
in a resample a third of the draws are of a report that is there already: it looks less diverse than
the reports that it is of, so that an interval of percentiles would lie beside the value.
"""

from __future__ import annotations

import math
from collections import Counter
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
        means["cider"], means["cider_plain"] = cider.statistics(ours, theirs).T
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
            diversity=_diversity(generated, ours),
        )

    def _named(
        self, texts: Sequence[str], values: Sequence[Mapping[str, frozenset[str]]]
    ) -> list[frozenset[str]]:
        if self.entities is not None:
            return [self.entities(text) for text in texts]
        return [frozenset(f"{f}: {v}" for f, vs in each.items() for v in vs) for each in values]


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
    diversity: dict[str, float]  # scores of all generated reports together

    def __len__(self) -> int:
        return len(self.bleu)

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[N, R], how often each pair counts -> [R] values of every score that has resamples."""
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
        flat = weights @ self.clinical.reshape(len(self), -1)
        return found | clinical.finish(flat.reshape(-1, len(self.fields), 3), self.fields)

    def scores(self) -> dict[str, float]:
        """Of all pairs, each once."""
        found = {k: float(v[0]) for k, v in self.values(np.ones((len(self), 1))).items()}
        return found | self.diversity


def _diversity(generated: Sequence[str], tokens: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of the most frequent report; distinct over all n-grams, NaN without any."""
    share = max(Counter(generated).values()) / len(generated) if generated else math.nan
    found = {"most_frequent_share": share}
    for n in (1, 2):
        total = sum(max(0, len(text) - n + 1) for text in tokens)
        distinct = len({gram for text in tokens for gram in ngrams(text, n)})
        found[f"distinct_{n}"] = distinct / total if total else math.nan
    return found


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

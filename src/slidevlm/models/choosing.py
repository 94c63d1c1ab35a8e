"""Which of several drafts of a slide's report is the best.

- likelihood: the one with the highest score.
- consensus: the one whose words agree most with the others': of draws from the model, the one with
  the least expected loss (minimum Bayes risk; Kumar and Byrne, 2004; Eikema and Aziz, 2022). What a
  single draw says by chance, others do not say.
- similarity: the one whose embedding is nearest to the slide's, as the model's own contrastive side
  has learned it.
- both: the one with the highest sum of consensus and half of similarity, each in standard
  deviations over the drafts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slidevlm.errors import ConfigError
from slidevlm.models.coca import CoCa
from slidevlm.models.decoding import Decoding, Draft
from slidevlm.models.language import LanguageModel

# Tokens of a report, without BOS, prompt and EOS -> its words, as those who score it count them.
Words = Callable[[Sequence[int]], Sequence[str]]

_ORDERS = (1, 2, 3, 4)  # lengths of the runs of words that are compared
_RECALL = 0.85  # weight of recall against precision, that of METEOR (Denkowski and Lavie, 2014)
# Of similarity in both. More names organ and type more often and says less of what reports usually
# say: docs/results.md has the scores from 0 to 2.
_NEARNESS = 0.5
_TINY = 1e-9
_SIMILARITY = ("similarity", "both")  # these need an embedding of the slide
_CONSENSUS = ("consensus", "both")  # these need words


class Chooser:
    """Ranks the drafts of slides.

    Args:
        model: what wrote them.
        image: [B, E] embeddings of the slides; None of a language model.
        prompt: tokens that every report begins with, after BOS.
        decoding: `choose` and `best`.
        words: of a draft; None where it is not chosen by consensus.

    Raises:
        ConfigError: similarity is asked of a language model, or consensus without words.
    """

    def __init__(
        self,
        model: CoCa | LanguageModel,
        image: Tensor | None,
        prompt: Sequence[int],
        decoding: Decoding,
        words: Words | None,
    ) -> None:
        if decoding.choose in _SIMILARITY and image is None:
            raise ConfigError(
                f"choose {decoding.choose} compares reports with the slide's embedding, which a "
                "language model has not; choose by consensus or likelihood"
            )
        if decoding.choose in _CONSENSUS and words is None:
            raise ConfigError(
                f"choose {decoding.choose} compares the words of reports; give words, which makes "
                "them of a report's tokens"
            )
        self.model, self.image, self.words = model, image, words
        self.prompt, self.decoding = tuple(prompt), decoding

    def best(self, slide: int, drafts: Sequence[Draft]) -> list[Draft]:
        """The best of a slide's drafts, which are ranked by score; each with its merit."""
        if self.decoding.choose != "likelihood":
            merits = self._merits(slide, drafts)
            rated = [replace(d, merit=m) for d, m in zip(drafts, merits, strict=True)]
            drafts = sorted(rated, key=lambda d: -(d.merit or 0.0))
        return list(drafts[: self.decoding.best])

    def _merits(self, slide: int, drafts: Sequence[Draft]) -> list[float]:
        choose, times = self.decoding.choose, [d.times for d in drafts]
        if choose == "similarity":
            return self._similarities(slide, drafts)
        assert self.words is not None, "made sure of at the beginning"
        agreements = agreement([self.words(d.tokens) for d in drafts], times)
        if choose == "consensus":
            return agreements
        parts = (standardised(x, times) for x in (agreements, self._similarities(slide, drafts)))
        return [agree + _NEARNESS * near for agree, near in zip(*parts, strict=True)]

    def _similarities(self, slide: int, drafts: Sequence[Draft]) -> list[float]:
        assert self.image is not None, "made sure of at the beginning"
        rows: list[float] = (self._embed(drafts) @ self.image[slide]).tolist()
        return rows

    def _embed(self, drafts: Sequence[Draft]) -> Tensor:
        """Embeddings [C, E] of the drafts, read as training reads reports."""
        assert self.image is not None and isinstance(self.model, CoCa)
        decoding, room = self.decoding, self.model.text.context_length - 1
        texts = [[decoding.bos_id, *self.prompt, *d.tokens][:room] for d in drafts]
        texts = [[*text, decoding.eos_id] for text in texts]
        longest, device = max(map(len, texts)), self.image.device
        padded = [[*text, *[decoding.pad_id] * (longest - len(text))] for text in texts]
        lengths = torch.tensor([len(text) for text in texts], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        return self.model.encode_text(torch.tensor(padded, device=device), mask)


def agreement(texts: Sequence[Sequence[Hashable]], times: Sequence[int]) -> list[float]:
    """How much each of C texts agrees with the others, from 0 to 1.

    A text agrees with another by the F score of its runs of 1, 2, 3 and 4 words, averaged over
    the four. Recall counts more than precision: what others say and a text leaves out is the
    greater fault, as in METEOR.

    Args:
        texts: the words of each.
        times: that each came up; it agrees with itself where that is more than once.
    """
    weights = torch.tensor(times, dtype=torch.float64)
    others = weights.repeat(len(texts), 1) - torch.eye(len(texts), dtype=torch.float64)
    alike = torch.stack([_alike(_counts(texts, order)) for order in _ORDERS]).mean(0)
    rows: list[float] = ((alike * others).sum(1) / others.sum(1).clamp_min(1)).tolist()
    return rows


def standardised(values: Sequence[float], times: Sequence[int]) -> list[float]:
    """Values less their mean, over their standard deviation; each counted so many times.

    All 0 where they are the same.
    """
    total = sum(times)
    mean = sum(v * n for v, n in zip(values, times, strict=True)) / total
    variance = sum((v - mean) ** 2 * n for v, n in zip(values, times, strict=True)) / total
    return [(v - mean) / max(math.sqrt(variance), _TINY) for v in values]


def _alike(counts: Tensor) -> Tensor:
    """F scores [C, C] of counts [C, G], each row's text against all: 0 where there is no run."""
    totals = counts.sum(1)
    shared = torch.stack([torch.minimum(row, counts).sum(1) for row in counts])
    return shared / (_RECALL * totals + (1 - _RECALL) * totals[:, None]).clamp_min(_TINY)


def _counts(texts: Sequence[Sequence[Hashable]], order: int) -> Tensor:
    """How often each text has each run of `order` words: [C, G] float64."""
    number: dict[tuple[Hashable, ...], int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for run in zip(*(text[i:] for i in range(order)), strict=False):
            rows.append(row)
            columns.append(number.setdefault(run, len(number)))
    counts = torch.zeros(len(texts), len(number), dtype=torch.float64)
    places = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    return counts.index_put_(places, torch.ones(len(rows), dtype=torch.float64), accumulate=True)

"""Which of several drafts of a slide's report is the best.

- likelihood: the one with the highest score.
- consensus: the one that agrees most with the others: of draws from the model, the one with the
  least expected loss (minimum Bayes risk; Kumar and Byrne, 2004; Eikema and Aziz, 2022). What a
  single draw says by chance, others do not say.
- similarity: the one whose embedding is nearest to the slide's, as the model's own contrastive side
  has learned it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slidevlm.errors import ConfigError
from slidevlm.models.coca import CoCa
from slidevlm.models.decoding import Decoding, Draft
from slidevlm.models.language import LanguageModel

_ORDERS = (1, 2, 3, 4)  # lengths of the runs of tokens that are compared


class Chooser:
    """Ranks the drafts of slides.

    Args:
        model: what wrote them.
        image: [B, E] embeddings of the slides; None of a language model.
        prompt: tokens that every report begins with, after BOS.
        decoding: `choose` and `best`.

    Raises:
        ConfigError: similarity is asked of a language model.
    """

    def __init__(
        self,
        model: CoCa | LanguageModel,
        image: Tensor | None,
        prompt: Sequence[int],
        decoding: Decoding,
    ) -> None:
        if decoding.choose == "similarity" and image is None:
            raise ConfigError(
                "choose similarity compares reports with the slide's embedding, which a language "
                "model has not; choose by consensus or likelihood"
            )
        self.model, self.image = model, image
        self.prompt, self.decoding = tuple(prompt), decoding

    def best(self, slide: int, drafts: Sequence[Draft]) -> list[Draft]:
        """The best of a slide's drafts, which are ranked by score; each with its merit."""
        if self.decoding.choose != "likelihood":
            merits = self._merits(slide, drafts)
            rated = [replace(d, merit=m) for d, m in zip(drafts, merits, strict=True)]
            drafts = sorted(rated, key=lambda d: -(d.merit or 0.0))
        return list(drafts[: self.decoding.best])

    def _merits(self, slide: int, drafts: Sequence[Draft]) -> list[float]:
        if self.decoding.choose == "consensus":
            return agreement([d.tokens for d in drafts], [d.times for d in drafts])
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


def agreement(texts: Sequence[Sequence[int]], times: Sequence[int]) -> list[float]:
    """How much each of C texts agrees with the others, from 0 to 1.

    Two texts agree by the F1 of their runs of 1, 2, 3 and 4 tokens, averaged over the four.

    Args:
        texts: different from each other.
        times: that each came up; it agrees with itself where that is more than once.
    """
    weights = torch.tensor(times, dtype=torch.float64)
    others = weights.repeat(len(texts), 1) - torch.eye(len(texts), dtype=torch.float64)
    alike = torch.stack([_alike(_counts(texts, order)) for order in _ORDERS]).mean(0)
    rows: list[float] = ((alike * others).sum(1) / others.sum(1).clamp_min(1)).tolist()
    return rows


def _alike(counts: Tensor) -> Tensor:
    """F1 [C, C] of counts [C, G]: 0 where a text has no run."""
    totals = counts.sum(1)
    shared = torch.stack([torch.minimum(row, counts).sum(1) for row in counts])
    return 2 * shared / (totals + totals[:, None]).clamp_min(1)


def _counts(texts: Sequence[Sequence[int]], order: int) -> Tensor:
    """How often each text has each run of `order` tokens: [C, G] float64."""
    number: dict[tuple[int, ...], int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for run in zip(*(text[i:] for i in range(order)), strict=False):
            rows.append(row)
            columns.append(number.setdefault(run, len(number)))
    counts = torch.zeros(len(texts), len(number), dtype=torch.float64)
    places = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    return counts.index_put_(places, torch.ones(len(rows), dtype=torch.float64), accumulate=True)

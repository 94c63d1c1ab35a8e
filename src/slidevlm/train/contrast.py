"""The gradient of the global contrastive loss over processes, computed in one of four ways.

All give the same gradient; they differ in memory and traffic. W ranks, n rows each, N = W n:

- whole: every rank computes all N x N logits from everybody's values, and takes the gradient with
  respect to its own rows;
- whole, `gather_with_grad`: the same, but every rank differentiates with respect to all rows and
  the gradients travel back through the gather, a sum over ranks;
- `local_loss`: every rank computes its own n x N rows of both matrices only. Of the other rows it
  needs their normalisers alone, N numbers each way, to know its own rows' gradient;
- `local_loss`, `gather_with_grad`: every rank computes the loss of its own rows and differentiates
  it with respect to all rows, whose gradients travel back.

docs/scaling.md has the bytes and the messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm import dist
from slidevlm.losses import contrastive_loss, siglip_loss
from slidevlm.losses.contrastive import duplicates_of_rows, logits_of_rows


@dataclass(frozen=True)
class Pairs:
    """What a rank knows before any exchange; scale and bias as leaves to differentiate by."""

    image: Tensor  # [n, E], a leaf
    text: Tensor  # [n, E], a leaf
    scale: Tensor  # [], multiplies the cosine
    bias: Tensor | None  # []
    report_ids: Tensor | None  # [N] of all ranks
    rows: dist.Rows


@dataclass(frozen=True)
class Share:
    """What a rank has computed of the global loss."""

    loss: Tensor  # []; the sum over ranks is the global loss
    surrogate: Tensor  # [] whose gradient for this rank's embeddings is the global loss's
    temperature: float  # its gradients for scale and bias times this add up over ranks


class Contrastive(Protocol):
    """A contrastive loss: of the whole batch, or of some rows of it."""

    def whole(self, image: Tensor, text: Tensor, pairs: Pairs) -> Tensor:
        """[N, E] twice -> [], the loss."""
        ...

    def rows(self, pairs: Pairs) -> Tensor:
        """[], the own rows' share of the loss, differentiable in all ranks' rows."""
        ...

    def own(self, pairs: Pairs) -> Share:
        """The own rows' share, whose surrogate knows what other ranks' rows contribute."""
        ...


class Softmax:
    """CLIP's loss: the mean of both cross-entropies."""

    def whole(self, image: Tensor, text: Tensor, pairs: Pairs) -> Tensor:
        return contrastive_loss(image, text, pairs.scale, pairs.report_ids)

    def rows(self, pairs: Pairs) -> Tensor:
        both = pairs.rows.gather_with_gradient(torch.cat([pairs.image, pairs.text], 1))
        images, texts = both.chunk(2, 1)
        first, ids, scale = pairs.rows.first, pairs.report_ids, pairs.scale
        target = torch.arange(first, first + len(pairs.image), device=both.device)
        ways = ((pairs.image, texts), (pairs.text, images))
        losses = [
            F.cross_entropy(logits_of_rows(mine, all_, scale, first, ids), target, reduction="sum")
            for mine, all_ in ways
        ]
        return (losses[0] + losses[1]) / (2 * pairs.rows.total)

    def own(self, pairs: Pairs) -> Share:
        """A column's softmax is known from its normaliser, which the rank that has its row knows.

        `sum exp(logits - normaliser)` over a column's rows of this rank, the normaliser constant,
        has the gradient of the column's logsumexp for these rows.
        """
        first, ids, n = pairs.rows.first, pairs.report_ids, len(pairs.image)
        images, texts = _values(pairs)
        by_image = logits_of_rows(pairs.image, texts, pairs.scale, first, ids)  # [n, N]
        by_text = logits_of_rows(pairs.text, images, pairs.scale.detach(), first, ids)
        own = torch.stack([by_image.logsumexp(1), by_text.logsumexp(1)], 1)  # [n, 2]
        of_images, of_texts = pairs.rows.gather(own).unbind(1)  # [N] each
        true = torch.arange(n, device=own.device)
        matches = by_image[true, first + true].sum(), by_text[true, first + true].sum()
        columns = (by_image - of_texts).exp().sum() + (by_text - of_images).exp().sum()
        share = 2 * pairs.rows.total
        return Share(
            (own.sum() - matches[0] - matches[1]).detach() / share,
            (own.sum() + columns - 2 * (matches[0] + matches[1])) / share,
            1.0,
        )


class Sigmoid:
    """SigLIP's loss: every pair by itself, so that nothing of other rows need be known."""

    def whole(self, image: Tensor, text: Tensor, pairs: Pairs) -> Tensor:
        return siglip_loss(image, text, pairs.scale, _given(pairs.bias), pairs.report_ids)

    def rows(self, pairs: Pairs) -> Tensor:
        texts = pairs.rows.gather_with_gradient(pairs.text)
        return self._rows(pairs, pairs.image, texts, pairs.scale, _given(pairs.bias))

    def own(self, pairs: Pairs) -> Share:
        images, texts = _values(pairs)
        bias = _given(pairs.bias)
        mine = self._rows(pairs, pairs.image, texts, pairs.scale, bias)
        columns = self._rows(pairs, pairs.text, images, pairs.scale.detach(), bias.detach())
        return Share(mine.detach(), mine + columns, 1.0)

    def _rows(
        self, pairs: Pairs, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor
    ) -> Tensor:
        first, n = pairs.rows.first, len(queries)
        logits = scale * queries @ keys.T + bias  # [n, N]
        true = torch.arange(n, device=logits.device)
        sign = torch.full_like(logits, -1.0)
        sign[true, first + true] = 1.0
        terms = -F.logsigmoid(sign * logits)
        if pairs.report_ids is not None:
            terms = terms.masked_fill(duplicates_of_rows(pairs.report_ids, first, n), 0.0)
        return terms.sum() / pairs.rows.total


def _given(bias: Tensor | None) -> Tensor:
    assert bias is not None, "a model for the sigmoid loss has a bias"
    return bias


def _values(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Everybody's embeddings [N, E], without graph, by one message."""
    images, texts = pairs.rows.gather(torch.cat([pairs.image, pairs.text], 1)).chunk(2, 1)
    return images, texts


# How a loss is computed over ranks.
Way = Callable[[Contrastive, Pairs], Share]


def way(*, local_loss: bool, gather_with_grad: bool) -> Way:
    """The way that --local-loss and --gather-with-grad choose."""
    if local_loss:
        return _rows_through_gather if gather_with_grad else _own_rows
    return _whole_through_gather if gather_with_grad else _whole


def _whole(loss: Contrastive, pairs: Pairs) -> Share:
    images, texts = _values(pairs)
    mine = pairs.rows.mine
    # Among everybody's values this rank's own are leaves.
    image = torch.cat([images[: mine.start], pairs.image, images[mine.stop :]])
    text = torch.cat([texts[: mine.start], pairs.text, texts[mine.stop :]])
    whole = loss.whole(image, text, pairs)
    # Every rank counts scale and bias in full.
    return Share(whole.detach() / dist.world_size(), whole, 1 / dist.world_size())


def _whole_through_gather(loss: Contrastive, pairs: Pairs) -> Share:
    both = pairs.rows.gather_with_gradient(torch.cat([pairs.image, pairs.text], 1))
    image, text = both.chunk(2, 1)
    share = loss.whole(image, text, pairs) / dist.world_size()
    return Share(share.detach(), share, 1.0)


def _rows_through_gather(loss: Contrastive, pairs: Pairs) -> Share:
    share = loss.rows(pairs)
    return Share(share.detach(), share, 1.0)


def _own_rows(loss: Contrastive, pairs: Pairs) -> Share:
    return loss.own(pairs)

"""The symmetric softmax loss of CLIP (Radford et al., 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, report_ids: Tensor | None = None
) -> Tensor:
    """Mean of both cross-entropies over the batch.

    Args:
        image: [N, E], L2-normalised, float32 or float64.
        text: [N, E], likewise; row i belongs to row i of `image`.
        scale: [], multiplies the cosine.
        report_ids: [N]; rows with equal ids have the same report and are not each other's
            negatives. None: every other row is a negative.

    Returns:
        [].
    """
    logits = logits_of_rows(image, text, scale, 0, report_ids)  # [N, N]
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def logits_of_rows(
    queries: Tensor, keys: Tensor, scale: Tensor, first: int, report_ids: Tensor | None
) -> Tensor:
    """Some rows of the matrix of logits, duplicates at minus infinity.

    Args:
        queries: [n, E], rows `first` to `first + n` of the batch.
        keys: [N, E], the whole batch of the other kind.
        scale: [].
        first: place of the first query in the batch.
        report_ids: [N] of the whole batch, or None.

    Returns:
        [n, N].
    """
    logits = scale * queries @ keys.T
    if report_ids is None:
        return logits
    return logits.masked_fill(duplicates_of_rows(report_ids, first, len(queries)), float("-inf"))


def duplicates_of_rows(report_ids: Tensor, first: int, count: int) -> Tensor:
    """[count, N] bool: of rows `first` and following, which other rows have the same report."""
    rows = torch.arange(first, first + count, device=report_ids.device)
    equal = report_ids[rows][:, None] == report_ids[None, :]
    return equal & (rows[:, None] != torch.arange(len(report_ids), device=equal.device))

"""The pairwise sigmoid loss of SigLIP (Zhai et al., 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm.losses.contrastive import duplicates_of_rows


def siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, report_ids: Tensor | None = None
) -> Tensor:
    """Sum over all pairs of `-log sigmoid(z (scale cos + bias))`, over N; z is 1 or -1.

    Args:
        image: [N, E], L2-normalised, float32 or float64.
        text: [N, E], likewise; row i belongs to row i of `image`.
        scale: [], multiplies the cosine.
        bias: [], added to it.
        report_ids: [N]; pairs of different rows with equal ids are left out. None: none is.

    Returns:
        [].
    """
    logits = scale * image @ text.T + bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    terms = -F.logsigmoid(sign * logits)
    if report_ids is not None:
        terms = terms.masked_fill(duplicates_of_rows(report_ids, 0, len(image)), 0.0)
    return terms.sum() / len(image)

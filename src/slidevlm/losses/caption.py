"""The caption loss: cross-entropy of the next token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slidevlm.precision import wide


def caption_loss_sum(logits: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
    """Sum, not mean, over the real tokens after BOS; the caller divides by the global count.

    A mean of each micro-batch would weight short reports more than long ones.

    Args:
        logits: [B, L - 1, V]; position i predicts token i + 1. Or [n, V], only the n of them whose
            next token is real, row by row.
        tokens: [B, L].
        token_mask: [B, L]; padding is told by the mask, never by its id.

    Returns:
        [] in float32 or better; 0 for a batch without a real token.
    """
    real = token_mask[:, 1:]
    # Only real positions are turned to float32: the logits are the largest tensor of a step.
    picked = logits if logits.ndim == 2 else logits[real]  # [real tokens, V]
    return F.cross_entropy(wide(picked), tokens[:, 1:][real], reduction="sum")

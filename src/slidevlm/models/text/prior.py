"""What a text encoder knows before training: a fixed table of token vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.models.attention import OwnStart


class TextPrior(OwnStart):
    """Bag-of-tokens embedding from a fixed table, and a gate for what is learned beside it.

    The embedding of a text is `P normalise(sum (1 + log c_t) T_t) + gate * normalise(contextual)`,
    T the table, c_t how often token t occurs and P an isometry at first. With a table the gate
    starts at 0, so training starts from the table's space; without one at 1, and the prior is
    silent.

    Args:
        vocab_size: V.
        rank: width of the table.
        embed_dim: E, at least `rank` for P to be an isometry.
    """

    table: Tensor

    def __init__(self, vocab_size: int, rank: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, rank))
        self.project = nn.Linear(rank, embed_dim, bias=False)
        self.gate = nn.Parameter(torch.empty(()))

    def reset(self) -> None:
        """No table yet."""
        nn.init.orthogonal_(self.project.weight)
        nn.init.ones_(self.gate)

    def set_table(self, table: Tensor) -> None:
        """Take token vectors [V, rank]."""
        assert table.shape == self.table.shape, (table.shape, self.table.shape)
        self.table.copy_(table)
        nn.init.zeros_(self.gate)

    def forward(self, tokens: Tensor, mask: Tensor, contextual: Tensor) -> Tensor:
        """tokens, mask [B, L], contextual [B, E] -> [B, E], not normalised."""
        same = (tokens[:, :, None] == tokens[:, None, :]) & mask[:, None, :]
        count = same.sum(-1).clamp_min(1).to(self.table.dtype)  # [B, L]
        # Each of the c occurrences carries its c-th part of 1 + log c.
        weight = (1 + count.log()) / count * mask
        pooled = (weight[:, :, None] * self.table[tokens]).sum(1)  # [B, rank]
        # BOS and EOS are in no report's statistics: their vectors are 0.
        known = self.project(F.normalize(pooled, dim=-1))
        return known + self.gate * F.normalize(contextual, dim=-1)

    def words(self, embedding: Tensor) -> Tensor:
        """How far each token's vector points the way of an embedding: [B, E] -> [B, V].

        What a slide's embedding says of the words of its report, before any decoder has learnt.
        """
        vectors = self.project(self.table)
        return embedding.to(vectors.dtype) @ vectors.T

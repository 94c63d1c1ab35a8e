"""What every text tower is. One file a kind, registered by name.

A tower is a module built from its own `Config` (a frozen dataclass; the `text` part of a model
configuration) and the vocabulary's size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.attention import LayerCache
from slidevlm.models.mode import Group, Recomputing
from slidevlm.registry import Registry

NORMS = (nn.LayerNorm, nn.RMSNorm)


class TextTower(Recomputing):
    """Base class: tokens -> hidden states, and a report's embedding from them.

    A causal tower's output at a place does not depend on what stands to its right, so padding
    changes nothing, a decoder may go on from it, and a prefix can be cached. A tower that is not
    causal needs the mask, and no decoder can stand on it.
    """

    Config: ClassVar[type[Any]]
    causal: bool = True
    width: int  # of the hidden states and of the pooled embedding
    context_length: int

    @abstractmethod
    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """tokens [B, L] -> hidden states [B, L, width].

        Args:
            tokens: with caches, those after the cached ones.
            mask: [B, L], True on real tokens; a causal tower does not read it.
            caches: of a causal tower, one a layer.
        """

    @abstractmethod
    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, L, width], mask [B, L] -> [B, width], an embedding of the text."""

    @abstractmethod
    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        """Empty caches, one a layer."""

    @abstractmethod
    def groups(self) -> list[Group]:
        """Name and parts of each group of weights, from input to output."""

    @abstractmethod
    def position_tables(self) -> list[nn.Embedding]:
        """The tables of learned position vectors, which weight decay spares."""

    def norms(self) -> list[nn.Module]:
        """The layer norms and RMS norms, which a lock spares."""
        return [module for module in self.modules() if isinstance(module, NORMS)]

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The table of token vectors [V, width]."""


TEXT_ENCODERS: Registry[type[TextTower]] = Registry("text type")


class QueryPool(nn.Module):
    """One learned query attends to the real tokens; the result is normalised.

    As MOSAIC pools its text tower: multi-head attention with biases, then a layer norm.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"text.pool_heads {heads} does not divide the width {width}")
        self.heads = heads
        self.token = nn.Parameter(torch.empty(1, width))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, L, width], mask [B, L], True on real tokens -> [B, width]."""
        query = self._heads(self.query(self.token).expand(hidden.shape[0], 1, -1))
        key, value = self._heads(self.key(hidden)), self._heads(self.value(hidden))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.norm(self.out(attended.transpose(1, 2).flatten(2)))[:, 0]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, H, L, d]."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

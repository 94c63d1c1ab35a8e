"""Attention pooler: learned queries read the tiles once (Yu et al., CoCa, 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.models.attention import AttentionPooler
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    Group,
    SlideEncoder,
    check_heads,
    check_least,
)


@dataclass(frozen=True)
class PoolerConfig:
    """The `slide` part of a model configuration of type pooler."""

    width: int = 256
    tokens: int = 32  # queries, and so tokens
    heads: int = 8

    def __post_init__(self) -> None:
        check_least(1, tokens=self.tokens)
        check_heads(self.width, self.heads)


@SLIDE_ENCODERS.register("pooler")
class Pooler(SlideEncoder):
    """One cross-attention from learned queries to the tile features."""

    Config = PoolerConfig

    def __init__(self, config: PoolerConfig, tile_width: int) -> None:
        super().__init__()
        self.width, self.heads = config.width, config.heads
        self.pool = AttentionPooler(config.tokens, config.width, tile_width, config.heads)

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> [B, tokens, width]."""
        tokens: Tensor = self.run(self._read, bags)
        return tokens

    def groups(self) -> list[Group]:
        """Tiles, queries, output."""
        pool = self.pool
        return [
            ("tiles", [pool.key_values]),
            ("queries", [pool.queries]),
            ("output", [pool.attention, pool.norm]),
        ]

    def _read(self, bags: Bags) -> Tensor:
        return self.pool.of_features(bags.features, bags.lengths)

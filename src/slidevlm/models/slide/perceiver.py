"""Perceiver: a few latents read a bag of any size, again and again (Jaegle et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.attention import GEGLU, CrossAttention, KeyValues, SelfAttentionLayer
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    FourierPositions,
    SlideEncoder,
    Standardise,
    moments,
)


@dataclass(frozen=True)
class PerceiverConfig:
    """The `slide` part of a model configuration of type perceiver."""

    width: int = 256
    latents: int = 64
    blocks: int = 4
    self_layers: int = 2  # self-attention layers of a block, shared by all blocks
    heads: int = 8
    dropout: float = 0.0
    positions: str = "fourier"  # or none
    moments: bool = True  # latents start from the bag's mean and deviation, not from nothing
    moments_dropout: float = 0.3  # of the moments' channels; the cure for a few hundred slides

    def __post_init__(self) -> None:
        if self.positions not in ("fourier", "none"):
            raise ConfigError(f"slide.positions {self.positions!r} is not one of fourier, none")
        if self.width % self.heads:
            raise ConfigError(f"slide.width {self.width} does not divide by {self.heads} heads")


class _Read(nn.Module):
    """Cross-attention from latents to tiles, and a feed-forward layer."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.key_values = KeyValues(config.width, config.width, config.heads)
        self.attention = CrossAttention(config.width, config.heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.feed_forward = GEGLU(config.width, 4.0, config.dropout)

    def forward(
        self, latents: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        latents = latents + self.attention.ragged(latents, key, value, lengths)
        return latents + self.feed_forward(self.norm(latents))


@SLIDE_ENCODERS.register("perceiver")
class Perceiver(SlideEncoder):
    """Blocks of one cross-attention to the tiles and some self-attention among the latents.

    The first cross-attention has weights of its own, the others share theirs, so the bag is
    projected to keys and values twice, however many blocks there are. All blocks share their
    self-attention layers. Every residual branch starts at 0, and the latents at the bag's
    moments: before training the encoder is a linear map of them, which few slides suffice to
    teach, and attention enters as far as it helps.
    """

    Config = PerceiverConfig

    def __init__(self, config: PerceiverConfig, tile_width: int) -> None:
        super().__init__()
        self.width = config.width
        self.blocks = config.blocks
        self.standardise = Standardise(tile_width)
        self.moments = nn.Linear(2 * tile_width, config.width) if config.moments else None
        self.moments_dropout = nn.Dropout(config.moments_dropout)
        self.tile_norm = nn.LayerNorm(tile_width)
        self.tile_project = nn.Linear(tile_width, config.width)
        self.positions = FourierPositions(config.width) if config.positions == "fourier" else None
        self.latents = nn.Parameter(torch.empty(config.latents, config.width))
        self.first = _Read(config) if config.blocks > 0 else None
        self.further = _Read(config) if config.blocks > 1 else None
        self.self_attention = nn.ModuleList(
            SelfAttentionLayer(config.width, config.heads, config.dropout, causal=False)
            for _ in range(config.self_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> latents [B, latents, width]."""
        features = self.standardise(bags.features)  # [T, D]
        tiles = self.tile_project(self.tile_norm(features))  # [T, width]
        if self.positions is not None and bags.positions is not None:
            tiles = tiles + self.positions(bags.positions)
        latents = self.latents.expand(len(bags), -1, -1)
        if self.moments is not None:
            known = self.moments_dropout(moments(features, bags.lengths))  # [B, 2 D]
            latents = latents + self.moments(known)[:, None]
        if self.first is not None:
            latents = self.first(latents, *self.first.key_values(tiles), bags.lengths)
            latents = self._think(latents)
        if self.further is not None:
            key, value = self.further.key_values(tiles)
            for _ in range(self.blocks - 1):
                latents = self._think(self.further(latents, key, value, bags.lengths))
        return self.norm(latents)

    def _think(self, latents: Tensor) -> Tensor:
        for layer in self.self_attention:
            latents = layer(latents)
        return latents

"""Attention-based multiple instance learning with gates (Ilse et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models.linear import is_plain, normalised_linear
from slidevlm.models.ragged import bags_of
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    Group,
    SlideEncoder,
    check_least,
    check_one_of,
)
from slidevlm.precision import wide


@dataclass(frozen=True)
class ABMILConfig:
    """The `slide` part of a model configuration of type abmil."""

    width: int = 256
    hidden: int = 128  # units of the gated attention
    branches: int = 1  # weightings of the tiles, and so tokens
    dropout: float = 0.25  # of the projected tiles
    # Of the tile features: layer (each tile by itself), batch (BatchNorm: each channel over all
    # tiles of the batch; running statistics in evaluation), none.
    input_norm: str = "layer"

    def __post_init__(self) -> None:
        check_one_of("input_norm", self.input_norm, ("layer", "batch", "none"))
        check_least(1, width=self.width, hidden=self.hidden, branches=self.branches)


class _TileBatchNorm(nn.BatchNorm1d):
    """BatchNorm of tiles; a single tile has no deviation and is normalised as in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def _input_norm(kind: str, tile_width: int) -> nn.Module:
    if kind == "batch":
        return _TileBatchNorm(tile_width)
    return nn.LayerNorm(tile_width) if kind == "layer" else nn.Identity()


class GatedAttention(nn.Module):
    """`project` of tiles [T, width] -> tiles [T, width] and their scores [T, branches]."""

    def __init__(self, config: ABMILConfig, tile_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(tile_width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.content = nn.Linear(config.width, config.hidden)
        self.gate = nn.Linear(config.width, config.hidden)
        self.score = nn.Linear(config.hidden, config.branches, bias=False)

    def forward(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        tiles = self.dropout(F.relu(projected))
        return tiles, self.score(self.content(tiles).tanh() * self.gate(tiles).sigmoid())


@SLIDE_ENCODERS.register("abmil")
class ABMIL(SlideEncoder):
    """Tiles h = relu(W x), weighted within each bag by softmax(w . (tanh(V h) * sigmoid(U h))).

    Each branch has its own w and makes one token.
    """

    Config = ABMILConfig

    def __init__(self, config: ABMILConfig, tile_width: int) -> None:
        super().__init__()
        self.width, self.heads = config.width, 1
        self.input_norm = _input_norm(config.input_norm, tile_width)
        self.attention = GatedAttention(config, tile_width)

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> [B, branches, width]."""
        tiles, scores = self.read(bags.features)
        parts = zip(*(bags_of(t, bags.lengths) for t in (wide(scores), tiles)), strict=True)
        tokens = [weights.softmax(0).T.to(tile.dtype) @ tile for weights, tile in parts]
        return torch.stack(tokens)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Tile features [T, D] -> tiles [T, width] and their scores [T, branches]."""
        norm, project = self.input_norm, self.attention.project
        if isinstance(norm, nn.LayerNorm) and is_plain(project):
            (projected,) = normalised_linear(features, norm, (project.weight,), project.bias)
        else:
            projected = project(norm(features.to(project.weight.dtype)))
        tiles, scores = self.run(self.attention, projected)
        return tiles, scores

    def groups(self) -> list[Group]:
        """Tiles, attention."""
        gated = self.attention
        return [
            ("tiles", [self.input_norm, gated.project]),
            ("attention", [gated.content, gated.gate, gated.score]),
        ]

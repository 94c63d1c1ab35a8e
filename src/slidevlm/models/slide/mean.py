"""The mean of a bag's tiles, projected: the baseline that every other encoder has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models.ragged import bags_of
from slidevlm.models.slide.base import SLIDE_ENCODERS, Group, SlideEncoder, check_least


@dataclass(frozen=True)
class MeanConfig:
    """The `slide` part of a model configuration of type mean."""

    width: int = 256

    def __post_init__(self) -> None:
        check_least(1, width=self.width)


@SLIDE_ENCODERS.register("mean")
class Mean(SlideEncoder):
    """Mean over tiles, layer norm, linear map: one token."""

    Config = MeanConfig

    def __init__(self, config: MeanConfig, tile_width: int) -> None:
        super().__init__()
        self.width, self.heads = config.width, 1
        self.norm = nn.LayerNorm(tile_width)
        self.project = nn.Linear(tile_width, config.width)

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> [B, 1, width]."""
        # The sum of 16-bit features needs more bits than they have.
        dtype = self.norm.weight.dtype
        means = [bag.mean(0, dtype=dtype) for bag in bags_of(bags.features, bags.lengths)]
        return self.project(self.norm(torch.stack(means)))[:, None]

    def groups(self) -> list[Group]:
        """One part."""
        return [("output", [self.norm, self.project])]

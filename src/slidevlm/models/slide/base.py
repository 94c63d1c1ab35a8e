"""What every slide encoder is, and the part they share: positions of tiles."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError, DataError
from slidevlm.models.attention import OwnStart
from slidevlm.models.linear import is_plain, narrowed, normalised_linear
from slidevlm.models.mode import Group, Recomputing
from slidevlm.models.ragged import bags_of
from slidevlm.models.tile_rows import are_data, joined, moments_of
from slidevlm.registry import Registry


class SlideEncoder(Recomputing):
    """Base class. `width` is the width of the tokens that `forward` returns, `heads` the number
    of heads with which a pooler should read them, `reads_positions` whether it matters to them
    where tiles lie.
    """

    Config: ClassVar[type[Any]]
    width: int
    heads: int
    reads_positions: bool = False

    @abstractmethod
    def forward(self, bags: Bags) -> Tensor:
        """Bags -> tokens [B, N, width].

        Raises:
            DataError: an encoder that needs positions, and bags without.
        """

    def is_light(self, bags: Bags) -> bool:
        """Whether all it does that takes time is shared out in pieces (`models/pieces.py`)."""
        return False

    @abstractmethod
    def groups(self) -> list[Group]:
        """Parts from input to output, for locking; each parameter is in exactly one of them."""


def needed_positions(bags: Bags, encoder: str) -> Tensor:
    """[T, 2] of the bags; several slides of a specimen lie side by side, never on each other.

    Raises:
        DataError: there are none.
    """
    if bags.positions is None:
        raise DataError(
            f"the slide encoder {encoder!r} needs the positions of tiles, and these features come "
            "without; add them to the files, or choose a model whose encoder needs none "
            "(perceiver, abmil, pooler, mean)"
        )
    positions = bags.positions.float()
    if bags.slides is None:
        return positions
    beside = bags.slides.to(positions.dtype) * APART
    return torch.stack([positions[:, 0] + beside, positions[:, 1]], 1)


# Distance between two slides of a specimen, in the unit of the positions: wider than any slide.
APART = 200_000.0


SLIDE_ENCODERS: Registry[type[SlideEncoder]] = Registry("slide encoder")


def check_one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError where `value` of `slide.key` is none of `known`."""
    if value not in known:
        raise ConfigError(f"slide.{key} {value!r} is not one of {', '.join(known)}")


def check_least(least: int, **values: int) -> None:
    """Raise ConfigError where a number of the `slide` part is below `least`."""
    for key, value in values.items():
        if value < least:
            raise ConfigError(f"slide.{key} must be at least {least}, not {value}")


def check_heads(width: int, heads: int) -> None:
    """Raise ConfigError where the width is 0 or does not divide by the heads."""
    check_least(1, width=width)
    if heads < 1 or width % heads:
        raise ConfigError(f"slide.width {width} does not divide by {heads} heads")


class TileEmbedding(nn.Module):
    """Layer norm of tile features and projection to the width: [T, D] -> [T, width]."""

    def __init__(self, tile_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(tile_width)
        self.project = nn.Linear(tile_width, width)

    def forward(self, features: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            tiles = self.project(self.norm(features.to(self.norm.weight.dtype)))
        else:
            tiles = self._in_one(features)
        return tiles

    def _in_one(self, features: Tensor) -> Tensor:
        if not is_plain(self.project):  # more than its weight: LoRA, quantised
            return self.project(self.norm(features.to(self.norm.weight.dtype)))
        weights, bias = (self.project.weight,), self.project.bias
        return normalised_linear(features, self.norm, weights, bias)[0]


class FourierPositions(OwnStart):
    """Sines and cosines of x and y at log-spaced wavelengths, projected to the tile width.

    Positions are in the unit of the data (micrometres, or level-0 pixels). The shortest
    wavelength is about two tiles, the longest about two slides. The projection starts at 0:
    a model without positions is its starting point, and positions enter as far as they help.
    """

    wavelengths: Tensor

    def __init__(self, width: int, shortest: float = 500.0, longest: float = 100_000.0) -> None:
        super().__init__()
        count = 16
        exponents = torch.linspace(math.log(shortest), math.log(longest), count)
        self.register_buffer("wavelengths", exponents.exp(), persistent=False)
        self.project = nn.Linear(4 * count, width, bias=False)

    def reset(self) -> None:
        """Start without influence."""
        nn.init.zeros_(self.project.weight)

    def forward(self, positions: Tensor) -> Tensor:
        """[T, 2] -> [T, width]. Angles are computed in float32: bfloat16 has no room for them."""
        angles = 2 * math.pi * positions.float()[:, :, None] / self.wavelengths  # [T, 2, J]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.project(narrowed(waves, self.project.weight))


class Standardise(nn.Module):
    """Subtract the mean and divide by the deviation of each channel over the training tiles.

    Both are buffers, 0 and 1 until `set` is called, and travel with the checkpoint.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, tile_width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tile_width))
        self.register_buffer("deviation", torch.ones(tile_width))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Take the statistics, [D] each."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(self, features: Tensor) -> Tensor:
        """[T, D] of any float type -> [T, D] of the buffers' type."""
        return (features.to(self.mean.dtype) - self.mean) / self.deviation

    def moments(self, features: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Mean and standard deviation of each bag's standardised tiles: [T, D] -> [B, 2 D].

        The deviation of identical tiles (or of one) is 0, with gradient 0. Where features need no
        gradient, rows are standardised some at a time, and no copy of the features is made.
        """
        if not are_data(features):
            parts = [_moments(bag) for bag in bags_of(self(features), lengths)]
            return joined(parts).to(self.mean.dtype)
        with torch.autocast(features.device.type, enabled=False):
            found = moments_of(features, lengths, (self.mean, self.deviation))
        return found.to(self.mean.dtype)


def _moments(bag: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over tiles, [D] each."""
    mean = bag.mean(0)
    return mean, (bag - mean).square().mean(0)

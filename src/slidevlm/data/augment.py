"""Random changes of training bags: features, positions and slides together.

Every draw is fixed by (seed, epoch, specimen) and the transform's name. So neither workers, nor
the number of processes, nor a resume, nor another transform beside it changes what one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from slidevlm.data.cases import Bag
from slidevlm.data.sampling import generator
from slidevlm.registry import Registry

_VALUES = 2**22  # of a piece of features that is float32 at a time: 16 MB


@dataclass(frozen=True)
class Augmentation:
    """The transforms of a run, in their order; without any it changes nothing.

    Args:
        transforms: names in `TRANSFORMS`.
        probability: of each transform, drawn for each of them by itself.
        drop_fraction: of the tiles, for tile_dropout; 0 <= drop_fraction <= 1.
        noise_std: for feature_noise, in standard deviations of a channel within the bag.
    """

    transforms: tuple[str, ...] = ()
    probability: float = 0.5
    drop_fraction: float = 0.1
    noise_std: float = 0.1

    @property
    def moves(self) -> tuple[str, ...]:
        """Those of the transforms that need positions."""
        return tuple(name for name in self.transforms if name in _MOVERS)

    def __call__(self, bag: Bag, seed: int, epoch: int, specimen: str) -> Bag:
        """A changed bag; `bag.positions`, where there are any, are relative to their slide."""
        for name in self.transforms:
            draw = generator("augment", name, seed, epoch, specimen)
            if draw.random() < self.probability:
                bag = TRANSFORMS[name](bag, draw, self)
        return bag


Transform = Callable[[Bag, np.random.Generator, Augmentation], Bag]
TRANSFORMS: Registry[Transform] = Registry("transform")
_MOVERS = ("random_flip", "random_rotate90")


@TRANSFORMS.register("random_flip")
def random_flip(bag: Bag, draw: np.random.Generator, settings: Augmentation) -> Bag:
    """Mirror all slides of the bag about their centres: x, y, or both, equally likely."""
    axes = int(draw.integers(1, 4))
    sign = torch.tensor([-1.0 if axes & 1 else 1.0, -1.0 if axes & 2 else 1.0])
    return replace(bag, positions=_positions(bag) * sign)


@TRANSFORMS.register("random_rotate90")
def random_rotate90(bag: Bag, draw: np.random.Generator, settings: Augmentation) -> Bag:
    """Turn all slides of the bag about their centres by 90, 180 or 270 degrees, equally likely."""
    x, y = _positions(bag).unbind(1)
    for _ in range(int(draw.integers(1, 4))):
        x, y = -y, x
    return replace(bag, positions=torch.stack([x, y], dim=1))


@TRANSFORMS.register("tile_dropout")
def tile_dropout(bag: Bag, draw: np.random.Generator, settings: Augmentation) -> Bag:
    """Leave out `drop_fraction` of the tiles (rounded down, so 1 tile at least stays)."""
    count = len(bag.features)
    kept = max(1, count - int(settings.drop_fraction * count))
    rows = torch.from_numpy(np.sort(draw.choice(count, kept, replace=False, shuffle=False)))

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return Bag(bag.features[rows], of(bag.positions), of(bag.slides), bag.unit, of(bag.centres))


@TRANSFORMS.register("feature_noise")
def feature_noise(bag: Bag, draw: np.random.Generator, settings: Augmentation) -> Bag:
    """Add Gaussian noise of `noise_std` standard deviations of each channel over the bag.

    Relative, because encoders differ in the scale of their channels by factors of hundreds. A bag
    of one tile has no deviation and stays as it is. The type stays, and finite stays finite.
    """
    features = bag.features  # [N, D]
    scale = settings.noise_std * _deviation(features)  # [D]
    limits = torch.finfo(features.dtype)
    noisy = torch.empty_like(features)
    for old, new in zip(_pieces(features), _pieces(noisy), strict=True):
        noise = torch.from_numpy(draw.standard_normal(tuple(old.shape), dtype=np.float32))
        new.copy_((old.float() + noise * scale).clamp_(limits.min, limits.max))
    return replace(bag, features=noisy)


def _positions(bag: Bag) -> Tensor:
    assert bag.positions is not None, "BagDataset has refused bags without positions"
    return bag.positions


def _pieces(features: Tensor) -> tuple[Tensor, ...]:
    return torch.split(features, max(1, _VALUES // max(1, features.shape[1])))


def _deviation(features: Tensor) -> Tensor:
    """Standard deviation of each channel: [N, D] -> [D] float32, in two passes over pieces."""
    count = len(features)
    zero = torch.zeros(features.shape[1], dtype=torch.float64)
    mean = sum((piece.double().sum(0) for piece in _pieces(features)), zero) / count
    squares = sum(((piece - mean).square().sum(0) for piece in _pieces(features)), zero)
    return (squares / count).sqrt().float()

"""TransMIL: Nystrom attention and convolutions over the tiles (Shao et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models.mode import CountsRows
from slidevlm.models.ragged import bags_of, scripted
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    Group,
    SlideEncoder,
    check_heads,
    check_least,
    check_one_of,
    needed_positions,
)
from slidevlm.precision import wide


@dataclass(frozen=True)
class TransMILConfig:
    """The `slide` part of a model configuration of type transmil."""

    width: int = 512
    heads: int = 8
    landmarks: int = 0  # of the Nystrom approximation; 0: half the width, as published
    iterations: int = 6  # of the pseudo-inverse
    dropout: float = 0.1  # of what attention adds
    # Of the tiles in the square image that the convolutions see. file: as they come, as published;
    # rows: by y, then x, so that the order in the file has no effect; needs positions.
    order: str = "file"

    def __post_init__(self) -> None:
        check_one_of("order", self.order, ("file", "rows"))
        check_heads(self.width, self.heads)
        check_least(1, iterations=self.iterations)
        check_least(2, width=self.width)


class NystromAttention(CountsRows):
    """Self-attention of one sequence through landmarks (Xiong et al., Nystromformer, 2021).

    Zeros before the sequence make its length a multiple of the landmarks; a convolution along the
    sequence of values is added.
    """

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__()
        self.heads, self.iterations = config.heads, config.iterations
        self.landmarks = config.landmarks or config.width // 2
        self.project = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.along = nn.Conv2d(
            config.heads, config.heads, (33, 1), padding=(16, 0), groups=config.heads, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, width]."""
        if torch.jit.is_scripting():
            padded = _whole_landmarks(x, self.landmarks)
        else:
            padded = counting(_whole_landmarks)(x, self.landmarks)
        shape = (-1, 3, self.heads, x.shape[1] // self.heads)
        projected = self.project(padded).view(shape)
        query, key, value = projected.permute(1, 2, 0, 3).unbind(0)  # [H, n, d]
        query = query * query.shape[-1] ** -0.5
        few_queries, few_keys = self._landmarks(query), self._landmarks(key)
        left = (query @ few_keys.transpose(1, 2)).softmax(-1)
        middle = (few_queries @ few_keys.transpose(1, 2)).softmax(-1)
        right = (few_queries @ key.transpose(1, 2)).softmax(-1)
        inverse = _exact_inverse(middle, self.iterations).to(left.dtype)
        attended = (left @ inverse) @ (right @ value) + self.along(value[None])[0]
        rows = self.dropout(self.out(attended.transpose(0, 1).flatten(1)))
        if torch.jit.is_scripting():  # noqa: SIM108 - a script reads no other form
            last = _last(rows, x)
        else:
            last = counting(_last)(rows, x)
        return last

    def _landmarks(self, rows: Tensor) -> Tensor:
        """[H, n, d] -> [H, landmarks, d], means of as many neighbouring rows."""
        return rows.unflatten(1, (self.landmarks, -1)).mean(2)


@torch.jit.ignore
def _exact_inverse(matrices: Tensor, iterations: int) -> Tensor:
    """The pseudo-inverse outside autocast: the iteration needs its 24 bits.

    A script comes back to Python for it, as it cannot leave autocast by itself.
    """
    with torch.autocast(matrices.device.type, enabled=False):
        return pseudo_inverse(wide(matrices), iterations)


# A script does not read annotations that are text.
_exact_inverse.__annotations__.update({"matrices": Tensor, "iterations": int, "return": Tensor})


def pseudo_inverse(matrices: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse [H, m, m] by an iteration of third order (Razavi et al., 2014)."""
    size = matrices.abs()
    inverse = matrices.transpose(1, 2) / (size.sum(-1).max() * size.sum(-2).max())
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    for _ in range(iterations):
        product = matrices @ inverse
        rest = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ rest)
    return inverse


class PPEG(CountsRows):
    """Positions from convolutions of three sizes over the square image of tiles, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The token of the whole and then S * S tiles, [1 + S * S, width] -> the same."""
        if torch.jit.is_scripting():  # noqa: SIM108 - a script reads no other form
            given = _image(x)
        else:
            given = counting(_image)(x)
        image = given
        for convolution in self.convolutions:
            image = image + convolution(given)
        return torch.cat([x[:1], image[0].flatten(1).t()])


class _Layer(CountsRows):
    """Nystrom attention as a residual branch."""

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.attention = NystromAttention(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


@SLIDE_ENCODERS.register("transmil")
class TransMIL(SlideEncoder):
    """A token for the whole and the tiles, filled up to a square, through two layers of attention
    with convolutions in between; the token is the result.

    Every bag goes through alone, so that padding and pseudo-inverse depend on itself only.
    """

    Config = TransMILConfig

    def __init__(self, config: TransMILConfig, tile_width: int) -> None:
        super().__init__()
        self.width, self.heads = config.width, config.heads
        self.sorts = config.order == "rows"
        self.project = nn.Linear(tile_width, config.width)
        self.whole = nn.Parameter(torch.empty(1, config.width))
        self.first = _Layer(config)
        self.places = PPEG(config.width)
        self.second = _Layer(config)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> [B, 1, width]."""
        features = tuple(bags_of(bags.features, bags.lengths))
        if self.sorts:
            places = bags_of(needed_positions(bags, "transmil"), bags.lengths)
            features = tuple(f[_by_rows(p)] for f, p in zip(features, places, strict=True))
        tokens = [self.run(self._token, bag) for bag in features]
        return self.norm(torch.stack(tokens))

    def groups(self) -> list[Group]:
        """Tiles, first layer, convolutions, second layer, output."""
        return [
            ("tiles", [self.project, self.whole]),
            ("first_layer", [self.first]),
            ("places", [self.places]),
            ("second_layer", [self.second]),
            ("output", [self.norm]),
        ]

    def _token(self, features: Tensor) -> Tensor:
        """One bag [N, D] -> [1, width]."""
        tiles = F.relu(self.project(features.to(self.project.weight.dtype)))
        x = counting(_filled)(self.whole, tiles)
        return self.second(self.places(self.first(x)))[:1]


def counting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that counts rows, so that a trace counts them anew for each bag."""
    return scripted(function) if torch.jit.is_tracing() else function


def _side(count: int) -> int:
    """The least whole number whose square is not below `count`."""
    side = int(math.sqrt(count))  # a few units off at most
    while side * side < count:
        side += 1
    while side > 1 and (side - 1) * (side - 1) >= count:
        side -= 1
    return side


def _filled(whole: Tensor, tiles: Tensor) -> Tensor:
    """The token of the whole, the tiles, and the first of them again up to a square."""
    side = _side(tiles.shape[0])
    return torch.cat([whole, tiles, tiles[: side * side - tiles.shape[0]]])


def _image(x: Tensor) -> Tensor:
    """[1 + S * S, width] -> [1, width, S, S] without the first row."""
    side = _side(x.shape[0] - 1)
    return x[1:].t().reshape(1, x.shape[1], side, side)


def _whole_landmarks(x: Tensor, landmarks: int) -> Tensor:
    """Zeros before the rows, up to a multiple of the landmarks."""
    more = (landmarks - x.shape[0] % landmarks) % landmarks
    return F.pad(x, [0, 0, more, 0])


def _last(rows: Tensor, like: Tensor) -> Tensor:
    """As many of the last rows as the other has."""
    return rows[rows.shape[0] - like.shape[0] :]


def _by_rows(positions: Tensor) -> Tensor:
    """[N] order by y, then x."""
    by_x = positions[:, 0].argsort(stable=True)
    return by_x[positions[by_x, 1].argsort(stable=True)]

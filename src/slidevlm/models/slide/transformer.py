"""Transformer over tiles: tiles attend to tiles, by their places in the tissue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.attention import Attend, AttentionPooler, TileLayer
from slidevlm.models.mode import Unit
from slidevlm.models.ragged import distance_attention, ragged_self_attention, traced_self_attention
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    Group,
    SlideEncoder,
    TileEmbedding,
    check_heads,
    check_least,
    check_one_of,
    needed_positions,
)

# In the unit of the positions, micrometres as a rule: about two tiles, and about two slides.
SHORTEST, LONGEST = 500.0, 100_000.0


@dataclass(frozen=True)
class TransformerConfig:
    """The `slide` part of a model configuration of type transformer."""

    width: int = 256
    layers: int = 4
    heads: int = 8
    tokens: int = 32  # learned queries that read the tiles at the end, and so tokens
    dropout: float = 0.0
    # rotary: queries and keys are turned by x and y (Su et al., 2021, in two dimensions);
    # alibi: scores fall with the distance (Press et al., 2022); none: order and place are unknown.
    positions: str = "rotary"
    # Side of the square windows within which tiles attend, in the unit of the positions; every
    # second layer's are shifted by half a side. 0: all tiles of the bag, whose cost is quadratic.
    window: float = 0.0

    def __post_init__(self) -> None:
        check_one_of("positions", self.positions, ("rotary", "alibi", "none"))
        check_least(1, layers=self.layers, tokens=self.tokens)
        check_heads(self.width, self.heads)
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ConfigError(
                f"slide.positions rotary turns channels four by four: the width of a head, "
                f"{self.width // self.heads}, must divide by 4"
            )
        if not 0 <= self.window < math.inf:
            raise ConfigError(f"slide.window must be 0 or more, not {self.window}")


class Rotary(nn.Module):
    """Turn pairs of channels by the angle of x (first half) or y at log-spaced wavelengths.

    Scores then depend on differences of positions only: a slide may lie anywhere.
    """

    wavelengths: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(SHORTEST), math.log(LONGEST), head_width // 4)
        self.register_buffer("wavelengths", exponents.exp(), persistent=False)

    def waves(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 2] -> cosines and sines [T, d / 2], in float32."""
        angles = 2 * math.pi * positions.float()[:, :, None] / self.wavelengths  # [T, 2, d / 4]
        return angles.cos().flatten(1), angles.sin().flatten(1)

    def turn(self, rows: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
        """[H, T, d] -> [H, T, d]."""
        cos, sin = (wave.to(rows.dtype) for wave in waves)
        a, b = rows.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


@SLIDE_ENCODERS.register("transformer")
class Transformer(SlideEncoder):
    """Layers in which tiles attend to tiles; at the end learned queries read them all.

    The order of a bag's tiles changes nothing. Tiles of different slides of a specimen are far
    apart, and never in one window.
    """

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig, tile_width: int) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.width, self.heads = width, heads
        self.alibi, self.window = config.positions == "alibi", config.window
        self.reads_positions = config.positions != "none" or config.window > 0
        self.tiles = TileEmbedding(tile_width, width)
        self.rotary = Rotary(width // heads) if config.positions == "rotary" else None
        self.layers = nn.ModuleList(
            TileLayer(width, heads, config.dropout) for _ in range(config.layers)
        )
        self.pool = AttentionPooler(config.tokens, width, width, heads)
        # A head's weight falls by e at distances from two tiles to a slide.
        steps = torch.linspace(math.log(SHORTEST), math.log(LONGEST / 2), heads)
        self.register_buffer("slopes", (-steps).exp(), persistent=False)

    slopes: Tensor

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> [B, tokens, width]."""
        attends = self._attends(bags)
        x = self.run(self.tiles, bags.features)  # [T, width]
        for i, layer in enumerate(self.layers):
            x = self.run(layer, x, attends[i % len(attends)])
        return self.pool.ragged(x, bags.lengths)

    def units(self) -> list[Unit]:
        return [(layer, ()) for layer in self.layers]

    def groups(self) -> list[Group]:
        """Tiles, each layer, output."""
        layers: list[Group] = [(f"layer_{i}", [layer]) for i, layer in enumerate(self.layers)]
        return [("tiles", [self.tiles]), *layers, ("output", [self.pool])]

    def _attends(self, bags: Bags) -> list[Attend]:
        """How even layers attend, and, where there are windows, odd ones."""
        if not (self.alibi or self.rotary or self.window):
            return [lambda q, k, v: ragged_self_attention(q, k, v, bags.lengths)]
        positions = needed_positions(bags, "transformer")
        if not self.window:
            return [self._attend(positions, bags.lengths)]
        if torch.jit.is_tracing():
            return [self._traced_within(positions, shift) for shift in (0.0, self.window / 2)]
        return [
            self._within(positions, *windows(positions, bags.lengths, self.window, shift))
            for shift in (0.0, self.window / 2)
        ]

    def _attend(self, positions: Tensor, lengths: tuple[int, ...]) -> Attend:
        if self.alibi:
            return lambda q, k, v: distance_attention(q, k, v, lengths, positions, self.slopes)
        if self.rotary is None:
            return lambda q, k, v: ragged_self_attention(q, k, v, lengths)
        waves, turn = self.rotary.waves(positions), self.rotary.turn
        return lambda q, k, v: ragged_self_attention(turn(q, waves), turn(k, waves), v, lengths)

    def _within(self, positions: Tensor, order: Tensor, lengths: tuple[int, ...]) -> Attend:
        """Attention within windows: rows are brought into the windows' order and back."""
        attend = self._attend(positions[order], lengths)
        back = order.argsort()
        return lambda q, k, v: attend(q[:, order], k[:, order], v[:, order])[:, back]

    def _traced_within(self, positions: Tensor, shift: float) -> Attend:
        """Attention of one bag within windows whose number stays a tensor."""
        cells = ((positions + shift) / self.window).floor().long()
        _, window, counts = cells.unique(dim=0, return_inverse=True, return_counts=True)
        order = window.argsort(stable=True)
        back, places = order.argsort(), positions[order]
        waves = None if self.rotary is None else self.rotary.waves(places)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q[:, order], k[:, order], v[:, order]
            if self.rotary is not None and waves is not None:
                q, k = self.rotary.turn(q, waves), self.rotary.turn(k, waves)
            by_distance = (places, self.slopes) if self.alibi else ()
            return traced_self_attention(q, k, v, counts, *by_distance)[:, back]

        return attend


SLIDE_ENCODERS.register("vit")(Transformer)


def windows(
    positions: Tensor, lengths: tuple[int, ...], side: float, shift: float
) -> tuple[Tensor, tuple[int, ...]]:
    """Squares of a grid in which at least one tile lies.

    Args:
        positions: [T, 2] of bags end to end.
        lengths: tiles of each bag.
        side: of a square, in the positions' unit.
        shift: of the grid, along both axes.

    Returns:
        An order of all tiles in which those of a window stand together, bag by bag, and the
        number of tiles of each window. The host waits for the device once.
    """
    device = positions.device
    bag = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )
    cells = ((positions + shift) / side).floor().long()
    keys = torch.cat([bag[:, None], cells], 1)  # [T, 3]
    _, window, counts = keys.unique(dim=0, return_inverse=True, return_counts=True)
    return window.argsort(stable=True), tuple(counts.tolist())

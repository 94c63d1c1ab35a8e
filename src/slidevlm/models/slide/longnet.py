"""LongNet: dilated attention over a curve through the tissue, for bags of 100,000 tiles
(Ding et al., LongNet, 2023; used for slides by Xu et al., GigaPath, 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.attention import AttentionPooler, TileLayer
from slidevlm.models.chunked import attention_with_normaliser
from slidevlm.models.mode import Unit
from slidevlm.models.ragged import SCORES_AT_ONCE, bags_of, scripted
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    FourierPositions,
    Group,
    SlideEncoder,
    TileEmbedding,
    check_heads,
    check_least,
    needed_positions,
)
from slidevlm.precision import wide


@dataclass(frozen=True)
class LongNetConfig:
    """The `slide` part of a model configuration of type longnet."""

    width: int = 256
    layers: int = 4
    heads: int = 8
    tokens: int = 32  # learned queries that read the tiles at the end, and so tokens
    dropout: float = 0.0
    # Tiles of a segment, and of how many one is taken; each pair costs tiles * segment /
    # dilation^2. The first dilation is 1, so that every tile attends.
    segments: list[int] = field(default_factory=lambda: [1024, 4096, 16384, 65536, 262144])
    dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])

    def __post_init__(self) -> None:
        check_least(1, layers=self.layers, tokens=self.tokens)
        check_heads(self.width, self.heads)
        pairs = list(zip(self.segments, self.dilations, strict=False))
        numbers = [*self.segments, *self.dilations]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers):
            raise ConfigError("slide.segments and slide.dilations must be whole numbers above 0")
        if len(self.segments) != len(self.dilations) or not pairs:
            raise ConfigError("slide.segments and slide.dilations must be equally many, at least 1")
        if self.dilations[0] != 1:
            raise ConfigError(f"the first of slide.dilations must be 1, not {self.dilations[0]}")
        for segment, dilation in pairs:
            if segment % dilation:
                raise ConfigError(
                    f"slide.segments {segment} does not divide by its dilation {dilation}"
                )


@SLIDE_ENCODERS.register("longnet")
class LongNet(SlideEncoder):
    """Tiles along a Z-order curve through each slide attend within segments, dilated.

    The curve makes neighbours in the sequence neighbours in the tissue, and the order of tiles in
    the file without effect.
    """

    Config = LongNetConfig

    def __init__(self, config: LongNetConfig, tile_width: int) -> None:
        super().__init__()
        width = config.width
        self.width, self.heads = width, config.heads
        self.pairs = tuple(zip(config.segments, config.dilations, strict=True))
        self.tiles = TileEmbedding(tile_width, width)
        self.positions = FourierPositions(width)
        self.reads_positions = True
        self.layers = nn.ModuleList(
            TileLayer(width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.pool = AttentionPooler(config.tokens, width, width, config.heads)

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> [B, tokens, width]."""
        positions = needed_positions(bags, "longnet")
        order = along_curve(positions, bags.lengths)
        x = self.run(self.tiles, bags.features[order]) + self.positions(positions[order])
        for layer in self.layers:
            x = self.run(layer, x, lambda q, k, v: self._attend(q, k, v, bags.lengths))
        return self.pool.ragged(x, bags.lengths)

    def units(self) -> list[Unit]:
        return [(layer, ()) for layer in self.layers]

    def groups(self) -> list[Group]:
        """Tiles, each layer, output."""
        layers: list[Group] = [(f"layer_{i}", [layer]) for i, layer in enumerate(self.layers)]
        return [("tiles", [self.tiles, self.positions]), *layers, ("output", [self.pool])]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        if torch.jit.is_tracing():
            return traced_dilated_attention(q, k, v, self.pairs)
        bags = zip(*(t.split(list(lengths), 1) for t in (q, k, v)), strict=True)
        return torch.cat([dilated_attention(q, k, v, self.pairs) for q, k, v in bags], 1)


def along_curve(positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[T] order of tiles along a Z-order (Morton) curve, bag by bag."""
    orders = []
    start = 0
    for bag in bags_of(positions, lengths):
        # Whole units from the bag's corner; a specimen's slides may reach 2^30 of them.
        whole = (bag - bag.min(0).values).long().clamp(max=(1 << 30) - 1)
        orders.append(
            start + (_spread(whole[:, 0]) | _spread(whole[:, 1]) << 1).argsort(stable=True)
        )
        start += len(bag)
    return torch.cat(orders)


def _spread(numbers: Tensor) -> Tensor:
    """Bit i of each number becomes bit 2 i."""
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        numbers = (numbers | numbers << shift) & mask
    return numbers


def dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, pairs: tuple[tuple[int, int], ...]
) -> Tensor:
    """Attention of one bag within segments, one row of every `dilation`, for several such pairs.

    Head h takes the rows whose number leaves the remainder h when divided by the dilation. What a
    row finds in several segments is joined with the weights of their softmax denominators, as if
    it had attended to all of their rows at once.

    Args:
        query: [H, N, d].
        key: [H, N, d].
        value: [H, N, d].
        pairs: (segment, dilation); the segment, in rows before dilation, divides by it.

    Returns:
        [H, N, d].
    """
    found, weights = [], []
    for segment, dilation in pairs:
        attended = torch.zeros_like(query)
        normaliser = torch.full_like(wide(query[..., 0]), float("-inf"))
        for offset in range(min(dilation, query.shape[0], query.shape[1])):
            heads = slice(offset, None, dilation)
            rows = slice(offset, None, dilation)
            q, k, v = (t[heads, rows] for t in (query, key, value))
            part = _in_segments(q, k, v, segment // dilation)
            attended[heads, rows], normaliser[heads, rows] = part
        found.append(attended)
        weights.append(normaliser)
    shares = torch.stack(weights).softmax(0).to(query.dtype)  # [pairs, H, N]
    return (torch.stack(found) * shares[..., None]).sum(0)


def traced_dilated_attention(
    query: Tensor, key: Tensor, value: Tensor, pairs: tuple[tuple[int, int], ...]
) -> Tensor:
    """`dilated_attention` for a trace, whose loops over rows must be TorchScript."""
    attended: Tensor = scripted(_dilated)(query, key, value, list(pairs), SCORES_AT_ONCE)
    return attended


def _dilated(
    query: Tensor, key: Tensor, value: Tensor, pairs: list[tuple[int, int]], at_once: int
) -> Tensor:
    found: list[Tensor] = []
    weights: list[Tensor] = []
    for segment, dilation in pairs:
        attended = torch.zeros_like(query)
        normaliser = torch.full_like(wide(query[:, :, 0]), float("-inf"))
        for offset in range(min(dilation, query.shape[0], query.shape[1])):
            q = query[offset::dilation, offset::dilation]
            k = key[offset::dilation, offset::dilation]
            v = value[offset::dilation, offset::dilation]
            length = segment // dilation
            rows = max(1, at_once // (k.shape[0] * length))
            parts: list[Tensor] = []
            norms: list[Tensor] = []
            for first in range(0, q.shape[1], length):
                last = min(first + length, q.shape[1])
                for row in range(first, last, rows):
                    some = q[:, row : min(row + rows, last)]
                    scores = wide(some @ k[:, first:last].transpose(-1, -2))
                    scores = scores * q.shape[-1] ** -0.5
                    norm = scores.logsumexp(-1)
                    shares = (scores - norm[:, :, None]).exp().to(v.dtype)
                    parts.append(shares @ v[:, first:last])
                    norms.append(norm)
            attended[offset::dilation, offset::dilation] = torch.cat(parts, 1)
            normaliser[offset::dilation, offset::dilation] = torch.cat(norms, 1)
        found.append(attended)
        weights.append(normaliser)
    shares = torch.stack(weights).softmax(0).to(query.dtype)
    return (torch.stack(found) * shares[:, :, :, None]).sum(0)


def _in_segments(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """[H, n, d] in segments of `length` rows, the last one shorter -> [H, n, d] and [H, n]."""
    whole = query.shape[1] // length * length
    results = []
    if whole:
        q, k, v = (t[:, :whole].unflatten(1, (-1, length)) for t in (query, key, value))
        attended, normaliser = attention_with_normaliser(q, k, v)
        results.append((attended.flatten(1, 2), normaliser.flatten(1, 2)))
    if whole < query.shape[1]:
        q, k, v = (t[:, whole:] for t in (query, key, value))
        results.append(attention_with_normaliser(q, k, v))
    return torch.cat([r[0] for r in results], 1), torch.cat([r[1] for r in results], 1)

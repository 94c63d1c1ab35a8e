"""The transformer over tiles against attention written out with masks, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.models.attention import initialise
from slidevlm.models.slide.base import APART
from slidevlm.models.slide.transformer import Rotary, Transformer, TransformerConfig, windows

LENGTHS = (9, 1, 14)
TOTAL = sum(LENGTHS)


def bags_for(seed: int = 1) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(TOTAL, 6, generator=generator, dtype=torch.float64)
    positions = 3000.0 * torch.rand(TOTAL, 2, generator=generator)
    return Bags(features, LENGTHS, positions, None, "um")


def encoder_for(**options: Any) -> Transformer:
    torch.manual_seed(0)
    encoder = Transformer(TransformerConfig(width=16, layers=2, heads=2, tokens=3, **options), 6)
    initialise(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.double()


def written_out(encoder: Transformer, bags: Bags, scores_of: Any) -> Tensor:
    """All tiles against all; `scores_of(layer, q, k)` masks and adds what the option says."""
    x = encoder.tiles.project(encoder.tiles.norm(bags.features))
    for i, layer in enumerate(encoder.layers):
        attention = layer.attention
        q, k, v = (
            attention.project(attention.norm(x)).view(TOTAL, 3, 2, 8).permute(1, 2, 0, 3)
        )  # [H, T, d]
        out = scores_of(i, q, k).softmax(-1) @ v
        x = x + attention.out(out.transpose(0, 1).flatten(1))
        part = layer.feed_forward
        a, b = part.inner(layer.norm(x)).chunk(2, -1)
        x = x + part.outer(a * torch.nn.functional.gelu(b))
    return torch.cat([encoder.pool(bag[None]) for bag in x.split(LENGTHS)])


def same_bag() -> Tensor:
    bag = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return bag[:, None] == bag[None]


@pytest.mark.parametrize("window", [0.0, 1000.0])
def test_without_positions_only_bag_and_window_count(window: float) -> None:
    encoder, bags = encoder_for(positions="none", window=window), bags_for()

    def scores_of(layer: int, q: Tensor, k: Tensor) -> Tensor:
        together = same_bag()
        if window:
            cells = ((bags.positions + window / 2 * (layer % 2)) / window).floor()
            together = together & (cells[:, None] == cells[None]).all(-1)
            assert not torch.equal(together, same_bag())
        return (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(~together, float("-inf"))

    torch.testing.assert_close(encoder(bags), written_out(encoder, bags, scores_of))


def test_alibi_is_a_slope_times_the_distance() -> None:
    encoder, bags = encoder_for(positions="alibi"), bags_for()
    distance = (bags.positions[:, None] - bags.positions[None]).norm(dim=-1)

    def scores_of(layer: int, q: Tensor, k: Tensor) -> Tensor:
        bias = torch.stack([distance / 500.0, distance / 50_000.0])
        scores = q @ k.transpose(1, 2) / math.sqrt(8) - bias
        return scores.masked_fill(~same_bag(), float("-inf"))

    torch.testing.assert_close(
        encoder(bags), written_out(encoder, bags, scores_of), atol=1e-6, rtol=1e-6
    )


def test_rotary_turns_pairs_of_channels_as_complex_numbers() -> None:
    rotary = Rotary(8)
    rows, positions = torch.randn(2, 5, 8).double(), 1e3 * torch.rand(5, 2)
    turned = rotary.turn(rows, rotary.waves(positions))
    # Channels i and i + 4 are one number; two for x, two for y.
    angles = positions.double().repeat_interleave(2, 1) / torch.tensor([500.0, 1e5] * 2)
    expected = torch.complex(rows[..., :4], rows[..., 4:]) * torch.exp(2j * math.pi * angles)
    torch.testing.assert_close(turned[..., :4], expected.real, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[..., 4:], expected.imag, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_a_slide_may_lie_anywhere_but_its_shape_counts(positions: str) -> None:
    encoder, bags = encoder_for(positions=positions), bags_for()
    before = encoder(bags)
    bags.positions = bags.positions + torch.tensor([20_000.0, -7_000.0])
    torch.testing.assert_close(encoder(bags), before, atol=1e-3, rtol=1e-3)
    bags.positions = 3 * bags.positions
    assert (encoder(bags) - before).abs().max() > 1e-2


def test_slides_of_a_specimen_are_never_in_one_window() -> None:
    encoder, bags = encoder_for(positions="none", window=1e5), bags_for()
    bags.slides = torch.arange(TOTAL) % 2
    (encoder.layers[0].attention).register_forward_hook(lambda *a: seen.append(a[1][1]))
    seen: list[Any] = []
    encoder(bags)
    value = torch.eye(TOTAL, dtype=torch.float64).expand(2, -1, -1)
    query = torch.zeros_like(value)
    weights = seen[0](query, query, value)[0]  # [T, T]
    other_slide = bags.slides[:, None] != bags.slides[None]
    assert (weights[other_slide] == 0).all() and (weights[same_bag() & ~other_slide] > 0).all()
    assert APART > 1e5


def test_windows_are_squares_of_one_bag_each() -> None:
    positions = torch.tensor([[0.0, 0], [9, 9], [11, 9], [0, 0], [19, 1]])
    order, lengths = windows(positions, (3, 2), 10.0, 0.0)
    found = [set(part.tolist()) for part in order.split(lengths)]
    assert found == [{0, 1}, {2}, {3}, {4}]
    order, lengths = windows(positions, (3, 2), 10.0, 5.0)
    assert [set(part.tolist()) for part in order.split(lengths)] == [{0}, {1, 2}, {3}, {4}]

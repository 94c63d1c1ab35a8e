"""Dilated attention against one softmax over all rows that a row attends to, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slidevlm.models.ragged import ragged_self_attention
from slidevlm.models.slide import longnet
from slidevlm.models.slide.longnet import along_curve, dilated_attention

PAIRS = ((4, 1), (8, 2), (32, 4))


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Row by row: the rows of each segment it belongs to, counted as often as they occur."""
    heads, length, width = query.shape
    rows = []
    for h in range(heads):
        for i in range(length):
            seen = [
                j
                for segment, dilation in PAIRS
                if i % dilation == h % dilation
                for j in range(length)
                if j // segment == i // segment and j % dilation == h % dilation
            ]
            scores = key[h, seen] @ query[h, i] / math.sqrt(width)
            rows.append(scores.softmax(0) @ value[h, seen])
    return torch.stack(rows).view(heads, length, width)


@pytest.mark.parametrize("length", [1, 3, 29, 40])
def test_dilated_attention_is_exact(length: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(5, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours, expected = dilated_attention(*leaves, PAIRS), written_out(*leaves)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_costs_no_more_than_in_any_attention(
    dtype: torch.dtype, bound: float
) -> None:
    """Softmax and denominators have 32 bits: with 16 the error was three times as large."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 4, 600, 16, generator=generator).to(dtype)
    upper = torch.randn(4, 600, 16, generator=generator)
    pairs = ((64, 1), (256, 2), (1024, 4))

    def of(wanted: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(wanted).requires_grad_() for t in inputs]
        attended = dilated_attention(*leaves, pairs)
        assert attended.dtype == wanted
        gradients = torch.autograd.grad((attended.float() * upper).sum(), leaves)
        return [attended.double(), *(g.double() for g in gradients)]

    exact, found = of(torch.float64), of(dtype)
    traced = longnet.traced_dilated_attention(*inputs, pairs)
    assert traced.dtype == dtype
    for mine, reference in zip([*found, traced.double()], [*exact, exact[0]], strict=True):
        assert (mine - reference).norm() < 2 * bound * reference.norm()
    plain = ragged_self_attention(*inputs, [600]).double()
    reference = ragged_self_attention(*inputs.double(), [600])
    assert (plain - reference).norm() > bound / 2 * reference.norm(), "what is to be had at all"


def test_the_curve_visits_quadrants_one_after_the_other() -> None:
    x, y = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy")
    positions = 256.0 * torch.stack([x.flatten(), y.flatten()], 1)
    order = along_curve(torch.cat([positions, positions.flip(0)]), (64, 64))
    assert sorted(order[:64].tolist()) == list(range(64))
    first, second = positions[order[:64]], positions.flip(0)[order[64:] - 64]
    assert torch.equal(first, second)
    quadrant = (first >= 4 * 256).long() @ torch.tensor([1, 2])
    assert quadrant.tolist() == [q for q in range(4) for _ in range(16)]
    steps = (first[1:] - first[:-1]).norm(dim=1)
    assert steps.mean() < 2 * 256  # in order of rows: about the same, but with jumps of a row


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
@pytest.mark.parametrize("length", [1, 5, 8, 30])
def test_attention_for_traces_is_the_same(length: int, at_once: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, length, 6, generator=generator)
    expected = dilated_attention(q, k, v, PAIRS)
    monkeypatch.setattr(longnet, "SCORES_AT_ONCE", at_once)
    torch.testing.assert_close(longnet.traced_dilated_attention(q, k, v, PAIRS), expected)

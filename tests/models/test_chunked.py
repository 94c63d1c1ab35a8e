"""Attention a piece at a time, against softmax written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slidevlm.models import chunked, ragged
from slidevlm.models.chunked import attention_with_normaliser, chunked_attention, chunks_serve
from slidevlm.models.ragged import ragged_cross_attention


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same_values_and_gradients(
    ours: Callable[..., Tensor], expected: Callable[..., Tensor], leaves: tuple[Tensor, ...]
) -> None:
    weights = torch.randn(expected(*leaves).shape, dtype=torch.float64)
    for mine, reference in zip(
        *(
            (out := f(*leaves), *torch.autograd.grad((out * weights).sum(), leaves))
            for f in (ours, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=1e-10)


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1) @ value


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("at_once", [1 << 19, 100, 1])
def test_chunks_are_exact(heads: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, in pieces of which the last is smaller, and key by key."""
    monkeypatch.setattr(chunked, "CHUNK_SCORES", at_once)
    torch.manual_seed(0)
    leaves = leaf(heads, 5, 8), leaf(heads, 37, 8), leaf(heads, 37, 8)
    assert_same_values_and_gradients(chunked_attention, written_out, leaves)


def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest score comes last, far above and below what exp can take."""
    monkeypatch.setattr(chunked, "CHUNK_SCORES", 4)
    query = torch.ones(1, 2, 1)
    key = torch.tensor([-500.0, 20, -900, 700]).view(1, 4, 1).requires_grad_()
    value = torch.arange(4.0).view(1, 4, 1)
    found = chunked_attention(query, key, value)
    torch.testing.assert_close(found, torch.full((1, 2, 1), 3.0))
    found.sum().backward()
    assert key.grad is not None and torch.isfinite(key.grad).all()


def test_a_long_bag_of_one_head_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bag of a batch by its own length; the same numbers in either way, to float32."""
    calls: list[int] = []

    def counting(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(key.shape[1])
        return chunked_attention(query, key, value)

    monkeypatch.setattr(ragged, "chunked_attention", counting)
    torch.manual_seed(0)
    lengths = (1500, 20, 1000)
    total = sum(lengths)
    query, key, value = torch.randn(3, 1, 4, 8), torch.randn(1, total, 8), torch.randn(1, total, 8)
    found = ragged_cross_attention(query, key, value, lengths)
    assert calls == [1500, 1000]
    monkeypatch.setattr(chunked, "CHUNKED_KEYS", total)
    torch.testing.assert_close(found, ragged_cross_attention(query, key, value, lengths))
    assert calls == [1500, 1000]


def test_what_chunks_do_not_serve() -> None:
    key = torch.zeros(1, 2000, 8)
    assert chunks_serve(torch.zeros(1, 4, 8), key)
    assert not chunks_serve(torch.zeros(1, 4, 8), key[:, :10])
    assert not chunks_serve(torch.zeros(2, 4, 8), key.expand(2, -1, -1))
    assert not chunks_serve(torch.zeros(1, 4, 8, dtype=torch.bfloat16), key)
    assert not chunks_serve(torch.zeros(1, 4, 8, device="meta"), key)


@pytest.mark.parametrize("at_once", [1 << 25, 14])
def test_normaliser_and_its_gradient_are_exact(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(chunked, "WINDOW_SCORES", at_once)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended, normaliser = attention_with_normaliser(query, key, value)
        return torch.cat([attended, normaliser[..., None]], -1)

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) / math.sqrt(8)
        return torch.cat([scores.softmax(-1) @ value, scores.logsumexp(-1)[..., None]], -1)

    leaves = leaf(3, 2, 5, 8), leaf(3, 2, 7, 8), leaf(3, 2, 7, 8)
    assert_same_values_and_gradients(ours, reference, leaves)

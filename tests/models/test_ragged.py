"""Ragged attention against float64 references that pad and mask; the flash path through a kernel
of the same meaning, written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slidevlm.models import ragged
from slidevlm.models.attention import CrossAttention, KeyValues, TileAttention
from slidevlm.models.ragged import (
    distance_attention,
    flash_cross,
    flash_self,
    ragged_cross_attention,
    ragged_self_attention,
)

LENGTHS = (5, 1, 17, 3)
TOTAL = sum(LENGTHS)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def bag_of_row(lengths: tuple[int, ...]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def padded_cross(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One padded batch, an explicit mask, softmax written out."""
    longest = max(lengths)
    batch, heads, _, d = query.shape
    keys = torch.zeros(batch, heads, longest, d, dtype=key.dtype)
    values = torch.zeros_like(keys)
    mask = torch.zeros(batch, 1, 1, longest, dtype=torch.bool)
    start = 0
    for b, length in enumerate(lengths):
        keys[b, :, :length] = key[:, start : start + length]
        values[b, :, :length] = value[:, start : start + length]
        mask[b, ..., :length] = True
        start += length
    scores = (query @ keys.transpose(-1, -2) / math.sqrt(d)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ values


def masked_self(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """All rows against all, those of other bags masked."""
    bag = bag_of_row(lengths)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(bag[:, None] != bag[None], float("-inf"))
    return scores.softmax(-1) @ value


def assert_same_values_and_gradients(
    ours: Callable[..., Tensor], expected: Callable[..., Tensor], leaves: tuple[Tensor, ...]
) -> None:
    results = []
    for attend in (ours, expected):
        out = attend(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("lengths", [LENGTHS, (26,)])
def test_cross_attention_is_exact(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    leaves = leaf(len(lengths), 2, 3, 8), leaf(2, TOTAL, 8), leaf(2, TOTAL, 8)
    assert_same_values_and_gradients(
        lambda *a: ragged_cross_attention(*a, lengths),
        lambda *a: padded_cross(*a, lengths),
        leaves,
    )


@pytest.mark.parametrize("lengths", [LENGTHS, (26,)])
def test_self_attention_is_exact(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    leaves = leaf(2, TOTAL, 8), leaf(2, TOTAL, 8), leaf(2, TOTAL, 8)
    assert_same_values_and_gradients(
        lambda *a: ragged_self_attention(*a, lengths),
        lambda *a: masked_self(*a, lengths),
        leaves,
    )


@pytest.mark.parametrize("at_once", [1 << 25, 40])
def test_distance_attention_is_exact_in_one_piece_or_many(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(ragged, "SCORES_AT_ONCE", at_once)
    positions = 1e4 * torch.rand(TOTAL, 2)
    slopes = torch.tensor([1e-3, 5e-5])
    bag = bag_of_row(LENGTHS)

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        distance = (positions[:, None] - positions[None]).norm(dim=-1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(8)
        scores = scores - (slopes[:, None, None] * distance).double()
        scores = scores.masked_fill(bag[:, None] != bag[None], float("-inf"))
        return scores.softmax(-1) @ value

    leaves = leaf(2, TOTAL, 8), leaf(2, TOTAL, 8), leaf(2, TOTAL, 8)
    assert_same_values_and_gradients(
        lambda *a: distance_attention(*a, LENGTHS, positions, slopes), reference, leaves
    )


def written_out_flash(
    query: Tensor, key: Tensor, value: Tensor, first_q: Tensor, first_k: Tensor, mq: int, mk: int
) -> Tensor:
    """What a variable-length kernel means: rows [T, H, d], bag b's begin at first[b]."""
    assert first_q.dtype == first_k.dtype == torch.int32
    assert int(first_q[-1]) == len(query) and int(first_k[-1]) == len(key)
    assert int(first_q.diff().max()) == mq and int(first_k.diff().max()) == mk
    outputs = []
    for b in range(len(first_q) - 1):
        q = query[first_q[b] : first_q[b + 1]]
        k, v = (t[first_k[b] : first_k[b + 1]] for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def test_flash_calls_mean_the_same() -> None:
    torch.manual_seed(0)
    key, value = leaf(2, TOTAL, 8), leaf(2, TOTAL, 8)
    assert_same_values_and_gradients(
        lambda *a: flash_cross(written_out_flash, *a, LENGTHS),
        lambda *a: padded_cross(*a, LENGTHS),
        (leaf(4, 2, 3, 8), key, value),
    )
    assert_same_values_and_gradients(
        lambda *a: flash_self(written_out_flash, *a, LENGTHS),
        lambda *a: masked_self(*a, LENGTHS),
        (leaf(2, TOTAL, 8), key, value),
    )


def test_flash_is_for_half_precision_on_cuda() -> None:
    assert not ragged.flash_serves(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(ragged.FLASH is None, reason="needs torch 2.10")
def test_flash_on_the_device_equals_float64_on_the_host() -> None:
    torch.manual_seed(0)
    query, key, value = leaf(4, 2, 3, 64), leaf(2, TOTAL, 64), leaf(2, TOTAL, 64)
    on_device = [t.detach().to("cuda", torch.bfloat16) for t in (query, key, value)]
    assert ragged.flash_serves(on_device[0])
    expected = padded_cross(query, key, value, LENGTHS)
    got = ragged_cross_attention(*on_device, LENGTHS)
    torch.testing.assert_close(got.double().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("by_distance", [False, True])
@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_attention_for_traces_is_the_same(by_distance: bool, at_once: int, monkeypatch) -> None:
    """With scores of a row, of some rows and of a window at a time."""
    monkeypatch.setattr(ragged, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    counts = (3, 1, 12, 5)
    q, k, v = torch.randn(3, 2, sum(counts), 8, generator=generator)
    positions = 1e4 * torch.rand(sum(counts), 2, generator=generator)
    slopes = torch.tensor([1e-3, 1e-4])
    near = (positions, slopes) if by_distance else ()
    found = ragged.traced_self_attention(q, k, v, torch.tensor(counts), *near)
    plain = distance_attention if by_distance else ragged_self_attention
    torch.testing.assert_close(found, plain(q, k, v, counts, *near))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation inside makes, forward and backward."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def kept_and_largest(attend: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[int, int]:
    """Entries kept for the backward pass, and of the largest tensor of both passes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend(*leaves)
        out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return sum(kept.values()), largest.entries


WIDTH, HEADS, WINDOW = 16, 2, 50


def cross_of(tiles: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Five latents a bag read two bags."""
    to_kv, attention = KeyValues(WIDTH, WIDTH, HEADS), CrossAttention(WIDTH, HEADS, 0.0)
    lengths = (tiles // 4, tiles - tiles // 4)

    def attend(x: Tensor, context: Tensor) -> Tensor:
        return attention.ragged(x, *to_kv(context), lengths)

    return attend, (_float(2, 5, WIDTH), _float(tiles, WIDTH))


def self_of(tiles: int, window: int | None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """All tiles of a bag, or those of a window, attend to each other."""
    attention = TileAttention(WIDTH, HEADS, 0.0)
    lengths = (window,) * (tiles // window) if window else (tiles,)

    def attend(x: Tensor) -> Tensor:
        return attention(x, lambda q, k, v: ragged_self_attention(q, k, v, lengths))

    return attend, (_float(tiles, WIDTH),)


def near_of(tiles: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    attention = TileAttention(WIDTH, HEADS, 0.0)
    positions, slopes = 1e4 * torch.rand(tiles, 2), torch.tensor([1e-3, 1e-4])

    def attend(x: Tensor) -> Tensor:
        near = lambda q, k, v: distance_attention(q, k, v, (tiles,), positions, slopes)  # noqa: E731
        return attention(x, near)

    return attend, (_float(tiles, WIDTH),)


def _float(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(cross_of, id="cross"),
        pytest.param(lambda n: self_of(n, None), id="self"),
        pytest.param(lambda n: self_of(n, WINDOW), id="windows"),
        pytest.param(near_of, id="distance"),
    ],
)
def test_memory_is_linear_in_tiles(
    kind: Callable[[int], tuple[Callable[..., Tensor], tuple[Tensor, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is kept grows by as much from 2 N to 4 N as twice from N to 2 N, and no operation
    makes a matrix of tiles by tiles."""
    monkeypatch.setattr(ragged, "SCORES_AT_ONCE", 1 << 14)
    torch.manual_seed(0)
    n = 500
    kept, largest = zip(*(kept_and_largest(*kind(m * n)) for m in (1, 2, 4)), strict=True)
    assert kept[1] > kept[0]
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.02)
    assert largest[2] <= max(4 * largest[0], 1 << 14) < (4 * n) ** 2 / 8


def test_a_matrix_of_scores_would_be_seen() -> None:
    """The count above finds attention written out."""

    def attend(x: Tensor) -> Tensor:
        return (x @ x.T).softmax(-1) @ x

    (few, large), (more, larger) = (kept_and_largest(attend, (_float(n, 8),)) for n in (300, 600))
    assert large == 300**2 and larger == 600**2 and more > 3 * few

"""Attention written out a piece at a time, where no kernel of torch's gives what is needed.

Scores exist for some rows or keys at a time and are computed again in the backward pass, so memory
grows with rows and keys, never with their product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slidevlm.precision import wide

WINDOW_SCORES = 1 << 25  # entries of a score matrix held at a time by `attention_with_normaliser`
CHUNK_SCORES = 1 << 19  # the same by `chunked_attention`: 2 MB in float32, which caches hold
CHUNKED_KEYS = 1_000  # bags from here on; below, the kernel is as fast


def chunks_serve(query: Tensor, key: Tensor) -> bool:
    """Whether `chunked_attention` is the faster way for a query [H, L, d] and key [H, N, d].

    torch's kernel shares the backward pass on a CPU out over heads, so that of a single head runs
    on one core, and its products there can take tens of times as long as they need.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and not torch.jit.is_tracing()  # the number of chunks would be a constant
        and len(query) == 1
        and key.shape[1] >= CHUNKED_KEYS
    )


def chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of few queries to many keys, exact, some keys at a time.

    The running softmax of Milakov and Gimelshein (2018), with the backward pass of FlashAttention
    (Dao et al., 2022), in plain matrix products, which use all cores for any number of heads.

    Args:
        query: [H, L, d].
        key: [H, N, d].
        value: [H, N, d].

    Returns:
        [H, L, d].
    """
    attended: Tensor = _Chunked.apply(query, key, value)
    return attended


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query * query.shape[-1] ** -0.5
        top = q.new_full((*q.shape[:2], 1), float("-inf"))
        total = torch.zeros_like(top)
        attended = torch.zeros_like(q)
        for rows in _chunks(query, key):
            scores = q @ key[:, rows].transpose(1, 2)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = scores.sub_(higher).exp_()
            shrink = top.sub_(higher).exp_()
            total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            attended.mul_(shrink).baddbmm_(weights, value[:, rows])
            top = higher
        attended /= total
        ctx.save_for_backward(query, key, value, attended, total.log_().add_(top))
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, attended, normaliser = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        q = query * scale
        # Gradient of the scores: P (dO V' - rowsum(dO O)).
        shift = (gradient * attended).sum(-1, keepdim=True)
        to_query = torch.zeros_like(q)
        to_key, to_value = torch.empty_like(key), torch.empty_like(value)
        for rows in _chunks(query, key):
            k, v = key[:, rows], value[:, rows]
            shape = (*q.shape[:2], k.shape[1])
            weights = torch.baddbmm(normaliser.expand(shape), q, k.transpose(1, 2), beta=-1).exp_()
            scores = torch.baddbmm(shift.expand(shape), gradient, v.transpose(1, 2), beta=-1)
            scores.mul_(weights)
            to_value[:, rows] = weights.transpose(1, 2) @ gradient
            to_key[:, rows] = scores.transpose(1, 2) @ q
            to_query.baddbmm_(scores, k)
        return to_query.mul_(scale), to_key, to_value


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    """The keys in pieces whose scores fit into `CHUNK_SCORES`."""
    rows = max(1, CHUNK_SCORES // (len(query) * query.shape[1]))
    return [slice(start, start + rows) for start in range(0, key.shape[1], rows)]


def attention_with_normaliser(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of the softmax's denominator, both with exact gradients.

    Two results over different keys can be joined exactly, weighted with their denominators.
    Products are of the inputs' type, the softmax and its denominator of 32 bits at least: bfloat16
    of a logarithm around 10 is off by 3 % of what it stands for.

    Args:
        query: [..., L, d].
        key: [..., N, d].
        value: [..., N, d].

    Returns:
        [..., L, d], and [..., L] in float32 or wider.
    """
    attended, normaliser = _WithNormaliser.apply(query, key, value)
    return attended, normaliser


class _WithNormaliser(torch.autograd.Function):
    """Scores for some queries at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        attended, normaliser = [], []
        for q in query.split(_rows_at_once(key), dim=-2):
            scores = wide(q @ key.transpose(-1, -2)) * q.shape[-1] ** -0.5
            normaliser.append(scores.logsumexp(-1))
            weights = scores.sub_(normaliser[-1][..., None]).exp_()
            attended.append(weights.to(value.dtype) @ value)
        outputs = torch.cat(attended, -2), torch.cat(normaliser, -1)
        ctx.save_for_backward(query, key, value, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, attended, normaliser = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        # Gradient of the scores: P (dO V' - rowsum(dO O) + d normaliser).
        shift = gradients[1] - (wide(gradients[0]) * attended).sum(-1)
        to_query, to_key, to_value = [], torch.zeros_like(key), torch.zeros_like(value)
        rows = _rows_at_once(key)
        for q, g, n, s in zip(
            query.split(rows, -2),
            gradients[0].split(rows, -2),
            normaliser.split(rows, -1),
            shift.split(rows, -1),
            strict=True,
        ):
            weights = (wide(q @ key.transpose(-1, -2)) * scale - n[..., None]).exp()
            to_value += weights.to(g.dtype).transpose(-1, -2) @ g
            scores = weights * (wide(g @ value.transpose(-1, -2)) + s[..., None])
            scores = scores.to(q.dtype)
            to_query.append(scores @ key * scale)
            to_key += scores.transpose(-1, -2) @ q * scale
        return torch.cat(to_query, -2), to_key, to_value


def _rows_at_once(key: Tensor) -> int:
    """Queries whose scores fit together into `WINDOW_SCORES`."""
    return max(1, WINDOW_SCORES // max(1, key[..., 0].numel()))

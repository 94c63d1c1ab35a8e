"""Attention over ragged bags: the one module that knows how it is computed.

Bags lie end to end in one tensor and are never padded: attention from L queries to a bag costs L
times that bag's own length, and memory grows with the tiles, never with their square. Heads come
first, [H, T, d], so that a bag is a view of rows that are evenly spaced for every head.

On a CUDA device, in 16 bits, all bags of a batch are one call of the variable-length flash kernel
(`torch.nn.attention.varlen`, torch 2.10 and later); everywhere else, and for what that kernel
does not do, each bag goes through `scaled_dot_product_attention` by itself, which on a CPU is
faster than a padded batch with a mask; but one head over many rows, as the published perceivers
read, through `slidevlm.models.chunked`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, Optional, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slidevlm.models.chunked import chunked_attention, chunks_serve
from slidevlm.models.pieces import are_shared, share

# query [Tq, H, d], key and value [Tk, H, d], first rows of the bags [B + 1] int32 of queries and
# keys, longest bag of each -> [Tq, H, d]
Flash = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
try:
    from torch.nn.attention import varlen

    FLASH: Flash | None = cast(Flash, varlen.varlen_attn)
except ImportError:  # torch before 2.10
    FLASH = None

FLASH_HEAD_WIDTH = 256  # the kernel's limit
SCORES_AT_ONCE = 1 << 25  # entries of a score matrix held at a time where one is needed


def ragged_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Each bag's own queries attend to that bag's rows only.

    Args:
        query: [B, H, L, d].
        key: [H, T, d], all bags end to end.
        value: [H, T, d].
        lengths: rows of each bag; B numbers whose sum is T.

    Returns:
        [B, H, L, d].
    """
    if FLASH is not None and flash_serves(query):
        return flash_cross(FLASH, query, key, value, lengths)
    keys, values = bags_of(key, lengths, 1), bags_of(value, lengths, 1)
    if len(key) > 1 and are_shared(key):
        return _shared_attention(query, keys, values)
    outputs = [
        chunked_attention(q, k, v)[None]
        if chunks_serve(q, k)
        else F.scaled_dot_product_attention(q[None], k[None], v[None])
        for q, k, v in zip(query, keys, values, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _shared_attention(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Each bag's queries [B, H, L, d] to its keys and values [H, N, d], by bag and head."""
    batch, heads, length, width = query.shape
    attended = query.new_empty(batch, length, heads, width)

    def work(number: int) -> None:
        b, h = divmod(number, heads)
        one = slice(h, h + 1)
        found = F.scaled_dot_product_attention(
            query[b : b + 1, one], keys[b][None, one], values[b][None, one]
        )
        attended[b, :, h] = found[0, 0]

    share(work, batch * heads)
    return attended.transpose(1, 2)


def ragged_self_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Each row attends to the rows of its own bag.

    A local window is a bag, too: rows sorted by window, and `lengths` the rows of each.

    Args:
        query: [H, T, d], all bags end to end.
        key: [H, T, d].
        value: [H, T, d].
        lengths: rows of each bag; their sum is T.

    Returns:
        [H, T, d].
    """
    if FLASH is not None and flash_serves(query):
        return flash_self(FLASH, query, key, value, lengths)
    parts = zip(*(bags_of(t, lengths, 1) for t in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def distance_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    positions: Tensor,
    slopes: Tensor,
) -> Tensor:
    """Self-attention whose scores fall with physical distance (ALiBi; Press et al., 2022).

    The score of rows i and j is `q_i . k_j / sqrt(d) - slope |position_i - position_j|`. Scores
    exist for some rows at a time and are computed again in the backward pass.

    Args:
        query: [H, T, d], all bags end to end.
        key: [H, T, d].
        value: [H, T, d].
        lengths: rows of each bag; their sum is T.
        positions: [T, 2] float32, without gradient.
        slopes: [H], 1 / unit of the positions, without gradient.

    Returns:
        [H, T, d].
    """
    if torch.jit.is_tracing():
        counts = torch.ones_like(key[0, :, 0], dtype=torch.int64).sum()[None]  # not a number
        return traced_self_attention(query, key, value, counts, positions, slopes)
    outputs = []
    start = 0
    for length in lengths:
        bag = slice(start, start + length)
        k, v, places = key[:, bag], value[:, bag], positions[bag]
        rows = max(1, SCORES_AT_ONCE // (len(slopes) * length))
        for first in range(start, start + length, rows):
            some = slice(first, min(first + rows, start + length))
            inputs = (query[:, some], k, v, positions[some], places, slopes)
            if torch.is_grad_enabled():
                outputs.append(checkpoint(_near, *inputs, use_reentrant=False))
            else:
                outputs.append(_near(*inputs))
        start += length
    return torch.cat(outputs, 1)


def traced_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    positions: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Self-attention of a bag or its windows for a trace, whose loops must be TorchScript.

    Args:
        query: [H, T, d].
        key: [H, T, d].
        value: [H, T, d].
        counts: [W] int64, rows of each window end to end; their sum is T.
        positions: [T, 2], where scores fall with distance.
        slopes: [H], likewise.

    Returns:
        [H, T, d].
    """
    attended: Tensor = scripted(_by_counts)(
        query, key, value, counts, positions, slopes, SCORES_AT_ONCE
    )
    return attended


@cache
def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in TorchScript, in which loops and branches stay what they are in a trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit as a whole
        graph: Callable[..., Any] = torch.jit.script(function)
    return graph


# Not `X | None`: TorchScript reads annotations as they stand.
def _by_counts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    positions: Optional[Tensor],  # noqa: UP045
    slopes: Optional[Tensor],  # noqa: UP045
    at_once: int,
) -> Tensor:
    outputs: list[Tensor] = []
    start = 0
    for window in range(counts.numel()):
        end = start + int(counts[window])
        k, v = key[:, start:end], value[:, start:end]
        rows = max(1, at_once // (key.shape[0] * (end - start)))
        for first in range(start, end, rows):
            last = min(first + rows, end)
            bias: Optional[Tensor] = None  # noqa: UP045
            if positions is not None and slopes is not None:
                offsets = positions[first:last].float()[:, None] - positions[start:end].float()
                bias = -slopes.float()[:, None, None] * offsets.norm(2, dim=-1)
                bias = bias[None].to(query.dtype)
            outputs.append(
                F.scaled_dot_product_attention(
                    query[None, :, first:last], k[None], v[None], attn_mask=bias
                )[0]
            )
        start = end
    return torch.cat(outputs, 1)


def _near(
    query: Tensor, key: Tensor, value: Tensor, mine: Tensor, theirs: Tensor, slopes: Tensor
) -> Tensor:
    # Differences, not cdist's matrix product, whose rounding is as large as a tile.
    offsets = mine.float()[:, None] - theirs.float()[None]  # [rows, N, 2]
    bias = -slopes.float()[:, None, None] * offsets.norm(2, dim=-1)
    attended = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=bias[None].to(query.dtype)
    )
    return attended[0]


def flash_serves(query: Tensor) -> bool:
    """Whether the variable-length kernel computes queries [..., d] of this type and device."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and not torch.jit.is_tracing()  # it takes lengths as numbers
        and query.dtype in (torch.float16, torch.bfloat16)
        and width <= FLASH_HEAD_WIDTH
        and width % 8 == 0
    )


def flash_cross(
    flash: Flash, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> Tensor:
    """`ragged_cross_attention` as one call of a variable-length kernel."""
    batch, heads, length, width = query.shape
    rows = query.transpose(1, 2).reshape(batch * length, heads, width)
    attended = flash(
        rows,
        key.transpose(0, 1),
        value.transpose(0, 1),
        first_rows([length] * batch, query.device),
        first_rows(lengths, query.device),
        length,
        max(lengths),
    )
    return attended.view(batch, length, heads, width).transpose(1, 2)


def flash_self(
    flash: Flash, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> Tensor:
    """`ragged_self_attention` as one call of a variable-length kernel."""
    first, longest = first_rows(lengths, query.device), max(lengths)
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    return flash(q, k, v, first, first, longest, longest).transpose(0, 1)


def first_rows(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[B + 1] int32: where each bag begins, and the end. The host does not wait for the device."""
    first = torch.tensor(
        [0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda"
    )
    return first.to(device, non_blocking=True)


def bags_of(rows: Tensor, lengths: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """T rows along `dim` -> B views of each bag's rows.

    A single bag needs no split, whose backward copies, and whose trace would hold its length.
    """
    return (rows,) if len(lengths) == 1 else rows.split(list(lengths), dim=dim)

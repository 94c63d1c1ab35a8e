"""Layer norm and linear map of tile features in one, without a normalised copy of the features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_AT_ONCE = 4096


def normalised_linear(
    features: Tensor, norm: nn.LayerNorm, weights: tuple[Tensor, ...], bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`F.linear(norm(features), weight)` for each of several weights.

    Tiles are data: they need no gradient. The norm's own weight and bias then are absorbed by the
    linear maps, `W (g x + b) = (W g) x + W b`, so that their gradients need no [T, D] tensor, and
    rows are normalised some at a time, forward and again backward, in float32 from any type.
    Features that do need a gradient, and graphs that are traced or compiled, take the plain way.

    Args:
        features: [T, D] of any float type.
        norm: over D channels.
        weights: [W, D] each.
        bias: [sum of W], added to the outputs.

    Returns:
        One [T, W] for each weight, contiguous.
    """
    assert norm.weight is not None and norm.bias is not None
    plain = features.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing()
    parts = [None] * len(weights) if bias is None else bias.split([len(w) for w in weights])
    if plain:
        rows = norm(features.to(norm.weight.dtype))
        return tuple(F.linear(rows, w, b) for w, b in zip(weights, parts, strict=True))
    folded, biases = [], []
    for weight, part in zip(weights, parts, strict=True):
        folded.append(weight * norm.weight)
        constant = weight @ norm.bias
        biases.append(constant if part is None else constant + part)
    outputs: tuple[Tensor, ...] = _NormalisedLinear.apply(features, norm.eps, *folded, *biases)
    return outputs


class _NormalisedLinear(torch.autograd.Function):
    """Rows normalised without affine part, then several linear maps."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, eps: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        device = features.device.type
        dtype = parameters[0].dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        count = len(parameters) // 2
        weights = [p.to(dtype) for p in parameters[:count]]
        biases = [p.to(dtype) for p in parameters[count:]]
        outputs = tuple(features.new_empty(len(features), len(w), dtype=dtype) for w in weights)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(features), ROWS_AT_ONCE):
                rows = _normalised(features[start : start + ROWS_AT_ONCE], eps, dtype)
                for output, weight, bias in zip(outputs, weights, biases, strict=True):
                    # Written in place: the product of a chunk is not copied.
                    part = output[start : start + ROWS_AT_ONCE]
                    torch.addmm(bias, rows, weight.T, out=part)
        ctx.save_for_backward(features)
        ctx.eps, ctx.dtypes = eps, [p.dtype for p in parameters]
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        dtype = gradients[0].dtype
        to_weights = [
            torch.zeros(g.shape[1], features.shape[1], device=g.device, dtype=torch.float32)
            if dtype.itemsize < 4
            else g.new_zeros(g.shape[1], features.shape[1])
            for g in gradients
        ]
        for start in range(0, len(features), ROWS_AT_ONCE):
            rows = _normalised(features[start : start + ROWS_AT_ONCE], ctx.eps, dtype)
            for total, gradient in zip(to_weights, gradients, strict=True):
                part = gradient[start : start + ROWS_AT_ONCE]
                if total.dtype == dtype:
                    total.addmm_(part.T, rows)
                else:
                    total += part.T @ rows
        to_biases = [g.sum(0, dtype=t.dtype) for g, t in zip(gradients, to_weights, strict=True)]
        result = [t.to(d) for t, d in zip([*to_weights, *to_biases], ctx.dtypes, strict=True)]
        return (None, None, *result)


def _normalised(features: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    rows = wide(features)
    return F.layer_norm(rows, rows.shape[-1:], eps=eps).to(dtype)


def wide(x: Tensor) -> Tensor:
    """`x`, in float32 where its type is narrower."""
    return x if x.dtype.itemsize >= 4 else x.float()

"""Linear maps that keep their input's input: what is cheap to compute again is not kept.

A linear layer keeps what it multiplies until the backward pass. Where that is a layer norm or an
activation of something kept anyway, it is computed again there instead: a quarter of a
transformer layer's memory for a hundredth of its time, the same numbers to the last bit. A layer
that has been replaced by another kind (LoRA, quantised), and a graph that is traced, scripted or
compiled, takes the plain way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.models.graphs import outside_autograd
from slidevlm.models.pieces import are_shared, share
from slidevlm.models.tile_rows import (
    Moments,
    Standard,
    are_data,
    normalised_rows,
    use_normalised,
)

PIECE = 1 << 17  # numbers that a thread takes at a time, where threads take pieces

# [..., n] and parameters -> [..., in of the linear layer]
Before = Callable[..., Tensor]


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Module) -> Tensor:
    """`linear(norm(x))`."""
    if not _recomputes(x, linear):
        if are_shared(x) and is_plain(linear) and not _are_watched(norm, linear):
            return _in_pieces(x, norm, linear)
        y: Tensor = linear(norm(x))
        return y

    def before(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    return _linear_of(before, linear, x, norm.weight, norm.bias)


def _are_watched(norm: nn.Module, linear: nn.Module) -> bool:
    """Whether something else than their weights is in them, or wants to know of their calls."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (norm, linear))
    return hooked or type(norm) is not nn.LayerNorm or is_replaced(norm)


def _in_pieces(x: Tensor, norm: nn.LayerNorm, linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    rows = x.flatten(0, -2)
    y = x.new_empty(len(rows), linear.out_features)
    size = max(1, PIECE // rows.shape[1])
    parts = list(zip(rows.split(size), y.split(size), strict=True))

    def work(number: int) -> None:
        some, found = parts[number]
        some = F.layer_norm(some, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if linear.bias is None:
            torch.mm(some, linear.weight.T, out=found)
        else:
            torch.addmm(linear.bias, some, linear.weight.T, out=found)

    share(work, len(parts))
    return y.view(*x.shape[:-1], -1)


def gelu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """`linear(gelu(x))`."""
    if not _recomputes(x, linear):
        y: Tensor = linear(F.gelu(x))
        return y
    return _linear_of(F.gelu, linear, x)


def geglu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """`linear(a * gelu(b))`, where x [..., 2 n] is a and b side by side."""
    if not _recomputes(x, linear):
        y: Tensor = linear(_geglu(x))
        return y
    return _linear_of(_geglu, linear, x)


def _geglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def is_plain(linear: nn.Module) -> bool:
    """Whether it is a linear layer and nothing more, so that its weight may be used directly."""
    return type(linear) is nn.Linear and not is_replaced(linear)


def is_replaced(module: nn.Module) -> bool:
    """Whether this one module's `forward` is another than its class's, as a compiled one's is."""
    return "forward" in module.__dict__


def shares_weight(model: nn.Module, layer: nn.Linear) -> bool:
    """Whether another module has the layer's weight too, as of a tied vocabulary projection."""
    owners = [m for m in model.modules() if any(p is layer.weight for p in m._parameters.values())]
    return len(owners) > 1


def _recomputes(x: Tensor, linear: nn.Module) -> bool:
    return torch.is_grad_enabled() and not outside_autograd() and is_plain(linear)


def _linear_of(before: Before, linear: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
    assert isinstance(linear, nn.Linear)
    y: Tensor = _LinearOf.apply(before, linear.weight, linear.bias, x, *parameters)
    return y


class _LinearOf(torch.autograd.Function):
    """`F.linear(before(x, *parameters), weight, bias)`, of which x alone is kept."""

    @staticmethod
    def forward(
        ctx: Any, before: Before, weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        device = inputs[0].device.type
        ctx.before, ctx.has_bias, ctx.device = before, bias is not None, device
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.save_for_backward(weight, *inputs)
        return F.linear(before(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        wanted = ctx.needs_input_grad
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted[3:], strict=True)]
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled=enabled):
            multiplied = ctx.before(*leaves)
        to_weight = to_bias = None
        rows = gradient.flatten(0, -2)
        if wanted[1]:
            columns = multiplied.detach().flatten(0, -2).to(rows.dtype)
            to_weight = (rows.T @ columns).to(weight.dtype)
        if wanted[2]:
            to_bias = rows.sum(0).to(weight.dtype)
        found: list[Tensor | None] = [None] * len(leaves)
        if needed:
            back = (rows @ weight.to(rows.dtype)).view_as(multiplied).to(multiplied.dtype)
            gradients = iter(torch.autograd.grad(multiplied, needed, back))
            found = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
        return (None, to_weight, to_bias, *found)


def normalised_linear(
    features: Tensor,
    norm: nn.LayerNorm,
    weights: tuple[Tensor, ...],
    bias: Tensor | None = None,
    standard: Standard | None = None,
    moments: Moments | None = None,
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
        standard: mean and deviation [D] by which the features are standardised before the norm.
        moments: gets to know all rows before the norm, standardised, where `are_data`.

    Returns:
        One [T, W] for each weight, contiguous.
    """
    assert norm.weight is not None and norm.bias is not None
    plain = not are_data(features)
    assert moments is None or not plain
    parts = [None] * len(weights) if bias is None else bias.split([len(w) for w in weights])
    if plain:
        rows = features.to(norm.weight.dtype)
        rows = norm(rows if standard is None else (rows - standard[0]) / standard[1])
        return tuple(F.linear(rows, w, b) for w, b in zip(weights, parts, strict=True))
    folded, biases = [], []
    for weight, part in zip(weights, parts, strict=True):
        folded.append(weight * norm.weight)
        constant = weight @ norm.bias
        biases.append(constant if part is None else constant + part)
    outputs: tuple[Tensor, ...] = _NormalisedLinear.apply(
        features, norm.eps, standard, moments, *folded, *biases
    )
    return outputs


class _NormalisedLinear(torch.autograd.Function):
    """Rows normalised without affine part, then several linear maps."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        eps: float,
        standard: Standard | None,
        moments: Moments | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        device = features.device.type
        dtype = parameters[0].dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        count = len(parameters) // 2
        weights = [p.to(dtype) for p in parameters[:count]]
        biases = [p.to(dtype) for p in parameters[count:]]
        outputs = tuple(features.new_empty(len(features), len(w), dtype=dtype) for w in weights)
        with torch.autocast(device, enabled=False):

            def multiply(begin: int, rows: Tensor) -> None:
                for output, weight, bias in zip(outputs, weights, biases, strict=True):
                    # Written in place: the product of a chunk is not copied.
                    torch.addmm(bias, rows, weight.T, out=output[begin : begin + len(rows)])

            use_normalised(multiply, features, eps, dtype, standard, moments)
        ctx.save_for_backward(features)
        ctx.eps, ctx.standard, ctx.dtypes = eps, standard, [p.dtype for p in parameters]
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
        done = 0
        for rows in normalised_rows(features, ctx.eps, dtype, ctx.standard):
            for total, gradient in zip(to_weights, gradients, strict=True):
                part = gradient[done : done + len(rows)]
                if total.dtype == dtype:
                    total.addmm_(part.T, rows)
                else:
                    total += part.T @ rows
            done += len(rows)
        to_biases = [g.sum(0, dtype=t.dtype) for g, t in zip(gradients, to_weights, strict=True)]
        result = [t.to(d) for t, d in zip([*to_weights, *to_biases], ctx.dtypes, strict=True)]
        return (None, None, None, None, *result)


def narrowed(x: Tensor, weight: Tensor) -> Tensor:
    """An input computed in float32, for a layer whose weight may have 16 bits."""
    if weight.dtype == torch.float16 or weight.dtype == torch.bfloat16:
        x = x.to(weight.dtype)
    return x

"""Layers that read a few tokens on a CPU, in the place of the modules' own: `models/kernels.py`.

They are made for one call of generation, and only of modules that are nothing more than their
float32 weights. Beyond `MOST` rows the modules take over.

What takes the time of a few tokens is reading the weights. For tokens that are only guessed they
are kept rounded to 16 bits besides, which takes half of it: `models/sketch.py`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from slidevlm.models import jit
from slidevlm.models.attention import (
    GEGLU,
    CrossAttention,
    LayerCache,
    SelfAttention,
    SelfAttentionLayer,
)
from slidevlm.models.linear import is_plain, is_replaced

log = logging.getLogger(__name__)

MOST = 24  # rows; of more, the libraries behind torch are as quick: `benchmarks/few_rows.py`


def _started() -> Any:
    """The kernels, compiled; None where that cannot be."""
    return jit.kernels("kernels", threaded=True)


@functools.cache
def _narrow_started(process: int) -> bool:
    """Whether the kernels are compiled for weights in 16 bits too, or could be."""
    kernels = _started()
    try:
        if not kernels.is_compiled(narrow=True):
            log.info("compiling layers with weights in 16 bits: some 20 seconds, once on a machine")
        kernels.compile_all(narrow=True)
    except Exception as error:  # the place for numba's files may have filled up
        log.warning("single reports are the same, but written without guesses by rounded weights, "
                    "whose layers numba cannot compile here (give its files another folder by "
                    "NUMBA_CACHE_DIR): %s", error)  # fmt: skip
        return False
    return True


def is_available() -> bool:
    """Whether numba is there (the extra `cpu`) and works; it is started the first time."""
    return _started() is not None


def cost(rows: int) -> float:
    """What a pass over so many tokens takes, as measured; that over one takes 1."""
    return 1 + (rows - 1) / 8 if rows <= MOST else math.sqrt(rows)


class Fused:
    """What stands in for the layers of some towers.

    Args:
        many: makes the `forward` of a linear layer for more than `MOST` rows.
    """

    def __init__(self, many: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> None:
        self.kernels, self.many = _started(), many
        # Other threads that write with the same model have these layers too.
        self._this_thread = threading.local()
        self.sizes: dict[int, int] = {}  # of weights, by where they lie: some are of two layers
        self.threads = jit.threads()

    def own_threads(self) -> AbstractContextManager[None]:
        """Within, the kernels have as many threads as torch has."""
        return jit.own_threads(self.threads)

    @property
    def size(self) -> int:
        """How many weights the layers have."""
        return sum(self.sizes.values())

    def can_round(self) -> bool:
        """Whether `rounded` works here; compiles what it needs the first time."""
        return _narrow_started(os.getpid())

    @contextmanager
    def rounded(self, kept: Narrowed) -> Iterator[None]:
        """Within, and in this thread, layers have weights rounded to 16 bits: half the time."""
        self._this_thread.narrowed = kept
        try:
            yield
        finally:
            self._this_thread.narrowed = None

    @property
    def narrowed(self) -> Narrowed | None:
        """What this thread reads now, where that is in 16 bits."""
        return getattr(self._this_thread, "narrowed", None)

    def of(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """What `module.forward` may be, where there is something."""
        if is_replaced(module):
            return None
        if isinstance(module, nn.Linear):
            return _Linear(self, module) if is_fit(module) else None
        if type(module) is SelfAttentionLayer and type(module.feed_forward) is GEGLU:
            attention, gated = module.attention, module.feed_forward
            if attention.causal and _are_plain(module, (SelfAttentionLayer, SelfAttention, GEGLU)):
                return _SelfAttentionLayer(self, module, gated)
        if type(module) is CrossAttention and _are_plain(module, (CrossAttention,)):
            return _CrossAttention(self, module)
        return None


def is_fit(linear: nn.Linear) -> bool:
    """Whether a layer is its float32 weight on the CPU and nothing more."""
    weight = linear.weight
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    return is_plain(linear) and plain and _is_array(weight)


def _are_plain(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer is of these kinds, norms, linear layers and dropouts that rest, no more."""
    for module in layer.modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked and module is not layer:  # whose own are called all the same
            return False
        if isinstance(module, nn.Linear):
            plain = is_fit(module)
        elif type(module) is nn.LayerNorm:
            parameters = module.weight, module.bias
            plain = all(p is not None and _is_array(p) for p in parameters)
        elif type(module) is nn.Dropout:
            plain = not module.training or not module.p
        else:
            plain = type(module) in kinds
        if not plain or is_replaced(module):
            return False
    return True


def _is_array(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()


def _norm(norm: nn.LayerNorm) -> tuple[Any, Any, float]:
    return _array(norm.weight), _array(norm.bias), norm.eps


def _rows(x: Tensor) -> Any:
    """x [..., width] -> [R, width]."""
    return x.reshape(-1, x.shape[-1]).contiguous().numpy()


def _are_few(x: Tensor, width: int) -> bool:
    few = 0 < x.numel() <= MOST * width and x.shape[-1] == width
    return few and x.dtype == torch.float32


class Narrowed:
    """Weights in 16 bits, made when they are asked for, kept as long as those in 32 are there."""

    def __init__(self) -> None:
        self.forms: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, weight: Tensor, fused: Fused) -> Any:
        """As the kernels read it; None of a weight without pairs, with an odd number of inputs.

        One that was changed behind torch's back (`.data`, or made in inference mode) is not made
        anew: guesses get worse.
        """
        outputs, inputs = weight.shape
        if inputs % 2:
            return None
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        kept = self.forms.get(weight)
        if kept is None or kept[0] != state:
            form = np.empty((outputs, inputs // 2), np.int32), np.empty(outputs, np.float32)
            fused.kernels.sketch(_array(weight), *form, fused.threads)
            kept = self.forms[weight] = state, form
        return kept[1]


class _Layer:
    def __init__(self, fused: Fused, *weights: Tensor) -> None:
        self.fused, self.tensors = fused, weights
        self.wide = [_array(w) for w in weights]
        self.narrow: list[Any] | None = None
        fused.sizes |= {w.data_ptr(): w.numel() for w in weights}

    def weights(self) -> list[Any]:
        """As they are to be read now, all in the same form."""
        kept = self.fused.narrowed
        if kept is None:
            return self.wide
        if self.narrow is None:
            forms = [kept.of(w, self.fused) for w in self.tensors]
            self.narrow = self.wide if any(f is None for f in forms) else forms
        return self.narrow


class _Linear(_Layer):
    def __init__(self, fused: Fused, linear: nn.Linear) -> None:
        super().__init__(fused, linear.weight)
        self.many, self.width = fused.many(linear), linear.in_features
        self.bias = _array(linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not _are_few(x, self.width):
            return self.many(x)
        (weight,) = self.weights()
        y = self.fused.kernels.linear(weight, self.bias, _rows(x), self.fused.threads)
        return torch.from_numpy(y).view(*x.shape[:-1], -1)


class _CrossAttention(_Layer):
    def __init__(self, fused: Fused, module: CrossAttention) -> None:
        super().__init__(fused, module.query.weight, module.out.weight)
        self.many, self.heads, self.width = module.forward, module.heads, module.query.in_features
        self.norm, self.bias = _norm(module.norm), _array(module.out.bias)

    def __call__(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `CrossAttention.forward`."""
        strides, contexts = key.stride(), max(1, len(key))
        fits = strides[3] == 1 and value.stride() == strides and key.shape[2] > 0
        if not fits or len(x) % contexts or not _are_few(x, self.width):
            return self.many(x, key, value)
        rows = _rows(x)
        y = self.fused.kernels.cross_attention(
            rows, self.norm, *self.weights(), self.bias, self.heads,
            _flat(key), _flat(value), strides[:3], key.shape[2],
            len(rows) // len(key), self.fused.threads,
        )  # fmt: skip
        return torch.from_numpy(y).view(x.shape)


def _flat(tensor: Tensor) -> Any:
    """The memory that a tensor reaches over, [n]."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,)).numpy()


class _SelfAttentionLayer(_Layer):
    def __init__(self, fused: Fused, layer: SelfAttentionLayer, gated: GEGLU) -> None:
        attention = layer.attention
        linears = attention.project, attention.out, gated.inner, gated.outer
        super().__init__(fused, *(linear.weight for linear in linears))
        self.many, self.heads = layer.forward, attention.heads
        self.width = attention.project.in_features
        self.first, self.second = _norm(attention.norm), _norm(layer.norm)
        self.biases = [_array(linear.bias) for linear in linears[1:]]

    def __call__(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """As `SelfAttentionLayer.forward`."""
        if cache is None or not cache.key.is_contiguous() or not _are_few(x, self.width):
            return self.many(x, cache)
        batch, new = x.shape[:2]
        placed = cache.places is not None
        # The kernels write wherever they are told to.
        length, capacity = cache.length + (0 if placed else new), cache.key.shape[2]
        if length > capacity or batch != len(cache.key):
            raise IndexError(
                f"{batch} sequences of {length} tokens do not fit into a cache for "
                f"{len(cache.key)} of {capacity}"
            )
        if cache.places is not None:
            starts = cache.places[:, 0].contiguous().numpy()
        else:
            starts = np.full(batch, cache.length)
            cache.length = length
        project, out, inner, outer = self.weights()
        out_bias, inner_bias, outer_bias = self.biases
        y = self.fused.kernels.self_attention_layer(
            _rows(x), self.first, project, out, out_bias, self.second,
            inner, inner_bias, outer, outer_bias, self.heads,
            cache.key.numpy(), cache.value.numpy(), starts, self.fused.threads,
        )  # fmt: skip
        return torch.from_numpy(y).view(x.shape)

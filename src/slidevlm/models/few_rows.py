"""Linear layers on a few rows, as generation has them: a row for each sequence that is written.

Such a product takes the time of reading the weight. On a CPU the library that multiplies matrices
is slow at it: one row it reads on one core however many there are, and on some processors at half
the speed of that core; for a few it first copies the weight into the order in which it reads large
products. Three ways around it, chosen by processor, shape and number of threads alone: the product
from the other side, oneDNN's, and for a single row the weight in pieces, which the threads share.
The numbers are those of the layer to rounding.

MKL has code of its own for few rows on processors of its maker, where the other side would take
twice its time: there oneDNN is the only way around it. On those of AMD that have AVX-512 a single
row is best taken twice from the other side; on older ones that would take half as long again.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.models.linear import is_plain

MOST = 64  # rows; more are many
# Measured with MKL 2024.2 and oneDNN 3.12 on three processors of AMD and one of Intel:
# `benchmarks/few_rows.py`.
OTHER_SIDE = 5  # rows for which the product from the other side is the fastest
OTHER_SIDE_NARROW, NARROW = 8, 512  # likewise, up to so many inputs
WIDE = 1536  # inputs above which one thread is slower from the other side
LARGE = 2**22  # weights beyond what the processor keeps near; from here oneDNN is the faster
INTEL_ROWS, INTEL_LARGE = 4, 2**20  # from so many rows and weights it is, there
PIECES = 64  # of a weight, at most; how many does not matter


@contextmanager
def few_rows(*towers: nn.Module | None) -> Iterator[None]:
    """Within, linear layers of these towers are quick on a few rows.

    Only layers that are nothing more (no LoRA, not quantised), with float32 weights on a CPU, and
    where there is no autocast: all others are as they were.
    """
    changed = []
    if _is_wanted():
        linears = (m for tower in towers if tower is not None for m in tower.modules())
        changed = [m for m in linears if isinstance(m, nn.Linear) and _is_fit(m)]
    try:
        for linear in changed:
            linear.forward = FewRows(linear)  # type: ignore[assignment]
        yield
    finally:
        for linear in changed:
            linear.__dict__.pop("forward", None)


@functools.cache
def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux
        return platform.processor()


def is_intel() -> bool:
    """Whether the processor is of the maker of MKL."""
    return "GenuineIntel" in _processor()


def has_avx512() -> bool:
    """Whether it computes on 512 bits at a time."""
    return "avx512f" in _processor()


def _is_wanted() -> bool:
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return there and not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()


def _is_fit(linear: nn.Linear) -> bool:
    weight = linear.weight
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    return (
        is_plain(linear)
        and plain
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


class FewRows:
    """In the place of a linear layer's `forward`."""

    def __init__(self, linear: nn.Linear) -> None:
        weight, self.bias = linear.weight, linear.bias
        self.weight, self.turned = weight, weight.T
        threads, intel, wide = torch.get_num_threads(), is_intel(), linear.in_features > WIDE
        # A single row has ways of its own, but on some processors it is one of a few.
        first = 1 if has_avx512() and not intel else 2
        most = OTHER_SIDE_NARROW if linear.in_features <= NARROW else OTHER_SIDE
        if intel or (wide and threads == 1 and has_avx512()):
            most = 0
        self.other_side = range(first, most + 1)
        # Rows that oneDNN takes, unless they come from the other side.
        large = weight.numel() >= (INTEL_LARGE if intel else LARGE)
        self.one_dnn = range(INTEL_ROWS if intel else first, MOST + 1 if large else 0)
        self.in_pieces = not intel and (threads > 1 or linear.in_features <= NARROW)
        pieces = math.gcd(len(weight), PIECES)
        self.pieces = weight.view(pieces, -1, weight.shape[1])
        self.bias_pieces = None if self.bias is None else self.bias.view(pieces, -1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.numel() // x.shape[-1]
        if rows in self.other_side:
            flat = x.reshape(rows, -1)
            if rows == 1:
                flat = torch.cat([flat, flat])
            if self.bias is None:
                columns = torch.mm(self.weight, flat.T)  # [out, rows]
            else:
                columns = torch.addmm(self.bias[:, None], self.weight, flat.T)
            # Attention and GELU are slow on what does not lie side by side.
            return columns.T[:rows].contiguous().view(*x.shape[:-1], -1)
        if rows in self.one_dnn:
            flat = x.reshape(rows, -1).to_mkldnn()
            y = F.linear(flat, self.weight, self.bias).to_dense()
            return y.view(*x.shape[:-1], -1)
        if rows == 1:
            return self._one(x.reshape(1, -1)).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)

    def _one(self, row: Tensor) -> Tensor:
        if not self.in_pieces:  # F.linear's own product, without its way to it
            return row @ self.turned if self.bias is None else self.bias.addmm(row, self.turned)
        column = row.T.expand(len(self.pieces), -1, 1)
        if self.bias_pieces is None:
            return torch.bmm(self.pieces, column)
        return torch.baddbmm(self.bias_pieces, self.pieces, column)

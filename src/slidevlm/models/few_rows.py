"""Layers on a few rows, as generation has them: a row for each sequence that is written.

Such a product takes the time of reading the weight, if it is done well. With numba (the extra
`cpu`) whole layers are compiled for it: `models/fused.py`. Without, and for more rows than those
take, linear layers alone are quicker than torch has them. On a CPU the library that multiplies
matrices is slow at few rows: one row it reads on one core however many there are, and on some
processors at half the speed of that core; for a few it first copies the weight into the order in
which it reads large products. Three ways around it, chosen by processor, shape and number of
threads alone: the product from the other side, oneDNN's, and for a single row the weight in
pieces, which the threads share. The numbers are those of the layer to rounding.

MKL has code of its own for few rows on processors of its maker, where the other side would take
twice its time: there oneDNN is the only way around it. On those of AMD a single row is best taken
in pieces, which MKL reads twice as fast as a whole weight, also with one thread (older ones,
without AVX-512: narrow weights alone, unless threads share the pieces).
"""

from __future__ import annotations

import functools
import logging
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.models import jit
from slidevlm.models.fused import Fused, is_available, is_fit

log = logging.getLogger(__name__)

MOST = 64  # rows; more are many
LEAST = 2**21  # weights, of which numba pays: to start it takes a second
# Measured with MKL 2024.2 and oneDNN 3.12 on three processors of AMD and one of Intel:
# `benchmarks/few_rows.py`.
NARROW, MIDDLE, WIDE, WIDEST = 512, 768, 1536, 3000  # inputs, up to and with
LARGE = 2**22  # weights beyond what the processor keeps near; from here oneDNN is the faster
INTEL_ROWS, INTEL_LARGE = 4, 2**20  # from so many rows and weights it is, there
PIECES = 64  # of a weight, at most; how many does not matter


@contextmanager
def few_rows(*towers: nn.Module | None) -> Iterator[Fused | None]:
    """Within, layers of these towers are quick on a few rows; yields what stands in for them.

    Only layers that are nothing more (no LoRA, not quantised), with float32 weights on a CPU, and
    where there is no autocast: all others are as they were. None where numba is not there, or
    not worth its start: then linear layers alone are quick, by the libraries behind torch.
    """
    changed: list[nn.Module] = []
    modules = [m for tower in towers if tower is not None for m in tower.modules()]
    fused = None
    if not _is_wanted():
        modules = []
    elif _weights(modules) >= LEAST:
        if is_available():
            fused = Fused(FewRows)
        else:
            jit.suggest("reports are written")
    try:
        for module in modules:
            forward: Any = None
            if fused is not None:
                forward = fused.of(module)
            elif isinstance(module, nn.Linear) and is_fit(module):
                forward = FewRows(module)
            if forward is not None:
                module.forward = forward
                changed.append(module)
        if fused is None:
            yield None
        else:
            with fused.own_threads():
                yield fused
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _weights(modules: list[nn.Module]) -> int:
    return sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear) and is_fit(m))


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


@dataclass(frozen=True)
class Ways:
    """For which numbers of rows a weight is multiplied how; otherwise as MKL has it."""

    in_pieces: bool  # a single row
    other_side: int  # from 2 rows to so many
    one_dnn: range  # unless they come from the other side


def ways(outputs: int, inputs: int, threads: int) -> Ways:
    """What is the fastest for a weight [outputs, inputs] on this processor."""
    if is_intel():
        large = outputs * inputs >= INTEL_LARGE
        return Ways(False, 0, range(INTEL_ROWS, MOST + 1 if large else 0))
    large, shared = outputs * inputs >= LARGE, threads > 1
    if not has_avx512():
        most = 8 if inputs <= NARROW else 5
        return Ways(shared or inputs <= NARROW, most, range(2, MOST + 1 if large else 0))
    if inputs <= NARROW:  # MKL uses one core, but from the other side
        return Ways(True, MOST if shared else 8, range(2, MOST + 1 if large else 0))
    most = 5 if inputs <= MIDDLE else 3 if inputs <= WIDE else 0
    in_pieces = inputs <= WIDEST
    return Ways(in_pieces, most, range(2 if in_pieces else 1, MOST + 1))


class FewRows:
    """In the place of a linear layer's `forward`."""

    def __init__(self, linear: nn.Linear) -> None:
        weight, self.bias = linear.weight, linear.bias
        self.weight, self.turned = weight, weight.T
        outputs, inputs = weight.shape
        chosen = ways(outputs, inputs, torch.get_num_threads())
        self.in_pieces, self.other_side = chosen.in_pieces, chosen.other_side
        self.one_dnn = chosen.one_dnn
        pieces = math.gcd(outputs, PIECES)
        self.pieces = weight.view(pieces, -1, inputs)
        self.column, self.strides = (pieces, inputs, 1), (0, 1, inputs)
        self.bias_pieces = None if self.bias is None else self.bias.view(pieces, -1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.numel() // x.shape[-1]
        if rows == 1 and self.in_pieces:
            return self._in_pieces(x.reshape(1, -1).contiguous()).view(*x.shape[:-1], -1)
        if 1 < rows <= self.other_side:
            flat = x.reshape(rows, -1)
            if self.bias is None:
                columns = torch.mm(self.weight, flat.T)  # [out, rows]
            else:
                columns = torch.addmm(self.bias[:, None], self.weight, flat.T)
            # Attention and GELU are slow on what does not lie side by side.
            return columns.T.contiguous().view(*x.shape[:-1], -1)
        if rows in self.one_dnn:
            flat = x.reshape(rows, -1).to_mkldnn()
            y = F.linear(flat, self.weight, self.bias).to_dense()
            return y.view(*x.shape[:-1], -1)
        if rows == 1:  # F.linear's own product, without its way to it
            row = x.reshape(1, -1)
            y = row @ self.turned if self.bias is None else self.bias.addmm(row, self.turned)
            return y.view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)

    def _in_pieces(self, row: Tensor) -> Tensor:
        # The row turned over, [in, 1] with strides 1 and in: with strides 1 and 1 it takes MKL
        # five times as long.
        column = row.as_strided(self.column, self.strides)
        if self.bias_pieces is None:
            return torch.bmm(self.pieces, column)
        return torch.baddbmm(self.bias_pieces, self.pieces, column)

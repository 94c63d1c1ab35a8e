"""Tiles standardised, normalised and summed up in one pass on a CPU, compiled by numba.

torch takes a pass over memory for each of the operations, a dozen of them: here each number of a
tile is read once and written once. The numbers are those of the operations to rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import intrinsic

from slidevlm.models.kernels import ONE, OPTIONS, ZERO, Array, is_kept, kept

SECONDS = 3  # to compile it
NO_NUMBER, LARGEST = np.float32(np.nan), np.finfo(np.float32).max
# Bits of float16 are wanted. Told another processor, LLVM takes it for one without.
READS_HALVES = bool(get_host_cpu_features().get("f16c")) and not (
    numba.config.CPU_NAME or numba.config.CPU_FEATURES  # type: ignore[attr-defined]
)
_kept = functools.partial(kept, error_model="numpy")  # a channel without deviation ends nothing
_compiled = njit(error_model="numpy", **OPTIONS)
BLOCK = 32  # rows that are taken together: a hundred thousand numbers stay in the processor


def _widening(typing: Any, feature: Any) -> Any:
    """A feature in float32, of that type or the bits of float16, which numba does not know.

    Where the processor has no instruction for that, LLVM calls a function which is not there.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (given,) = arguments
        if feature == types.float32:
            return given
        return builder.fpext(builder.bitcast(given, ir.HalfType()), ir.FloatType())

    return (types.float32(feature), code) if feature in (types.float32, types.int16) else None


_wide: Any = intrinsic(_widening)


@_compiled
def _standardise(x: Array, mean: Array, deviation: Array, y: Array) -> None:
    for r in range(len(x)):
        given, row = x[r], y[r]
        for i in range(len(given)):
            row[i] = (_wide(given[i]) - mean[i]) / deviation[i]


@_compiled
def _normalise(x: Array, epsilon: float, y: Array) -> None:
    width = np.float32(x.shape[1])
    for r in range(len(x)):
        given, row = x[r], y[r]
        mean = variance = ZERO
        for i in range(len(given)):
            mean += given[i]
        mean /= width
        for i in range(len(given)):
            variance += (given[i] - mean) * (given[i] - mean)
        # Rows beyond what squares can be of are no numbers, as torch has them.
        scale = NO_NUMBER if variance > LARGEST else ONE / np.sqrt(variance / width + epsilon)
        for i in range(len(given)):
            row[i] = (given[i] - mean) * scale


@_compiled
def _moments(x: Array, mean: Array, squares: Array) -> None:
    """Of each channel the mean over x [n, D], and the sum of squares of distances to it."""
    mean[:] = ZERO
    squares[:] = ZERO
    for r in range(len(x)):
        row = x[r]
        for i in range(len(row)):
            mean[i] += row[i]
    for i in range(len(mean)):
        mean[i] /= np.float32(len(x))
    for r in range(len(x)):
        row = x[r]
        for i in range(len(row)):
            squares[i] += (row[i] - mean[i]) * (row[i] - mean[i])


@_compiled
def _join(
    seen: int, new: int, mean_new: Array, squares_new: Array, mean: Array, squares: Array
) -> None:
    """Moments of new rows to those seen, in float64 (Chan et al., 1979)."""
    share = new / (seen + new)
    weight = share * seen
    for i in range(len(mean)):
        away = mean_new[i] - mean[i]
        mean[i] += away * share
        squares[i] += squares_new[i] + away * away * weight


@_kept
def pass_over(
    x: Array, mean: Array, deviation: Array, epsilon: float, rows: Array, moments: Array
) -> None:
    """Standardise tiles x [n, D], float32 or the bits of float16, and do two things with that.

    Args:
        x: the tiles.
        mean: [D], what is subtracted first.
        deviation: [D], by which that is divided.
        epsilon: of the layer norm, which has no weight and no bias.
        rows: [n, D], in which the normalised tiles are left; [0, D]: they are not wanted.
        moments: float64 [2, D], in which the mean of the standardised tiles and the sums of squares
            of their distances to it are left; [0, D]: they are not wanted.
    """
    count, width = x.shape
    standard = np.empty((BLOCK, width), np.float32)  # stays in the processor
    mean_here, squares_here = np.empty(width, np.float32), np.empty(width, np.float32)
    moments[:] = 0.0
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        some = standard[: end - begin]
        _standardise(x[begin:end], mean, deviation, some)
        if len(rows) > 0:
            _normalise(some, np.float32(epsilon), rows[begin:end])
        if len(moments) > 0:
            _moments(some, mean_here, squares_here)
            _join(begin, end - begin, mean_here, squares_here, moments[0], moments[1])


def compile_all() -> None:
    """Compile the pass for both kinds of tiles, or load what has been kept of that."""
    one = np.ones(2, np.float32)
    for kind in (np.float32, np.int16) if READS_HALVES else (np.float32,):
        pass_over(np.ones((1, 2), kind), one, one, 1e-5, one[None], np.empty((2, 2)))


def is_compiled() -> bool:
    """Whether numba has kept what it compiled of this file, and need not do so again."""
    return is_kept(pass_over, __file__)

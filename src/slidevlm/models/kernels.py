"""A few tokens through a linear or transformer layer on a CPU, compiled by numba.

Such a product takes the time of reading its weight. The libraries behind torch read one row slower
than memory gives it, take two to four times as long for a few rows, and between two products a
dozen small operations cost as much as a small one. Here each row of a weight is read once and
multiplied by all rows of the input while it is near, four rows that lie far apart at a time, and a
layer is one call.

All arrays are float32 and lie side by side; the numbers are those of the modules to rounding. A
weight may also come rounded to 16 bits (`sketch`), for tokens that are only guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import njit, prange, types
from numba.extending import overload

SECONDS = 20  # to compile all, for weights in 32 bits
# Sums in any order, products and sums together; what is not finite stays so.
OPTIONS: Any = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True}
# Of the processor's for vectors: 16 sums, four numbers of a weight and one of x stay in them.
HAS_32_REGISTERS = bool(get_host_cpu_features().get("avx512vl"))
BITS, LOWER, UNSIGNED = np.int32(16), np.int32(0xFFFF), np.int32(0x7FFFFFFF)
TINY, INFINITE = (int(np.float32(x).view(np.int32)) for x in (1e-30, np.inf))
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
LOG2_E, LN_2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(3, 8))
LEAST_POWER = np.float32(-126)  # of 2, in float32
A0 = np.float32(0.3275911 * math.sqrt(0.5))
A1, A2, A3 = np.float32(0.254829592), np.float32(-0.284496736), np.float32(1.421413741)
A4, A5 = np.float32(-1.453152027), np.float32(1.061405429)

Array = Any  # what numba takes for one
Norm = tuple[Array, Array, float]  # weight, bias, epsilon
Weight = Any  # [out, in] in float32; or in 16 bits, as `sketch` makes it


@njit(**OPTIONS)
def _low(pair: Any) -> Any:
    """65,536 times the integer in the lower half of a pair's bits."""
    return np.float32(np.int32(pair << BITS))


@njit(**OPTIONS)
def _high(pair: Any) -> Any:
    """The same of the upper half, which was chosen with the lower bits in view."""
    return np.float32(pair)


def _outputs(weight: Weight) -> Any:
    """How many rows a weight has."""
    raise NotImplementedError  # compiled code alone knows its form


@overload(_outputs, jit_options=OPTIONS)
def _outputs_of(weight: Weight) -> Any:
    def wide(weight: Weight) -> Any:
        return len(weight)

    def narrow(weight: Weight) -> Any:
        return len(weight[1])

    return narrow if isinstance(weight, types.BaseTuple) else wide


@njit(**OPTIONS)
def _dot(w: Array, x: Array) -> Any:
    total = ZERO
    for i in range(len(w)):
        total += w[i] * x[i]
    return total


def _dot_1(weight: Weight, o: int, x: Array) -> Any:
    """Row o of a weight [out, in] with x [in]."""
    raise NotImplementedError


def _dots_4(weight: Weight, o: int, step: int, x: Array) -> Any:
    """Four rows of a weight [out, in], `step` after each other, with x [in]."""
    raise NotImplementedError


def _dots_4_2(weight: Weight, o: int, step: int, x: Array, r: int) -> Any:
    """The same with the rows r and r + 1 of x [R, in]."""
    raise NotImplementedError


@overload(_dot_1, jit_options=OPTIONS)
def _dot_1_of(weight: Weight, o: int, x: Array) -> Any:
    def wide(weight: Weight, o: int, x: Array) -> Any:
        return _dot(weight[o], x)

    def narrow(weight: Weight, o: int, x: Array) -> Any:
        total, w = ZERO, weight[0][o]
        half = len(w)
        low, high = x[:half], x[half:]
        for i in range(half):
            total += _low(w[i]) * low[i] + _high(w[i]) * high[i]
        return total * weight[1][o]

    return narrow if isinstance(weight, types.BaseTuple) else wide


@overload(_dots_4, jit_options=OPTIONS)
def _dots_4_of(weight: Weight, o: int, step: int, x: Array) -> Any:
    def wide(weight: Weight, o: int, step: int, x: Array) -> Any:
        a = b = c = d = ZERO
        p, q, s, t = weight[o], weight[o + step], weight[o + 2 * step], weight[o + 3 * step]
        for i in range(len(x)):
            v = x[i]
            a += p[i] * v
            b += q[i] * v
            c += s[i] * v
            d += t[i] * v
        return a, b, c, d

    def narrow(weight: Weight, o: int, step: int, x: Array) -> Any:
        a = b = c = d = ZERO
        pairs, k = weight
        p, q, s, t = pairs[o], pairs[o + step], pairs[o + 2 * step], pairs[o + 3 * step]
        half = len(p)
        low, high = x[:half], x[half:]
        for i in range(half):
            v, w = low[i], high[i]
            a += _low(p[i]) * v + _high(p[i]) * w
            b += _low(q[i]) * v + _high(q[i]) * w
            c += _low(s[i]) * v + _high(s[i]) * w
            d += _low(t[i]) * v + _high(t[i]) * w
        return a * k[o], b * k[o + step], c * k[o + 2 * step], d * k[o + 3 * step]

    return narrow if isinstance(weight, types.BaseTuple) else wide


@overload(_dots_4_2, jit_options=OPTIONS)
def _dots_4_2_of(weight: Weight, o: int, step: int, x: Array, r: int) -> Any:
    def wide(weight: Weight, o: int, step: int, x: Array, r: int) -> Any:
        a = b = c = d = e = f = g = h = ZERO
        p, q, s, t = weight[o], weight[o + step], weight[o + 2 * step], weight[o + 3 * step]
        for i in range(len(p)):
            v, w = x[r, i], x[r + 1, i]
            a += p[i] * v
            b += q[i] * v
            c += s[i] * v
            d += t[i] * v
            e += p[i] * w
            f += q[i] * w
            g += s[i] * w
            h += t[i] * w
        return a, b, c, d, e, f, g, h

    def narrow(weight: Weight, o: int, step: int, x: Array, r: int) -> Any:
        # Only one row at a time is guessed.
        return *_dots_4(weight, o, step, x[r]), *_dots_4(weight, o, step, x[r + 1])

    return narrow if isinstance(weight, types.BaseTuple) else wide


@njit(**OPTIONS)
def tile(weight: Array, o: int, step: int, x: Array, r: int, y: Array) -> None:
    """The rows o, o + step, ... of a weight [out, in] with the rows r to r + 3 of x [R, in]."""
    a = b = c = d = e = f = g = h = ZERO
    i = j = k = m = n = u = v = w = ZERO
    p, q, s, t = weight[o], weight[o + step], weight[o + 2 * step], weight[o + 3 * step]
    for z in range(len(p)):
        first, second, third, fourth = x[r, z], x[r + 1, z], x[r + 2, z], x[r + 3, z]
        a += p[z] * first
        b += p[z] * second
        c += p[z] * third
        d += p[z] * fourth
        e += q[z] * first
        f += q[z] * second
        g += q[z] * third
        h += q[z] * fourth
        i += s[z] * first
        j += s[z] * second
        k += s[z] * third
        m += s[z] * fourth
        n += t[z] * first
        u += t[z] * second
        v += t[z] * third
        w += t[z] * fourth
    p_, q_, s_, t_ = o, o + step, o + 2 * step, o + 3 * step
    y[r, p_], y[r + 1, p_], y[r + 2, p_], y[r + 3, p_] = a, b, c, d
    y[r, q_], y[r + 1, q_], y[r + 2, q_], y[r + 3, q_] = e, f, g, h
    y[r, s_], y[r + 1, s_], y[r + 2, s_], y[r + 3, s_] = i, j, k, m
    y[r, t_], y[r + 1, t_], y[r + 2, t_], y[r + 3, t_] = n, u, v, w


def _tiles(weight: Weight, o: int, step: int, x: Array, y: Array) -> int:
    """Four rows of a weight with four rows of x after the other; how many of these were taken."""
    raise NotImplementedError


@overload(_tiles, jit_options=OPTIONS)
def _tiles_of(weight: Weight, o: int, step: int, x: Array, y: Array) -> Any:
    def some(weight: Weight, o: int, step: int, x: Array, y: Array) -> int:
        fours = len(x) - len(x) % 4
        for r in range(0, fours, 4):
            tile(weight, o, step, x, r, y)
        return fours

    def none(weight: Weight, o: int, step: int, x: Array, y: Array) -> int:
        return 0

    return some if HAS_32_REGISTERS and not isinstance(weight, types.BaseTuple) else none


@njit(**OPTIONS)
def _multiply(weight: Weight, bias: Array, x: Array, y: Array, begin: int, end: int) -> None:
    """Outputs `begin` to `end` of x [R, in] into y [R, out].

    A core reads in four places at a time: in one place memory gives it two thirds of that.
    """
    rows, n = len(x), (end - begin) // 4
    for o in range(begin, begin + n):
        p, q, s, t = o, o + n, o + 2 * n, o + 3 * n
        for r in range(_tiles(weight, o, n, x, y), rows - 1, 2):
            a, b, c, d, e, f, g, h = _dots_4_2(weight, o, n, x, r)
            y[r, p], y[r, q], y[r, s], y[r, t] = a, b, c, d
            y[r + 1, p], y[r + 1, q], y[r + 1, s], y[r + 1, t] = e, f, g, h
        if rows % 2:
            r = rows - 1
            y[r, p], y[r, q], y[r, s], y[r, t] = _dots_4(weight, o, n, x[r])
    for o in range(begin + 4 * n, end):
        for r in range(rows):
            y[r, o] = _dot_1(weight, o, x[r])
    if bias is not None:
        for r in range(rows):
            for o in range(begin, end):
                y[r, o] += bias[o]


@njit(**OPTIONS)
def _normalise(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    rows, width = x.shape
    y = np.empty_like(x)
    for r in range(rows):
        mean = ZERO
        for i in range(width):
            mean += x[r, i]
        mean /= np.float32(width)
        variance = ZERO
        for i in range(width):
            variance += (x[r, i] - mean) * (x[r, i] - mean)
        scale = ONE / np.sqrt(variance / np.float32(width) + np.float32(epsilon))
        for i in range(width):
            y[r, i] = (x[r, i] - mean) * scale * weight[i] + bias[i]
    return y


@njit(**OPTIONS)
def _attend(
    query: Array, key: Array, value: Array, start: int, step: int, seen: int, out: Array
) -> None:
    """One query [d] to `seen` keys and values, which begin `step` numbers after each other."""
    width = len(query)
    factor = ONE / np.sqrt(np.float32(width))
    weights = np.empty(seen, np.float32)
    together = seen - seen % 4
    for n in range(0, together, 4):
        at = start + n * step
        p, q = key[at : at + width], key[at + step : at + step + width]
        at += 2 * step
        r, s = key[at : at + width], key[at + step : at + step + width]
        a = b = c = d = ZERO
        for i in range(width):
            v = query[i]
            a += v * p[i]
            b += v * q[i]
            c += v * r[i]
            d += v * s[i]
        weights[n], weights[n + 1], weights[n + 2], weights[n + 3] = a, b, c, d
    for n in range(together, seen):
        at = start + n * step
        weights[n] = _dot(query, key[at : at + width])
    total = _exponentials(weights, factor)
    out[:] = ZERO
    for n in range(0, together, 4):
        at = start + n * step
        p, q = value[at : at + width], value[at + step : at + step + width]
        at += 2 * step
        r, s = value[at : at + width], value[at + step : at + step + width]
        a, b, c, d = weights[n], weights[n + 1], weights[n + 2], weights[n + 3]
        for i in range(width):
            out[i] += a * p[i] + b * q[i] + c * r[i] + d * s[i]
    for n in range(together, seen):
        at, a = start + n * step, weights[n]
        for i in range(width):
            out[i] += a * value[at + i]
    for i in range(width):
        out[i] /= total


@njit(**OPTIONS)
def _exponentials(x: Array, factor: float) -> Any:
    """x [n] becomes `exp(factor * (x - max(x)))`; returns the sum."""
    most, total = x[0], ZERO
    for n in range(len(x)):
        most = max(most, x[n])
    for n in range(len(x)):
        x[n] = factor * (x[n] - most) * LOG2_E
    _powers_of_2(x)
    for n in range(len(x)):
        total += x[n]
    return total


@njit(**OPTIONS)
def _powers_of_2(x: Array) -> None:
    """x [n], none of them positive, becomes 2 ** x; numba's own takes one number at a time."""
    bits = np.empty(len(x), np.int32)
    for n in range(len(x)):
        power = max(x[n], LEAST_POWER)
        whole = np.floor(power + HALF)
        rest = (power - whole) * LN_2  # of which Taylor's series is exact to the last bit
        series = C4 + rest * (C5 + rest * (C6 + rest * C7))
        x[n] = ONE + rest * (ONE + rest * (HALF + rest * (C3 + rest * series)))
        bits[n] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    wholes = bits.view(np.float32)
    for n in range(len(x)):
        x[n] *= wholes[n]


@njit(**OPTIONS)
def _gate(x: Array, begin: int, end: int, y: Array) -> None:
    """Of x [R, 2 n], `a * gelu(b)` of the columns `begin` to `end` of its halves, into y [R, n]."""
    rows, half = len(x), x.shape[1] // 2
    powers = np.empty(end - begin, np.float32)
    for r in range(rows):
        a, b = x[r, begin:end], x[r, half + begin : half + end]
        for i in range(len(b)):
            powers[i] = -HALF * LOG2_E * b[i] * b[i]
        _powers_of_2(powers)
        for i in range(len(b)):
            # The normal distribution below -|b|, to 8e-8: Abramowitz and Stegun, 1964, 7.1.26.
            t = ONE / (ONE + A0 * abs(b[i]))
            below = HALF * powers[i] * t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5))))
            y[r, begin + i] = a[i] * b[i] * (below if b[i] < 0 else ONE - below)


def kept(function: Callable[..., Any], **options: Any) -> Any:
    """Compiled, and kept on disk by numba where there is a folder to keep it in."""
    try:
        return njit(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:
        return njit(**OPTIONS, **options)(function)


def compiled(function: Callable[..., Array]) -> Any:
    """For threads that share the loops over `shares`."""
    return kept(function, parallel=True)


@compiled
def linear(weight: Weight, bias: Array, x: Array, shares: int) -> Array:
    """x [R, in] -> [R, out]; `shares`, in how many parts the outputs are divided among threads."""
    outputs = _outputs(weight)
    y = np.empty((len(x), outputs), np.float32)
    fours = outputs // 4  # a share begins at one, so that their number changes no digit
    for s in prange(shares):
        begin = 4 * (s * fours // shares)
        end = outputs if s + 1 == shares else 4 * ((s + 1) * fours // shares)
        _multiply(weight, bias, x, y, begin, end)
    return y


@compiled
def cross_attention(
    x: Array,
    norm: Norm,
    query: Array,
    out: Array,
    bias: Array,
    heads: int,
    key: Array,
    value: Array,
    strides: tuple[int, int, int],
    tokens: int,
    each_context: int,
    shares: int,
) -> Array:
    """The branch [R, width]: keys and values of context c, head h and token n at n strides."""
    rows, width = x.shape
    d = width // heads
    queries = linear(query, None, _normalise(x, *norm), shares)
    attended = np.empty_like(x)
    units = rows * heads
    for s in prange(shares):
        for u in range(s * units // shares, (s + 1) * units // shares):
            r, h = u // heads, u % heads
            here = slice(h * d, (h + 1) * d)
            start = r // each_context * strides[0] + h * strides[1]
            _attend(queries[r, here], key, value, start, strides[2], tokens, attended[r, here])
    return linear(out, bias, attended, shares)


@compiled
def self_attention_layer(
    x: Array,
    first: Norm,
    project: Array,
    out: Array,
    out_bias: Array,
    second: Norm,
    inner: Array,
    inner_bias: Array,
    outer: Array,
    outer_bias: Array,
    heads: int,
    key: Array,
    value: Array,
    starts: Array,
    shares: int,
) -> Array:
    """The layer's output [R, width]: R / B new tokens of each of B sequences.

    Their keys and values go into key, value [B, H, capacity, d], after the `starts` [B] that
    are there; each sees what stands before it, and itself.
    """
    rows, width = x.shape
    count, d = rows // len(starts), width // heads
    projected = linear(project, None, _normalise(x, *first), shares)
    for r in range(rows):
        b = r // count
        at = starts[b] + r % count
        for h in range(heads):
            for i in range(d):
                key[b, h, at, i] = projected[r, width + h * d + i]
                value[b, h, at, i] = projected[r, 2 * width + h * d + i]
    attended = np.empty_like(x)
    units = rows * heads
    for s in prange(shares):
        for u in range(s * units // shares, (s + 1) * units // shares):
            r, h = u // heads, u % heads
            b = r // count
            here = slice(h * d, (h + 1) * d)
            keys, values = key[b, h].reshape(-1), value[b, h].reshape(-1)
            seen = starts[b] + r % count + 1
            _attend(projected[r, here], keys, values, 0, d, seen, attended[r, here])
    x = x + linear(out, out_bias, attended, shares)
    gates = linear(inner, inner_bias, _normalise(x, *second), shares)
    half = gates.shape[1] // 2
    gated = np.empty((rows, half), np.float32)
    for s in prange(shares):
        _gate(gates, s * half // shares, (s + 1) * half // shares, gated)
    return x + linear(outer, outer_bias, gated, shares)


@compiled
def sketch(weight: Array, pairs: Array, steps: Array, shares: int) -> None:
    """A weight [out, 2 n] in 16 bits: pairs [out, n], in steps [out] of a row's largest / 32,767.

    The number in the upper half of a pair's bits is from the upper half of the row. A row that is
    not finite becomes 0, and so does one below 1e-30.
    """
    rows, half = pairs.shape
    for s in prange(shares):
        for o in range(s * rows // shares, (s + 1) * rows // shares):
            low, high, out = weight[o, :half], weight[o, half:], pairs[o]
            bits, most = weight[o].view(np.int32), np.int32(0)  # whose order is that of the numbers
            for i in range(2 * half):
                most = max(most, bits[i] & UNSIGNED)
            step = ZERO
            if TINY < most < INFINITE:
                step = np.int32(most).view(np.float32) / np.float32(32767)
            steps[o] = step / np.float32(65536)
            factor = ONE / step if step > 0 else ZERO
            for i in range(half):
                a = np.int32(np.rint(low[i] * factor)) & LOWER
                # The lower bits are taken for a part of the upper number.
                b = np.int32(np.rint(high[i] * factor - np.float32(a) / np.float32(65536)))
                out[i] = a | b << BITS


def compile_all(*, narrow: bool = False) -> None:
    """Compile every kernel as generation calls it, or load what has been kept of that."""
    x, ones, four = np.ones((1, 2), np.float32), np.ones(2, np.float32), np.ones(4, np.float32)
    cache, starts = np.ones((1, 1, 1, 2), np.float32), np.zeros(1, np.int64)
    norm = ones, ones, 1e-5
    shapes: Any = [(rows, 2) for rows in (2, 4, 6)]
    weights: Any = [np.ones(shape, np.float32) for shape in shapes]
    wide = weights[0]
    if narrow:
        weights = [(np.zeros((n, 1), np.int32), np.zeros(n, np.float32)) for n, _ in shapes]
    square, inner, project = weights
    for bias in (None, ones):
        linear(square, bias, x, 1)
    cross_attention(x, norm, square, square, ones, 1, ones, ones, (2, 2, 2), 1, 1, 1)
    self_attention_layer(
        x, norm, project, square, ones, norm, inner, four, square, ones,
        1, cache, cache.copy(), starts, 1,
    )  # fmt: skip
    if narrow:  # the last one, as `is_compiled` takes it to be
        sketch(wide, *square, 1)


def is_compiled(*, narrow: bool = False) -> bool:
    """Whether numba has kept what it compiled of this file, and need not do so again."""
    return is_kept(sketch if narrow else self_attention_layer, __file__)


def is_kept(kernel: Any, file: str) -> bool:
    """Whether numba has kept a kernel of this file since it was written."""
    folder, since = kernel.stats.cache_path, Path(file).stat().st_mtime
    kept = Path(folder).glob(f"*{kernel.__name__}*.nbi") if folder else ()
    return any(one.stat().st_mtime > since for one in kept)

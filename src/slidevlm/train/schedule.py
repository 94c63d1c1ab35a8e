"""Learning rate as a function of the optimizer step. Pure arithmetic, defined everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine(rate: float, warmup: int, total: int) -> Schedule:
    """Linear warmup, then half a cosine from `rate` to 0 at step `total`."""

    def at(step: int) -> float:
        if step < warmup:
            return _warm(rate, step, warmup)
        if total <= warmup or step >= total:
            return 0.0
        return rate * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return at


def constant(rate: float, warmup: int) -> Schedule:
    """Linear warmup, then `rate`."""

    def at(step: int) -> float:
        return _warm(rate, step, warmup) if step < warmup else rate

    return at


def constant_cooldown(
    rate: float, warmup: int, total: int, cooldown: int, power: float, end: float
) -> Schedule:
    """`constant`, but over the last `cooldown` steps `(1 - e / cooldown)^power` down to `end`.

    A cooldown longer than the training starts as if it had begun before it.
    """

    def at(step: int) -> float:
        if step < warmup:
            return _warm(rate, step, warmup)
        elapsed = step - (total - cooldown)
        if elapsed <= 0 or cooldown <= 0:
            return rate
        left = max(0.0, 1 - elapsed / cooldown)
        return left**power * (rate - end) + end

    return at


def _warm(rate: float, step: int, warmup: int) -> float:
    return rate * (step + 1) / warmup

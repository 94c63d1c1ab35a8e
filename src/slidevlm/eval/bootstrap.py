"""Bootstrap: how much a metric would move with another draw of patients (Efron, 1979).

One resampling serves every metric of a split. A resample is a row of counts, how often each
specimen was drawn; a metric turns counts into values from statistics that it computed once, so
that a thousand resamples cost a few matrix products. Since the counts depend on the seed and on
the units alone, two runs on one split are resampled alike, and their difference is a paired one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slidevlm.errors import ConfigError

_COUNTS = 4_000_000  # numbers of a block of resamples


@dataclass(frozen=True)
class Bootstrap:
    """How often to resample, and what the interval shall cover.

    Args:
        resamples: R; 0 or 1 means none.
        confidence: share of the resamples within an interval, in (0, 1).
        seed: decides the draws.
    """

    resamples: int = 0
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ConfigError(f"bootstraps must be 0 or more, not {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"a confidence must lie between 0 and 1, not {self.confidence}")

    def __bool__(self) -> bool:
        return self.resamples > 1

    def blocks(self, units: Sequence[str]) -> Iterator[np.ndarray]:
        """Resample units with replacement, as many as there are.

        Args:
            units: N names, one a row of the data; rows of one name (a patient's specimens) are
                drawn together.

        Yields:
            [r, N] int64 blocks of R rows altogether: how often each row of the data was drawn.
        """
        names, place = np.unique(np.asarray(units), return_inverse=True)
        random, n = np.random.default_rng(self.seed), len(names)
        most = max(1, _COUNTS // max(1, len(place)))
        for start in range(0, self.resamples if n else 0, most):
            rows = min(most, self.resamples - start)
            drawn = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
            yield counts[:, place]

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """Percentile interval of [R] values; those that are not a number are left out.

        Returns:
            Lower and upper end; both NaN where no value is a number.
        """
        defined = values[~np.isnan(values)]
        if not len(defined):
            return float("nan"), float("nan")
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, (tail, 1 - tail))
        return float(low), float(high)

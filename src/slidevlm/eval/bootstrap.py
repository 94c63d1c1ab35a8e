"""Bootstrap: how much a metric would move with another draw of patients (Efron, 1979).

One resampling serves every metric of a split. A resample is a row of counts, how often each
specimen was drawn; a metric turns counts into values from statistics that it computed once, so
that a thousand resamples cost a few matrix products. Since the counts depend on the seed and on
the units alone, two runs on one split are resampled alike, and their difference is a paired one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.errors import ConfigError

_COUNTS = 4_000_000  # numbers of a block of resamples
_TRIES = 100  # draws of a resample in search of one that has every class

# [N, r] counts -> [r] values of each metric.
Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Resampled:
    """What a statistic is on the resamples."""

    values: dict[str, np.ndarray]  # metric -> [R] float64
    redrawn: int  # draws that lacked a class and were made again


@dataclass(frozen=True)
class Bootstrap:
    """How often to resample, and what the interval shall cover.

    Args:
        resamples: R; 0 or 1 means none.
        confidence: share of the resamples within an interval, in (0, 1).
        seed: decides the draws.
        unit: what is drawn: "patient", with all specimens, or "specimen".
    """

    resamples: int = 0
    confidence: float = 0.95
    seed: int = 0
    unit: str = "patient"

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ConfigError(f"bootstraps must be 0 or more, not {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"a confidence must lie between 0 and 1, not {self.confidence}")

        if self.unit not in ("patient", "specimen"):
            raise ConfigError(f"a bootstrap draws a patient or a specimen, not {self.unit!r}")

    def __bool__(self) -> bool:
        return self.resamples > 1

    def units(self, predictions: Predictions) -> tuple[str, ...]:
        """N names: what each specimen is drawn with."""
        return predictions.patient_ids if self.unit == "patient" else predictions.specimen_ids

    def values(
        self,
        units: Sequence[str],
        statistic: Statistic,
        classes: np.ndarray | None = None,
        complete: Collection[str] = (),
    ) -> Resampled:
        """A statistic on every resample; no values where there are none.

        Args:
            units: as in `blocks`.
            statistic: gets [N, r] int32 counts, a column a resample.
            classes: [N] class numbers. Where a resample lacks one of those that occur, it is drawn
                again for the metrics named in `complete`, which would otherwise be means over
                other classes than those of the sample. After 100 draws these are NaN.
            complete: names of metrics that need every class.
        """
        found: dict[str, list[np.ndarray]] = {}
        redrawn = 0
        if not self:
            return Resampled({}, 0)
        again = np.random.default_rng((self.seed, 1))
        for block in self.blocks(units):
            counts = np.ascontiguousarray(block.T, dtype=np.int32)
            values = {k: np.array(v, dtype=np.float64) for k, v in statistic(counts).items()}
            lacking = np.flatnonzero(_lack(counts, classes))
            if len(lacking) and complete:
                other, draws = self._with_every_class(units, classes, len(lacking), again)
                redrawn += draws
                better = statistic(other)
                still = _lack(other, classes)
                for name in complete:
                    values[name][lacking] = np.where(still, np.nan, better[name])
            for name, part in values.items():
                found.setdefault(name, []).append(part)
        return Resampled({name: np.concatenate(parts) for name, parts in found.items()}, redrawn)

    def _with_every_class(
        self,
        units: Sequence[str],
        classes: np.ndarray | None,
        number: int,
        random: np.random.Generator,
    ) -> tuple[np.ndarray, int]:
        """[N, number] counts, each drawn until no class lacks; and how many draws that took."""
        names, place = np.unique(np.asarray(units), return_inverse=True)
        result = np.zeros((len(place), number), np.int32)
        waiting, again = np.arange(number), 0
        for _ in range(_TRIES):
            again += len(waiting)
            drawn = _draw(random, len(names), len(waiting))[:, place].T
            result[:, waiting] = drawn
            waiting = waiting[_lack(drawn, classes)]
            if not len(waiting):
                break
        return result, again

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
            yield _draw(random, n, rows)[:, place]

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


def _draw(random: np.random.Generator, n: int, rows: int) -> np.ndarray:
    """[rows, n] int64: how often each of n units was drawn, n draws a row."""
    drawn = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)


def _lack(counts: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """[r] whether a class that occurs in [N] `classes` was not drawn at all."""
    if classes is None or not len(classes):
        return np.zeros(counts.shape[1], bool)
    order = np.argsort(classes, kind="stable")
    _, starts = np.unique(classes[order], return_index=True)
    totals: np.ndarray = np.add.reduceat(counts[order], starts, axis=0)
    return (totals == 0).any(0)

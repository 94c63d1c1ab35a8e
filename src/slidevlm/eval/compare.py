"""Is the difference of two runs on one split more than the draw of patients?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.task import TaskResult


@dataclass(frozen=True)
class Difference:
    """One metric of two runs on the same specimens; the second run is what is compared with."""

    split: str
    metric: str
    value: float
    other: float
    lo: float  # interval of value - other
    hi: float
    p: float  # of no difference, two-sided
    p_holm: float = math.nan  # the same, of all comparisons at once

    @property
    def difference(self) -> float:
        """value - other."""
        return self.value - self.other


def compare(
    split: str, result: TaskResult, other: TaskResult, bootstrap: Bootstrap
) -> list[Difference]:
    """Every metric that both have resampled, on the same resamples.

    The p-value is twice the smaller share of resamples whose difference lies on either side of
    zero (zeros on both), one resample added to each (Efron and Tibshirani, 1993; Davison and
    Hinkley, 1997). Resamples on which either is not defined are left out.
    """
    found = []
    for name in (n for n in result.metrics if n in result.resampled and n in other.resampled):
        difference = result.resampled[name] - other.resampled[name]
        known = difference[~np.isnan(difference)]
        lo, hi = bootstrap.interval(difference)
        sides = (known <= 0).sum(), (known >= 0).sum()
        p = min(1.0, 2 * (1 + min(sides)) / (1 + len(known))) if len(known) else math.nan
        found.append(
            Difference(split, name, result.metrics[name], other.metrics[name], lo, hi, float(p))
        )
    return found


def with_holm(differences: Sequence[Difference]) -> list[Difference]:
    """Correct the p-values for their number (Holm, 1979); those not defined do not count."""
    known = [i for i, d in enumerate(differences) if not math.isnan(d.p)]
    result, least = list(differences), 0.0
    for place, i in enumerate(sorted(known, key=lambda i: differences[i].p)):
        least = max(least, min(1.0, (len(known) - place) * differences[i].p))
        result[i] = replace(differences[i], p_holm=least)
    return result

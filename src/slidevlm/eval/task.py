"""What a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slidevlm.batch import Predictions


@dataclass
class TaskResult:
    """Numbers by flat name (`image_to_text/R@10`), and details that JSON can hold.

    `resampled` has, for a metric that was bootstrapped, its R values on the resamples
    ([R] float64, NaN where it is not defined), from which intervals and paired tests are made.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    resampled: dict[str, np.ndarray] = field(default_factory=dict)


Task = Callable[[Predictions], TaskResult]

"""What a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from slidevlm.batch import Predictions


@dataclass
class TaskResult:
    """Numbers by flat name (`image_to_text/R@10`), and details that JSON can hold."""

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


Task = Callable[[Predictions], TaskResult]

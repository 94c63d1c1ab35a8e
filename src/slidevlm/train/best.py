"""--save-best: which metric, in which direction, and whether an evaluation is the best so far."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from slidevlm.errors import ConfigError

_LOWER = ("mean_rank", "median_rank", "repetition_4", "most_frequent_share")
_HIGHER = (
    "accuracy", "f1", "auroc", "kappa", "precision", "recall", "specificity", "MRR", "R@", "Acc@",
    "mAP@", "majority_vote", "bleu", "rouge", "meteor", "cider", "jaccard", "exact_match",
    "same_tokens", "distinct", "c_index", "concordance", "bert", "embedding",
)  # fmt: skip


class Best:
    """The best value of a metric so far.

    Args:
        wanted: `METRIC`, `METRIC:min` or `METRIC:max`, as in --save-best.
        known: the metrics that an evaluation will have.
        before: metric -> best value, of a checkpoint; of another metric it says nothing.

    Raises:
        ConfigError: no such metric, or its direction is neither known nor given.
    """

    def __init__(
        self, wanted: str, known: Sequence[str], before: Mapping[str, float] | None = None
    ) -> None:
        name, _, direction = wanted.partition(":")
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, cutoff=0.5)
            meant = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ConfigError(
                f"--save-best {name}: no evaluation of this run has that metric{meant} It has:\n  "
                + "\n  ".join(known)
            )
        lower = {"min": True, "max": False}.get(direction, _lower_is_better(name))
        if lower is None:
            raise ConfigError(
                f"--save-best {name}: whether more of it is better is not known; write {name}:max "
                f"or {name}:min"
            )
        self.name, self._lower = name, lower
        worst = math.inf if lower else -math.inf
        self.value = self._before = (before or {}).get(name, worst)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics, which may lack this one, are the best so far; then kept."""
        value = metrics.get(self.name, math.nan)
        better = value < self.value if self._lower else value > self.value
        if better:
            self._before, self.value = self.value, value
        return better

    def undo(self) -> None:
        """The last best one could not be stored: what was the best before is it again."""
        self.value = self._before

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {self.name: self.value} if math.isfinite(self.value) else {}


def _lower_is_better(name: str) -> bool | None:
    parts = name.split("/")
    if "loss" in parts or parts[-1].startswith(_LOWER):
        return True
    return False if any(word in parts[-1] for word in _HIGHER) else None

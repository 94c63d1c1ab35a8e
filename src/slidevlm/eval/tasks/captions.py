"""Generated reports against the true ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.task import TaskResult
from slidevlm.eval.text_metrics.scoring import Scoring


@dataclass(frozen=True)
class Captions:
    """Task: every score of `text_metrics.scoring`, and what it says of single reports.

    `most_frequent_share` near 1 tells that the model writes one report for every slide.
    """

    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    scoring: Scoring = field(default_factory=Scoring)

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `captions/<score>`."""
        assert predictions.generated is not None, "this task needs generated reports"
        counted = self.scoring.count(predictions.generated, predictions.reports)
        result = TaskResult({f"captions/{k}": v for k, v in counted.scores().items()})
        for name in ("rouge_l", "cider"):
            result.columns[f"captions/{name}"] = counted.means[name].tolist()
        drawn = self.bootstrap.values(self.bootstrap.units(predictions), counted.values)
        result.resampled.update({f"captions/{k}": v for k, v in drawn.values.items()})
        return result

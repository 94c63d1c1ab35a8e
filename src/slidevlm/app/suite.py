"""The evaluation tasks that the configuration wants, with or without a model at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slidevlm.config import Config
from slidevlm.eval import Task
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.prompts import read_labels, read_prompts
from slidevlm.eval.tasks.captions import captions
from slidevlm.eval.tasks.retrieval import Retrieval
from slidevlm.eval.tasks.zero_shot import ZeroShot, embed_prompts

EmbedText = Callable[[Sequence[str]], np.ndarray]


class Suite:
    """Reads label and prompt files at once, so that their faults stop a run before any work.

    Raises:
        DataError: a file that cannot be used.
    """

    def __init__(self, config: Config) -> None:
        evaluation = config.evaluation
        self.config = config
        self.bootstrap = Bootstrap(
            evaluation.eval_metric_bootstraps,
            evaluation.eval_metric_ci,
            evaluation.seed,
            evaluation.bootstrap_unit,
        )
        self.zero_shot = [
            (prompts, labels)
            for prompt_file, label_file in config.prompt_pairs
            for prompts in [read_prompts(Path(prompt_file))]
            for labels in [read_labels(Path(label_file), prompts)]
        ]

    def tasks(self, embed_text: EmbedText, *, generated: bool) -> list[Task]:
        """Tasks for splits; `generated` tells whether these have generated reports."""
        ensemble = self.config.evaluation.zsc_ensemble
        tasks: list[Task] = [Retrieval(self.bootstrap)]
        for prompts, labels in self.zero_shot:
            # The prompts are embedded once for all splits.
            tasks.append(
                ZeroShot(embed_prompts(prompts, embed_text, ensemble), labels, self.bootstrap)
            )
        if generated:
            tasks.append(captions)
        return tasks

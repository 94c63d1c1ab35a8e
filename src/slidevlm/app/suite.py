"""The evaluation tasks that the configuration wants, with or without a model at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.config import Config
from slidevlm.errors import DataError
from slidevlm.eval import Task
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.prompts import read_labels, read_prompts
from slidevlm.eval.survival import read_survival
from slidevlm.eval.tasks.captions import Captions
from slidevlm.eval.tasks.few_shot import FewShot, read_few_shot, resolve_examples
from slidevlm.eval.tasks.probe import fit_probes
from slidevlm.eval.tasks.retrieval import Retrieval
from slidevlm.eval.tasks.slide_retrieval import SlideRetrieval
from slidevlm.eval.tasks.survival import fit_survival
from slidevlm.eval.tasks.zero_shot import ZeroShot, embed_prompts

SUPPORT = "few-shot examples"  # name of their predictions
EmbedText = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Taught:
    """What probes learn from."""

    train: Predictions
    validation: tuple[Predictions, ...]  # they choose the penalty; cross-validation without any


def taught_by(config: Config, predictions: Mapping[str, Predictions]) -> Taught | None:
    """What probes learn from, of the splits by name; None where there are to be no probes.

    Validation splits choose the penalty only where a test split judges the result.
    """
    if not config.evaluation.probe:
        return None
    if "train" not in predictions:
        raise DataError(
            "--probe learns from the training split, which these predictions lack; evaluate the "
            "run with --probe once"
        )
    others = ("train", "test", SUPPORT)
    validation = [split for name, split in predictions.items() if name not in others]
    return Taught(predictions["train"], tuple(validation) if "test" in predictions else ())


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
        files = evaluation.zsc_specimen_class_mapping or ()
        self.labels = [labels for _, labels in self.zero_shot] or [
            read_labels(Path(file)) for file in files
        ]
        if several := [one.name for one in self.labels if evaluation.probe and one.several]:
            raise DataError(
                f"--probe needs one class a specimen; {', '.join(several)} has lists of classes"
            )
        table = evaluation.survival_table
        self.survival = None if table is None else read_survival(Path(table))
        self.few_shot = [
            read_few_shot(Path(file), self.labels) for file in evaluation.few_shot_examples or ()
        ]

    @property
    def support_names(self) -> list[str]:
        """Specimens or patients that the few-shot files name, each once."""
        return list(
            dict.fromkeys(s for file in self.few_shot for f in file.examples.values() for s in f)
        )

    def tasks(
        self,
        embed_text: EmbedText,
        *,
        generated: bool,
        support: Predictions | None = None,
        probe: Taught | None = None,
    ) -> list[Task]:
        """Tasks for splits.

        Args:
            embed_text: of prompts.
            generated: whether the splits have generated reports.
            support: of the few-shot examples; needed where there are files of these.
            probe: what probes learn from; None for no probes.
        """
        ensemble = self.config.evaluation.zsc_ensemble
        tasks: list[Task] = [Retrieval(self.bootstrap)]
        for prompts, labels in self.zero_shot:
            # The prompts are embedded once for all splits.
            tasks.append(
                ZeroShot(embed_prompts(prompts, embed_text, ensemble), labels, self.bootstrap)
            )
        for labels in self.labels:
            if not labels.several:
                tasks.append(SlideRetrieval(labels, self.bootstrap))
        for file in self.few_shot:
            assert support is not None, "the examples have been embedded"
            lenient = self.config.data.skip_bad_specimens
            examples = resolve_examples(file, support, lenient=lenient)
            tasks += [
                FewShot(file.name, support, examples, labels, self.bootstrap)
                for labels in file.labels
                if examples
            ]
        if probe is not None:
            tasks += [
                fitted
                for labels in self.labels
                if (fitted := fit_probes(probe.train, probe.validation, labels, self.bootstrap))
            ]
        if probe is not None and self.survival is not None:
            tasks.append(fit_survival(probe.train, self.survival, self.bootstrap))
        if generated:
            tasks.append(Captions(self.bootstrap))
        return tasks

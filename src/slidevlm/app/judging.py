"""Evaluation: the tasks that the configuration wants, their files and lines."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidevlm import dist
from slidevlm.app.datasets import bag_dataset
from slidevlm.app.trained import Trained
from slidevlm.batch import Predictions
from slidevlm.config import Config
from slidevlm.data.cases import CaseStore
from slidevlm.data.dataset import BadSpecimens, StopAtBad, make_loader, pad
from slidevlm.data.sampling import EvalBatches
from slidevlm.data.splits import Split
from slidevlm.errors import ConfigError
from slidevlm.eval import Task, TaskResult, evaluate
from slidevlm.eval.predict import Writing, predict
from slidevlm.eval.prompts import read_labels, read_prompts
from slidevlm.eval.tasks.captions import captions
from slidevlm.eval.tasks.retrieval import retrieval
from slidevlm.eval.tasks.zero_shot import ZeroShot, class_embeddings
from slidevlm.models.generate import Decoding
from slidevlm.models.mode import evaluation_mode
from slidevlm.precision import Precision
from slidevlm.report.summary import summary
from slidevlm.run import Bar, Run

log = logging.getLogger("slidevlm")
_EXAMPLES = 4  # of generated reports, shown beside the curves
_TEXTS = 256  # prompts embedded at a time: ensembles of published prompts are thousands


class Judge:
    """Evaluates splits with the current weights, logs the metrics and writes the files."""

    def __init__(
        self,
        config: Config,
        store: CaseStore,
        trained: Trained,
        precision: Precision,
        run: Run,
        bad: BadSpecimens | StopAtBad,
    ) -> None:
        self.config, self.store, self.trained = config, store, trained
        self.precision, self.run, self.bad = precision, run, bad
        self.zero_shot = [
            (prompts, labels)
            for prompt_file, label_file in config.prompt_pairs
            for prompts in [read_prompts(Path(prompt_file))]
            for labels in [read_labels(Path(label_file), prompts)]
        ]
        if config.evaluation.save_captions and trained.model.decoder is None:
            raise ConfigError(
                f"--save-captions: model {config.model.model} has no decoder to write reports with"
            )

    def epoch(
        self, splits: Sequence[Split], epoch: int, write: bool, step: int
    ) -> dict[str, float]:
        """Evaluate validation splits after an epoch."""
        results = self._all(splits, write)
        metrics = _flat(results)
        if results:
            self.run.log("evaluation", step, {"epoch": float(epoch), **metrics})
            log.info("evaluation after epoch %d: %s", epoch, _headline(results))
        if write and results:
            self.run.write_json(f"captions_epoch_{epoch}.json", _captions(results))
            for name, (predictions, _) in results.items():
                for number in range(min(_EXAMPLES, len(predictions))):
                    text = _example(predictions, number)
                    self.run.text(f"{name}/report_{number + 1}", step, text)
        return metrics

    def final(self, splits: Sequence[Split], name: str) -> dict[str, float]:
        """Evaluate splits once, with files and a table to read."""
        results = self._all(splits, self.config.evaluation.save_captions)
        metrics = _flat(results)
        details = {s: result.details for s, (_, result) in results.items()}
        self.run.write_json(f"{name}.json", {"metrics": metrics, "details": details})
        if self.config.evaluation.save_captions:
            self.run.write_json(f"captions_{name}.json", _captions(results))
        text = summary(self.config.model.model, {s: (p, r) for s, (p, r) in results.items()})
        self.run.write(f"{name}.md", text)
        log.info("%s: %s", name, _headline(results))
        return metrics

    def _all(
        self, splits: Sequence[Split], write: bool
    ) -> dict[str, tuple[Predictions, TaskResult]]:
        if not splits:
            return {}
        # The prompts are embedded once for all splits.
        tasks: list[Task] = [retrieval]
        for prompts, labels in self.zero_shot:
            embeddings = class_embeddings(prompts, self._embed_text)
            tasks.append(ZeroShot(embeddings, prompts.classes, labels))
        if write:
            tasks.append(captions)
        return {split.name: self._one(split, write, tasks) for split in splits}

    def _one(
        self, split: Split, write: bool, tasks: Sequence[Task]
    ) -> tuple[Predictions, TaskResult]:
        dataset = bag_dataset(self.config, self.store, split, self.trained, training=False)
        batches = EvalBatches(
            len(dataset), self.config.data.batch_size, dist.rank(), dist.world_size()
        )
        workers = min(self.config.data.workers, len(batches))
        loader = make_loader(dataset, batches, workers, bad=self.bad)
        bar = Bar(f"evaluating {split.name}", len(dataset), shown=dist.is_main())
        try:
            predictions = predict(
                self.trained.model,
                loader,
                dict(zip((c.specimen for c in split.cases), split.reports, strict=True)),
                self.precision,
                self._writing() if write else None,
                lambda done: bar.update(done * dist.world_size()),
                complete=not self.config.data.skip_bad_specimens,
            )
        finally:
            bar.close()
        return predictions, evaluate(predictions, tasks)

    def _writing(self) -> Writing:
        tokenizer, evaluation = self.trained.tokenizer, self.config.evaluation
        beams = self.config.beam_search
        decoding = Decoding(
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_tokens=evaluation.caption_val_max_seq_len,
            top_k=1 if beams else evaluation.val_gen_top_k,
            beams=evaluation.val_gen_num_beams if beams else 1,
            groups=evaluation.val_gen_num_beam_groups if beams else 1,
            seed=evaluation.seed,
        )
        return Writing(decoding, tokenizer.decode)

    def _embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return embed_text(self.trained, texts, self.precision)


def embed_text(trained: Trained, texts: Sequence[str], precision: Precision) -> np.ndarray:
    """Texts, tokenised as in training -> [len(texts), E] float32, L2-normalised."""
    tokenizer, model = trained.tokenizer, trained.model
    rows = [tokenizer.encode(text, trained.config.text.context_length) for text in texts]
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(rows), _TEXTS):
            tokens, mask = pad(rows[start : start + _TEXTS], tokenizer.pad_id)
            with precision.autocast():
                part = model.encode_text(tokens.to(precision.device), mask.to(precision.device))
            parts.append(part.float().cpu().numpy())
    return np.concatenate(parts)


def _flat(results: dict[str, tuple[Predictions, TaskResult]]) -> dict[str, float]:
    return {
        f"{split}/{name}": value
        for split, (_, result) in results.items()
        for name, value in result.metrics.items()
    }


_HEADLINE = (
    "loss/contrastive",
    "loss/caption",
    "image_to_text/R@10",
    "balanced_accuracy",
    "bleu_4",
)


def _headline(results: dict[str, tuple[Predictions, TaskResult]]) -> str:
    parts = [
        f"{split} {name} {value:.3f}"
        for split, (_, result) in results.items()
        for name, value in result.metrics.items()
        if name.endswith(_HEADLINE) and not math.isnan(value)
    ]
    return "; ".join(parts)


def _captions(results: dict[str, tuple[Predictions, TaskResult]]) -> list[dict[str, Any]]:
    return [
        {"split": split, "id": specimen, "report": report, "generated": generated}
        for split, (predictions, _) in results.items()
        for specimen, report, generated in zip(
            predictions.specimen_ids, predictions.reports, predictions.generated or (), strict=True
        )
    ]


def _example(predictions: Predictions, number: int) -> str:
    assert predictions.generated is not None, "reports have been generated"
    return (
        f"{predictions.specimen_ids[number]}\n\ngenerated: {predictions.generated[number]}\n\n"
        f"true: {predictions.reports[number]}"
    )

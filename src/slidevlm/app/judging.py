"""Evaluation: the tasks that the configuration wants, their files and lines."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from slidevlm import dist
from slidevlm.app.cohorts import Data
from slidevlm.app.datasets import bag_dataset
from slidevlm.app.outputs import Outcome, Outputs, about
from slidevlm.app.suite import SUPPORT, EmbedText, Suite, taught_by
from slidevlm.app.trained import Trained
from slidevlm.batch import Predictions
from slidevlm.config import Config
from slidevlm.data.cases import CaseStore
from slidevlm.data.dataset import BadSpecimens, StopAtBad, make_loader, pad
from slidevlm.data.sampling import EvalBatches
from slidevlm.data.splits import Split, find
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval import Task, TaskResult, evaluate
from slidevlm.eval.predict import Writing, predict
from slidevlm.eval.scores import scores
from slidevlm.eval.stored import Stored
from slidevlm.eval.tasks.few_shot import check_examples
from slidevlm.models import CoCa
from slidevlm.models.generate import Decoding
from slidevlm.models.mode import evaluation_mode
from slidevlm.precision import Precision
from slidevlm.run import Bar, Run

log = logging.getLogger("slidevlm")
_EXAMPLES = 4  # of generated reports, shown beside the curves
_TEXTS = 256  # prompts embedded at a time: ensembles of published prompts are thousands


def _never() -> bool:
    return False


class Judge:
    """Evaluates splits with the current weights, logs the metrics and writes the files.

    Args:
        config: which splits and tasks.
        store: where the features are.
        trained: what is evaluated.
        precision: of the forward passes.
        run: where lines and files go.
        bad: what to do with bad specimens.
        weights: a context within which the model has its weights; a collective call.
    """

    def __init__(
        self,
        config: Config,
        store: CaseStore,
        trained: Trained,
        precision: Precision,
        run: Run,
        bad: BadSpecimens | StopAtBad,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.config, self.store, self.trained = config, store, trained
        self.precision, self.run, self.bad = precision, run, bad
        self.weights = weights
        self.suite = Suite(config)
        found = find(self.suite.support_names, store)
        if missing := found.missing:
            raise DataError(
                f"--few-shot-examples: {len(missing)} specimens have no features in {store.path}, "
                f"such as {missing[0]!r}; leave them out or add them to the data"
            )
        for file in self.suite.few_shot:
            check_examples(file, {case.specimen: case.patient for case in found.cases})
        if config.evaluation.save_captions and trained.model.decoder is None:
            raise ConfigError(
                f"--save-captions: model {config.model_name} has no decoder to write reports with"
            )
        _check_language_model(config, trained)
        if config.evaluation.save_captions:
            self._check_writing()

    def check_labels(self, splits: Sequence[Split]) -> None:
        """Refuse a label file that names no specimen of the splits: a wrong one, or another naming.

        Raises:
            DataError: there is one; it names an identifier of either side.
        """
        cases = [case for split in splits for case in split.cases]
        for labels in self.suite.labels:
            if cases and not any(labels.of(c.specimen, c.patient) is not None for c in cases):
                theirs = next(iter(labels.classes), None)
                raise DataError(
                    f"--zsc-specimen-class-mapping: {labels.name} names no specimen of "
                    f"{', '.join(s.name for s in splits)}: it has {theirs!r}, they have "
                    f"{cases[0].specimen!r}; leave it out or name specimens as the data does"
                )

    def epoch(
        self,
        splits: Sequence[Split],
        epoch: int,
        write: bool,
        step: int,
        leave: Callable[[], bool] = _never,
    ) -> dict[str, float]:
        """Evaluate validation splits after an epoch.

        Raises:
            LeftError: `leave` (see `predict`) said so; nothing has been logged or written.
        """
        with self.weights():
            results = self._all(splits, write, leave) if splits else {}
        found = scores(results, self.suite.bootstrap)
        metrics = {s.name: s.value for s in found}
        if results:
            ends = {f"{s.name}/{end}": v for s in found for end, v in (("lo", s.lo), ("hi", s.hi))}
            known = {name: value for name, value in ends.items() if value is not None}
            self.run.log("evaluation", step, {"epoch": float(epoch), **metrics, **known})
            log.info("evaluation after epoch %d: %s", epoch, _headline(results))
        if write and results:
            self.run.write_json(f"captions_epoch_{epoch}.json", _captions(results))
            for name, (predictions, _) in results.items():
                for number in range(min(_EXAMPLES, len(predictions))):
                    text = _example(predictions, number)
                    self.run.text(f"{name}/report_{number + 1}", step, text)
        return metrics

    def metric_names(self, splits: Sequence[Split]) -> list[str]:
        """The metrics that `epoch` will have: found by judging numbers drawn at random."""
        quick = replace(self.config.evaluation, eval_metric_bootstraps=0)
        suite = Suite(replace(self.config, evaluation=quick))
        drawn = None
        if suite.support_names:
            cases = find(suite.support_names, self.store).cases
            drawn = self._drawn(Split(SUPPORT, cases, ("",) * len(cases), (), ()), write=False)
        write = self.config.evaluation.save_captions
        tasks = suite.tasks(_draw_texts, generated=write, support=drawn)
        return [
            f"{split.name}/{name}"
            for split in splits
            for name in evaluate(self._drawn(split, write), tasks).metrics
        ]

    def _drawn(self, split: Split, write: bool) -> Predictions:
        """What predictions of a split look like, without the model."""
        count, model = len(split.cases), self.trained.model
        embeds = isinstance(model, CoCa)
        losses = {"contrastive": 0.0} if embeds else {}
        if model.decoder is not None:
            losses["caption"] = 0.0
        reports = tuple(split.reports)
        return Predictions(
            specimen_ids=tuple(case.specimen for case in split.cases),
            patient_ids=tuple(case.patient for case in split.cases),
            reports=reports,
            report_ids=np.arange(count),
            image_embedding=_draw_texts(reports) if embeds else None,
            text_embedding=_draw_texts(reports) if embeds else None,
            generated=reports if write else None,
            losses=losses,
        )

    def final(self, data: Data, name: str, prefix: str = "") -> Outcome:
        """Evaluate splits once, with files and a table to read.

        Args:
            data: its test split is evaluated, and with --test all its splits.
            name: of the summary's files.
            prefix: see `Outputs`.
        """
        with self.weights():
            return self._final(data, name, prefix)

    def _final(self, data: Data, name: str, prefix: str) -> Outcome:
        config, texts = self.config, Remembered(self._embed_text)
        splits = evaluated(config, data)
        write = config.evaluation.save_captions
        found = {split.name: self._predict(split, write) for split in splits}
        references = self._references(data, found)
        taught = taught_by(config, found | references)
        tasks = self.suite.tasks(
            texts, generated=write, support=references.get(SUPPORT), probe=taught
        )
        results = {s: (p, self._score(p, tasks)) for s, p in found.items()}
        origin = about(config, self.trained.model, found)
        stored = Stored(found, references, *texts.all(), origin)
        if write:
            self.run.write_json(f"captions_{name}.json", _captions(results))
        outputs = Outputs(self.run, prefix, self.suite.bootstrap)
        outcome = outputs.write(name, config.model_name, results, stored)
        if config.evaluation.save_embeddings:
            outputs.embeddings(stored)
        log.info("%s: %s", name, _headline(results))
        return outcome

    def _all(
        self, splits: Sequence[Split], write: bool, leave: Callable[[], bool]
    ) -> dict[str, tuple[Predictions, TaskResult]]:
        support = self._support(leave)
        tasks = self.suite.tasks(self._embed_text, generated=write, support=support)
        found = {split.name: self._predict(split, write, leave) for split in splits}
        return {s: (p, self._score(p, tasks)) for s, p in found.items()}

    def _score(self, predictions: Predictions, tasks: Sequence[Task]) -> TaskResult:
        # On one process: the others have the same predictions and would make the same numbers.
        return dist.from_main(lambda: evaluate(predictions, tasks))

    def _support(self, leave: Callable[[], bool] = _never) -> Predictions | None:
        """Few-shot examples: any specimens of the data, with or without reports."""
        names = self.suite.support_names
        if not names:
            return None
        cases = find(names, self.store).cases
        split = Split(SUPPORT, cases, ("",) * len(cases), (), ())
        return self._predict(split, write=False, leave=leave)

    def _references(self, data: Data, found: dict[str, Predictions]) -> dict[str, Predictions]:
        """What tasks learn from, beside the splits that are evaluated."""
        result: dict[str, Predictions] = {}
        support = self._support()
        if support is not None:
            result[SUPPORT] = support
        if self.config.evaluation.probe:
            learnt = [data.train, *data.vals] if data.test is not None else [data.train]
            result |= {
                split.name: self._predict(split, write=False)
                for split in learnt
                if split is not None and split.name not in found
            }
        return result

    def _predict(
        self, split: Split, write: bool, leave: Callable[[], bool] = _never
    ) -> Predictions:
        dataset = bag_dataset(self.config, self.store, split, self.trained, training=False)
        batches = EvalBatches(
            len(dataset), self.config.data.batch_size, dist.rank(), dist.world_size()
        )
        workers = min(self.config.data.workers, len(batches))
        loader = make_loader(dataset, batches, workers, bad=self.bad)
        bar = Bar(f"evaluating {split.name}", len(dataset), shown=dist.is_main())
        try:
            return predict(
                self.trained.model,
                loader,
                dict(zip((c.specimen for c in split.cases), split.reports, strict=True)),
                self.precision,
                self._writing() if write else None,
                lambda done: bar.update(done * dist.world_size()),
                leave,
                complete=not self.config.data.skip_bad_specimens,
            )
        finally:
            bar.close()

    def _writing(self) -> Writing:
        tokenizer, evaluation = self.trained.tokenizer, self.config.evaluation
        own, asked = self.trained.config.generation, self.config.given
        given: dict[str, Any] = {"seed": evaluation.seed}
        if not own.changed or "caption_val_max_seq_len" in asked:
            given["max_tokens"] = evaluation.caption_val_max_seq_len
        if self.config.beam_search:
            given["beams"] = evaluation.val_gen_num_beams
            given["groups"] = evaluation.val_gen_num_beam_groups
        elif not own.changed or "val_gen_top_k" in asked:
            given["top_k"] = evaluation.val_gen_top_k
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        return Writing(Decoding(*ids, **own.with_given(given)), tokenizer.decode)

    def _check_writing(self) -> None:
        """Before any work what the first report would tell after an epoch."""
        config, model = self.config, self.config.model_name
        try:
            most = self._writing().decoding.max_tokens
        except ConfigError as error:
            raise ConfigError(
                f"--save-captions: {error}. The arguments are joined with the generation settings "
                f"of model {model}; change --caption-val-max-seq-len or --val-gen-*, or leave them "
                "out to take the model's"
            ) from None
        room = self.trained.model.text.context_length - 1
        if "caption_val_max_seq_len" in config.given and most > room and dist.is_main():
            log.warning(
                "--caption-val-max-seq-len %d: the context of model %s has room for %d tokens, "
                "and reports end there",
                most,
                model,
                room,
            )

    def _embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return embed_text(self.trained, texts, self.precision)


def _check_language_model(config: Config, trained: Trained) -> None:
    evaluation = config.evaluation
    asked = {
        "--zsc-class-prompt-mapping": evaluation.zsc_class_prompt_mapping,
        "--few-shot-examples": evaluation.few_shot_examples,
        "--probe": evaluation.probe,
        "--save-embeddings": evaluation.save_embeddings,
    }
    wanted = ", ".join(flag for flag, value in asked.items() if value)
    if trained.config.family == "lm" and wanted:
        raise ConfigError(
            f"model {config.model_name} is a language model, which embeds neither slides nor "
            f"texts: leave out {wanted}"
        )


def embed_text(trained: Trained, texts: Sequence[str], precision: Precision) -> np.ndarray:
    """Texts, tokenised as in training -> [len(texts), E] float32, L2-normalised."""
    tokenizer, model = trained.tokenizer, trained.model
    assert isinstance(model, CoCa), "a language model embeds no texts"
    rows = [tokenizer.encode(text, trained.config.text.context_length) for text in texts]
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(rows), _TEXTS):
            tokens, mask = pad(rows[start : start + _TEXTS], tokenizer.pad_id)
            with precision.autocast():
                part = model.encode_text(tokens.to(precision.device), mask.to(precision.device))
            parts.append(part.float().cpu().numpy())
    return np.concatenate(parts)


def evaluated(config: Config, data: Data) -> list[Split]:
    """The splits that the last evaluation is of; those that probes learn from are not judged."""
    if not config.evaluation.test:
        return [] if data.test is None else [data.test]
    return [s for s in data.splits if not (config.evaluation.probe and s is data.train)]


def _draw_texts(texts: Sequence[str]) -> np.ndarray:
    """Embeddings [len(texts), E] that have nothing to do with the texts."""
    rows = np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Remembered:
    """Embeds texts, each once, and keeps the embeddings."""

    def __init__(self, embed: EmbedText) -> None:
        self._embed, self._known = embed, dict[str, np.ndarray]()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, self._embed(new), strict=True)
        return np.stack([self._known[text] for text in texts])

    def all(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Every text so far and its embedding [T, E]."""
        rows = list(self._known.values())
        return tuple(self._known), np.stack(rows) if rows else np.zeros((0, 0), np.float32)


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
        if name.endswith(_HEADLINE) and name.count("/") < 3 and not math.isnan(value)
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

"""Stored predictions, scored again without a model or its data; two runs side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from slidevlm.app.folders import claimed_folder, evaluation_name
from slidevlm.app.outputs import Outcome, Outputs, about, newest_predictions
from slidevlm.app.suite import SUPPORT, Suite, taught_by
from slidevlm.batch import Predictions
from slidevlm.config import (
    Config,
    Evaluation,
    declarations,
    given_values,
    validate_evaluation,
    with_values,
)
from slidevlm.documents import finite
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval import evaluate
from slidevlm.eval.compare import Difference, compare, with_holm
from slidevlm.eval.scores import Results
from slidevlm.eval.stored import Stored, load, select
from slidevlm.flags import to_yaml
from slidevlm.run import Run, configure_logging

log = logging.getLogger("slidevlm")

COMPARISON_RESAMPLES = 1000  # where none were asked for: without them there is no p-value


def with_stored_settings(path: Path, overrides: Config) -> Config:
    """The arguments of the stored evaluation, where `overrides` gives no others."""
    found = stored_predictions(path)
    names = {name for name, _, _ in declarations(Evaluation)} - {"test", "save_embeddings"}
    was = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in load(found).about.get("settings", {}).items()
        if k in names
    }
    place = {"logs": str(found.parent), "name": evaluation_name(found.parent)}
    return with_values(Config(), {**was, **place, **given_values(overrides)})


def rescore(path: Path, config: Config) -> Outcome:
    """Score stored predictions with the tasks of `config`, and write into its run folder.

    Raises:
        SlideVLMError: predictions that cannot be read, or lack what a task needs.
    """
    # Slurm's variable is there for what srun has started alone.
    for name, starter in (("WORLD_SIZE", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")):
        if int(os.environ.get(name, "1")) > 1:
            raise ConfigError(
                "--predictions scores what is stored, which is work for one process; start it "
                f"without {starter}"
            )
    configure_logging(debug=config.logging.debug, main=True)
    stored = load(stored_predictions(path))
    validate_evaluation(config)
    results = score_stored(stored, config)
    with claimed_folder(config) as folder, Run(folder) as run:
        run.write("config.yaml", to_yaml(config))
        origin = about(config, None, stored.splits)
        was = {k: stored.about.get(k) for k in ("model", "model_hash")}
        was["versions"] = stored.about.get("versions", {})  # none, where another program wrote it
        origin |= {**was, "scored_again_by": origin["versions"]}
        suite = Suite(config)
        outputs = Outputs(run, "", suite.bootstrap)
        title = str(stored.about.get("model", "stored predictions"))
        outcome = outputs.write("evaluation", title, results, replace(stored, about=origin))
        if config.evaluation.save_embeddings:
            outputs.embeddings(replace(stored, about=origin))
    if folder is not None:
        log.info("run folder: %s", folder)
    return replace(outcome, folder=folder)


def score_stored(stored: Stored, config: Config) -> Results:
    """Every task of `config` on every stored split."""
    suite = Suite(config)
    everything = stored.splits | stored.references
    support = stored.references.get(SUPPORT)
    if suite.few_shot and support is None:
        raise DataError(
            "--few-shot-examples: the stored predictions have no examples; evaluate the run with "
            "them once"
        )
    generated = all(split.generated is not None for split in stored.splits.values())
    tasks = suite.tasks(
        stored.embed_text,
        generated=generated,
        support=support,
        probe=taught_by(config, everything),
    )
    return {name: (split, evaluate(split, tasks)) for name, split in stored.splits.items()}


def with_resamples(config: Config) -> Config:
    """The configuration of a comparison, which needs resamples."""
    if config.evaluation.eval_metric_bootstraps > 1:
        return config
    if "eval_metric_bootstraps" in config.given:
        raise ConfigError(
            f"--compare needs resamples; --eval-metric-bootstraps "
            f"{config.evaluation.eval_metric_bootstraps} makes none"
        )
    return with_values(config, {"eval_metric_bootstraps": COMPARISON_RESAMPLES})


def compare_with(outcome: Outcome, other: Path, config: Config) -> list[Difference]:
    """Every metric of an evaluation against the same of other predictions.

    Args:
        outcome: of the first run, evaluated with `config`.
        other: stored predictions of the second: a file, or a folder of an evaluation or run.
        config: of both.

    Raises:
        DataError: no split with the same specimens in both.
    """
    stored = load(stored_predictions(other))
    shared = [name for name in outcome.results if name in stored.splits]
    for name in shared:
        mine, theirs = outcome.results[name][0], stored.splits[name]
        if set(mine.specimen_ids) != set(theirs.specimen_ids):
            raise DataError(
                f"--compare {other}: split {name} has {len(theirs)} specimens there and "
                f"{len(mine)} here, not the same ones; evaluate both runs on the same split file"
            )
    if not shared:
        raise DataError(
            f"--compare {other}: it has the splits {', '.join(stored.splits)}, this evaluation "
            f"{', '.join(outcome.results)}; evaluate both on the same ones"
        )
    bootstrap = Suite(config).bootstrap
    aligned = {name: _in_order(stored.splits[name], outcome.results[name][0]) for name in shared}
    for name, theirs in aligned.items():
        pairs = zip(outcome.results[name][0].reports, theirs.reports, strict=True)
        if others := sum(mine != another for mine, another in pairs):
            log.warning(
                "--compare %s: %d of %d specimens of split %s have another report there; what is "
                "computed with reports (losses, retrieval, captions) is about other texts",
                other,
                others,
                len(theirs),
                name,
            )
    try:
        results = score_stored(replace(stored, splits=aligned), config)
    except DataError as error:  # which of the two runs it is about is known here alone
        raise DataError(f"--compare {other}: {error}") from error
    found: list[Difference] = []
    for name in shared:
        found += compare(name, outcome.results[name][1], results[name][1], bootstrap)
    return with_holm(found)


def _in_order(theirs: Predictions, mine: Predictions) -> Predictions:
    """Rows in the order of the other run, so that a resample draws the same specimens of both."""
    if theirs.specimen_ids == mine.specimen_ids:
        return theirs
    place = {s: i for i, s in enumerate(theirs.specimen_ids)}
    rows = np.array([place[s] for s in mine.specimen_ids])
    return replace(select(theirs, rows), losses=theirs.losses)


def stored_predictions(path: Path) -> Path:
    """The file that `path` names; ConfigError where there is none."""
    found = newest_predictions(path)
    if found is None:
        raise ConfigError(
            f"{path} has no stored predictions; give predictions.npz, the folder of an evaluation, "
            "or a run that has been evaluated"
        )
    return found


def difference_rows(found: list[Difference]) -> list[Mapping[str, object]]:
    """For comparison.json; null where a number is not defined, as in every JSON file."""
    return [finite({**asdict(d), "difference": d.difference}) for d in found]

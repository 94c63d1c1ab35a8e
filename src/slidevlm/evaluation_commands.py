"""`slidevlm train`, and `slidevlm evaluate`: a run, a checkpoint or stored predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slidevlm import dist
from slidevlm.app.codebase import is_copy, run_copy
from slidevlm.app.outputs import Outcome, metrics_json, table
from slidevlm.app.rescoring import (
    compare_with,
    difference_rows,
    rescore,
    stored_predictions,
    with_resamples,
    with_stored_settings,
)
from slidevlm.app.runs import run_all, with_run_settings
from slidevlm.config import Config
from slidevlm.errors import ConfigError
from slidevlm.eval.compare import Difference
from slidevlm.report.tables import difference_table, score_table
from slidevlm.run import working, write_text


@dataclass(frozen=True)
class Evaluation:
    """What `slidevlm evaluate` was asked for."""

    run: Path | None  # a run folder or a checkpoint file
    predictions: Path | None  # instead of it
    compare: Path | None
    form: str  # of the printed table
    as_json: bool = False  # instead of it


def evaluate(asked: Evaluation, given: Config) -> None:
    """Evaluate, write the files, print the table.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    if (asked.run is None) == (asked.predictions is None):
        raise ConfigError(
            "give the folder of a run (or a checkpoint file) to evaluate, or --predictions FILE to "
            "score stored predictions again; one of the two"
        )
    # Found before any work, and before this evaluation is the newest one of the same run.
    other = None if asked.compare is None else stored_predictions(asked.compare)
    if asked.run is not None:
        config = with_run_settings(asked.run, given)
        config = with_resamples(config) if asked.compare is not None else config
        outcome = run_all(config)
    else:
        assert asked.predictions is not None
        config = with_stored_settings(asked.predictions, given)
        config = with_resamples(config) if asked.compare is not None else config
        with working("scoring stored predictions"):
            outcome = rescore(asked.predictions, config)
    if not dist.is_main_of_environment():
        return
    found = None
    if other is not None:
        with working("comparing"):
            found = compare_with(outcome, other, config)
        _write_comparison(outcome, other, found)
    if asked.as_json:
        content = {"folder": _name(outcome), "metrics": table(outcome.scores)}
        compared = {} if found is None else {"comparison": difference_rows(found)}
        print(json.dumps({**content, **compared}, indent=1))
        return
    width = shutil.get_terminal_size().columns
    print(score_table(outcome.scores, asked.form, width))
    if found is not None:
        print(f"\ncompared with {other}, on the same resamples:")
        print(difference_table(found, asked.form, width))


def _write_comparison(outcome: Outcome, other: Path, found: list[Difference]) -> None:
    if outcome.folder is None:
        return
    content = {"other": str(other), "about": outcome.about, "differences": difference_rows(found)}
    write_text(outcome.folder / "comparison.json", json.dumps(content, indent=1) + "\n")
    page = f"# Beside {other}\n\n{difference_table(found, 'markdown')}\n"
    write_text(outcome.folder / "comparison.md", page)


def train(config: Config, words: Sequence[str], *, as_json: bool = False) -> None:
    """Train; with `as_json` print the run's folder and the last metrics.

    `words` of the command line are what `config` was read from: with --copy-codebase the copy
    of the package reads them again.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    if config.logging.copy_codebase and not is_copy(config):
        run_copy(config, words)
    outcome = run_all(config)
    if as_json and dist.is_main_of_environment():
        print(metrics_json(outcome.folder, outcome.metrics))


def _name(outcome: Outcome) -> str | None:
    return None if outcome.folder is None else str(outcome.folder)

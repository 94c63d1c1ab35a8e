"""`slidevlm evaluate`: a run, a checkpoint or stored predictions, perhaps beside another run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from slidevlm import dist
from slidevlm.app.outputs import Outcome
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
from slidevlm.report.tables import difference_table, score_table
from slidevlm.run import write_text


@dataclass(frozen=True)
class Evaluation:
    """What `slidevlm evaluate` was asked for."""

    run: Path | None  # a run folder or a checkpoint file
    predictions: Path | None  # instead of it
    compare: Path | None
    form: str  # of the printed table


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
    if asked.compare is not None:
        stored_predictions(asked.compare)  # it must be there, before any work
    if asked.run is not None:
        config = with_run_settings(asked.run, given)
        config = with_resamples(config) if asked.compare is not None else config
        outcome = run_all(config)
    else:
        assert asked.predictions is not None
        config = with_stored_settings(asked.predictions, given)
        config = with_resamples(config) if asked.compare is not None else config
        outcome = rescore(asked.predictions, config)
    if not dist.is_main_of_environment():
        return
    width = shutil.get_terminal_size().columns
    print(score_table(outcome.scores, asked.form, width))
    if asked.compare is not None:
        _compare(outcome, asked.compare, config, asked.form, width)


def _compare(outcome: Outcome, other: Path, config: Config, form: str, width: int) -> None:
    found = compare_with(outcome, other, config)
    print(f"\ncompared with {other}, on the same resamples:")
    print(difference_table(found, form, width))
    if outcome.folder is None:
        return
    content = {"other": str(other), "about": outcome.about, "differences": difference_rows(found)}
    write_text(outcome.folder / "comparison.json", json.dumps(content, indent=1) + "\n")
    page = f"# Beside {other}\n\n{difference_table(found, 'markdown')}\n"
    write_text(outcome.folder / "comparison.md", page)

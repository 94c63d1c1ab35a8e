"""The run folder: its name, its claim, and what becomes of it after an error."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slidevlm import dist
from slidevlm.app.pretrained import RAW
from slidevlm.config import Config
from slidevlm.errors import ConfigError, SlideVLMError
from slidevlm.run import CHECKPOINTS, METRICS

# The folder that this process made before it became a copy of the package (app/codebase.py).
CLAIMED = "SLIDEVLM_CLAIMED_RUN"

_LONGEST_MODEL = 40  # characters of weights in a name: date, time and model of a default name


@contextmanager
def claimed_folder(config: Config) -> Iterator[Path | None]:
    """The run folder; gone again when a user's error ends the run before it did any work."""
    folder, is_new = _claim_folder(config)
    try:
        yield folder
    except SlideVLMError:
        if is_new and folder is not None and not _has_work(folder):
            shutil.rmtree(folder)
        raise


def _has_work(folder: Path) -> bool:
    metrics, saved = folder / METRICS, folder / CHECKPOINTS
    return (metrics.exists() and metrics.stat().st_size > 0) or saved.exists()


def config_name(config: Config, folder: Path | None) -> str:
    """An evaluation in the folder of a training does not take the place of its settings."""
    if config.evaluation.test and folder is not None and (folder / "config.yaml").exists():
        return "evaluation.yaml"
    return "config.yaml"


def evaluation_prefix(config: Config, folder: Path | None) -> str:
    """The same of its results: those of the training's own test split stay."""
    return "evaluation_" if config_name(config, folder) == "evaluation.yaml" else ""


def _claim_folder(config: Config) -> tuple[Path | None, bool]:
    """The run folder, and whether this process has made it; only the first process does.

    Raises:
        ConfigError: the run exists and is not resumed, or its folder cannot be made; on every rank.
    """
    logs = config.logs
    if logs is None:
        return None, False
    name = dist.broadcast_object(config.logging.name or default_name(config))
    folder = logs / name
    problem, made = None, False
    if dist.is_main():
        resumes = config.checkpoint.resume is not None
        claimed = os.environ.get(CLAIMED) == str(folder.resolve())
        made = not folder.exists() or (claimed and not resumes)
        if not made and not resumes:
            problem = f"run {name!r} exists in {logs}; choose another --name or --resume latest"
        else:
            try:
                folder.mkdir(parents=True, exist_ok=resumes or claimed)
            except OSError as error:
                problem = f"--logs: cannot make {folder}: {error}"
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)
    return folder, made


def default_name(config: Config) -> str:
    """`YYYY_MM_DD-HH_MM_SS-model_..-lr_..-b_..-j_..-p_..`."""
    return "-".join(
        [
            time.strftime("%Y_%m_%d-%H_%M_%S"),
            f"model_{_model(config)}",
            f"lr_{config.optim.lr:g}",
            f"b_{config.data.batch_size}",
            f"j_{config.data.workers}",
            f"p_{config.optim.precision}",
        ]
    )


def _model(config: Config) -> str:
    """The model in a name: that of --model or, without one, the run or file of the weights."""
    if config.model_name == config.model.model:
        return Path(config.model.model).stem
    weights = Path(config.model_name.removeprefix(RAW)).expanduser().absolute()
    if weights.parent.name == CHECKPOINTS:
        weights = weights.parent.parent  # the run says more than epoch_3.pt
    # Names of folders have dots, as in lr_0.0005. A default name that grew by the one before it
    # would be too long for a folder after three trainings.
    return (weights.stem if weights.is_file() else weights.name)[:_LONGEST_MODEL]


def evaluation_name(run: Path) -> str:
    """`evaluation-<time>`, numbered where another one began within the same second."""
    name = time.strftime("evaluation-%Y_%m_%d-%H_%M_%S")
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(n for n in names if not (run / n).exists())


def local_log(config: Config, folder: Path | None) -> Path | None:
    """Where --log-local writes: a file of the first process of every node."""
    if folder is None or not config.logging.log_local or dist.local_rank() != 0:
        return None
    return folder / f"out-{dist.rank()}.log"

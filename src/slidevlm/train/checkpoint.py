"""Checkpoints: written whole or not at all, read without running any code in them."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from slidevlm.errors import CheckpointError
from slidevlm.files import replacing
from slidevlm.models.files import verify_archive

log = logging.getLogger("slidevlm.checkpoint")

FORMAT = 2
LATEST = "epoch_latest.pt"
BEST = "best.pt"  # of --save-best
_REPLACED = (LATEST, BEST)  # written again and again under the same name


class AbandonedError(Exception):
    """Writing was given up on purpose; nothing has changed."""


@dataclass(frozen=True)
class Progress:
    """Where training stands. `batch` micro-batches of epoch `epoch` (counted from 0) are done.

    With all of them done and the epoch not yet the next one, its evaluation is still to be made.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def next_epoch(self) -> Progress:
        """The same step, the epoch over and evaluated."""
        return Progress(self.step, self.epoch + 1, 0)


@dataclass(frozen=True)
class ModelState:
    """All that is needed to use a model: made by `app`, read back by it."""

    weights: dict[str, torch.Tensor]
    config: dict[str, Any]  # ModelConfig.to_dict(), with the tile width
    tokenizer: str  # its JSON
    vocab_size: int
    siglip: bool
    position_unit: str | None
    averaged: dict[str, torch.Tensor] = field(default_factory=dict)  # of --ema, by name

    def for_use(self) -> ModelState:
        """With the averaged weights in the place of the last ones, where there are any."""
        return replace(self, weights={**self.weights, **self._averaged_aliases()}, averaged={})

    def _averaged_aliases(self) -> dict[str, torch.Tensor]:
        """The averages, under every name of a tied weight."""
        if not self.averaged:
            return {}
        by_storage = {self.weights[name].data_ptr(): t for name, t in self.averaged.items()}
        return {n: by_storage[t.data_ptr()] for n, t in self.weights.items()
                if t.numel() and t.data_ptr() in by_storage}  # fmt: skip


@dataclass(frozen=True)
class TrainState:
    """All that is needed to go on, besides the model."""

    progress: Progress
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    random: list[dict[str, torch.Tensor]]  # of each rank
    order: dict[str, int]  # what the order of the data depends on
    skipped: int
    config: str  # the run's config.yaml
    metrics: dict[str, float]
    threads: int  # torch.get_num_threads() when saved: sums on a CPU depend on it
    best: dict[str, float] = field(default_factory=dict)  # metric of --save-best -> its value
    accum_freq: int = 0  # which Progress.batch counts by; 0: once it was not told


def random_state() -> dict[str, torch.Tensor]:
    """State of torch's generators in this process (data order and draws have their own seeds)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _Watched:
    """A file that refuses to go on once `given_up` is set."""

    def __init__(self, file: BinaryIO, given_up: threading.Event) -> None:
        self._file, self._given_up = file, given_up

    def write(self, content: Any) -> int:
        if self._given_up.is_set():
            raise AbandonedError
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def save(
    path: Path,
    model: ModelState,
    training: TrainState,
    given_up: threading.Event | None = None,
) -> None:
    """Write to a temporary file, flush it to the disk, rename: a kill leaves the old file whole.

    Args:
        path: of the file.
        model: what is stored.
        training: and this.
        given_up: set by another thread that wants writing to end soon.

    Raises:
        AbandonedError: it was set; the old file is as it was.
        CheckpointError: the file system refuses, for example because it is full.
    """
    content = {
        "format": FORMAT,
        "model": vars(model),
        "training": {**vars(training), "progress": vars(training.progress)},
    }
    try:
        with replacing(path) as new, new.open("wb") as file:
            watched: Any = file if given_up is None else _Watched(file, given_up)
            torch.save(content, watched)
            file.flush()
            os.fsync(file.fileno())
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        if given_up is not None and given_up.is_set():
            raise AbandonedError from error
        raise CheckpointError(
            f"cannot write checkpoint {path} ({_first_line(error)}); look at the free space and "
            "the rights there, then go on with --resume latest"
        ) from error


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> tuple[ModelState, TrainState]:
    """Read a checkpoint onto the CPU, its checksums verified.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of slidevlm.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .pt file")
    try:
        verify_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds on damaged bytes
        raise CheckpointError(
            f"checkpoint {path} is damaged or not a slidevlm checkpoint ({_first_line(error)}); "
            "use an older one"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int):
        raise CheckpointError(f"{path} is not a slidevlm checkpoint: it says no format")
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is a slidevlm checkpoint of format {found}, and this version reads format "
            f"{FORMAT}; use it with {'a later' if found > FORMAT else 'an earlier'} version"
        )
    try:
        training = dict(content["training"])
        training["progress"] = Progress(**training["progress"])
        return ModelState(**content["model"]), TrainState(**training)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} lacks a part: {error}") from error


def newest(folder: Path) -> tuple[Path, ModelState, TrainState] | None:
    """The checkpoint of a folder that is furthest in training and whole; None where there is none.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    files = checkpoints(folder)
    for path in sorted(files, key=_step, reverse=True):
        try:
            return (path, *load(path))
        except CheckpointError as error:
            log.warning("skipping a checkpoint: %s", error)
    if files:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: {_names(files)}")
    return None


def _step(path: Path) -> float:
    """How far a checkpoint is; weights stay on the disk. Infinity where it cannot be told."""
    try:
        verify_archive(path, whole=False)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["training"]["progress"]["step"])
    except Exception:  # tried first, so that `load` says what is wrong with it
        return math.inf


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder (never temporary files or results), by name."""
    return sorted([*folder.glob("epoch_*.pt"), *folder.glob("step_*.pt"), *folder.glob(BEST)])


def _names(files: Sequence[Path]) -> str:
    return ", ".join(f.name for f in files)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Keeper:
    """Decides which files a run keeps.

    Args:
        folder: the run's checkpoint folder, or None to keep nothing.
        every_epochs: epochs between two kept files; 0 keeps the last only.
        epochs: of the whole training; the last is always kept.
        most_recent: also write epoch_latest.pt after every epoch.
        delete_previous: remove this run's previous file once a new one is stored. Of the files
            that are there at the start only the newest is meant.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        every_epochs: int,
        epochs: int,
        most_recent: bool,
        delete_previous: bool,
    ) -> None:
        self.folder, self.every_epochs, self.epochs = folder, every_epochs, epochs
        if folder is not None:
            for leftover in folder.glob(".*.pt.*.tmp"):  # of a process that was killed while saving
                leftover.unlink(missing_ok=True)
        self.most_recent, self.delete_previous = most_recent, delete_previous
        found = (
            [] if folder is None else [f for f in checkpoints(folder) if f.name not in _REPLACED]
        )
        self._previous = sorted(found, key=lambda f: f.stat().st_mtime)[-1:]
        self.given_up = threading.Event()

    def epoch_files(self, epochs_done: int) -> list[Path]:
        """Files to write after so many epochs; the caller need not build a state for none."""
        if self.folder is None:
            return []
        due = self.every_epochs > 0 and epochs_done % self.every_epochs == 0
        files = []
        if due or epochs_done == self.epochs:
            files.append(self.folder / f"epoch_{epochs_done}.pt")
        if self.most_recent:
            files.append(self.folder / LATEST)
        return files

    def best_files(self) -> list[Path]:
        """Files to write after the best evaluation so far."""
        return [] if self.folder is None else [self.folder / BEST]

    def step_files(self, step: int) -> list[Path]:
        """Files to write within an epoch, after so many steps."""
        return [] if self.folder is None else [self.folder / f"step_{step}.pt"]

    def store(self, files: Sequence[Path], model: ModelState, training: TrainState) -> None:
        """Write the files, and only then remove what they replace."""
        for path in files:
            save(path, model, training, self.given_up)
            log.info("saved %s", path)
        written = [f for f in files if f.name not in _REPLACED]
        if self.delete_previous and written:
            for path in self._previous:
                if path not in files:
                    path.unlink(missing_ok=True)
            self._previous = []
        self._previous += written

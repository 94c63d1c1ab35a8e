"""The training loop. Everything with a choice is decided before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from slidevlm import dist
from slidevlm.batch import Batch
from slidevlm.train.checkpoint import Progress
from slidevlm.train.schedule import Schedule
from slidevlm.train.step import Step, Terms


class Batches(Protocol):
    """The sampler: a deterministic order of micro-batches for every epoch."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Prepare `epoch`, leaving out its first micro-batches."""

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank."""


class Watcher(Protocol):
    """What happens besides the steps. A process without a run folder has one that does nothing."""

    @property
    def stops(self) -> bool:
        """Whether training shall end here, the same on every rank; asked after either save."""
        ...

    def step(self, line: StepLine) -> None:
        """After every optimizer step."""

    def save_within_epoch(self, progress: Progress) -> None:
        """After every optimizer step but an epoch's last."""

    def epoch(self, progress: Progress) -> None:
        """After every epoch: evaluate and save. `progress` has all its batches behind it."""


@dataclass
class StepLine:
    """One step, for the log; seconds are wall time."""

    progress: Progress
    terms: Terms
    rate: float
    samples: int  # of all ranks
    tiles: int  # of this rank
    data_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """What the loop needs to know."""

    epochs: int
    accum_freq: int
    schedule: Schedule
    device: torch.device


def train(
    step: Step,
    loader: DataLoader[Batch],
    batches: Batches,
    plan: Plan,
    watcher: Watcher,
    start: Progress,
) -> Progress:
    """Train from `start` to the end of the last epoch, or until the watcher stops it.

    Returns where it ended.
    """
    progress = start
    for epoch in range(start.epoch, plan.epochs):
        batches.set_epoch(epoch, progress.batch)
        step.model.train()
        clock = time.perf_counter()
        for group in _groups(loader, plan.accum_freq):
            on_device = [batch.to(plan.device) for batch in group]
            fetched = time.perf_counter()
            rate = plan.schedule(progress.step)
            with dist.stepping:
                terms = step(on_device, rate)
            progress = Progress(progress.step + 1, epoch, progress.batch + plan.accum_freq)
            now = time.perf_counter()
            watcher.step(
                StepLine(
                    progress,
                    terms,
                    rate,
                    samples=sum(len(b) for b in group) * dist.world_size(),
                    tiles=sum(sum(b.bags.lengths) for b in group),
                    data_seconds=fetched - clock,
                    step_seconds=now - fetched,
                )
            )
            if progress.batch < len(batches):
                watcher.save_within_epoch(progress)
                if watcher.stops:
                    return progress
            clock = time.perf_counter()
        watcher.epoch(progress)
        progress = progress.next_epoch()
        if watcher.stops:
            return progress
    return progress


def _groups(loader: DataLoader[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive micro-batches; the sampler yields a multiple of `size` of them.

    Empty ones, whose specimens were all bad, count but are left out.
    """
    group: list[Batch] = []
    count = 0
    for count, batch in enumerate(dist.alone.each(loader), 1):
        if len(batch):
            group.append(batch)
        if count % size == 0:
            yield group
            group = []
    assert count % size == 0, "the sampler must yield whole groups"

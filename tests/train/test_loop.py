"""The loop: which batches in which step, at which rate, from any place on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from slidevlm.batch import Bags, Batch
from slidevlm.data.sampling import TrainBatches
from slidevlm.train.checkpoint import Progress
from slidevlm.train.loop import Plan, StepLine, train
from slidevlm.train.step import Terms

EPOCHS, SPECIMENS, BATCH = 3, 14, 2


class Specimens(Dataset[tuple[int, int]]):
    """An item is its key: what the sampler asked for is seen in the batch."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def collate(keys: Sequence[tuple[int, int]]) -> Batch:
    names = tuple(f"{epoch}:{index}" for epoch, index in keys)
    lengths = tuple(1 + index for _, index in keys)
    n = len(keys)
    return Batch(
        Bags(torch.zeros(sum(lengths), 2), lengths),
        torch.zeros(n, 3, dtype=torch.int64),
        torch.ones(n, 3, dtype=torch.bool),
        torch.arange(n),
        names,
        names,
    )


class RecordingStep:
    """Stands for `Step`: keeps what it was given."""

    def __init__(self) -> None:
        self.model = nn.Dropout()
        self.model.eval()
        self.seen: list[tuple[tuple[str, ...], ...]] = []
        self.rates: list[float] = []

    def __call__(self, batches: Sequence[Batch], rate: float) -> Terms:
        assert self.model.training, "dropout must be on"
        self.seen.append(tuple(b.specimen_ids for b in batches))
        self.rates.append(rate)
        return Terms(*(torch.tensor(float(len(self.seen))),) * 5, skipped=False)


@dataclass
class RecordingWatcher:
    """Keeps every call; evaluating an epoch leaves the model in evaluation mode."""

    model: nn.Module
    calls: list[tuple[str, Progress]] = field(default_factory=list)
    lines: list[StepLine] = field(default_factory=list)
    stop_at: int | None = None  # a step
    stops: bool = False

    def step(self, line: StepLine) -> None:
        self.calls.append(("step", line.progress))
        self.lines.append(line)
        self.stops = line.progress.step == self.stop_at

    def save_within_epoch(self, progress: Progress) -> None:
        self.calls.append(("save", progress))

    def epoch(self, progress: Progress) -> None:
        self.calls.append(("epoch", progress))
        self.model.eval()


def run(
    accum_freq: int = 1,
    start: Progress | None = None,
    epochs: int = EPOCHS,
    workers: int = 0,
    stop_at: int | None = None,
) -> tuple[RecordingStep, RecordingWatcher, Progress]:
    batches = TrainBatches(SPECIMENS, BATCH, seed=4, accum_freq=accum_freq)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader: Any = DataLoader(Specimens(), batch_sampler=batches, collate_fn=collate, **options)
    step = RecordingStep()
    watcher = RecordingWatcher(step.model, stop_at=stop_at)
    rate: Callable[[int], float] = lambda s: 1.0 / (1 + s)  # noqa: E731
    plan = Plan(epochs, accum_freq, rate, torch.device("cpu"))
    end = train(step, loader, batches, plan, watcher, start or Progress())  # type: ignore[arg-type]
    return step, watcher, end


def test_every_step_has_its_batches_and_its_rate() -> None:
    step, _, end = run()
    assert end == Progress(21, EPOCHS, 0)
    assert step.rates == [1 / (1 + s) for s in range(21)]
    for epoch in range(EPOCHS):
        seen = [name for group in step.seen[7 * epoch : 7 * epoch + 7] for b in group for name in b]
        assert sorted(seen) == sorted(f"{epoch}:{i}" for i in range(SPECIMENS))
    orders = [[n.split(":")[1] for n in np.ravel(step.seen[7 * e : 7 * e + 7])] for e in range(3)]
    assert orders[0] != orders[1] != orders[2], "each epoch has an order of its own"


def test_what_the_watcher_hears() -> None:
    _, watcher, _ = run(epochs=2)
    expected = []
    for epoch in range(2):
        for batch in range(1, 8):
            at = Progress(7 * epoch + batch, epoch, batch)
            expected += [("step", at), ("save", at)] if batch < 7 else [("step", at)]
        expected.append(("epoch", Progress(7 * epoch + 7, epoch, 7)))
    assert watcher.calls == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_within_an_epoch_or_at_its_end_and_gone_on(workers: int) -> None:
    whole = run()[0].seen
    for stop_at, place in ((3, Progress(3, 0, 3)), (7, Progress(7, 1, 0)), (9, Progress(9, 1, 2))):
        step, watcher, end = run(stop_at=stop_at, workers=workers)
        assert end == place and step.seen == whole[:stop_at]
        assert watcher.calls[-1][0] == ("epoch" if stop_at == 7 else "save")
        assert run(start=end)[0].seen == whole[stop_at:]


def test_a_line_of_the_log() -> None:
    step, watcher, _ = run(accum_freq=3)
    assert [line.progress for line in watcher.lines[:3]] == [
        Progress(1, 0, 3),
        Progress(2, 0, 6),
        Progress(3, 1, 3),
    ]
    for i, line in enumerate(watcher.lines):
        assert line.terms.loss.item() == i + 1
        assert line.rate == 1 / (1 + i)
        assert line.samples == 6
        indices = [int(name.split(":")[1]) for b in step.seen[i] for name in b]
        assert line.tiles == sum(indices) + len(indices)
        assert line.data_seconds >= 0 and line.step_seconds >= 0


@pytest.mark.parametrize("accum_freq", [1, 2, 3])
def test_groups_are_whole(accum_freq: int) -> None:
    step, _, end = run(accum_freq=accum_freq)
    steps = SPECIMENS // (BATCH * accum_freq)
    assert len(step.seen) == EPOCHS * steps == end.step
    assert {len(group) for group in step.seen} == {accum_freq}


@pytest.mark.parametrize("accum_freq", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_going_on_from_any_place_is_going_on_exactly_there(accum_freq: int, workers: int) -> None:
    whole, watcher, end = run(accum_freq)
    places = [p for kind, p in watcher.calls if kind in ("save", "epoch")]
    places += [p.next_epoch() for kind, p in watcher.calls if kind == "epoch"]
    for place in places if workers == 0 else places[1:4]:
        rest, _, same_end = run(accum_freq, place, workers=workers)
        assert rest.seen == whole.seen[place.step :]
        assert rest.rates == whole.rates[place.step :]
        assert same_end == end


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_whose_evaluation_was_left_goes_on_with_that(workers: int) -> None:
    whole = run()[0].seen
    step, watcher, end = run(start=Progress(14, 1, 7), workers=workers)
    assert watcher.calls[:2] == [("epoch", Progress(14, 1, 7)), ("step", Progress(15, 2, 1))]
    assert step.seen == whole[14:] and end == Progress(21, EPOCHS, 0)
    step, watcher, end = run(start=Progress(21, 2, 7), workers=workers)
    assert watcher.calls == [("epoch", Progress(21, 2, 7))]
    assert step.seen == [] and end == Progress(21, EPOCHS, 0)


def test_a_finished_training_does_nothing() -> None:
    step, watcher, end = run(start=Progress(21, EPOCHS, 0))
    assert step.seen == [] and watcher.calls == [] and end == Progress(21, EPOCHS, 0)


def test_more_epochs_than_before_go_on() -> None:
    step, _, end = run(start=Progress(21, EPOCHS, 0), epochs=EPOCHS + 1)
    assert len(step.seen) == 7 and end == Progress(28, EPOCHS + 1, 0)


def test_a_sampler_that_yields_half_a_group_is_a_fault() -> None:
    batches = TrainBatches(SPECIMENS, BATCH, seed=4)  # seven, not a multiple of 2
    loader: Any = DataLoader(Specimens(), batch_sampler=batches, collate_fn=collate)
    step = RecordingStep()
    plan = Plan(1, 2, lambda s: 1.0, torch.device("cpu"))
    with pytest.raises(AssertionError, match="whole groups"):
        train(step, loader, batches, plan, RecordingWatcher(step.model), Progress())  # type: ignore[arg-type]

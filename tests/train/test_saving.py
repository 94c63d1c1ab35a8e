"""Checkpoints beside the loop: what is copied when, ties, errors, giving up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from slidevlm.errors import CheckpointError
from slidevlm.train import checkpoint as ckpt
from slidevlm.train.checkpoint import ModelState, Progress, TrainState, load, save
from slidevlm.train.saving import Snapshots, Writer


def states(weights: dict[str, torch.Tensor], step: int = 1) -> tuple[ModelState, TrainState]:
    moments = {"state": {0: {"exp_avg": torch.full((3,), float(step))}}, "param_groups": []}
    return (
        ModelState(weights, {}, "{}", 1, False, None),
        TrainState(Progress(step), moments, {}, [], {}, 0, "", {}, 1),
    )


def test_a_copy_is_apart_and_tied_weights_stay_one() -> None:
    weight, snapshots = torch.ones(4, 2), Snapshots()
    model, training = snapshots.take(*states({"a": weight, "b": weight, "c": weight[1:]}))
    weight.zero_()
    assert torch.equal(model.weights["a"], torch.ones(4, 2))
    assert model.weights["a"] is model.weights["b"] and model.weights["c"].shape == (3, 2)
    assert torch.equal(training.optimizer["state"][0]["exp_avg"], torch.ones(3))
    assert training.progress == Progress(1)


def test_memory_is_used_again_and_other_shapes_are_no_trouble() -> None:
    snapshots = Snapshots()
    first = snapshots.take(*states({"a": torch.ones(4)}))[0].weights["a"]
    second = snapshots.take(*states({"a": torch.full((4,), 2.0)}))[0].weights["a"]
    assert second.data_ptr() == first.data_ptr() and second[0] == 2
    third = snapshots.take(*states({"a": torch.full((5,), 3.0, dtype=torch.float64)}))[0]
    assert torch.equal(third.weights["a"], torch.full((5,), 3.0, dtype=torch.float64))


def test_what_changes_after_settling_does_not_reach_the_file(tmp_path: Path) -> None:
    """The file is written only after the weights have moved on."""
    moved, path = threading.Event(), tmp_path / "epoch_1.pt"

    def store(files: Sequence[Path], model: ModelState, training: TrainState) -> None:
        assert moved.wait(10), "the loop goes on while the file is written"
        for file in files:
            save(file, model, training)

    weight, writer = torch.ones(1000), Writer(store)
    writer.start([path], *states({"w": weight}))
    writer.settle()
    weight.zero_()
    assert not path.exists() and writer.busy and not writer.ended
    moved.set()
    assert writer.wait() is None and not writer.busy
    assert torch.equal(load(path)[0].weights["w"], torch.ones(1000))


def test_settling_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy, take = threading.Event(), Snapshots.take

    def slow(self: Snapshots, *both: object) -> object:
        assert may_copy.wait(10)
        return take(self, *both)  # type: ignore[arg-type]

    monkeypatch.setattr(Snapshots, "take", slow)
    stored: list[torch.Tensor] = []
    writer = Writer(lambda files, model, training: stored.append(model.weights["w"]))
    weight = torch.ones(3)
    writer.start([], *states({"w": weight}))
    threading.Timer(0.05, may_copy.set).start()
    writer.settle()
    weight.zero_()
    writer.wait()
    assert torch.equal(stored[0], torch.ones(3))


def test_an_error_is_told_and_the_next_one_may_succeed(messages: pytest.LogCaptureFixture) -> None:
    problems: list[Exception | None] = [CheckpointError("disk full"), None]

    def store(*args: object) -> None:
        if problem := problems.pop(0):
            raise problem

    writer = Writer(store)
    writer.start([], *states({}))
    assert writer.wait() == "disk full"
    assert "disk full; training goes on, and saving is tried again" in messages.text
    writer.start([], *states({}))
    assert writer.wait() is None and writer.wait() is None


def test_a_fault_of_the_program_is_raised_and_nobody_waits_for_ever() -> None:
    def store(*args: object) -> None:
        raise ZeroDivisionError

    writer = Writer(store)
    writer.start([], *states({}))
    writer.settle()
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_without_a_store_nothing_happens() -> None:
    writer = Writer(None)
    writer.start([], *states({}))
    writer.settle()
    assert not writer.busy and writer.wait() is None


def test_given_up_it_ends_and_the_old_file_stays(tmp_path: Path) -> None:
    path, given_up = tmp_path / "epoch_1.pt", threading.Event()
    save(path, *states({"w": torch.ones(3)}))
    given_up.set()
    with pytest.raises(ckpt.AbandonedError):
        save(path, *states({"w": torch.zeros(100_000)}), given_up)
    assert torch.equal(load(path)[0].weights["w"], torch.ones(3))
    assert [f.name for f in tmp_path.iterdir()] == ["epoch_1.pt"]


def test_averages_stand_in_for_the_weights_under_every_name(tmp_path: Path) -> None:
    tied = torch.ones(2)
    model, training = states({"a": tied, "b": tied, "frozen": torch.ones(2)})
    model.averaged["a"] = torch.full((2,), 5.0)
    save(tmp_path / "epoch_1.pt", model, training)
    used = load(tmp_path / "epoch_1.pt")[0].for_use()
    found = {name: tensor.tolist() for name, tensor in used.weights.items()}
    assert found == {"a": [5, 5], "b": [5, 5], "frozen": [1, 1]} and used.averaged == {}

"""What happens beside the steps: when things are due, the log lines, evaluating and saving."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm import dist
from slidevlm.errors import CheckpointError
from slidevlm.eval.predict import LeftError
from slidevlm.run import Run
from slidevlm.train import watch
from slidevlm.train.checkpoint import Keeper, ModelState, Progress, TrainState, load, newest
from slidevlm.train.interrupt import Interrupts
from slidevlm.train.loop import StepLine
from slidevlm.train.step import Terms
from slidevlm.train.watch import Rhythm, RunWatcher


def rhythm(**options: Any) -> Rhythm:
    plain: dict[str, Any] = {
        "epochs": 5,
        "steps_an_epoch": 3,
        "log_every_n_steps": 2,
        "save_every_n_steps": None,
        "val_frequency": 1,
        "caption_val_frequency": 1,
        "eval_grace_period": 0,
        "captions": False,
    }
    return Rhythm(**{**plain, **options})


EPOCHS = range(1, 6)

# --- when -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"val_frequency": 2}, [2, 4, 5]),
        ({"val_frequency": 3}, [3, 5]),
        ({"val_frequency": 5}, [5]),
        ({"val_frequency": 100}, [5]),
        ({"eval_grace_period": 2}, [3, 4, 5]),
        ({"eval_grace_period": 2, "val_frequency": 2}, [4, 5]),
        ({"eval_grace_period": 4}, [5]),
        ({"eval_grace_period": 5}, []),
    ],
)
def test_evaluation_in_epochs_also_after_the_last(
    options: dict[str, int], expected: list[int]
) -> None:
    assert [e for e in EPOCHS if rhythm(**options).evaluates(e)] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"caption_val_frequency": 2}, [2, 4, 5]),
        ({"caption_val_frequency": 2, "val_frequency": 100}, [2, 4, 5]),
        ({"caption_val_frequency": 9, "val_frequency": 2}, [5]),
        ({"caption_val_frequency": 2, "eval_grace_period": 3}, [4, 5]),
        ({"captions": False}, []),
    ],
)
def test_captions_in_epochs_also_after_the_last(
    options: dict[str, Any], expected: list[int]
) -> None:
    options = {"captions": True, **options}
    assert [e for e in EPOCHS if rhythm(**options).generates(e)] == expected


def test_saving_every_n_steps() -> None:
    assert [s for s in range(1, 10) if rhythm(save_every_n_steps=3).saves_at(s)] == [3, 6, 9]
    assert not any(rhythm().saves_at(s) for s in range(1, 10))


# --- the watcher ----------------------------------------------------------------------------


class Rig:
    """A watcher on a real run folder; evaluations and states are recorded."""

    def __init__(
        self,
        folder: Path,
        *,
        start: Progress | None = None,
        metrics: dict[str, float] | None = None,
        keeper: dict[str, Any] | None = None,
        memory: Callable[[], dict[str, float]] | None = None,
        **options: Any,
    ) -> None:
        self.run = Run(folder)
        self.calls: list[tuple[Any, ...]] = []
        self.interrupts = Interrupts()
        keep = {"every_epochs": 2, "epochs": 5, "most_recent": False, "delete_previous": False}
        self.watcher = RunWatcher(
            self.run,
            Keeper(folder / "checkpoints", **{**keep, **(keeper or {})}),
            self.state,
            self.evaluate,
            rhythm(**options),
            start or Progress(),
            metrics or {},
            self.interrupts,
            memory or dict,
        )

    def evaluate(self, epoch: int, captions: bool, step: int) -> dict[str, float]:
        self.calls.append(("evaluate", epoch, captions, step))
        if self.interrupts.came():
            raise LeftError
        return {"val/score": float(epoch)}

    def state(self, progress: Progress, metrics: dict[str, float]) -> tuple[ModelState, TrainState]:
        self.calls.append(("save", progress.step))
        return (
            ModelState({"w": torch.tensor(progress.step)}, {}, "{}", 1, False, None),
            TrainState(progress, {}, {}, [], {}, 0, "", dict(metrics), 1),
        )

    def epoch(self, epoch: int) -> None:
        self.watcher.epoch(Progress(3 * epoch, epoch - 1, 3))
        self.watcher.wait()

    def save(self, progress: Progress) -> None:
        """Within an epoch; what is to be written is, or has failed, when it returns."""
        self.watcher.save_within_epoch(progress)
        self.watcher.wait()

    def step(self, step: int, **options: Any) -> None:
        self.watcher.step(line(step, **options))


def line(
    step: int,
    *,
    loss: float = 1.5,
    contrastive: float | None = 0.5,
    caption: float | None = 0.25,
    skipped: bool = False,
    samples: int = 8,
) -> StepLine:
    tensor = torch.tensor
    terms = [None if term is None else tensor(term) for term in (contrastive, caption)]
    return StepLine(
        progress=Progress(step, (step - 1) // 3, 0),
        terms=Terms(tensor(loss), *terms, tensor(14.0), tensor(2.0), skipped),
        rate=0.125,
        samples=samples,
        tiles=100,
        data_seconds=0.5 * step,
        step_seconds=2.0 * step,
    )


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_log_lines_have_all_fields_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path, log_every_n_steps=4)
    for step in range(1, 16):
        rig.step(step)
    lines = told(tmp_path)
    assert [x["step"] for x in lines] == [4, 8, 12, 15]
    assert [x["epoch"] for x in lines] == [2, 3, 4, 5]
    first = lines[0]
    assert set(first) == {
        "kind",
        "step",
        "epoch",
        "loss",
        "contrastive_loss",
        "caption_loss",
        "logit_scale",
        "gradient_norm",
        "learning_rate",
        "samples_per_second",
        "tiles_per_second",
        "data_seconds",
        "step_seconds",
    }
    assert first["kind"] == "train" and first["learning_rate"] == 0.125
    assert (first["loss"], first["contrastive_loss"], first["caption_loss"]) == (1.5, 0.5, 0.25)
    assert (first["logit_scale"], first["gradient_norm"]) == (14.0, 2.0)


def test_memory_stands_in_a_line_where_it_is_asked_for(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, memory=lambda: {"memory_mb": 512.25, "device_memory_mb": 7.0})
    rig.step(2)
    (told_line,) = told(tmp_path)
    assert (told_line["memory_mb"], told_line["device_memory_mb"]) == (512.25, 7.0)
    assert "  memory 512 MB  device_memory 7 MB" in messages.text
    for shown in (
        r"epoch 1  step 2/15  loss 1\.5000 \(contrastive 0\.5000, caption 0\.2500\)  scale 14\.00",
        r"  rate 1\.25e-01  norm 2\.00  \d+\.\d samples/s  \d+ tiles/s",
        r"  data 0\.500 s  step 2\.000 s  memory 512 MB",
    ):
        assert re.search(shown, messages.text), shown


@pytest.mark.parametrize("lacks", ["contrastive", "caption"])
def test_a_loss_that_there_is_not_is_in_no_line(
    tmp_path: Path, lacks: str, messages: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    rig.step(2, **{lacks: None})
    (told_line,) = told(tmp_path)
    has = "caption 0.2500" if lacks == "contrastive" else "contrastive 0.5000"
    assert f"{lacks}_loss" not in told_line and f"loss 1.5000 ({has})  scale" in messages.text


def test_a_line_sums_up_the_steps_since_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("slidevlm.train.watch.time.perf_counter", lambda: now[0])
    rig = Rig(tmp_path, log_every_n_steps=2)
    for step in (1, 2, 3, 4):
        now[0] += step
        rig.step(step, samples=10 * step)
    first, second = told(tmp_path)
    assert first["samples_per_second"] == pytest.approx(30 / 3)
    assert first["tiles_per_second"] == pytest.approx(200 / 3)
    assert first["data_seconds"] == pytest.approx((0.5 + 1.0) / 2), "of one step"
    assert first["step_seconds"] == pytest.approx((2 + 4) / 2)
    assert second["samples_per_second"] == pytest.approx(70 / 7)
    assert second["step_seconds"] == pytest.approx((6 + 8) / 2)


def test_time_of_an_evaluation_is_not_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("slidevlm.train.watch.time.perf_counter", lambda: now[0])
    rig = Rig(tmp_path, log_every_n_steps=4)

    def slow(epoch: int, captions: bool, step: int) -> dict[str, float]:
        now[0] += 1000
        return {}

    rig.watcher.evaluate = slow
    for step in (1, 2, 3):
        now[0] += 1
        rig.step(step)
    rig.epoch(1)
    now[0] += 2
    rig.step(4)
    assert told(tmp_path)[0]["samples_per_second"] == pytest.approx(8 / 2)
    assert told(tmp_path)[0]["step_seconds"] == pytest.approx(8.0), "of step 4 alone"


def test_a_resumed_run_averages_over_its_own_steps(tmp_path: Path) -> None:
    rig = Rig(tmp_path, start=Progress(7, 2, 1), log_every_n_steps=4)
    rig.step(8)
    assert told(tmp_path)[0]["step_seconds"] == pytest.approx(16.0)


def test_a_skipped_step_is_told(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path)
    rig.step(1, loss=math.nan, skipped=True)
    rig.step(2)
    warnings = [r.getMessage() for r in messages.records if r.levelname == "WARNING"]
    assert warnings == ["step 1 skipped: its loss or gradient was not finite"]
    (shown,) = [r.getMessage() for r in messages.records if r.levelname == "INFO"]
    assert "epoch 1  step 2/15  loss 1.5000" in shown and "rate 1.25e-01" in shown


def test_an_epoch_evaluates_before_it_saves(tmp_path: Path) -> None:
    """A kill in between repeats the epoch; a checkpoint holds its own epoch's metrics."""
    rig = Rig(tmp_path, val_frequency=2, captions=True, caption_val_frequency=4)
    for epoch in EPOCHS:
        rig.epoch(epoch)
    assert rig.calls == [
        ("evaluate", 2, False, 6),
        ("save", 6),
        ("evaluate", 4, True, 12),
        ("save", 12),
        ("evaluate", 5, True, 15),
        ("save", 15),
    ]
    saved = load(tmp_path / "checkpoints/epoch_4.pt")[1]
    assert saved.metrics == {"val/score": 4.0} and saved.progress == Progress(12, 4, 0)
    assert rig.watcher.metrics == {"val/score": 5.0}


def test_captions_are_an_evaluation_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path, val_frequency=100, captions=True, caption_val_frequency=2)
    for epoch in EPOCHS:
        rig.epoch(epoch)
    evaluations = [call for call in rig.calls if call[0] == "evaluate"]
    assert evaluations == [("evaluate", e, True, 3 * e) for e in (2, 4, 5)]


def test_steps_save_within_an_epoch_and_at_its_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path, save_every_n_steps=2, keeper={"every_epochs": 0, "most_recent": True})
    for epoch in EPOCHS:
        for batch in (1, 2):
            step = 3 * (epoch - 1) + batch
            rig.save(Progress(step, epoch - 1, batch))
        rig.epoch(epoch)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    steps = {f"step_{s}.pt" for s in (2, 4, 6, 8, 10, 12, 14)}
    assert names == {*steps, "epoch_5.pt", "epoch_latest.pt"}
    assert load(tmp_path / "checkpoints/step_4.pt")[1].progress == Progress(4, 1, 1)
    assert load(tmp_path / "checkpoints/step_6.pt")[1].progress == Progress(6, 2, 0)


def test_all_of_a_save_is_where_a_hang_is_looked_for(tmp_path: Path) -> None:
    """Gathering the state, beginning to copy it, and waiting for the file."""
    rig, seen = Rig(tmp_path, save_every_n_steps=1), []
    writer = rig.watcher._writer

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*values: Any) -> Any:
            seen.append((name, dist.stepping.within(dist.stepping.mark)))
            return call(*values)

        return inside

    rig.watcher.state = noted("state", rig.state)
    writer.start = noted("start", writer.start)  # type: ignore[method-assign]
    writer.wait = noted("wait", writer.wait)  # type: ignore[method-assign]
    rig.save(Progress(1, 0, 1))
    assert seen == [("state", True), ("start", True), ("wait", True)]
    assert not dist.stepping.within(dist.stepping.mark)


def test_no_state_is_gathered_where_nothing_is_saved(tmp_path: Path) -> None:
    rig = Rig(tmp_path, val_frequency=100)
    rig.epoch(1)
    rig.save(Progress(4, 1, 1))
    assert rig.calls == []


def test_metrics_of_before_are_saved_until_there_are_new_ones(tmp_path: Path) -> None:
    old = {"val/score": 0.5}
    rig = Rig(tmp_path, start=Progress(3, 1, 0), metrics=old, save_every_n_steps=1, val_frequency=9)
    rig.save(Progress(4, 1, 1))
    assert load(tmp_path / "checkpoints/step_4.pt")[1].metrics == old
    assert rig.watcher.metrics == old


# --- asked to end, and saves that fail --------------------------------------------------------


def test_asked_to_end_within_an_epoch_it_saves_there(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.save(Progress(1, 0, 1))
    assert not rig.watcher.stops and rig.calls == []
    rig.interrupts.name = "SIGTERM"
    rig.save(Progress(2, 0, 2))
    assert rig.watcher.stops
    assert load(tmp_path / "checkpoints" / "step_2.pt")[1].progress == Progress(2, 0, 2)


def test_asked_to_end_at_an_epoch_that_keeps_nothing_it_saves_all_the_same(tmp_path: Path) -> None:
    rig = Rig(tmp_path, val_frequency=5)
    rig.interrupts.name = "SIGUSR1"
    rig.epoch(1)  # every second epoch is kept
    assert rig.watcher.stops
    saved = load(tmp_path / "checkpoints" / "step_3.pt")[1]
    assert saved.progress == Progress(3, 1, 0) and saved.metrics == {}


def test_asked_to_end_while_it_evaluates_it_saves_what_is_to_be_evaluated(tmp_path: Path) -> None:
    old, keeper = {"val/score": 0.5}, {"every_epochs": 1, "most_recent": True}
    rig = Rig(tmp_path, metrics=old, keeper=keeper)
    rig.interrupts.name = "SIGTERM"
    rig.epoch(2)
    assert rig.watcher.stops and rig.watcher.metrics == old
    files = {f.name: load(f)[1] for f in (tmp_path / "checkpoints").iterdir()}
    assert files.keys() == {"step_6.pt", "epoch_latest.pt"}, "epoch 2 is not over"
    assert all(s.progress == Progress(6, 1, 3) and s.metrics == old for s in files.values())


@pytest.mark.parametrize("every_epochs", [1, 5])
def test_gone_on_with_an_evaluation_it_saves_what_came_of_it(
    tmp_path: Path, every_epochs: int
) -> None:
    """Also at an epoch that keeps nothing, or every further start would evaluate again."""
    rig = Rig(tmp_path, keeper={"every_epochs": every_epochs})
    rig.interrupts.name = "SIGTERM"
    rig.epoch(2)
    found = newest(tmp_path / "checkpoints")
    assert found is not None
    rig = Rig(tmp_path, start=found[2].progress, keeper={"every_epochs": every_epochs})
    rig.epoch(2)
    assert rig.calls == [("evaluate", 2, False, 6), ("save", 6)] and not rig.watcher.stops
    path, _, saved = newest(tmp_path / "checkpoints") or pytest.fail("nothing is there")
    assert path.name == ("epoch_2.pt" if every_epochs == 1 else "step_6.pt")
    assert saved.progress == Progress(6, 2, 0) and saved.metrics == {"val/score": 2.0}
    if every_epochs == 5:
        rig.epoch(3)
        assert ("save", 9) not in rig.calls, "later epochs are kept as ever"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(watch, "_LAST_SECONDS", 0.0)


def refuse(folder: Path) -> Path:
    """Nothing can be written where a file stands in the folder's place."""
    (folder / "checkpoints").write_text("")
    return folder / "checkpoints"


@pytest.mark.usefixtures("no_waiting")
def test_a_save_that_fails_is_told_and_tried_again(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, save_every_n_steps=2)
    obstacle = refuse(tmp_path)
    rig.save(Progress(2, 0, 2))
    assert "cannot write checkpoint" in messages.text and "tried again" in messages.text
    obstacle.unlink()
    rig.save(Progress(4, 1, 1))
    assert load(obstacle / "step_4.pt")[1].progress.step == 4
    rig.save(Progress(5, 1, 2))
    assert [c.name for c in obstacle.iterdir()] == ["step_4.pt"], "once it is stored, no more"


@pytest.mark.usefixtures("no_waiting")
def test_a_save_that_failed_is_tried_again_before_its_time(tmp_path: Path) -> None:
    rig = Rig(tmp_path, save_every_n_steps=2)
    obstacle = refuse(tmp_path)
    rig.save(Progress(2, 0, 2))
    obstacle.unlink()
    rig.epoch(1)  # nothing is due then
    assert load(obstacle / "step_3.pt")[1].progress == Progress(3, 1, 0)


def test_a_save_that_failed_is_not_tried_at_every_step(tmp_path: Path) -> None:
    rig = Rig(tmp_path, save_every_n_steps=2)
    refuse(tmp_path)
    for step in range(1, 4):
        rig.save(Progress(step, 0, step))
    assert rig.calls == [("save", 2)]


@pytest.mark.usefixtures("no_waiting")
def test_the_last_save_that_fails_is_an_error(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    refuse(tmp_path)
    with pytest.raises(CheckpointError, match="cannot write"):
        rig.epoch(5)
    rig.interrupts.name = "SIGTERM"
    with pytest.raises(CheckpointError, match="cannot write"):
        rig.save(Progress(13, 4, 1))

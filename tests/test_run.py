"""The run folder, and everything that writes to it."""

from __future__ import annotations

import builtins
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slidevlm import run as module
from slidevlm.errors import ConfigError
from slidevlm.run import (
    Bar,
    Run,
    WandbSettings,
    configure_logging,
    environment,
    log_to,
    peak_memory,
    write_text,
)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """The package's logger, left as it was."""
    logger = logging.getLogger("slidevlm")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


# --- a run folder, or none ------------------------------------------------------------------


def test_numbers_go_to_metrics_jsonl_at_once(tmp_path: Path) -> None:
    with Run(tmp_path / "new" / "run") as run:
        run.log("train", 3, {"loss": 0.1, "rate": 1e-4})
        assert lines(tmp_path / "new/run") == [
            {"kind": "train", "step": 3, "loss": 0.1, "rate": 1e-4}
        ]
        run.log("evaluation", 3, {"R@1": 1.0})
    assert [line["kind"] for line in lines(tmp_path / "new/run")] == ["train", "evaluation"]


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Run(None, ["tensorboard"], 3) as run:
        run.log("train", 1, {"loss": 1.0})
        run.text("report", 1, "text")
        run.write("a.txt", "text")
        run.write_json("a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_texts_and_json(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.write("sub/a.txt", "Größe 3 µm\n")
        run.write_json("a.json", {"b": [1, None], "ü": "ß"})
    assert (tmp_path / "sub/a.txt").read_text(encoding="utf-8") == "Größe 3 µm\n"
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "b": [1, None],
        "ü": "ß",
    }
    assert "ß" in (tmp_path / "a.json").read_text(encoding="utf-8"), "to be read by people"


def test_the_log_file_has_what_was_logged_while_it_was_open(
    tmp_path: Path, log: logging.Logger
) -> None:
    log.setLevel(logging.INFO)
    log.info("before")
    handlers = len(log.handlers)
    with Run(tmp_path):
        logging.getLogger("slidevlm.train").info("step %d", 7)
        log.warning("careful")
    log.info("after")
    assert len(log.handlers) == handlers
    told = (tmp_path / "out.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in told] == ["INFO step 7", "WARNING careful"]


def test_an_error_within_closes_everything(tmp_path: Path, log: logging.Logger) -> None:
    handlers = log.handlers[:]
    with pytest.raises(ZeroDivisionError), Run(tmp_path, ["tensorboard"]) as run:
        run.log("train", 1, {"loss": 1.0})
        raise ZeroDivisionError
    assert log.handlers == handlers
    with pytest.raises(ValueError, match="closed"):
        run.log("train", 2, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1


# --- going on -------------------------------------------------------------------------------


def test_going_on_drops_what_was_told_after_the_checkpoint(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        for step in (1, 2, 3):
            run.log("train", step, {"loss": float(step)})
        run.log("evaluation", 3, {"R@1": 0.5})
        run.log("train", 4, {"loss": 4.0})
    path = tmp_path / "metrics.jsonl"
    nested = '{"a":' * 200_000  # what a bad disk or a stranger's folder may have
    path.write_text(f'{path.read_text()}{nested}\n{{"kind": "train", "step": 1, "lo')
    with Run(tmp_path, resumed_step=3) as run:
        run.log("train", 4, {"loss": 40.0})
    told = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    assert told == [("train", 1), ("train", 2), ("train", 3), ("evaluation", 3), ("train", 4)]
    assert lines(tmp_path)[-1]["loss"] == 40.0
    assert names(tmp_path) == {"metrics.jsonl", "out.log"}, "no temporary file is left"


def test_going_on_with_an_evaluation_drops_what_was_told_of_it(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        for step in (2, 4):
            run.log("train", step, {"loss": float(step)})
            run.log("evaluation", step, {"R@1": 0.5})
    with Run(tmp_path, resumed_step=4, evaluates_first=True) as run:
        run.log("evaluation", 4, {"R@1": 0.75})
    told = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    assert told == [("train", 2), ("evaluation", 2), ("train", 4), ("evaluation", 4)]
    assert lines(tmp_path)[-1]["R@1"] == 0.75


def test_going_on_from_nothing_forgets_all_that_was_told(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.log("train", 1, {"loss": 1.0})
    with Run(tmp_path, resumed_step=0) as run:
        run.log("train", 1, {"loss": 2.0})
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]


def test_a_new_look_at_an_old_run_drops_nothing(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.log("train", 9, {"loss": 1.0})
    with Run(tmp_path, resumed_step=None):
        pass
    assert len(lines(tmp_path)) == 1


def test_going_on_where_there_is_no_file_yet(tmp_path: Path) -> None:
    with Run(tmp_path / "fresh", resumed_step=5) as run:
        run.log("train", 6, {"loss": 1.0})
    assert len(lines(tmp_path / "fresh")) == 1


# --- TensorBoard ----------------------------------------------------------------------------


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    with Run(tmp_path, ["tensorboard"]) as run:
        run.log("train", 10, {"loss": 0.5, "rate": 0.25})
        run.log("train", 20, {"loss": 0.125})
        run.text("val/report", 20, "a generated report")
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(10, 0.5), (20, 0.125)]
    assert [(e.step, e.value) for e in found.Scalars("train/rate")] == [(10, 0.25)]
    (tag,) = found.Tags()["tensors"]
    assert tag.startswith("val/report")
    assert found.Tensors(tag)[0].tensor_proto.string_val == [b"a generated report"]


def test_tensorboard_keeps_the_step_that_training_goes_on_from(tmp_path: Path) -> None:
    """The same lines as in metrics.jsonl: up to the resumed step, and from there the new ones."""
    with Run(tmp_path, ["tensorboard"]) as run:
        for step in (1, 2, 3, 4):
            run.log("train", step, {"loss": float(step)})
    with Run(tmp_path, ["tensorboard"], resumed_step=2) as run:
        run.log("train", 3, {"loss": 30.0})
    shown = [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")]
    assert shown == [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return wanted(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"--report-to tensorboard.*slidevlm\[tensorboard\]"):
        Run(tmp_path, ["tensorboard"])


# --- files whole or not at all --------------------------------------------------------------


def test_write_text_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old\n")

    def half(self: Path, content: str, **options: Any) -> int:
        self.write_bytes(content[:3].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "a new and longer content\n")
    monkeypatch.undo()
    assert path.read_text() == "old\n"
    assert names(tmp_path) == {"config.yaml"}
    write_text(path, "new\n")
    assert path.read_text() == "new\n" and names(tmp_path) == {"config.yaml"}


def test_environment_is_json_and_names_versions() -> None:
    found = json.loads(json.dumps(environment(("slidevlm", "torch", "no-such-package"))))
    assert found["packages"]["no-such-package"] == "not installed"
    assert found["packages"]["torch"][0].isdigit()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["command"] == sys.argv


# --- the terminal ---------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, file = Terminal(), io.StringIO()
    for stream, shown, visible in (
        (terminal, True, True),
        (terminal, False, False),
        (file, True, False),
    ):
        monkeypatch.setattr(module.sys, "stderr", stream)
        before = stream.tell()
        bar = Bar("training", 8, shown=shown)
        assert bar.visible is visible
        bar.update(5, "loss 0.25")
        bar.close()
        assert (stream.tell() > before) is visible
    assert "training" in terminal.getvalue() and "5/8" in terminal.getvalue()
    assert "loss 0.25" in terminal.getvalue()


@pytest.mark.parametrize(
    ("debug", "main", "level"),
    [
        (False, True, logging.INFO),
        (True, True, logging.DEBUG),
        (False, False, logging.ERROR),
        (True, False, logging.ERROR),
    ],
)
def test_who_says_what(
    log: logging.Logger,
    debug: bool,
    main: bool,
    level: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.handlers[:] = []
    for _ in range(2):
        configure_logging(debug=debug, main=main)
    assert len(log.handlers) == 1, "a second run in one process does not say everything twice"
    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    for number in levels:
        log.log(number, "of level %d", number)
    told = [int(line.split()[-1]) for line in capsys.readouterr().err.splitlines()]
    assert told == [number for number in levels if number >= level]
    own = logging.getLogger("slidevlm.test_run.own")
    own.setLevel(logging.WARNING)
    own.warning("of every process")
    own.setLevel(logging.NOTSET)
    assert "of every process" in capsys.readouterr().err


def test_a_log_of_this_process_alone(tmp_path: Path, log: logging.Logger) -> None:
    log.handlers[:] = []
    configure_logging(debug=False, main=False)
    with log_to(tmp_path / "new" / "out-3.log"):
        log.info("step 7")
    log.info("later")
    with log_to(None):
        log.info("nowhere")
    text = (tmp_path / "new" / "out-3.log").read_text()
    assert text.endswith("INFO step 7\n") and text.count("\n") == 1
    assert len(log.handlers) == 1


def test_a_log_file_alone_does_not_silence_the_terminal(
    tmp_path: Path, log: logging.Logger
) -> None:
    log.handlers[:] = []
    with Run(tmp_path):
        configure_logging(debug=False, main=True)
        assert len(log.handlers) == 2


# --- memory and wandb -----------------------------------------------------------------------


def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory()["memory_mb"]
    assert 20 < before < 100_000
    block = np.ones(int(max(before, 300)) * 2**17)  # as much again, in 8 bytes a number
    assert peak_memory()["memory_mb"] > before
    del block
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = int(status.read_text().split("VmHWM:")[1].split()[0])
        assert peak_memory()["memory_mb"] == pytest.approx(kilobytes / 1024, rel=0.02)


def wandb_records(folder: Path) -> list[Any]:
    """What the runs under a folder hold: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, parts, at = file.read_bytes(), b"", 7  # behind the file's own header
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # too little of the block for a header
                at += 32768 - at % 32768
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                records.append(record)
                parts = b""
    return records


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("offline")
def test_wandb_gets_everything_and_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    settings = WandbSettings("pathology", "first try", {"lr": 1e-3, "val_split": ("a", "b")})
    with Run(tmp_path / "night", ["wandb"], None, settings) as run:
        run.log("train", 1, {"loss": 0.5})
        run.log("train", 2, {"loss": 0.25, "learning_rate": 1e-4})
        run.text("val/report", 2, "tumour <5 mm> & margin")
    time.sleep(1.1)  # wandb names folders by the second
    with Run(tmp_path / "night", ["wandb"], 1, settings) as run:
        run.log("train", 2, {"loss": 0.25})
    records = wandb_records(tmp_path / "night")
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {(r.project, r.display_name, r.notes) for r in runs} == {
        ("pathology", "night", "first try")
    }
    assert {r.run_id for r in runs} == {(tmp_path / "night" / "wandb_id.txt").read_text().strip()}
    told = {u.key: json.loads(u.value_json) for r in runs for u in r.config.update}
    assert told["lr"] == 1e-3 and told["val_split"] == ["a", "b"]
    rows = [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    numbers = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert numbers == [(1, 0.5), (2, 0.25), (2, 0.25)]
    (page,) = (tmp_path / "night").glob("wandb/offline-run-*/files/media/html/**/*.html")
    assert "tumour &lt;5 mm&gt; &amp; margin" in page.read_text()


def test_wandb_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"slidevlm\[wandb\]"):
        Run(tmp_path, ["wandb"], None, WandbSettings("p", "", {}))

"""Reports generated within a run: how the arguments choose, what is kept and shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slidevlm.app import judging, train
from slidevlm.app.export import export
from slidevlm.app.notebook import evaluate
from slidevlm.app.slide_model import load
from slidevlm.app.trained import restore
from slidevlm.batch import Predictions
from slidevlm.cli import main
from slidevlm.config import Config, with_values
from slidevlm.data.cases import open_store
from slidevlm.data.dataset import BagDataset, collate
from slidevlm.data.synthetic import DemoCohort
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import ConfigError
from slidevlm.eval.text_metrics.ptb import tokenize
from slidevlm.models import zoo
from slidevlm.models.generate import Decoding, generate
from slidevlm.train import checkpoint as ckpt

SPECIMENS = 60


def trained_run(cohort: DemoCohort, logs: Path, **more: Any) -> Path:
    """An epoch, with reports at its end."""
    values: dict[str, Any] = {
        "hdf5_filename": str(cohort.hdf5),
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": str(cohort.split("train")),
        "val_split": (str(cohort.split("val")),),
        "model": "coca_tiny",
        "batch_size": 12,
        "workers": 0,
        "epochs": 1,
        "lr": 3e-3,
        "precision": "fp32",
        "device": "cpu",
        "logs": str(logs),
        "name": "run",
        "report_to": "tensorboard",
        "save_captions": True,
    }
    train(with_values(Config(), values | more))
    return logs / "run"


@pytest.fixture(scope="module")
def run(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports searched with 4 beams in 2 groups."""
    return trained_run(
        cohort,
        tmp_path_factory.mktemp("logs"),
        caption_val_max_seq_len=12,
        val_gen_num_beams=4,
        val_gen_num_beam_groups=2,
    )


def scored_words(tokenizer: Tokenizer, row: Sequence[int]) -> list[str]:
    """Those that the scores of text count."""
    return tokenize(tokenizer.decode(row))


def expected(
    run: Path,
    cohort: DemoCohort,
    words: Callable[[Tokenizer, Sequence[int]], Sequence[str]] = scored_words,
    **how: Any,
) -> list[str]:
    """The reports of the validation split, from the checkpoint and the decoding itself."""
    trained = restore(ckpt.load(run / "checkpoints/epoch_1.pt")[0])
    store = open_store(
        hdf5_filename=cohort.hdf5,
        hdf5_feature_attribute="demo",
        hdf5_text_attribute="report",
        root_dir=None,
    )
    by_name = {case.specimen: case for case in store.cases}
    names = cohort.split("val").read_text().split()
    cases = [by_name[name] for name in names]
    tokenizer = trained.tokenizer
    data = BagDataset(store, cases, [""] * len(cases), tokenizer, 64, 100_000, 0, False)
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    bags = collate([data[i] for i in range(len(cases))]).bags
    rows = generate(
        trained.model,
        bags,
        names,
        Decoding(*ids, **how),
        words=lambda row: words(tokenizer, row),
    )
    return [tokenizer.decode(row) for row in rows]


def written(file: Path) -> list[str]:
    return [row["generated"] for row in json.loads(file.read_text())]


def test_beams_of_the_arguments(run: Path, cohort: DemoCohort) -> None:
    found = written(run / "captions_epoch_1.json")
    assert found == expected(run, cohort, max_tokens=12, beams=4, groups=2)


def test_more_tokens_than_the_context_has_room_for_are_told(
    run: Path, messages: pytest.LogCaptureFixture
) -> None:
    for number, (asked, told) in enumerate(((63, False), (64, True))):
        given = {"caption_val_max_seq_len": asked, "val_gen_top_k": 1, "name": f"long {number}"}
        evaluate(run, with_values(Config(), given))
        text = f"--caption-val-max-seq-len {asked}: the context of model coca_tiny has room for 63"
        assert (text in messages.text) is told


def test_what_does_not_go_with_the_models_own_settings_is_told_before_training(
    cohort: DemoCohort, tmp_path: Path
) -> None:
    file, logs = tmp_path / "model.json", tmp_path / "logs"
    for number, (own, given, told) in enumerate(
        (
            ({"min_tokens": 20}, {"caption_val_max_seq_len": 10}, "min_tokens 20 is above max_tok"),
            ({"beams": 4, "candidates": 4}, {"val_gen_num_beams": 3}, "4 candidates need as many"),
        )
    ):
        file.write_text(json.dumps(zoo.load("coca_tiny").to_dict() | {"generation": own}))
        with pytest.raises(ConfigError, match=f"--save-captions: .*{told}.* of model .*leave them"):
            trained_run(cohort, logs, model=str(file), name=str(number), **given)
        assert not (logs / str(number)).exists(), "nothing was trained"


def test_evaluation_generates_in_another_way(
    run: Path, cohort: DemoCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = judging.predict, []

    def spy(*values: Any, **named: Any) -> Predictions:
        asked.append(values[4].decoding)
        return real(*values, **named)

    monkeypatch.setattr(judging, "predict", spy)
    for number, (given, how) in enumerate(
        [
            ({"val_gen_top_k": 1}, {"top_k": 1}),
            ({"val_gen_top_k": 7, "seed": 3}, {"top_k": 7, "seed": 3}),
            ({"val_gen_num_beams": 3}, {"beams": 3, "groups": 3}),
            ({"val_gen_top_k": 0, "caption_val_max_seq_len": 5}, {"beams": 6, "groups": 3}),
        ]
    ):
        evaluate(run, with_values(Config(), {**given, "name": f"evaluation-{number}"}))
        found = written(run / f"evaluation-{number}/captions_evaluation.json")
        tokens = given.get("caption_val_max_seq_len", 12)
        assert found == expected(run, cohort, max_tokens=tokens, **how), given
        # Few beams often find the same reports as more.
        assert {name: getattr(asked[-1], name) for name in how} == how


def test_a_model_brings_its_own_decoding(cohort: DemoCohort, tmp_path: Path) -> None:
    """In training, in evaluations and in use, unless other settings are asked for."""
    wanted = {"max_tokens": 9, "top_k": 5, "candidates": 3, "choose": "similarity"}
    model = tmp_path / "mine.json"
    model.write_text(json.dumps({**zoo.load("coca_tiny").to_dict(), "generation": wanted}))
    mine = trained_run(cohort, tmp_path, model=str(model))
    found = written(mine / "captions_epoch_1.json")
    assert found == expected(mine, cohort, **wanted)
    used = load(mine, device="cpu", precision="fp32")
    assert used.decoding() == used.decoding(**wanted)
    greedy = used.decoding(top_k=1, max_tokens=7)
    assert greedy.settings == Decoding(1, 2, 0, max_tokens=7).settings
    evaluate(mine, with_values(Config(), {"val_gen_top_k": 1, "name": "greedy"}))
    assert written(mine / "greedy/captions_evaluation.json") == expected(mine, cohort, max_tokens=9)
    exported = tmp_path / "exported"
    export(str(mine), exported)
    assert load(exported, device="cpu").decoding() == used.decoding()


AGREEING = {"max_tokens": 15, "top_k": 20, "candidates": 6, "choose": "consensus"}


@pytest.fixture(scope="module")
def agreeing(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model's reports are those of several whose words agree most."""
    folder = tmp_path_factory.mktemp("agreeing")
    model = folder / "mine.json"
    model.write_text(json.dumps({**zoo.load("coca_tiny").to_dict(), "generation": AGREEING}))
    return trained_run(cohort, folder, model=str(model))


def test_the_words_that_are_scored_are_compared_everywhere(
    agreeing: Path, cohort: DemoCohort, tmp_path: Path
) -> None:
    """In training, evaluations and `slidevlm caption`, in batches of any size."""
    wanted = expected(agreeing, cohort, **AGREEING)
    assert written(agreeing / "captions_epoch_1.json") == wanted
    tokens = expected(agreeing, cohort, lambda _, row: list(map(str, row)), **AGREEING)
    assert wanted != tokens, "words and not tokens"
    evaluate(agreeing, with_values(Config(), {"batch_size": 4, "name": "again"}))
    assert written(agreeing / "again/captions_evaluation.json") == wanted
    for size in (1, 5):
        output = tmp_path / f"{size}.json"
        words = ["caption", agreeing, cohort.hdf5, "--split", cohort.split("val")]
        words += ["--output", output, "--batch-size", size, "--workers", 0]
        words += ["--device", "cpu", "--precision", "fp32"]
        assert main([str(word) for word in words]) == 0
        records = json.loads(output.read_text())
        assert [r["report"] for r in records] == wanted
        assert all(r["merit"] > 0 for r in records)


@pytest.mark.slow
def test_two_processes_choose_as_one(agreeing: Path, cohort: DemoCohort) -> None:
    """Each has some of the batches; the last one is smaller."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "--", "slidevlm", "evaluate", str(agreeing)]
    command += ["--name", "two", "--batch-size", "3", "--dist-backend", "gloo"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ}, check=False
    )
    assert result.returncode == 0, result.stderr
    wanted = written(agreeing / "captions_epoch_1.json")
    assert len(wanted) % 3 and written(agreeing / "two/captions_evaluation.json") == wanted


def test_examples_are_shown_as_text(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = sorted(events.Tags()["tensors"])
    assert tags == [f"val/report_{i}/text_summary" for i in (1, 2, 3, 4)]
    shown = events.Tensors(tags[1])[0].tensor_proto.string_val[0].decode()
    second = json.loads((run / "captions_epoch_1.json").read_text())[1]
    assert second["id"] in shown and second["generated"] in shown and second["report"] in shown

"""Reports generated within a run: how the arguments choose, what is kept and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slidevlm.app import evaluate_run, train
from slidevlm.app.export import export
from slidevlm.app.slide_model import load
from slidevlm.app.trained import restore
from slidevlm.config import Config, with_values
from slidevlm.data.cases import open_store
from slidevlm.data.dataset import BagDataset, collate
from slidevlm.data.synthetic import DemoCohort
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


def expected(run: Path, cohort: DemoCohort, **how: Any) -> list[str]:
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
    rows = generate(trained.model, bags, names, Decoding(*ids, **how))
    return [tokenizer.decode(row) for row in rows]


def written(file: Path) -> list[str]:
    return [row["generated"] for row in json.loads(file.read_text())]


def test_beams_of_the_arguments(run: Path, cohort: DemoCohort) -> None:
    found = written(run / "captions_epoch_1.json")
    assert found == expected(run, cohort, max_tokens=12, beams=4, groups=2)


def test_evaluation_generates_in_another_way(run: Path, cohort: DemoCohort) -> None:
    for number, (given, how) in enumerate(
        [
            ({"val_gen_top_k": 1}, {"top_k": 1}),
            ({"val_gen_top_k": 7, "seed": 3}, {"top_k": 7, "seed": 3}),
            ({"val_gen_num_beams": 3}, {"beams": 3, "groups": 3}),
            ({"val_gen_top_k": 0, "caption_val_max_seq_len": 5}, {"beams": 6, "groups": 3}),
        ]
    ):
        evaluate_run(run, with_values(Config(), {**given, "name": f"evaluation-{number}"}))
        found = written(run / f"evaluation-{number}/captions_evaluation.json")
        tokens = given.get("caption_val_max_seq_len", 12)
        assert found == expected(run, cohort, max_tokens=tokens, **how), given


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
    evaluate_run(mine, with_values(Config(), {"val_gen_top_k": 1, "name": "greedy"}))
    assert written(mine / "greedy/captions_evaluation.json") == expected(mine, cohort, max_tokens=9)
    exported = tmp_path / "exported"
    export(str(mine), exported)
    assert load(exported, device="cpu").decoding() == used.decoding()


def test_examples_are_shown_as_text(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = sorted(events.Tags()["tensors"])
    assert tags == [f"val/report_{i}/text_summary" for i in (1, 2, 3, 4)]
    shown = events.Tensors(tags[1])[0].tensor_proto.string_val[0].decode()
    second = json.loads((run / "captions_epoch_1.json").read_text())[1]
    assert second["id"] in shown and second["generated"] in shown and second["report"] in shown

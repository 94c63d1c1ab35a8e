"""`slidevlm embed` and `slidevlm classify`, from the command line to the files."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import slidevlm
from slidevlm import testing
from slidevlm.app.slide_model import SlideModel
from slidevlm.cli import main
from slidevlm.data.formats.embeddings import load_embeddings
from slidevlm.errors import CheckpointError

NAMES = [f"slide_{number}" for number in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.run(tmp_path_factory.mktemp("model") / "exported")


@pytest.fixture
def features(tmp_path: Path) -> Path:
    folder = tmp_path / "features"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        np.save(folder / f"{name}.npy", testing.bag(5 + number, seed=number))
    return folder


def use(command: str, model: Path, features: Path, output: object, *more: object) -> int:
    words = [command, model, features, "--output", output, "--device", "cpu", "--workers", 0]
    return main([str(word) for word in [*words, *more]])


def wanted(model: Path) -> np.ndarray:
    loaded = slidevlm.load(model, device="cpu")
    bags = [testing.bag(5 + number, seed=number) for number in range(len(NAMES))]
    return np.stack([loaded.embed(bag) for bag in bags])


@pytest.mark.parametrize("ending", ["h5", "npz", "parquet"])
def test_embed_writes_the_same_in_every_form(ending, model, features, tmp_path) -> None:
    output = tmp_path / "out" / f"e.{ending}"
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    assert use("embed", model, features, output) == 0
    found = load_embeddings(output)
    assert found.specimen_ids == tuple(NAMES) == found.patient_ids
    assert found.tiles.tolist() == list(range(5, 12)) and found.tiles.dtype == np.int64
    assert found.image_embedding.dtype == np.float32
    np.testing.assert_allclose(found.image_embedding, wanted(model), atol=1e-6)
    assert found.about["model"] == slidevlm.load(model).hash
    assert [p.name for p in output.parent.iterdir()] == [output.name]


def test_other_tools_read_the_files(model, features, tmp_path) -> None:
    rows = wanted(model)
    assert use("embed", model, features, tmp_path / "e.h5") == 0
    with h5py.File(tmp_path / "e.h5") as file:
        assert file["specimen_ids"].asstr()[0] == NAMES[0]
        np.testing.assert_allclose(file["image_embedding"][()], rows, atol=1e-6)
        assert len(json.loads(file.attrs["about"])["model"]) == 64
    parquet = pytest.importorskip("pyarrow.parquet")
    assert use("embed", model, features, tmp_path / "e.parquet") == 0
    table = parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert table["specimen_ids"] == NAMES
    np.testing.assert_allclose(np.array(table["image_embedding"]), rows, atol=1e-6)


def test_embed_prints_lines(model, features, capsys) -> None:
    assert use("embed", model, features, "-", "--batch-size", 3) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == NAMES and lines[0]["tiles"] == 5
    np.testing.assert_allclose([line["embedding"] for line in lines], wanted(model), atol=1e-5)


def test_embed_adds_what_the_output_lacks(model, features, tmp_path, capsys) -> None:
    output = tmp_path / "e.h5"
    split = tmp_path / "split.txt"
    split.write_text("\n".join(NAMES[3:5]))
    assert use("embed", model, features, output, "--split", split) == 0
    capsys.readouterr()
    assert use("embed", model, features, output, "--json") == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert (summary["specimens"], summary["new"]) == (7, 5) and "2 of 7" in told.err
    found = load_embeddings(output)
    assert found.specimen_ids == (*NAMES[3:5], *NAMES[:3], *NAMES[5:])
    order = [found.specimen_ids.index(name) for name in NAMES]
    np.testing.assert_allclose(found.image_embedding[order], wanted(model), atol=1e-6)
    before = output.stat().st_mtime_ns
    assert use("embed", model, features, output) == 0
    assert "7 embeddings, 7 of them before" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == before and len(list(tmp_path.glob("e.h5*"))) == 1
    assert use("embed", model, features, output, "--image-features-cutoff", 6) == 2
    assert "another image_features_cutoff" in capsys.readouterr().err
    other = testing.run(tmp_path / "other", seed=1)
    assert use("embed", other, features, output) == 2
    assert "another model" in capsys.readouterr().err
    np.testing.assert_array_equal(load_embeddings(output).image_embedding, found.image_embedding)


def test_an_error_before_the_first_result_leaves_nothing_in_the_way(
    model, features, tmp_path, capsys
) -> None:
    output, wide = tmp_path / "e.npz", tmp_path / "wide.npy"
    np.save(wide, testing.bag(tile_width=8))
    assert use("embed", model, wide, output) == 2
    assert f"{wide}: specimen 'wide': the model reads tiles of width" in capsys.readouterr().err
    assert not list(tmp_path.glob("e.npz*"))
    (tmp_path / "e.npz.partial.jsonl").write_text('{"of": "another model"}\n')
    assert use("embed", model, features, output) == 0


# Counts what is computed, and takes so long that a kill falls between two bags or within one.
SLOW = """
import os, sys, time
from slidevlm.app.slide_model import SlideModel
from slidevlm.cli import main
whole = SlideModel.embed_bags
def counted(self, bags):
    with open(sys.argv[1], "a") as file:
        file.write("x" * len(bags))
    time.sleep(0.03)
    return whole(self, bags)
SlideModel.embed_bags = counted
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("words", "lost"), [((), 1), (("--at-once", 2), 2)])
def test_a_kill_costs_at_most_one_bag_a_thread(words, lost: int, model, tmp_path) -> None:
    features, count = tmp_path / "features", 60
    features.mkdir()
    for number in range(count):
        np.save(features / f"s{number:02}.npy", testing.bag(5, seed=number))
    output, computed = tmp_path / "e.npz", tmp_path / "computed"
    partial = tmp_path / "e.npz.partial.jsonl"
    used = ["embed", model, features, "--output", output, "--device", "cpu", "--workers", 1, *words]
    command = [sys.executable, "-c", SLOW, str(computed), *map(str, used)]
    done = 0
    for least in (5, 25):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and _lines(partial) < least:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = _lines(partial)
        assert least <= kept < count and not output.exists()
        assert len(computed.read_text()) - done - kept <= lost
        done = len(computed.read_text()) - kept  # lost so far
    assert subprocess.run(command, check=True, capture_output=True).returncode == 0
    assert len(computed.read_text()) <= count + 2 * lost, "two kills"
    found = load_embeddings(output)
    assert found.specimen_ids == tuple(f"s{number:02}" for number in range(count))
    loaded = slidevlm.load(model, device="cpu")
    rows = np.stack([loaded.embed(testing.bag(5, seed=number)) for number in range(count)])
    np.testing.assert_allclose(found.image_embedding, rows, atol=1e-6)
    assert not partial.exists()


@pytest.mark.parametrize("command", ["embed", "classify"])
def test_bags_at_once_say_what_one_after_the_other_does(
    command: str, model, features, tmp_path, capsys
) -> None:
    before = torch.get_num_threads()
    prompts = ("--prompts", "lung", "kidney") if command == "classify" else ()
    found = []
    for at_once in (1, 3):
        assert use(command, model, features, "-", "--at-once", at_once, *prompts) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found.append({line["id"]: line for line in lines})
    one, several = found
    assert list(one) == NAMES and set(several) == set(NAMES)
    for name, line in one.items():
        for key in {"embedding", "probabilities"} & line.keys():
            assert several[name][key] == pytest.approx(line[key], abs=1e-5)
    assert torch.get_num_threads() == before
    # The file is in the cohort's order, whichever was ready first.
    if command == "embed":
        assert use(command, model, features, tmp_path / "e.npz", "--at-once", 3) == 0
        assert load_embeddings(tmp_path / "e.npz").specimen_ids == tuple(NAMES)


def test_an_error_in_one_thread_ends_all_and_keeps_the_rest(
    model, features, tmp_path, capsys, monkeypatch
) -> None:
    whole = SlideModel.embed_bags

    def failing_at_nine(self, bags):
        if bags.lengths == (9,):
            raise CheckpointError("nine tiles are too many")
        return whole(self, bags)

    monkeypatch.setattr(SlideModel, "embed_bags", failing_at_nine)
    output = tmp_path / "e.npz"
    error = failing(capsys, use("embed", model, features, output, "--at-once", 2))
    assert "nine tiles are too many" in error and not output.exists()
    kept = _lines(tmp_path / "e.npz.partial.jsonl")
    assert 4 <= kept < len(NAMES), "those before it"
    monkeypatch.undo()
    assert use("embed", model, features, output, "--at-once", 2) == 0
    np.testing.assert_allclose(load_embeddings(output).image_embedding, wanted(model), atol=1e-6)


def _lines(partial: Path) -> int:
    """Whole records of a partial file, under its first line."""
    return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0


def failing(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_bad_specimens_stop_or_are_left_out(model, features, tmp_path, capsys) -> None:
    (features / "slide_3.npy").write_bytes(b"nothing of a bag")
    output = tmp_path / "e.npz"
    assert "slide_3.npy" in failing(capsys, use("embed", model, features, output))
    # What was done before it is kept.
    assert use("embed", model, features, output, "--skip-bad-specimens", "--json") == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert "3 of 7" in told.err
    assert (summary["specimens"], summary["new"], list(summary["bad"])) == (6, 3, ["slide_3"])
    assert "slide_3" not in load_embeddings(output).specimen_ids
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "slide_3.npy").write_bytes(b"nothing of a bag")
    code = use("embed", model, bad, tmp_path / "none.npz", "--skip-bad-specimens")
    assert "no specimen could be read" in failing(capsys, code)


def test_what_cannot_be_embedded(model, features, tmp_path, capsys, monkeypatch) -> None:
    assert "one of .h5" in failing(capsys, use("embed", model, features, tmp_path / "e.csv"))
    (tmp_path / "e.npz").write_bytes(b"something else")
    assert "not a file of emb" in failing(capsys, use("embed", model, features, tmp_path / "e.npz"))
    assert (tmp_path / "e.npz").read_bytes() == b"something else"
    code = use("embed", tmp_path / "none", features, tmp_path / "x.h5")
    assert "nothing that is here" in failing(capsys, code)
    code = use("embed", model, features, tmp_path / "e.npz" / "in_a_file.h5")
    assert f"--output: cannot write into {tmp_path / 'e.npz'}" in failing(capsys, code)
    np.save(features / "a_nan.npy", np.full((3, testing.bag().shape[1]), np.nan, np.float32))
    error = failing(capsys, use("embed", model, features, tmp_path / "x.h5"))
    assert "NaN" in error and "--skip-bad-specimens leaves it out" in error
    (features / "a_nan.npy").unlink()
    np.save(features / "wide.npy", testing.bag(tile_width=8))
    assert "8" in failing(capsys, use("embed", model, features, tmp_path / "x.h5"))
    language = testing.run(tmp_path / "language", "lm_tiny")
    assert "language model" in failing(capsys, use("embed", language, features, tmp_path / "y.h5"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = failing(capsys, use("embed", model, features, tmp_path / "e.parquet"))
    assert "pip install 'slidevlm[parquet]'" in error


PROMPTS = {"lung": ["lung", "lung tissue"], "kidney": "kidney", "breast, left": "breast"}


def test_classify_from_a_file(model, features, tmp_path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    loaded = slidevlm.load(model, device="cpu")
    paths = [features / f"{name}.npy" for name in NAMES]
    expected = [one.to_dict() for one in loaded.classify(paths, PROMPTS)]
    for name in ("c.csv", "c.json"):
        more = ("--prompts", tmp_path / "prompts.json", "--batch-size", 3)
        assert use("classify", model, features, tmp_path / name, *more) == 0
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["about"]["prompts"]["lung"] == PROMPTS["lung"]
    assert json.loads(rows[0]["about"]) == content["about"] and rows[1]["about"] == ""
    for row, record, name, chances in zip(rows, content["specimens"], NAMES, expected, strict=True):
        assert row["id"] == record["id"] == name
        assert row["label"] == record["label"] == max(chances, key=lambda c: chances[c])
        assert record["probabilities"] == pytest.approx(chances, abs=1e-5)
        assert float(row["probability/breast, left"]) == pytest.approx(
            chances["breast, left"], abs=1e-5
        )


def test_classify_by_texts_and_the_other_names(model, features, capsys) -> None:
    more = ("--zsc-class-prompt-mapping", "lung", "kidney", "--zsc-ensemble", "probabilities")
    assert use("classify", model, features, "-", *more) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == NAMES
    assert set(lines[0]["probabilities"]) == {"lung", "kidney"}
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "--prompts names the classes"),
        (("--prompts", "no_such.json"), "no file 'no_such.json'"),
        (("--prompts", "lung", "lung"), "given twice"),
    ],
)
def test_prompts_that_are_none(
    prompts: Sequence[str], message: str, model, features, tmp_path, capsys
) -> None:
    code = use("classify", model, features, tmp_path / "c.csv", *prompts)
    assert message in failing(capsys, code)
    assert not (tmp_path / "c.csv").exists()


def test_classify_does_not_overwrite(model, features, tmp_path, capsys) -> None:
    (tmp_path / "c.csv").write_text("mine")
    code = use("classify", model, features, tmp_path / "c.csv", "--prompts", "a", "b")
    assert "exists" in failing(capsys, code)
    assert (tmp_path / "c.csv").read_text() == "mine"

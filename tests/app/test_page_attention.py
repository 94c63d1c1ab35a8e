"""`slidevlm report --attention` on a trained run and its own data."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slidevlm
import slidevlm.testing
from slidevlm.app.cohorts import open_path
from slidevlm.cli import main


def trained(folder: Path, **more: Any) -> Path:
    settings = {**slidevlm.testing.settings(folder), "image_features_cutoff": 5000, **more}
    found = slidevlm.train(settings).folder
    assert found is not None
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("attended"), save_captions=True)


def page(run: Path, output: Path, *words: str) -> dict[str, Any]:
    assert main(["report", str(run), "--output", str(output), "--attention", *words]) == 0
    found = re.search(r'id="data">(.*?)</script>', output.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])["runs"][0]


def ids_of(run: Path) -> list[str]:
    return (run.parents[1] / "cohort/test.txt").read_text().split()


def test_the_page_has_what_the_model_attends_to(run: Path, tmp_path: Path) -> None:
    shown = page(run, tmp_path / "a.html", "2")
    ids = [one["id"] for one in shown["attention"]["specimens"]]
    tests = ids_of(run)
    assert ids == [tests[0], tests[len(tests) // 2]], "spread over the test split"
    assert not any(one["tab"] == "attention" for one in shown["lacking"])
    model = slidevlm.load(run, device="cpu")
    assert shown["attention"]["model_hash"] == model.hash
    store = open_path(run.parents[1] / "cohort/cohort.h5", None, None)
    for one in shown["attention"]["specimens"]:
        case = next(c for c in store.cases if c.specimen == one["id"])
        bag = store.read(case, None)
        assert bag.positions is not None
        places = bag.positions if bag.centres is None else bag.positions + bag.centres
        tiles = slidevlm.Tiles(bag.features, places, bag.unit, bag.slides)
        seen = model.attention(tiles, sentences=True)
        assert one["sentences"] == list(seen.sentences) and one["sentences"]
        assert one["tiles"] == len(bag.features)
        sets, slides = [seen.tiles, *seen.by_sentence], seen.slides
        for number, part in enumerate(one["slides"]):
            mine = slides == number
            at = places.numpy()[mine] - places.numpy()[mine].min(0)
            at = np.floor(at / part["size"] + 1e-3).astype(int)
            for weights, scale, text in zip(sets, one["scales"], part["levels"], strict=True):
                levels = np.frombuffer(base64.b64decode(text), np.uint8) / 255
                cells = dict(zip(np.cumsum(part["steps"]), levels**2, strict=True))
                got = [cells[y * part["columns"] + x] * scale["most"] for x, y in at]
                wanted = weights[mine] * len(weights)
                assert got == pytest.approx(wanted.tolist(), abs=0.01 * scale["most"])
        assert [row["share"] for row in one["check"]] == sorted(r["share"] for r in one["check"])
        assert all(-1 <= row["most_attended"] <= 1 for row in one["check"])


def test_named_specimens(run: Path, tmp_path: Path) -> None:
    wanted = ids_of(run)[::-1][:2]
    shown = page(run, tmp_path / "a.html", *wanted)
    assert [one["id"] for one in shown["attention"]["specimens"]] == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attention", "nobody"], "no specimen nobody with features"),
        (["--attention", "0"], "at least 1"),
        (["--device", "cpu"], "--device is for --attention"),
    ],
)
def test_what_cannot_be(run: Path, tmp_path: Path, capsys, words, message) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "a.html"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


def test_missing_data_is_said(tmp_path: Path, capsys) -> None:
    run = trained(tmp_path)
    (tmp_path / "cohort/cohort.h5").rename(tmp_path / "elsewhere.h5")
    assert main(["report", str(run), "--attention", "1"]) == 2
    told = capsys.readouterr().err
    assert "--attention reads the data that" in told and "cohort.h5" in told
    (run / "config.yaml").unlink()
    assert main(["report", str(run), "--attention", "1"]) == 2
    assert "needs config.yaml" in capsys.readouterr().err


def test_models_without_attention_are_refused(tmp_path: Path, capsys) -> None:
    run = trained(tmp_path, model="lm_tiny")
    assert main(["report", str(run), "--attention", "1"]) == 2
    assert "language model: it reads no tiles" in capsys.readouterr().err


def test_an_evaluation_with_other_data_and_weights(run: Path, tmp_path: Path) -> None:
    """The page of an evaluation has the model and the split of that evaluation."""
    split = tmp_path / "two.txt"
    split.write_text("\n".join(ids_of(run)[-2:]))
    checkpoint = next((run / "checkpoints").glob("*.pt"))
    found = slidevlm.evaluate(checkpoint, test_split=str(split), logs=str(tmp_path), name="other")
    shown = page(tmp_path / "other", tmp_path / "a.html", "9")
    assert [one["id"] for one in shown["attention"]["specimens"]] == ids_of(run)[-2:]
    assert found.folder == tmp_path / "other"
    assert shown["evaluation"]["about"]["model_hash"] == shown["attention"]["model_hash"]

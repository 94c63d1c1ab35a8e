"""The page of a run: what stands in it, and that nothing in the data acts on it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve

from slidevlm.app.page import run_files, write_page
from slidevlm.cli import main
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval.stored import load, save
from slidevlm.report import specimens as specimens_module
from slidevlm.report.embedding_map import nearest, pca, umap
from slidevlm.report.policy import closed
from slidevlm.report.run_page import as_json, render
from slidevlm.report.specimens import roc


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found is not None
    return json.loads(found[1])


def test_the_data_of_the_page_is_that_of_the_run(run_folder: Path) -> None:
    run = data_of(write_page([run_folder]))["runs"][0]
    stored = load(run_folder / "predictions.npz").splits["test"]
    assert run["specimens"]["id"] == list(stored.specimen_ids)
    assert run["specimens"]["report"] == list(stored.reports)
    assert run["specimens"]["generated"] == list(stored.generated or ())
    metrics = {f"{m['split']}/{m['task']}/{m['metric']}": m for m in run["evaluation"]["metrics"]}
    told = json.loads((run_folder / "metrics.json").read_text())["metrics"]
    assert metrics.keys() == told.keys()
    assert any(row["lo"] is not None for row in told.values())
    for name, row in told.items():
        for key in ("value", "lo", "hi"):
            mine = metrics[name][key]
            assert (mine is None) == (row[key] is None)
            assert mine is None or mine == pytest.approx(row[key], rel=1e-4)
    assert run["curves"]["train"]["values"]["caption_loss"] == pytest.approx([3, 1.5, 1, 0.75, 0.6])
    epochs = next(row for row in run["settings"] if row["flag"] == "--epochs")
    assert (epochs["value"], epochs["given"], epochs["default"]) == ("1", True, "32")
    similarity = stored.image_embedding @ stored.image_embedding.T
    np.fill_diagonal(similarity, -2)
    assert [row[0][0] for row in run["specimens"]["near"]] == similarity.argmax(1).tolist()


def test_what_is_missing_is_told_with_the_command_that_makes_it(tmp_path: Path, writer) -> None:
    folder = writer(tmp_path / "runs" / "tiny", generated=False)
    for path in [*folder.glob("predictions.*"), folder / "metrics.json"]:
        path.unlink()
    run = data_of(write_page([folder], tmp_path / "page.html"))["runs"][0]
    assert run["specimens"] is None and run["evaluation"] is None
    commands = [one["command"] for one in run["lacking"]]
    assert any(c.startswith("slidevlm evaluate") for c in commands)
    assert any(c.startswith("slidevlm data check --config") for c in commands)


def test_the_check_beside_a_run_is_on_its_page(run_folder: Path) -> None:
    (run_folder / "check").mkdir()
    (run_folder / "check/check.json").write_text('{"errors": 0, "warnings": 7}')
    assert data_of(write_page([run_folder]))["runs"][0]["check"]["warnings"] == 7


def test_an_evaluation_within_a_run_shows_the_training_too(tmp_path: Path, writer) -> None:
    run = writer(tmp_path / "runs" / "tiny")
    inner = writer(run / "evaluation-2026_01_01-00_00_00", n=30, seed=1)
    found = run_files(inner)
    assert found.folder == run and found.name == "tiny/evaluation-2026_01_01-00_00_00"
    assert found.predictions == inner / "predictions.npz"


def test_other_folders_and_files_are_refused(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        write_page([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    for name, text in (("notes.txt", "x"), ("config.yaml", "epochs: 3\n"), ("metrics.jsonl", "")):
        (tmp_path / "empty" / name).write_text(text)
        with pytest.raises(
            ConfigError, match=r"nothing to show: .* has metrics\.jsonl, into which"
        ):
            write_page([tmp_path / "empty"])
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2}\n')
    assert data_of(write_page([tmp_path / "empty"]))["runs"][0]["curves"]["train"]["lines"] == 1
    with pytest.raises(ConfigError, match="is a folder"):
        write_page([run_folder], tmp_path)
    (run_folder / "predictions.csv").write_text("split,specimen\ntest,other\n")
    with pytest.raises(DataError, match="of different evaluations"):
        write_page([run_folder])


def test_the_command(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(run_folder / "report.html")
    assert told["bytes"] == (run_folder / "report.html").stat().st_size
    assert main(["report", str(run_folder), "--output", str(run_folder / "other.html")]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert data_of(run_folder / "other.html") == data_of(run_folder / "report.html")
    assert main(["report"]) == 2


def test_without_plotly_the_extra_is_named(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    assert main(["report", str(run_folder)]) == 2
    assert "slidevlm[report]" in capsys.readouterr().err
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028\u2029", "\ud800", "{{data}}", "é漢"])
def test_json_in_a_script_element(text: str) -> None:
    found = as_json({"a": text})
    assert "<" not in found and "\u2028" not in found and "\u2029" not in found
    assert json.loads(found)["a"] == ("?" if text == "\ud800" else text)


def test_strings_of_a_script_cannot_end_it_nor_hide_its_end() -> None:
    assert closed('a = "</SCRIPT>"') == 'a = "<\\/SCRIPT>"'
    assert closed('a = "<!-- <script>"') == 'a = "<\\!-- <script>"'


def test_places_of_the_template_are_none_in_the_data() -> None:
    name = "{{data}} {{plotly}} {{script}} {{style}}"
    found = render({"runs": [{"name": name}]}, "var Plotly;")
    assert f"<title>{name} " in found
    data = found.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["runs"][0]["name"] == name


def test_roc_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    score = random.integers(0, 12, 200) / 12  # with ties
    positive = random.random(200) < score
    found = roc(positive, score)
    assert found is not None
    assert found["auc"] == pytest.approx(roc_auc_score(positive, score), abs=1e-4)
    x, y, _ = roc_curve(positive, score, drop_intermediate=False)
    ours = set(zip(found["x"], found["y"], strict=True))
    assert ours <= set(zip(x.round(4).tolist(), y.round(4).tolist(), strict=True))
    assert np.trapezoid(found["y"], found["x"]) == pytest.approx(found["auc"], abs=1e-4)
    assert roc(np.ones(5, bool), np.arange(5.0)) is None


def test_pca_is_scikit_learns_and_broken_rows_have_no_place() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    reference = PCA(2).fit(vectors)
    places = reference.transform(vectors)
    found = pca(np.vstack([vectors, np.full((1, 6), np.nan)]))
    for axis, column in zip("xy", places.T, strict=True):
        mine = np.array(found[axis][:-1], float)
        assert np.abs(mine) == pytest.approx(np.abs(column), rel=1e-3)
        assert found[axis][-1] is None
    assert found["share"] == pytest.approx(reference.explained_variance_ratio_, abs=1e-4)
    assert pca(np.ones((1, 3)))["x"] == [0.0]


def test_umap_is_a_second_map_where_it_is_installed(run_folder: Path) -> None:
    pytest.importorskip("umap", reason="extra umap")
    shown = data_of(write_page([run_folder]))["runs"][0]["specimens"]
    assert [one["name"] for one in shown["maps"]] == ["PCA", "UMAP"] and shown["umap"] == "there"
    rows = load(run_files(run_folder).predictions).splits["test"].image_embedding
    assert rows is not None
    found = umap(rows)
    assert found == umap(rows), "seeded"
    assert {k: shown["maps"][1][k] for k in "xy"} == {k: found[k] for k in "xy"}
    places = np.stack([found["x"], found["y"]], 1).astype(float)
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    classes = np.arange(60) % 3  # the embeddings' clusters
    assert (classes[apart.argmin(1)] == classes).mean() > 0.8, "neighbours stay neighbours"
    broken = rows.copy()
    broken[3] = np.nan
    assert umap(broken)["x"][3] is None


def test_the_page_names_the_extra_of_umap(run_folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    page = write_page([run_folder])
    shown = data_of(page)["runs"][0]["specimens"]
    assert [one["name"] for one in shown["maps"]] == ["PCA"] and shown["umap"] == "not installed"
    assert "pip install 'slidevlm[umap]'" in page.read_text()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"slide": {"type": "perceiver"}}, None),
        ({"slide": {"type": "vit"}}, None),
        ({"slide": {"type": "mean"}}, "encoder mean has no attention"),
        ({"slide": {"type": "longnet"}}, "encoder longnet has no attention"),
        ({"family": "lm"}, "language model reads no tiles"),
    ],
)
def test_attention_is_offered_where_there_is_one(run_folder: Path, model, said) -> None:
    (run_folder / "model.json").write_text(json.dumps(model))
    run = data_of(write_page([run_folder]))["runs"][0]
    offered = [one for one in run["lacking"] if "--attention" in one["command"]]
    assert len(offered) == (said is None)
    assert run["refused"] is None if said is None else said in run["refused"]


def test_of_many_specimens_a_part_is_on_the_page_and_is_called_so(
    tmp_path: Path, writer, monkeypatch, caplog
) -> None:
    """A page of 50,000 long reports would have 200 MB, and no browser searches it."""
    folder = writer(tmp_path / "run")
    whole = data_of(write_page([folder]))["runs"][0]["specimens"]
    assert whole["of"] == [60] and len(whole["id"]) == 60
    path = folder / "predictions.npz"
    stored = load(path)
    save(replace(stored, references={"train": replace(
        stored.splits["test"], specimen_ids=tuple(f"L{i}" for i in range(60)))}), path)  # fmt: skip
    monkeypatch.setattr(specimens_module, "SHOWN", 20)
    found = data_of(write_page([folder]))["runs"][0]["specimens"]
    places = list(range(0, 60, 3))
    assert found["judged"] == len(found["id"]) == len(found["near"]) == len(found["split"]) == 20
    assert found["of"] == [60, 60] and found["splits"] == ["test", "train"]
    assert "20 of its 120 specimens are on the page" in caplog.text
    for name in ("id", "patient", "report", "generated"):
        assert found[name] == [whole[name][i] for i in places]
    for name, values in whole["numbers"].items():
        assert found["numbers"][name] == [values[i] for i in places]
    one, all_of = found["tasks"][0], whole["tasks"][0]
    assert one["roc"] == all_of["roc"], "of all, not of those that are shown"
    assert one["label"] == [all_of["label"][i] for i in places]
    assert one["probability"] == [[row[i] for i in places] for row in all_of["probability"]]
    assert all(j < 20 for row in found["near"] + found["found"] for j, _ in row)
    # One that is looked at elsewhere on the page is there, and room that is left is for the others.
    assert specimens_module.specimens(path, ["S0031"])["id"][11] == "S0031"
    monkeypatch.setattr(specimens_module, "SHOWN", 90)
    found = specimens_module.specimens(path)
    assert found["of"] == [60, 60] and found["judged"] == 60
    assert found["id"][60:] == [f"L{2 * i}" for i in range(30)]


def test_nearest_in_blocks_is_a_plain_sort() -> None:
    vectors = np.random.default_rng(1).normal(size=(1500, 4))
    found = nearest(vectors, vectors, range(1500), 3, skip_self=True)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    for i in (0, 1023, 1024, 1499):
        assert [j for j, _ in found[i]] == np.argsort(-scores[i])[:3].tolist()


def test_p_values_stand_beside_the_run_that_was_compared_alone(tmp_path: Path, writer) -> None:
    one, other, third = (writer(tmp_path / str(i) / f"run_{i}", n=30, seed=i) for i in range(3))
    maps = ["--zsc-class-prompt-mapping", str(tmp_path / "0/prompts.json")]
    maps += ["--zsc-specimen-class-mapping", str(tmp_path / "0/site.json")]
    words = ["evaluate", "--predictions", str(one / "predictions.npz"), *maps]
    words += ["--compare", str(other / "predictions.npz"), "--eval-metric-bootstraps", "30"]
    assert main([*words, "--logs", str(tmp_path), "--name", "compared"]) == 0
    compared = tmp_path / "compared"
    stored = json.loads((compared / "comparison.json").read_text())
    shown = data_of(write_page([compared, other], tmp_path / "a.html"))["comparison"]
    assert shown is not None and len(shown["differences"]) == len(stored["differences"]) > 5
    assert data_of(write_page([compared, third], tmp_path / "b.html"))["comparison"] is None
    assert data_of(write_page([compared], tmp_path / "c.html"))["comparison"] is None


def test_embeddings_that_are_not_finite_have_no_map(run_folder: Path, monkeypatch) -> None:
    def fails(*args: object, **more: object) -> None:
        raise AssertionError("UMAP of nothing")

    monkeypatch.setattr("slidevlm.report.specimens.umap", fails)
    stored = load(run_folder / "predictions.npz")
    split = stored.splits["test"]
    assert split.image_embedding is not None
    broken = replace(split, image_embedding=np.full_like(split.image_embedding, np.nan))
    (run_folder / "predictions.npz").unlink()
    save(replace(stored, splits={"test": broken}), run_folder / "predictions.npz")
    shown = data_of(write_page([run_folder]))["runs"][0]["specimens"]
    assert [one["name"] for one in shown["maps"]] == ["PCA"] and shown["umap"] == "small"
    assert set(shown["maps"][0]["x"]) == {None}

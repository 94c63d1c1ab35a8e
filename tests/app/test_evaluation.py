"""Whole evaluations: files, stored predictions, comparison, several processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from slidevlm.app import judging, train
from slidevlm.app.notebook import evaluate
from slidevlm.cli import main
from slidevlm.config import Config, with_values
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.synthetic import DemoCohort
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval.stored import load, save

LABELS = "diagnosis"
SPECIMENS = 80


@pytest.fixture(scope="module")
def settings(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "hdf5_filename": str(cohort.hdf5),
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": str(cohort.split("train")),
        "val_split": (str(cohort.split("val")),),
        "test_split": str(cohort.split("test")),
        "zsc_class_prompt_mapping": (str(cohort.prompts(LABELS)),),
        "zsc_specimen_class_mapping": (str(cohort.labels(LABELS)),),
        "few_shot_examples": (str(cohort.folder / "few_shot_4.json"),),
        "eval_metric_bootstraps": 50,
        "save_captions": True,
        "val_gen_top_k": 1,
        "caption_val_frequency": 9,
        "caption_val_max_seq_len": 4,
        "model": "coca_tiny",
        "batch_size": 7,
        "image_features_cutoff": 40,
        "workers": 0,
        "epochs": 1,
        "lr": 3e-3,
        "precision": "fp32",
        "device": "cpu",
        "logs": str(tmp_path_factory.mktemp("logs")),
        "name": "run",
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any]) -> Path:
    train(with_values(Config(), settings))
    return Path(settings["logs"]) / "run"


def metrics(folder: Path, name: str = "metrics.json") -> dict[str, dict[str, float]]:
    return json.loads((folder / name).read_text())["metrics"]


def evaluated(run: Path, name: str, **more: Any) -> Path:
    """An evaluation with its own name and without generated reports, unless asked for."""
    overrides = {"name": name, "save_captions": False, **more}
    evaluate(run, with_values(Config(), overrides))
    return (run.parents[1] if run.is_file() else run) / name


def test_files_of_a_run(run: Path, cohort: DemoCohort) -> None:
    content = json.loads((run / "metrics.json").read_text())
    origin = content["about"]
    assert len(origin["model_hash"]) == 64 and set(origin["data_hash"]) == {"test"}
    assert origin["settings"]["eval_metric_bootstraps"] == 50
    assert {"python", "slidevlm", "torch"} <= set(origin["versions"])
    members = cohort.split("test").read_text().split()
    found = content["metrics"]
    for name in (
        "image_to_text/R@10",
        f"zero_shot/{LABELS}/auroc_ovo",
        f"slide_retrieval/{LABELS}/majority_vote@5",
        f"few_shot/{LABELS}/few_shot_4/class_mean/balanced_accuracy",
        f"few_shot/{LABELS}/few_shot_4/logistic_regression/accuracy",
    ):
        score = found[f"test/{name}"]
        assert score["lo"] <= score["value"] <= score["hi"] and 0 < score["n"] <= len(members)
    assert found["test/loss/caption"]["lo"] is None
    task = json.loads((run / f"tasks/test_zero_shot_{LABELS}.json").read_text())
    assert task["about"] == origin and "per_class" in task["details"]
    assert f"test/zero_shot/{LABELS}/accuracy" in task["metrics"]
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert json.loads(rows[0]["about"]) == origin and not any(r["about"] for r in rows[1:])
    assert [r["specimen"] for r in rows] == members and all(r["report"] for r in rows)
    truth = json.loads(cohort.labels(LABELS).read_text())
    name = f"zero_shot/{LABELS}"
    assert [r[f"{name}/label"] for r in rows] == [truth[s] for s in members]
    right = np.mean([r[f"{name}/label"] == r[f"{name}/predicted"] for r in rows])
    assert right == found[f"test/{name}/accuracy"]["value"]
    for row in rows:
        chances = {k: float(v) for k, v in row.items() if k.startswith(f"{name}/probability/")}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-6)
        assert max(chances, key=chances.__getitem__).endswith("/" + row[f"{name}/predicted"])
    ranks = [int(r["image_to_text/rank"]) for r in rows]
    assert np.mean(ranks) == pytest.approx(found["test/image_to_text/mean_rank"]["value"])
    judged = [r[f"few_shot/{LABELS}/few_shot_4/class_mean/predicted"] for r in rows]
    assert set(judged) <= set(truth.values()) | {""} and set(judged) != {""}
    assert " to " in (run / "test.md").read_text()
    assert origin["model_hash"] in (run / "test.md").read_text()
    assert "Intervals of 95 % from 50 resamples of" in (run / "test.md").read_text()


def test_intervals_are_logged_during_training(run: Path) -> None:
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    (line,) = [x for x in lines if x["kind"] == "evaluation"]
    name = "val/image_to_text/R@5"
    assert line[f"{name}/lo"] <= line[name] <= line[f"{name}/hi"]


def test_a_run_and_its_checkpoint_are_evaluated_alike(run: Path) -> None:
    of_run = metrics(evaluated(run, "of-run"))
    of_file = metrics(evaluated(run / "checkpoints" / "epoch_1.pt", "of-file"))
    assert of_run == of_file
    trained = metrics(run)
    shared = [k for k in of_run if k in trained]
    assert len(shared) > 20 and all(of_run[k] == trained[k] for k in shared), "train and evaluate"
    assert any(k.startswith("val/") for k in of_run)


def test_train_with_test_does_the_same(settings: dict[str, Any], run: Path) -> None:
    asked = {k: v for k, v in settings.items() if k not in ("train_split", "save_captions")}
    more = {"test": True, "pretrained": str(run), "name": "again"}
    train(with_values(Config(), {**asked, **more}))
    assert metrics(run.parent / "again") == metrics(evaluated(run, "beside"))


def test_an_evaluation_within_a_run_leaves_its_files(settings: dict[str, Any], run: Path) -> None:
    folder = run.parent / "copy"
    shutil.copytree(run, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    asked = {k: v for k, v in settings.items() if k not in ("train_split", "save_captions")}
    train(with_values(Config(), {**asked, "test": True, "resume": "latest", "name": "copy"}))
    for name in ("metrics.json", "predictions.npz", "predictions.csv", "test.json", "config.yaml"):
        assert (folder / name).read_bytes() == before[name]
    assert metrics(folder, "evaluation_metrics.json").keys() > metrics(run).keys() - {
        k for k in metrics(run) if "/captions/" in k or "/loss/" in k
    }


@pytest.mark.slow
@pytest.mark.parametrize("specimens", [80])
def test_two_processes_equal_one_exactly(run: Path, specimens: int) -> None:
    """Batches of 7 of a split whose size 7 does not divide; reports are drawn."""
    alone = metrics(evaluated(run, "alone", save_captions=True, val_gen_top_k=5))
    assert len(load(run / "alone" / "predictions.npz").splits["test"]) % 7
    words = ["--name", "two", "--dist-backend", "gloo", "--save-captions", "--val-gen-top-k", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "--", "-m", "slidevlm", "evaluate", str(run), *words]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ}, check=False
    )
    assert result.returncode == 0, result.stderr
    assert metrics(run / "two") == alone
    assert result.stdout.count("MRR") == 4, "one table of two splits, both ways"
    one, two = (load(run / name / "predictions.npz") for name in ("alone", "two"))
    for split in ("val", "test"):
        a, b = one.splits[split], two.splits[split]
        assert a.specimen_ids == b.specimen_ids and a.generated == b.generated
        np.testing.assert_array_equal(a.image_embedding, b.image_embedding)
        np.testing.assert_array_equal(a.text_embedding, b.text_embedding)
        assert a.losses == b.losses


# --- stored predictions ----------------------------------------------------------------------


def test_stored_predictions_give_the_same_numbers(run: Path, capsys) -> None:
    first = evaluated(run, "first", probe=True, save_captions=True)
    assert main(["evaluate", "--predictions", str(first), "--name", "again"]) == 0
    again = metrics(first / "again")
    assert again == metrics(first)
    assert any(k.startswith(f"test/probe/{LABELS}/linear/") for k in again)
    assert any("/captions/" in k for k in again)
    origin = json.loads((first / "again" / "metrics.json").read_text())["about"]
    assert origin["model_hash"] == json.loads((first / "metrics.json").read_text())["about"][
        "model_hash"
    ]  # fmt: skip
    assert "test: image_to_text\n  R@1 " in capsys.readouterr().out


def test_scorings_of_one_second_have_folders_of_their_own(run: Path, tmp_path, monkeypatch) -> None:
    stored = shutil.copy(run / "predictions.npz", tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form, *_: form.partition("%")[0] + "now")
    for name in ("evaluation-now", "evaluation-now-2"):
        assert main(["evaluate", "--predictions", stored]) == 0
        assert (tmp_path / name / "metrics.json").is_file()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_do_not_score_the_same_predictions(
    variable: str, run: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(run.iterdir())
    monkeypatch.setenv(variable, "2")
    assert main(["evaluate", "--predictions", str(run / "predictions.npz")]) == 2
    starter = {"WORLD_SIZE": "torchrun", "SLURM_STEP_NUM_TASKS": "srun"}[variable]
    assert f"start it without {starter}" in capsys.readouterr().err
    assert set(run.iterdir()) == before


def test_stored_predictions_with_other_settings(run: Path, cohort: DemoCohort, capsys) -> None:
    words = ["--eval-metric-bootstraps", "20", "--eval-metric-ci", "0.5", "--logs", "None"]
    place = ["evaluate", "--predictions", str(run / "predictions.npz")]
    capsys.readouterr()
    assert main([*place, *words, "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("| split | metric | value | interval | n |")
    other = [str(cohort.prompts("margin")), "--zsc-specimen-class-mapping",
             str(cohort.labels("margin"))]  # fmt: skip
    assert main([*place, "--logs", "None", "--zsc-class-prompt-mapping", *other]) == 2
    assert "no label file has all of its classes" in capsys.readouterr().err


def test_stored_predictions_of_another_program_have_no_versions(run: Path) -> None:
    stored = load(run / "predictions.npz")
    other = run / "other"
    other.mkdir()
    save(replace(stored, about={}), other / "predictions.npz")
    words = ["evaluate", "--predictions", str(other / "predictions.npz"), "--name", "again"]
    assert main(words) == 0
    origin = json.loads((other / "again" / "metrics.json").read_text())["about"]
    assert origin["versions"] == {} and origin["scored_again_by"]["torch"] == torch.__version__


def test_what_was_not_stored_is_said(run: Path, cohort: DemoCohort, capsys) -> None:
    plain = evaluated(run, "plain")
    stored = str(plain / "predictions.npz")
    assert main(["evaluate", "--predictions", stored, "--probe", "--logs", "None"]) == 2
    assert "training split, which these predictions lack" in capsys.readouterr().err
    new = cohort.folder / "other_prompts.json"
    prompts = json.loads(cohort.prompts(LABELS).read_text())
    texts = prompts.get("classes", prompts)
    texts[next(iter(texts))] = ["never seen"]
    new.write_text(json.dumps(prompts))
    words = ["--zsc-class-prompt-mapping", str(new), "--logs", "None"]
    assert main(["evaluate", "--predictions", stored, *words]) == 2
    assert "lack the embeddings of" in capsys.readouterr().err
    two = evaluated(run, "lacking", zsc_class_prompt_mapping=(str(new),)) / "predictions.npz"
    words += ["--compare", stored]
    assert main(["evaluate", "--predictions", str(two), *words]) == 2
    assert f"--compare {stored}: the stored predictions lack" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the folder of a run"),
        (["RUN", "--predictions", "RUN"], "one of the two"),
        (["--predictions", "EMPTY"], "has no stored predictions"),
        (["--predictions", "JUNK"], "cannot be read as stored predictions"),
        (["EMPTY"], "is not of a run: it has no config.yaml"),
        (["nowhere/run"], "no run 'nowhere/run' (looked from"),
        (["UNTRAINED"], "is a run without a checkpoint"),
        (["JUNK"], "the folder above its own has no config.yaml"),
        (["RUN", "--format", "word"], "invalid choice"),
        (["RUN", "--compare", "EMPTY"], "has no stored predictions"),
        (["RUN", "--compare", "RUN", "--eval-metric-bootstraps", "1"], "makes none"),
    ],
)
def test_bad_requests(run: Path, tmp_path: Path, capsys, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.yaml").write_text("epochs: 1\n")
    (tmp_path / "junk" / "in").mkdir(parents=True)
    junk = tmp_path / "junk" / "in" / "predictions.npz"
    junk.write_bytes(b"PK\x03\x04 no archive")
    places = {"RUN": run, "EMPTY": tmp_path / "empty", "JUNK": junk}
    places["UNTRAINED"] = tmp_path / "untrained"
    before = set(run.iterdir())
    assert main(["evaluate", *(str(places.get(w, w)) for w in words)]) == 2
    assert message in capsys.readouterr().err
    assert set(run.iterdir()) == before


# --- comparison ------------------------------------------------------------------------------


def test_a_run_beside_itself_and_beside_another(
    run: Path, settings: dict[str, Any], capsys
) -> None:
    assert main(["evaluate", str(run), "--name", "left", "--compare", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "p (Holm)" in shown
    same = json.loads((run / "left" / "comparison.json").read_text())
    known = [d for d in same["differences"] if d["p"] is not None]  # some text scores are undefined
    assert {d["p"] for d in known} == {1.0} and {d["difference"] for d in known} == {0.0}
    assert "NaN" not in (run / "left" / "comparison.json").read_text() and len(known) > 20
    assert "test/" not in {d["metric"] for d in same["differences"]}
    names = {d["metric"] for d in same["differences"]}
    assert {"image_to_text/R@10", f"zero_shot/{LABELS}/auroc_ovr"} <= names
    changed = run.parent / "changed.npz"
    stored = load(run / "predictions.npz")
    split = stored.splits["test"]
    order = np.arange(len(split))[::-1]
    split.image_embedding = -split.image_embedding[order]
    split.text_embedding = split.text_embedding[order]
    split.report_ids = split.report_ids[order]
    for name in ("specimen_ids", "patient_ids", "reports", "generated"):
        setattr(split, name, getattr(split, name)[::-1])
    from slidevlm.eval.stored import save

    save(stored, changed)
    words = ["--name", "right", "--compare", str(changed)]
    assert main(["evaluate", "--predictions", str(run / "predictions.npz"), *words]) == 0
    found = json.loads((run / "right" / "comparison.json").read_text())["differences"]
    by_name = {d["metric"]: d for d in found}
    one = by_name["text_to_image/mean_rank"]
    assert one["value"] != one["other"] and one["lo"] < one["difference"] < one["hi"]
    assert one["p"] <= one["p_holm"] <= 1
    assert by_name[f"slide_retrieval/{LABELS}/Acc@1"]["difference"] == 0, "order changes nothing"
    assert by_name[f"slide_retrieval/{LABELS}/Acc@1"]["p"] == 1


def test_a_run_is_compared_as_it_was_before_this_evaluation(run: Path, tmp_path: Path) -> None:
    """What is written now is the run's newest evaluation, and no different from itself."""
    from slidevlm.eval.stored import save

    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluation*"))
    stored = load(other / "predictions.npz")
    split = stored.splits["test"]
    split.text_embedding = -split.text_embedding
    save(stored, other / "predictions.npz")
    assert main(["evaluate", str(other), "--compare", str(other)]) == 0
    (written,) = other.glob("evaluation-*/comparison.json")
    assert any(d["difference"] for d in json.loads(written.read_text())["differences"])


def test_other_specimens_are_refused(run: Path, tmp_path: Path, capsys) -> None:
    from dataclasses import replace

    from slidevlm.eval.stored import save, select

    stored = load(run / "predictions.npz")
    fewer = select(stored.splits["test"], np.arange(5))
    save(replace(stored, splits={"test": fewer}), tmp_path / "fewer.npz")
    save(replace(stored, splits={"other": fewer}), tmp_path / "other.npz")
    place = ["evaluate", "--predictions", str(run), "--logs", "None", "--compare"]
    assert main([*place, str(tmp_path / "fewer.npz")]) == 2
    assert "split test has 5 specimens there" in capsys.readouterr().err
    assert main([*place, str(tmp_path / "other.npz")]) == 2
    assert "it has the splits other, this evaluation test" in capsys.readouterr().err


def test_other_reports_of_the_same_specimens_are_told(run: Path, tmp_path: Path, capsys) -> None:
    from dataclasses import replace

    from slidevlm.eval.stored import save

    stored = load(run / "predictions.npz")
    split = stored.splits["test"]
    one = replace(split, reports=(split.reports[0] + " Cleaned.", *split.reports[1:]))
    save(replace(stored, splits={"test": one}), tmp_path / "cleaned.npz")
    place = ["evaluate", "--predictions", str(run), "--logs", "None", "--compare"]
    assert main([*place, str(tmp_path / "cleaned.npz")]) == 0
    said = f"1 of {len(split)} specimens of split test have another report there"
    assert said in capsys.readouterr().err
    assert main([*place, str(run)]) == 0
    assert "another report" not in capsys.readouterr().err


# --- probes, examples, embeddings -------------------------------------------------------------


def test_probes_choose_by_validation_where_a_test_split_judges(run: Path) -> None:
    folder = evaluated(run, "probes", probe=True)
    task = json.loads((folder / f"tasks/test_probe_{LABELS}_linear.json").read_text())
    assert task["details"]["chosen_on"] == "validation" and len(task["details"]["strengths"]) == 45
    found = metrics(folder)
    assert f"test/probe/{LABELS}/neighbours/accuracy" in found
    assert f"test/k_shot/{LABELS}/class_mean/k=16/balanced_accuracy" in found
    assert not any(k.startswith(("val/probe", "train/")) for k in found)
    values = [found[f"test/k_shot/{LABELS}/class_mean/k={k}/accuracy"] for k in (1, 4, 16)]
    assert values[0]["lo"] <= values[0]["value"] <= values[0]["hi"]


def test_probes_without_a_test_split(settings: dict[str, Any], run: Path) -> None:
    asked = {k: v for k, v in settings.items() if k not in ("test_split", "save_captions")}
    more = {"probe": True, "test": True, "pretrained": str(run), "name": "crossed"}
    train(with_values(Config(), {**asked, **more}))
    folder = run.parent / "crossed"
    task = json.loads((folder / f"tasks/val_probe_{LABELS}_linear.json").read_text())
    assert task["details"]["chosen_on"] == "5-fold cross-validation"


def test_labels_alone_serve_few_shot(settings: dict[str, Any], run: Path) -> None:
    asked = {k: v for k, v in settings.items()
             if k not in ("train_split", "save_captions", "zsc_class_prompt_mapping")}  # fmt: skip
    more = {"test": True, "pretrained": str(run), "name": "alone-labels"}
    train(with_values(Config(), {**asked, **more}))
    found = metrics(run.parent / "alone-labels")
    assert not any("zero_shot" in k for k in found) and any("few_shot" in k for k in found)


def test_examples_are_never_judged(run: Path, cohort: DemoCohort, tmp_path: Path) -> None:
    """Examples from the test split itself."""
    truth = json.loads(cohort.labels(LABELS).read_text())
    members = cohort.split("test").read_text().split()
    first: dict[str, list[str]] = {}
    for specimen in members:
        first.setdefault(truth[specimen], []).append(specimen)
    examples = {c: found[:1] for c, found in first.items()}
    path = tmp_path / "inside.json"
    path.write_text(json.dumps(examples))
    folder = evaluated(run, "inside", few_shot_examples=(str(path),))
    name = f"few_shot/{LABELS}/inside/class_mean"
    task = json.loads((folder / f"tasks/test_{name.replace('/', '_')}.json").read_text())
    stored = load(folder / "predictions.npz").splits["test"]
    shown = {s for found in examples.values() for s in found}
    patients = {
        p for s, p in zip(stored.specimen_ids, stored.patient_ids, strict=True) if s in shown
    }
    judged = [s for s, p in zip(stored.specimen_ids, stored.patient_ids, strict=True)
              if p not in patients]  # fmt: skip
    assert task["details"]["specimens"] == len(judged) == len(members) - task["details"]["left_out"]
    assert metrics(folder)[f"test/{name}/accuracy"]["n"] == len(judged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"A": ["x"]}, "examples of 1 class"),
        ({"A": ["x"], "B": ["y"]}, "no label file has all of its classes A, B"),
    ],
)
def test_bad_examples(run: Path, tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        evaluated(run, "bad", few_shot_examples=(str(path),))
    assert not (run / "bad").exists()


def test_examples_that_are_not_there_or_of_another_class(
    run: Path, cohort: DemoCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((cohort.folder / "few_shot_1.json").read_text())
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({c: [*s, "nobody"] if c == min(content) else s
                                for c, s in content.items()}))  # fmt: skip
    with pytest.raises(DataError, match=r"1 specimens have no features .* such as 'nobody'"):
        evaluated(run, "bad", few_shot_examples=(str(path),))
    a, b = sorted(content)[:2]
    path.write_text(json.dumps({**content, a: content[b], b: content[a]}))
    with pytest.raises(DataError, match="correct one of them"):
        evaluated(run, "bad", few_shot_examples=(str(path),))
    # By the name of a patient it shows only with the data: before anything is embedded.
    patients = {case.specimen: case.patient for case in Hdf5Cases(cohort.hdf5, "demo").cases}
    path.write_text(json.dumps({**content, a: [patients[content[b][0]]]}))
    monkeypatch.setattr(judging, "predict", None)
    with pytest.raises(DataError, match="name specimens in the place of the patient"):
        evaluated(run, "bad", few_shot_examples=(str(path),))


def test_impossible_combinations(settings: dict[str, Any]) -> None:
    without = {k: v for k, v in settings.items() if not k.startswith("zsc")}
    with pytest.raises(ConfigError, match="need labels"):
        train(with_values(Config(), without))
    asked = {k: v for k, v in settings.items() if k != "test_split"}
    with pytest.raises(ConfigError, match="judged by --test-split"):
        train(with_values(Config(), {**asked, "probe": True}))
    table = settings["test_split"]
    with pytest.raises(ConfigError, match="--survival-table is for --probe"):
        train(with_values(Config(), {**settings, "survival_table": table}))


def test_probes_of_several_classes_are_refused_before_any_work(
    settings: dict[str, Any], cohort: DemoCohort, tmp_path: Path
) -> None:
    truth = json.loads(cohort.labels(LABELS).read_text())
    path = tmp_path / "several.json"
    path.write_text(json.dumps({s: [c] for s, c in truth.items()}))
    more = {"zsc_specimen_class_mapping": (str(path),), "few_shot_examples": None, "probe": True}
    with pytest.raises(DataError, match="--probe needs one class a specimen; several has lists"):
        train(with_values(Config(), {**settings, **more, "name": "refused"}))
    assert not (Path(settings["logs"]) / "refused").exists()


def test_labels_of_other_specimens_are_refused_before_training(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "others.json"
    path.write_text(json.dumps({"elsewhere": "LUNG_SCC"}))
    more = {"zsc_specimen_class_mapping": (str(path),), "few_shot_examples": None}
    with pytest.raises(DataError, match="others names no specimen of .*'elsewhere'"):
        train(with_values(Config(), {**settings, **more, "probe": False, "name": "refused"}))
    assert not list((Path(settings["logs"]) / "refused").glob("checkpoints/*"))


def test_embeddings_in_the_layout_of_trident(run: Path) -> None:
    folder = evaluated(run, "vectors", save_embeddings=True)
    split = load(folder / "predictions.npz").splits["val"]
    for specimen, vector in zip(split.specimen_ids, split.image_embedding, strict=True):
        with h5py.File(folder / "embeddings" / "val" / f"{specimen}.h5") as file:
            np.testing.assert_array_equal(file["features"][()], vector)
            assert file["features"].attrs["name"] == specimen
            assert len(file["features"].attrs["model_hash"]) == 64
    with np.load(folder / "embeddings" / "val.npz") as file:
        np.testing.assert_array_equal(file["text_embedding"], split.text_embedding)
        assert file["specimen_ids"].tolist() == list(split.specimen_ids)
        assert json.loads(str(file["about"]))["model_hash"]


def test_several_validation_files_in_every_sink(
    settings: dict[str, Any], cohort: DemoCohort, tmp_path: Path
) -> None:
    members = cohort.split("val").read_text().split()
    patients = cohort.split("test").read_text().split()
    for name, part in (("near", members), ("far", patients)):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    train(
        with_values(
            Config(),
            {
                **{k: v for k, v in settings.items() if k != "test_split"},
                "val_split": (str(tmp_path / "near.txt"), str(tmp_path / "far.txt")),
                "epochs": 3,
                "eval_grace_period": 1,
                "val_frequency": 2,
                "save_captions": False,
                "report_to": "tensorboard",
                "name": "several",
            },
        )
    )
    folder = Path(settings["logs"]) / "several"
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [x for x in lines if x["kind"] == "evaluation"]
    assert [x["epoch"] for x in found] == [2, 3], "the second, and always the last"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for split in ("near", "far"):
        for name in ("image_to_text/MRR", f"few_shot/{LABELS}/few_shot_4/class_mean/accuracy"):
            key = f"{split}/{name}"
            for end in (key, f"{key}/lo", f"{key}/hi"):
                shown = [e.value for e in events.Scalars(f"evaluation/{end}")]
                assert shown == pytest.approx([x[end] for x in found], abs=1e-6)
    assert found[-1]["near/image_to_text/MRR"] != found[-1]["far/image_to_text/MRR"]

"""`slidevlm caption` and `slidevlm score`, from the command line to the files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import pytest
import torch

from slidevlm import caption_commands, cli_use
from slidevlm.app import slide_model, using
from slidevlm.cli import main
from slidevlm.data.synthetic import DemoCohort, synthesize
from slidevlm.eval.text_metrics.scoring import Scoring
from slidevlm.models import decoding, generate
from slidevlm.models.decoding import Draft


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return synthesize(tmp_path_factory.mktemp("demo") / "cohort", specimens=60, seed=1)


@pytest.fixture(scope="module")
def run(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    words = ["--hdf5_filename", cohort.hdf5, "--hdf5_feature_attribute", "demo"]
    words += ["--hdf5_text_attribute", "report", "--train-split", cohort.split("train")]
    words += ["--test-split", cohort.split("test"), "--model", "coca_tiny", "--batch-size", "12"]
    words += ["--workers", "0", "--epochs", "1", "--lr", "3e-3", "--precision", "fp32"]
    words += ["--device", "cpu", "--logs", logs, "--name", "run", "--save-captions"]
    words += ["--caption-val-max-seq-len", "9", "--val-gen-top-k", "1"]
    assert main(["train", *map(str, words)]) == 0
    return logs / "run"


def caption(run: Path, cohort: DemoCohort, output: object, *more: object) -> int:
    words = ["caption", run, cohort.hdf5, "--output", output, "--split", cohort.split("test")]
    words += ["--max-tokens", 9, "--workers", 0, "--device", "cpu", *more]
    return main([str(word) for word in words])


def test_reports_are_those_of_the_evaluation(run: Path, cohort: DemoCohort, tmp_path: Path) -> None:
    output = tmp_path / "out" / "reports.json"
    assert caption(run, cohort, output) == 0
    found = json.loads(output.read_text())
    evaluated = json.loads((run / "captions_test.json").read_text())
    assert [(r["id"], r["report"]) for r in found] == [(e["id"], e["generated"]) for e in evaluated]
    assert all(r["score"] < 0 and len(r["model"]) == 64 for r in found)
    assert found[0]["decoding"]["max_tokens"] == 9 and found[0]["decoding"]["prompt"] == ""
    assert all(r["precision"] == "float32" for r in found)
    assert [p.name for p in output.parent.iterdir()] == ["reports.json"]


def test_csv_text_and_the_terminal_say_the_same(run, cohort, tmp_path, capsys) -> None:
    more = ("--precision", "amp_bf16")
    for name in ("a.json", "a.csv", "a.txt", "-"):
        assert caption(run, cohort, tmp_path / name if name != "-" else "-", *more) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    texts = {r["id"]: r["report"] for r in json.loads((tmp_path / "a.json").read_text())}
    assert {r["id"]: r["report"] for r in lines} == texts and lines[0]["model"]
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["id"]: r["report"] for r in rows} == texts
    assert json.loads(rows[0]["decoding"])["max_tokens"] == 9 and len(rows[0]["model"]) == 64
    assert {r["precision"] for r in (*lines, *rows)} == {"bfloat16"}
    head, *body = (tmp_path / "a.txt").read_text().splitlines()
    assert head.startswith("# model ") and "max_tokens" in head
    assert head.endswith(", precision bfloat16")
    assert dict(line.split("\t") for line in body) == {
        k: " ".join(v.split()) for k, v in texts.items()
    }


def test_beams_a_prompt_and_the_best(run: Path, cohort: DemoCohort, tmp_path: Path) -> None:
    output = tmp_path / "b.json"
    more = ("--beams", 4, "--groups", 2, "--best", 3, "--prompt", "organ of origin")
    assert caption(run, cohort, output, *more) == 0
    for record in json.loads(output.read_text()):
        assert record["report"].startswith("organ of origin")
        scores = [record["score"], *(a["score"] for a in record["alternatives"])]
        assert 1 < len(scores) <= 3 and scores == sorted(scores, reverse=True)
    assert record["decoding"]["form"] == "beams" and record["decoding"]["beams"] == 4
    assert "top_k" not in record["decoding"], "nothing is drawn"


def test_draws_are_seeded_and_any_of_their_settings_asks_for_them(run, cohort, tmp_path) -> None:
    found = []
    for number, more in enumerate(
        [("--top-k", 5), ("--top-k", 5), ("--top-k", 5, "--seed", 1), ("--top-p", 0.9), ()]
    ):
        output = tmp_path / f"{number}.json"
        assert caption(run, cohort, output, *more) == 0
        found.append([r["report"] for r in json.loads(output.read_text())])
    assert found[0] == found[1] and len({tuple(f) for f in found}) == 4


@pytest.mark.parametrize("choose", ["consensus", "similarity"])
def test_the_best_of_candidates(run, cohort, tmp_path, capsys, choose: str) -> None:
    more = ("--top-k", 5, "--candidates", 4, "--choose", choose, "--best", 2)
    for name in ("c.json", "c.csv"):
        assert caption(run, cohort, tmp_path / name, *more) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    for record in found:
        merits = [record["merit"], *(a["merit"] for a in record["alternatives"])]
        assert len(merits) == 2 and merits == sorted(merits, reverse=True)
        settings = record["decoding"]
        assert (settings["form"], settings["candidates"], settings["choose"]) == (
            "draws",
            4,
            choose,
        )
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["report"], float(r["merit"])) for r in rows] == [
        (r["report"], r["merit"]) for r in found
    ]
    assert caption(run, cohort, tmp_path / "d.json", "--candidates", 4) == 2
    assert "not the 4 candidates; use beams or draws" in capsys.readouterr().err
    assert caption(run, cohort, tmp_path / "d.json", "--top-k", 5, "--choose", choose) == 2
    assert "give candidates, such as 16" in capsys.readouterr().err


def test_goes_on_where_it_was(run, cohort, tmp_path, monkeypatch, capsys) -> None:
    whole = tmp_path / "whole.json"
    assert caption(run, cohort, whole) == 0
    output, calls = tmp_path / "part.json", []

    def stopping(model, bags, names: Sequence[str], *rest, **more):
        calls.append(tuple(names))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate.draft(model, bags, names, *rest, **more)

    monkeypatch.setattr(slide_model, "draft", stopping)
    assert caption(run, cohort, output, "--batch-size", 2) == 130
    partial = tmp_path / "part.json.partial.jsonl"
    head, *kept = partial.read_text().splitlines()
    assert len(kept) == 4 and not output.exists()
    # Compared to the letter: in another order a file of an earlier version would not go on.
    assert list(json.loads(head))[:4] == [
        "model", "decoding", "image_features_cutoff", "precision",
    ]  # fmt: skip
    with partial.open("a") as file:
        file.write('{"id": "cut sho')
    capsys.readouterr()
    for other in (("--min-tokens", 3), ("--precision", "amp_bf16")):
        assert caption(run, cohort, output, "--batch-size", 2, *other) == 2
        assert "with other settings; remove it" in capsys.readouterr().err
    calls.clear()
    monkeypatch.setattr(slide_model, "draft", generate.draft)
    assert caption(run, cohort, output, "--batch-size", 2) == 0
    assert "4 of " in capsys.readouterr().err
    assert json.loads(output.read_text()) == json.loads(whole.read_text())
    assert not partial.exists()


def test_a_limit_beyond_the_context_is_told(run, cohort, tmp_path, capsys) -> None:
    told = "the context of the model has room for"
    context = slide_model.load(run, device="cpu").trained.config.text.context_length
    for name, more, said in (
        ("fits.json", ("--max-tokens", context - 1), False),
        ("more.json", ("--max-tokens", context), True),
        ("prompt.json", ("--prompt", "lung " * (context // 2), "--max-tokens", context - 1), True),
        ("default.json", (), False),
    ):
        assert caption(run, cohort, tmp_path / name, *more) == 0
        assert (told in capsys.readouterr().err) == said, name


def test_names_with_line_ends_keep_a_line_each_in_text(tmp_path) -> None:
    about = {"model": "m", "decoding": {}, "image_features_cutoff": 1, "precision": "float32"}
    records = [{"id": "a\nb\tc", "report": "lung\nbiopsy"}, {"id": "d", "report": ""}]
    lines = caption_commands._formatted(records, about, ".txt").splitlines()
    assert lines[1:] == ["a b c\tlung biopsy", "d\t"]


def test_two_processes_do_not_write_one_output(run, cohort, tmp_path, capsys) -> None:
    """Each would do all the work, and the second to end finds the partial file gone."""
    output = tmp_path / "out.json"
    with using.Partial(output, {}) as first:
        assert caption(run, cohort, output) == 2
        assert "another process is writing it" in capsys.readouterr().err
        first.add({"id": "kept"})
        assert len(first.path.read_text().splitlines()) == 2, "what is there stays"
    first.path.unlink()
    assert caption(run, cohort, output) == 0


@pytest.mark.parametrize("what", ["feature attribute", "slide table"])
def test_others_features_are_not_gone_on_with(run, cohort, tmp_path, monkeypatch, capsys, what):
    """The names are the same, the bags are not."""
    bags = tmp_path / "bags"
    bags.mkdir()
    with h5py.File(cohort.hdf5) as source, h5py.File(tmp_path / "two.h5", "w") as two:
        two.attrs["unit"] = "um"
        for number, path in enumerate(source["case-index/case_paths"].asstr()[:4]):
            group = source[path]["demo"]
            for sign, name in ((1, "uni"), (-1, "conch")):
                two[f"patients/p{number}/s{number}/{name}/features"] = sign * group["features"][()]
                two[f"patients/p{number}/s{number}/{name}/positions"] = group["positions"][()]
            with h5py.File(bags / f"{number}.h5", "w") as bag:
                bag["feats"], bag["coords"] = group["features"][()], group["positions"][()]
                bag.attrs.update({"unit": "um", "tile_size_um": 256.0, "extractor": "demo"})
    for name, slides in (("one", "0123"), ("other", "2301")):
        rows = [f"{case},{slide}.h5" for case, slide in zip("AABB", slides, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["case_id,slide_id", *rows]))
    if what == "feature attribute":
        words, one, other = [tmp_path / "two.h5", "--hdf5_feature_attribute"], "uni", "conch"
    else:
        words, one, other = [bags, "--slide-table"], tmp_path / "one.csv", tmp_path / "other.csv"
    add = using.Partial.add

    def stopping(self: using.Partial, record: using.Record) -> None:
        add(self, record)
        raise KeyboardInterrupt

    def going_on(choice: object) -> int:
        place = ["--output", tmp_path / "out.json", "--workers", 0, "--device", "cpu"]
        return main([str(w) for w in ["caption", run, *words, choice, *place, "--max-tokens", 3]])

    with monkeypatch.context() as patch:
        patch.setattr(using.Partial, "add", stopping)
        assert going_on(one) == 130
    assert going_on(other) == 2
    assert "from other data" in capsys.readouterr().err
    assert going_on(one) == 0


@pytest.mark.parametrize("more", [(), ("--beams", 3), ("--top-k", 5, "--best", 2)])
def test_a_report_is_kept_when_it_is_done(run, cohort, tmp_path, monkeypatch, more) -> None:
    """Not when its batch is: a Ctrl-C within a batch keeps those that have ended."""
    whole, output = tmp_path / "whole.json", tmp_path / "part.json"
    assert caption(run, cohort, whole, *more) == 0

    def stopping(model, bags, names: Sequence[str], decoding, prompt, finished, *rest, **more):
        done: list[int] = []

        def told(number: int, drafts: list[Draft]) -> None:
            finished(number, drafts)
            done.append(number)
            if len(done) == 3:
                raise KeyboardInterrupt

        return generate.draft(model, bags, names, decoding, prompt, told, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(slide_model, "draft", stopping)
        assert caption(run, cohort, output, "--batch-size", 8, *more) == 130
    lines = (tmp_path / "part.json.partial.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert caption(run, cohort, output, "--batch-size", 8, *more) == 0
    assert json.loads(output.read_text()) == json.loads(whole.read_text())


def test_a_single_bag_file(run: Path, cohort: DemoCohort, tmp_path: Path, capsys) -> None:
    name = cohort.split("test").read_text().split()[0]
    with h5py.File(cohort.hdf5) as source, h5py.File(tmp_path / "slide.h5", "w") as bag:
        paths = source["case-index/case_paths"].asstr()[()]
        group = source[next(p for p in paths if p.endswith(name))]["demo"]
        bag["feats"] = group["features"][()]  # as STAMP writes it
        bag["coords"] = group["positions"][()]
        bag.attrs.update({"unit": "um", "tile_size_um": 256.0, "extractor": "uni"})
    words = ["caption", run, tmp_path / "slide.h5", "--output", tmp_path / "one.json"]
    assert main([str(w) for w in [*words, "--workers", 0, "--device", "cpu"]]) == 0
    (record,) = json.loads((tmp_path / "one.json").read_text())
    assert record["id"] == "slide" and record["image_features_cutoff"] == 100_000
    assert capsys.readouterr().out == f"wrote {tmp_path / 'one.json'}: 1 report\n"


def failing(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_what_cannot_be_written(run, cohort, tmp_path, capsys) -> None:
    base = ["caption", run, cohort.hdf5, "--device", "cpu", "--workers", 0, "--output"]
    assert "one of .json, .csv, .txt" in failing([*base, tmp_path / "a.html"], capsys)
    (tmp_path / "there.json").write_text("[]")
    assert "exists; choose" in failing([*base, tmp_path / "there.json"], capsys)
    out = tmp_path / "x.json"
    assert "do not divide" in failing([*base, out, "--beams", 4, "--groups", 3], capsys)
    assert "draws nothing" in failing([*base, out, "--beams", 4, "--top-k", 3], capsys)
    assert "writes one report" in failing([*base, out, "--best", 2], capsys)
    bad = tmp_path / "bad.h5"
    bad.write_bytes(b"nothing of the kind")
    assert "bad.h5" in failing(["caption", run, bad, "--output", out], capsys)
    assert "no file or folder" in failing(
        ["caption", run, tmp_path / "no", "--output", out], capsys
    )
    assert "neither a run folder" in failing(["caption", tmp_path, bad, "--output", out], capsys)
    assert "shorten the prompt" in failing([*base, out, "--prompt", "word " * 90], capsys)
    assert not out.exists()


@pytest.mark.parametrize("more", [(), ("--beams", 3), ("--top-p", 0.9)])
def test_a_model_that_has_diverged_writes_no_reports(run, cohort, tmp_path, capsys, more) -> None:
    """They would be empty, and each as likely as can be."""
    (path,) = (run / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    name = next(n for n in state["model"]["weights"] if n.startswith("decoder."))
    state["model"]["weights"][name].fill_(torch.nan)
    torch.save(state, tmp_path / "diverged.pt")
    assert caption(tmp_path / "diverged.pt", cohort, tmp_path / "out.json", *more) == 2
    error = capsys.readouterr().err
    assert "not finite" in error and "diverged" in error
    assert not list(tmp_path.glob("out.json*"))


# -- score -----------------------------------------------------------------------------------


TRUE = {"a": "lung, biopsy; adenocarcinoma", "b": "colon, biopsy; adenoma", "c": "breast; benign"}
OURS = {"a": "lung, biopsy; adenocarcinoma", "b": "colon; tubular adenoma", "c": "lung; benign"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    ours, true = tmp_path / "ours.json", tmp_path / "true.csv"
    ours.write_text(json.dumps([{"id": k, "report": v} for k, v in OURS.items()]))
    true.write_text("case_id,text\n" + "".join(f'{k},"{v}"\n' for k, v in reversed(TRUE.items())))
    return ours, true


def test_scores_of_two_files(files, tmp_path, capsys) -> None:
    output = tmp_path / "scores.json"
    words = ["score", *files, "--bootstraps", 50, "--output", output, "--format", "markdown"]
    assert main([str(w) for w in words]) == 0
    content = json.loads(output.read_text())
    expected = Scoring().count(list(OURS.values()), list(TRUE.values())).scores()
    assert content["reports"] == 3 and content["scores"].keys() == expected.keys()
    for name, entry in content["scores"].items():
        if entry["value"] is not None:
            assert entry["value"] == pytest.approx(expected[name]), name
    rouge = content["scores"]["rouge_l"]
    assert rouge["lo"] < rouge["value"] < rouge["hi"]
    assert "| rouge_l |" in capsys.readouterr().out.replace("`", "")


def test_score_starts_without_torch(files) -> None:
    code = "import sys; from slidevlm.cli import main; code = main(sys.argv[1:]); "
    code += "sys.exit(code or ('torch' in sys.modules))"
    words = ["score", *files, "--bootstraps", 20]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"meteor_exact_stem" in done.stdout


def test_reg2025_with_an_embedder(files, tmp_path) -> None:
    output = tmp_path / "scores.json"
    words = ["score", *files, "--bootstraps", 0, "--embedder", "tfidf", "--output", output]
    assert main([str(w) for w in words]) == 0
    scores = json.loads(output.read_text())["scores"]
    assert 0 < scores["embedding_similarity"]["value"] < 1 and 0 < scores["reg2025"]["value"] < 1
    assert scores["reg2025"]["lo"] is None


def test_captions_of_a_run_stand_beside_the_truth(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    words = ["score", run / "captions_test.json", "--bootstraps", 0, "--output", output]
    assert main([str(w) for w in words]) == 0
    scores = json.loads(output.read_text())["scores"]
    metrics = json.loads((run / "test.json").read_text())["metrics"]
    for name in ("bleu_4", "rouge_l", "cider", "meteor_exact_stem"):
        assert scores[name]["value"] == pytest.approx(metrics[f"test/captions/{name}"])


@pytest.mark.parametrize("name", ["captions_test.json", "predictions.csv"])
def test_a_file_with_both_sides_beside_references_is_the_generated_reports(
    run: Path, tmp_path: Path, name: str
) -> None:
    """Not its true ones, which would be scored against themselves: all perfect."""
    rows = json.loads((run / "captions_test.json").read_text())
    true = tmp_path / "true.json"
    true.write_text(json.dumps({row["id"]: row["report"] for row in rows}))
    found = []
    for number, words in enumerate([[run / "captions_test.json"], [run / name, true]]):
        output = tmp_path / f"{number}.json"
        assert main(["score", *map(str, words), "--bootstraps", "0", "--output", str(output)]) == 0
        found.append(json.loads(output.read_text())["scores"])
    assert found[0] == found[1] and found[0]["bleu_4"]["value"] < 1


def test_a_file_with_both_sides_that_cannot_be_scored(tmp_path, capsys) -> None:
    alone = tmp_path / "captions.json"
    alone.write_text("[]")
    assert "holds no reports" in failing(["score", alone], capsys)
    entry = {"id": "a", "report": "lung", "generated": "lung"}
    alone.write_text(json.dumps([entry, {**entry, "generated": "colon"}]))
    assert "two different entries for 'a'" in failing(["score", alone], capsys)
    alone.write_text(json.dumps([entry, entry]))
    assert main(["score", str(alone), "--bootstraps", "0"]) == 0
    alone.write_text(json.dumps([{**entry, "id": None}]))
    assert "a list of {id, generated, report}" in failing(["score", alone], capsys)


def test_what_cannot_be_scored(files, tmp_path, capsys) -> None:
    ours, true = files
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"a": "lung", "z": "more"}))
    assert "lacks 2 of the 3" in failing(["score", few, true], capsys)
    assert main(["score", str(few), str(true), "--only-common", "--bootstraps", "0"]) == 0
    assert "2 references have no counterpart" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"x": "lung"}))
    assert "no name in common" in failing(["score", other, true], capsys)
    assert "a list of {id, generated, report}" in failing(["score", ours], capsys)
    assert "is not JSON" in failing(["score", true], capsys)
    assert "neither" in failing(["score", ours, true, "--embedder", "no"], capsys)
    assert "no file" in failing(["score", ours, true, "--clinical", "no.yaml"], capsys)
    assert "meteor-1.5.jar" in failing(["score", ours, true, "--meteor-data", tmp_path], capsys)
    assert "cannot be read" in failing(["score", tmp_path / "no.json", true], capsys)
    assert "--json prints" in failing(["score", ours, true, "--output", "-"], capsys)


def test_the_command_offers_the_ways_to_choose_that_there_are() -> None:
    """It names them itself, so that its help starts without torch."""
    assert cli_use.CHOICES == decoding.CHOICES


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog) -> None:
    import errno
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    caplog.set_level("INFO", "slidevlm")
    with using.Partial(tmp_path / "out.json", {}):
        assert "cannot be locked (No locks available); start the command once" in caplog.text

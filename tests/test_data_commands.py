"""The commands on data as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidevlm.cli import main
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.scan import scan
from slidevlm.data.splits import read_identifiers
from slidevlm.data.synthetic import DemoCohort, synthesize


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return synthesize(tmp_path_factory.mktemp("demo") / "cohort", specimens=40, seed=1)


def words(cohort: DemoCohort, **more: str) -> list[str]:
    """Arguments of a training on the cohort."""
    given = {
        "hdf5_filename": cohort.hdf5,
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": cohort.split("train"),
        "val_split": cohort.split("val"),
        "test_split": cohort.split("test"),
        "model": "coca_tiny",
        "batch_size": 4,
        "workers": 0,
        **more,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_check_of_a_sound_cohort(cohort, tmp_path, capsys):
    labels = ["--zsc-class-prompt-mapping", str(cohort.prompts("diagnosis"))]
    labels += ["--zsc-specimen-class-mapping", str(cohort.labels("diagnosis"))]
    output = tmp_path / "report"
    assert main(["data", "check", *words(cohort), *labels, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "errors: 0" in shown and "40 of" in shown and str(output / "check.html") in shown
    content = json.loads((output / "check.json").read_text())
    assert content["errors"] == 0 and content["cohort"]["specimens"] == 40
    assert [row["name"] for row in content["splits"]] == ["train", "val", "test"]
    assert content["classes"][0]["name"] == cohort.labels("diagnosis").stem
    page = (output / "check.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page and "diagnosis" in page
    assert sorted(path.name for path in output.iterdir()) == ["check.html", "check.json"]


def test_check_reads_what_probes_and_examples_learn_from(cohort, tmp_path, capsys):
    labels = Path(cohort.labels("diagnosis"))
    command = ["data", "check", *words(cohort), "--probe", "--json"]
    given = ["--zsc-specimen-class-mapping", str(labels)]
    assert main([*command, *given]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["classes"][0]["name"] == labels.stem
    assert not [f for f in content["findings"] if "prompt" in f["message"]]

    bad, broken = tmp_path / "bad.json", tmp_path / "broken.json"
    bad.write_text('{"no such class": ["a"], "nor this": ["b"]}')
    files = ["--few-shot-examples", str(bad)]
    assert main([*command, *given, *files]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    errors = {f["topic"]: f["message"] for f in found if f["level"] == "error"}
    assert errors.keys() == {"few-shot examples"}
    assert "no label file has all of its classes" in errors["few-shot examples"]

    # Which labels examples belong to is not said where these cannot be read.
    broken.write_text("{")
    assert main([*command, "--zsc-specimen-class-mapping", str(broken), *files]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {f["topic"] for f in found if f["level"] == "error"} == {"labels"}


def test_check_reads_the_survival_table(cohort, tmp_path, capsys):
    pytest.importorskip("sksurv")
    table = tmp_path / "bad.csv"
    table.write_text("specimen,days\na,1\n")
    words_of = [
        "data",
        "check",
        *words(cohort),
        "--probe",
        "--survival-table",
        str(table),
        "--json",
    ]
    assert main(words_of) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [f["topic"] for f in found if f["level"] == "error"] == ["survival"]


def test_check_takes_several_classes_of_a_specimen(cohort, tmp_path, capsys):
    known = json.loads(Path(cohort.labels("diagnosis")).read_text())
    (tmp_path / "several.json").write_text(json.dumps({name: [known[name]] for name in known}))
    labels = ["--zsc-class-prompt-mapping", str(cohort.prompts("diagnosis"))]
    labels += ["--zsc-specimen-class-mapping", str(tmp_path / "several.json")]
    assert main(["data", "check", *words(cohort), *labels, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["classes"][0]
    assert table["name"] == "several" and sum(map(sum, table["counts"].values())) == 40


def test_check_takes_a_training_configuration(cohort, tmp_path, capsys):
    config = tmp_path / "training.yaml"
    config.write_text(
        f"hdf5_filename: {cohort.hdf5}\nhdf5_feature_attribute: demo\n"
        f"hdf5_text_attribute: report\ntrain_split: {cohort.split('train')}\n"
        "batch_size: 4\nworkers: 0\nepochs: 3\n"
    )
    assert main(["data", "check", "--config", str(config)]) == 0
    assert "specimens in no split" in capsys.readouterr().out


def test_exit_codes_of_check(cohort, tmp_path, capsys):
    # 1: errors in the data, all of them
    assert main(["data", "check", *words(cohort, train_split=cohort.split("val"))]) == 1
    shown = capsys.readouterr().out
    assert "leakage" in shown and "error: " in shown
    assert main(["data", "check", *words(cohort, batch_size=4000)]) == 1
    assert "error: batches: " in capsys.readouterr().out
    # Even data that cannot be opened is a finding, and does not hide the others.
    texts, broken = tmp_path / "texts.json", tmp_path / "broken.h5"
    texts.write_text("{")
    broken.write_text("no HDF5")
    given = words(cohort, hdf5_filename=broken, text_data_file=texts)
    assert main(["data", "check", *given]) == 1
    shown = capsys.readouterr().out
    assert "texts.json is not JSON" in shown and "broken.h5 cannot be opened" in shown
    # 2: arguments
    for wrong in (["--batch-size", "0"], ["--hdf5_filename", "nothing.h5"], ["--model", "coka"]):
        assert main(["data", "check", *words(cohort), *wrong]) == 2
        assert "slidevlm: error:" in capsys.readouterr().err


def test_check_compares_with_the_model(cohort, tmp_path, capsys):
    from slidevlm.models import zoo

    content = zoo.load("coca_tiny").to_dict() | {"tile_width": 1024}
    (tmp_path / "model.json").write_text(json.dumps(content))
    assert main(["data", "check", *words(cohort, model=tmp_path / "model.json")]) == 1
    assert "the model reads tiles of width 1024, this data has " in capsys.readouterr().out


def test_check_uses_the_tokenizer_and_width_of_a_checkpoint(cohort, tmp_path, capsys):
    from slidevlm.data.tokenizer import Tokenizer
    from slidevlm.models import build_model, from_dict, zoo
    from slidevlm.train import checkpoint as ckpt

    content = zoo.load("coca_tiny").to_dict() | {"tile_width": 7}
    config = from_dict(content, "a model")
    tokenizer = Tokenizer.train(["nothing of these reports"], 259)  # a token a byte
    model = build_model(config, tokenizer.vocab_size, siglip=False)
    state = ckpt.ModelState(
        weights=model.state_dict(),
        config=content,
        tokenizer=tokenizer.to_json(),
        vocab_size=tokenizer.vocab_size,
        siglip=False,
        position_unit="px",
    )
    training = ckpt.TrainState(
        progress=ckpt.Progress(), optimizer={}, scaler={}, random=[], order={}, skipped=0,
        threads=1, config="", metrics={},
    )  # fmt: skip
    ckpt.save(tmp_path / "a.pt", state, training)
    output = ["--output", str(tmp_path / "report")]
    assert main(["data", "check", *words(cohort, pretrained=tmp_path / "a.pt"), *output]) == 1
    shown = capsys.readouterr().out
    assert "the model reads tiles of width 7, this data has " in shown
    assert "the model was trained on positions in px, this data has um" in shown
    checked = json.loads((tmp_path / "report" / "check.json").read_text())
    store = Hdf5Cases(cohort.hdf5, "demo", "report")
    # BOS, EOS, and the space that the first word is read with.
    longest = max(len(store.text(case).encode()) for case in store.cases) + 3
    assert checked["histograms"][1]["edges"][-1] == longest + 1


def test_inspect(cohort, tmp_path, capsys):
    assert main(["data", "inspect", str(cohort.hdf5)]) == 0
    assert "case layout" in capsys.readouterr().out
    np.save(tmp_path / "slide.npy", np.ones((5, 4), np.float32))
    assert main(["data", "inspect", str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["kind"] == "folder" and content["tiles"] == 5
    for path in (tmp_path / "nothing", tmp_path.parent / "empty"):
        (tmp_path.parent / "empty").mkdir(exist_ok=True)
        assert main(["data", "inspect", str(path)]) == 2
        assert "slidevlm: error:" in capsys.readouterr().err


def test_inspect_tells_a_few_of_many_problems(tmp_path, capsys):
    (tmp_path / "tiles").mkdir()
    for number in range(12):
        with h5py.File(tmp_path / "tiles" / f"s{number:02d}.h5", "w") as file:
            file["coords"] = np.zeros((3, 2))
    assert main(["data", "inspect", str(tmp_path / "tiles")]) == 0
    told = capsys.readouterr().out
    assert told.count("no features") == 10 and "... and 2 warnings more" in told
    assert "(none known)" in told
    assert main(["data", "inspect", str(tmp_path / "tiles"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 12


def test_inspect_of_one_bag_tells_its_length_once(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((7, 3), np.float32))
    assert main(["data", "inspect", str(tmp_path / "a.npy")]) == 0
    assert "tiles N       7\n" in capsys.readouterr().out


def test_convert(cohort, tmp_path, capsys):
    target = tmp_path / "out.h5"
    texts = tmp_path / "texts.json"
    with h5py.File(cohort.hdf5) as file:
        names = file["case-index/case_ids"].asstr()[()].tolist()
    texts.write_text(json.dumps({names[0]: "A text from the file."}))
    command = ["data", "convert", str(cohort.hdf5), str(target), "--text-data-file", str(texts)]
    command += ["--workers", "0", "--feature-attribute", "tiles", "--text-attribute", "short"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "--hdf5_feature_attribute tiles --hdf5_text_attribute short\n" in told
    store = Hdf5Cases(target, "tiles", "report")
    before = Hdf5Cases(cohort.hdf5, "demo", "report")
    assert [case.specimen for case in store.cases] == names
    assert store.texts(store.cases[0]) == {
        "report": before.text(before.cases[0]), "short": "A text from the file.",
    }  # fmt: skip
    assert set(store.texts(store.cases[1])) == {"report"}
    assert main(command) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_convert_a_folder_and_a_single_file(tmp_path, capsys):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.full((5, 4), ord(name), np.float32))
    for source, target, specimens in (
        (tmp_path, "folder.h5", ["a", "b"]),
        (tmp_path / "b.npy", "file.h5", ["b"]),
    ):
        target = tmp_path / target
        assert main(["data", "convert", str(source), str(target), "--workers", "0"]) == 0
        told = capsys.readouterr().out
        assert "--hdf5_feature_attribute features --text-data-file REPORTS\n" in told
        store = Hdf5Cases(target, "features")
        assert [case.specimen for case in store.cases] == specimens
        for case in store.cases:
            assert store.read(case, None).features[0, 0] == ord(case.specimen)
        target.unlink()


def test_a_zarr_folder_is_one_slide(tmp_path, capsys):
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    root.create_array("features", data=np.full((5, 4), 3, np.float32), chunks=(2, 4))
    assert main(["data", "inspect", str(tmp_path / "a.zarr"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == 5
    given = [str(tmp_path / "a.zarr"), str(tmp_path / "out.h5"), "--workers", "0"]
    assert main(["data", "convert", *given]) == 0
    store = Hdf5Cases(tmp_path / "out.h5", "features")
    assert [case.specimen for case in store.cases] == ["a"]
    assert (store.read(store.cases[0], None).features == 3).all()
    assert store.facts(store.cases[0]).source == "a.zarr"


def test_a_slide_table_puts_slides_together(tmp_path):
    folder, table = tmp_path / "slides", tmp_path / "slides.csv"
    folder.mkdir()
    for name in ("a", "b", "c"):
        np.save(folder / f"{name}.npy", np.full((2, 4), ord(name), np.float32))
    table.write_text("case_id,slide_id\nx,b\nx,a\ny,c\n")
    given = [str(folder), str(tmp_path / "out.h5"), "--slide-table", str(table)]
    assert main(["data", "convert", *given, "--workers", "0"]) == 0
    store = Hdf5Cases(tmp_path / "out.h5", "features")
    first, second = store.cases
    assert store.read(first, None).features[:, 0].tolist() == [98, 98, 97, 97]
    assert store.read(first, None).slides.tolist() == [0, 0, 1, 1]
    assert store.read(second, None).slides.tolist() == [0, 0]
    given[1] = str(tmp_path / "splits")
    assert main(["data", "split", *given, "--fractions", "0.5", "0.5"]) == 0
    halves = [read_identifiers(tmp_path / "splits" / f"{n}.txt") for n in ("train", "val")]
    assert sorted(halves) == [["x"], ["y"]]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pixels_become_micrometres(tmp_path, capsys, workers):
    """Of files as TRIDENT writes them; the checksums are of what is written."""
    coords = np.array([[0, 1024], [5120, 70_000]])
    for name in ("a", "b"):
        write_trident(tmp_path / "slides" / f"{name}.h5", coords)
    given = ["data", "convert", str(tmp_path / "slides"), str(tmp_path / "out.h5")]
    assert main([*given, "--mpp", "0.25", "--workers", workers]) == 0
    store = Hdf5Cases(tmp_path / "out.h5", "uni")
    for case in store.cases:
        bag = store.read(case, None)
        assert bag.unit == store.facts(case).unit == "um"
        assert bag.positions.tolist() == (coords / 4).tolist()
        assert store.facts(case).tile_size == "256 um"
        found = scan(store, case)
        assert found.verified and found.damaged == ()
    again = ["data", "convert", str(tmp_path / "out.h5"), str(tmp_path / "no.h5"), "--mpp", "0.25"]
    assert main([*again, "--workers", workers]) == 2
    assert "positions in micrometres already; leave --mpp out" in capsys.readouterr().err
    assert not (tmp_path / "no.h5").exists()


def test_what_mpp_cannot_be(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.float32))
    given = ["data", "convert", str(tmp_path / "a.npy"), str(tmp_path / "out.h5"), "--workers", "0"]
    assert main([*given, "--mpp", "0.5"]) == 2
    assert "have no positions; leave --mpp out" in capsys.readouterr().err
    for wrong in ("0", "-1", "nan", "inf"):
        assert main([*given, f"--mpp={wrong}"]) == 2
        assert "--mpp" in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


def write_trident(path: Path, coords: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((len(coords), 8), np.float32)
        file["features"].attrs["encoder"] = "uni"
        file["coords"] = coords
        file["coords"].attrs.update(
            patch_size=512, patch_size_level0=1024, level0_magnification=40, target_magnification=20
        )


def test_several_encoders_must_be_chosen(tmp_path, capsys):
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p", "a", np.ones((2, 3), "f2"), None)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["patients/p/a/conch/features"] = np.ones((2, 5), "f2")
    command = ["data", "convert", str(tmp_path / "a.h5"), str(tmp_path / "b.h5")]
    assert main(command) == 2
    assert "feature attributes conch, uni; choose one by" in capsys.readouterr().err
    command += ["--hdf5_feature_attribute", "conch", "--workers", "0"]
    assert main(command) == 0
    store = Hdf5Cases(tmp_path / "b.h5", "conch")
    assert store.read(store.cases[0], None).features.shape[1] == 5


def test_split(cohort, tmp_path, capsys):
    folder = tmp_path / "splits"
    command = ["data", "split", str(cohort.hdf5), str(folder)]
    command += ["--labels", str(cohort.labels("diagnosis")), "--fractions", "0.6", "0.2", "0.2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    store = Hdf5Cases(cohort.hdf5, "demo")
    patient = {case.specimen: case.patient for case in store.cases}
    splits = [read_identifiers(folder / f"{name}.txt") for name in ("train", "val", "test")]
    assert sorted(name for split in splits for name in split) == sorted(patient)
    owners = [{patient[name] for name in split} for split in splits]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert f"{len(splits[0])}" in shown and "diagnosis" not in shown
    kinds = json.loads(cohort.labels("diagnosis").read_text())
    for kind in set(kinds.values()):
        assert kind in shown
    before = (folder / "train.txt").read_bytes()
    assert main(command) == 2
    assert "choose another folder" in capsys.readouterr().err
    (folder / "val.txt").unlink()
    assert main(command) == 2  # one that exists is enough
    assert (folder / "train.txt").read_bytes() == before
    again = tmp_path / "again"
    assert main([*command[:3], str(again), *command[4:]]) == 0
    assert (again / "train.txt").read_bytes() == before
    assert main(["data", "check", *words(cohort, train_split=again / "train.txt",
                                         val_split=again / "val.txt",
                                         test_split=again / "test.txt")]) == 0  # fmt: skip


def test_split_by_sites_of_a_table(cohort, tmp_path, capsys):
    store = Hdf5Cases(cohort.hdf5, "demo")
    patients = sorted({case.patient for case in store.cases})
    site = {patient: f"h{i % 7}" for i, patient in enumerate(patients)}
    table = tmp_path / "sites.csv"
    table.write_text("patient,Hospital\n" + "".join(f"{p},{s}\n" for p, s in site.items()))
    command = ["data", "split", str(cohort.hdf5), str(tmp_path), "--site-table", str(table)]
    assert main([*command, "--site-column", "hospital", "--fractions", "0.5", "0.5"]) == 0
    owner = {case.specimen: site[case.patient] for case in store.cases}
    halves = [{owner[n] for n in read_identifiers(tmp_path / f"{s}.txt")} for s in ("train", "val")]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 7
    assert not (tmp_path / "test.txt").exists()
    other = [*command[:3], str(tmp_path / "other"), *command[4:]]
    for wrong, message in (
        (["--site-column", "ward"], "has the columns patient, hospital; needed are ward"),
        (["--by-site"], "both name sites"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--site-column", "hospital", "--fractions", "0.5"], "--fractions 0.5: give two"),
        (["--site-column", "hospital", "--fractions", "a"], "invalid float value"),
    ):
        assert main([*other, *wrong]) == 2
        assert message in capsys.readouterr().err
    table.write_text(table.read_text() + f"{patients[0]},elsewhere\n")
    assert main([*other, "--site-column", "hospital"]) == 2
    assert "a patient is not divided" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "argument", "needs"),
    [
        ("convert", "--text-attribute", "--text-data-file; give that too"),
        ("split", "--site-column", "--site-table; give that too"),
    ],
)
def test_arguments_without_effect_are_refused(cohort, tmp_path, capsys, command, argument, needs):
    given = [str(cohort.hdf5), str(tmp_path / "out"), argument, "x"]
    assert main(["data", command, *given]) == 2
    assert needs in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_problem_of_a_commands_arguments_at_once(tmp_path: Path, capsys) -> None:
    command = ["data", "convert", "a", "b", "--workers", "-1", "--chunk-rows", "0"]
    assert main([*command, "--text-data-file", str(tmp_path / "no.json")]) == 2
    message = capsys.readouterr().err
    assert "3 problems with the arguments" in message
    assert "--workers must be at least 0" in message and "--chunk-rows must be" in message


def test_check_real_data(shared, tmp_path, capsys):
    folder = shared / "data/tcga"
    command = ["data", "check", "--hdf5_filename", str(folder / "tcga.h5"), "--workers", "2"]
    command += ["--hdf5_feature_attribute", "hipt_4096", "--hdf5_text_attribute", "diagnosis"]
    for name in ("train", "val", "test"):
        command += [f"--{name}-split", str(folder / f"{name}.txt")]
    command += ["--zsc-class-prompt-mapping", str(folder / "class_prompts_ensemble.json")]
    command += ["--zsc-specimen-class-mapping", str(folder / "specimen_class.json")]
    assert main([*command, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "846 of 846 patients, 920 slides" in shown and "errors: 0" in shown
    assert json.loads((tmp_path / "check.json").read_text())["cohort"]["tiles"] == 38447

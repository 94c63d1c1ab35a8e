"""Files made to do harm: run code, read or write elsewhere, fill the memory, tell a secret.

Each is given to every place that reads such a file. Where a library would do the harm by itself, a
control shows it, so that the test fails when the guard is gone. Links and virtual data in HDF5:
tests/data/formats/test_slides.py and test_hdf5_cases.py; pages in a browser:
tests/report/test_page_in_browser.py and test_check_page.py; the secret of S3 in whole runs:
tests/app/test_syncing.py.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

import slidevlm
from slidevlm import hub, testing
from slidevlm.app.pretrained import read_pretrained
from slidevlm.cli import main
from slidevlm.config import Config, with_values
from slidevlm.data.formats.embeddings import load_embeddings
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.formats.slide_folder import SlideFolder
from slidevlm.data.formats.slide_vectors import write_slide_vectors
from slidevlm.data.reports import read_text_file
from slidevlm.data.slide_table import SlideRow
from slidevlm.data.splits import read_identifiers
from slidevlm.documents import MOST_NODES, DocumentError, json_of, yaml_keys, yaml_of
from slidevlm.errors import ConfigError, SlideVLMError
from slidevlm.eval.prompts import read_examples, read_labels, read_prompts
from slidevlm.eval.stored import load as load_stored
from slidevlm.eval.text_metrics.clinical import read_extractor
from slidevlm.flags import read_yaml
from slidevlm.models import zoo
from slidevlm.remote import Remote
from slidevlm.report.content import RunFiles, content
from slidevlm.train import checkpoint as ckpt


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


# --- pickles ------------------------------------------------------------------------------------

READ_TORCH: dict[str, Callable[[Path], Any]] = {
    "a checkpoint to resume": ckpt.load,
    "the newest of a run": lambda p: ckpt.newest(p.parent),
    "weights": lambda p: read_pretrained(str(p)),
    "a model to use": lambda p: slidevlm.load(p),
    "a Hugging Face folder": lambda p: read_pretrained(str(p.parent)),
    "a folder of bags": lambda p: (store := SlideFolder(p.parent / "bags")).length(store.cases[0]),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("reader", READ_TORCH)
def test_code_in_a_pt_file_is_not_run(tmp_path: Path, reader: str, zipped: bool) -> None:
    ran = tmp_path / "ran"
    evil = {"format": ckpt.FORMAT, "training": {}, "model": {}, "state_dict": {"x": Evil(ran)}}
    folder = tmp_path / "run"
    (folder / "bags").mkdir(parents=True)
    names = ("epoch_1.pt", "pytorch_model.bin", "bags/slide.pt")
    for name in names:
        torch.save(evil, folder / name, _use_new_zipfile_serialization=zipped)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SlideVLMError):
        READ_TORCH[reader](folder / "epoch_1.pt")
    assert not ran.exists()


@pytest.mark.parametrize("reader", [load_stored, load_embeddings])
def test_code_in_an_npz_file_is_not_run(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    path, ran = tmp_path / "a.npz", tmp_path / "ran"
    evil = np.array([Evil(ran)], object)
    names = ("content", "text_embeddings", "specimen_ids", "patient_ids", "tiles", "about")
    np.savez(path, **dict.fromkeys((*names, "image_embedding"), evil))
    with pytest.raises(SlideVLMError):
        reader(path)
    assert not ran.exists()


def test_the_pickles_do_harm_where_they_may(tmp_path: Path) -> None:
    """Control: without the guards each of them would have made its file."""
    for name in ("torch", "legacy", "npz"):
        ran, path = tmp_path / f"{name} ran", tmp_path / name
        if name == "npz":
            np.savez(path, a=np.array([Evil(ran)], object))
            list(np.load(f"{path}.npz", allow_pickle=True).values())
        else:
            torch.save(Evil(ran), path, _use_new_zipfile_serialization=name == "torch")
            torch.load(path, weights_only=False)
        assert ran.exists(), name
        pickle.dumps(Evil(ran))


# --- YAML ---------------------------------------------------------------------------------------

READ_YAML: dict[str, Callable[[Path], Any]] = {
    "--config": read_yaml,
    "--model": lambda p: zoo.load(str(p)),
    "prompts": read_prompts,
    "labels": read_labels,
    "few-shot examples": read_examples,
    "--clinical": read_extractor,
    "tags of weights": lambda p: read_pretrained("a-tag"),
    "the page of a run": lambda p: content([RunFiles("run", p.parent, None)]),
}
# Ten levels of ten aliases: less than 400 bytes that stand for 10 ** 10 texts.
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11)
)
HARMFUL = {
    "a tag that runs code": "a: !!python/object/apply:os.mkdir [{ran}]\nb: c\n",
    "a tag that imports": "a: !!python/module:antigravity\nb: c\n",
    "aliases of aliases": BOMB,
    "an alias within itself": "a: &a [*a, *a]\nb: &b {b: *b}\n",
    "brackets without end": "a: " + "[" * 100_000,
    "nested as deep as can be": "a: " + "[" * 800 + "]" * 800 + "\n",
    "a number that takes long": "a: " + "9" * 400_000 + "\nb: c\n",
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("reader", READ_YAML)
def test_yaml_runs_nothing_and_ends(
    tmp_path: Path, reader: str, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = tmp_path / "config.yaml", tmp_path / "ran"
    path.write_text(HARMFUL[harm].replace("{ran}", str(ran)))
    monkeypatch.setenv("SLIDEVLM_REGISTRY", str(path))
    begun = time.process_time()
    try:
        READ_YAML[reader](path)
    except SlideVLMError as error:
        assert len(str(error)) < 500_000, "nor is it all told again"
    else:  # where every value is text, tags are too, and digits
        assert reader in ("prompts", "labels", "few-shot examples")
        assert harm.startswith(("a tag", "a number"))
    assert time.process_time() - begun < 20
    assert not ran.exists()


def test_the_yaml_does_harm_where_it_may(tmp_path: Path) -> None:
    """Control: the tag makes its file where tags are obeyed; the aliases are what they say."""
    ran = tmp_path / "ran"
    text = HARMFUL["a tag that runs code"].replace("{ran}", str(ran))
    yaml.load(text, Loader=yaml.UnsafeLoader)
    assert ran.exists()
    small = "".join(BOMB.splitlines(keepends=True)[:7])
    assert len(repr(yaml.safe_load(small)["a6"])) > 10**6


def test_what_documents_may_be() -> None:
    assert yaml_of("a: &x [1, NO]\nb: *x\n") == {"a": [1, False], "b": [1, False]}
    assert yaml_of("a: &x [1, NO]\nb: *x\n", texts=True) == {"a": ["1", "NO"], "b": ["1", "NO"]}
    assert yaml_of("") is None and json_of("[1, NaN]")[0] == 1
    assert json_of('{"a": 1, "a": 2}') == {"a": 2}
    assert json_of('{"a": 1, "a": 1}', unique=True) == {"a": 1}
    for text, message in (
        ('{"b": {"a": 1, "a": 2}}', "'a' is given twice, with different values"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("{", "line 1 column 2"),
    ):
        with pytest.raises(DocumentError, match=message):
            json_of(text, unique=True)
    for text, message in (
        ("a: 1\na: 1\n", "'a' is given twice"),
        ("b: [{c: {a: 1, a: 2}}]", "'a' is given twice"),
        ("x" * 4_000_001, "write it as JSON"),
        ("a: !!int ''", ""),
        ("a: !!bool x", ""),
        ("a: !!timestamp x", ""),
        ("a: \x01", "special characters"),
        (BOMB, "aliases stand for more than a million"),
        ("a: &a [*a]", "an alias stands within"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ):
        with pytest.raises(DocumentError, match=message):
            yaml_of(text, unique=True)
    for text, message in (
        ("a: " + "[" * 5000, "recursion"),
        ("x" * 4_000_001, "write it as JSON"),
    ):
        with pytest.raises(DocumentError, match=message):
            yaml_keys(text)
    flat = f"a: [{', '.join(['x'] * 1000)}]"
    assert len(yaml_of(flat)["a"]) == 1000 < MOST_NODES


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("s.json", read_identifiers),
        ("r.json", read_text_file),
        ("r.jsonl", read_text_file),
        ("p.json", read_prompts),
        ("l.json", read_labels),
        ("e.json", read_examples),
    ],
)
def test_json_nested_without_end(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    for text in ("[" * 200_000, '{"a":' * 200_000):
        (tmp_path / name).write_text(text)
        with pytest.raises(SlideVLMError, match="nested too deeply"):
            read(tmp_path / name)


# --- names that lead elsewhere ------------------------------------------------------------------

OUT = ("../outside", "../../outside", "/outside", "a/../../outside", "..\\outside")


def test_case_paths_stay_in_their_file(tmp_path: Path) -> None:
    """A path is one of HDF5's: `..` is no folder there, and nothing beside the file is opened."""
    path = tmp_path / "in/cohort.h5"
    path.parent.mkdir()
    with h5py.File(tmp_path / "outside", "w") as file:
        file["patients/p/s/uni/features"] = np.ones((2, 3), "f4")
    with h5py.File(path, "w") as file:
        file["patients/p/s/uni/features"] = np.ones((2, 3), "f4")
        names = [f"/patients/p/{out}" for out in OUT]
        file["case-index/case_ids"] = [f"c{i}" for i in range(len(names))]
        file["case-index/case_paths"] = names
    with pytest.raises(SlideVLMError, match=r"cohort\.h5"):
        cases = Hdf5Cases(path, "uni", None)
        for case in cases.cases:
            cases.read(case, None)


@pytest.mark.parametrize("out", OUT)
def test_a_slide_table_names_files_of_the_folder_alone(tmp_path: Path, out: str) -> None:
    for folder in (tmp_path, tmp_path / "in", tmp_path / "in/a"):
        folder.mkdir(exist_ok=True)
        np.save(folder / "slide.npy", np.ones((2, 3), "f4"))
    np.save(tmp_path / "outside.npy", np.ones((2, 3), "f4"))
    table = [SlideRow("s", "p", f"{out}.npy"), SlideRow("t", "q", "a/slide.npy")]
    store = SlideFolder(tmp_path / "in", table)
    first = next(case for case in store.cases if case.specimen == "s")
    assert not store.has_features(first)


@pytest.mark.parametrize("out", [*OUT, 7, None, ["x"]])
def test_an_index_of_weights_names_files_beside_it_alone(tmp_path: Path, out: Any) -> None:
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    for place in (tmp_path, folder.parent):
        torch.save({"x": torch.ones(1)}, place / "outside")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": out}}))
    with pytest.raises(ConfigError, match="no file beside it|no index of weights"):
        hub.weight_files(str(folder), "--model")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 1}', "{", "[" * 100_000])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="no index of weights"):
        hub.weight_files(str(tmp_path), "--model")


@pytest.mark.parametrize("out", [o for o in OUT if "\\" not in o])
def test_a_name_of_a_remote_stays_in_the_run(tmp_path: Path, out: str) -> None:
    pytest.importorskip("fsspec")
    there = tmp_path / "there"
    (there / "run").mkdir(parents=True)
    for place in (there, tmp_path, there / "run"):
        (place / "outside").write_text("harm")
    remote = Remote(there.as_uri(), "fsspec", "run")
    here = tmp_path / "runs/deep/here"
    here.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="would lead out of"):
        remote.get(out if out.startswith("/") else f"x/../{out}", here)
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == []


def test_names_of_specimens_stay_in_the_folder_of_embeddings(tmp_path: Path) -> None:
    names = [*OUT, "a_b", "a/b", "A_B", "x" * 5000, "a\nb", ".", "..", ""]
    folder = tmp_path / "in/embeddings"
    write_slide_vectors(folder, names, np.ones((len(names), 3), np.float32), {})
    files = sorted(folder.iterdir())
    assert len(files) == len(names), "none took another's place"
    assert sorted(tmp_path.rglob("*.h5")) == files
    found = set()
    for file in files:
        with h5py.File(file) as opened:
            found.add(opened["features"].attrs["name"])
    assert found == set(names)


def test_names_of_specimens_stay_in_the_folder_of_pictures(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "slides.h5", "w") as file:
        for name in ("..", "x"):
            file[f"patients/p/{name} ; rm -rf/uni/features"] = np.ones((3, 16), "f4")
    model = testing.run(tmp_path / "model")
    output = tmp_path / "deep/output"
    words = [str(model), str(tmp_path / "slides.h5"), "--output", str(output), "--device", "cpu"]
    assert main(["attention", *words]) == 0
    written = list(tmp_path.rglob("*.csv"))
    assert len(written) == 2 and all(p.parent == output for p in written)
    assert all(re.fullmatch(r"[\w.-]+", p.name) for p in output.iterdir())


# --- large files --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("prompts.json", read_prompts),
        ("prompts.yaml", read_prompts),
        ("labels.yaml", read_labels),
        ("config.yaml", read_yaml),
        ("model.json", lambda p: zoo.load(str(p))),
    ],
)
def test_a_hundred_megabytes_are_refused_at_once(
    tmp_path: Path, name: str, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / name
    line = '"class {i}": "a prompt that is like all the others"'
    with path.open("w") as file:
        opening, end = ("{\n", "}\n") if name.endswith("json") else ("", "")
        file.write(opening)
        for i in range(1_900_000):
            text = line.replace("{i}", str(i))
            file.write(f"{text},\n" if opening else f"{text}\n")
        file.write(f'"x": "y"\n{end}')
    assert path.stat().st_size > 100_000_000
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    with pytest.raises(SlideVLMError, match=r"MB are too many|are too many for YAML"):
        read(path)
    assert time.process_time() - begun < 5
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / 1024
    assert grown < 400, f"{grown:.0f} MB"


# --- secrets ------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_in_what_a_run_tells_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "xSECRETx-one",
        "AWS_SESSION_TOKEN": "xSECRETx-two",
        "WANDB_API_KEY": "xSECRETx-three" + "0" * 26,
        "HF_TOKEN": "xSECRETx-four",
        "HUGGING_FACE_HUB_TOKEN": "xSECRETx-five",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    made = slidevlm.train({**testing.settings(tmp_path), "debug": True}).folder
    assert made is not None
    assert slidevlm.evaluate(made).folder is not None
    assert main(["doctor"]) in (0, 1, 2)
    told = "".join(capfd.readouterr())
    assert "saved " in told and "xSECRETx" not in told
    for file in (f for f in made.rglob("*") if f.is_file()):
        assert b"xSECRETx" not in file.read_bytes(), file


def test_no_secret_is_in_the_error_of_a_remote_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The service repeats what it was given; nobody listens at the address."""
    pytest.importorskip("s3fs")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, f"xSECRETx{name}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://xSECRETxAWS_SECRET_ACCESS_KEY.invalid:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    settings = {**testing.settings(tmp_path), "debug": True, "name": "a"}
    settings["remote_sync"] = "s3://bucket/runs"
    with pytest.raises(ConfigError, match="--remote-sync s3://bucket/runs") as caught:
        slidevlm.train(settings)
    told = "".join(capfd.readouterr()) + str(caught.value)
    assert "xSECRETx" not in told
    assert os.environ["AWS_SESSION_TOKEN"].startswith("xSECRETx"), "it was there to be told"
    assert Config() == with_values(Config(), {})

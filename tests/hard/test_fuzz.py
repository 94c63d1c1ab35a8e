"""Every parser of users' files on whatever a file may hold: a value, or an error of ours that
names the file. No other exception, no crash, no hang.

Valid files are changed: bytes flipped, cut out, repeated, put in from elsewhere, words that parsers
stumble over put in. A few seconds in all by default; `make hard` takes ten minutes
($SLIDEVLM_FUZZ_SECONDS), with another seed each time ($SLIDEVLM_FUZZ_SEED repeats one). Containers
of features have a fuzzer of their own, in tests/data/formats/test_damage.py.
"""

from __future__ import annotations

import faulthandler
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import sys
import time
import types
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from slidevlm import testing
from slidevlm.app.pretrained import read_pretrained
from slidevlm.app.trained import restore
from slidevlm.cli import main
from slidevlm.config import Config, validate, with_values
from slidevlm.data.formats.case_folders import CaseFolders
from slidevlm.data.formats.embeddings import Embeddings, load_embeddings, save_embeddings
from slidevlm.data.reports import read_text_file
from slidevlm.data.slide_table import read_slide_table
from slidevlm.data.splits import read_identifiers
from slidevlm.data.synthetic import synthesize
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import SlideVLMError
from slidevlm.eval.prompts import read_examples, read_labels, read_prompts
from slidevlm.eval.stored import load as load_stored
from slidevlm.eval.survival import read_survival
from slidevlm.eval.text_metrics.clinical import read_extractor
from slidevlm.flags import parse_config, read_yaml
from slidevlm.models import zoo
from slidevlm.remote import Remote
from slidevlm.report.content import RunFiles, content
from slidevlm.train import checkpoint as ckpt

SECONDS = float(os.environ.get("SLIDEVLM_FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("SLIDEVLM_FUZZ_SEED", "0"))
HANG_SECONDS = 180  # a busy machine is slow; what hangs does so for ever

# What parsers stumble over.
WORDS = [
    *(b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b"\t"),
    *(b'"', b"'", b"\\", b",", b";", b":", b"- ", b"{", b"}", b"[", b"]", b"{}", b"[]", b"()"),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"0x", b"9" * 5000, b"true", b"NO", b"~"),
    *(b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b"&a ", b"*a", b"<<: *a", b"? ", b"%YAML 9.9\n"),
    *(b"!!int ", b"!!float ", b"!!bool x", b"!!timestamp x", b"!!binary =", b"!!python/name:os.x"),
    *(b"!!set ", b"!!omap ", b"2001-99-99", b"1:99:99", b"=", b"|\n", b">-\n", b"---\n", b"..."),
    *(
        b"__proto__",
        b"../",
        b"..\\",
        b"/etc/passwd",
        b"%s%n",
        b"${x}",
        b"\xe2\x80\xa8",
        b"\xf0\x9f",
    ),
    *(
        "\u0130\u0131\u00df\u2028\u202e".encode(),
        b"PK\x03\x04",
        b"\x93NUMPY",
        b"\x80\x04",
        b"cos\n",
    ),
]
# An edit: what is done, where (a share of the length), how much, and with which word.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "end", "repeat", "word", "over", "move")),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 40),
        st.sampled_from(WORDS),
    ),
    min_size=0,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    for how, share, size, word in edits:
        at = int(share * (len(content) + 1))
        if how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << size % 8]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at] + content[at + size :]
        elif how == "end":
            content = content[:at]
        elif how == "repeat":
            content = content[:at] + content[at : at + size] * 3 + content[at + size :]
        elif how == "word":
            content = content[:at] + word + content[at:]
        elif how == "over":
            content = content[:at] + word + content[at + len(word) :]
        elif how == "move":
            content = content[at:] + content[:at]
    return content


# --- the parsers and a valid file of each -------------------------------------------------------


def _config(path: Path) -> None:
    validate(with_values(Config(), read_yaml(path)))


def _words(path: Path) -> None:
    """A command line: a word a line."""
    words = path.read_bytes().decode(errors="surrogateescape").split("\n")
    validate(parse_config(words)[0])


def _score(path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["score", str(path)])
    assert code in (0, 2), code
    assert "Traceback" not in err.getvalue(), err.getvalue()


def _record(path: Path) -> None:
    """What a remote says it has."""
    remote = Remote(path.parent.as_uri(), "fsspec", path.parent.name)
    remote.__dict__["_root"] = str(path.parent)
    remote.record()


def _page(path: Path) -> None:
    content([RunFiles("run", path.parent, None)])


def _cases(path: Path) -> None:
    CaseFolders(path.parent.parent)


def _use(path: Path) -> None:
    """Weights that become a model."""
    found = read_pretrained(str(path))
    if found.state is not None:
        restore(found.state)


REPORTS = {f"p{i}": {f"s{i}": f"Lung, biopsy {i}: adenocarcinoma."} for i in range(4)}
FLAT = {specimen: text for patient in REPORTS.values() for specimen, text in patient.items()}
ROWS = [{"id": name, "report": text} for name, text in FLAT.items()]
PROMPTS = {"lung": ["lung", "a tumour of the lung"], "kidney": "kidney"}
CONCH = {"0": {"classnames": {"a": ["x", "y"], "b": ["z"]}, "templates": ["CLASSNAME.", "of {}"]}}
LABELS = {"s0": "lung", "s1": "kidney", "p3": {"s3": "lung"}}
TABLE = "case_id,slide_id,patient\nc1,a.h5,p1\nc1,b.h5,p1\nc2,c.h5,p2\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


TEXTS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "split.txt": (b"s1, s2\ns3\n s4 ,,\n", read_identifiers),
    "split.json": (b'["s1", "s2", 3]', read_identifiers),
    "split.csv": (b'specimen;other\n"s 1";2\ns2;3\n', read_identifiers),
    "reports.json": (_json(REPORTS), read_text_file),
    "rows.json": (_json(ROWS), read_text_file),
    "reports.jsonl": (b"\n".join(json.dumps(r).encode() for r in ROWS), read_text_file),
    "reports.csv": (b'id,report\ns1,"Lung, ""left"".\nNo tumour."\ns2,x\n', read_text_file),
    "reports.tsv": (b"slide_id\ttext\ns1\tLung.\ns2\tKidney.\n", read_text_file),
    "slides.csv": (TABLE.encode(), read_slide_table),
    "slides.tsv": (TABLE.replace(",", "\t").encode(), read_slide_table),
    "prompts.json": (_json(PROMPTS), read_prompts),
    "conch.json": (_json(CONCH), read_prompts),
    "prompts.yaml": (b"prompts:\n  NO: [x, 'y z']\n  b: &b\n    - 01\nother: *b\n", read_prompts),
    "labels.json": (_json(LABELS), read_labels),
    "labels.yaml": (b"s1: lung\ns2: [lung, kidney]\n", read_labels),
    "labels.csv": (b"specimen,label\ns1,lung\ns2,kidney\n", read_labels),
    "examples.json": (_json({"lung": ["s1", "s2"], "kidney": ["s3"]}), read_examples),
    "config.yaml": (b"epochs: 3\nlr: 5e-4\naug_cfg: {transform_type: random_flip}\nlogs: null\n"
                    b"val-split: [a, b]\nsiglip: true\nname: x\n", _config),
    "words.txt": (b"--lr\n5e-4\n--aug-cfg\np=0.5\na=b=c\n--val_split\nx\ny\n--siglip", _words),
    "model.json": (_json(zoo.load("coca_tiny").to_dict()), lambda p: zoo.load(str(p))),
    "model.yaml": (b"family: clip\nslide: {type: mean, width: 8}\ntext:\n  type: scratch\n",
                   lambda p: zoo.load(str(p))),
    "captions.json": (_json([{"id": n, "report": t, "generated": t} for n, t in FLAT.items()]),
                      _score),
    "survival.csv": (b"patient,time,event\np1,3.5,1\np2,10,0\n", read_survival),
    "clinical.yaml": (b"fields:\n  side:\n    roman: true\n    values: {l: 'l', 'p{1}': '(x)'}\n",
                      read_extractor),
    "run/.remote_sync.json": (_json({"url": "x", "files": {"a.txt": [3, 5]}}), _record),
    "run/config.yaml": (b"epochs: 3\nname: x\nval_split: [a]\n", _page),
    "run/metrics.jsonl": (b'{"kind": "train", "step": 1, "epoch": 1.0, "loss": 2.5}\n' * 3, _page),
    "data_1/feature_information.txt": (
        b"[\"a.ndpi\"]\n{\"patient\": \"p\", \"specimen\": \"s\"}\n'1.pth'\n", _cases
    ),
    "tokenizer.json": (b"", lambda p: Tokenizer.from_json(p.read_text(errors="replace"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files that the package writes itself."""
    folder = tmp_path_factory.mktemp("binaries")
    import slidevlm

    made = slidevlm.train({**testing.settings(folder), "epochs": 1}).folder
    assert made is not None
    exported = testing.run(folder / "exported")
    vectors = np.ones((2, 3), np.float32)
    for ending in ("h5", "npz", "parquet"):
        some = Embeddings(("a", "b"), ("p", "p"), np.array([1, 2]), vectors, {"model": "x"})
        save_embeddings(folder / f"e.{ending}", some)
        yes = load_embeddings(folder / f"e.{ending}")
        assert yes.specimen_ids == ("a", "b")
    torch.save({"text.x": torch.ones(2, 3)}, folder / "weights.pt")
    return {
        "checkpoint.pt": (made / "checkpoints/epoch_1.pt").read_bytes(),
        "weights.pt": (folder / "weights.pt").read_bytes(),
        "model.safetensors": (exported / "model.safetensors").read_bytes(),
        "predictions.npz": (made / "predictions.npz").read_bytes(),
        "embeddings.h5": (folder / "e.h5").read_bytes(),
        "embeddings.npz": (folder / "e.npz").read_bytes(),
        "embeddings.parquet": (folder / "e.parquet").read_bytes(),
    }


BINARY: dict[str, Callable[[Path], Any]] = {
    "checkpoint.pt": _use,
    "weights.pt": _use,
    "model.safetensors": _use,
    "predictions.npz": load_stored,
    "embeddings.h5": load_embeddings,
    "embeddings.npz": load_embeddings,
    "embeddings.parquet": load_embeddings,
}
SHARE = SECONDS / (len(TEXTS) + len(BINARY))


def fuzz(path: Path, valid: bytes, parser: Callable[[Path], Any]) -> int:
    """Try changed files until the time is up; how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(valid)
    parser(path)
    until, count, failed = time.monotonic() + SHARE, 0, False

    def attempt(edits: list[tuple[str, float, int, bytes]]) -> None:
        nonlocal count, failed
        if time.monotonic() > until and not failed:  # a failure is looked into to its end
            return
        count += 1
        path.write_bytes(edited(valid, edits))
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            parser(path)
        except SlideVLMError as error:
            failed |= not str(error).strip()
            assert not failed, "it says what is wrong"
        except BaseException:
            failed = True
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    options = settings(
        max_examples=200,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    rounds = random.Random(f"{SEED} {path.name}")
    while time.monotonic() < until:
        seed(rounds.getrandbits(32))(options(given(EDITS)(attempt)))()
    return count


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.timeout(400 + 4 * SHARE)
@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valid, parser = TEXTS[name]
    if name == "tokenizer.json":
        valid = Tokenizer.train(list(FLAT.values()), 280).to_json().encode()
    if name.startswith("data_1"):
        (tmp_path / "data_1/extracted_features").mkdir(parents=True)
        torch.save(torch.ones(2, 3), tmp_path / "data_1/extracted_features/1.pth")
    if parser is read_survival and importlib.util.find_spec("sksurv") is None:
        there = types.ModuleType("sksurv")
        there.__spec__ = importlib.machinery.ModuleSpec("sksurv", None)
        monkeypatch.setitem(sys.modules, "sksurv", there)  # reading the table does not use it
    path = tmp_path / name
    if parser in (_config, _words):
        # Complete, so that what is wrong is what was changed; with `validate` refusing the rest.
        cohort = synthesize(tmp_path / "cohort", specimens=20, seed=1)
        (tmp_path / "a").write_text("x")
        given = {"hdf5_filename": cohort.hdf5, "hdf5_feature_attribute": "demo",
                 "hdf5_text_attribute": "report", "train_split": cohort.split("train")}  # fmt: skip
        lines = [f"{key}: {value}" for key, value in given.items()]
        if parser is _words:
            lines = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        valid = "\n".join(lines).encode() + b"\n" + valid
        monkeypatch.chdir(tmp_path)
        for split in ("a", "b", "x", "y"):
            (tmp_path / split).write_text("s")
        if parser is _words:
            valid = valid.replace(b"p=0.5\na=b=c", b"transform_type=random_flip\nprobability=0.5")
    if path.parent.name == "run":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.yaml").write_text("epochs: 1\n")
        (tmp_path / "run/metrics.jsonl").write_text('{"kind": "train", "step": 1, "epoch": 1.0}\n')
    print(f"{name}: {fuzz(path, valid, parser)} files")


@pytest.mark.timeout(500 + 4 * SHARE)
@pytest.mark.parametrize("name", BINARY)
def test_binaries(name: str, binaries: dict[str, bytes], tmp_path: Path) -> None:
    print(f"{name}: {fuzz(tmp_path / name, binaries[name], BINARY[name])} files")


def test_a_fault_would_be_found(tmp_path: Path) -> None:
    def faulty(path: Path) -> None:
        if path.read_bytes() != b'["s1", "s2"]':
            raise RecursionError

    with pytest.raises(RecursionError):
        fuzz(tmp_path / "x.json", b'["s1", "s2"]', faulty)


STRANGE = (None, 0, -1, True, 2.5, "", "\x00", "x", [], {}, [None], {"a": None}, torch.ones(2))


def test_a_checkpoint_with_strange_parts(binaries: dict[str, bytes], tmp_path: Path) -> None:
    """Whole, with right checksums, and one part of it something else than it should be."""
    path = tmp_path / "c.pt"
    path.write_bytes(binaries["checkpoint.pt"])
    whole = torch.load(path, weights_only=True)
    found = {}
    for part in ("weights", "config", "tokenizer", "vocab_size", "siglip", "position_unit"):
        for value in STRANGE:
            changed = {**whole, "model": {**whole["model"], part: value}}
            torch.save(changed, path)
            try:
                restore(ckpt.load(path)[0])
            except SlideVLMError:
                continue
            except Exception as error:
                found[part, repr(value)] = f"{type(error).__name__}: {error}"
    assert found == {}

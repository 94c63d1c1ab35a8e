"""Each guard against files made to do harm: the attack works without it, and fails with it.

An attack tells whether the harm was done. It is made twice, as the program is and with the guard
taken away by hand, so that neither an attack that was never one nor a guard that does nothing
passes. docs/security.md lists them all; tests/test_security.py holds it to this file.
"""

from __future__ import annotations

import builtins
import html
import http.server
import json
import math
import os
import pickle
import resource
import signal
import struct
import threading
import tracemalloc
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h5py
import numpy as np
import pytest
import torch
import yaml

import slidevlm.data.formats.case_folders as case_folders
import slidevlm.models.files as files
from slidevlm import documents, hub, remote, run
from slidevlm.app.page import write_page
from slidevlm.batch import Predictions
from slidevlm.cli import main
from slidevlm.data.check import CheckReport, ClassTable, Cohort, Histogram
from slidevlm.data.formats import (
    embeddings,
    hdf5,
    npy,
    safetensors,
    slide_folder,
    slide_vectors,
    torch_files,
    zarr_folders,
)
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.formats.slides import open_bags
from slidevlm.data.slide_table import SlideRow
from slidevlm.errors import SlideVLMError
from slidevlm.eval import prompts, stored
from slidevlm.eval.scores import Score
from slidevlm.eval.text_metrics import embedders
from slidevlm.models.text import huggingface
from slidevlm.report import check_page, plain, run_page, tables
from slidevlm.train import checkpoint as ckpt

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Guard:
    """What would be done to a user, and how the guard against it is taken away."""

    attack: Callable[[Path], bool]  # given an empty folder: whether the harm was done
    remove: Callable[[Patch], None]


# --- tools --------------------------------------------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


class Loosened:
    """A module but for some of its functions."""

    def __init__(self, module: Any, **changed: Any) -> None:
        self._module, self._changed = module, changed

    def __getattr__(self, name: str) -> Any:
        return self._changed[name] if name in self._changed else getattr(self._module, name)


def replaced(place: Any, name: str, value: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(place, name, value)


def same(value: Any, *_: Any, **__: Any) -> Any:
    return value


@contextmanager
def refused() -> Iterator[None]:
    """What the program says of a file is no matter here, only what the file has done."""
    with suppress(SlideVLMError, OSError, ValueError, TypeError, KeyError, AttributeError):
        yield


class Late(BaseException):
    """Not to be taken for an error of what was interrupted."""


def hangs(work: Callable[[], Any], seconds: float = 1.5) -> bool:
    """Whether it is still at it after so many seconds of computing."""

    def stop(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again and again: what is raised within a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        with refused():
            work()
    except Late:
        return True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return False


def is_killed(work: Callable[[], Any]) -> bool:
    """Whether it is still at it, in C, after a second of computing in a process of its own."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        with suppress(BaseException):
            work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def takes(work: Callable[[], Any], most: float) -> bool:
    """Whether it holds more than `most` bytes at a time."""
    tracemalloc.start()
    try:
        with refused():
            work()
        return tracemalloc.get_traced_memory()[1] > most
    finally:
        tracemalloc.stop()


def written(folder: Path, work: Callable[[], Any]) -> set[Path]:
    """The files that it has made in a folder or below."""
    before = set(folder.rglob("*"))
    with refused():
        work()
    return {path for path in set(folder.rglob("*")) - before if path.is_file()}


# --- pickles ------------------------------------------------------------------------------------


def unpickles(read: Callable[[Path], Any]) -> Callable[[Path], bool]:
    """Attack: code in a file of torch.save."""

    def attack(folder: Path) -> bool:
        ran, path = folder / "ran", folder / "epoch_1.pt"
        torch.save({"features": torch.ones(2, 3), "state_dict": {"x": Evil(ran)}}, path)
        with refused():
            read(path)
        return ran.exists()

    return attack


def torch_runs(place: Any, runs: Callable[[dict[str, Any]], bool]) -> Callable[[Patch], None]:
    """Let torch.load run code in a module, for the calls with such arguments."""

    def load(*words: Any, **options: Any) -> Any:
        return torch.load(*words, **{**options, "weights_only": not runs(options)})

    return replaced(place, "torch", Loosened(torch, load=load))


def inflates(read: Callable[[Path], Any]) -> Callable[[Path], bool]:
    """Attack: a file of torch.save of 100 kB, of which a member stands for 20 MB."""

    def attack(folder: Path) -> bool:
        plain, path = folder / "plain", folder / "epoch_1.pt"
        torch.save({"features": torch.ones(2, 3), "text": " " * 20_000_000}, plain)
        with (
            zipfile.ZipFile(plain) as source,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for name in source.namelist():
                target.writestr(name, source.read(name))
        assert path.stat().st_size < 100_000
        return takes(lambda: read(path), 15_000_000)

    return attack


def npz_unpickles(read: Callable[[Path], Any]) -> Callable[[Path], bool]:
    def attack(folder: Path) -> bool:
        path, evil = folder / "a.npz", np.array([Evil(folder / "ran")], object)
        np.savez(path, content=evil, specimen_ids=evil)
        with refused():
            read(path)
        return (folder / "ran").exists()

    return attack


def numpy_runs(place: Any) -> Callable[[Patch], None]:
    def load(path: Path, **_: Any) -> Any:
        return np.load(path, allow_pickle=True)

    return replaced(place, "np", Loosened(np, load=load))


def zarr_unpickles(folder: Path) -> bool:
    zarr = pytest.importorskip("zarr")
    path, ran = folder / "a.zarr", folder / "ran"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.create_array("features", data=np.ones((2, 3), "f4"))
    described = json.loads((path / "features/.zarray").read_text())
    described |= {"compressor": {"id": "pickle", "protocol": 4}, "filters": None}
    (path / "features/.zarray").write_text(json.dumps(described))
    for chunk in path.glob("features/[0-9]*"):
        chunk.write_bytes(pickle.dumps(Evil(ran)))
    # Of late zarr finds the type wrong and numcodecs refuses; older versions do neither.
    metadata = pytest.importorskip("zarr.core.metadata.v2")
    pickles = pytest.importorskip("numcodecs.pickles")
    with refused(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "get_object_codec_id", lambda _: None, raising=False)
        patch.setattr(pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
        open_bags(path)["a"].read(None)
    return ran.exists()


def says_yes(work: Callable[[], Any]) -> None:
    """transformers asks whether to run the code of a folder; here somebody always agrees."""
    with pytest.MonkeyPatch.context() as patch, refused():
        patch.setattr(builtins, "input", lambda *_: "y")
        work()


def evil_model(folder: Path) -> Path:
    """A folder of a model whose code makes the file `ran` beside it."""
    place = folder / "model"
    place.mkdir()
    classes = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    (place / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    (place / "evil.py").write_text(code)
    return place


def code_of_a_folder(tokenizer: bool) -> Callable[[Path], bool]:
    """Attack: a model's own code, with a plain tokenizer or without."""

    def attack(folder: Path) -> bool:
        transformers = pytest.importorskip("transformers")
        place = evil_model(folder)
        if tokenizer:
            (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
            transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(place)
        says_yes(lambda: embedders.embedder(str(place), ["a text"]))
        return (folder / "ran").exists()

    return attack


def code_of_a_text_tower(folder: Path) -> bool:
    pytest.importorskip("transformers")
    place = evil_model(folder)
    architecture = {"model_type": "bert", "auto_map": {"AutoModel": f"{place}--evil.M"}}
    config = huggingface.HuggingFaceConfig(source=str(place), architecture=architecture)
    says_yes(lambda: huggingface._build(config))
    return (folder / "ran").exists()


def towers_are_trusted(patch: Patch) -> None:
    """Both at once: either alone is enough."""
    import transformers

    found = transformers.AutoModel.from_config

    def whole(config: huggingface.HuggingFaceConfig) -> Any:
        content = {k: v for k, v in config.architecture.items() if k != "model_type"}
        return transformers.AutoConfig.for_model(config.architecture["model_type"], **content)

    def build(config: Any, **_: Any) -> Any:
        return found(config, trust_remote_code=True)

    patch.setattr(huggingface, "_published_config", whole)
    patch.setattr(transformers.AutoModel, "from_config", build)


def transformers_asks(name: str) -> Callable[[Patch], None]:
    """Nothing is said to a class of transformers of code in the folder."""

    def remove(patch: Patch) -> None:
        kind = getattr(pytest.importorskip("transformers"), name)
        found = kind.from_pretrained

        def read(*words: Any, **options: Any) -> Any:
            options.pop("trust_remote_code")
            return found(*words, **options)

        patch.setattr(kind, "from_pretrained", read)

    return remove


# --- HDF5 ---------------------------------------------------------------------------------------

SECRET = 4321.0


def elsewhere(folder: Path) -> Path:
    path = folder / "outside.h5"
    with h5py.File(path, "w") as file:
        # Compressed: plain data would be read at their place, but out of the file with the link.
        file.create_dataset("secret", data=np.full((1, 3), SECRET, "f4"), compression="gzip")
    return path


def hdf5_leads(way: str) -> Callable[[Path], bool]:
    """Attack: features of a file of cases that are another file's content."""

    def attack(folder: Path) -> bool:
        outside, path = elsewhere(folder), folder / "cohort.h5"
        place = "patients/p/s/uni/features"
        with h5py.File(path, "w") as file:
            if way == "external link":
                file[place] = h5py.ExternalLink(str(outside), "/secret")
            elif way == "soft link":
                file["away"] = h5py.ExternalLink(str(outside), "/secret")
                file[place] = h5py.SoftLink("/away")
            elif way == "virtual":
                layout = h5py.VirtualLayout((1, 3), "f4")
                layout[:] = h5py.VirtualSource(str(outside), "/secret", (1, 3))
                file.create_virtual_dataset(place, layout)
            else:
                raw = folder / "raw"
                raw.write_bytes(np.full(3, SECRET, "f4").tobytes())
                file.create_dataset(place, (1, 3), "f4", external=[(str(raw), 0, 12)])
        found = None
        with refused():
            cases = Hdf5Cases(path, "uni")
            found = cases.read(cases.cases[0], None).features
        return found is not None and bool((found == SECRET).all())

    return attack


def embeddings_lead(folder: Path) -> bool:
    path = folder / "e.h5"
    values = embeddings.Embeddings(("s",), ("p",), np.array([1]), np.ones((1, 3), "f4"), {})
    embeddings.save_embeddings(path, values)
    assert embeddings.load_embeddings(path).image_embedding[0, 0] == 1
    with h5py.File(path, "a") as file:
        del file["image_embedding"]
        file["image_embedding"] = h5py.ExternalLink(str(elsewhere(folder)), "/secret")
    found = None
    with refused():
        found = embeddings.load_embeddings(path).image_embedding
    return found is not None and bool((found == SECRET).all())


links_are_followed = replaced(
    hdf5.Hdf5File, "_real", lambda self, path: path if path in self.open() else None
)


def data_lie_anywhere(patch: Patch) -> None:
    patch.setattr(hdf5.Hdf5File, "_dataset_id", lambda self, path: self._id(path))
    patch.setattr(hdf5, "_check_storage", lambda dataset, path: None)


def link_without_end(folder: Path) -> bool:
    with h5py.File(folder / "a.h5", "w") as file:
        file["features"] = h5py.SoftLink("/features")
    return hangs(lambda: hdf5.Hdf5File(folder / "a.h5").exists("/features"), 0.5)


def endless_heap(what: str) -> Callable[[Path], bool]:
    """Attack: free space of a heap that leads to itself, which HDF5 follows until it is killed."""

    def attack(folder: Path) -> bool:
        path = folder / "a.h5"
        with h5py.File(path, "w", libver="earliest") as file:
            file.attrs["unit"] = "um"
            file.create_dataset("names", data=["one"], dtype=h5py.string_dtype())
        content = bytearray(path.read_bytes())
        if what == "names":
            begin = content.index(b"HEAP")
            free, data = struct.unpack_from("<QQ", content, begin + 16)
            struct.pack_into("<Q", content, data + free, free)
        else:
            at = content.index(b"GCOL") + 16
            while struct.unpack_from("<H", content, at)[0]:
                at += 16 + (struct.unpack_from("<Q", content, at + 8)[0] + 7) // 8 * 8
            struct.pack_into("<Q", content, at + 8, 0)
        path.write_bytes(content)
        return is_killed(lambda: read(hdf5.Hdf5File(path)))

    def read(file: hdf5.Hdf5File) -> None:
        if what == "names":
            file.names()
        elif what == "an attribute":
            file.attribute("/", "unit")
        else:
            file.string("/names")

    return attack


# --- names that lead elsewhere ------------------------------------------------------------------


def index_leads(folder: Path) -> bool:
    place = folder / "model"
    place.mkdir()
    (folder / "outside").touch()
    index = {"weight_map": {"x": "../outside"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    found: list[Path] = []
    with refused():
        found = hub.weight_files(str(place), "--model")
    return any(path.resolve().parent != place.resolve() for path in found)


def remote_leads(folder: Path) -> bool:
    pytest.importorskip("fsspec")
    there, here = folder / "there/run", folder / "here/run"
    for place in (there, here):
        place.mkdir(parents=True)
    (folder / "there/outside").write_text("harm")
    copy = remote.Remote((folder / "there").as_uri(), "fsspec", "run")
    made = written(folder, lambda: copy.get("../outside", here))
    return any(here not in path.parents for path in made)


def link_is_copied(folder: Path) -> bool:
    """Attack: a stranger's run whose file is a link to what is none of theirs."""
    pytest.importorskip("fsspec")
    here, there = folder / "here", folder / "there"
    here.mkdir()
    (folder / "secret").write_text("harm")
    (here / "notes.txt").symlink_to(folder / "secret")
    copy = remote.Remote(there.as_uri(), "fsspec", "run")
    remote.Mirror(copy, here).sync()
    return (there / "run/notes.txt").exists()


def links_are_copied(patch: Patch) -> None:
    def files(self: remote.Mirror) -> Iterator[tuple[str, Path]]:
        return iter([(p.name, p) for p in self.folder.iterdir() if not p.name.startswith(".")])

    patch.setattr(remote.Mirror, "_files", files)


def case_index_leads(folder: Path) -> bool:
    tiles = {0: {("s", 0, 0, 0): {"feature": torch.full((3,), SECRET)}}}
    (folder / "root/data_0/extracted_features").mkdir(parents=True)
    torch.save(tiles, folder / "outside.pth")
    names = '["s"]\n{"patient": "p", "specimen": "s"}\n"../../../outside.pth"\n'
    (folder / "root/data_0/feature_information.txt").write_text(names)
    found = None
    with refused():
        store = case_folders.CaseFolders(folder / "root")
        found = store.read(store.cases[0], None).features
    return found is not None and bool((found == SECRET).all())


def slide_table_leads(folder: Path) -> bool:
    (folder / "in").mkdir()
    np.save(folder / "in/slide.npy", np.ones((2, 3), "f4"))
    np.save(folder / "outside.npy", np.full((2, 3), SECRET, "f4"))
    table = [SlideRow("s", "p", "../outside.npy"), SlideRow("t", "q", "slide.npy")]
    store = slide_folder.SlideFolder(folder / "in", table)
    found = None
    with refused():
        found = store.read(next(c for c in store.cases if c.specimen == "s"), None).features
    return found is not None and bool((found == SECRET).all())


def embedding_is_written_elsewhere(folder: Path) -> bool:
    place = folder / "run/embeddings"

    def write() -> None:
        slide_vectors.write_slide_vectors(place, ["../../a"], np.ones((1, 3), np.float32), {})

    return any(place not in path.parents for path in written(folder, write))


def attention_is_written_elsewhere(folder: Path) -> bool:
    from slidevlm import testing

    (folder / "in").mkdir()
    np.save(folder / "in/slide.npy", np.ones((3, 16), "f4"))
    (folder / "slides.csv").write_text("specimen,patient,slide\n../outside,p,slide\n")
    model = testing.run(folder / "model")
    words = ["attention", model, folder / "in", "--slide-table", folder / "slides.csv"]
    words += ["--output", folder / "output/deep", "--device", "cpu"]
    made = written(folder, lambda: main([str(word) for word in words]))
    assert any(path.suffix == ".csv" for path in made), "it has drawn something"
    return any(folder / "output/deep" not in path.parents for path in made)


def as_they_are(patch: Patch) -> None:
    from slidevlm import page_commands

    names = lambda cases: {case.specimen: case.specimen for case in cases}  # noqa: E731
    patch.setattr(page_commands, "_file_names", names)


def predictions(name: str) -> stored.Stored:
    """Stored predictions of one split of three specimens."""
    vectors = np.eye(3, dtype=np.float32)
    split = Predictions(
        specimen_ids=("a", "b", "c"),
        patient_ids=("a", "b", "c"),
        reports=("one", "two", "three"),
        report_ids=np.arange(3),
        image_embedding=vectors,
        text_embedding=vectors,
        logit_scale=1.0,
        losses={},
    )
    about = {"model_hash": "none", "versions": {}}
    return stored.Stored({name: split}, {}, (), np.zeros((0, 3), np.float32), about)


def split_leads(folder: Path) -> bool:
    place = folder / "a/b/c"
    stored.save(predictions("../../../outside"), place / "predictions.npz")
    words = ["evaluate", "--predictions", str(place / "predictions.npz"), "--save-embeddings"]
    made = written(folder, lambda: main(words))
    return any(place not in path.parents for path in made)


# --- YAML, and files too large ------------------------------------------------------------------


def tag_runs(texts: bool) -> Callable[[Path], bool]:
    def attack(folder: Path) -> bool:
        ran = folder / "ran"
        with refused():
            documents.yaml_of(f"a: !!python/object/apply:os.mkdir [{ran}]\nb: c\n", texts=texts)
        return ran.exists()

    return attack


def aliases_explode(_: Path) -> bool:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    found = None
    with refused():
        found = documents.yaml_of("\n".join(lines))
    return found is not None and len(repr(found["a6"])) > 10**6


def alias_is_within_itself(_: Path) -> bool:
    found = None
    with refused():
        found = documents.yaml_of("a: &a [*a]")
    return found is not None and found["a"][0] is found["a"]


def yaml_is_slow(_: Path) -> bool:
    text = "a: b\n" * 1_000_000
    return hangs(lambda: documents.yaml_of(text)) or hangs(lambda: documents.yaml_keys(text))


def large_prompts(folder: Path) -> bool:
    path = folder / "prompts.json"
    path.write_text(json.dumps({f"class {i}": "a prompt " * 2000 for i in range(1200)}))
    return takes(lambda: prompts.read_prompts(path), 20e6)


def large_labels(folder: Path) -> bool:
    path = folder / "labels.json"
    with path.open("wb") as file:
        file.truncate(257_000_000)
    return takes(lambda: prompts.read_labels(path), 250e6)


def large_header(folder: Path) -> bool:
    path = folder / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 150_000_000) + b"{")
        file.truncate(150_000_100)
    return takes(lambda: open_bags(path)["a"].read(None), 120e6)


def large_numpy_header(folder: Path) -> bool:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1, ' * 200_000}), }}".encode()
    path = folder / "a.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header)
    return takes(lambda: open_bags(path)["a"].read(None), 20e6)


# --- pages --------------------------------------------------------------------------------------

MARK = "</script></title><b id=harm>x</b><!-- \u2028"


class Tags(HTMLParser):
    """The elements of a page, and where the first script ends."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def acts(page: str) -> bool:
    return "b" in Tags(page).found


def page_of_a_run(name: str) -> str:
    return run_page.render({"runs": [{"name": name}]}, "var Plotly;")


def check_of(where: str) -> CheckReport:
    """A report of a check with the mark in one place."""
    a = {key: MARK if key == where else "a" for key in CHECKED}
    report = CheckReport(
        cohort=Cohort(a["path"], 1, 1, 1, 1, (1, 1, 1), (a["format"],), (6,), (), (), (), 0),
        histograms=[Histogram(a["title"], a["unit"], (1.0, 10.0), {a["split"]: (1,)}, 5.0)],
        classes=[ClassTable(a["labels"], (a["class"],), {a["split"]: (2,)})],
    )
    report.add("error", a["topic"], a["message"], [a["item"]])
    return report


CHECKED = (
    "path", "format", "title", "unit", "split", "labels", "class", "topic", "message", "item",
)  # fmt: skip


def check_acts(_: Path) -> bool:
    return any(acts(check_page.page(check_of(where), "var Plotly;")) for where in CHECKED)


def check_data_act(_: Path) -> bool:
    """As a text of a plot, which the escape for HTML would hide."""
    return "</script>" in check_page._script({"x": MARK}) or "\u2028" in check_page._script(MARK)


def check_plots_act(_: Path) -> bool:
    """plotly makes links of what it finds in its texts."""
    figures = [
        figure
        for where in CHECKED
        for figure in (
            *map(check_page._histogram_figure, check_of(where).histograms),
            *map(check_page._class_figure, check_of(where).classes),
        )
    ]
    return "<b id" in json.dumps(figures)


SCRIPT_ENDS = 'var a = "</script><b>x</b>";'


def wandb_page_acts(_: Path) -> bool:
    sink, shown = object.__new__(run.Wandb), []
    sink._wandb = types.SimpleNamespace(Html=shown.append)
    sink._run = types.SimpleNamespace(log=lambda row: None)
    sink.text("a report", 1, MARK)
    return acts(shown[0])


no_escape = Loosened(html, escape=same)


def terminal_is_steered(_: Path) -> bool:
    """Of any table that shows names: \\x1b[2J would wipe the screen."""
    steering = "\x1b[2J"
    score = Score(steering, f"zero_shot/{steering}/f1", 0.5, None, None, 3)
    report = CheckReport()
    report.add("error", steering, steering, [steering])
    told = (
        check_page.terminal(report),
        tables.score_table([score], "table"),
        tables.score_table([score], "markdown"),
        plain.table((steering,), [(steering,)]),
        "\n".join(plain.shortened([steering])),
    )
    return any("\x1b" in text for text in told)


def steering_is_shown(patch: Patch) -> None:
    for module in (plain, check_page, tables):
        patch.setattr(module, "printable", same)


# --- secrets ------------------------------------------------------------------------------------

KEY = "xSECRETx/with+odd"


@contextmanager
def keys(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def remote_tells(_: Path) -> bool:
    """Nobody listens at the address; botocore's error has it."""
    pytest.importorskip("s3fs")
    given = {
        "AWS_SECRET_ACCESS_KEY": "xSECRETx", "AWS_ACCESS_KEY_ID": "a", "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": "http://xSECRETx.invalid:1",
    }  # fmt: skip
    with keys(**given):
        try:
            remote.Remote("s3://bucket/runs", "s3", "run").sizes()
        except Exception as error:
            return "xSECRETx" in remote.told(error)
    raise AssertionError("nobody listens there")


def hub_tells(folder: Path) -> bool:
    """A token with a character that no header may have: httpx says so, and shows the header."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        given = {"HF_TOKEN": "xSECRETx\x0bx", "HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "0"}
        with keys(**given), pytest.MonkeyPatch.context() as patch:
            place = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")[2]
            url = f"http://127.0.0.1:{server.server_port}/{{{place}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            with pytest.raises(SlideVLMError, match="--model") as caught:
                hub.find("owner/name", ["config.json"], "--model")
    finally:
        server.shutdown()
        server.server_close()
    return "xSECRETx" in str(caught.value)


def wandb_tells(folder: Path) -> bool:
    wandb = pytest.importorskip("wandb")

    def init(**_: Any) -> None:
        raise wandb.errors.Error(f"the key {KEY} is refused, in a URL {quote(KEY, safe='')}")

    with keys(WANDB_API_KEY=KEY), pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "init", init)
        with pytest.raises(SlideVLMError, match="--report-to wandb") as caught:
            run.Wandb(folder, run.WandbSettings("p", "", {}))
    return any(form in str(caught.value) for form in (KEY, quote(KEY, safe="")))


# --- the guards ---------------------------------------------------------------------------------

any_name = lambda _: True  # noqa: E731


def tags_run(patch: Patch) -> None:
    for name in ("SafeLoader", "BaseLoader"):
        patch.setattr(yaml, name, yaml.UnsafeLoader)


GUARDS = {
    "checkpoint": Guard(
        unpickles(ckpt.load), torch_runs(ckpt, lambda options: not options.get("mmap"))
    ),
    "order of checkpoints": Guard(
        unpickles(lambda path: ckpt.newest(path.parent)),
        torch_runs(ckpt, lambda options: bool(options.get("mmap"))),
    ),
    "weights": Guard(unpickles(files.read_torch), torch_runs(files, lambda _: True)),
    "bag": Guard(
        unpickles(lambda path: open_bags(path)["epoch_1"].read(None)),
        torch_runs(torch_files, lambda _: True),
    ),
    "compressed checkpoint": Guard(inflates(ckpt.load), replaced(ckpt, "verify_archive", same)),
    "compressed checkpoint among others": Guard(
        inflates(lambda path: ckpt.newest(path.parent)),
        replaced(
            ckpt,
            "verify_archive",
            lambda path, *, whole=True: whole and files.verify_archive(path),
        ),
    ),
    "compressed weights": Guard(
        inflates(files.read_torch), replaced(files, "verify_archive", same)
    ),
    "compressed bag": Guard(
        inflates(lambda path: open_bags(path)["epoch_1"].read(None)),
        replaced(torch_files, "_check_structure", same),
    ),
    "stored predictions": Guard(npz_unpickles(stored.load), numpy_runs(stored)),
    "file of embeddings": Guard(npz_unpickles(embeddings.load_embeddings), numpy_runs(embeddings)),
    "codecs of zarr": Guard(
        zarr_unpickles, replaced(zarr_folders, "_CODECS", {*zarr_folders._CODECS, "pickle"})
    ),
    "folder of a tokenizer": Guard(code_of_a_folder(False), transformers_asks("AutoTokenizer")),
    "folder of a model": Guard(code_of_a_folder(True), transformers_asks("AutoModel")),
    "code of a text tower": Guard(code_of_a_text_tower, towers_are_trusted),
    "external link": Guard(hdf5_leads("external link"), links_are_followed),
    "soft link": Guard(hdf5_leads("soft link"), links_are_followed),
    "virtual dataset": Guard(hdf5_leads("virtual"), data_lie_anywhere),
    "external storage": Guard(hdf5_leads("external storage"), data_lie_anywhere),
    "link of embeddings": Guard(embeddings_lead, links_are_followed),
    "link without end": Guard(link_without_end, replaced(hdf5, "_LINKS_FOLLOWED", math.inf)),
    "heap of names": Guard(endless_heap("names"), replaced(hdf5, "check_group", same)),
    "heap of an attribute": Guard(
        endless_heap("an attribute"), replaced(hdf5, "check_attribute", same)
    ),
    "heap of a dataset": Guard(endless_heap("a dataset"), replaced(hdf5, "check_dataset", same)),
    "index of weights": Guard(index_leads, replaced(hub, "is_file_name", any_name)),
    "remote copy": Guard(
        remote_leads, replaced(remote, "_inside", lambda folder, name: folder / name)
    ),
    "link in a run": Guard(link_is_copied, links_are_copied),
    "index of cases": Guard(case_index_leads, replaced(case_folders, "is_file_name", any_name)),
    "slide table": Guard(
        slide_table_leads,
        replaced(
            slide_folder._Finder, "__call__", lambda self, name: slide_folder.Part(name, None)
        ),
    ),
    "file of a specimen": Guard(
        embedding_is_written_elsewhere, replaced(slide_vectors, "_file_names", list)
    ),
    "picture of a specimen": Guard(attention_is_written_elsewhere, as_they_are),
    "name of a split": Guard(split_leads, replaced(stored, "is_file_name", any_name)),
    "YAML tag": Guard(tag_runs(texts=False), tags_run),
    "YAML tag among texts": Guard(tag_runs(texts=True), tags_run),
    "aliases of aliases": Guard(aliases_explode, replaced(documents, "_count", same)),
    "alias within itself": Guard(alias_is_within_itself, replaced(documents, "_count", same)),
    "long YAML": Guard(yaml_is_slow, replaced(documents, "MOST_YAML", math.inf)),
    "prompts": Guard(large_prompts, replaced(prompts, "size_problem", lambda *_: None)),
    "labels": Guard(large_labels, replaced(prompts, "size_problem", lambda *_: None)),
    "header of safetensors": Guard(large_header, replaced(safetensors, "_HEADER_LIMIT", math.inf)),
    "header of NumPy": Guard(large_numpy_header, replaced(npy, "_HEADER_LIMIT", 10**9)),
    "title of a page": Guard(
        lambda _: acts(page_of_a_run(MARK)), replaced(run_page, "html", no_escape)
    ),
    "data of a page": Guard(
        lambda _: acts(page_of_a_run(MARK)), replaced(run_page, "as_json", json.dumps)
    ),
    "script of a page": Guard(
        lambda _: acts(run_page.render({"runs": [{"name": "a"}]}, SCRIPT_ENDS)),
        replaced(run_page, "closed", same),
    ),
    "script of a check": Guard(
        lambda _: acts(check_page.page(check_of(""), SCRIPT_ENDS)),
        replaced(check_page, "closed", same),
    ),
    "page of a check": Guard(check_acts, replaced(check_page, "html", no_escape)),
    "data of a check": Guard(check_data_act, replaced(check_page, "_script", json.dumps)),
    "plots of a check": Guard(check_plots_act, replaced(check_page, "_label", same)),
    "page in wandb": Guard(wandb_page_acts, replaced(run, "html", no_escape)),
    "names on the terminal": Guard(terminal_is_steered, steering_is_shown),
    "error of a remote": Guard(remote_tells, replaced(remote, "without_secrets", same)),
    "error of the hub": Guard(hub_tells, replaced(hub, "without_secrets", same)),
    "error of wandb": Guard(wandb_tells, replaced(run, "without_secrets", same)),
}


@pytest.mark.parametrize("name", GUARDS)
def test_the_attack_works_without_its_guard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    guard = GUARDS[name]
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    assert not guard.attack(tmp_path / "with"), "the guard does not hold"
    guard.remove(monkeypatch)
    assert guard.attack(tmp_path / "without"), "it was no attack, or something else holds it off"


# --- pages in a browser -------------------------------------------------------------------------

HARM = "<script>window.harm=1</script>"


def looked_at(browser: Any, page: str, path: Path, ask: str) -> Any:
    """The answer of a page that stands."""
    path.write_text(page, encoding="utf-8")
    opened = browser.new_page()
    opened.goto(path.as_uri())
    found = opened.evaluate(ask)
    opened.close()
    return found


PAGES = {
    "policy of a page": (run_page, lambda: page_of_a_run("a")),
    "policy of a check": (check_page, lambda: check_page.page(check_of(""), "var Plotly;")),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_script_that_got_into_a_page_does_not_run(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The policy holds by itself, should one of the escapes be forgotten."""
    module, made = PAGES[name]

    def harmed() -> bool:
        page = made().replace("</body>", f"{HARM}<img src=x onerror=window.harm=1></body>")
        ask = "new Promise(r => setTimeout(() => r(window.harm === 1), 300))"
        return bool(looked_at(browser, page, tmp_path / "page.html", ask))

    assert not harmed()
    monkeypatch.setattr(module, "policy", lambda *_: "")
    assert harmed()


# What page.js makes of a text, and what it would be without a guard; what the page then has.
SCRIPT = {
    "texts of a page": ("node.append(child instanceof Node ? child : "
                        "document.createTextNode(String(child)));",
                        "child instanceof Node ? node.append(child) : "
                        "node.insertAdjacentHTML('beforeend', String(child));"),
    "plots of a page": ("const plain = (text) => String(text).replace", "const plain = (text) => "
                        "String(text); const unused = (text) => String(text).replace"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPT)
def test_texts_of_a_page_are_texts(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A class whose name is a link, in tables and in plots, where plotly would make one of it."""
    pytest.importorskip("plotly")
    folder, kind = tmp_path / "run", "<a href=x>link</a>"
    folder.mkdir()
    row = {"recall": 0.5, "precision": 0.5, "f1": 0.5, "support": 3}
    details = {"classes": ["a", kind], "confusion_matrix": [[2, 1], [1, 2]],
               "per_class": {"a": row, kind: row}}  # fmt: skip
    task = {"split": "test", "task": "zero_shot/x", "details": details}
    value = {"value": 0.5, "lo": None, "hi": None, "n": 6}
    metrics = {"test/zero_shot/x/accuracy": value}
    stored.save(predictions("test"), folder / "predictions.npz")
    (folder / "metrics.json").write_text(json.dumps({"about": {}, "metrics": metrics}))
    (folder / "tasks").mkdir()
    (folder / "tasks/test_zero_shot_x.json").write_text(json.dumps(task))
    (folder / "config.yaml").write_text("epochs: 1\n")

    def links() -> int:
        opened = browser.new_page()
        opened.goto(write_page([folder]).as_uri())
        opened.wait_for_selector("html[data-ready]")
        opened.click("#button-tasks")
        opened.locator("#tab-tasks .plot .main-svg").first.wait_for()
        found = opened.locator("a").evaluate_all("all => all.map(a => a.textContent)")
        opened.close()
        return found.count("link")  # plotly's buttons are links as well

    assert links() == 0
    guard, without = SCRIPT[name]
    script = run_page._file("page.js")
    assert script.count(guard) == 1
    files = {"page.js": script.replace(guard, without)}
    monkeypatch.setattr(run_page, "_file", lambda n, read=run_page._file: files.get(n) or read(n))
    assert links() > 0

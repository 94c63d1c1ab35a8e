"""The demo cohort: the same for the same seed, split by patient, and true to its own truth."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.synthetic import (
    DIAGNOSES,
    FEATURES,
    GRADES,
    TEXT,
    TILE_UM,
    TISSUES,
    DemoCohort,
    SyntheticBag,
    Truth,
    draw_bag,
    draw_prototypes,
    draw_truths,
    synthesize,
    write_report,
)
from slidevlm.errors import DataError

N, SEED = 240, 3
TASKS = ("diagnosis", "grade", "margin")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return synthesize(tmp_path_factory.mktemp("synthetic") / "cohort", specimens=N, seed=SEED)


@pytest.fixture(scope="module")
def truths(cohort: DemoCohort) -> list[Truth]:
    return [Truth(**t) for t in read(cohort.folder / "truth.json")]


@pytest.fixture(scope="module")
def bags(truths: list[Truth]) -> list[SyntheticBag]:
    prototypes = draw_prototypes(SEED)
    return [draw_bag(t, prototypes, SEED) for t in truths]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def tumour_of(bag: SyntheticBag) -> np.ndarray:
    """[N] bool: tumour tiles, dead ones too."""
    kinds = [i for i, name in enumerate(TISSUES) if name in DIAGNOSES or name == "necrosis"]
    return np.isin(bag.tissue, kinds)


def slides_of(bag: SyntheticBag) -> list[tuple[set[tuple[int, int]], set[tuple[int, int]]]]:
    """For each slide: grid places of all tiles, and of tumour tiles."""
    names, tumour = np.array(bag.slides), tumour_of(bag)
    grid = np.rint(bag.positions / TILE_UM).astype(int)
    found = []
    for slide in np.unique(names):
        rows = names == slide
        everything = {(int(x), int(y)) for x, y in grid[rows]}
        found.append((everything, {(int(x), int(y)) for x, y in grid[rows & tumour]}))
    return found


def parts(tiles: set[tuple[int, int]]) -> int:
    """Number of connected parts, diagonal neighbours included."""
    left, count = set(tiles), 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            x, y = stack.pop()
            near = {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            stack += near
    return count


# -- files ---------------------------------------------------------------------------------


def test_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthesize(tmp_path / name, specimens=30, seed=5)
    synthesize(tmp_path / "c", specimens=30, seed=6)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["cohort.h5"] != digests(tmp_path / "c")["cohort.h5"]


def test_the_file_holds_what_was_drawn(
    cohort: DemoCohort, truths: list[Truth], bags: list[SyntheticBag]
) -> None:
    store = Hdf5Cases(cohort.hdf5, FEATURES, TEXT)
    assert [(c.patient, c.specimen) for c in store.cases] == [
        (t.patient, t.specimen) for t in truths
    ]
    for case, truth, drawn in list(zip(store.cases, truths, bags, strict=True))[::20]:
        bag = store.read(case, None)
        np.testing.assert_array_equal(bag.features.numpy(), drawn.features)
        assert bag.positions is not None and bag.slides is not None and bag.unit == "um"
        np.testing.assert_array_equal(bag.positions.numpy(), drawn.positions)
        assert len(bag.slides.unique()) == truth.slides
        assert store.text(case) == write_report(truth, SEED)


def test_width(tmp_path: Path) -> None:
    cohort = synthesize(tmp_path / "narrow", specimens=20, width=16)
    store = Hdf5Cases(cohort.hdf5, FEATURES, TEXT)
    assert store.read(store.cases[0], None).features.shape[1] == 16
    assert "16 wide" in (cohort.folder / "README.md").read_text()


def test_progress_counts_specimens(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(tmp_path / "c", specimens=20, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, 20) for i in range(20)]


def test_a_finished_cohort_is_used_again(tmp_path: Path) -> None:
    first = synthesize(tmp_path / "c", specimens=20)
    written = first.hdf5.stat().st_mtime_ns
    assert synthesize(tmp_path / "c", specimens=20) == first
    assert first.hdf5.stat().st_mtime_ns == written


def test_any_other_folder_is_refused(tmp_path: Path) -> None:
    synthesize(tmp_path / "c", specimens=20)
    with pytest.raises(DataError, match=r"'specimens': 20, 'seed': 0.*choose another folder"):
        synthesize(tmp_path / "c", specimens=20, seed=1)
    (tmp_path / "c" / "settings.json").unlink()  # as an interruption leaves it
    with pytest.raises(DataError, match=r"no whole cohort.*delete this one"):
        synthesize(tmp_path / "c", specimens=20)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        synthesize(tmp_path / "file", specimens=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"specimens": 19}, "at least 20"), ({"specimens": 20, "width": 7}, "at least 8")],
)
def test_too_small(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthesize(tmp_path / "c", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "c").exists()


# -- tables --------------------------------------------------------------------------------


def test_no_patient_is_in_two_splits(cohort: DemoCohort, truths: list[Truth]) -> None:
    patient = {t.specimen: t.patient for t in truths}
    members = {s: cohort.split(s).read_text().split() for s in ("train", "val", "test")}
    assert sorted(s for m in members.values() for s in m) == sorted(patient)
    sets = [{patient[s] for s in m} for m in members.values()]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(members["train"]) > len(members["test"]) > len(members["val"]) > N // 12


def test_some_patients_have_two_specimens() -> None:
    truths = draw_truths(2000, 0)
    patients = [t.patient for t in truths]
    several = sum(patients.count(p) > 1 for p in set(patients)) / len(set(patients))
    assert 0.1 < several < 0.15
    assert len({t.specimen for t in truths}) == 2000


def test_labels_and_prompts_agree(cohort: DemoCohort, truths: list[Truth]) -> None:
    for task in TASKS:
        labels, prompts = read(cohort.labels(task)), read(cohort.prompts(task))
        assert labels == {t.specimen: str(getattr(t, task)) for t in truths}
        classes = prompts.get("classes", prompts)
        assert set(labels.values()) == set(classes)
        assert all(isinstance(p, str) for several in classes.values() for p in several)
    assert all("CLASSNAME" in t for t in read(cohort.prompts("diagnosis"))["templates"])


def test_few_shot_examples_are_of_train(cohort: DemoCohort) -> None:
    train, labels = set(cohort.split("train").read_text().split()), read(cohort.labels("diagnosis"))
    for shots in (1, 4, 16):
        few = read(cohort.folder / f"few_shot_{shots}.json")
        assert set(few) == set(DIAGNOSES)
        for name, specimens in few.items():
            assert len(set(specimens)) == len(specimens) == shots
            assert set(specimens) <= train
            assert {labels[s] for s in specimens} == {name}


# -- bags ----------------------------------------------------------------------------------


def test_sizes(truths: list[Truth], bags: list[SyntheticBag]) -> None:
    sizes = np.array([len(b.tissue) for b in bags])
    assert sizes.min() >= 50 and sizes.max() <= 5000
    assert 200 < np.median(sizes) < 450
    assert sizes.min() < 90 and sizes.max() > 1500
    assert {t.slides for t in truths} == {1, 2, 3}
    for truth, bag in zip(truths, bags, strict=True):
        assert len(set(bag.slides)) == truth.slides
        assert bag.features.dtype == np.float16 and np.isfinite(bag.features).all()


def test_tiles_lie_on_the_grid_in_one_piece(bags: list[SyntheticBag]) -> None:
    for bag in bags[::10]:
        assert (bag.positions % TILE_UM == 0).all() and bag.positions.min() >= 0
        names = np.array(bag.slides)
        for tissue, _ in slides_of(bag):
            assert parts(tissue) == 1
        assert sum(len(tissue) for tissue, _ in slides_of(bag)) == len(names)  # none twice


def test_tiles_show_margin_and_foci(truths: list[Truth], bags: list[SyntheticBag]) -> None:
    for truth, bag in zip(truths, bags, strict=True):
        for tissue, tumour in slides_of(bag):
            sides = ((1, 0), (-1, 0), (0, 1), (0, -1))
            edge = {
                (x, y) for x, y in tissue if any((x + i, y + j) not in tissue for i, j in sides)
            }
            assert bool(edge & tumour) == (truth.margin == "involved"), truth
            assert parts(tumour) == truth.foci, truth


def test_tiles_show_diagnosis_and_necrosis(truths: list[Truth], bags: list[SyntheticBag]) -> None:
    for truth, bag in zip(truths, bags, strict=True):
        kinds = {TISSUES[i] for i in np.unique(bag.tissue)}
        assert kinds & set(DIAGNOSES) == {truth.diagnosis}
        assert ("necrosis" in kinds) == (truth.grade > 1)
        assert DIAGNOSES[truth.diagnosis][0] == truth.organ


def test_share_of_tumour_tells_neither_margin_nor_foci() -> None:
    truths, prototypes = draw_truths(800, 11), draw_prototypes(11)
    share = np.array([tumour_of(draw_bag(t, prototypes, 11)).mean() for t in truths])
    for first in (
        np.array([t.margin == "free" for t in truths]),
        np.array([t.foci == 1 for t in truths]),
    ):
        a, b = share[first], share[~first]
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 3 * error


# -- reports -------------------------------------------------------------------------------


def findings(report: str) -> dict[str, str]:
    """What a report says, read by patterns that know only its language."""

    def which(patterns: dict[str, str]) -> str:
        hits = [name for name, p in patterns.items() if re.search(p, report, re.IGNORECASE)]
        assert len(hits) == 1, (hits, report)
        return hits[0]

    # The longest name that occurs: "adenocarcinoma of the colon" is in "mucinous ... colon" too.
    names = {n: d for d, (_, several) in DIAGNOSES.items() for n in several}
    diagnosis = names[max((n for n in names if n in report), key=len)]
    foci = re.search(r"There are (\d) separate foci", report)
    size = re.search(r"(\d+)\.(\d) cm", report)
    assert size
    return {
        "diagnosis": diagnosis,
        "grade": which({str(i + 1): name for i, name in enumerate(GRADES)}),
        "margin": which(
            {
                "involved": r"margin is involved|extends to the margin|margin positive",
                "free": r"free of tumor|margins clear|margin negative",
            }
        ),
        "focality": which(
            {"1": "unifocal|single focus", foci[1] if foci else ">1": "multifocal|separate foci"}
        ),
        "infiltrate": which(
            {
                "brisk": "brisk|dense",
                "mild": "mild",
                "absent": "no lymphocytic|response is absent",
            }
        ),
        "size_mm": str(int(size[1] + size[2])),
    }


def test_reports_tell_the_truth() -> None:
    for truth in draw_truths(600, SEED):
        found = findings(write_report(truth, SEED))
        foci = found.pop("focality")
        assert foci in (str(truth.foci), ">1" if truth.foci > 1 else "1")
        assert found == {name: str(getattr(truth, name)) for name in found}


def test_reports_vary() -> None:
    truths = draw_truths(600, SEED)
    reports = [write_report(t, SEED) for t in truths]
    words = [len(r.split()) for r in reports]
    assert min(words) >= 20 and max(words) <= 80
    assert len(set(reports)) == len(reports)
    same = [write_report(truths[0], seed) for seed in range(50)]
    assert len(set(same)) > 45
    necrosis = [
        "necrosis" in r.lower() for t, r in zip(truths, reports, strict=True) if t.grade == 3
    ]
    assert 0.5 < np.mean(necrosis) < 0.9


# -- difficulty ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "demo_baselines.py"
    spec = importlib.util.spec_from_file_location("demo_baselines", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_neither_trivial_nor_hopeless(baselines: ModuleType) -> None:
    """As the module and the cohort's README say of the default settings."""
    scores = dict(zip(baselines.TASKS, baselines.measure(0), strict=True))
    mean, known, placed = range(3)
    assert 0.75 <= scores["diagnosis"][mean] <= 0.9
    assert scores["diagnosis"][known] > 0.97
    assert 0.7 <= scores["grade"][mean] <= 0.95
    for spatial in ("margin", "focality"):
        # Chance is 0.5 with a standard error of 0.05.
        assert max(scores[spatial][[mean, known]]) < 0.65
        assert scores[spatial][placed] > 0.9

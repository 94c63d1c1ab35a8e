"""A demo cohort: synthetic specimens whose truth is known, with reports written from it.

Each specimen has a diagnosis (six, two an organ), a grade, a margin, a number of foci and an
inflammatory infiltrate. Its tiles lie on a grid of 256 um within one to three blobs of tissue;
tumour tiles form coherent foci. Features are a prototype of the tile's tissue, shifted by
grade, specimen and slide (a stain), plus noise. **Margin and foci are spatial**: an involved
margin differs from a free one, and three foci from one, only in where the tumour tiles lie, not
in how many or which they are. Of each slide the tiles show exactly what the report says of these.
The size in the report is not to be seen in the tiles.

It is learnable but not trivial. Balanced accuracy on the test split of logistic regressions on
the mean feature, on the tumour's mean feature (as if the tumour tiles were known) and on that
with three figures of the tumour's place, default settings, seeds 0 to 4: mean (range). The test
split has about 96 specimens: a standard error of 0.03 to 0.05 on each.

    task       chance       mean feature       tumour known      and its place
    organ        0.33   1.00 (1.00-1.00)   1.00 (1.00-1.00)   1.00 (1.00-1.00)
    diagnosis    0.17   0.84 (0.79-0.88)   1.00 (1.00-1.00)   1.00 (1.00-1.00)
    grade        0.33   0.91 (0.86-0.93)   1.00 (1.00-1.00)   1.00 (1.00-1.00)
    margin       0.50   0.48 (0.41-0.56)   0.52 (0.47-0.60)   1.00 (0.99-1.00)
    focality     0.50   0.48 (0.40-0.52)   0.48 (0.44-0.53)   0.97 (0.94-0.99)

Measured by `benchmarks/demo_baselines.py 0 1 2 3 4`. Nothing in the cohort is real: no clinical
claim can be made on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slidevlm.data.formats.hdf5_cases import CaseWriter
from slidevlm.data.sampling import generator
from slidevlm.errors import DataError
from slidevlm.run import write_text

FEATURES, TEXT, WIDTH = "demo", "report", 64
TILE_UM = 256.0
_SETTINGS = "settings.json"  # its presence says that the cohort is whole

# class -> (organ, names in reports and prompts)
DIAGNOSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "BRCA_IDC": ("breast", ("invasive ductal carcinoma", "invasive carcinoma of no special type")),
    "BRCA_ILC": ("breast", ("invasive lobular carcinoma", "lobular carcinoma, invasive")),
    "COAD_ADC": ("colon", ("adenocarcinoma of the colon", "colonic adenocarcinoma")),
    "COAD_MUC": ("colon", ("mucinous adenocarcinoma of the colon", "colonic mucinous carcinoma")),
    "LUNG_ADC": ("lung", ("adenocarcinoma of the lung", "pulmonary adenocarcinoma")),
    "LUNG_SCC": (
        "lung",
        ("squamous cell carcinoma of the lung", "pulmonary squamous cell carcinoma"),
    ),
}
ORGANS = ("breast", "colon", "lung")
PROCEDURES = {
    "breast": ("lumpectomy", "mastectomy", "breast excision"),
    "colon": ("hemicolectomy", "sigmoid resection", "colectomy"),
    "lung": ("lobectomy", "wedge resection", "segmentectomy"),
}
GRADES = ("well differentiated", "moderately differentiated", "poorly differentiated")
TISSUES = ("stroma", "fat", "lymphocytes", "necrosis", *(f"normal {o}" for o in ORGANS), *DIAGNOSES)


@dataclass(frozen=True)
class Truth:
    """What is so, and what the report says."""

    specimen: str
    patient: str
    diagnosis: str
    organ: str
    grade: int  # 1 to 3
    margin: str  # involved or free
    foci: int  # 1 to 3
    infiltrate: str  # brisk, mild or absent
    slides: int
    size_mm: int


@dataclass(frozen=True)
class DemoCohort:
    """Where the parts of a cohort lie."""

    folder: Path

    @property
    def hdf5(self) -> Path:
        """Features (attribute demo) and reports (attribute report) in the case layout."""
        return self.folder / "cohort.h5"

    def split(self, name: str) -> Path:
        """Split file train, val or test."""
        return self.folder / f"{name}.txt"

    def labels(self, task: str) -> Path:
        """{specimen: class} of the task diagnosis, grade or margin."""
        return self.folder / f"{task}.json"

    def prompts(self, task: str) -> Path:
        """Prompts of a task."""
        return self.folder / f"{task}_prompts.json"


def synthesize(
    folder: Path,
    *,
    specimens: int = 480,
    seed: int = 0,
    width: int = WIDTH,
    progress: Callable[[int, int], None] | None = None,
) -> DemoCohort:
    """Write a cohort into `folder`: deterministic by `seed`, about 30 MB by default.

    A folder that holds the same cohort already is left as it is.

    Args:
        folder: made if need be.
        specimens: how many, at least 20.
        seed: of everything; equal settings give equal files, byte for byte.
        width: of the features; fewer dimensions make every task harder.
        progress: called with (specimens done, specimens) after each.

    Raises:
        DataError: too few specimens or dimensions, or a folder that holds anything else.
    """
    if specimens < 20:
        raise DataError(f"a cohort of {specimens} specimens cannot be split; make at least 20")
    if width < 8:
        raise DataError(f"features {width} wide cannot tell tissues apart; make them at least 8")
    cohort = DemoCohort(folder)
    settings = {"specimens": specimens, "seed": seed, "width": width, "version": 2}
    if _is_finished(cohort, settings):
        return cohort
    folder.mkdir(parents=True, exist_ok=True)
    truths = draw_truths(specimens, seed)
    prototypes = draw_prototypes(seed, width)
    with CaseWriter(cohort.hdf5, FEATURES, TEXT, {"unit": "um"}) as writer:
        for number, truth in enumerate(truths):
            bag = draw_bag(truth, prototypes, seed)
            keys = [f"{slide}/{i}" for i, slide in enumerate(bag.slides)]
            report = write_report(truth, seed)
            writer.add(truth.patient, truth.specimen, bag.features, report, bag.positions, keys)
            if progress is not None:
                progress(number + 1, specimens)
    _write_tables(cohort, truths, seed, width)
    # Last: it says that the rest is whole.
    write_text(folder / _SETTINGS, json.dumps(settings) + "\n")
    return cohort


def _is_finished(cohort: DemoCohort, settings: dict[str, int]) -> bool:
    """Whether the folder holds this very cohort; False if empty, DataError for anything else."""
    folder = cohort.folder
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; choose a folder for the cohort")
    if not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == settings and cohort.hdf5.is_file():
        return True
    holds = f"holds a cohort of {found}" if isinstance(found, dict) else "holds no whole cohort"
    raise DataError(
        f"{folder} is not empty and {holds}, not the one asked for, {settings}; "
        "choose another folder or delete this one"
    )


def draw_truths(specimens: int, seed: int) -> list[Truth]:
    """Truths of all specimens; about one patient in eight has two."""
    rng = generator("truths", seed)
    truths: list[Truth] = []
    patient = 0
    while len(truths) < specimens:
        patient += 1
        for part in range(2 if rng.random() < 0.125 else 1):
            if len(truths) == specimens:
                break
            diagnosis = str(rng.choice(list(DIAGNOSES)))
            foci = int(rng.choice([1, 1, 1, 2, 3]))
            truths.append(
                Truth(
                    specimen=f"D{patient:05d}-{'AB'[part]}",
                    patient=f"D{patient:05d}",
                    diagnosis=diagnosis,
                    organ=DIAGNOSES[diagnosis][0],
                    grade=int(rng.integers(1, 4)),
                    margin=str(rng.choice(["involved", "free"])),
                    foci=foci,
                    infiltrate=str(rng.choice(["brisk", "mild", "absent"])),
                    slides=int(rng.choice([1, 1, 1, 2, 3])),
                    size_mm=int(rng.integers(4, 60)),
                )
            )
    return truths


def draw_prototypes(seed: int, width: int = WIDTH) -> dict[str, np.ndarray]:
    """One vector [width] a tissue, and `atypia`, the direction in which grade moves tumour.

    The two tumours of an organ share most of theirs: organ is easy, diagnosis is not.
    """
    rng = generator("prototypes", seed)
    vectors = {name: rng.normal(size=width) for name in (*TISSUES, "atypia", "tumour", *ORGANS)}
    for organ in ORGANS:
        vectors[f"normal {organ}"] = 0.8 * vectors[organ] + 0.6 * vectors[f"normal {organ}"]
    for name, (organ, _) in DIAGNOSES.items():
        vectors[name] = 0.5 * vectors[organ] + 0.7 * vectors["tumour"] + 0.45 * vectors[name]
    return vectors


@dataclass(frozen=True)
class SyntheticBag:
    """Tiles of a specimen."""

    features: np.ndarray  # [N, width] float16
    positions: np.ndarray  # [N, 2] float32, micrometres, per slide
    slides: tuple[str, ...]  # N slide names
    tissue: np.ndarray  # [N] index into TISSUES


def draw_bag(truth: Truth, prototypes: dict[str, np.ndarray], seed: int) -> SyntheticBag:
    """Tiles of a specimen: 50 to 5,000 in all, a few hundred mostly."""
    rng = generator("bag", seed, truth.specimen)
    # At least 50 a slide: fewer hold no three foci apart from each other and from the edge.
    total = np.exp(rng.normal(np.log(300), 0.8)).clip(50 * truth.slides, 5000)
    share = rng.uniform(0.12, 0.3)  # of tumour; the same whatever the margin and the foci
    table = np.stack([prototypes[name] for name in TISSUES])
    width = table.shape[1]
    variant = 0.5 * rng.normal(size=width)  # of this specimen's tumour
    parts = []
    for slide in range(truth.slides):
        tissue = draw_tissue(rng, int(total // truth.slides))
        tumour = draw_foci(rng, tissue, truth, share)
        kind = _fill(rng, truth, tissue.place, tumour)
        features = table[kind] + rng.normal(size=(len(kind), width)) * 1.6
        features[tumour] += variant + 0.8 * (truth.grade - 2) * prototypes["atypia"]
        features += 0.35 * rng.normal(size=width)  # the slide's stain
        names = [f"{truth.specimen}-S{slide + 1}"] * len(kind)
        parts.append((features, tissue.place * TILE_UM, names, kind))
    return SyntheticBag(
        np.concatenate([p[0] for p in parts]).astype(np.float16),
        np.concatenate([p[1] for p in parts]).astype(np.float32),
        tuple(name for p in parts for name in p[2]),
        np.concatenate([p[3] for p in parts]),
    )


@dataclass(frozen=True)
class Tissue:
    """The piece of tissue of one slide."""

    place: np.ndarray  # [n, 2] int, on the grid
    depth: np.ndarray  # [n] float, 0 at the outline, 1 in the middle
    edge: np.ndarray  # [n] bool, tiles that lack one of their four neighbours


def draw_tissue(rng: np.random.Generator, count: int) -> Tissue:
    """A blob of exactly `count` tiles, its outline three random waves about a circle."""
    waves = np.arange(2, 5)
    size, phase = rng.uniform(0.03, 0.12, 3), rng.uniform(0, 2 * np.pi, 3)
    reach = int(np.sqrt(count / np.pi) * 1.6) + 3
    x, y = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    angle = np.arctan2(y, x)[..., None]
    outline = 1 + (size * np.cos(waves * angle + phase)).sum(-1)
    distance = np.hypot(x, y) / outline  # from the middle; equal on all of the outline
    order = np.argsort(distance, axis=None, kind="stable")[:count]
    inside = np.zeros(x.shape, dtype=bool)
    inside.flat[order] = True
    edge = inside & ~(
        np.roll(inside, 1, 0)
        & np.roll(inside, -1, 0)
        & np.roll(inside, 1, 1)
        & np.roll(inside, -1, 1)
    )
    place = np.stack([x[inside], y[inside]], axis=-1) + rng.integers(0, 200, 2) + reach
    return Tissue(place, 1 - distance[inside] / distance[inside].max(), edge[inside])


def draw_foci(rng: np.random.Generator, tissue: Tissue, truth: Truth, share: float) -> np.ndarray:
    """[n] bool: the tumour tiles, `share` of all, in `truth.foci` parts that do not touch.

    Involved margin: the first part grows from the edge. Free margin: no part reaches the edge.
    """
    deep = ~tissue.edge & (tissue.depth >= 0.25)
    start = tissue.edge if truth.margin == "involved" else deep & (tissue.depth >= 0.4)
    centres = [int(rng.choice(np.flatnonzero(start)))]
    distance = _distance(tissue.place, centres[0])[:, None]  # [n, foci]
    for _ in range(truth.foci - 1):
        nearest = np.where(deep, distance.min(1), -1.0)
        far = np.flatnonzero(nearest >= 0.8 * nearest.max())
        centres.append(int(rng.choice(far)))
        distance = np.column_stack([distance, _distance(tissue.place, centres[-1])])
    ordered = np.sort(distance, axis=1)
    allowed = np.ones(len(deep), dtype=bool) if truth.margin == "involved" else deep
    if truth.foci > 1:
        # Tiles of two parts then lie at least 1.5 apart, and touching ones at most sqrt 2: the
        # difference of two distances changes at most twice as fast as the place.
        allowed = allowed & (ordered[:, 1] - ordered[:, 0] >= 1.5)
    count = min(int(share * len(deep)), int(allowed.sum()))
    nearest = np.where(allowed, ordered[:, 0], np.inf)
    tumour = np.zeros(len(deep), dtype=bool)
    tumour[np.argsort(nearest, kind="stable")[:count]] = True
    return tumour


def _distance(place: np.ndarray, centre: int) -> np.ndarray:
    """[n] distances of tiles to one of them, in tiles."""
    return np.asarray(np.hypot(*(place - place[centre]).T))


def _fill(
    rng: np.random.Generator, truth: Truth, place: np.ndarray, tumour: np.ndarray
) -> np.ndarray:
    """[n] tissue of each tile."""
    number = {name: i for i, name in enumerate(TISSUES)}
    lymphocytes = {"brisk": 0.22, "mild": 0.09, "absent": 0.01}[truth.infiltrate]
    necrosis = (0.0, 0.06, 0.16)[truth.grade - 1]
    # A smooth field decides between stroma, fat and normal tissue, so that each is coherent.
    wave = place @ rng.normal(size=(2, 3)) / 6 + rng.uniform(0, 6, 3)
    field = np.sin(wave).sum(1) + 0.3 * rng.normal(size=len(place))
    low, high = np.quantile(field, [0.35, 0.55])
    tissue = np.where(field < low, number["stroma"], number[f"normal {truth.organ}"])
    tissue = np.where((field >= low) & (field < high), number["fat"], tissue)
    tissue = np.where(rng.random(len(place)) < lymphocytes, number["lymphocytes"], tissue)
    # A share rounded up, not a chance: the report says that a grade 3 tumour has necrosis.
    dead = np.zeros(len(place), dtype=bool)
    tiles = rng.permutation(np.flatnonzero(tumour))
    dead[tiles[: int(np.ceil(necrosis * len(tiles)))]] = True
    return np.where(tumour, np.where(dead, number["necrosis"], number[truth.diagnosis]), tissue)


def write_report(truth: Truth, seed: int) -> str:
    """The report: every finding in one of several wordings, in varying order."""
    rng = generator("report", seed, truth.specimen)

    def one(*wordings: str) -> str:
        return str(rng.choice(wordings))

    name = one(*DIAGNOSES[truth.diagnosis][1])
    grade = GRADES[truth.grade - 1]
    size = f"{truth.size_mm / 10:.1f} cm"
    procedure = one(*PROCEDURES[truth.organ])
    head = one(
        f"{truth.organ.capitalize()}, {procedure}: {name}, {grade}.",
        f"{procedure.capitalize()} specimen of the {truth.organ} with {grade} {name}.",
        f"Diagnosis: {name}. The tumor is {grade} (grade {truth.grade}).",
    )
    margin = (
        one("The resection margin is involved.", "Tumor extends to the margin.", "Margin positive.")
        if truth.margin == "involved"
        else one("The resection margins are free of tumor.", "Margins clear.", "Margin negative.")
    )
    foci = (
        one("The tumor is unifocal.", "A single focus is present.")
        if truth.foci == 1
        else one("The tumor is multifocal.", f"There are {truth.foci} separate foci.")
    )
    infiltrate = {
        "brisk": one(
            "A brisk lymphocytic infiltrate is seen.", "There is a dense lymphocytic response."
        ),
        "mild": one(
            "There is a mild lymphocytic infiltrate.", "A mild lymphocytic response is noted."
        ),
        "absent": one("No lymphocytic infiltrate is seen.", "Lymphocytic response is absent."),
    }[truth.infiltrate]
    extent = one(f"The tumor measures {size}.", f"Greatest dimension {size}.")
    rest = [margin, foci, infiltrate, extent]
    if truth.grade == 3 and rng.random() < 0.7:
        rest.append(one("Tumor necrosis is present.", "Areas of necrosis."))
    return " ".join([head, *(rest[i] for i in rng.permutation(len(rest)))])


_GRADE_PROMPTS = {str(i + 1): [name, f"{name} tumor"] for i, name in enumerate(GRADES)}
_MARGIN_PROMPTS = {
    "free": ["the resection margins are free of tumor", "margins clear", "margin negative"],
    "involved": [
        "the resection margin is involved",
        "tumor extends to the margin",
        "margin positive",
    ],
}
_README = """\
# Demo cohort

{specimens} synthetic specimens of {patients} patients, seed {seed}; nothing in it is real.
Written by `slidevlm data synthesize`.

| file | content |
|---|---|
| cohort.h5 | case layout: features `demo` ({width} wide, positions in um), text `report` |
| train.txt val.txt test.txt | splits, no patient in two |
| diagnosis.json grade.json margin.json | specimen -> class |
| diagnosis_prompts.json grade_prompts.json margin_prompts.json | prompts |
| few_shot_1.json few_shot_4.json few_shot_16.json | diagnosis -> train specimens |
| truth.json | everything that is so |
| settings.json | what it was made with |

The tiles of each slide show the margin and the foci that the report names; these two are
spatial, and only positions tell them. The size in the report is not to be seen in the tiles.

Baselines, with the default settings (480 specimens, 64 wide), seeds 0 to 4: balanced accuracy on
the test split, mean (lowest to highest), of logistic regressions on the mean feature, on the
mean feature of the tumour tiles (as if these were known), and on that with three figures of
their place. The test split has about 96 specimens, so each has a standard error of 0.03 to 0.05.
These figures may be quoted; `benchmarks/demo_baselines.py` of slidevlm measures them.

| task | chance | mean feature | tumour known | and its place |
|---|---|---|---|---|
| organ | 0.33 | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |
| diagnosis | 0.17 | 0.84 (0.79-0.88) | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |
| grade | 0.33 | 0.91 (0.86-0.93) | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |
| margin | 0.50 | 0.48 (0.41-0.56) | 0.52 (0.47-0.60) | 1.00 (0.99-1.00) |
| focality | 0.50 | 0.48 (0.40-0.52) | 0.48 (0.44-0.53) | 0.97 (0.94-0.99) |
"""


def _write_tables(cohort: DemoCohort, truths: Sequence[Truth], seed: int, width: int) -> None:
    folder = cohort.folder
    patients = list(dict.fromkeys(t.patient for t in truths))
    order = generator("splits", seed).permutation(len(patients))
    cuts = (np.array([2 / 3, 0.8]) * len(patients)).astype(int)
    split_of = {
        patients[i]: name
        for name, part in zip(("train", "val", "test"), np.split(order, cuts), strict=True)
        for i in part
    }
    for name in ("train", "val", "test"):
        members = [t.specimen for t in truths if split_of[t.patient] == name]
        write_text(cohort.split(name), "\n".join(members) + "\n")

    def dump(path: Path, content: object) -> None:
        write_text(path, json.dumps(content, indent=1) + "\n")

    dump(cohort.labels("diagnosis"), {t.specimen: t.diagnosis for t in truths})
    dump(cohort.labels("grade"), {t.specimen: str(t.grade) for t in truths})
    dump(cohort.labels("margin"), {t.specimen: t.margin for t in truths})
    dump(
        cohort.prompts("diagnosis"),
        {
            "classes": {name: list(names) for name, (_, names) in DIAGNOSES.items()},
            "templates": ["CLASSNAME.", "diagnosis: CLASSNAME.", "specimen with CLASSNAME."],
        },
    )
    dump(cohort.prompts("grade"), _GRADE_PROMPTS)
    dump(cohort.prompts("margin"), _MARGIN_PROMPTS)
    train = [t for t in truths if split_of[t.patient] == "train"]
    for shots in (1, 4, 16):
        few = {
            name: [t.specimen for t in train if t.diagnosis == name][:shots] for name in DIAGNOSES
        }
        dump(folder / f"few_shot_{shots}.json", few)
    dump(folder / "truth.json", [asdict(t) for t in truths])
    counts = {"specimens": len(truths), "patients": len(patients)}
    write_text(folder / "README.md", _README.format(**counts, seed=seed, width=width))

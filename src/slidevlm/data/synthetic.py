"""A demo cohort: synthetic specimens whose truth is known, with reports written from it.

Each specimen has a diagnosis (six, two an organ), a grade, a margin, a number of foci and an
inflammatory infiltrate. Its tiles lie on a grid of 256 um within one to three blobs of tissue;
tumour tiles form coherent foci. Features are a prototype of the tile's tissue, shifted by
grade, specimen and slide (a stain), plus noise. **The margin is spatial**: an involved one
differs from a free one only in where the tumour tiles lie, not in how many or which they are.

It is learnable but not trivial; `benchmarks/demo_baselines.py` prints what simple baselines
reach. Nothing in it is real: no clinical claim can be made on it.
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
    progress: Callable[[int, int], None] | None = None,
) -> DemoCohort:
    """Write a cohort into `folder`: deterministic by `seed`, about 40 MB by default.

    A folder that holds the same cohort already is left as it is.

    Raises:
        DataError: fewer than 20 specimens, or a folder that holds anything else.
    """
    if specimens < 20:
        raise DataError(f"a cohort of {specimens} specimens cannot be split; make at least 20")
    cohort = DemoCohort(folder)
    settings = {"specimens": specimens, "seed": seed, "version": 1}
    done = folder / "settings.json"
    if done.is_file() and json.loads(done.read_text()) == settings:
        return cohort
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"{folder} is not empty and holds no cohort of {specimens} specimens and seed {seed}; "
            "choose another folder or empty it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    truths = draw_truths(specimens, seed)
    prototypes = draw_prototypes(seed)
    with CaseWriter(cohort.hdf5, FEATURES, TEXT, {"unit": "um"}) as writer:
        for number, truth in enumerate(truths):
            bag = draw_bag(truth, prototypes, seed)
            keys = [f"{slide}/{i}" for i, slide in enumerate(bag.slides)]
            report = write_report(truth, seed)
            writer.add(truth.patient, truth.specimen, bag.features, report, bag.positions, keys)
            if progress is not None:
                progress(number + 1, specimens)
    _write_tables(cohort, truths, seed)
    write_text(done, json.dumps(settings) + "\n")  # last: it says that the rest is whole
    return cohort


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


def draw_prototypes(seed: int) -> dict[str, np.ndarray]:
    """One vector [64] a tissue, and `atypia`, the direction in which grade moves tumour.

    The two tumours of an organ share most of theirs: organ is easy, diagnosis is not.
    """
    rng = generator("prototypes", seed)
    vectors = {name: rng.normal(size=WIDTH) for name in (*TISSUES, "atypia", "tumour", *ORGANS)}
    for organ in ORGANS:
        vectors[f"normal {organ}"] = 0.8 * vectors[organ] + 0.6 * vectors[f"normal {organ}"]
    for name, (organ, _) in DIAGNOSES.items():
        vectors[name] = 0.5 * vectors[organ] + 0.7 * vectors["tumour"] + 0.45 * vectors[name]
    return vectors


@dataclass(frozen=True)
class SyntheticBag:
    """Tiles of a specimen."""

    features: np.ndarray  # [N, 64] float16
    positions: np.ndarray  # [N, 2] float32, micrometres, per slide
    slides: tuple[str, ...]  # N slide names
    tissue: np.ndarray  # [N] index into TISSUES


def draw_bag(truth: Truth, prototypes: dict[str, np.ndarray], seed: int) -> SyntheticBag:
    """Tiles of a specimen: 50 to 5,000 in all, a few hundred mostly."""
    rng = generator("bag", seed, truth.specimen)
    total = int(np.exp(rng.normal(np.log(300), 0.8)).clip(50, 5000))
    share = rng.uniform(0.12, 0.35)  # of tumour; the same whatever the margin
    variant = 0.5 * rng.normal(size=WIDTH)  # of this specimen's tumour
    table = np.stack([prototypes[name] for name in TISSUES])
    parts = []
    for slide in range(truth.slides):
        place, depth = draw_tissue(rng, max(total // truth.slides, 20))
        tumour = draw_foci(rng, place, depth, truth, share)
        tissue = _fill(rng, truth, place, tumour)
        features = table[tissue] + rng.normal(size=(len(tissue), WIDTH)) * 1.6
        features[tumour] += variant + 0.8 * (truth.grade - 2) * prototypes["atypia"]
        features += 0.35 * rng.normal(size=WIDTH)  # the slide's stain
        parts.append(
            (features, place * TILE_UM, [f"{truth.specimen}-S{slide + 1}"] * len(tissue), tissue)
        )
    return SyntheticBag(
        np.concatenate([p[0] for p in parts]).astype(np.float16),
        np.concatenate([p[1] for p in parts]).astype(np.float32),
        tuple(name for p in parts for name in p[2]),
        np.concatenate([p[3] for p in parts]),
    )


def draw_tissue(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A blob of about `count` tiles: grid places [n, 2], and depth [n], 0 at its edge, 1 inside."""
    waves = np.arange(2, 5)
    size, phase = rng.uniform(0.03, 0.12, 3), rng.uniform(0, 2 * np.pi, 3)
    radius = np.sqrt(count / np.pi)
    reach = int(radius * 1.5) + 2
    grid = np.stack(np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1)), -1)
    places = grid.reshape(-1, 2)
    angle = np.arctan2(places[:, 1], places[:, 0])
    outline = radius * (1 + (size * np.cos(waves * angle[:, None] + phase)).sum(1))
    depth = 1 - np.hypot(*places.T) / outline
    inside = depth >= 0
    return places[inside] + rng.integers(0, 200, 2), depth[inside]


def draw_foci(
    rng: np.random.Generator, place: np.ndarray, depth: np.ndarray, truth: Truth, share: float
) -> np.ndarray:
    """[n] bool: the tumour tiles, `share` of all, around one to three centres.

    Involved margin: the first centre lies at the edge. Free margin: all tumour lies deep.
    """
    order = np.argsort(depth)
    rim, core = order[: max(3, len(order) // 8)], order[-max(3, len(order) // 3) :]
    centres = [int(rng.choice(rim if truth.margin == "involved" else core))]
    centres += [int(rng.choice(core)) for _ in range(truth.foci - 1)]
    distance = np.hypot(*(place[:, None] - place[centres][None]).transpose(2, 0, 1)).min(1)
    if truth.margin == "free":
        distance = distance + 1e3 * (depth < 0.25)
    chosen = np.zeros(len(place), dtype=bool)
    chosen[np.argsort(distance, kind="stable")[: max(3, int(share * len(place)))]] = True
    return chosen


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
    dead = rng.random(len(place)) < necrosis
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
        "brisk": one("A brisk lymphocytic infiltrate is seen.", "Dense lymphocytic response."),
        "mild": one("There is a mild lymphocytic infiltrate.", "Mild lymphocytic response."),
        "absent": one("No lymphocytic infiltrate.", "Lymphocytic response is absent."),
    }[truth.infiltrate]
    extent = one(f"The tumor measures {size}.", f"Greatest dimension {size}.")
    rest = [margin, foci, infiltrate, extent]
    if truth.grade == 3:
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
| cohort.h5 | case layout: features `demo` (64 wide, positions in um), text `report` |
| train.txt val.txt test.txt | splits, no patient in two |
| diagnosis.json grade.json margin.json | specimen -> class |
| diagnosis_prompts.json grade_prompts.json margin_prompts.json | prompts |
| few_shot_1.json few_shot_4.json few_shot_16.json | diagnosis -> train specimens |
| truth.json | everything that is so |
"""


def _write_tables(cohort: DemoCohort, truths: Sequence[Truth], seed: int) -> None:
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
    readme = _README.format(specimens=len(truths), patients=len(patients), seed=seed)
    write_text(folder / "README.md", readme)

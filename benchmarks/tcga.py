"""A run on the tcga data beside simple baselines: retrieval, zero-shot, organs named in reports.

    slidevlm train --config examples/tcga.yaml --name tcga
    python benchmarks/tcga.py logs/tcga [DATA]

DATA is the folder of the data, by default ../shared/data/tcga. The baselines know only the mean
and deviation of a bag's features: a ridge regression to 128 tf-idf/SVD components of the reports
(retrieval, and zero-shot against the embedded prompts), and a logistic regression that is trained
on the classes (an upper mark: zero-shot never sees one).

A generated report names the organ whose words it has most often, the earlier one in a tie. It is
compared to naming always the organ that the test split has most often, to the report of the
training specimen with the nearest mean feature, and to the true reports, read in the same way.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

ORGAN_OF_CLASS = {
    "BLCA": "bladder",
    "CESC": "cervix",
    "COAD": "colon",
    "HNSC": "head and neck",
    "KICH": "kidney",
    "KIRC": "kidney",
    "KIRP": "kidney",
    "LGG": "brain",
    "LIHC": "liver",
    "LUAD": "lung",
    "LUSC": "lung",
    "OV": "ovary",
    "PAAD": "pancreas",
    "PRAD": "prostate",
    "UCEC": "endometrium",
}
WORDS = {
    "bladder": r"bladder|urothelial|transitional cell",
    "cervix": r"cervix|cervical|endocervi\w*|exocervi\w*",
    "colon": r"colon|colonic|cec\w+|sigmoid|colectomy|hemicolectomy",
    "head and neck": r"tongue|larynx|laryn\w+|oral|mandib\w*|tonsil\w*|glossectomy|neck|gingiv\w*",
    "kidney": r"kidney|renal|nephrectomy",
    "brain": r"brain|glioma|astrocyt\w*|oligodendrogl\w*|frontal|temporal|craniotomy",
    "liver": r"liver|hepat\w*",
    "lung": r"lung|lobe|bronch\w*|lobectomy|pleura\w*|pulmonary",
    "ovary": r"ovary|ovarian|ovaries|fallopian|oophorectomy|omentum|serous",
    "pancreas": r"pancrea\w*|whipple|duoden\w*",
    "prostate": r"prostat\w*|gleason|seminal",
    "endometrium": r"endometri\w*|uterus|uterine|myometri\w*|hysterectomy",
}
PATTERNS = {organ: re.compile(rf"\b(?:{words})\b") for organ, words in WORDS.items()}


def organ_of(report: str) -> str | None:
    """The organ that a report names most often, the earlier one in a tie; None if it names none."""
    found = {o: [m.start() for m in p.finditer(report.lower())] for o, p in PATTERNS.items()}
    named = {organ: places for organ, places in found.items() if places}
    if not named:
        return None
    return min(named, key=lambda organ: (-len(named[organ]), named[organ][0]))


def share_right(reports: list[str], organs: list[str]) -> float:
    """Share of reports that name the right organ."""
    return float(np.mean([organ_of(r) == o for r, o in zip(reports, organs, strict=True)]))


class Cohort:
    """Mean and deviation of the features, and reports, of the three splits."""

    def __init__(self, folder: Path) -> None:
        self.classes = json.loads((folder / "specimen_class.json").read_text())
        prompts = json.loads((folder / "class_prompts_ensemble.json").read_text())
        self.names = sorted(prompts["classes"])
        self.prompts = [
            [t.replace("CLASSNAME", name) for name in prompts["classes"][c] for t in
             prompts["templates"]]
            for c in self.names
        ]  # fmt: skip
        self.ids = {
            split: (folder / f"{split}.txt").read_text().replace("\n", ",").split(",")
            for split in ("train", "test")
        }
        self.ids = {s: [i.strip() for i in ids if i.strip()] for s, ids in self.ids.items()}
        self.features: dict[str, np.ndarray] = {}
        self.reports: dict[str, str] = {}
        wanted = {i for ids in self.ids.values() for i in ids}
        with h5py.File(folder / "tcga.h5") as file:
            for path in file["case-index/case_paths"].asstr()[()]:
                specimen = path.rsplit("/", 1)[1]
                if specimen in wanted:
                    tiles = file[f"{path}/hipt_4096/features"][()].astype(np.float64)
                    self.features[specimen] = np.concatenate([tiles.mean(0), tiles.std(0)])
                    self.reports[specimen] = file[f"{path}/diagnosis"].asstr()[()]

    def matrix(self, split: str) -> np.ndarray:
        """[N, 2 D]."""
        return np.stack([self.features[i] for i in self.ids[split]])

    def texts(self, split: str) -> list[str]:
        """N reports."""
        return [self.reports[i] for i in self.ids[split]]

    def labels(self, split: str) -> list[str]:
        """N classes."""
        return [self.classes[i] for i in self.ids[split]]


def recall_at_10(queries: np.ndarray, keys: np.ndarray) -> float:
    """Share of queries [N, E] whose own row of keys [N, E] is among the ten nearest."""
    scores = queries @ keys.T
    return float(np.mean((scores >= np.diag(scores)[:, None]).sum(1) <= 10))


def baselines(cohort: Cohort) -> dict[str, float]:
    """Figures of the regressions on mean and deviation."""
    train, test = cohort.matrix("train"), cohort.matrix("test")
    words = TfidfVectorizer(sublinear_tf=True, min_df=2)
    space = TruncatedSVD(128, random_state=0)
    target = normalize(space.fit_transform(words.fit_transform(cohort.texts("train"))))

    def embed(texts: list[str]) -> np.ndarray:
        return np.asarray(normalize(space.transform(words.transform(texts))))

    ridge = make_pipeline(StandardScaler(), Ridge(300.0)).fit(train, target)
    image = normalize(ridge.predict(test))
    classes = normalize(np.stack([embed(p).mean(0) for p in cohort.prompts]))
    zero_shot = [cohort.names[i] for i in (image @ classes.T).argmax(1)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=5000))
    probe.fit(train, cohort.labels("train"))
    scaler = StandardScaler().fit(train)
    nearest = (
        normalize(scaler.transform(test)) @ normalize(scaler.transform(train)).T
    ).argmax(1)  # fmt: skip
    organs = [ORGAN_OF_CLASS[c] for c in cohort.labels("test")]
    return {
        "R@10": recall_at_10(image, embed(cohort.texts("test"))),
        "zero-shot": float(balanced_accuracy_score(cohort.labels("test"), zero_shot)),
        "supervised": float(balanced_accuracy_score(cohort.labels("test"), probe.predict(test))),
        "organ, most frequent": Counter(organs).most_common(1)[0][1] / len(organs),
        "organ, nearest": share_right([cohort.texts("train")[i] for i in nearest], organs),
        "organ, true reports": share_right(cohort.texts("test"), organs),
    }


def main() -> None:
    """Print the table."""
    run = Path(sys.argv[1])
    cohort = Cohort(Path(sys.argv[2] if len(sys.argv) > 2 else "../shared/data/tcga"))
    metrics = json.loads((run / "test.json").read_text())["metrics"]
    written = {
        c["id"]: c["generated"] for c in json.loads((run / "captions_test.json").read_text())
    }
    generated = [written[i] for i in cohort.ids["test"]]
    organs = [ORGAN_OF_CLASS[c] for c in cohort.labels("test")]
    known = baselines(cohort)
    zero_shot = metrics["test/zero_shot/specimen_class/balanced_accuracy"]
    rows = [
        ("image-to-text R@10", metrics["test/image_to_text/R@10"], "ridge to tf-idf/SVD", "R@10"),
        ("zero-shot balanced accuracy", zero_shot, "ridge to tf-idf/SVD", "zero-shot"),
        ("", zero_shot, "supervised logistic regression", "supervised"),
        (
            "right organ named",
            share_right(generated, organs),
            "most frequent organ",
            "organ, most frequent",
        ),
        ("", share_right(generated, organs), "nearest training report", "organ, nearest"),
        ("", share_right(generated, organs), "the true reports", "organ, true reports"),
    ]
    print(f"{'test split, 191 specimens':30s} {run.name:>10s}  beside")
    for name, value, what, key in rows:
        print(f"{name:30s} {value:10.3f}  {known[key]:.3f} {what}")


if __name__ == "__main__":
    main()

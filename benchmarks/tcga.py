"""A run on the tcga data beside simple baselines: retrieval, classification, organs in reports.

    slidevlm train --config examples/tcga.yaml --name tcga
    slidevlm evaluate logs/tcga --probe --eval-metric-bootstraps 1000 --no-save-captions \\
        --few-shot-examples DATA/few_shot_1.json DATA/few_shot_4.json DATA/few_shot_16.json
    python benchmarks/tcga.py logs/tcga [DATA]

DATA is the folder of the data, by default ../shared/data/tcga. The baselines know only the mean
and deviation of a bag's features: a ridge regression to 128 tf-idf/SVD components of the reports
(retrieval, and zero-shot against the embedded prompts), a logistic regression that is trained on
the classes (an upper mark of zero-shot, which never sees one, and the probe's counterpart), and the
nearest class mean of standardised features (few-shot).

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
from sklearn.neighbors import NearestCentroid
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
        self.examples = {
            k: json.loads((folder / f"few_shot_{k}.json").read_text()) for k in (1, 4, 16)
        }
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


def ranks(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[N] place of the own row of keys [N, E] among all, from 1, for queries [N, E]."""
    scores = queries @ keys.T
    return (scores >= np.diag(scores)[:, None]).sum(1)


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
    text = embed(cohort.texts("test"))
    found: dict[str, float] = {}
    for way, places in (
        ("image_to_text", ranks(image, text)),
        ("text_to_image", ranks(text, image)),
    ):
        found |= {f"{way}/R@{k}": float(np.mean(places <= k)) for k in (1, 5, 10)}
        found[f"{way}/median_rank"] = float(np.median(places))
    for shots, examples in cohort.examples.items():
        rows = [i for names in examples.values() for i in names]
        support = scaler.transform(np.stack([cohort.features[i] for i in rows]))
        truth = [cohort.classes[i] for i in rows]
        for name, model in (
            ("mean", NearestCentroid()),
            ("regression", LogisticRegression(C=0.01)),
        ):
            with np.errstate(invalid="ignore"):  # of deviations within a class of one example
                guess = model.fit(support, truth).predict(scaler.transform(test))
            value = balanced_accuracy_score(cohort.labels("test"), guess)
            found[f"few-shot {name} {shots}"] = float(value)
    return found | {
        "zero-shot": float(balanced_accuracy_score(cohort.labels("test"), zero_shot)),
        "supervised": float(balanced_accuracy_score(cohort.labels("test"), probe.predict(test))),
        "organ, most frequent": Counter(organs).most_common(1)[0][1] / len(organs),
        "organ, nearest": share_right([cohort.texts("train")[i] for i in nearest], organs),
        "organ, true reports": share_right(cohort.texts("test"), organs),
    }


def newest_evaluation(run: Path) -> Path:
    """The last evaluation of the run that has probes and intervals."""
    for path in sorted(run.glob("evaluation-*/metrics.json"), reverse=True):
        names = json.loads(path.read_text())["metrics"]
        if any(name.startswith("test/probe/") for name in names):
            return path.parent
    raise SystemExit(f"{run} has no evaluation with --probe; the head of this file has the command")


ROWS = (
    *((f"image_to_text/{m}", f"image_to_text/{m}", "ridge to tf-idf/SVD")
      for m in ("R@1", "R@5", "R@10", "median_rank")),
    *((f"text_to_image/{m}", f"text_to_image/{m}", "ridge to tf-idf/SVD")
      for m in ("R@1", "R@5", "R@10", "median_rank")),
    ("zero_shot/specimen_class/balanced_accuracy", "zero-shot", "ridge to tf-idf/SVD"),
    *((f"few_shot/specimen_class/few_shot_{k}/class_mean/balanced_accuracy",
       f"few-shot mean {k}", "class mean") for k in (1, 4, 16)),
    *((f"few_shot/specimen_class/few_shot_{k}/logistic_regression/balanced_accuracy",
       f"few-shot regression {k}", "logistic regression") for k in (1, 4, 16)),
    ("probe/specimen_class/linear/balanced_accuracy", "supervised", "logistic regression"),
    ("slide_retrieval/specimen_class/Acc@1", None, ""),
    ("slide_retrieval/specimen_class/mAP@5", None, ""),
)  # fmt: skip


def main() -> None:
    """Print two tables in Markdown."""
    run = Path(sys.argv[1])
    cohort = Cohort(Path(sys.argv[2] if len(sys.argv) > 2 else "../shared/data/tcga"))
    folder = newest_evaluation(run)
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    known = baselines(cohort)
    print("| test split, 191 specimens | run | 95 % interval | baseline | |\n|---|---|---|---|---|")
    for name, key, what in ROWS:
        score = metrics[f"test/{name}"]
        beside = "" if key is None else f"{known[key]:.3f}"
        print(f"| {name} | {score['value']:.3f} | {score['lo']:.3f} to {score['hi']:.3f} | "
              f"{beside} | {what} |")  # fmt: skip
    written = json.loads((run / "captions_test.json").read_text())
    generated = {c["id"]: c["generated"] for c in written}
    organs = [ORGAN_OF_CLASS[c] for c in cohort.labels("test")]
    share = share_right([generated[i] for i in cohort.ids["test"]], organs)
    print(f"\nreports that name the right organ: {share:.3f}")
    for key in ("most frequent", "nearest", "true reports"):
        print(f"    {key}: {known[f'organ, {key}']:.3f}")


if __name__ == "__main__":
    main()

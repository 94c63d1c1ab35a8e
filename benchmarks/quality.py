"""Quality on real slides: the recommended settings, several seeds, beside scikit-learn's baselines.

    make quality
    python -m benchmarks.quality [--seeds 0 1 2] [--data ../shared/data/tcga] [--out quality]
        [--no-demo]

For each seed: trains examples/tcga.yaml, evaluates the test split (retrieval, zero-shot, few-shot,
probe, intervals of 1,000 resamples of patients), writes its reports with the recommended decoding
and scores them; then the demo cohort, synthesized by that seed. The baselines of
benchmarks/tcga.py and benchmarks/reports.py are computed in the same run. Beside the reports that
the model writes stand those that it finds: of each slide the training report whose embedding is
nearest to the slide's.

Everything goes to `--out`, the tables to `--out`/quality.md: mean and standard deviation over
seeds, the interval of the first seed, the bar. What is there already is not computed again, so a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from benchmarks.reports import frequent_words, nearest
from benchmarks.tcga import ROWS, Cohort, baselines, newest_evaluation

from slidevlm import load
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.text_metrics.scoring import Scoring

RECIPE = Path(__file__).parent.parent / "examples" / "tcga.yaml"
FEW_SHOT = "few_shot/specimen_class/few_shot_16/{}/balanced_accuracy"
BARS = {
    "image_to_text/R@10": 0.50,
    "zero_shot/specimen_class/balanced_accuracy": 0.70,
    "probe/specimen_class/linear/balanced_accuracy": 0.72,
    FEW_SHOT.format("logistic_regression"): 0.60,
}
# Of slidevlm caption; chosen on the validation split (docs/results.md).
DECODING = ("--no-repeat-ngram", "3", "--repetition-penalty", "1.5", "--max-tokens", "130")
SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor_exact_stem", "cider",
          "cider_plain", "keyword_jaccard", "clinical/site/f1", "clinical/type/f1",
          "repetition_4", "length_ratio")  # fmt: skip
_NO_CONTEST = {"repetition_4": "less is better", "length_ratio": ""}
DEMO_ROWS = ("image_to_text/R@10", "zero_shot/diagnosis/balanced_accuracy",
             "zero_shot/grade/balanced_accuracy", "zero_shot/margin/balanced_accuracy",
             "captions/bleu_4", "captions/rouge_l")  # fmt: skip


def slidevlm(*words: object) -> None:
    """Run a command; its failure ends the benchmark."""
    subprocess.run([sys.executable, "-m", "slidevlm", *map(str, words)], check=True)


def tcga_run(seed: int, data: Path, out: Path) -> Path:
    """Train, evaluate and caption with one seed; the run's folder."""
    run = out / f"tcga-{seed}"
    paths = [
        "--hdf5_filename", data / "tcga.h5", "--train-split", data / "train.txt",
        "--val-split", data / "val.txt", "--test-split", data / "test.txt",
        "--zsc-class-prompt-mapping", data / "class_prompts_ensemble.json",
        "--zsc-specimen-class-mapping", data / "specimen_class.json",
    ]  # fmt: skip
    if not (run / "test.json").exists():
        slidevlm("train", "--config", RECIPE, *paths, "--logs", out, "--name", run.name,
                 "--seed", seed, "--no-save-captions")  # fmt: skip
    if not list(run.glob("evaluation-*/metrics.json")):
        examples = [data / f"few_shot_{k}.json" for k in (1, 4, 16)]
        slidevlm("evaluate", run, "--probe", "--eval-metric-bootstraps", 1000, "--no-save-captions",
                 "--few-shot-examples", *examples)  # fmt: skip
    if not (run / "reports.json").exists():
        slidevlm("caption", run, data / "tcga.h5", "--split", data / "test.txt",
                 "--output", run / "reports.json", *DECODING)  # fmt: skip
    return run


def demo_run(seed: int, out: Path) -> dict[str, float]:
    """Metrics of a demo's test split."""
    folder = out / f"demo-{seed}"
    metrics = folder / "runs" / "demo" / "metrics.json"
    if not metrics.exists():
        slidevlm("demo", folder, "--seed", seed)
    found = json.loads(metrics.read_text())["metrics"]
    return {name: found[f"test/{name}"]["value"] for name in DEMO_ROWS}


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def table_of_tasks(runs: list[Path], cohort: Cohort) -> list[str]:
    """Retrieval, zero-shot, few-shot, probe."""
    known = baselines(cohort)
    stored = [json.loads((newest_evaluation(r) / "metrics.json").read_text()) for r in runs]
    found = [content["metrics"] for content in stored]
    lines = [
        f"| test split, {len(cohort.ids['test'])} specimens | mean ± sd of {len(runs)} seeds "
        "| 95 % interval, first seed | baseline | | bar |",
        "|---|---|---|---|---|---|",
    ]
    for name, key, what in ROWS:
        values = [metrics[f"test/{name}"]["value"] for metrics in found]
        first = found[0][f"test/{name}"]
        bar = ""
        if name in BARS:
            met = "met" if np.mean(values) >= BARS[name] else "missed"
            bar = f"{BARS[name]:.2f}: {met}"
        beside = "" if key is None else f"{known[key]:.3f}"
        lines.append(f"| {name} | {spread(values)} | {first['lo']:.3f} to {first['hi']:.3f} | "
                     f"{beside} | {what} | {bar} |")  # fmt: skip
    return lines


def retrieved(run: Path, data: Path, cohort: Cohort) -> list[str]:
    """The training report nearest to each test slide in the model's joint space."""
    vectors = run / "slides.npz"
    if not vectors.exists():
        slidevlm("embed", run, data / "tcga.h5", "--split", data / "test.txt",
                 "--output", vectors)  # fmt: skip
    with np.load(vectors) as file:
        slides = dict(zip(file["specimen_ids"].tolist(), file["image_embedding"], strict=True))
    reports = cohort.texts("train")
    texts = load(run).embed_text(reports)
    images = np.stack([slides[i] for i in cohort.ids["test"]])
    return [reports[i] for i in (images @ texts.T).argmax(1)]


def table_of_reports(runs: list[Path], data: Path, cohort: Cohort) -> list[str]:
    """Scores of the model's reports, written and found, beside those of two baselines."""
    ids, truth = cohort.ids["test"], cohort.texts("test")
    patients = [specimen[:12] for specimen in ids]
    texts = {
        "frequent words": [frequent_words(cohort.texts("train"))] * len(ids),
        "nearest report": nearest(cohort),
    }
    for run in runs:
        content = json.loads((run / "reports.json").read_text())
        written = {r["id"]: r["report"] for r in content}
        texts[f"{run.name} written"] = [written[i] for i in ids]
        texts[f"{run.name} found"] = retrieved(run, data, cohort)
    counted = {name: Scoring().count(reports, truth) for name, reports in texts.items()}
    values = {name: c.scores() for name, c in counted.items()}
    bootstrap = Bootstrap(1000)
    drawn = {
        way: bootstrap.values(patients, counted[f"{runs[0].name} {way}"].values).values
        for way in ("written", "found")
    }
    lines = [
        f"| score | written, mean ± sd of {len(runs)} seeds (95 % interval, first seed) "
        "| found, likewise | frequent words | nearest report | written, found beat both |",
        "|---|---|---|---|---|---|",
    ]
    for score in SCORES:
        others = [values[name][score] for name in ("frequent words", "nearest report")]
        cells, beats = [], []
        for way, resampled in drawn.items():
            ours = [values[f"{run.name} {way}"][score] for run in runs]
            cell = spread(ours)
            if score in resampled:
                low, high = bootstrap.interval(resampled[score])
                cell += f" ({low:.3f} to {high:.3f})"
            cells.append(cell)
            beats.append("yes" if np.mean(ours) > max(others) else "no")
        word = _NO_CONTEST.get(score, ", ".join(beats))
        beside = " | ".join(f"{value:.3f}" for value in others)
        lines.append(f"| {score} | {' | '.join(cells)} | {beside} | {word} |")
    return lines


def main() -> None:
    """Run everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tcga"))
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--no-demo", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [tcga_run(seed, args.data, args.out) for seed in args.seeds]
    cohort = Cohort(args.data)
    lines = ["## tcga", "", *table_of_tasks(runs, cohort), "", "## tcga: reports", "",
             *table_of_reports(runs, args.data, cohort)]  # fmt: skip
    if not args.no_demo:
        found = [demo_run(seed, args.out) for seed in args.seeds]
        lines += ["", "## Demo cohort", "", "| test split | mean ± sd |", "|---|---|"]
        lines += [f"| {name} | {spread([m[name] for m in found])} |" for name in DEMO_ROWS]
    lines += ["", f"{time.perf_counter() - began:.0f} s in all, seeds {args.seeds}"]
    text = "\n".join(lines) + "\n"
    (args.out / "quality.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

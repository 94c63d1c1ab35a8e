"""Quality on real slides: the recommended settings, several seeds, beside scikit-learn's baselines.

    make quality
    python -m benchmarks.quality [--seeds 0 1 2] [--data ../shared/data/tcga] [--out quality]
        [--no-demo] [--at-once 2] [--refit]

For each seed: trains examples/tcga.yaml, evaluates the test split (retrieval, zero-shot, few-shot,
probe, intervals of 1,000 resamples of patients), writes its reports as the model's configuration
says (`generation`) and scores them; then the demo cohort, synthesized by that seed. Baselines of
benchmarks/tcga.py and benchmarks/reports.py are computed in the same run. Beside the reports that
the model writes stand those that it finds: of each slide the training report whose embedding is
nearest to the slide's.

With --refit the settings are trained on training and validation split together, which cannot be
validated any more, and so are the baselines: what more specimens bring. The bars are for the
training split alone; they, reports and the demo cohort are left out. It all goes to `--out`/refit.

Seeds run side by side, `--at-once` of them, and share the cores: a step on bags this small leaves
a second thread little to do. Everything goes to `--out`, the tables to `--out`/quality.md: mean and
standard deviation over seeds, the interval of the first seed, the bar, the seconds of each part;
what a command says to `--out`/NAME.log. What is there already is not computed again, so a run that
was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import yaml
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
SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor_exact_stem", "cider",
          "cider_plain", "keyword_jaccard", "clinical/site/f1", "clinical/type/f1",
          "repetition_4", "length_ratio")  # fmt: skip
_NO_CONTEST = {"repetition_4": "less is better", "length_ratio": ""}
DEMO_ROWS = ("image_to_text/R@10", "zero_shot/diagnosis/balanced_accuracy",
             "zero_shot/grade/balanced_accuracy", "zero_shot/margin/balanced_accuracy",
             "captions/bleu_4", "captions/rouge_l")  # fmt: skip


class Commands:
    """Runs `slidevlm` with a share of the cores, and keeps what it says and its seconds.

    Args:
        out: gets the logs.
        at_once: commands that run at a time.
    """

    def __init__(self, out: Path, at_once: int) -> None:
        self.out = out
        threads = max(1, len(os.sched_getaffinity(0)) // at_once)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, *words: object) -> None:
        """Run one command.

        Raises:
            RuntimeError: it failed; with the end of its log.
        """
        log = self.out / f"{name}.log"
        began = time.perf_counter()
        with log.open("w") as file:
            code = subprocess.run(
                [sys.executable, "-m", "slidevlm", *map(str, words)],
                stdout=file, stderr=subprocess.STDOUT, env=self.environment, check=False,
            ).returncode  # fmt: skip
        if code:
            raise RuntimeError(
                f"{name} ended with {code}; the end of {log}:\n{log.read_text()[-2000:]}"
            )
        self.seconds[name] = time.perf_counter() - began
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)


def side_by_side(tasks: Sequence[Callable[[], Path]], at_once: int) -> list[Path]:
    """The tasks' results, in order. After a failure no other task begins."""
    failed = threading.Event()

    def unless_failed(task: Callable[[], Path]) -> Path:
        if failed.is_set():
            raise CancelledError
        try:
            return task()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(at_once) as pool:
        # Tasks begin in order, so the first that raises here is one that failed.
        return list(pool.map(unless_failed, tasks))


def joined(data: Path, out: Path) -> tuple[Path, Path]:
    """The data with the validation split in the training split, and the settings without one."""
    folder = out / "data"
    folder.mkdir(exist_ok=True)
    for file in data.iterdir():
        place = folder / file.name
        if file.name not in ("train.txt", "val.txt") and not place.exists():
            place.symlink_to(file.resolve())
    both = [(data / name).read_text().strip() for name in ("train.txt", "val.txt")]
    (folder / "train.txt").write_text("\n".join(both) + "\n")
    settings = yaml.safe_load(RECIPE.read_text())
    recipe = out / "recipe.yaml"
    kept = {k: v for k, v in settings.items() if "val" not in k.split("_")}
    recipe.write_text(yaml.safe_dump(kept))
    return folder, recipe


def tcga_run(
    seed: int,
    data: Path,
    out: Path,
    slidevlm: Commands,
    recipe: Path = RECIPE,
    *,
    reports: bool = True,
) -> Path:
    """Train, evaluate, caption and embed with one seed; the run's folder."""
    run = out / f"tcga-{seed}"
    validation = data / "val.txt"
    paths = [
        "--hdf5_filename", data / "tcga.h5", "--train-split", data / "train.txt",
        *(["--val-split", validation] if validation.exists() else []),
        "--test-split", data / "test.txt",
        "--zsc-class-prompt-mapping", data / "class_prompts_ensemble.json",
        "--zsc-specimen-class-mapping", data / "specimen_class.json",
    ]  # fmt: skip
    if not (run / "test.json").exists():
        slidevlm(f"train-{run.name}", "train", "--config", recipe, *paths, "--logs", out,
                 "--name", run.name, "--seed", seed, "--no-save-captions",
                 "--workers", 0)  # fmt: skip
    if not list(run.glob("evaluation-*/metrics.json")):
        examples = [data / f"few_shot_{k}.json" for k in (1, 4, 16)]
        slidevlm(f"evaluate-{run.name}", "evaluate", run, "--probe", "--eval-metric-bootstraps",
                 1000, "--no-save-captions", "--few-shot-examples", *examples)  # fmt: skip
    if not reports:
        return run
    if not (run / "reports.json").exists():
        slidevlm(f"caption-{run.name}", "caption", run, data / "tcga.h5", "--split",
                 data / "test.txt", "--output", run / "reports.json", "--workers", 0)  # fmt: skip
    if not (run / "slides.npz").exists():
        slidevlm(f"embed-{run.name}", "embed", run, data / "tcga.h5", "--split",
                 data / "test.txt", "--output", run / "slides.npz", "--workers", 0)  # fmt: skip
    return run


def demo_run(seed: int, out: Path, slidevlm: Commands) -> Path:
    """A demo; the file of its metrics."""
    folder = out / f"demo-{seed}"
    metrics = folder / "runs" / "demo" / "metrics.json"
    if not metrics.exists():
        slidevlm(folder.name, "demo", folder, "--seed", seed)
    return metrics


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def table_of_tasks(runs: list[Path], cohort: Cohort, bars: Mapping[str, float] = BARS) -> list[str]:
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
        if name in bars:
            met = "met" if np.mean(values) >= bars[name] else "missed"
            bar = f"{bars[name]:.2f}: {met}"
        beside = "" if key is None else f"{known[key]:.3f}"
        lines.append(f"| {name} | {spread(values)} | {first['lo']:.3f} to {first['hi']:.3f} | "
                     f"{beside} | {what} | {bar} |")  # fmt: skip
    return lines


def retrieved(run: Path, cohort: Cohort) -> list[str]:
    """The training report nearest to each test slide in the model's joint space."""
    with np.load(run / "slides.npz") as file:
        slides = dict(zip(file["specimen_ids"].tolist(), file["image_embedding"], strict=True))
    reports = cohort.texts("train")
    texts = load(run).embed_text(reports)
    images = np.stack([slides[i] for i in cohort.ids["test"]])
    return [reports[i] for i in (images @ texts.T).argmax(1)]


def table_of_demos(files: list[Path]) -> list[str]:
    """Test metrics of the demo cohorts."""
    found = [json.loads(file.read_text())["metrics"] for file in files]
    rows = [
        f"| {name} | {spread([m[f'test/{name}']['value'] for m in found])} |" for name in DEMO_ROWS
    ]
    return [f"| test split | mean ± sd of {len(files)} seeds |", "|---|---|", *rows]


def table_of_reports(runs: list[Path], cohort: Cohort) -> list[str]:
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
        texts[f"{run.name} found"] = retrieved(run, cohort)
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
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    parser.add_argument("--refit", action="store_true", help="train on validation too")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.refit:  # other runs of the same names
        args.out /= "refit"
    args.out.mkdir(parents=True, exist_ok=True)
    commands = Commands(args.out, args.at_once)
    data, recipe = joined(args.data, args.out) if args.refit else (args.data, RECIPE)
    run = partial(tcga_run, data=data, out=args.out, slidevlm=commands, recipe=recipe,
                  reports=not args.refit)  # fmt: skip
    tasks = [partial(run, seed) for seed in args.seeds]
    if not args.no_demo and not args.refit:
        tasks += [partial(demo_run, seed, args.out, commands) for seed in args.seeds]
    found = side_by_side(tasks, args.at_once)
    runs, demos = found[: len(args.seeds)], found[len(args.seeds) :]
    cohort = Cohort(data)
    lines = ["## tcga", "", *table_of_tasks(runs, cohort, {} if args.refit else BARS)]
    if not args.refit:
        lines += ["", "## tcga: reports", "", *table_of_reports(runs, cohort)]
    if demos:
        lines += ["", "## Demo cohort", "", *table_of_demos(demos)]
    lines += ["", "| computed now | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in commands.seconds.items()]
    lines += [f"| all, {args.at_once} at once | {time.perf_counter() - began:.0f} |"]
    text = "\n".join(lines) + "\n"
    (args.out / "quality.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

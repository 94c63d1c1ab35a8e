"""The demo: a synthetic cohort, a training, an evaluation, a run folder to look at."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from slidevlm.app import train
from slidevlm.app.outputs import metrics_json
from slidevlm.app.page import write_page
from slidevlm.config import Config, with_values
from slidevlm.data.synthetic import FEATURES, TEXT, DemoCohort, synthesize
from slidevlm.errors import ConfigError
from slidevlm.precision import quickest
from slidevlm.run import Bar

_PAGE = "curves, tables, map and specimens: open it in a browser"
_NO_PAGE = "it needs plotly: pip install 'slidevlm[report]', then slidevlm report RUN"


def synthesize_with_bar(folder: Path, specimens: int, seed: int) -> DemoCohort:
    """`synthesize`, with progress on a terminal."""
    bar = Bar("synthesizing", specimens, shown=True)
    try:
        return synthesize(
            folder, specimens=specimens, seed=seed, progress=lambda done, _: bar.update(done)
        )
    finally:
        bar.close()


def demo(
    folder: Path,
    *,
    specimens: int,
    epochs: int,
    seed: int,
    workers: int,
    as_json: bool = False,
) -> None:
    """Synthesize, train, evaluate, and say where to look.

    Args:
        folder: gets `cohort/` and `runs/demo/`.
        specimens: of the cohort.
        epochs: of the training.
        seed: of the cohort and the training.
        workers: loader processes.
        as_json: print the run's folder and metrics as JSON.

    Raises:
        ConfigError: the folder has a run of an earlier demo.
    """
    began = time.perf_counter()
    run = folder / "runs" / "demo"
    if run.exists():
        raise ConfigError(f"{run} is there from an earlier demo; remove it or give another folder")
    cohort = synthesize_with_bar(folder / "cohort", specimens, seed)
    config = _settings(cohort, folder, epochs=epochs, seed=seed, workers=workers)
    metrics = train(config)
    page = None
    if find_spec("plotly") is not None:
        page = write_page([run])
    if as_json:
        print(metrics_json(run, metrics))
        return
    print(
        f"\ndone in {time.perf_counter() - began:.0f} s. Where to look:\n"
        f"  {page or 'no page of the run'}   {_PAGE if page else _NO_PAGE}\n"
        f"  {run}/test.md              results on the test split, with reports to read\n"
        f"  {run}/captions_test.json   every generated report beside the true one\n"
        f"  {run}/metrics.jsonl        learning curves\n"
        f"  {run}/config.yaml          all settings; slidevlm train --config runs it again\n"
        f"  {run}/checkpoints/         the trained model; slidevlm evaluate {run}"
    )


def _settings(cohort: DemoCohort, folder: Path, *, epochs: int, seed: int, workers: int) -> Config:
    """The arguments of the demo's training."""
    tasks = ("diagnosis", "grade", "margin")
    return with_values(
        Config(),
        {
            "hdf5_filename": str(cohort.hdf5),
            "hdf5_feature_attribute": FEATURES,
            "hdf5_text_attribute": TEXT,
            "train_split": str(cohort.split("train")),
            "val_split": (str(cohort.split("val")),),
            "test_split": str(cohort.split("test")),
            "zsc_class_prompt_mapping": tuple(str(cohort.prompts(t)) for t in tasks),
            "zsc_specimen_class_mapping": tuple(str(cohort.labels(t)) for t in tasks),
            "model": "coca_small",
            "epochs": epochs,
            # A cohort of the fewest specimens has not even 16 to train on.
            "batch_size": min(16, len(cohort.split("train").read_text().split())),
            "image_features_cutoff": 512,
            "lr": 2e-3,
            "warmup": 30,
            "grad_clip_norm": 1.0,
            "log_every_n_steps": 20,
            "workers": workers,
            "precision": quickest(),
            "save_captions": True,
            "caption_val_frequency": epochs,
            "caption_val_max_seq_len": 80,
            "val_gen_top_k": 1,
            "val_frequency": 2,
            "logs": str(folder / "runs"),
            "name": "demo",
            "seed": seed,
        },
    )

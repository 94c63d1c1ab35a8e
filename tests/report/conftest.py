"""Folders of runs whose names and reports try to act on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slidevlm.app.outputs import Outputs, about
from slidevlm.app.rescoring import score_stored
from slidevlm.app.suite import Suite
from slidevlm.batch import Predictions
from slidevlm.config import Config, with_values
from slidevlm.eval.stored import Stored
from slidevlm.run import Run

HOSTILE = (
    '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script><!-- '
    '\u2028 {{data}} <a href="javascript:window.hacked=1">x</a> <svg onload=window.hacked=1>'
)
CLASSES = ("adenoma", f"carcinoma {HOSTILE}", "none")


def write_run(folder: Path, n: int = 60, seed: int = 0, *, generated: bool = True) -> Path:
    """A run of n specimens: an evaluation with a task, and learning curves."""
    random = np.random.default_rng(seed)
    labels = [i % 3 for i in range(n)]
    centres = random.normal(size=(3, 16))

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    image = unit(centres[labels] + 0.6 * random.normal(size=(n, 16)))
    reports = tuple(f"Specimen {i} shows {CLASSES[c]}. Margin free." for i, c in enumerate(labels))
    split = Predictions(
        specimen_ids=tuple(f"S{i:04d}" if i else f"S0000 {HOSTILE}" for i in range(n)),
        patient_ids=tuple(f"P{i // 2}" for i in range(n)),
        reports=reports,
        report_ids=np.arange(n),
        image_embedding=image,
        text_embedding=unit(image + 0.3 * random.normal(size=(n, 16))),
        logit_scale=10.0,
        generated=tuple(f"Shows {CLASSES[c]}, margin involved." for c in labels)
        if generated
        else None,
        losses={"contrastive": 1.0},
    )
    prompts, truth = folder.parent / "prompts.json", folder.parent / "site.json"
    folder.mkdir(parents=True)
    prompts.write_text(json.dumps({c: [c] for c in CLASSES}))
    truth.write_text(
        json.dumps({s: CLASSES[c] for s, c in zip(split.specimen_ids, labels, strict=True)})
    )
    config = with_values(
        Config(),
        {
            "zsc_class_prompt_mapping": (str(prompts),),
            "zsc_specimen_class_mapping": (str(truth),),
            "eval_metric_bootstraps": 30,
        },
    )
    stored = Stored(
        {"test": split}, {}, CLASSES, unit(centres), about(config, None, {"test": split})
    )
    with Run(folder) as run:
        Outputs(run, "", Suite(config).bootstrap).write(
            "test", "coca_tiny", score_stored(stored, config), stored
        )
        for step in range(1, 6):
            run.log("train", step, {"epoch": step / 5, "caption_loss": 3 / step, "loss": 4 / step})
        run.log(
            "evaluation", 5, {"epoch": 1.0, "test/loss/caption": 1.0, "test/loss/nan": float("nan")}
        )
    (folder / "config.yaml").write_text("epochs: 1\nname: tiny\n")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "tiny")


@pytest.fixture
def writer() -> Callable[..., Path]:
    return write_run

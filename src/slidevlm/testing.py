"""Tiny models and data for tests and examples: of users, and of slidevlm's own docstrings.

Examples:
    >>> from slidevlm import testing
    >>> testing.bag(tiles=5).shape
    (5, 16)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from slidevlm.app.slide_model import SlideModel
    from slidevlm.app.trained import Trained

TILE_WIDTH = 16
REPORTS = (
    "Lung, lobectomy: adenocarcinoma, acinar pattern, grade 2.",
    "Kidney, nephrectomy: clear cell carcinoma, margins free of tumour.",
    "Breast, excision: invasive ductal carcinoma, grade 3.",
)


def bag(tiles: int = 20, *, tile_width: int = TILE_WIDTH, seed: int = 0) -> np.ndarray:
    """Features of the tiles of one slide: [tiles, tile_width] float32, normally distributed."""
    import numpy as np

    random = np.random.default_rng(seed)
    return random.standard_normal((tiles, tile_width)).astype(np.float32)


def model(name: str = "coca_tiny", *, unit: str | None = None, seed: int = 0) -> SlideModel:
    """A model with random weights on the CPU, for tiles of width 16.

    Args:
        name: of its configuration.
        unit: of the positions that it reads: "um", "px", or None: it reads none.
        seed: equal ones give equal weights.
    """
    import torch

    from slidevlm.app.slide_model import SlideModel
    from slidevlm.precision import resolve

    return SlideModel(_trained(name, unit, seed), resolve("fp32", torch.device("cpu")))


def run(folder: str | os.PathLike[str], name: str = "coca_tiny", *, seed: int = 0) -> Path:
    """Weights with all that belongs to them in `folder`, as `slidevlm models export` writes them.

    Returns:
        The folder, which `slidevlm.load` and every command that uses a model take.
    """
    from slidevlm.app.export import write_folder

    write_folder(_trained(name, None, seed), Path(folder))
    return Path(folder)


def settings(folder: str | os.PathLike[str], *, specimens: int = 20) -> dict[str, Any]:
    """Arguments of a training that takes seconds on a CPU, of a cohort that is written there.

    Args:
        folder: gets `cohort/` with synthetic specimens, and `logs/` with what is trained on them.
        specimens: of the cohort, at least 20.

    Returns:
        What `slidevlm.train` takes.
    """
    from slidevlm.data.synthetic import FEATURES, TEXT, synthesize

    made = synthesize(Path(folder) / "cohort", specimens=specimens, seed=0)
    return {
        "hdf5_filename": str(made.hdf5),
        "hdf5_feature_attribute": FEATURES,
        "hdf5_text_attribute": TEXT,
        "train_split": str(made.split("train")),
        "test_split": str(made.split("test")),
        "model": "coca_tiny",
        "epochs": 1,
        "batch_size": 4,
        "workers": 0,
        "image_features_cutoff": 64,
        "device": "cpu",
        "precision": "fp32",
        "logs": str(Path(folder) / "logs"),
    }


def _trained(name: str, unit: str | None, seed: int) -> Trained:
    import dataclasses

    import torch

    from slidevlm.app.trained import Trained
    from slidevlm.data.statistics import token_table
    from slidevlm.data.tokenizer import Tokenizer
    from slidevlm.models import CoCa, build_model, zoo

    tokenizer = Tokenizer.train(REPORTS, 300)
    config = dataclasses.replace(zoo.load(name), tile_width=TILE_WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build_model(config, tokenizer.vocab_size)
    if isinstance(made, CoCa):
        rank = config.text.prior_rank
        table = token_table(tokenizer, REPORTS, rank, seed) if rank else None
        made.start_from(torch.zeros(TILE_WIDTH), torch.ones(TILE_WIDTH), table)
    return Trained(made, config, tokenizer, False, unit)

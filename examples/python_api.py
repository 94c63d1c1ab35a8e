"""From Python: train, look, use. What a notebook would hold, cell by cell.

    python examples/python_api.py FOLDER

Synthetic data; a minute on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np

import slidevlm
from slidevlm.data.synthetic import synthesize


def main(folder: Path) -> None:
    """All cells."""
    # %% A cohort with known truth; your own is a dictionary of the same keys.
    cohort = synthesize(folder / "cohort", specimens=120, seed=0)

    # %% Train. Keys are the arguments of `slidevlm train`.
    run = slidevlm.train(
        {
            "hdf5_filename": cohort.hdf5,
            "hdf5_feature_attribute": "demo",
            "hdf5_text_attribute": "report",
            "train_split": cohort.split("train"),
            "val_split": [cohort.split("val")],
            "model": "coca_tiny",
            "epochs": 3,
            "batch_size": 16,
            "lr": 3e-3,
            "warmup": 10,
            "image_features_cutoff": 256,
            "workers": 1,
            "precision": "fp32",
            "device": "cpu",
            "logs": folder / "logs",
            "name": "notebook",
        }
    )
    print(run)

    # %% Use.
    model = slidevlm.load(folder / "logs" / "notebook")
    with h5py.File(cohort.hdf5) as file:
        path = file["case-index/case_paths"][0].decode()
        tiles = file[path]["demo"]
        bag = slidevlm.Tiles(tiles["features"][:], tiles["positions"][:], unit="um")
    print("embedding", model.embed(bag).shape)
    found = model.classify(bag, {"breast": "breast", "colon": "colon", "lung": "lung"})
    print(dict(zip(found.classes, found.probabilities.round(3), strict=True)))
    print("report:", model.caption(bag, max_tokens=40))

    # %% Search: which of these sentences is nearest to the slide?
    sentences = ["invasive ductal carcinoma", "squamous cell carcinoma of the lung"]
    scores = model.embed_text(sentences) @ model.embed(bag)
    print(sentences[int(np.argmax(scores))])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

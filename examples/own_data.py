"""Own data, from the files of CLAM or TRIDENT to the report of an own slide.

    python examples/own_data.py FOLDER [--layout clam|trident]

Writes into FOLDER what the tool would have left (features here are made up: 40 slides of two
tissues), then runs the commands of docs/own-data.md one after the other. With your own features
only the first function goes. Takes a minute on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np

TISSUES = {
    "colon": "Colon, hemicolectomy. Adenocarcinoma of the colon, moderately differentiated.",
    "lung": "Lung, lobectomy. Squamous cell carcinoma of the lung, poorly differentiated.",
}
WIDTH, SLIDES = 64, 40


def write_features(folder: Path, layout: str) -> Path:
    """One HDF5 file a slide, as CLAM or TRIDENT name and fill it; returns what --root-dir takes."""
    rng = np.random.default_rng(0)
    prototypes = {tissue: rng.normal(size=WIDTH) for tissue in TISSUES}
    features = folder / ("h5_files" if layout == "clam" else "features_uni_v1")
    features.mkdir(parents=True)
    reports, labels = folder / "reports.csv", {}
    with reports.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "report"])
        for number in range(SLIDES):
            slide, tissue = f"slide_{number:03d}", list(TISSUES)[number % 2]
            tiles = int(rng.integers(20, 200))
            values = prototypes[tissue] + rng.normal(size=(tiles, WIDTH))
            with h5py.File(features / f"{slide}.h5", "w") as h5:
                h5["features"] = values.astype(np.float32)
                coords = h5.create_dataset(
                    "coords", data=512 * rng.integers(0, 60, size=(tiles, 2))
                )
                if layout == "trident":
                    coords.attrs["patch_size_level0"] = 512
                    h5["features"].attrs["encoder"] = "uni_v1"
            table.writerow([slide, TISSUES[tissue]])
            labels[slide] = tissue
    (folder / "labels.json").write_text(json.dumps(labels))
    prompts = {t: [f"{t}", text.split(". ")[1]] for t, text in TISSUES.items()}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder if layout == "clam" else features


def slidevlm(*words: object) -> None:
    """Run a command, and show it."""
    print("$ slidevlm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "slidevlm", *map(str, words)], check=True)


def main() -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("clam", "trident"), default="trident")
    asked = parser.parse_args()
    folder: Path = asked.folder
    root = write_features(folder, asked.layout)
    splits, reports = folder / "splits", folder / "reports.csv"

    slidevlm("data", "inspect", root)
    slidevlm(
        *("data", "split", root, splits, "--labels", folder / "labels.json"),
        *("--fractions", "0.6", "0.2", "0.2"),
    )
    data = ["--root-dir", root, "--text-data-file", reports]
    for name in ("train", "val", "test"):
        data += [f"--{name}-split", splits / f"{name}.txt"]
    data += ["--zsc-class-prompt-mapping", folder / "prompts.json"]
    data += ["--zsc-specimen-class-mapping", folder / "labels.json"]
    slidevlm("data", "check", *data, "--batch-size", "8")
    slidevlm(
        *("train", *data, "--model", "coca_tiny", "--epochs", "8", "--batch-size", "8"),
        *("--lr", "3e-3", "--warmup", "5", "--workers", "1", "--precision", "fp32"),
        *("--device", "cpu", "--logs", folder / "logs", "--name", "own"),
    )
    run = folder / "logs" / "own"
    slidevlm("report", run)
    one = next(root.rglob("slide_000.h5"))
    slidevlm("caption", run, one, "--output", folder / "captions.json")
    print((folder / "captions.json").read_text())


if __name__ == "__main__":
    main()

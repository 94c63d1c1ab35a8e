"""A damaged file is a DataError that names file and specimen: no crash, no hang, no other shape.

1,000 random corruptions of each container ($SLIDEVLM_CORRUPTIONS; `make hard`: 5,000 others). A
flipped bit of a feature cannot be noticed where the container has no checksum, so that reading
succeeds is no failure as long as the shape is right.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.formats.slide_folder import SlideFolder
from slidevlm.errors import DataError

COUNT, WIDTH = 60, 12
ROWS = np.arange(0, COUNT, 3)
CORRUPTIONS = int(os.environ.get("SLIDEVLM_CORRUPTIONS", "1000"))
FIRST = int(os.environ.get("SLIDEVLM_FUZZ_SEED", "0")) % 1_000_000_007  # others each time
HEADER = 1500  # bytes at the beginning that are hit more often than chance would
HANG_SECONDS = 180  # a busy machine is slow; what hangs does so for ever


def damaged(content: bytes, seed: int) -> bytes:
    """Cut short, or with up to 8 bits flipped, anywhere or in the header."""
    rng = np.random.default_rng(seed)
    how = rng.integers(3)
    if how == 0:
        return content[: rng.integers(len(content))]
    changed = bytearray(content)
    limit = len(changed) if how == 1 else min(len(changed), HEADER)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(limit)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def open_cohort(root: Path, kind: str) -> SlideFolder | Hdf5Cases:
    return Hdf5Cases(root / "slide.h5", "uni", "report") if kind == "cases" else SlideFolder(root)


def problem(root: Path, kind: str) -> str | None:
    """What is wrong with how a damaged cohort is read; None where all is well."""
    try:
        store = open_cohort(root, kind)
    except DataError as error:  # only the case layout reads anything so early
        return None if "slide.h5" in str(error) else f"names no file: {error}"
    case = store.cases[0]
    try:
        if store.length(case) != COUNT:
            return f"{store.length(case)} tiles"
        for rows in (None, ROWS):
            bag = store.read(case, rows)
            wanted = COUNT if rows is None else len(rows)
            if tuple(bag.features.shape) != (wanted, WIDTH):
                return f"features {tuple(bag.features.shape)}"
            if bag.positions is not None and tuple(bag.positions.shape) != (wanted, 2):
                return f"positions {tuple(bag.positions.shape)}"
        store.text(case)
    except DataError as error:
        named = "slide." in str(error) and ("'slide'" in str(error) or "/slide" in str(error))
        return None if named else f"names no file or specimen: {error}"
    finally:
        if hasattr(store, "close"):
            store.close()
    return None


def run(root: Path, kind: str, results: Path) -> None:
    """Damage one file of the cohort after another; write down what went wrong."""
    warnings.simplefilter("ignore")
    files = {file: file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}
    names = [file for file, content in files.items() if content]
    found = {}
    for seed in range(CORRUPTIONS):
        file = names[seed % len(names)]
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        results.write_text(json.dumps({"at": seed, "found": found}))
        file.write_bytes(damaged(files[file], FIRST + seed))
        try:
            wrong = problem(root, kind)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        file.write_bytes(files[file])
        if wrong is not None:
            found[seed] = wrong
    assert problem(root, kind) is None, "sound again"
    results.write_text(json.dumps({"at": CORRUPTIONS, "found": found}))


def cases(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    with CaseWriter(path.with_suffix(".h5"), "uni", attributes={"unit": "um"}) as writer:
        keys = [f"a/{row}" for row in range(len(features))]
        writer.add("patient", "slide", features, "A report.", coords, keys)
    return path.with_suffix(".h5")


@pytest.mark.slow
@pytest.mark.timeout(100 + 0.6 * max(CORRUPTIONS, 1000))
@pytest.mark.parametrize(
    "kind",
    [
        "stamp", "trident", "gzipped", "cases", "gigapath", "legacy", "npy", "npz",
        "npz_compressed", "safetensors", "lazyslide", "tiatoolbox",
    ],
)  # fmt: skip
def test_damage(tmp_path, makers, kind):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((COUNT, WIDTH)).astype(np.float32)
    coords = rng.integers(0, 9999, (COUNT, 2))
    (tmp_path / "cohort").mkdir()
    ({"cases": cases} | makers)[kind](tmp_path / "cohort/slide", features, coords)
    results = tmp_path / "results.json"
    # By itself, so that a crash or a hang of a library is seen and does not end the tests.
    child = multiprocessing.get_context("fork").Process(
        target=run, args=(tmp_path / "cohort", kind, results)
    )
    child.start()
    child.join(0.6 * max(CORRUPTIONS, 1000))
    if child.is_alive():
        child.kill()
    told = json.loads(results.read_text())
    assert child.exitcode == 0, f"corruption {told['at']} ended the process: {child.exitcode}"
    assert told == {"at": CORRUPTIONS, "found": {}}
    shutil.rmtree(tmp_path / "cohort")


def test_the_test_sees_a_wrong_shape(tmp_path, makers):
    (tmp_path / "cohort").mkdir()
    makers["npy"](tmp_path / "cohort/slide", np.ones((COUNT, 3), "f4"), np.ones((COUNT, 2)))
    assert problem(tmp_path / "cohort", "npy") == "features (60, 3)"

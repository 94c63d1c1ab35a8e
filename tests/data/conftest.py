"""Small real files for the data tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from slidevlm.data.formats.hdf5_cases import CaseWriter


def bag(number: int, rows: int, width: int = 6) -> np.ndarray:
    """[rows, width] float16; the first column counts rows, the second names the specimen."""
    features = np.random.default_rng(number).standard_normal((rows, width)).astype(np.float16)
    features[:, 0] = np.arange(rows)
    features[:, 1] = number
    return features


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write specimens s0, s1, ... of patients p0, p1, ... with the given numbers of tiles."""

    def write_cohort(lengths: Iterable[int], name: str = "cohort.h5", width: int = 6) -> Path:
        path = tmp_path / name
        with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
            for number, rows in enumerate(lengths):
                places = np.stack([np.arange(rows) * 10.0, np.full(rows, 5.0)], axis=1)
                writer.add(
                    f"p{number}",
                    f"s{number}",
                    bag(number, rows, width),
                    f"Report of specimen {number}.",
                    places,
                    [f"slide{int(row >= rows / 2)}/{row}" for row in range(rows)],
                )
        return path

    return write_cohort

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidevlm.data.cases import centres_of, open_store, unique_cases
from slidevlm.errors import ConfigError, DataError


def open_with(**given: object) -> object:
    names = ("hdf5_filename", "hdf5_feature_attribute", "hdf5_text_attribute", "root_dir")
    return open_store(**{name: given.get(name) for name in names})


def test_one_source_is_needed(write):
    path = write([2])
    with pytest.raises(ConfigError, match="no data: give --hdf5_filename"):
        open_with()
    with pytest.raises(ConfigError, match="both given"):
        open_with(hdf5_filename=path, root_dir=path.parent)
    with pytest.raises(ConfigError, match="needs --hdf5_feature_attribute"):
        open_with(hdf5_filename=path)
    store = open_with(hdf5_filename=path, hdf5_feature_attribute="uni")
    assert store.text(store.cases[0]) is None


@pytest.mark.parametrize("names", [("p", "s\udcff"), ("\udcff", "s")])
def test_names_that_are_not_utf8_are_refused(names):
    """Linux gives them so; predictions.csv would be the first to stumble, after training."""
    assert unique_cases([("ü", "naïve 名", "x")], Path("data"))
    with pytest.raises(DataError, match=r"data: the name .*\\udcff.* is not UTF-8"):
        unique_cases([("p", "a", "x"), (*names, "y")], Path("data"))


def test_unique_cases():
    with pytest.raises(DataError, match="'s' of patient 'p' is listed twice, as a and b"):
        unique_cases([("p", "s", "a"), ("p", "s", "b")], Path("f"))
    with pytest.raises(DataError, match="f holds no specimens"):
        unique_cases([], Path("f"))


def test_centres_are_those_of_each_slide():
    positions = np.array([[0, 0], [4, 2], [100, 100], [2, 1], [104, 108]], float)
    slides = np.array([0, 0, 1, 0, 1])
    centres = centres_of(positions, slides)
    assert centres.tolist() == [[2, 1], [2, 1], [102, 104], [2, 1], [102, 104]]
    assert centres_of(positions[:0], slides[:0]).shape == (0, 2)
    # A slide without tiles leaves a gap in the numbers.
    assert centres_of(positions, slides * 3).tolist() == centres.tolist()

"""The cohort and its splits, as the arguments name them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from slidevlm.config import Config
from slidevlm.data.cases import CaseStore, open_store
from slidevlm.data.cohort import hold_together
from slidevlm.data.reports import read_text_file
from slidevlm.data.splits import Split, check_leakage, resolve

log = logging.getLogger("slidevlm")


@dataclass(frozen=True)
class Data:
    """The cohort and its splits."""

    store: CaseStore
    train: Split | None
    vals: tuple[Split, ...]
    test: Split | None

    @property
    def splits(self) -> list[Split]:
        """Those that are there, in the order train, validation, test."""
        return [s for s in (self.train, *self.vals, self.test) if s is not None]


def open_cohort(config: Config) -> CaseStore:
    """The specimens that the arguments name."""
    data = config.data
    return open_store(
        hdf5_filename=data.hdf5_filename,
        hdf5_feature_attribute=data.hdf5_feature_attribute,
        hdf5_text_attribute=data.hdf5_text_attribute,
        root_dir=data.root_dir,
        slide_table=data.slide_table,
    )


def open_data(config: Config) -> Data:
    """Open the cohort, read the splits, check them."""
    data, store = config.data, open_cohort(config)
    texts = None if data.text_data_file is None else read_text_file(Path(data.text_data_file))

    def split(path: str | None, name: str | None = None) -> Split | None:
        if path is None:
            return None
        found = resolve(Path(path), store, texts)
        return found if name is None else replace(found, name=name)

    train = split(data.train_split, "train")
    if train is not None and data.num_samples is not None:
        train = train.first(data.num_samples)
    vals = tuple(s for path in data.val_split or () if (s := split(path)) is not None)
    found = Data(store, train, vals, split(data.test_split, "test"))
    hold_together(store, [case for one in found.splits for case in one.cases])
    if not data.allow_patient_overlap:
        check_leakage(found.splits)
    for one in found.splits:
        log.info("split %s: %d specimens", one.name, len(one.cases))
    return found

"""The cohort and its splits, as the arguments name them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from slidevlm.config import Config
from slidevlm.data.cases import CaseStore, open_store
from slidevlm.data.cohort import hold_together
from slidevlm.data.formats.hdf5_cases import attribute_names, is_case_file
from slidevlm.data.formats.slide_folder import SlideFolder
from slidevlm.data.formats.slides import Source
from slidevlm.data.reports import read_text_file
from slidevlm.data.slide_table import read_slide_table
from slidevlm.data.splits import Split, check_leakage, resolve
from slidevlm.errors import ConfigError, DataError

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


def is_bag(path: Path) -> bool:
    """Whether a folder is one bag, as zarr has it."""
    return path.is_dir() and path.name.lower().endswith(".zarr")


def open_path(path: Path, feature_attribute: str | None, slide_table: Path | None) -> CaseStore:
    """The cohort at a path: a folder in a known form, or a file, in the case layout or another.

    `feature_attribute` may be None where a file in the case layout has just one.

    Raises:
        ConfigError: several feature attributes and none chosen, or an argument without effect.
        DataError: the path is no cohort.
    """
    if not path.exists():
        raise DataError(f"no file or folder {path} (looked in {Path.cwd()})")
    if path.is_dir() and not is_bag(path):
        if feature_attribute is not None:
            raise ConfigError(f"--hdf5_feature_attribute is for an HDF5 file; {path} is a folder")
        return open_store(
            hdf5_filename=None,
            hdf5_feature_attribute=None,
            hdf5_text_attribute=None,
            root_dir=path,
            slide_table=slide_table,
        )
    if Source(path).hdf5 is None:
        if feature_attribute is not None:
            raise ConfigError(f"--hdf5_feature_attribute is for an HDF5 file; {path} is none")
        return SlideFolder(path, None if slide_table is None else read_slide_table(slide_table))
    return open_store(
        hdf5_filename=path,
        hdf5_feature_attribute=feature_attribute or _only_attribute(path),
        hdf5_text_attribute=None,
        root_dir=None,
        slide_table=slide_table,
    )


def _only_attribute(path: Path) -> str | None:
    """The feature attribute of a file in the case layout; None for other files."""
    if not is_case_file(path):
        return None
    names, _ = attribute_names(path)
    if len(names) != 1:
        raise ConfigError(
            f"{path} has the feature attributes {', '.join(names) or '(none)'}; choose one by "
            "--hdf5_feature_attribute"
        )
    return names[0]


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

"""One module a file format. A format of folders registers itself in `FOLDERS`.

Adding a folder format: a module here with a class that has `description`, `recognises(root)`
and `__init__(root, slide_table)`, decorated with `@FOLDERS.register("name")`. Adding a form
of slide files: see `slides.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from slidevlm.data.cases import CaseStore
from slidevlm.data.slide_table import SlideRow
from slidevlm.errors import ConfigError, DataError
from slidevlm.registry import Registry


class FolderFormat(Protocol):
    """A class of stores over a folder."""

    description: str  # what the folder must contain, for the message when nothing fits

    def __call__(
        self, root: Path, slide_table: Sequence[SlideRow] | None = None
    ) -> CaseStore: ...  # ConfigError for a table where the format has no use for one

    def recognises(self, root: Path) -> bool:
        """Whether `root` looks like this format; looks at names only."""
        ...


FOLDERS: Registry[FolderFormat] = Registry("folder format")


def open_file(
    path: Path,
    feature_attribute: str | None,
    text_attribute: str | None,
    slide_table: Sequence[SlideRow] | None = None,
) -> CaseStore:
    """Open one HDF5 file: the case layout, or a known form of slides.

    ConfigError for an argument that its form lacks or cannot use; DataError: missing, damaged, or
    of no known form.
    """
    # They import this module to register themselves.
    from slidevlm.data.formats.hdf5 import Hdf5File
    from slidevlm.data.formats.hdf5_cases import Hdf5Cases, attribute_names
    from slidevlm.data.formats.slide_folder import SlideFolder

    file = Hdf5File(path, "check --hdf5_filename")
    names = file.names()
    file.close()
    if "case-index" in names or "patients" in names:
        if slide_table is not None:
            raise ConfigError(
                f"--slide-table: {path} is in the case layout, which names its specimens itself; "
                "leave the table out"
            )
        if feature_attribute is None:
            raise ConfigError(
                f"--hdf5_filename {path} needs --hdf5_feature_attribute, the group under each "
                f"specimen that holds its features: {', '.join(attribute_names(path)[0])}"
            )
        return Hdf5Cases(path, feature_attribute, text_attribute)
    if feature_attribute is not None or text_attribute is not None:
        raise ConfigError(
            f"--hdf5_filename {path} is not in the case layout, for it has neither /case-index nor "
            f"/patients (it has: {', '.join(names[:10]) or 'nothing'}); --hdf5_feature_attribute "
            "and --hdf5_text_attribute belong to that layout"
        )
    return SlideFolder(path, slide_table)


def open_folder(root: Path, slide_table: Sequence[SlideRow] | None = None) -> CaseStore:
    """Open `root` by the format that recognises it, perhaps with a table of slides.

    DataError when none does; ConfigError when the format has no use for a table.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"--root-dir {root} {what}; give the folder that holds the features")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for name in FOLDERS:
        if FOLDERS[name].recognises(root):
            return FOLDERS[name](root, slide_table)
    forms = "; ".join(f"{name}: {FOLDERS[name].description}" for name in FOLDERS)
    raise DataError(f"{root} has none of the known forms; they are: {forms}")

"""One module a file format. A format of folders registers itself in `FOLDERS`.

Adding a folder format: a module here with a class that has `description`, `recognises(root)`
and `__init__(root)`, decorated with `@FOLDERS.register("name")`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Protocol

from slidevlm.data.cases import CaseStore
from slidevlm.errors import DataError
from slidevlm.registry import Registry


class FolderFormat(Protocol):
    """A class of stores over a folder."""

    description: str  # what the folder must contain, for the message when nothing fits

    def __call__(self, root: Path) -> CaseStore: ...

    def recognises(self, root: Path) -> bool:
        """Whether `root` looks like this format; looks at names only."""
        ...


FOLDERS: Registry[FolderFormat] = Registry("folder format")


def open_folder(root: Path) -> CaseStore:
    """Open `root` by the format that recognises it; DataError when none does."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"--root-dir {root} {what}; give the folder that holds the features")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for name in FOLDERS:
        if FOLDERS[name].recognises(root):
            return FOLDERS[name](root)
    forms = "; ".join(f"{name}: {FOLDERS[name].description}" for name in FOLDERS)
    raise DataError(f"--root-dir {root} has none of the known forms; they are: {forms}")

"""slidevlm: vision-language models of whole slides and their pathology reports.

Examples:
    >>> import slidevlm
    >>> slidevlm.__version__
    '0.1.0'
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Config",
    "Report",
    "SlideModel",
    "Tiles",
    "__version__",
    "create_model",
    "evaluate",
    "load",
    "train",
]

if TYPE_CHECKING:
    from slidevlm.app.bags import Tiles
    from slidevlm.app.notebook import evaluate, train
    from slidevlm.app.slide_model import Classification, Report, SlideModel, load
    from slidevlm.config import Config
    from slidevlm.models import create_model

# Imported at first use: `import slidevlm` and the command line's --help must not wait for torch.
_LAZY = {
    "Classification": "slidevlm.app.slide_model",
    "Config": "slidevlm.config",
    "Report": "slidevlm.app.slide_model",
    "SlideModel": "slidevlm.app.slide_model",
    "Tiles": "slidevlm.app.bags",
    "create_model": "slidevlm.models",
    "evaluate": "slidevlm.app.notebook",
    "load": "slidevlm.app.slide_model",
    "train": "slidevlm.app.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'slidevlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


class _Folder(ModuleType):
    """The folder `slidevlm.train`, which may be called, as the function is of which it has the
    name: importing it makes it an attribute of the package, in the place of the function.
    """

    def __call__(self, config: Any, **arguments: Any) -> Any:
        """Train as `slidevlm train` does; see `slidevlm.app.notebook.train`."""
        from slidevlm.app.notebook import train

        return train(config, **arguments)


class _Package(ModuleType):
    """This module, which makes its attribute `train` callable when the import system sets it."""

    @property
    def train(self) -> Any:
        """Train as `slidevlm train` does; see `slidevlm.app.notebook.train`."""
        return self.__dict__["train"] if "train" in self.__dict__ else __getattr__("train")

    @train.setter
    def train(self, folder: ModuleType) -> None:
        folder.__class__ = _Folder
        self.__dict__["train"] = folder


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

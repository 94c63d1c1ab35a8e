"""slidevlm: vision-language models of whole slides and their pathology reports.

>>> import slidevlm
>>> slidevlm.__version__
'0.1.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "create_model", "evaluate", "train"]

if TYPE_CHECKING:
    from slidevlm.app import evaluate_run as evaluate
    from slidevlm.app import train
    from slidevlm.config import Config
    from slidevlm.models import create_model

# Imported at first use: `import slidevlm` and the command line's --help must not wait for torch.
_LAZY = {
    "Config": ("slidevlm.config", "Config"),
    "create_model": ("slidevlm.models", "create_model"),
    "evaluate": ("slidevlm.app", "evaluate_run"),
    "train": ("slidevlm.app", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'slidevlm' has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)

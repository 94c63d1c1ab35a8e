"""Shipped model configurations: the JSON files of this folder, by name."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from slidevlm.documents import DocumentError, yaml_of
from slidevlm.errors import ConfigError
from slidevlm.models.schema import ModelConfig, from_dict
from slidevlm.registry import unknown


def names() -> list[str]:
    """Names of all shipped configurations."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def load(name: str) -> ModelConfig:
    """A shipped configuration by name, or the JSON or YAML file at a path.

    Raises:
        ConfigError: unknown name (with the nearest ones), or a file that is not a configuration.
    """
    if name.endswith((".json", ".yaml", ".yml")) and "\0" not in name:  # which no file has
        return from_dict(_read(Path(name)), name)
    if name not in names():
        raise ConfigError(
            f"--model: {unknown('model', name, names())}\nor give the path of a .json or .yaml file"
        )
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return from_dict(json.loads(text), name)


def _read(path: Path) -> Any:
    try:
        # JSON is YAML, so one reader serves both.
        return yaml_of(path.read_text(encoding="utf-8"), unique=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--model {path} cannot be read: {error}") from error
    except DocumentError as error:
        raise ConfigError(f"--model {path} is neither JSON nor plain YAML: {error}") from error

"""Weights in files, read without running any code in them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidevlm.documents import check_stored
from slidevlm.errors import CheckpointError, ConfigError


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: the library is missing.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise ConfigError(
            f"{path} needs the package safetensors (pip install 'slidevlm[hf]')"
        ) from None
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except Exception as error:  # the library raises kinds of its own
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def read_torch(path: Path) -> Any:
    """What torch.save wrote: tensors and plain values, nothing else.

    Raises:
        CheckpointError: it is damaged, or holds what could run code.
    """
    try:
        if zipfile.is_zipfile(path):
            verify_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds on damaged bytes
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read ({first}); it is damaged, or holds more than tensors and plain "
            "values, which would run code"
        ) from error


def verify_archive(path: Path, *, whole: bool = True) -> None:
    """That an archive is whole, and as torch.save writes it.

    Args:
        path: of a zip archive.
        whole: verify the checksums of all members, too.

    Raises:
        BadZipFile: it is compressed, damaged, or no archive.
    """
    with zipfile.ZipFile(path) as archive:
        check_stored(archive)
        damaged = archive.testzip() if whole else None
    if damaged is not None:
        raise zipfile.BadZipFile(f"bad checksum of {damaged}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file of weights alone.

    Raises:
        CheckpointError: it cannot be read, or holds other things than tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    content = read_torch(path)
    tensors = tensors_of(content)
    if tensors is None:
        raise CheckpointError(f"{path} holds no weights")
    return tensors


def tensors_of(content: Any) -> dict[str, Tensor] | None:
    """A state dict as trainers save it: by itself, or under a word for it. None: there is none."""
    if not isinstance(content, Mapping):
        return None
    for key in ("state_dict", "model_state_dict", "model", "weights"):
        if isinstance(content.get(key), Mapping):
            return tensors_of(content[key])
    if content and all(isinstance(k, str) for k in content):
        tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    return None


# What wrappers put before the names of a model's tensors.
_WRAPPERS = ("module.", "_orig_mod.")


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel and torch.compile put before them, anywhere in them."""
    clean: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        parts = [p for p in name.split(".") if f"{p}." not in _WRAPPERS]
        clean[".".join(parts)] = tensor
    return clean

"""Folders in Hugging Face's form: a local one, one in the cache, or one that is downloaded.

`HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` hold as for every tool of theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slidevlm.documents import is_file_name, json_of
from slidevlm.errors import ConfigError, without_secrets

# The weights of a folder, the first of which that is there; an index names its parts.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find(name: str, files: Sequence[str], argument: str) -> dict[str, Path]:
    """Those of `files` that a folder or a repository of the hub has.

    Args:
        name: path of a folder, or owner/name on the hub.
        files: wanted names; which of them are needed is the caller's to say.
        argument: what named it, for messages.

    Raises:
        ConfigError: neither a folder nor to be had from the hub, for example offline.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {file: folder / file for file in files if (folder / file).is_file()}
    if folder.is_absolute() or not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{argument}: no folder {name} (looked from {Path.cwd()}); wanted are "
            f"{', '.join(files)} in it"
        )
    return _from_hub(name, files, argument)


def _from_hub(name: str, files: Sequence[str], argument: str) -> dict[str, Path]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(
            f"{argument}: no folder {name} (looked from {Path.cwd()}); to look on the Hugging Face "
            "hub install huggingface_hub (pip install 'slidevlm[hf]')"
        ) from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    found: dict[str, Path] = {}
    reason = ""
    for file in files:
        try:
            path = hf_hub_download(name, file, cache_dir=cache(), local_files_only=offline)
            found[file] = Path(path)
        except LocalEntryNotFoundError as error:
            reason = "HF_HUB_OFFLINE is set" if offline else _first_line(error)
            if not offline:  # no connection: the next file would wait for it again
                offline = True
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the hub, the network, the name
            reason = _first_line(error)
            break
    if not found:
        raise ConfigError(
            f"{argument}: {name} is no folder here (looked from {Path.cwd()}), not in the cache, "
            f"and not to be had from the Hugging Face hub ({reason or 'it has none of the files'}"
            f"). Wanted are {', '.join(files)} in a folder that you name in its place, or in the "
            f"cache, {cache() / ('models--' + name.replace('/', '--'))}, where `hf download "
            f"{name}` puts them on a machine that has a connection"
        )
    return found


def cache() -> Path:
    """Where the hub's files are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(os.environ.get("HF_HOME", home))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def needed(found: dict[str, Path], file: str, name: str, argument: str) -> Path:
    """One of the files that `find` has found.

    Raises:
        ConfigError: it has not.
    """
    if file not in found:
        raise ConfigError(f"{argument}: {name} has no {file}")
    return found[file]


def read_config(name: str, argument: str) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        ConfigError: it is missing or is no mapping.
    """
    path = needed(find(name, ("config.json",), argument), "config.json", name, argument)
    try:
        content = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{argument}: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{argument}: {path} is no mapping")
    return content


def weight_files(name: str, argument: str) -> list[Path]:
    """The files of a folder's weights, safetensors before pickled ones.

    Raises:
        ConfigError: it has none, or not all that its index names.
    """
    for file in WEIGHTS:
        try:
            found = find(name, (file,), argument)
        except ConfigError:
            if file == WEIGHTS[-1]:
                raise
            continue
        if file not in found:
            continue
        if not file.endswith(".index.json"):
            return [found[file]]
        parts = _parts(found[file], argument)
        files = find(name, parts, argument)
        return [needed(files, part, name, argument) for part in parts]
    raise ConfigError(f"{argument}: {name} has no weights; wanted is one of {', '.join(WEIGHTS)}")


def _parts(index: Path, argument: str) -> list[str]:
    """The files that an index names: beside it, and nowhere else."""
    try:
        parts = set(json_of(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{argument}: {index} is no index of weights: {error}") from error
    for part in parts:
        if not is_file_name(part):
            raise ConfigError(
                f"{argument}: {index} names {part!r:.80}, which is no file beside it; an index "
                "that leads elsewhere is not followed"
            )
    return sorted(parts)


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return without_secrets(first)[:200]

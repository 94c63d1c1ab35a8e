"""--pretrained: weights in every form that they come in."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slidevlm import hub
from slidevlm.config import Config
from slidevlm.documents import json_of, yaml_of
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models.files import (
    read_safetensors,
    read_torch,
    read_weights,
    tensors_of,
    without_wrappers,
)
from slidevlm.models.interop import mosaic
from slidevlm.models.sources import openai_text_weights
from slidevlm.run import CHECKPOINTS
from slidevlm.train import checkpoint as ckpt

CONFIG, TOKENIZER, WEIGHTS = "config.json", "slidevlm_tokenizer.json", "model.safetensors"
log = logging.getLogger("slidevlm")

# Key of our settings in a folder's config.json and in the metadata of a .safetensors file.
OURS = "slidevlm"
HUB = "hf-hub:"
OPENAI = "openai"
RAW = "raw:"  # before the name of a checkpoint: not its averaged weights
_TORCH = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Pretrained:
    """Weights and what came with them."""

    name: str
    weights: dict[str, torch.Tensor]  # under our names
    state: ckpt.ModelState | None = None  # where all that belongs to a model of ours was there
    config: dict[str, Any] | None = None  # where the model's configuration alone was


def check(config: Config) -> None:
    """Refuse, before anything is fetched, what --torchscript could not script afterwards.

    Raises:
        ConfigError: the weights go into a text tower of transformers.
    """
    name = (config.model.pretrained or "").removeprefix(RAW)
    if config.model.torchscript and name == OPENAI and name not in registry():
        raise ConfigError(
            "--pretrained openai and --torchscript: OpenAI's CLIP text encoder goes into a text "
            "tower of transformers, which cannot be scripted, and its TorchScript archive is not "
            "read; leave --torchscript out, the numbers are the same"
        )


def read_pretrained(name: str, argument: str = "--pretrained") -> Pretrained:
    """What --pretrained names, or another `argument`, which stands in messages.

    Of a checkpoint with an average of the weights (--ema) that is what is taken; with `raw:`
    before the name it is the last weights.

    Raises:
        ConfigError: nothing of that name in any form.
        CheckpointError: it cannot be read, or holds no weights.
    """
    raw = name.startswith(RAW)
    found = _read(name.removeprefix(RAW), argument)
    state = found.state
    if state is None or not state.averaged:
        return replace(found, name=name)
    which = "the last weights" if raw else f"their average (--ema); {RAW}{name} has the last ones"
    log.info("%s: taking %s", name, which)
    state = replace(state, averaged={}) if raw else state.for_use()
    return Pretrained(name, state.weights, state)


def _read(name: str, argument: str) -> Pretrained:
    tags = registry()
    if name in tags:
        return replace(_read(tags[name], argument), name=name)
    if name == OPENAI:
        return Pretrained(name, {f"text.model.{k}": v for k, v in openai_text_weights().items()})
    if name.startswith(HUB):
        return _hub(name, argument)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, name, argument)
    if path.suffix == ".safetensors" and path.is_file():
        return _safetensors(path, name, argument)
    if path.suffix in _TORCH:
        return _torch(path, name)
    known = f"; tags: {', '.join(tags)}" if tags else ""
    raise ConfigError(
        f"{argument} {name!r} is nothing that is here (looked from {Path.cwd()}): give a "
        f"checkpoint (.pt, .safetensors), a run folder, a Hugging Face folder, {HUB}owner/name or "
        f"a tag of {registry_file()}{known}"
    )


def registry_file() -> Path:
    """Where a user's tags stand: YAML, a line `tag: any other form` for each."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser()
    return Path(os.environ.get("SLIDEVLM_REGISTRY", home / "slidevlm" / "pretrained.yaml"))


def registry() -> dict[str, str]:
    """Tag -> what it stands for.

    Raises:
        ConfigError: the file is no such list.
    """
    path = registry_file()
    if not path.is_file():
        return {}
    try:
        content = yaml_of(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ConfigError(f"{path} must be lines of `tag: checkpoint, folder or hub name`")
    tags = {str(tag): value for tag, value in content.items()}
    chained = [tag for tag, value in tags.items() if value in tags]
    if chained:
        raise ConfigError(f"{path}: {', '.join(chained)} stand for other tags; name the weights")
    return tags


def _hub(name: str, argument: str) -> Pretrained:
    repository = name.removeprefix(HUB)
    files = hub.find(repository, (CONFIG, TOKENIZER, WEIGHTS), f"{argument} {HUB}")
    if CONFIG in files and WEIGHTS in files:
        return _folder(files[CONFIG].parent, name, argument)
    weights = hub.weight_files(repository, f"{argument} {HUB}")
    return _folder(weights[0].parent, name, argument)


def _folder(path: Path, name: str, argument: str) -> Pretrained:
    if (path / CHECKPOINTS).is_dir():
        found = ckpt.newest(path / CHECKPOINTS)
        if found is None:
            raise CheckpointError(f"{argument}: no checkpoint in {path / CHECKPOINTS}")
        return Pretrained(name, found[1].weights, found[1])
    if not any((path / file).is_file() for file in hub.WEIGHTS):
        if (path / "model.json").is_file():
            raise CheckpointError(f"{argument} {name} is a run that has no checkpoint; train it on")
        raise CheckpointError(
            f"{argument} {name} is neither a run folder ({CHECKPOINTS}/ is missing) nor a "
            f"Hugging Face folder (one of {', '.join(hub.WEIGHTS)} is missing)"
        )
    weights: dict[str, torch.Tensor] = {}
    for file in hub.weight_files(str(path), argument):
        weights |= read_weights(file)
    config = hub.read_config(str(path), argument) if (path / CONFIG).is_file() else {}
    settings = config.get(OURS)
    if settings is None:
        return _foreign(name, weights, config if "vision_cfg" in config else None)
    tokenizer = path / TOKENIZER
    if not tokenizer.is_file():
        raise CheckpointError(f"{argument} {name} lacks {TOKENIZER}; export it again")
    return _whole(name, weights, settings, tokenizer.read_text(encoding="utf-8"), argument)


def _safetensors(path: Path, name: str, argument: str) -> Pretrained:
    weights, metadata = read_safetensors(path)
    if OURS not in metadata:
        return _foreign(name, weights, None)
    try:
        content = json_of(metadata[OURS])
        return _whole(name, weights, content, content["tokenizer"], argument)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be read: {error}") from error


def _torch(path: Path, name: str) -> Pretrained:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .pt file")
    content = read_torch(path)
    if isinstance(content, dict) and "format" in content and "training" in content:
        state = ckpt.load(path)[0]
        return Pretrained(name, state.weights, state)
    tensors = tensors_of(content)
    if tensors is None:
        raise CheckpointError(f"{path} holds no weights: neither a state dict nor one in a mapping")
    config = content.get("config")
    if isinstance(config, str):
        try:
            config = json_of(config)
        except ValueError:
            config = None
    return _foreign(name, tensors, config if isinstance(config, dict) else None)


def _whole(
    name: str,
    weights: dict[str, torch.Tensor],
    settings: dict[str, Any],
    tokenizer: str,
    argument: str,
) -> Pretrained:
    try:
        state = ckpt.ModelState(
            weights=weights,
            config=settings["config"],
            tokenizer=tokenizer,
            vocab_size=settings["vocab_size"],
            siglip=settings["siglip"],
            position_unit=settings["position_unit"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{argument} {name}: its settings lack {error}") from error
    return Pretrained(name, weights, state)


def _foreign(
    name: str, weights: dict[str, torch.Tensor], config: dict[str, Any] | None
) -> Pretrained:
    """Weights that no trainer of ours wrote, or without what belongs to them."""
    weights = without_wrappers(weights)
    if not mosaic.recognises(weights):
        return Pretrained(name, weights)
    known = None if config is None or "vision_cfg" not in config else mosaic.config_of(config)
    return Pretrained(name, mosaic.convert(weights), config=known)

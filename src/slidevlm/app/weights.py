"""What a run begins with: nothing, weights, or a whole state."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slidevlm.app.pretrained import Pretrained, read_pretrained
from slidevlm.config import Config, with_adam_defaults
from slidevlm.documents import DocumentError, yaml_of
from slidevlm.errors import CheckpointError
from slidevlm.models import from_dict, zoo
from slidevlm.run import CHECKPOINTS
from slidevlm.train import checkpoint as ckpt

log = logging.getLogger("slidevlm")


@dataclass(frozen=True)
class Start:
    """What a run begins with: nothing, weights, or a whole state."""

    model: ckpt.ModelState | None = None  # of just this model
    training: ckpt.TrainState | None = None
    pretrained: Pretrained | None = None  # of another one, or without all that belongs to it


def start_of(config: Config, folder: Path | None) -> Start:
    """What --resume and --pretrained name; `folder` is the run's."""
    resume, pretrained = config.checkpoint.resume, config.model.pretrained
    if resume == "latest":
        assert folder is not None, "validate has refused --resume latest without a run folder"
        found = ckpt.newest(folder / CHECKPOINTS)
        if found is not None:
            _tell(found[0], pretrained)
            return _resumed(config, found[1], found[2])
        if config.evaluation.test:
            raise CheckpointError(f"no checkpoint in {folder / CHECKPOINTS}; train the run first")
        log.warning("no checkpoint in %s yet; starting at the beginning", folder / CHECKPOINTS)
    elif resume is not None:
        _tell(Path(resume), pretrained)
        return _resumed(config, *ckpt.load(Path(resume)))
    if pretrained is None:
        return Start()
    weights = read_pretrained(pretrained)
    if weights.state is None or _another(config, weights.state):
        return Start(pretrained=weights)
    return Start(weights.state)


def _tell(checkpoint: Path, pretrained: str | None) -> None:
    log.info("going on from %s", checkpoint)
    if pretrained is not None:
        log.info("--pretrained %s is not read: the checkpoint has the weights", pretrained)


def with_saved_model(config: Config, start: Start) -> Config:
    """With the --model of the checkpoint that a run goes on from, where none is given.

    The defaults of the optimizer depend on its name.
    """
    if start.training is None or "model" in config.given:
        return config
    try:
        saved = yaml_of(str(start.training.config))
    except DocumentError:  # it is kept for people; training does not need it
        return config
    name = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(name, str):  # the default stands there as a comment
        return config
    unset: dict[str, Any] = {
        n: None for n in ("lr", "beta1", "beta2", "eps") if n not in config.given
    }
    model, optim = replace(config.model, model=name), replace(config.optim, **unset)
    return with_adam_defaults(replace(config, model=model, optim=optim))


def _resumed(config: Config, model: ckpt.ModelState, training: ckpt.TrainState) -> Start:
    """The whole state; to evaluate, the average of the weights where there is one."""
    if config.evaluation.test and model.averaged:
        log.info("evaluating the average of the weights (--ema)")
        model = model.for_use()
    return Start(model, training)


def _another(config: Config, saved: ckpt.ModelState) -> bool:
    """Whether --model names another model than the weights are of."""
    return "model" in config.given and bool(differences(config.model.model, saved))


def differences(model: str, saved: ckpt.ModelState) -> list[str]:
    """Keys in which a model's configuration differs from that of a checkpoint.

    What is known only when a run begins (the tile width, the shape of an hf tower) is not compared,
    nor how reports are written.
    """
    # Read and written again, it has the keys that came after the checkpoint.
    had = from_dict(saved.config, "the checkpoint's model").to_dict()
    wanted = zoo.load(model).to_dict()
    if wanted["tile_width"] == "auto":
        wanted["tile_width"] = had["tile_width"]
    if wanted["text"].get("architecture", "") is None:
        wanted["text"]["architecture"] = had["text"].get("architecture")
    keys = (wanted.keys() | had.keys()) - {"generation"}
    return sorted(k for k in keys if wanted.get(k) != had.get(k))

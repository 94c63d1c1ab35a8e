"""What a run begins with: nothing, weights, or a whole state."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from slidevlm.config import Config
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.run import CHECKPOINTS
from slidevlm.train import checkpoint as ckpt

log = logging.getLogger("slidevlm")


@dataclass(frozen=True)
class Start:
    """What a run begins with: nothing, weights, or a whole state."""

    model: ckpt.ModelState | None = None
    training: ckpt.TrainState | None = None


def start_of(config: Config, folder: Path | None) -> Start:
    """What --resume and --pretrained name; `folder` is the run's."""
    resume, pretrained = config.checkpoint.resume, config.model.pretrained
    if resume == "latest":
        assert folder is not None, "validate has refused --resume latest without a run folder"
        found = ckpt.newest(folder / CHECKPOINTS)
        if found is not None:
            log.info("going on from %s", found[0])
            return Start(found[1], found[2])
        if config.evaluation.test:
            raise CheckpointError(f"no checkpoint in {folder / CHECKPOINTS}; train the run first")
        log.warning("no checkpoint in %s yet; starting at the beginning", folder / CHECKPOINTS)
    elif resume is not None:
        log.info("going on from %s", resume)
        return Start(*ckpt.load(Path(resume)))
    if pretrained is not None:
        return Start(load_pretrained(pretrained))
    return Start()


def load_pretrained(name: str) -> ckpt.ModelState:
    """Weights from a checkpoint file or the newest checkpoint of a run folder."""
    path = Path(name)
    if path.is_dir():
        found = ckpt.newest(path / CHECKPOINTS)
        if found is None:
            raise CheckpointError(f"--pretrained: no checkpoint in {path / CHECKPOINTS}")
        return found[1]
    if path.suffix == ".pt":
        return ckpt.load(path)[0]
    raise ConfigError(
        f"--pretrained {name!r} is neither a run folder nor a .pt checkpoint here; other forms "
        "are not available yet"
    )

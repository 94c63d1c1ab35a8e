"""--remote-sync: the copy of the run folder, and going on from it on an empty machine."""

from __future__ import annotations

import logging
from pathlib import Path

from slidevlm import dist
from slidevlm.config import Config
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.remote import RECORD, Mirror, Remote, Syncing, told
from slidevlm.run import CHECKPOINTS
from slidevlm.train import checkpoint as ckpt

log = logging.getLogger("slidevlm")


def syncing(config: Config, folder: Path | None) -> Syncing:
    """What copies the run folder from the first process; elsewhere it does nothing."""
    remote = _remote(config, folder) if dist.is_main() else None
    if remote is None or folder is None:
        return Syncing(None, 0)
    return Syncing(Mirror(remote, folder), config.checkpoint.remote_sync_frequency)


def fetch(config: Config, folder: Path | None) -> None:
    """With --resume latest and no checkpoint here: get the run from its copy.

    Raises:
        ConfigError: the remote does not answer.
        CheckpointError: it has checkpoints, none of them whole.
    """
    if config.checkpoint.resume == "latest" and config.checkpoint.remote_sync and folder:
        dist.from_main(lambda: _fetch(config, folder))


def _remote(config: Config, folder: Path | None) -> Remote | None:
    saved = config.checkpoint
    if saved.remote_sync is None or folder is None:
        return None
    return Remote(saved.remote_sync, saved.remote_sync_protocol, folder.name)


def _fetch(config: Config, folder: Path) -> None:
    if ckpt.checkpoints(folder / CHECKPOINTS):
        return
    remote = _remote(config, folder)
    assert remote is not None, "the caller has looked"
    try:
        times = {name: mark[1] for name, mark in remote.record().items()}
        for name in remote.sizes():
            if not name.startswith(f"{CHECKPOINTS}/") and not (folder / name).exists():
                remote.get(name, folder, times.get(name))
        if times:
            remote.get(RECORD, folder)
        names = remote.newest_first(f"{CHECKPOINTS}/")
        for name in names:
            path = remote.get(name, folder, times.get(name))
            try:
                ckpt.load(path)
            except CheckpointError as error:
                log.warning("skipping a checkpoint: %s", error)
                path.unlink()
                continue
            log.info("got %s from %s", name, remote.url)
            return
    except Exception as error:  # every service has errors of its own
        raise ConfigError(f"--remote-sync {remote.url}: {told(error)}") from None
    if names:
        raise CheckpointError(f"every checkpoint in {remote.url} is damaged: {', '.join(names)}")

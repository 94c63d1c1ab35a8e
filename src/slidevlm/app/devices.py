"""Which device a run works on."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from slidevlm import dist
from slidevlm.config import Config
from slidevlm.errors import ConfigError

log = logging.getLogger("slidevlm")


def choose_device(config: Config) -> torch.device:
    """--device, and the CPU where the default does not exist.

    Raises:
        ConfigError: a device asked for that does not exist.
    """
    name = config.optim.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device; try cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device {name} is not supported; use cuda or cpu")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        if "device" in config.given:
            raise ConfigError(f"--device {name}: torch finds no CUDA device here; use --device cpu")
        if dist.local_rank() == 0:
            log.warning("no CUDA device here; training on the CPU")
        return torch.device("cpu")
    if device.index is None:
        index = 0 if config.distributed.no_set_device_rank else dist.local_rank()
        device = torch.device("cuda", index)
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device: no {device}; torch sees {torch.cuda.device_count()} CUDA devices"
        )
    torch.cuda.set_device(device)
    return device


def with_device(config: Config, device: torch.device) -> Config:
    """The configuration as resolved, for the run folder."""
    return replace(config, optim=replace(config.optim, device=device.type))

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
    asked = _named(name)
    if asked.type == "cuda" and "device" not in config.given and not torch.cuda.is_available():
        if dist.local_rank() == 0:
            log.warning("no CUDA device here; using the CPU")
        return torch.device("cpu")
    index = 0 if config.distributed.no_set_device_rank else dist.local_rank()
    return _there(asked, name, index)


def check_exchange(config: Config, device: torch.device) -> None:
    """ConfigError where --fsdp has no exchange for the device."""
    wanted = config.distributed
    if (
        wanted.fsdp
        and not config.evaluation.test
        and device.type == "cuda"
        and wanted.dist_backend != "nccl"
    ):
        raise ConfigError(
            f"--fsdp on CUDA needs --dist-backend nccl, not {wanted.dist_backend}; leave "
            "--dist-backend out, or --fsdp"
        )


def device_of(name: str | None) -> torch.device:
    """The device that a user of a trained model names; None: CUDA where there is one, else the CPU.

    Raises:
        ConfigError: it does not exist.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return _there(_named(name), name, 0)


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device; try cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device {name} is not supported; use cuda or cpu")
    return device


def _there(device: torch.device, name: str, index: int) -> torch.device:
    """`device` with a number, `index` where it has none, made the current one."""
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch finds no CUDA device here; use --device cpu")
    device = torch.device("cuda", index) if device.index is None else device
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device: no {device}; torch sees {torch.cuda.device_count()} CUDA devices"
        )
    torch.cuda.set_device(device)
    return device


def with_device(config: Config, device: torch.device) -> Config:
    """The configuration as resolved, for the run folder; a device that was given keeps its name."""
    if "device" in config.given:
        return config
    return replace(config, optim=replace(config.optim, device=device.type))

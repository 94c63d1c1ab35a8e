"""--precision: one table from the argument to what it means on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from slidevlm.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """How a step computes: the autocast type (None: none) and whether gradients are scaled."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    scale_gradients: bool

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a forward pass."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler; it passes everything through where nothing is scaled."""
        return torch.amp.GradScaler(self.device.type, enabled=self.scale_gradients)


# (argument, device type) -> (autocast type, gradients scaled). float16's narrow range needs
# scaling; bfloat16 has float32's range and does not.
_TABLE: dict[tuple[str, str], tuple[torch.dtype | None, bool]] = {
    ("fp32", "cpu"): (None, False),
    ("fp32", "cuda"): (None, False),
    ("amp", "cpu"): (torch.bfloat16, False),
    ("amp", "cuda"): (torch.float16, True),
    ("amp_bf16", "cpu"): (torch.bfloat16, False),
    ("amp_bf16", "cuda"): (torch.bfloat16, False),
    ("amp_bfloat16", "cpu"): (torch.bfloat16, False),
    ("amp_bfloat16", "cuda"): (torch.bfloat16, False),
}


def resolve(name: str, device: torch.device) -> Precision:
    """Look up `--precision name` on `device`.

    Raises:
        ConfigError: where that form cannot run on that device.
    """
    try:
        dtype, scaled = _TABLE[name, device.type]
    except KeyError:
        known = sorted(n for n, d in _TABLE if d == device.type)
        raise ConfigError(
            f"--precision {name} does not run on {device.type}; choose one of {', '.join(known)}"
        ) from None
    return Precision(device, dtype, scaled)

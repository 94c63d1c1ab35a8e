"""--precision: one table from the argument to what it means on a device."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from slidevlm.errors import ConfigError

log = logging.getLogger("slidevlm.precision")


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

    A CPU without instructions for bfloat16 computes in it all the same, and warns.

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
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bfloat16():
        log.warning(
            "--precision %s on a CPU is bfloat16, for which this CPU has no instructions: it is "
            "many times slower than --precision fp32 here",
            name,
        )
    return Precision(device, dtype, scaled)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is that: what losses are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def quickest() -> str:
    """The --precision for who has no wish: amp where this machine is fast in it, else fp32."""
    return "amp" if torch.cuda.is_available() or cpu_has_bfloat16() else "fp32"


def for_use(device: torch.device) -> str:
    """The --precision with which a trained model is used where none is asked for.

    bfloat16 on a GPU that computes in it (the attention kernels for bags of unequal lengths need 16
    bits), else fp32, which gives the same numbers everywhere.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "amp_bf16" if fast else "fp32"


def cpu_has_bfloat16() -> bool:
    """Whether torch has fast bfloat16 kernels for this CPU; without, a product takes 5 to 100 times
    as long as in float32. Where torch is built without oneDNN, which knows, the answer is yes.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is None or bool(ask())

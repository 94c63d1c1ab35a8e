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
    """How a step computes."""

    device: torch.device
    autocast_dtype: torch.dtype | None  # None: no autocast
    scale_gradients: bool
    weights_dtype: torch.dtype | None = None  # None: float32, as they are
    everything: bool = False  # all weights have that type, not only those of linear layers

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a forward pass."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler; it passes everything through where nothing is scaled."""
        return torch.amp.GradScaler(self.device.type, enabled=self.scale_gradients)


@dataclass(frozen=True)
class _Form:
    autocast: torch.dtype | None = None
    scaled: bool = False
    weights: torch.dtype | None = None
    everything: bool = False


_B, _H = torch.bfloat16, torch.float16

# (argument, device type) -> form. float16's narrow range needs scaled gradients; bfloat16 has
# float32's range and does not. No CPU computes in float16 at a speed worth having.
_TABLE: dict[tuple[str, str], _Form] = {
    ("fp32", "cpu"): _Form(),
    ("fp32", "cuda"): _Form(),
    ("amp", "cpu"): _Form(_B),
    ("amp", "cuda"): _Form(_H, scaled=True),
    ("amp_bf16", "cpu"): _Form(_B),
    ("amp_bf16", "cuda"): _Form(_B),
    ("amp_bfloat16", "cpu"): _Form(_B),
    ("amp_bfloat16", "cuda"): _Form(_B),
    # Autocast brings the input of a linear layer to its weights' type, and norms to float32.
    ("bf16", "cpu"): _Form(_B, weights=_B),
    ("bf16", "cuda"): _Form(_B, weights=_B),
    ("fp16", "cuda"): _Form(_H, scaled=True, weights=_H),
    ("pure_bf16", "cpu"): _Form(weights=_B, everything=True),
    ("pure_bf16", "cuda"): _Form(weights=_B, everything=True),
    ("pure_fp16", "cuda"): _Form(scaled=True, weights=_H, everything=True),
}


def check(name: str, device: torch.device) -> None:
    """ConfigError where a form of `--precision` cannot run on a device."""
    if (name, device.type) not in _TABLE:
        known = sorted(n for n, d in _TABLE if d == device.type)
        raise ConfigError(
            f"--precision {name} does not run on {device.type}; choose one of {', '.join(known)}"
        )


def resolve(name: str, device: torch.device) -> Precision:
    """Look up `--precision name` on `device`.

    A CPU without instructions for bfloat16 computes in it all the same, and warns.

    Raises:
        ConfigError: where that form cannot run on that device.
    """
    check(name, device)
    form = _TABLE[name, device.type]
    if _B in (form.autocast, form.weights) and device.type == "cpu" and not cpu_has_bfloat16():
        log.warning(
            "--precision %s on a CPU is bfloat16, for which this CPU has no instructions: it is "
            "many times slower than --precision fp32 here",
            name,
        )
    return Precision(device, form.autocast, form.scaled, form.weights, form.everything)


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

"""Linear layers of bitsandbytes: 8-bit products for training, 8 or 4 bits for frozen weights.

State dictionaries stay those of plain layers: a frozen layer writes the weights that its codes
stand for, from which the same codes come again. So a checkpoint needs no bitsandbytes, and
resuming is exact. Quantise a model after it has been moved to its device and has its weights.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.linear import shares_weight


class Int8Linear(nn.Linear):
    """A linear layer whose products are of 8-bit integers; weights and gradients stay as they are.

    bitsandbytes quantises the weights anew only while they have no gradient, and in evaluation
    never; here they are quantised whenever they have changed.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training
        self._state = bitsandbytes().MatmulLtState()
        self._state.has_fp16_weights = True
        self._version = -1

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of x."""
        if self._state.CB is None or self._version != self.weight._version:
            self._state.reset_grads()
            self._version = self.weight._version
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        self._state.is_training = self.training or trains
        weight = self.weight if trains else self.weight.detach()
        # bitsandbytes transposes inputs, so they must have two dimensions.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        output: Tensor = bitsandbytes().matmul(rows, weight, state=self._state, bias=bias)
        return output.reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._state.reset_grads()  # on another device the codes must be, too
        super()._apply(fn, recurse)
        return self


class FrozenLinear(nn.Module):
    """A linear layer whose weights are codes of 8 or 4 bits and never change."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        self.bias = layer.bias
        self.training = layer.training
        self._quantise(layer.weight.detach())

    @property
    def weight(self) -> Tensor:
        """[out, in], the weights that the codes stand for, in the type they once had."""
        if self.kind == "int8-frozen":
            return (self._codes.float() * self._scale.float()[:, None] / 127).to(self.dtype)
        return bitsandbytes().functional.dequantize_4bit(self._codes, self._state).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        if self.kind == "int8-frozen":
            self._state.is_training = self.training
            output: Tensor = bitsandbytes().matmul(rows, self._codes, state=self._state, bias=bias)
        else:
            output = bitsandbytes().matmul_4bit(
                rows, self._codes, quant_state=self._state, bias=bias
            )
        return output.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"

    def _quantise(self, weight: Tensor) -> None:
        functional = bitsandbytes().functional
        if self.kind == "int8-frozen":
            self._codes, self._scale, _ = functional.int8_vectorwise_quant(weight.half())
            self._state = bitsandbytes().MatmulLtState()
            self._state.has_fp16_weights = False
            self._state.CB, self._state.SCB = self._codes, self._scale
        else:
            self._codes, self._state = functional.quantize_4bit(
                weight.contiguous(), blocksize=64, compress_statistics=False, quant_type=self.kind
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        if name not in state_dict:
            missing_keys.append(name)
        elif state_dict[name].shape != (self.out_features, self.in_features):
            error_msgs.append(f"size mismatch for {name}: {tuple(state_dict[name].shape)}")
        else:
            self._quantise(state_dict[name].to(self._codes.device))
        rest = {k: v for k, v in state_dict.items() if k != name}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def quantise_linears(model: nn.Module, kind: str, *, training: bool) -> int:
    """Replace the linear layers of a model by layers of a kind: int8, int8-frozen, nf4, fp4.

    A layer that shares its weight with another stays (a vocabulary projection tied to the token
    embedding). In training the forms for frozen weights take the layers that are frozen.

    Returns:
        How many layers have changed.

    Raises:
        ConfigError: bitsandbytes is missing, or there is no layer to change.
    """
    chosen = []
    for parent in model.modules():
        for child, layer in parent.named_children():
            if type(layer) is not nn.Linear or shares_weight(model, layer):
                continue
            if kind == "int8" or not training or not layer.weight.requires_grad:
                chosen.append((parent, child, layer))
    if not chosen:
        raise ConfigError(
            f"--use-bnb-linear {kind} is for frozen layers, and none is; use a model with lora, or "
            "--lock-image or --lock-text, or int8 for layers that train"
        )
    for parent, child, layer in chosen:
        setattr(parent, child, Int8Linear(layer) if kind == "int8" else FrozenLinear(layer, kind))
    return len(chosen)


@functools.cache
def bitsandbytes() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        package = importlib.import_module("bitsandbytes")
    except ImportError:
        raise ConfigError(
            "--use-bnb-linear needs the extra bnb: pip install 'slidevlm[bnb]'"
        ) from None
    # It says with every product that inputs become float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return package

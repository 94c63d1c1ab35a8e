"""Low-rank adaptation: a frozen linear layer and a small trainable product beside it.

`y = W x + b + (alpha / rank) B A dropout(x)` with A [rank, in] and B [out, rank] (Hu et al., 2021).
B starts at 0, so a model begins exactly as it was; merged, it is a plain model again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.linear import shares_weight


@dataclass(frozen=True)
class LoRAConfig:
    """One entry of the `lora` part of a model configuration.

    Everything in `part` is frozen but what LoRA adds to it.
    """

    part: str  # dotted name of a part of the model, such as text, slide, decoder.layers
    targets: list[str]  # names of its linear layers, or ends of them: project, attention.project
    rank: int = 4
    alpha: float = 4.0  # the product is multiplied by alpha / rank
    dropout: float = 0.0  # of the product's input

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, not {self.rank}")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha must be greater than 0, not {self.alpha}")
        if not self.targets or not all(isinstance(name, str) for name in self.targets):
            raise ConfigError(f"lora.targets must be names of layers, not {self.targets!r}")


class LoRALinear(nn.Module):
    """A linear layer with frozen weights `base`, and the trainable `lora_a` and `lora_b`."""

    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling = alpha / rank
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        low = F.linear(self.dropout(x), self.lora_a)
        return self.base(x) + self.scaling * F.linear(low, self.lora_b)

    @property
    def weight(self) -> Tensor:
        """[out, in], of the whole layer without dropout, with its graph."""
        return self.base.weight + self.scaling * (self.lora_b @ self.lora_a)

    @property
    def bias(self) -> Tensor | None:
        """[out] of the base."""
        return self.base.bias

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One plain layer of the same function, in the base's type; the sum is made in float64."""
        weight = self.base.weight
        layer = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.base.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        ).requires_grad_(False)
        layer.weight.copy_(
            weight.double() + self.scaling * (self.lora_b.double() @ self.lora_a.double())
        )
        if self.base.bias is not None:
            layer.bias.copy_(self.base.bias)
        return layer


def add_lora(model: nn.Module, configs: Sequence[LoRAConfig]) -> None:
    """Give the linear layers that `configs` name their products, and freeze the rest of the part.

    Raises:
        ConfigError: a part or a target that the model lacks, or a weight that another layer shares.
    """
    for config in configs:
        part = _part(model, config.part)
        if any(lora_layers(part)):
            raise ConfigError(f"lora: two entries are about {config.part}; make them one")
        linears = {n: m for n, m in part.named_modules() if isinstance(m, nn.Linear)}
        found = {
            t: [n for n in linears if n == t or n.endswith(f".{t}")]
            for t in dict.fromkeys(config.targets)
        }
        if missing := [target for target, names in found.items() if not names]:
            known = sorted({n.rpartition(".")[2] for n in linears})
            raise ConfigError(
                f"lora: {config.part} has no linear layer named {', '.join(missing)}; it has "
                f"{', '.join(known) or 'none'}"
            )
        part.requires_grad_(False)
        for name in dict.fromkeys(n for names in found.values() for n in names):
            layer = linears[name]
            if shares_weight(model, layer):
                where = f"{config.part}.{name}"
                raise ConfigError(
                    f"lora: the weight of {where} is shared with another layer; leave it out"
                )
            adapted = LoRALinear(layer, config.rank, config.alpha, config.dropout)
            _replace(part, name, adapted)


def merge_lora(model: nn.Module) -> int:
    """Replace every LoRA layer by one plain layer, in place; returns how many there were.

    The model then has the names and shapes of its configuration without `lora`.
    """
    layers = list(lora_layers(model))
    for name, layer in layers:
        _replace(model, name, layer.merged())
    return len(layers)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every LoRA layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def plain_names(model: nn.Module) -> dict[str, str]:
    """Names of the base weights in the same model without LoRA -> their names in this one.

    For loading weights of a plain model: {"text.layers.0...weight": "text.layers.0...base.weight"}.
    """
    return {
        f"{name}.{of_base}": f"{name}.base.{of_base}"
        for name, layer in lora_layers(model)
        for of_base in layer.base.state_dict()
    }


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        parts = ", ".join(n for n, _ in model.named_children())
        raise ConfigError(f"lora: the model has no part {name!r}; it has {parts}") from None

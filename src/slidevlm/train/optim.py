"""AdamW with the decay rule of the contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slidevlm.models.text.encoder import PositionEmbedding


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: decayed matrices; vectors, scalars and positions."""
    spared = {
        id(p) for m in model.modules() if isinstance(m, PositionEmbedding) for p in m.parameters()
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and id(parameter) not in spared
        (matrices if decays else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> torch.optim.AdamW:
    """AdamW; the fused kernel is the fastest on CPU and CUDA alike."""
    groups = parameter_groups(model, decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments of a saved optimizer; rate, betas, eps and decay stay this one's own.

    They come with every run's arguments, and a --wd given on resume must not be ignored.
    """
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)

"""AdamW with the decay rule of the contract."""

from __future__ import annotations

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

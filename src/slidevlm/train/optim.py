"""AdamW with the decay rule of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slidevlm.errors import CheckpointError
from slidevlm.models.text.encoder import PositionEmbedding


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: decayed matrices; vectors, scalars and positions."""
    spared = {
        id(p) for m in model.modules() if isinstance(m, PositionEmbedding) for p in m.parameters()
    }
    matrices: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and id(parameter) not in spared
        (matrices if decays else others)[name] = parameter
    # The names travel with the optimizer's state, and tell whose moments those are.
    return [
        {"params": list(group.values()), "weight_decay": weight, "names": list(group)}
        for group, weight in ((matrices, decay), (others, 0.0))
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

    Raises:
        CheckpointError: the moments are of other parameters than this optimizer's.
    """
    _same_parameters(optimizer, state)
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _same_parameters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    trained = [len(g["params"]) for g in optimizer.param_groups]
    saved = [len(g["params"]) for g in state["param_groups"]]
    names, had = _names(optimizer.param_groups), _names(state["param_groups"])
    if trained == saved and (not names or not had or names == had):  # once there were no names
        return
    new, old = [n for n in names if n not in had], [n for n in had if n not in names]
    differs = "; ".join(
        f"{len(found)} {what}, such as {found[0]}"
        for what, found in (("are trained now that were not", new), ("no longer are", old))
        if found and names and had
    )
    raise CheckpointError(
        f"the checkpoint trained {sum(saved)} tensors, this run trains {sum(trained)}"
        f"{f' ({differs})' if differs else ''}; resume with the same --lock-* arguments and model, "
        "or start from its weights with --pretrained and without --resume"
    )


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for group in groups for name in group.get("names", ())]

"""Optimizers, with the decay rule of the contract and rates that fall with depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models import CoCa, Model
from slidevlm.models.freeze import image_groups, text_groups
from slidevlm.models.text import TextTower


def parameter_groups(
    model: nn.Module, decay: float, factors: Mapping[int, float] | None = None
) -> list[dict[str, object]]:
    """Trainable parameters in groups: decayed matrices; vectors, scalars and positions.

    Args:
        model: the model.
        decay: weight decay of the matrices.
        factors: id of a parameter -> what its rate is multiplied by, 1 where it is not named; see
            `layer_factors`. Every factor has two groups of its own.
    """
    factors = factors or {}
    towers = [module for module in model.modules() if isinstance(module, TextTower)]
    spared = {id(p) for t in towers for table in t.position_tables() for p in table.parameters()}
    members: dict[tuple[float, bool], dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and id(parameter) not in spared
        members[factors.get(id(parameter), 1.0), decays][name] = parameter
    keys = sorted({(1.0, True), (1.0, False), *members}, reverse=True)
    # The names travel with the optimizer's state, and tell whose moments those are.
    return [
        {
            "params": list(members[key].values()),
            "weight_decay": decay if key[1] else 0.0,
            "rate_factor": key[0],
            "names": list(members[key]),
        }
        for key in keys
        if key in members or not factors
    ]


def layer_factors(model: Model, layer_decay: float) -> dict[int, float]:
    """What the rate of each parameter of a tower is multiplied by (Bao et al., BEiT, 2022).

    The last group of a tower (as `slidevlm models show` lists them) has 1, each before it
    `layer_decay` times that of the next. What belongs to no tower (decoder, temperature) has 1.

    Returns:
        id of a parameter -> factor. Of a parameter in several groups the last one counts.
    """
    towers = [text_groups(model)]
    if isinstance(model, CoCa):
        towers.append(image_groups(model))
    return {
        id(parameter): layer_decay ** (len(groups) - 1 - depth)
        for groups in towers
        for depth, (_, parts) in enumerate(groups)
        for part in parts
        for parameter in (part.parameters() if isinstance(part, nn.Module) else [part])
    }


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """An optimizer by its name in --opt; of `betas` and `eps` it takes what it has.

    adamw, nadam, radam, lion, lamb and adopt take the decay off the weights, apart from the
    gradient (Loshchilov and Hutter, 2019); adam, adamax and sgd add it to the gradient. sgd has
    `betas[0]` as its momentum.

    Raises:
        ConfigError: it comes with an extra that is not installed.
    """
    for group in groups:
        group["kind"] = name
    optim = torch.optim
    if name == "adamw":  # the fused kernel is the fastest on CPU and CUDA alike
        return optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "adam":
        return optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "adamax":
        return optim.Adamax(groups, lr=lr, betas=betas, eps=eps)
    if name == "nadam":
        return optim.NAdam(groups, lr=lr, betas=betas, eps=eps, decoupled_weight_decay=True)
    if name == "radam":
        return optim.RAdam(groups, lr=lr, betas=betas, eps=eps, decoupled_weight_decay=True)
    if name == "sgd":
        return optim.SGD(groups, lr=lr, momentum=betas[0], fused=True)
    settings: dict[str, Any] = {"betas": betas, "weight_decouple": True}
    if name != "lion":
        settings["eps"] = eps
    made: torch.optim.Optimizer = _of_library(name)(groups, lr=lr, **settings)
    return made


def _of_library(name: str) -> Any:
    try:
        from pytorch_optimizer import load_optimizer
    except ImportError:
        raise ConfigError(
            f"--opt {name} needs the package pytorch-optimizer (pip install 'slidevlm[opt]')"
        ) from None
    return load_optimizer(name)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step: that of the schedule times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The parameter groups to read: rate, decay, and what is in them."""
    lines = []
    for number, group in enumerate(optimizer.param_groups):
        parameters, names = group["params"], group["names"]
        lines.append(
            f"group {number}: rate x {group['rate_factor']:.6g}, decay {group['weight_decay']:g}, "
            f"{len(parameters)} tensors of {sum(p.numel() for p in parameters)} numbers"
        )
        lines += [f"  {n} {list(p.shape)}" for n, p in zip(names, parameters, strict=True)]
    return "\n".join(lines)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments of a saved optimizer; rate, betas, eps and decay stay this one's own.

    They come with every run's arguments, and a --wd given on resume must not be ignored. Moments
    go by the names of their parameters, so that --layer-decay may be another one, too.

    Raises:
        CheckpointError: the moments are of another optimizer, or of other parameters.
    """
    own, had = optimizer.param_groups, state["param_groups"]
    kind, was = own[0].get("kind", "adamw"), had[0].get("kind", "adamw")
    if kind != was:
        raise CheckpointError(
            f"the checkpoint was trained with --opt {was}, not {kind}; resume with the same, or "
            "start from its weights with --pretrained and without --resume"
        )
    _same_parameters(optimizer, state)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in own]
    regrouped = _regrouped(own, state)
    optimizer.load_state_dict(regrouped)
    _keep_scalars(optimizer, regrouped)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def _keep_scalars(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Undo the rounding of counts and products, which torch casts to the weights' type."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for number, moments in state["state"].items():
        mine = optimizer.state[parameters[number]]
        for name, value in moments.items():
            if name not in mine:  # a copy of a 16-bit weight: see masters.py
                continue
            if torch.is_tensor(value) and value.ndim == 0 and value.dtype != mine[name].dtype:
                mine[name] = value.to(mine[name].device)


def _regrouped(own: Sequence[Mapping[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
    """A saved state in the groups of another optimizer of the same parameters."""
    had = state["param_groups"]
    if not _names(had) or [g["names"] for g in own] == [g["names"] for g in had]:
        return state
    place = {n: i for g in had for n, i in zip(g["names"], g["params"], strict=True)}
    # What a library keeps by group, such as a count of steps, is the same in all of them.
    shared = {k: v for k, v in had[0].items() if k not in ("params", "names")}
    groups = [
        {**shared, "params": [place[n] for n in g["names"]], "names": g["names"]} for g in own
    ]
    numbers = {old: new for new, old in enumerate(i for g in groups for i in g["params"])}
    for group in groups:
        group["params"] = [numbers[i] for i in group["params"]]
    return {
        "state": {numbers[i]: moments for i, moments in state["state"].items()},
        "param_groups": groups,
    }


def _same_parameters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    trained = [len(g["params"]) for g in optimizer.param_groups]
    saved = [len(g["params"]) for g in state["param_groups"]]
    names, had = _names(optimizer.param_groups), _names(state["param_groups"])
    if not names or not had:  # once there were no names
        if trained == saved:
            return
    elif sorted(names) == sorted(had):
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

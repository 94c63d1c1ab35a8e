"""Optimizer states of a model that is cut over processes: saved whole, taken in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slidevlm import fsdp
from slidevlm.train.masters import Masters


def save_whole(optimizer: torch.optim.Optimizer, masters: Masters) -> None:
    """Make an optimizer's saved state that of a model in one piece.

    So a run goes on with --fsdp or without, on any number of processes. Saving is then a collective
    call, and what is saved is on the first process alone.

    Args:
        optimizer: moves this process's parts.
        masters: knows of which parameters.
    """

    def join(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        for number, like in numbered(optimizer, saved):
            mine = fsdp.part(like).shape
            state = saved["state"].get(number, {})
            saved["state"][number] = {
                name: fsdp.on_main(value, like) if _of_shape(value, mine) else value
                for name, value in state.items()
            }

    def take(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        state = dict(saved["state"])
        for number, like in numbered(optimizer, saved):
            if number in state:
                state[number] = {
                    name: fsdp.part_of(value, like) if _of_shape(value, like.shape) else value
                    for name, value in state[number].items()
                }
        return {**saved, "state": state}

    def numbered(
        optimizer: torch.optim.Optimizer, saved: dict[str, Any]
    ) -> list[tuple[int, Tensor]]:
        """(number in the saved state, parameter) of all that are cut, equal on every process."""
        groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
        found = [
            (number, masters.owner(tensor))
            for group, packed in groups
            for tensor, number in zip(group["params"], packed["params"], strict=True)
        ]
        return [(number, like) for number, like in found if fsdp.is_cut(like)]

    optimizer.register_state_dict_post_hook(join)  # after the masters have added theirs
    optimizer.register_load_state_dict_pre_hook(take, prepend=True)  # before they take theirs


def _of_shape(value: Any, shape: torch.Size) -> bool:
    return torch.is_tensor(value) and value.ndim > 0 and value.shape == shape

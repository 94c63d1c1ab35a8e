"""What an optimizer moves in weights' place: float32 copies of 16-bit ones, parts of cut ones.

A step changes a weight by about the learning rate. bfloat16 has 8 significant bits: added to a
weight of 0.1, a change below 0.0002 is lost, and squared gradients of float16 vanish below 0.0002.
So wherever a model's weights have 16 bits, gradients add up, moments are kept and weights are
moved in float32; the model gets the moved weight, rounded (Micikevicius et al., 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slidevlm import fsdp
from slidevlm.precision import wide

_KEY = "master"  # of a weight's state in a saved optimizer


class Masters:
    """Puts float32 copies in the place of an optimizer's 16-bit parameters; others stay.

    The copies travel with the optimizer's state, so that a run goes on exactly. Of a parameter that
    is cut over processes (--fsdp) there is this process's part: a plain tensor that shares the
    parameter's memory, or its float32 copy.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._narrow: list[nn.Parameter] = []  # those of 16 bits
        self._owners: dict[int, nn.Parameter] = {}
        for group in optimizer.param_groups:
            group["params"] = [self._copy(p) for p in group["params"]]
        optimizer.register_state_dict_post_hook(self._add)
        optimizer.register_load_state_dict_pre_hook(self._take_away)

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        narrow = parameter.dtype.itemsize < 4
        if not narrow and not fsdp.is_cut(parameter):
            return parameter
        mine = fsdp.part(parameter)
        copy = self._copies[parameter] = nn.Parameter(mine.float() if narrow else mine)
        self._owners[id(copy)] = parameter
        if narrow:
            self._narrow.append(parameter)
        return copy

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer moves for a parameter of the model."""
        return self._copies.get(parameter, parameter)

    def owner(self, moved: Tensor) -> Tensor:
        """Of what parameter of the model this is what the optimizer moves."""
        return self._owners.get(id(moved), moved)

    def take_gradients(self) -> None:
        """Add the gradients to those of the copies, and forget them."""
        for parameter in self._copies:
            self.take_gradient(parameter)

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """The same for one parameter of the model."""
        copy = self._copies.get(parameter)
        if copy is None or parameter.grad is None:
            return
        gradient = wide(fsdp.part(parameter.grad))
        copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """The copies, rounded, to the model."""
        for parameter in self._narrow:
            fsdp.part(parameter).copy_(self._copies[parameter])

    def _add(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        copies = {id(self._copies[parameter]) for parameter in self._narrow}
        for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            for tensor, number in zip(group["params"], packed["params"], strict=True):
                if id(tensor) in copies:  # in a new dictionary: this one is the optimizer's own
                    state = saved["state"].get(number, {})
                    saved["state"][number] = {**state, _KEY: tensor.detach()}

    @torch.no_grad()
    def _take_away(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Copies of a run with other --precision go into the weights themselves."""
        state = dict(saved["state"])
        for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            for tensor, number in zip(group["params"], packed["params"], strict=True):
                if _KEY in state.get(number, {}):
                    rest = dict(state.pop(number))
                    tensor.copy_(rest.pop(_KEY))
                    if rest:
                        state[number] = rest
        self.give_weights()
        return {**saved, "state": state}

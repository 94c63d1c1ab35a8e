"""How a model runs: evaluation mode for a while or for good, activations kept or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

# Name of a part of a tower, and the modules and parameters it consists of.
Group = tuple[str, Sequence[nn.Module | nn.Parameter]]
# A module that is called as a whole, and the names of other methods by which it is called.
Unit = tuple[nn.Module, Sequence[str]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside; afterwards, also after an error, each module's mode is as it was.

    One by one: a frozen part may have been left in evaluation mode on purpose.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Resting(nn.Module):
    """A model of which some modules stay in evaluation mode, as those of a frozen part do."""

    def __init__(self) -> None:
        super().__init__()
        self._resting: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Resting:
        """Training mode for all but the modules that `rest` has named."""
        super().train(mode)
        for module in self._resting:
            module.training = False
        return self

    def rest(self, modules: Iterable[nn.Module]) -> None:
        """Keep these modules in evaluation mode from now on, not those below them."""
        self._resting = (*self._resting, *modules)
        self.train(self.training)


class Recomputing(nn.Module):
    """A tower of blocks.

    With `checkpointing`, what a block computes is not kept for the backward pass but computed
    again in it, its dropout replayed: less memory, more time, the same gradients.
    """

    checkpointing: bool = False
    # Computing again ends with the last tensor that is needed, by an error raised where that tensor
    # is kept. A script cannot be left so; then whole blocks are computed again.
    stops_early: bool = True

    def units(self) -> list[Unit]:
        """Parts whose weights nothing reads but a call of them, inner ones first.

        Between two calls their weights need not be there.
        """
        return []

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """`block(*inputs)`, computed again in the backward pass if `checkpointing`."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            with set_checkpoint_early_stop(self.stops_early):
                return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class CountsRows(nn.Module):
    """A part that computes with the number of its rows, as a number.

    A traced or compiled graph would hold for that number alone, so it is not compiled; a script
    counts anew.
    """

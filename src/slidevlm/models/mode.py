"""Evaluation mode: of a whole model for a while, of parts of it for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


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

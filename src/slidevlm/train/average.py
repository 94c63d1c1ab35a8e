"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slidevlm import fsdp
from slidevlm.errors import CheckpointError


class Average:
    """Follows the trainable weights: `average += (1 - d) * (weights - average)` after every step.

    d is `decay`, or `(1 + step) / (10 + step)` while that is less, so that the average forgets
    the first weights of a short training, too. Averages are float32; frozen weights and buffers
    are the model's own. Of weights that are cut over processes (--fsdp) each has its part's.

    Args:
        model: its weights now are the first average.
        decay: from 0 to 1, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._weights = {n: fsdp.part(p) for n, p in self._trained.items()}
        self._averages = {n: p.float().clone() for n, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [self._weights[name].float() for name in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The whole averages by name; they change with the next update.

        Of cut weights a collective call, which leaves them on the first process alone.
        """
        return {n: fsdp.on_main(a, self._trained[n]) for n, a in self._averages.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average.

        Raises:
            CheckpointError: it is of other weights than are trained here.
        """
        if state.keys() != self._averages.keys():
            raise CheckpointError(
                "the checkpoint's average (--ema) is of other tensors than this run trains; resume "
                "with the same --lock-* arguments"
            )
        for name, average in self._averages.items():
            average.copy_(fsdp.part_of(state[name], self._trained[name]))

    @torch.no_grad()
    def put(self) -> None:
        """Give the model the averages for good."""
        for name, average in self._averages.items():
            self._weights[name].copy_(average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages; after it, its own weights again, bit for bit."""
        kept = [weight.clone() for weight in self._weights.values()]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(self._weights.values(), kept, strict=True):
                    weight.copy_(before)

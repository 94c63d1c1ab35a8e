"""The sum of gradients over processes, done beside the backward pass (--ddp-static-graph).

A backward pass finishes the gradients of the last layers first. Where every step gives the same
parameters a gradient, in the same order, their buckets can be fixed once, and each be sent as soon
as it is full, while the earlier layers' gradients are still being computed (Li et al., PyTorch
Distributed, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slidevlm import dist
from slidevlm.errors import TrainingError
from slidevlm.train.masters import Masters

# 8 MB of float32: smaller than the buckets that nothing waits beside, so that the first goes early.
_BUCKET_ELEMENTS = 2 * 1024 * 1024


class Overlap:
    """Sums gradients over ranks during the backward pass between `begin` and `end`.

    Buckets are filled in the order in which rank 0's first pass finished the gradients, and sent
    in that order on every rank. The first pass sends them at its end; so every pass adds up in the
    same order, and a resumed run goes on exactly. Gradients that no hook tells of (those of scale
    and bias, which the loss leaves itself) are added up at the end.

    Args:
        parameters: the trained parameters by name, equal on every rank.
        masters: holds the float32 gradients of those that have 16 bits.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], masters: Masters) -> None:
        self._names = [name for name, _ in parameters]
        self._trained = [parameter for _, parameter in parameters]
        self._masters = masters
        self._open = False
        self._arrived: list[int] = []
        self._buckets: list[list[int]] | None = None
        self._bucket_of: dict[int, int] = {}
        self._lacking: list[int] = []  # of each bucket, how many gradients
        self._sent: list[tuple[list[nn.Parameter], Tensor, Callable[[], object]]] = []
        for place, parameter in enumerate(self._trained):
            parameter.register_post_accumulate_grad_hook(lambda _, place=place: self._take(place))

    def begin(self) -> None:
        """The next backward pass is the step's last: what it finishes can be sent."""
        self._open = True
        self._arrived, self._sent = [], []
        self._lacking = [len(bucket) for bucket in self._buckets or ()]

    def end(self) -> None:
        """Every parameter's gradient is the sum over ranks.

        Raises:
            TrainingError: on every rank, where the parameters that got a gradient are others than
                in the first pass, or others than another rank's.
        """
        self._open = False
        if self._buckets is None:
            self._fix()
        while len(self._sent) < len(self._buckets or ()):
            self._send()
        for parameters, flat, wait in self._sent:
            wait()
            parts = flat.split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter.grad))
        self._sent = []
        self._check()
        rest = [p for i, p in enumerate(self._trained) if i not in self._bucket_of]
        dist.sum_gradients(self._masters.of(p) for p in rest)

    def _take(self, place: int) -> None:
        """A gradient is finished; called by autograd, on its thread."""
        if not self._open:
            return
        self._masters.take_gradient(self._trained[place])
        self._arrived.append(place)
        if self._buckets is None or place not in self._bucket_of:
            return
        self._lacking[self._bucket_of[place]] -= 1
        while len(self._sent) < len(self._buckets) and self._lacking[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        """Begin to sum the next bucket; a gradient that is missing counts as zeros."""
        assert self._buckets is not None
        bucket = self._buckets[len(self._sent)]
        parameters = [self._masters.of(self._trained[place]) for place in bucket]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._sent.append((parameters, flat, dist.begin_sum(flat)))

    def _fix(self) -> None:
        """Buckets of what the first pass finished."""
        orders = dist.gather_objects(self._arrived)
        for other in orders[1:]:
            for place in sorted({*orders[0]} ^ {*other}):
                raise TrainingError(
                    f"--ddp-static-graph: {self._names[place]} got a gradient on some processes "
                    "and none on others; leave --ddp-static-graph out"
                )
        buckets: list[list[int]] = []
        size = 0
        for place in orders[0]:
            parameter = self._masters.of(self._trained[place])
            last = self._masters.of(self._trained[buckets[-1][-1]]) if buckets else None
            size += parameter.numel()
            if last is None or size > _BUCKET_ELEMENTS or parameter.dtype != last.dtype:
                buckets.append([])
                size = parameter.numel()
            buckets[-1].append(place)
        self._buckets = buckets
        self._bucket_of = {place: i for i, bucket in enumerate(buckets) for place in bucket}

    def _check(self) -> None:
        odd = sorted({*self._arrived} ^ self._bucket_of.keys())
        if not dist.any_([bool(odd) or len(self._arrived) != len(self._bucket_of)])[0]:
            return
        # A gradient that was finished twice is no reason to name another one.
        twice = sorted({place for place in self._arrived if self._arrived.count(place) > 1})
        names = [self._names[place] for place in odd or twice]
        known = next((names for names in dist.gather_objects(names) if names), names)
        raise TrainingError(
            f"--ddp-static-graph: {known[0]} got its gradient in another way than in the first "
            "step (with it or without, or twice); leave --ddp-static-graph out"
        )

"""--trace: torch.jit.trace of a model's two sides, for evaluation.

A trace repeats the operations of one example, so a loop over bags or a bag's length as a number
would hold for that example alone. Bags are therefore traced and run one at a time; they are never
padded anyway. Loops within a bag are TorchScript within the trace (`ragged.scripted`). Every trace
is compared with the model at other lengths before it is used, and where it differs the part that
caused it is refused.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.coca import CoCa

log = logging.getLogger("slidevlm.trace")

TILES = (7, 1, 2, 40)  # of the bag that is traced, then of those the trace is compared at
TOKENS = ((3, 9), (1, 2), (5, 1), (2, 14))  # reports and tokens of each, likewise
CLOSE = 1e-4  # greatest difference between components of unit vectors; with 16 bits 0.02
Sides = tuple[Tensor, Tensor]  # what is read further, and the embedding


def trace(model: CoCa) -> None:
    """Let `see` and `read` (and so `encode_image` and `encode_text`) of a model run as traces.

    They are made at the first call with tensors of a kind. In training the model runs as before.
    """
    model.see = _See(model)  # type: ignore[method-assign]
    model.read = _Read(model)  # type: ignore[method-assign]


class _See:
    """Bags, one at a time, through a trace."""

    def __init__(self, model: CoCa) -> None:
        self.model = model
        self.traces: dict[Any, Callable[..., Sides]] = {}

    def __call__(self, bags: Bags) -> Sides:
        if self.model.training:
            return CoCa.see(self.model, bags)
        given = [bags.features, bags.positions, bags.slides]
        key = _kind(*given)
        if key not in self.traces:
            part = _Image(self.model, bags)
            examples = [part.example(bags, tiles) for tiles in TILES]
            what = f"the slide encoder {type(self.model.slide).__name__}"
            self.traces[key] = _traced(part, examples, what)
        lengths = list(bags.lengths)
        parts = [t.split(lengths) for t in given if t is not None]
        results = [self.traces[key](*one) for one in zip(*parts, strict=True)]
        return torch.cat([slide for slide, _ in results]), torch.cat(
            [image for _, image in results]
        )


class _Read:
    """Reports through a trace."""

    def __init__(self, model: CoCa) -> None:
        self.model = model
        self.traces: dict[Any, Callable[..., Sides]] = {}

    def __call__(self, tokens: Tensor, token_mask: Tensor) -> Sides:
        if self.model.training:
            return CoCa.read(self.model, tokens, token_mask)
        key = _kind(tokens, token_mask)
        if key not in self.traces:
            part = _Text(self.model)
            most = self.model.text.context_length
            examples = [part.example(tokens, n, min(length, most)) for n, length in TOKENS]
            what = f"the text tower {type(self.model.text).__name__}"
            self.traces[key] = _traced(part, examples, what)
        return self.traces[key](tokens, token_mask)


class _Image(nn.Module):
    """One bag's tensors, such as these bags have -> the encoder's tokens and the embedding."""

    def __init__(self, model: CoCa, bags: Bags) -> None:
        super().__init__()
        self.model, self.unit = model, bags.unit
        self.positions, self.slides = bags.positions is not None, bags.slides is not None

    def forward(self, features: Tensor, *rest: Tensor) -> Sides:
        others = list(rest)
        positions = others.pop(0) if self.positions else None
        slides = others.pop(0) if self.slides else None
        bag = Bags(features, (features.shape[0],), positions, slides, self.unit)
        return CoCa.see(self.model, bag)

    def example(self, bags: Bags, tiles: int) -> tuple[Tensor, ...]:
        """A bag of as many tiles, drawn from the given ones."""
        draw = torch.Generator().manual_seed(tiles)
        rows = torch.randint(len(bags.features), (tiles,), generator=draw).to(bags.features.device)
        given = [bags.features, bags.positions, bags.slides]
        return tuple(t[rows] for t in given if t is not None)


class _Text(nn.Module):
    """Tokens and mask -> hidden states and the embedding."""

    def __init__(self, model: CoCa) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Sides:
        return CoCa.read(self.model, tokens, mask)

    def example(self, tokens: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Reports of tokens drawn from the given ones, each one token shorter than the last."""
        draw = torch.Generator().manual_seed(length)
        places = torch.randint(tokens.numel(), (count, length), generator=draw).to(tokens.device)
        lengths = (length - torch.arange(count, device=tokens.device)).clamp_min(1)
        mask = torch.arange(length, device=tokens.device) < lengths[:, None]
        return tokens.flatten()[places], mask


def _kind(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a trace is made for: which tensors there are, of which types, and autocast."""
    types = tuple(None if t is None else t.dtype for t in tensors)
    device = next(t for t in tensors if t is not None).device
    return (*types, device, _autocast(device.type))


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _traced(
    part: nn.Module, examples: Sequence[tuple[Tensor, ...]], what: str
) -> Callable[..., Sides]:
    """A trace of the first example that gives what `part` gives on the others, too.

    Raises:
        ConfigError: there is none.
    """
    part.training = False  # of the wrapper alone; the model is in evaluation mode
    device = examples[0][0].device.type
    dtype = _autocast(device)
    narrow = dtype is not None or next(part.parameters()).dtype.itemsize < 4
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False),
            warnings.catch_warnings(),
        ):
            # Of branches on a shape, which the comparison is for, and of torch.jit's age.
            warnings.simplefilter("ignore")
            copies = [tuple(t.clone() for t in example) for example in examples]
            graph: Callable[..., Sides] = torch.jit.trace(part, copies[0], check_trace=False)
            difference = max(_difference(part(*one), graph(*one)) for one in copies)
    except Exception as error:  # torch.jit raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConfigError(
            f"--trace: {what} cannot be traced for any length ({reason}); leave --trace out"
        ) from error
    if not difference <= (0.02 if narrow else CLOSE):
        raise ConfigError(
            f"--trace: {what} depends on lengths in a way that a trace cannot follow (an embedding "
            f"differs by {difference:.2g}); leave --trace out"
        )
    log.info("traced %s; the largest difference at other lengths is %.1g", what, difference)
    return graph


def _difference(expected: Sides, found: Sides) -> float:
    if any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
        return float("inf")
    return float((expected[1] - found[1]).abs().max())

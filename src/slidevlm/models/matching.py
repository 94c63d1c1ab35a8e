"""Weights of one model put into another: what matches by name and shape, and a table of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slidevlm.models.lora import plain_names


@dataclass(frozen=True)
class Match:
    """Which tensors of a model a file has; names are the model's, those of `unused` the file's."""

    found: dict[str, str] = field(default_factory=dict)  # the model's name -> the file's
    missing: list[str] = field(default_factory=list)  # not in the file
    other_shape: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # it would fit, but means something else
    unused: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model and every one of the file was used."""
        return not (self.missing or self.other_shape or self.left_out or self.unused)

    def table(self) -> str:
        """A line for each part of the model, and examples of what was not loaded."""
        columns = {
            "loaded": list(self.found),
            "not in the file": self.missing,
            "of another shape": self.other_shape,
            "left out": self.left_out,
            "unused in the file": self.unused,
        }
        counts = {word: Counter(_part(n) for n in names) for word, names in columns.items()}
        parts = sorted({part for count in counts.values() for part in count})
        wide = max(len(part) for part in ["part", *parts])
        lines = ["  ".join(["part".ljust(wide), *columns])]
        for part in parts:
            cells = [str(counts[word][part]).rjust(len(word)) for word in columns]
            lines.append("  ".join([part.ljust(wide), *cells]))
        for word, names in columns.items():
            if names and word != "loaded":
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{word}: {', '.join(sorted(names)[:5])}{more}")
        return "\n".join(lines)


def _part(name: str) -> str:
    return name.partition(".")[0]


def match(model: nn.Module, weights: Mapping[str, Tensor], left_out: Collection[str] = ()) -> Match:
    """Compare a model's tensors with a file's.

    Args:
        model: where LoRA has wrapped a layer, a plain file's tensor belongs to its base.
        weights: the file's.
        left_out: names of the model's tensors that are not to be taken.
    """
    state = model.state_dict()
    plain = {ours: name for name, ours in plain_names(model).items()}
    result = Match()
    used: set[str] = set()
    for name, tensor in state.items():
        source = name if name in weights else plain.get(name, name)
        if source not in weights:
            # A new LoRA layer starts as nothing beside its base.
            result.missing.append(name)
            continue
        used.add(source)
        if weights[source].shape != tensor.shape:
            result.other_shape.append(name)
        elif name in left_out:
            result.left_out.append(name)
        else:
            result.found[name] = source
    result.unused.extend(sorted(set(weights) - used))
    return result


@torch.no_grad()
def load(model: nn.Module, weights: Mapping[str, Tensor], found: Match) -> None:
    """Copy what was found."""
    state = model.state_dict()
    for name, source in found.found.items():
        state[name].copy_(weights[source])

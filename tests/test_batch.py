"""The shapes that cross layers: moving, pinning."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags, Batch


def batch(*, positions: bool = True) -> Batch:
    bags = Bags(
        torch.arange(12.0).reshape(6, 2).half(),
        (1, 3, 2),
        torch.arange(12.0).reshape(6, 2) if positions else None,
        torch.tensor([0, 0, 1, 1, 0, 0]) if positions else None,
        "um" if positions else None,
    )
    return Batch(
        bags,
        torch.arange(9).reshape(3, 3),
        torch.ones(3, 3, dtype=torch.bool),
        torch.tensor([5, 6, 5]),
        ("a", "b", "c"),
        ("p", "p", "q"),
    )


def tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor within, by name."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if isinstance(content, Tensor):
            found[field.name] = content
        elif dataclasses.is_dataclass(content):
            found |= tensors(content)
    return found


@pytest.mark.parametrize("positions", [True, False])
def test_moving_takes_every_tensor_and_changes_nothing_else(positions: bool) -> None:
    original = batch(positions=positions)
    moved = original.to("meta")
    assert tensors(moved).keys() == tensors(original).keys()
    assert len(tensors(moved)) == (6 if positions else 4)
    for name, tensor in tensors(moved).items():
        assert tensor.device.type == "meta", name
        assert tensor.dtype == tensors(original)[name].dtype, "float16 stays float16"
        assert tensor.shape == tensors(original)[name].shape
    assert (moved.specimen_ids, moved.patient_ids) == (("a", "b", "c"), ("p", "p", "q"))
    assert (moved.bags.lengths, moved.bags.unit) == (original.bags.lengths, original.bags.unit)


@pytest.mark.parametrize("positions", [True, False])
def test_pinning_takes_every_tensor(monkeypatch: pytest.MonkeyPatch, positions: bool) -> None:
    """Pinning needs CUDA; here its mark is a copy with every number negated."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: -t if t.dtype != torch.bool else ~t)
    original = batch(positions=positions)
    pinned = original.pin_memory()
    assert tensors(pinned).keys() == tensors(original).keys()
    for name, tensor in tensors(pinned).items():
        before = tensors(original)[name]
        assert torch.equal(tensor, ~before if before.dtype == torch.bool else -before), name
    assert (pinned.specimen_ids, pinned.patient_ids) == (("a", "b", "c"), ("p", "p", "q"))
    assert (pinned.bags.lengths, pinned.bags.unit) == (original.bags.lengths, original.bags.unit)

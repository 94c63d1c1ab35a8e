"""The shapes that cross layers: offsets, moving, pinning, joining."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags, Batch, Predictions, concatenate


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


def test_offsets_cut_the_bags() -> None:
    bags = batch().bags
    assert bags.offsets.tolist() == [0, 1, 4, 6]
    assert bags.offsets.dtype == torch.int64 and bags.offsets.device.type == "cpu"
    assert len(bags) == 3 and len(batch()) == 3
    parts = [bags.features[a:b] for a, b in zip(bags.offsets, bags.offsets[1:], strict=False)]
    assert [len(p) for p in parts] == list(bags.lengths)
    assert Bags(torch.zeros(0, 2), ()).offsets.tolist() == [0]


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


def part(start: int, n: int, **more: Any) -> Predictions:
    names = tuple(f"s{i}" for i in range(start, start + n))
    rows = np.arange(start, start + n)
    values: dict[str, Any] = {
        "specimen_ids": names,
        "patient_ids": tuple("p" + s for s in names),
        "reports": tuple("report of " + s for s in names),
        "report_ids": rows,
        "image_embedding": np.eye(9, dtype=np.float32)[rows],
        "text_embedding": None,
        "logit_scale": 14.0 + start,
        "losses": {"caption": float(start)},
    }
    return Predictions(**{**values, **more})


def test_parts_join_in_order() -> None:
    joined = concatenate([part(0, 2), part(2, 0), part(2, 3)])
    assert len(joined) == 5
    assert joined.specimen_ids == ("s0", "s1", "s2", "s3", "s4")
    assert joined.patient_ids[4] == "ps4" and joined.reports[3] == "report of s3"
    assert joined.report_ids.tolist() == [0, 1, 2, 3, 4]
    assert joined.image_embedding is not None
    assert np.array_equal(joined.image_embedding, np.eye(9, dtype=np.float32)[:5])
    assert joined.image_embedding.dtype == np.float32
    assert joined.text_embedding is None and joined.generated is None
    assert (joined.logit_scale, joined.losses) == (14.0, {"caption": 0.0}), "of the first part"


def test_generated_reports_join_too() -> None:
    joined = concatenate([part(0, 1, generated=("x",)), part(1, 2, generated=("y", "z"))])
    assert joined.generated == ("x", "y", "z")

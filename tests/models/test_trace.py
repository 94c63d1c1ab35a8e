"""Traces of both sides of a model: equal to the model at any length, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.decoding import Decoding
from slidevlm.models.generate import generate
from slidevlm.models.trace import trace

WIDTH = 12
ENCODERS: list[dict[str, Any]] = [
    {"type": "perceiver"},
    {"type": "perceiver", "read": "features", "positions": "none", "moments": False},
    {"type": "pooler"},
    {"type": "abmil", "input_norm": "batch"},
    {"type": "mean"},
    {"type": "transformer"},
    {"type": "transformer", "positions": "none"},
    {"type": "transformer", "positions": "alibi"},
    {"type": "transformer", "window": 2000.0},
    {"type": "transformer", "window": 3000.0, "positions": "alibi"},
    {"type": "transformer", "window": 3000.0, "positions": "none"},
    {"type": "longnet", "segments": [4, 8], "dilations": [1, 2]},
    {"type": "transmil", "landmarks": 4},
    {"type": "transmil", "landmarks": 4, "order": "rows"},
]


def model_of(slide: dict[str, Any] | None = None) -> CoCa:
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": WIDTH}
    if slide is not None:
        heads = {} if slide["type"] in ("abmil", "mean") else {"heads": 4}
        content["slide"] = {"width": 32, **heads, **slide}
    torch.manual_seed(0)
    model = build_model(from_dict(content, "here"), 50).eval()
    assert isinstance(model, CoCa)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def bags_of(*lengths: int, dtype: torch.dtype = torch.float32) -> Bags:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    return Bags(
        torch.randn(total, WIDTH, generator=generator).to(dtype),
        lengths,
        2e4 * torch.rand(total, 2, generator=generator),
        torch.zeros(total, dtype=torch.int64),
        "um",
    )


def texts_of(*lengths: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(len(lengths))
    return torch.randint(3, 50, mask.shape, generator=generator) * mask, mask


@pytest.mark.parametrize("slide", ENCODERS, ids=str)
def test_any_number_of_tiles(slide: dict[str, Any]) -> None:
    plain, traced = model_of(slide), model_of(slide)
    trace(traced)
    with torch.inference_mode():
        for lengths in [(7,), (1,), (3, 1, 12), (300, 2), (64, 64, 64, 64, 5)]:
            bags = bags_of(*lengths)
            for mine, theirs in zip(traced.see(bags), plain.see(bags), strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
            assert len(traced.encode_image(bags)) == len(lengths)


def test_any_number_of_reports_and_tokens() -> None:
    plain, traced = model_of(), model_of()
    trace(traced)
    with torch.inference_mode():
        for lengths in [(4,), (9, 2), (2,), (30, 1, 17, 5), (64,) * 7]:
            texts = texts_of(*lengths)
            mine, theirs = traced.encode_text(*texts), plain.encode_text(*texts)
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_forward_and_generation_go_through_the_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, traced = model_of(), model_of()
    trace(traced)
    bags, texts = bags_of(5, 2, 9), texts_of(4, 8, 3)
    with torch.inference_mode():
        expected = plain(bags, *texts)
        traced(bags, *texts)  # makes the traces
        # From here on the towers themselves are not called any more.
        for tower in (traced.slide, traced.text):
            monkeypatch.setattr(tower, "forward", _not_to_be_called)
        found = traced(bags, *texts)
    for name in ("image_embedding", "text_embedding", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)
    monkeypatch.undo()
    decoding = Decoding(bos_id=1, eos_id=2, pad_id=0, max_tokens=6, top_k=1)
    assert generate(traced, bags, "abc", decoding) == generate(plain, bags, "abc", decoding)


def _not_to_be_called(*args: object) -> None:
    raise AssertionError("the trace stands in the tower's place")


def test_a_trace_for_each_kind_of_input(caplog: pytest.LogCaptureFixture) -> None:
    """Types, positions or none, autocast: what differs in kind has a trace of its own."""
    plain, traced = model_of(), model_of()
    trace(traced)
    whole = bags_of(5, 9)
    kinds = [
        whole,
        bags_of(5, 9, dtype=torch.float16),
        Bags(whole.features, whole.lengths),
        Bags(whole.features, whole.lengths, whole.positions, None, "um"),
    ]
    with caplog.at_level(logging.INFO), torch.inference_mode():
        for bags in [*kinds, *kinds]:
            expected = plain.encode_image(bags)
            torch.testing.assert_close(traced.encode_image(bags), expected, atol=2e-6, rtol=0)
        assert len([r for r in caplog.records if "traced the slide" in r.message]) == len(kinds)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = plain.encode_image(whole)
            found = traced.encode_image(whole)
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_training_mode_is_not_traced() -> None:
    plain, traced = model_of(), model_of()
    trace(traced)
    traced.train()
    plain.train()
    torch.manual_seed(1)
    expected = plain.encode_image(bags_of(5, 9))
    torch.manual_seed(1)
    assert torch.equal(traced.encode_image(bags_of(5, 9)), expected)


def test_a_tower_whose_result_depends_on_a_number_is_refused() -> None:
    model = model_of()
    tower = model.text
    pool = tower.pool

    def counted(hidden: Tensor, mask: Tensor) -> Tensor:
        return pool(hidden, mask) * torch.arange(1, 33) ** (1 / int(hidden.shape[1]))

    tower.pool = counted  # type: ignore[method-assign]
    trace(model)
    with pytest.raises(ConfigError, match=r"text tower TextEncoder depends on lengths.*differs by"):
        model.encode_text(*texts_of(4, 6))

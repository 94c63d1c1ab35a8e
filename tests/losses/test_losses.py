"""Losses against slow written-out references in float64, and against recorded oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from slidevlm.losses import caption_loss_sum, contrastive_loss, siglip_loss

torch.set_default_dtype(torch.float32)


def embeddings(n: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, n, width, dtype=torch.float64, generator=generator)
    return normalize(pair[0], dim=-1), normalize(pair[1], dim=-1)


def slow_contrastive(image: Tensor, text: Tensor, scale: float, ids: list[int]) -> float:
    n, total = len(image), 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(n):
            rivals = [j for j in range(n) if j == i or ids[j] != ids[i]]
            scores = [math.exp(scale * float(a[i] @ b[j])) for j in rivals]
            total += -math.log(math.exp(scale * float(a[i] @ b[i])) / sum(scores)) / n / 2
    return total


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 2, 0], [7] * 6])
def test_contrastive_equals_written_out(ids: list[int]) -> None:
    image, text = embeddings()
    loss = contrastive_loss(image, text, torch.tensor(9.0), torch.tensor(ids))
    assert loss.item() == pytest.approx(slow_contrastive(image, text, 9.0, ids), abs=1e-12)


def test_contrastive_without_ids_keeps_duplicates() -> None:
    image, text = embeddings()
    plain = contrastive_loss(image, text, torch.tensor(9.0))
    assert plain.item() == pytest.approx(slow_contrastive(image, text, 9.0, list(range(6))))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 2, 0]])
def test_siglip_equals_written_out(ids: list[int]) -> None:
    image, text = embeddings()
    expected = 0.0
    for i in range(6):
        for j in range(6):
            if i == j or ids[i] != ids[j]:
                logit = 10.0 * float(image[i] @ text[j]) - 3.0
                expected += math.log1p(math.exp(-logit if i == j else logit)) / 6
    loss = siglip_loss(
        image, text, torch.tensor(10.0), torch.tensor(-3.0, dtype=torch.float64), torch.tensor(ids)
    )
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_one_row_has_no_negatives() -> None:
    image, text = embeddings(1)
    assert contrastive_loss(image, text, torch.tensor(5.0)).item() == 0.0


def test_caption_sums_over_real_tokens_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    tokens = torch.tensor([[1, 3, 4, 2, 0], [1, 5, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    expected = 0.0
    for b, position in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        log_p = logits[b, position - 1].log_softmax(-1)
        expected -= log_p[tokens[b, position]].item()
    assert caption_loss_sum(logits, tokens, mask).item() == pytest.approx(expected, abs=1e-12)


def test_caption_padding_is_told_by_the_mask_not_by_its_id() -> None:
    """A trainer that fixes the padding id to 0 would drop a real token 0."""
    logits = torch.zeros(1, 2, 3, dtype=torch.float64)
    tokens = torch.tensor([[1, 0, 2]])
    total = caption_loss_sum(logits, tokens, torch.ones_like(tokens).bool())
    assert total.item() == pytest.approx(2 * math.log(3))


def test_caption_of_nothing_but_padding_is_zero_not_nan() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    loss = caption_loss_sum(logits, torch.zeros(1, 4, dtype=torch.int64), mask)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# --- oracles recorded from an independent implementation ------------------------------------


@pytest.fixture(scope="module")
def recorded(shared):
    return torch.load(shared / "oracles/losses/losses_ws1.pt", weights_only=True)


def leaf(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0
    )


def test_clip_oracle(recorded) -> None:
    inputs = recorded["inputs"]
    for key, expected in recorded["ranks"][0].items():
        if not key.startswith("clip/"):
            continue
        image, text = leaf(inputs["img"]), leaf(inputs["txt"])
        log_scale = leaf(inputs["log_scale"])
        loss = contrastive_loss(image, text, log_scale.exp())
        loss.backward()
        close(loss.detach(), expected["loss"])
        close(image.grad, expected["g_img"])
        close(text.grad, expected["g_txt"])
        close(log_scale.grad, expected["g_log_scale"])


def test_siglip_oracle(recorded) -> None:
    inputs = recorded["inputs"]
    for key, expected in recorded["ranks"][0].items():
        if not key.startswith("siglip/"):
            continue
        image, text = leaf(inputs["img"]), leaf(inputs["txt"])
        log_scale, bias = leaf(inputs["sig_log_scale"]), leaf(inputs["bias"])
        loss = siglip_loss(image, text, log_scale.exp(), bias)
        loss.backward()
        close(loss.detach(), expected["loss"])
        close(image.grad, expected["g_img"])
        close(text.grad, expected["g_txt"])
        close(log_scale.grad, expected["g_log_scale"])
        close(bias.grad, expected["g_bias"])

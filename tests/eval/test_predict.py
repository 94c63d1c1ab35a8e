"""The evaluation pass against one specimen at a time, in float64, written out."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch, Predictions
from slidevlm.eval import predict as module
from slidevlm.eval.predict import LeftError, Writing, predict, split_contrastive_loss
from slidevlm.models import CoCa, build_model, create_model, from_dict, zoo
from slidevlm.models.generate import Decoding, generate
from slidevlm.precision import resolve

FP32 = resolve("fp32", torch.device("cpu"))
N = 11
NAMES = tuple(f"s{i}" for i in range(N))
REPORTS = {name: f"report {i if i != 3 else 0}" for i, name in enumerate(NAMES)}
BOS, EOS, PAD = 1, 2, 0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model loses more by waiting for a second thread than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_for(*, siglip: bool = False, dropout: float = 0.0) -> CoCa:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tile_width=6, vocab_size=20, siglip=siglip)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
    with torch.no_grad():  # a new model's residual branches are 0 and would hide mistakes
        for key, parameter in model.named_parameters():
            if key not in ("log_scale", "bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def specimen(i: int) -> tuple[Tensor, Tensor, list[int]]:
    """Features, positions and tokens of specimen i; 3 has the report of 0."""
    generator = torch.Generator().manual_seed(i)
    features = torch.randn(1 + i % 5, 6, generator=generator)
    positions = 1e4 * torch.rand(len(features), 2, generator=generator)
    same = torch.Generator().manual_seed(100 + (i if i != 3 else 0))
    words = torch.randint(3, 20, (1 + (i if i != 3 else 0) % 6,), generator=same).tolist()
    return features, positions, [BOS, *words, EOS]


def batch(numbers: list[int]) -> Batch:
    rows = [specimen(i) for i in numbers]
    longest = max(len(tokens) for *_, tokens in rows)
    tokens = torch.full((len(rows), longest), PAD)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for place, (_, _, words) in enumerate(rows):
        tokens[place, : len(words)] = torch.tensor(words)
        mask[place, : len(words)] = True
    bags = Bags(
        torch.cat([row[0] for row in rows]),
        tuple(len(row[0]) for row in rows),
        torch.cat([row[1] for row in rows]),
        None,
        "um",
    )
    ids = torch.tensor([i if i != 3 else 0 for i in numbers])
    names = tuple(NAMES[i] for i in numbers)
    return Batch(bags, tokens, mask, ids, names, tuple(f"p{name}" for name in names))


def batches(size: int, order: list[int] | None = None) -> list[Batch]:
    order = list(range(N)) if order is None else order
    return [batch(order[i : i + size]) for i in range(0, len(order), size)]


def one_by_one(model: CoCa) -> tuple[np.ndarray, np.ndarray, list[list[float]]]:
    """Embeddings, and of each report the log-probabilities of its tokens, in float64."""
    model = copy.deepcopy(model).double().eval()
    images, texts, log_probabilities = [], [], []
    for i in range(N):
        one = batch([i])
        bags = Bags(one.bags.features.double(), one.bags.lengths, one.bags.positions, None, "um")
        with torch.no_grad():
            output = model(bags, one.tokens, one.token_mask)
        images.append(output.image_embedding[0].double().numpy())
        texts.append(output.text_embedding[0].double().numpy())
        if output.logits is not None:
            rows = output.logits[0].double().numpy()
            log_probabilities.append(
                [
                    row[token] - math.log(math.fsum(math.exp(v) for v in row))
                    for row, token in zip(rows, one.tokens[0, 1:].tolist(), strict=True)
                ]
            )
    return np.stack(images), np.stack(texts), log_probabilities


def slow_contrastive(
    image: np.ndarray, text: np.ndarray, ids: np.ndarray, scale: float, bias: float | None = None
) -> float:
    """The definition, pair by pair: identical reports are not each other's negatives."""
    n, total = len(image), 0.0
    score = [[scale * math.fsum(a * b) for b in text.astype(float)] for a in image.astype(float)]
    for i in range(n):
        others = [j for j in range(n) if j == i or ids[j] != ids[i]]
        if bias is None:
            rows = [score[i][j] for j in others], [score[j][i] for j in others]
            total += sum(math.log(math.fsum(map(math.exp, r))) - score[i][i] for r in rows) / 2
        else:
            for j in others:
                sign = 1 if j == i else -1
                total += math.log1p(math.exp(-sign * (score[i][j] + bias)))
    return total / n


@pytest.mark.parametrize("size", [1, 4, 20])
def test_every_specimen_once_in_the_order_of_the_split(size: int) -> None:
    model = model_for()
    order = np.random.default_rng(0).permutation(N).tolist()
    found = predict(model, batches(size, order), REPORTS, FP32)
    image, text, _ = one_by_one(model)
    assert found.specimen_ids == NAMES
    assert found.patient_ids == tuple(f"p{name}" for name in NAMES)
    assert found.reports == tuple(REPORTS.values())
    assert found.report_ids.tolist() == [i if i != 3 else 0 for i in range(N)]
    np.testing.assert_allclose(found.image_embedding, image, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.text_embedding, text, rtol=0, atol=1e-5)
    assert found.image_embedding.dtype == found.text_embedding.dtype == np.float32
    assert np.abs(image[0] - image[1]).max() > 1e-2, "else the order would not show"
    assert found.generated is None
    assert found.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)


def test_the_order_is_that_of_the_reports_not_of_the_batches() -> None:
    model = model_for()
    backwards = dict(reversed(REPORTS.items()))
    found = predict(model, batches(4), backwards, FP32)
    plain = predict(model, batches(4), REPORTS, FP32)
    assert found.specimen_ids == NAMES[::-1]
    np.testing.assert_array_equal(found.image_embedding, plain.image_embedding[::-1])
    assert found.losses == pytest.approx(plain.losses, rel=1e-6)


@pytest.mark.parametrize("numbers", [[*range(N), 4], list(range(N - 1)), [*range(N - 1), 0]])
def test_twice_or_missing_is_a_mistake(numbers: list[int]) -> None:
    with pytest.raises(AssertionError, match="each specimen exactly once"):
        predict(model_for(), batches(3, numbers), REPORTS, FP32)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_losses(size: int) -> None:
    """Means over the split, so that they do not depend on the size of a batch."""
    model = model_for()
    found = predict(model, batches(size), REPORTS, FP32)
    image, text, log_probabilities = one_by_one(model)
    values = [value for row in log_probabilities for value in row]
    contrastive = slow_contrastive(image, text, found.report_ids, 1 / 0.07)
    assert set(found.losses) == {"contrastive", "caption"}
    assert found.losses["contrastive"] == pytest.approx(contrastive, abs=5e-5)
    assert found.losses["caption"] == pytest.approx(-sum(values) / len(values), abs=1e-5)
    unmasked = slow_contrastive(image, text, np.arange(N), 1 / 0.07)
    assert abs(unmasked - contrastive) > 5e-3, "else the mask would not show"


def test_losses_of_the_sigmoid() -> None:
    model = model_for(siglip=True)
    with torch.no_grad():
        model.bias.fill_(-2.0)
    found = predict(model, batches(4), REPORTS, FP32)
    image, text, _ = one_by_one(model)
    expected = slow_contrastive(image, text, found.report_ids, 10.0, -2.0)
    assert found.losses["contrastive"] == pytest.approx(expected, abs=1e-4)


def test_without_a_decoder_there_is_no_caption_loss() -> None:
    content = zoo.load("coca_tiny").to_dict() | {"family": "clip"}
    del content["decoder"]
    config = replace(from_dict(content, "a clip model"), tile_width=6)
    found = predict(build_model(config, 20), batches(4), REPORTS, FP32)
    assert set(found.losses) == {"contrastive"}


@pytest.mark.parametrize("rows", [1, 4, 12, 100])
@pytest.mark.parametrize("bias", [None, -3.0])
def test_contrastive_loss_in_blocks(
    rows: int, bias: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    random = np.random.default_rng(1)
    vectors = random.standard_normal((2, 12, 5))
    image, text = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    ids = random.integers(0, 8, 12)
    expected = slow_contrastive(image, text, ids, 7.0, bias)
    assert split_contrastive_loss(image, text, ids, 7.0, bias) == pytest.approx(expected, abs=1e-10)
    short = image.astype(np.float32), text.astype(np.float32)
    assert split_contrastive_loss(*short, ids, 7.0, bias) == pytest.approx(expected, abs=1e-5)


def test_the_contrastive_loss_of_many_specimens_holds_few_rows(monkeypatch) -> None:
    """A thousand rows of a million columns would be four gigabytes, and five times that beside."""
    held: list[int] = []
    product = torch.Tensor.__matmul__

    def noted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        held.append((found := product(a, b)).numel())
        return found

    monkeypatch.setattr(module, "_ELEMENTS", 4000)
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    image, text = np.random.default_rng(0).normal(size=(2, 300, 3)).astype(np.float32)
    split_contrastive_loss(image, text, np.arange(300), 1.0, None)
    assert sum(held) == 2 * 300 * 300 and max(held) <= 4000


def test_one_specimen_has_nothing_to_be_told_from() -> None:
    one = np.ones((1, 1))
    assert split_contrastive_loss(one, one, np.array([0]), 10.0, None) == 0.0
    found = predict(model_for(), [batch([0])], {"s0": "report"}, FP32)
    assert len(found) == 1 and found.losses["contrastive"] == 0.0


# --- what is left as it was ------------------------------------------------------------------


class StoppedError(Exception):
    """What a test raises in the middle of a pass."""


def stop(done: int) -> None:
    raise StoppedError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_training_mode_comes_back(*, training: bool, fails: bool) -> None:
    """Of every module, since a frozen tower may be in evaluation mode within one that trains."""
    model = model_for().train(training)
    model.slide.train(not training)
    before = [part.training for part in model.modules()]
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda part, _: seen.extend(p.training for p in part.modules()))
    if fails:
        with pytest.raises(StoppedError):
            predict(model, batches(4), REPORTS, FP32, on_batch=stop)
    else:
        predict(model, batches(4), REPORTS, FP32)
    assert seen and not any(seen)
    assert [part.training for part in model.modules()] == before


def test_dropout_is_off_and_random_numbers_are_untouched() -> None:
    model = model_for(dropout=0.5).train()
    assert any(isinstance(part, nn.Dropout) for part in model.modules())
    state = torch.get_rng_state()
    first = predict(model, batches(4), REPORTS, FP32)
    assert torch.equal(state, torch.get_rng_state())
    expected = predict(model_for(dropout=0.0), batches(4), REPORTS, FP32)
    np.testing.assert_array_equal(first.image_embedding, expected.image_embedding)
    np.testing.assert_array_equal(first.text_embedding, expected.text_embedding)
    assert first.losses == expected.losses


def test_weights_and_gradients_are_untouched() -> None:
    model = model_for()
    before = copy.deepcopy(model.state_dict())
    predict(model, batches(4), REPORTS, FP32)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("after", [0, 1, 3])
def test_it_can_be_left_before_the_first_batch_and_after_each(after: int) -> None:
    model, done = model_for().train(), list[int]()
    with pytest.raises(LeftError):
        predict(model, batches(4), REPORTS, FP32, None, done.append, lambda: len(done) == after)
    assert done == [4, 8, 11][:after] and model.training


def test_progress_counts_specimens() -> None:
    done: list[int] = []
    predict(model_for(), batches(4), REPORTS, FP32, on_batch=done.append)
    assert done == [4, 8, 11]


# --- generated reports -----------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 4])
def test_generated_reports_are_those_of_each_specimen(top_k: int) -> None:
    model = model_for()
    decoding = Decoding(BOS, EOS, PAD, max_tokens=6, top_k=top_k, seed=1)
    writing = Writing(decoding, lambda row: " ".join(map(str, row)))
    order = np.random.default_rng(1).permutation(N).tolist()
    found = predict(model, batches(4, order), REPORTS, FP32, writing)
    expected = []
    for i in range(N):
        row = generate(model, batch([i]).bags, (NAMES[i],), decoding)[0]
        expected.append(" ".join(map(str, row)))
    assert found.generated == tuple(expected)
    assert len(set(expected)) > 1, "else the order would not show"
    assert found.losses == predict(model, batches(4, order), REPORTS, FP32).losses


# --- several processes, autocast, weights that diverged --------------------------------------


def across(
    monkeypatch: pytest.MonkeyPatch, shares: list[list[Batch]], run: Callable[..., Predictions]
) -> Predictions:
    """What the last of several processes gets, each with its share of the batches."""
    parts: list[object] = []

    def gather(part: object) -> list[object]:
        parts.append(part)
        if len(parts) < len(shares):
            raise StoppedError
        return parts

    monkeypatch.setattr(module.dist, "gather_objects", gather)
    for share in shares[:-1]:
        with pytest.raises(StoppedError):
            run(share)
    return run(shares[-1])


def test_any_share_of_processes_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for()
    writing = Writing(Decoding(BOS, EOS, PAD, max_tokens=4), lambda row: str(list(row)))

    def run(share: list[Batch]) -> Predictions:
        return predict(model, share, REPORTS, FP32, writing)

    alone = run(batches(1))
    shares = [batches(1, [10, 3, 5]), [], batches(1, [1, 0, 2, 4, 6]), batches(1, [9, 8, 7]), []]
    together = across(monkeypatch, shares, run)
    assert together.specimen_ids == alone.specimen_ids
    assert together.patient_ids == alone.patient_ids
    assert together.generated == alone.generated
    np.testing.assert_array_equal(together.report_ids, alone.report_ids)
    np.testing.assert_array_equal(together.image_embedding, alone.image_embedding)
    np.testing.assert_array_equal(together.text_embedding, alone.text_embedding)
    assert together.losses == pytest.approx(alone.losses, rel=1e-12)


def test_where_one_process_leaves_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that have no batches, or had done theirs."""
    model = model_for()

    def run(share: list[Batch]) -> Predictions:
        mine = bool(share) and share[0].specimen_ids == ("s3",)
        return predict(model, share, REPORTS, FP32, leave=lambda: mine)

    for last in (batches(1, [7, 8]), [], batches(1, [3, 5])):
        with pytest.raises(LeftError):
            across(monkeypatch, [batches(1, [0, 1]), [], batches(1, [3, 5]), last], run)


def test_autocast_reaches_the_model_and_embeddings_stay_float32() -> None:
    model = model_for()
    amp = predict(model, batches(4), REPORTS, resolve("amp", torch.device("cpu")))
    plain = predict(model, batches(4), REPORTS, FP32)
    assert amp.image_embedding.dtype == amp.text_embedding.dtype == np.float32
    difference = np.abs(amp.image_embedding - plain.image_embedding).max()
    assert 1e-6 < difference < 0.1
    np.testing.assert_allclose(np.linalg.norm(amp.image_embedding, axis=1), 1, atol=1e-5)


def test_embeddings_that_are_not_numbers_are_said(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("slidevlm"), "propagate", True)
    broken = batches(4)
    broken[1].bags.features[0] = math.nan
    found = predict(model_for(), broken, REPORTS, FP32)
    assert "1 of 11 slide embeddings are not finite (s4): no query finds them" in caplog.text
    assert "report embeddings" not in caplog.text
    assert math.isnan(found.losses["contrastive"])
    caplog.clear()
    predict(model_for(), batches(4), REPORTS, FP32)
    assert not caplog.records

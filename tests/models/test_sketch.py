"""Guesses by rounded weights: the same reports, in fewer passes of the whole model."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.models.test_generate import BOS, EOS, PAD, bags_for, model_for, slow_greedy
from tests.models.test_lookup import WAYS, assert_same, other_model
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models import few_rows, fused, sketch
from slidevlm.models.few_rows import FewRows
from slidevlm.models.fused import Fused, Narrowed
from slidevlm.models.generate import Decoding, Lookup, Sketch, draft

if not fused.is_available():
    pytest.skip("numba is not installed", allow_module_level=True)

from slidevlm.models import kernels


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of tests are large enough, and all is compiled."""
    assert fused._narrow_started(os.getpid())
    monkeypatch.setattr(few_rows, "LEAST", 0)
    monkeypatch.setattr(sketch, "LEAST_WEIGHTS", 0)


class Passes:
    """The tokens of each pass, and whether weights were rounded."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, bool]] = []
        self.rounded = False
        model.text.register_forward_pre_hook(
            lambda _, args: self.seen.append((args[0].shape[1], self.rounded))
        )
        enter = Fused.rounded

        def rounded(layers: Fused, kept: Narrowed) -> Any:
            passes, inner = self, enter(layers, kept)

            class _Within:
                def __enter__(self) -> None:
                    passes.rounded = True
                    inner.__enter__()

                def __exit__(self, *error: Any) -> None:
                    passes.rounded = False
                    inner.__exit__(*error)

            return _Within()

        monkeypatch.setattr(Fused, "rounded", rounded)

    @property
    def whole(self) -> list[int]:
        return [tokens for tokens, rounded in self.seen if not rounded]

    @property
    def guessing(self) -> list[int]:
        return [tokens for tokens, rounded in self.seen if rounded]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("prompt", [(), (7, 9, 11)])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "several draws"])
def test_the_reports_are_as_without(
    way: str, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(4)
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] *= 1.5
    decoding = Decoding(BOS, EOS, PAD, max_tokens=25, **WAYS[way])
    bag = bags_for((7,))
    expected = draft(model, bag, ["s"], decoding, prompt)
    passes = Passes(model, monkeypatch)
    for lookup in (None, Lookup()):
        guessing = Sketch(after=0)
        for _ in range(2):
            found = draft(model, bag, ["s"], decoding, prompt, lookup=lookup, sketch=guessing)
            assert_same(found, expected)
    if len(expected[0][0].tokens) > 3:
        assert max(passes.whole[1:]) > 1 and passes.guessing
    assert not any(length > 1 for length in passes.guessing)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_greedy_equals_recomputing_everything(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guessing = model_for(seed), Sketch(after=0)
    passes = Passes(model, monkeypatch)
    slow = slow_greedy(model, bags_for(), 20)
    passes.seen.clear()
    decoding, bags, start = Decoding(BOS, EOS, PAD, max_tokens=20), bags_for(), 0
    for length, expected in zip(bags.lengths, slow, strict=True):
        bag = Bags(bags.features[start : start + length], (length,))
        start += length
        found = draft(model, bag, ["s"], decoding, sketch=guessing)
        assert list(found[0][0].tokens) == expected
    assert guessing.right > 0.9 and passes.guessing


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("text", ["biogpt", "gpt2", "lm"])
def test_other_decoders(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = other_model(text)
    decoding = Decoding(BOS, EOS, PAD, max_tokens=30, min_tokens=20)
    bag = bags_for((7,)) if text != "lm" else Bags(torch.zeros(1, 1), (1,))
    expected = draft(model, bag, ["s"], decoding)
    passes = Passes(model, monkeypatch)
    assert_same(draft(model, bag, ["s"], decoding, sketch=Sketch(after=0)), expected)
    assert passes.guessing and len(passes.whole) < 20


@pytest.mark.usefixtures("tiny")
def test_a_report_takes_few_passes_over_all_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for()
    passes, decoding = Passes(model, monkeypatch), Decoding(BOS, EOS, PAD, 48, min_tokens=48)
    draft(model, bags_for((7,)), ["s"], decoding, sketch=Sketch(after=0))
    assert len(passes.whole) <= 12, "48 tokens"
    assert len(passes.guessing) < 60
    assert passes.whole[-1] <= 16


def noise(weight: Any, pairs: Any, steps: Any, shares: int) -> None:
    """In the place of rounding."""
    pairs[:] = torch.randint(-(2**31), 2**31, pairs.shape, dtype=torch.int32).numpy()
    steps[:] = 1e-9


@pytest.mark.usefixtures("tiny")
def test_bad_guesses_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoding = model_for(), Decoding(BOS, EOS, PAD, 48, min_tokens=48)
    expected = draft(model, bags_for((7,)), ["s"], decoding)
    monkeypatch.setattr(kernels, "sketch", noise)
    passes, guessing = Passes(model, monkeypatch), Sketch(after=0)
    for _ in range(2):
        passes.seen.clear()
        assert_same(draft(model, bags_for((7,)), ["s"], decoding, sketch=guessing), expected)
    assert len(passes.guessing) <= 3 and guessing.right < 0.78


@pytest.mark.usefixtures("tiny")
def test_threads_do_not_read_each_other_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the same layers, but only the one that guesses has them rounded."""
    model, decoding = model_for(), Decoding(BOS, EOS, PAD, 30, min_tokens=30)
    bags = [bags_for((length,)) for length in (7, 3, 5)]
    expected = [draft(model, bag, ["s"], decoding) for bag in bags]
    monkeypatch.setattr(kernels, "sketch", noise)
    passes = Passes(model, monkeypatch)

    def write(number: int) -> None:
        guessing = Sketch(after=0)
        found = draft(model, bags[number % 3], ["s"], decoding, sketch=guessing)
        assert_same(found, expected[number % 3])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(60)))
    assert passes.guessing


@pytest.mark.usefixtures("tiny")
def test_the_lookup_learns_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would have guessed is compared with what came, also where the sketch guessed."""
    model, decoding = model_for(), Decoding(BOS, EOS, PAD, 30, min_tokens=30)
    passes, shares = Passes(model, monkeypatch), []
    for guessing in (None, Sketch(after=0)):
        lookup = Lookup()
        monkeypatch.setattr(lookup, "worth", lambda *_: 1)
        for _ in range(2):
            draft(model, bags_for((7,)), ["s"], decoding, lookup=lookup, sketch=guessing)
        shares.append(lookup._right[4])
    assert shares[0] > 0.8 and shares[1] > 0.65 and passes.guessing


@pytest.mark.usefixtures("tiny")
def test_for_one_report_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for()
    passes = Passes(model, monkeypatch)
    decoding = Decoding(BOS, EOS, PAD, 20, min_tokens=20)
    for form in ({"best": 3, "top_k": 4}, {"beams": 6, "groups": 3}):
        several = Decoding(BOS, EOS, PAD, 20, min_tokens=20, **form)
        draft(model, bags_for((7,)), ["s"], several, sketch=Sketch(after=0))
    draft(model, bags_for((7, 3)), ["s", "t"], decoding, sketch=Sketch(after=0))
    assert not passes.guessing
    draft(model, bags_for((7,)), ["s"], decoding, sketch=Sketch(after=30))
    assert not passes.guessing, "too early"
    remembers = Sketch(after=30)
    for _ in range(2):
        draft(model, bags_for((7,)), ["s"], decoding, sketch=remembers)
    assert passes.guessing


def test_what_is_worth_it(monkeypatch: pytest.MonkeyPatch, stand_in: Fused) -> None:
    guessing = Sketch(after=2)
    monkeypatch.setattr(Fused, "size", sketch.LEAST_WEIGHTS)
    assert [guessing.worth(stand_in, 30) > 1 for _ in range(4)] == [False, False, True, True]
    assert guessing.worth(stand_in, 1) == 1 and guessing.worth(stand_in, 3) == 3
    guessing.right = 1.0
    assert 8 <= guessing.worth(stand_in, 30) <= sketch.MOST_TOKENS
    for _ in range(3):
        guessing.learn((5, 6, 7), (5, 6, 7, 8))
    assert guessing.right == 1.0
    for _ in range(20):
        guessing.learn((5, 6), (4,))
    assert guessing.right == pytest.approx(0.95**20)
    tried = [guessing.worth(stand_in, 30) > 1 for _ in range(400)]
    assert not any(tried[:50]) and all(tried[300:]), "again after a while"
    guessing.right = 1.0
    for size in (sketch.LEAST_WEIGHTS - 1, sketch.MOST_WEIGHTS + 1):
        monkeypatch.setattr(Fused, "size", size)
        assert guessing.worth(stand_in, 30) == 1
    assert Sketch().worth(stand_in, 30) == 1


@pytest.fixture
def stand_in() -> Iterator[Fused]:
    made = Fused(FewRows)
    with torch.inference_mode(), made.own_threads():
        yield made


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance


def test_weights_are_rounded_once_and_anew_when_they_change(
    stand_in: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        stand_in.kernels, "sketch", lambda w, *a, f=kernels.sketch: (made.append(w.shape), f(w, *a))
    )
    with torch.inference_mode(False):
        layer, odd, kept = nn.Linear(64, 9), nn.Linear(63, 9), Narrowed()
    x = torch.randn(1, 64)
    for _ in range(2):  # as in two calls of generation
        quick = stand_in.of(layer)
        close(quick(x), layer(x), 1e-6)
        with stand_in.rounded(kept):
            close(quick(x), layer(x), 1e-3)
            assert not torch.equal(quick(x), layer(x))
    assert made == [(9, 64)]
    with torch.no_grad():
        layer.weight.mul_(2)
    with stand_in.rounded(kept):
        close(stand_in.of(layer)(x), layer(x), 1e-3)
        y = torch.randn(1, 63)
        close(stand_in.of(odd)(y), odd(y), 1e-6)
    assert made == [(9, 64), (9, 64)]
    assert len(kept.forms) == 1
    del layer, quick
    gc.collect()
    assert len(kept.forms) == 0


def test_weights_of_inference_have_no_versions(stand_in: Fused) -> None:
    layer, x = nn.Linear(64, 9), torch.randn(1, 64)
    assert layer.weight.is_inference()
    with stand_in.rounded(Narrowed()):
        close(stand_in.of(layer)(x), layer(x), 1e-3)


@pytest.mark.usefixtures("tiny")
def test_where_they_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, decoding = model_for(), Decoding(BOS, EOS, PAD, 20, min_tokens=20)
    expected = draft(model, bags_for((7,)), ["s"], decoding)
    compile_all = kernels.compile_all

    def fails(*, narrow: bool) -> None:
        if narrow:
            raise OSError("no space left")
        compile_all(narrow=False)

    monkeypatch.setattr(kernels, "compile_all", fails)
    fused._narrow_started.cache_clear()
    passes = Passes(model, monkeypatch)
    try:
        for _ in range(2):
            found = draft(model, bags_for((7,)), ["s"], decoding, sketch=Sketch(after=0))
            assert_same(found, expected)
    finally:
        fused._narrow_started.cache_clear()
    assert not passes.guessing
    told = [r.getMessage() for r in caplog.records]
    assert ["no space left" in text and "NUMBA_CACHE_DIR" in text for text in told] == [True]

"""Guessed tokens: the same reports in fewer passes, with every way of choosing and any guesses."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from tests.models.test_generate import BOS, EOS, NAMES, PAD, bags_for, model_for, slow_greedy

from slidevlm.models import CoCa, build_model, create_model, from_dict
from slidevlm.models.generate import Decoding, draft, generate
from slidevlm.models.language import LanguageModel
from slidevlm.models.lookup import MOST_TOKENS, NOTHING, Guess, Lookup

WAYS = {
    "greedy": {},
    "least length": {"min_tokens": 9},
    "repetition penalty": {"repetition_penalty": 1.4},
    "no repeats": {"no_repeat_ngram": 2},
    "no repeats, both": {"no_repeat_ngram": 3, "repetition_penalty": 1.2, "min_tokens": 5},
    "top_k": {"top_k": 5, "seed": 3},
    "top_p": {"top_k": None, "top_p": 0.9, "temperature": 0.7},
    "several draws": {"top_k": 4, "best": 3, "no_repeat_ngram": 2},
}


class Oracle(Lookup):
    """Guesses some of the right tokens and then wrong ones, as many as drawn."""

    def __init__(self, texts: list[list[int]], seed: int) -> None:
        super().__init__()
        self.texts, self.random = texts, random.Random(seed)

    def guess(self, text: list[int]) -> Guess:
        right = [t[len(text) :] for t in self.texts if t[: len(text)] == text]
        if not right or self.random.random() < 0.2:
            return NOTHING
        tokens = self.random.choice(right)[: self.random.randrange(6)]
        wrong = [self.random.randrange(3, 40) for _ in range(self.random.randrange(4))]
        return Guess(4, (*tokens, *wrong)) if tokens or wrong else NOTHING

    def worth(self, guesses: list[Guess], room: int, cost: object = None) -> int:
        return min(max(room, 1), 1 + max(len(g.tokens) for g in guesses), MOST_TOKENS)


def reports(model, decoding, prompt=(), lookup=None):
    return draft(model, bags_for(), NAMES, decoding, prompt, lookup=lookup)


def assert_same(found, expected) -> None:
    assert [[d.tokens for d in drafts] for drafts in found] == [
        [d.tokens for d in drafts] for drafts in expected
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert [d.ended for d in mine] == [d.ended for d in theirs]
        scores = [d.score for d in theirs]
        assert [d.score for d in mine] == pytest.approx(scores, abs=1e-4)


def passes(model) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    model.text.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


@pytest.mark.parametrize("prompt", [(), (7, 9, 11)])
@pytest.mark.parametrize("way", list(WAYS))
def test_any_guesses_leave_the_reports_as_they_are(way: str, prompt: tuple[int, ...]) -> None:
    model = model_for(4)
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] *= 1.5
    decoding = Decoding(BOS, EOS, PAD, max_tokens=25, **WAYS[way])
    expected = reports(model, decoding, prompt)
    texts = [[BOS, *prompt, *d.tokens, EOS] for drafts in expected for d in drafts]
    seen = passes(model)
    for seed in range(4):
        assert_same(reports(model, decoding, prompt, Oracle(texts, seed)), expected)
    assert any(length > 1 for _, length in seen[1:])


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_greedy_equals_recomputing_everything(seed: int) -> None:
    model = model_for(seed)
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] *= 1.5
    slow = slow_greedy(model, bags_for(), 20)
    lookup, decoding = Lookup(), Decoding(BOS, EOS, PAD, max_tokens=20)
    for _ in range(3):
        assert generate(model, bags_for(), NAMES, decoding, lookup=lookup) == slow


def other_model(text: str) -> CoCa | LanguageModel:
    """With the towers of others, or a language model; random weights."""
    torch.manual_seed(0)
    if text == "lm":
        model = create_model("lm_tiny", tile_width=12, vocab_size=40).eval()
    else:
        model = build_model(from_dict({
            "family": "coca", "embed_dim": 16, "tile_width": 12,
            "slide": {"type": "mean", "width": 16},
            "text": {"type": text, "source": "", "tokenizer": "train", "start": 0, "end": 2,
                     "width": 32, "heads": 4, "inner": 64, "positions": 64,
                     "context_length": 64},
            "decoder": {"type": text, "source": "", "start": 2, "end": 4, "heads": 4, "inner": 64},
        }, "here"), 40).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("text", ["biogpt", "gpt2", "lm"])
def test_other_decoders(text: str) -> None:
    model, decoding = other_model(text), Decoding(BOS, EOS, PAD, max_tokens=30)
    expected = reports(model, decoding)
    texts = [[BOS, *d.tokens, EOS] for drafts in expected for d in drafts]
    for seed in range(3):
        assert_same(reports(model, decoding, (), Oracle(texts, seed)), expected)


def test_what_was_written_before_takes_few_passes() -> None:
    model, lookup = model_for(), Lookup()
    decoding = Decoding(BOS, EOS, PAD, max_tokens=40, min_tokens=40)
    seen = passes(model)
    generate(model, bags_for(), NAMES, decoding, lookup=lookup)
    first, known = len(seen), len(seen)
    for _ in range(4):
        known = len(seen)
        generate(model, bags_for(), NAMES, decoding, lookup=lookup)
    assert len(seen) - known < first / 3
    assert lookup.tokens > lookup.passes


def test_bad_guesses_stop() -> None:
    """A model whose tokens follow nothing: guesses become rare, so that they cost nothing."""

    class Wrong(Lookup):
        def guess(self, text: list[int]) -> Guess:
            return Guess(4, (3, 3, 3))

    lookup = Wrong()
    text = [BOS]
    counts = []
    for _ in range(60):
        counts.append(lookup.worth([lookup.guess(text)], 50, math.sqrt))
        text.append(5)
        lookup.learn(lookup.guess(text), text, 1)
    assert counts[0] > 1 and set(counts[20:]) == {1}


def test_guesses() -> None:
    lookup = Lookup()
    lookup.learn(NOTHING, [BOS, 5, 6, 7, 8, 9, 10], 6)
    assert lookup.guess([BOS, 5, 6]) == Guess(4, (7, 8, 9, 10))
    assert lookup.guess([BOS, 4, 4, 7, 8]) == Guess(2, (9, 10))
    assert lookup.guess([BOS, 4, 4]) == NOTHING == lookup.guess([BOS, 9, 10])
    assert lookup.guess([BOS]) == Guess(4, (5, 6, 7, 8, 9, 10)), "the beginning is one, too"
    lookup.learn(NOTHING, [BOS, 4, 7, 8, 3], 1)
    assert lookup.guess([BOS, 4, 4, 7, 8]) == Guess(2, (3,)), "the latest"
    assert lookup.worth([NOTHING], 50, math.sqrt) == 1
    assert lookup.worth([lookup.guess([BOS])], 1, math.sqrt) == 1
    many = [lookup.guess([BOS])] * 40
    assert lookup.worth(many, 50, math.sqrt) == 1, "as many rows are work enough"
    guess = [lookup.guess([BOS])]
    assert lookup.worth(guess, 50, lambda n: 1.0) == 7, "all of them, where a pass costs the same"
    assert lookup.worth(guess, 50, float) == 1, "none, where each token costs as much"
    beyond = lambda n: 1.0 if n <= 6 else 100.0  # noqa: E731
    assert lookup.worth(guess * 2, 50, beyond) == 3, "the tokens of all reports are counted"


def test_with_16_bits_nothing_is_guessed() -> None:
    model, lookup = model_for().bfloat16(), Lookup()
    bags = replace(bags_for(), features=bags_for().features.bfloat16())
    seen = passes(model)
    for _ in range(2):
        generate(model, bags, NAMES, Decoding(BOS, EOS, PAD, max_tokens=20), lookup=lookup)
    assert not lookup.passes and {length for _, length in seen} == {1}

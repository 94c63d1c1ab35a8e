"""What the settings do to a row of logits, by hand and against loops."""

from __future__ import annotations

import math

import pytest
import torch

from slidevlm.errors import ConfigError
from slidevlm.models.decoding import Decoding, choose, draws_for, log_probabilities

BOS, EOS, PAD = 1, 2, 0
MANY = torch.arange(1000) / 1000


def logs_of(logits: list[float], seen: list[int] = [], written: int = 0, **settings) -> list[float]:  # noqa: B006
    decoding = Decoding(BOS, EOS, PAD, **settings)
    history = torch.tensor([seen], dtype=torch.int64).view(1, -1)
    return log_probabilities(torch.tensor([logits]), history, written, decoding)[0].tolist()


def test_padding_and_bos_are_never_chosen() -> None:
    found = logs_of([9.0, 9.0, 0.0, 1.0])
    assert found[:2] == [-math.inf] * 2
    assert found[2:] == pytest.approx(torch.tensor([0.0, 1.0]).log_softmax(0).tolist())


def test_eos_waits_for_the_least_length() -> None:
    assert logs_of([0, 0, 5.0, 1.0], [3], 1, min_tokens=2)[EOS] == -math.inf
    assert logs_of([0, 0, 5.0, 1.0], [3, 3], 2, min_tokens=2)[EOS] > -0.1


def test_repetition_is_dearer_in_both_signs() -> None:
    found = logs_of([0, 0, 0.0, 2.0, -2.0, 1.0], [3, 4, 3], repetition_penalty=2.0)
    expected = torch.tensor([0.0, 1.0, -4.0, 1.0]).log_softmax(0)
    assert found[2:] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_ngram_twice(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for length in range(9):
        seen = torch.randint(3, 6, (20, length), generator=generator)
        decoding = Decoding(BOS, EOS, PAD, no_repeat_ngram=n)
        found = log_probabilities(torch.zeros(20, 6), seen, length, decoding)
        for row, text in zip(found, seen.tolist(), strict=True):
            had = {tuple(text[i : i + n]) for i in range(length - n + 1)}
            for token in range(2, 6):
                again = (*text[length - n + 1 :], token) in had
                assert (row[token] == -math.inf) == again, (text, token)


def test_where_nothing_may_follow_the_report_ends() -> None:
    found = logs_of([0, 0, 1.0, 1.0, 1.0], [3, 4], 2, no_repeat_ngram=1, min_tokens=9)
    assert found == [-math.inf, -math.inf, 0.0, -math.inf, -math.inf]
    assert logs_of([math.nan] * 5)[EOS] == 0.0


def test_a_token_beyond_all_numbers_is_the_next_one() -> None:
    found = logs_of([0, 0, 1.0, math.inf, math.nan])
    assert found[3] == 0.0 and found[4] == -math.inf


def test_draws_among_the_k_most_likely_with_their_probabilities() -> None:
    logits = torch.tensor([[9.0, 9.0, 0.0, 1.0, 2.0, -1.0]])  # padding and BOS look best
    decoding = Decoding(BOS, EOS, PAD, top_k=3)
    logs = log_probabilities(logits, torch.zeros(1, 0, dtype=torch.int64), 0, decoding)
    chosen = choose(logs.expand(1000, -1), MANY, decoding)
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    for token, share in zip((4, 3, 2), expected, strict=True):
        assert (chosen == token).float().mean().item() == pytest.approx(share.item(), abs=2e-3)
    nearly_one = torch.tensor([1.0 - 2**-24])
    assert choose(logs, nearly_one, decoding).item() in (2, 3, 4)
    assert choose(logs, MANY[:1], Decoding(BOS, EOS, PAD, top_k=1)).item() == 4


@pytest.mark.parametrize(
    ("top_p", "tokens"), [(0.45, {3}), (0.55, {3, 4}), (0.85, {3, 4, 5}), (1.0, {3, 4, 5, 2})]
)
def test_top_p_is_the_fewest_tokens_with_that_share(top_p: float, tokens: set[int]) -> None:
    shares = {3: 0.5, 4: 0.3, 5: 0.15, 2: 0.05}
    logs = torch.full((1, 6), -math.inf)
    for token, share in shares.items():
        logs[0, token] = math.log(share)
    chosen = choose(logs.expand(1000, -1), MANY, Decoding(BOS, EOS, PAD, top_k=None, top_p=top_p))
    assert set(chosen.tolist()) == tokens
    whole = sum(shares[t] for t in tokens)
    for token in tokens:
        share = (chosen == token).float().mean().item()
        assert share == pytest.approx(shares[token] / whole, abs=3e-3)


def test_temperature() -> None:
    logs = torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]])
    decoding = Decoding(BOS, EOS, PAD, top_k=None, temperature=2.0)
    share = (choose(logs.expand(1000, -1), MANY, decoding) == 3).float().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-0.5)), abs=2e-3)


def test_draws_depend_on_seed_and_name_alone() -> None:
    one, other = (Decoding(BOS, EOS, PAD, top_k=5, seed=seed) for seed in (0, 1))
    together = draws_for(("a", "b"), 20, one)
    assert torch.equal(together[1:], draws_for(("b",), 20, one))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draws_for(("a", "b"), 20, other))
    several = draws_for(("a",), 20, Decoding(BOS, EOS, PAD, top_k=5, best=3))
    assert torch.equal(several[0], together[0]) and len(several.unique()) == 60


def test_settings_for_a_record_are_those_with_an_effect() -> None:
    common = {"max_tokens": 100, "min_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram": 0}
    common |= {"length_penalty": 1.0, "best": 1}
    assert Decoding(BOS, EOS, PAD).settings == {"form": "greedy", **common}
    drawn = {"top_k": None, "top_p": 1.0, "temperature": 1.0, "seed": 7}
    assert Decoding(BOS, EOS, PAD, top_k=None, seed=7).settings == {
        "form": "draws",
        **common,
        **drawn,
    }
    plain = {"form": "beams", **common, "beams": 4, "groups": 1}
    assert Decoding(BOS, EOS, PAD, beams=4).settings == plain
    several = {"best": 2, "candidates": 3, "choose": "consensus"}
    assert Decoding(BOS, EOS, PAD, beams=4, **several).settings == plain | several
    groups = {"groups": 2, "diversity": 0.5}
    assert Decoding(BOS, EOS, PAD, beams=4, groups=2).settings == plain | groups


WRONG = {
    "top_k must be": {"top_k": 0},
    "max_tokens must be": {"max_tokens": 0},
    "temperature must be": {"top_k": 5, "temperature": 0.0},
    "top_p must be": {"top_k": 5, "top_p": 1.5},
    "repetition_penalty must be": {"repetition_penalty": -1.0},
    "length_penalty must be": {"beams": 2, "length_penalty": math.nan},
    "length_penalty must be from": {"length_penalty": -500.0},
    "temperature must be from": {"top_k": 5, "temperature": 1e-320},
    "temperature must be from 1e-30 to": {"top_k": 5, "temperature": 1e300},
    "repetition_penalty must be from": {"repetition_penalty": 1e-46},
    "diversity must be": {"beams": 2, "groups": 2, "diversity": -1.0},
    "diversity must be at most": {"beams": 2, "groups": 2, "diversity": 1e39},
    "is above max_tokens": {"min_tokens": 6, "max_tokens": 5},
    "need beams": {"groups": 3},
    "top_k 1 is greedy": {"temperature": 0.5},
    "greedy decoding writes one": {"best": 2},
    "draws nothing": {"beams": 4, "top_k": 50},
    "draws nothing;": {"beams": 4, "top_p": 0.9},
    "do not divide": {"beams": 6, "groups": 4},
    "groups without diversity": {"beams": 6, "groups": 3, "diversity": 0.0},
    "3 best need as many beams": {"beams": 2, "best": 3},
    "3 candidates need as many beams": {"beams": 2, "candidates": 3},
    "not the 3 candidates": {"candidates": 3},
    "fewer than the 3 best": {"top_k": 5, "candidates": 2, "best": 3},
    "unknown choose 'consens'; did you mean consensus": {"top_k": 5, "choose": "consens"},
    "needs several reports to choose from": {"top_k": 5, "choose": "consensus"},
}


@pytest.mark.parametrize("message", list(WRONG))
def test_what_cannot_be(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(BOS, EOS, PAD, **WRONG[message])

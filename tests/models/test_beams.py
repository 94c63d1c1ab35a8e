"""Beam search against one that is written out, and against all reports there are."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from slidevlm.batch import Bags
from slidevlm.models import CoCa, build_model, zoo
from slidevlm.models.decoding import Decoding
from slidevlm.models.generate import draft

BOS, EOS, PAD = 1, 2, 0
LENGTHS = (7, 1, 30)
NAMES = ("a", "b", "c")
Text = tuple[int, ...]


def model_for(seed: int, vocabulary: int, *, gist: bool = False, end: float = 1.0) -> CoCa:
    torch.manual_seed(seed)
    tiny = zoo.load("coca_tiny")
    decoder = replace(tiny.decoder, gist=gist, words=1.0 if gist else 0.0)
    model = build_model(replace(tiny, tile_width=12, decoder=decoder), vocabulary).eval()
    if gist:
        model.prior.set_table(torch.randn(vocabulary, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.decoder.vocabulary.weight[EOS] *= end
    return model


def bags_for() -> Bags:
    generator = torch.Generator().manual_seed(1)
    return Bags(torch.randn(sum(LENGTHS), 12, generator=generator), LENGTHS)


def bag_of(i: int) -> Bags:
    start = sum(LENGTHS[:i])
    return Bags(bags_for().features[start : start + LENGTHS[i]], (LENGTHS[i],))


def slow_next(model: CoCa, bag: Bags, text: Text, written: int, d: Decoding) -> list[float]:
    """Log-probabilities of the next token, from the whole model anew."""
    tokens = torch.tensor([[BOS, *text, EOS]])
    with torch.no_grad():
        logits = model(bag, tokens, tokens >= 0).logits[0, -1].double().tolist()
    for token in set(text):
        p = d.repetition_penalty
        logits[token] = logits[token] / p if logits[token] > 0 else logits[token] * p
    n = d.no_repeat_ngram
    had = {text[i : i + n] for i in range(len(text) - n + 1)} if n else set()
    for token in range(len(logits)):
        if n and (*text[len(text) - n + 1 :], token) in had:
            logits[token] = float("-inf")
    for token in (BOS, PAD, *((EOS,) if written < d.min_tokens else ())):
        logits[token] = float("-inf")
    return torch.tensor(logits).log_softmax(0).tolist()


def slow_search(model: CoCa, bag: Bags, d: Decoding, prompt: Text) -> list[tuple[Text, float]]:
    """The search as its module describes it, beam by beam; (text without prompt, score)."""
    k = d.beams // d.groups
    groups: list[list[tuple[Text, float]]] = [[((), 0.0)] for _ in range(d.groups)]
    reports: list[list[tuple[Text, float]]] = [[] for _ in range(d.groups)]
    done = [False] * d.groups
    for step in range(d.max_tokens):
        taken: Counter[int] = Counter()
        for g in (g for g in range(d.groups) if not done[g]):
            candidates = []
            for text, likely in groups[g]:
                following = slow_next(model, bag, prompt + text, step, d)
                for token, log in enumerate(following):
                    if log > float("-inf"):
                        wanted = likely + log - d.diversity * taken[token]
                        candidates.append((wanted, likely + log, text, token))
            candidates.sort(key=lambda c: -c[0])
            groups[g] = []
            for rank, (_, likely, text, token) in enumerate(candidates[: 2 * k]):
                if token == EOS and rank < k:
                    score = likely / (len(text) + 1) ** d.length_penalty
                    reports[g] = sorted([*reports[g], (text, score)], key=lambda r: -r[1])[:k]
                elif token != EOS and len(groups[g]) < k:
                    groups[g].append(((*text, token), likely))
            taken.update(text[-1] for text, _ in groups[g])
        for g in range(d.groups):
            live = [likely / (step + 1) ** d.length_penalty for _, likely in groups[g]]
            if len(reports[g]) == k and max(live, default=float("-inf")) <= reports[g][-1][1]:
                done[g] = True
        if all(done):
            break
    for g in (g for g in range(d.groups) if not done[g]):
        cut = [(text, likely / d.max_tokens**d.length_penalty) for text, likely in groups[g]]
        reports[g] = sorted([*reports[g], *cut], key=lambda r: -r[1])[:k]
    found: dict[Text, float] = {}
    for text, score in itertools.chain(*reports):
        found[text] = max(score, found.get(text, float("-inf")))
    return sorted(found.items(), key=lambda r: -r[1])[: d.best]


CASES: list[dict[str, Any]] = [
    {"beams": 4},
    {"beams": 6, "groups": 3},
    {"beams": 6, "groups": 3, "diversity": 2.0, "best": 6},
    {"beams": 4, "groups": 4, "best": 3, "length_penalty": 0.0},
    {"beams": 3, "best": 3, "length_penalty": 2.0, "repetition_penalty": 1.5},
    {"beams": 6, "groups": 2, "no_repeat_ngram": 2, "min_tokens": 5, "best": 2},
]


@pytest.mark.parametrize("prompt", [(), (5, 9, 5)])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_beams_equal_those_written_out(case: int, prompt: Text) -> None:
    model = model_for(case, 30, gist=case % 2 == 1, end=1.7)
    decoding = Decoding(BOS, EOS, PAD, max_tokens=9, **CASES[case])
    found = draft(model, bags_for(), NAMES, decoding, prompt)
    for i, drafts in enumerate(found):
        expected = slow_search(model, bag_of(i), decoding, prompt)
        assert [d.tokens for d in drafts] == [text for text, _ in expected]
        scores = [score for _, score in expected]
        assert [d.score for d in drafts] == pytest.approx(scores, abs=1e-4)


def test_the_cases_show_ends_and_cuts_and_early_leaving() -> None:
    """Otherwise the comparison above would say little."""
    ended = cut = 0
    for case, settings in enumerate(CASES):
        model = model_for(case, 30, gist=case % 2 == 1, end=1.7)
        decoding = Decoding(BOS, EOS, PAD, max_tokens=9, **settings)
        for drafts in draft(model, bags_for(), NAMES, decoding):
            ended += sum(d.ended for d in drafts)
            cut += sum(not d.ended for d in drafts)
    assert ended > 5 and cut > 5


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beams_find_the_best_of_all_reports(seed: int, penalty: float) -> None:
    """Of 2 words and EOS, at most 4 tokens: 31 reports."""
    model, limit = model_for(seed, 5), 4
    decoding = Decoding(BOS, EOS, PAD, limit, beams=31, length_penalty=penalty, best=31)
    found = draft(model, bags_for(), NAMES, decoding)
    for i, drafts in enumerate(found):
        expected = []
        for length in range(limit + 1):
            for text in itertools.product((3, 4), repeat=length):
                likely = 0.0
                end = (EOS,) if length < limit else ()
                for place, token in enumerate((*text, *end)):
                    likely += slow_next(model, bag_of(i), text[:place], place, decoding)[token]
                expected.append((text, likely / (length + len(end)) ** penalty))
        expected.sort(key=lambda r: -r[1])
        assert len(expected) == 31
        assert [d.tokens for d in drafts] == [text for text, _ in expected]
        assert [d.score for d in drafts] == pytest.approx([s for _, s in expected], abs=1e-5)


def test_diversity_sets_groups_apart() -> None:
    """The first tokens of groups of one beam are all different when staying together is dear."""
    model = model_for(3, 30)
    firsts = {}
    for diversity in (1e-6, 100.0):
        decoding = Decoding(
            BOS, EOS, PAD, 4, min_tokens=4, beams=5, groups=5, diversity=diversity, best=5
        )
        drafts = draft(model, bags_for(), NAMES, decoding)[0]
        firsts[diversity] = {d.tokens[0] for d in drafts}
    assert len(firsts[1e-6]) == 1 and len(firsts[100.0]) == 5

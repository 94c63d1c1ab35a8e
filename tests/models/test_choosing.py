"""Choosing among drafts, against a reference that counts pair by pair."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest
import torch

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, LanguageModel, build_model, zoo
from slidevlm.models.choosing import agreement, standardised
from slidevlm.models.generate import Decoding, Draft, draft, generate

BOS, EOS, PAD = 1, 2, 0
LENGTHS = (7, 1, 30, 3, 12)
NAMES = tuple(f"s{i}" for i in range(5))
DRAWS = Decoding(BOS, EOS, PAD, max_tokens=12, top_k=4, candidates=6, seed=3)
WAYS = ("likelihood", "consensus", "similarity", "both")


@pytest.fixture(scope="module")
def model() -> CoCa:
    torch.manual_seed(4)
    made = build_model(replace(zoo.load("coca_tiny"), tile_width=12), vocab_size=12).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.decoder.vocabulary.weight[EOS] *= 1.5  # so that some end early
    return made


@pytest.fixture(scope="module")
def bags() -> Bags:
    return Bags(torch.randn(sum(LENGTHS), 12, generator=torch.Generator().manual_seed(1)), LENGTHS)


def words(tokens: Sequence[int]) -> list[str]:
    """Half as many words as tokens: what tokens have in common, words need not have."""
    return ["+".join(map(str, tokens[i : i + 2])) for i in range(0, len(tokens), 2)]


def alike(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Mean F score of one's runs of 1 to 4 words against the other's, recall 0.85."""
    total = 0.0
    for order in (1, 2, 3, 4):
        ours, theirs = (
            Counter(tuple(t[i : i + order]) for i in range(len(t) - order + 1))
            for t in (one, other)
        )
        shared = (ours & theirs).total()
        if shared:
            precision, recall = shared / ours.total(), shared / theirs.total()
            total += precision * recall / (0.85 * precision + 0.15 * recall)
    return total / 4


def test_agreement_equals_counting_pair_by_pair() -> None:
    drawn = random.Random(0)
    texts = [[drawn.randrange(5) for _ in range(n)] for n in (0, 1, 3, 9, 9, 14)]
    times = [1, 2, 1, 1, 3, 1]
    all_texts = [text for text, n in zip(texts, times, strict=True) for _ in range(n)]
    expected = []
    for text in texts:
        others = list(all_texts)
        others.remove(text)
        expected.append(sum(alike(text, other) for other in others) / len(others))
    assert agreement(texts, times) == pytest.approx(expected, abs=1e-12)
    assert agreement([[3, 4]], [1]) == [0.0], "there is nobody to agree with"
    assert agreement([["a", "b"], [], []], [1, 1, 1]) == [0.0] * 3, "no words, no agreement"


def all_drafts(model: CoCa, bags: Bags) -> list[list[Draft]]:
    return draft(model, bags, NAMES, replace(DRAWS, best=6, candidates=1))


def test_consensus_takes_the_draft_that_agrees_most(model: CoCa, bags: Bags) -> None:
    found = draft(model, bags, NAMES, replace(DRAWS, choose="consensus", best=2), words=words)
    differ = by_tokens = 0
    for (first, second), drafts in zip(found, all_drafts(model, bags), strict=True):
        texts = [d.tokens for d in drafts for _ in range(d.times)]
        assert len(texts) == 6, "every draw counts"
        said = {t: words(t) for t in texts}
        merits = {
            t: (sum(alike(said[t], said[u]) for u in texts) - alike(said[t], said[t])) / 5
            for t in said
        }
        best = sorted(merits.values(), reverse=True)
        for rank, one in enumerate((first, second)):
            assert one.merit == pytest.approx(best[rank], abs=1e-12)
            assert merits[one.tokens] == pytest.approx(one.merit, abs=1e-12)
        differ += first.tokens != drafts[0].tokens
        agree = agreement([d.tokens for d in drafts], [d.times for d in drafts])
        by_tokens += first.tokens != drafts[agree.index(max(agree))].tokens
    assert differ, "the most likely one is not always the one that agrees most"
    assert by_tokens, "nor is the one whose tokens agree most"


@pytest.mark.parametrize("choose", ["consensus", "both"])
def test_consensus_needs_words(model: CoCa, bags: Bags, choose: str) -> None:
    with pytest.raises(ConfigError, match=f"choose {choose} compares the words of reports; give"):
        draft(model, bags, NAMES, replace(DRAWS, choose=choose))


def test_similarity_takes_the_draft_nearest_to_the_slide(model: CoCa, bags: Bags) -> None:
    prompt = [5, 6]
    found = draft(model, bags, NAMES, replace(DRAWS, choose="similarity"), prompt)
    drafts = draft(model, bags, NAMES, replace(DRAWS, best=6, candidates=1), prompt)
    with torch.no_grad():
        image = model.encode_image(bags)
        for slide, (best,) in enumerate(found):
            rows = [torch.tensor([[BOS, *prompt, *d.tokens, EOS]]) for d in drafts[slide]]
            near = [float(model.encode_text(r, r >= 0)[0] @ image[slide]) for r in rows]
            assert best.merit == pytest.approx(max(near), abs=1e-5)
            assert best.tokens == drafts[slide][near.index(max(near))].tokens


def test_both_are_added_in_standard_deviations_similarity_by_half(model: CoCa, bags: Bags) -> None:
    everything = {
        choose: draft(model, bags, NAMES, replace(DRAWS, choose=choose, best=6), words=words)
        for choose in ("consensus", "similarity", "both")
    }
    for slide in range(len(NAMES)):
        total = dict.fromkeys((d.tokens for d in everything["both"][slide]), 0.0)
        for choose, weight in (("consensus", 1.0), ("similarity", 0.5)):
            drawn = [d for d in everything[choose][slide] for _ in range(d.times)]
            merits = [d.merit for d in drawn]
            mean, spread = statistics.fmean(merits), statistics.pstdev(merits)
            for d in everything[choose][slide]:
                total[d.tokens] += weight * (d.merit - mean) / spread
        found = [d.merit for d in everything["both"][slide]]
        assert found == pytest.approx(sorted(total.values(), reverse=True), abs=1e-4)
    assert standardised([0.5, 0.5], [1, 3]) == [0.0, 0.0]


@pytest.mark.parametrize("search", [{}, {"top_k": 1, "beams": 6, "groups": 3}])
@pytest.mark.parametrize("choose", WAYS)
def test_alone_and_in_a_batch_are_the_same(
    model: CoCa, bags: Bags, choose: str, search: dict[str, int]
) -> None:
    decoding = replace(DRAWS, choose=choose, **search)
    together, start = generate(model, bags, NAMES, decoding, words=words), 0
    for name, length, row in zip(NAMES, LENGTHS, together, strict=True):
        bag = Bags(bags.features[start : start + length], (length,))
        assert generate(model, bag, (name,), decoding, words=words) == [row]
        start += length


def test_likelihood_takes_the_highest_score(model: CoCa, bags: Bags) -> None:
    found = draft(model, bags, NAMES, DRAWS)
    expected = [drafts[:1] for drafts in all_drafts(model, bags)]
    assert [[d.tokens for d in row] for row in found] == [[d.tokens for d in r] for r in expected]
    assert all(d.merit is None for row in found for d in row)


def test_a_report_as_long_as_the_context_is_compared(model: CoCa, bags: Bags) -> None:
    decoding = replace(DRAWS, max_tokens=1000, min_tokens=1000, choose="similarity")
    found = draft(model, bags, NAMES, decoding)
    assert {len(drafts[0].tokens) for drafts in found} == {63}, "64 of context, BOS among them"


def test_a_language_model_has_no_slide_to_be_near_to(bags: Bags) -> None:
    torch.manual_seed(0)
    made = build_model(zoo.load("lm_tiny"), vocab_size=12).eval()
    assert isinstance(made, LanguageModel)
    assert len(generate(made, bags, NAMES, replace(DRAWS, choose="consensus"), words=words)) == 5
    for choose in ("similarity", "both"):
        with pytest.raises(ConfigError, match="a language model has not; choose by consensus"):
            generate(made, bags, NAMES, replace(DRAWS, choose=choose), words=words)

"""Generation with a cache against one that recomputes everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, create_model, zoo
from slidevlm.models.generate import Decoding, draft, generate

BOS, EOS, PAD = 1, 2, 0
LENGTHS = (7, 1, 30, 3, 12)
NAMES = tuple(f"s{i}" for i in range(5))


def model_for(seed: int = 0, spread: float = 0.3, *, gist: bool = False) -> CoCa:
    torch.manual_seed(seed)
    tiny = zoo.load("coca_tiny")
    decoder = replace(tiny.decoder, gist=gist, words=1.0 if gist else 0.0)
    model = build_model(replace(tiny, tile_width=12, decoder=decoder), vocab_size=40).eval()
    if gist:
        model.prior.set_table(torch.randn(40, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def bags_for(lengths: tuple[int, ...] = LENGTHS) -> Bags:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(sum(LENGTHS), 12, generator=generator)
    return Bags(features[: sum(lengths)], lengths)


def slow_greedy(model: CoCa, bags: Bags, steps: int) -> list[list[int]]:
    """One report at a time, the whole model again for every token."""
    rows, start = [], 0
    for length in bags.lengths:
        bag = Bags(bags.features[start : start + length], (length,))
        start += length
        row: list[int] = []
        for _ in range(steps):
            # A further token that nothing earlier sees, since logits leave out the last place.
            tokens = torch.tensor([[BOS, *row, EOS]])
            with torch.no_grad():
                logits = model(bag, tokens, tokens >= 0).logits[0, -1]
            logits[[BOS, PAD]] = float("-inf")
            token = int(logits.argmax())
            if token == EOS:
                break
            row.append(token)
        rows.append(row)
    return rows


@pytest.mark.parametrize("gist", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5])
def test_greedy_equals_recomputing_everything(seed: int, gist: bool) -> None:
    model = model_for(seed, gist=gist)
    with torch.no_grad():  # so that some reports end early and leave the batch
        model.decoder.vocabulary.weight[EOS] *= 1.5
    fast = generate(model, bags_for(), NAMES, Decoding(BOS, EOS, PAD, max_tokens=20))
    assert fast == slow_greedy(model, bags_for(), 20)
    assert any(fast), "something must be written"


@pytest.mark.parametrize("top_k", [1, 5])
def test_alone_and_in_a_batch_are_the_same(top_k: int) -> None:
    model, bags = model_for(), bags_for()
    decoding = Decoding(BOS, EOS, PAD, max_tokens=15, top_k=top_k, seed=3)
    together = generate(model, bags, NAMES, decoding)
    start = 0
    for name, length, row in zip(NAMES, LENGTHS, together, strict=True):
        bag = Bags(bags.features[start : start + length], (length,))
        assert generate(model, bag, (name,), decoding) == [row]
        start += length


def test_draws_are_seeded() -> None:
    model, bags = model_for(), bags_for()

    def reports(seed: int) -> list[list[int]]:
        return generate(model, bags, NAMES, Decoding(BOS, EOS, PAD, 15, top_k=10, seed=seed))

    state = torch.get_rng_state()
    assert reports(1) == reports(1)
    assert reports(1) != reports(2)
    assert torch.equal(state, torch.get_rng_state()), "training's random numbers are untouched"


def test_lengths_and_the_end_of_the_context() -> None:
    model = model_for()
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] = 0.0
        model.decoder.norm.bias.zero_()
    for limit in (1, 7):
        rows = generate(model, bags_for(), NAMES, Decoding(BOS, EOS, PAD, max_tokens=limit))
        assert max(len(row) for row in rows) <= limit
    rows = generate(model, bags_for(), NAMES, Decoding(BOS, EOS, PAD, max_tokens=10_000))
    assert max(len(row) for row in rows) <= 63, "64 tokens of context, BOS among them"


def test_a_prompt_is_continued() -> None:
    model, bags = model_for(), bags_for((7,))
    whole = generate(model, bags, ("s0",), Decoding(BOS, EOS, PAD, max_tokens=12))[0]
    rest = generate(model, bags, ("s0",), Decoding(BOS, EOS, PAD, max_tokens=8), whole[:4])[0]
    assert rest == whole[4:12]
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate(model, bags, ("s0",), Decoding(BOS, EOS, PAD), [3] * 63)


def test_training_mode_comes_back_also_after_an_error() -> None:
    model = model_for().train()
    generate(model, bags_for(), NAMES, Decoding(BOS, EOS, PAD, max_tokens=2))
    assert model.training
    bad = Bags(torch.zeros(3, 5), (3,))
    with pytest.raises(RuntimeError):
        generate(model, bad, ("x",), Decoding(BOS, EOS, PAD))
    assert model.training


def test_autocast_works() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate(model_for(), bags_for(), NAMES, Decoding(BOS, EOS, PAD, max_tokens=5))
    assert len(rows) == 5


def log_probability(model: CoCa, bags: Bags, row: list[int]) -> float:
    """Of the tokens of one report, read by the whole model at once."""
    tokens = torch.tensor([[BOS, *row, EOS]])
    with torch.no_grad():
        logits = model(bags, tokens, tokens >= 0).logits[0].double()
    logits[:, [BOS, PAD]] = float("-inf")
    return float(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[: len(row)].sum())


@pytest.mark.parametrize("how", ["plain", "bfloat16", "autocast", "compile"])
@pytest.mark.parametrize("search", [{}, {"top_k": 5}, {"beams": 4, "groups": 2}])
def test_scores_are_those_of_the_model(how: str, search: dict[str, int]) -> None:
    exact, bags = model_for(2), bags_for((7,))
    model, context = model_for(2), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    if how == "bfloat16":
        model = model.bfloat16()
        bags = Bags(bags.features.bfloat16(), bags.lengths)
    if how == "compile":
        model = torch.compile(model, backend="eager")
    with torch.no_grad():
        for each in (exact, model):
            each.decoder.vocabulary.weight[EOS] *= 1.5
    decoding = Decoding(BOS, EOS, PAD, max_tokens=40, length_penalty=0.5, **search)
    with context:
        found = draft(model, bags, ("s0",), decoding)[0][0]
    assert found.tokens
    row = [*found.tokens, *([EOS] if found.ended else [])]
    expected = log_probability(exact, bags_for((7,)), row) / len(row) ** 0.5
    rounding = 1e-4 if how in ("plain", "compile") else 0.15 * abs(expected)
    assert found.score == pytest.approx(expected, abs=rounding)


@pytest.mark.parametrize("search", [{"top_k": 5, "best": 3}, {"beams": 6, "groups": 3, "best": 4}])
def test_several_reports_of_a_slide(search: dict[str, int]) -> None:
    model, bags = model_for(4), bags_for()
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] *= 1.5
    decoding = Decoding(BOS, EOS, PAD, max_tokens=12, **search)
    found = draft(model, bags, NAMES, decoding)
    assert generate(model, bags, NAMES, decoding) == [list(d[0].tokens) for d in found]
    start = 0
    for name, length, drafts in zip(NAMES, LENGTHS, found, strict=True):
        assert 1 < len(drafts) <= decoding.best
        assert [d.score for d in drafts] == sorted((d.score for d in drafts), reverse=True)
        assert len({d.tokens for d in drafts}) == len(drafts), "each text once"
        bag = Bags(bags.features[start : start + length], (length,))
        alone = draft(model, bag, (name,), decoding)[0]
        assert [d.tokens for d in alone] == [d.tokens for d in drafts]
        start += length
    assert len({d.ended for drafts in found for d in drafts}) == 2, "some end, some are cut off"


def test_the_first_of_several_draws_is_the_one_of_one() -> None:
    model, bags = model_for(), bags_for()
    one = Decoding(BOS, EOS, PAD, 10, top_k=5)
    three = replace(one, best=3)
    for single, several in zip(
        draft(model, bags, NAMES, one), draft(model, bags, NAMES, three), strict=True
    ):
        assert single[0].tokens in [d.tokens for d in several]


def test_the_slide_is_kept_once_for_all_its_beams() -> None:
    """No copies of its keys and values: the decoder reads what the cache of one row a slide has."""
    model = model_for()
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] = -9 * torch.sign(model.decoder.norm.bias)
    seen = []
    cross = model.decoder.layers[0].cross
    cross.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), len(args[1]))))
    generate(model, bags_for(), NAMES, Decoding(BOS, EOS, PAD, 6, beams=6, groups=3))
    assert seen == [(5, 5)] + [(30, 5)] * 5


def test_finished_slides_leave_the_batch() -> None:
    model, bags = model_for(4), bags_for()
    with torch.no_grad():
        model.decoder.vocabulary.weight[EOS] *= 2
    seen: list[int] = []
    model.text.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for search in ({}, {"top_k": 9, "best": 2}, {"beams": 2}):
        seen.clear()
        generate(model, bags, NAMES, Decoding(BOS, EOS, PAD, 60, **search))
        each = search.get("best", search.get("beams", 1))
        sizes = sorted(set(seen[1:]), reverse=True)
        assert len(sizes) > 1 and all(size % each == 0 for size in sizes), seen
        assert seen[1:] == sorted(seen[1:], reverse=True)


def test_what_cannot_be() -> None:
    clip = create_model("clip_stage_1", tile_width=12, vocab_size=40)
    with pytest.raises(ConfigError, match="no decoder"):
        generate(clip, bags_for(), NAMES, Decoding(BOS, EOS, PAD))


def test_cost_of_a_token_is_one_pass_over_itself() -> None:
    """Each step sees one token: the past is never recomputed, the slide encoded once."""
    model = model_for()
    seen: list[int] = []
    model.text.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    slides: list[Tensor] = []
    model.slide.register_forward_hook(lambda _, __, out: slides.append(out))
    generate(model, bags_for(), NAMES, Decoding(BOS, EOS, PAD, max_tokens=10))
    assert set(seen) == {1} and len(seen) <= 10
    assert len(slides) == 1

"""The joint space of a model that starts from canonical correlations, against plain numpy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from slidevlm.app.aligning import _words, analyse
from slidevlm.batch import Bags
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.alignment import Aligned, Alignment, AlignmentConfig
from slidevlm.models.tile_rows import BYTES_AT_ONCE

WIDTH = 5
REPORTS = [
    "Adenocarcinoma of the colon, pT3. Margins FREE of tumour; free.",
    "COLON: adenocarcinoma (moderately differentiated), margins free.",
    "Clear-cell renal cell carcinoma of the kidney, grade 2/4.",
    "Kidney, renal cell carcinoma; clear cell type, no invasion.",
    "Glioblastoma of the brain.",
    "Brain: glioblastoma with necrosis, unseenword.",
    "Lung, lobectomy: squamous cell carcinoma. Margins free.",
    "Squamous carcinoma of the lung with necrosis.",
]
SMALL: dict[str, Any] = {"rank": 4, "words": 64, "random_features": 6, "most_reports": 0.6}


def words_of(text: str, shortest: int = 3) -> list[str]:
    return [w for w in re.findall(r"[a-z]+", text.lower()) if len(w) >= shortest]


def content(**alignment: Any) -> dict[str, Any]:
    made = zoo.load("coca_tiny").to_dict() | {"tile_width": WIDTH, "alignment": SMALL | alignment}
    made["text"]["prior_rank"] = 0
    return made


def model_for(tokenizer: Tokenizer, **alignment: Any) -> CoCa:
    torch.manual_seed(0)
    model = build_model(from_dict(content(**alignment), "here"), tokenizer.vocab_size)
    assert isinstance(model, CoCa) and model.alignment is not None
    model.alignment.set_pieces([tokenizer.piece(i) for i in range(tokenizer.vocab_size)])
    return model.eval()


def alignment_for(tokenizer: Tokenizer, **alignment: Any) -> Alignment:
    found = model_for(tokenizer, **alignment).alignment
    assert found is not None
    return found


def pair(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [tokenizer.encode(t, 64) for t in texts]
    length = max(map(len, rows))
    tokens = torch.tensor([r + [tokenizer.pad_id] * (length - len(r)) for r in rows])
    return tokens, tokens != tokenizer.pad_id


@pytest.mark.parametrize("vocabulary", [262, 290, 500])
def test_a_word_has_one_number_however_it_is_cut_and_written(vocabulary: int) -> None:
    """From bytes alone to whole words as tokens."""
    tokenizer = Tokenizer.train(REPORTS, vocabulary)
    alignment = alignment_for(tokenizer)
    texts = [*REPORTS, "glioblastoma", "GLIOBLASTOMA Brain (kidney)", "a an of", "12 34", ""]
    tokens, mask = pair(tokenizer, [t[:60] for t in texts])
    hashes, ends, _ = alignment.word_hashes(tokens, mask)
    number: dict[str, int] = {}
    for text, row, end in zip(texts, hashes, ends, strict=True):
        words, found = words_of(text[:60]), row[end].tolist()
        assert len(words) == len(found)
        for word, value in zip(words, found, strict=True):
            assert number.setdefault(word, value) == value, word
    assert len(set(number.values())) == len(number)


def test_numbers_do_not_depend_on_the_tokenizer() -> None:
    found = []
    for vocabulary in (262, 500):
        tokenizer = Tokenizer.train(REPORTS, vocabulary)
        hashes, _ = _words(alignment_for(tokenizer), tokenizer, REPORTS[0])
        found.append(hashes.tolist())
    assert found[0] == found[1] and len(found[0]) == len(words_of(REPORTS[0]))


def reference(config: AlignmentConfig, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical variates [n, r] of both sides, written as a whitened cross-covariance's SVD."""
    vocabulary = sorted({w for r in REPORTS for w in words_of(r)})
    counts = np.array([[words_of(r).count(w) for w in vocabulary] for r in REPORTS])
    frequency = (counts > 0).sum(0)
    counts = counts[:, frequency <= config.most_reports * len(REPORTS)]
    idf = np.log((1 + len(REPORTS)) / (1 + (counts > 0).sum(0))) + 1
    text = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    text = text - text.mean(0)
    split = x.shape[1] - config.random_features
    x = (x - x.mean(0)) / x.std(0)
    x = np.concatenate([x[:, :split] / split**0.5, x[:, split:] / config.random_features**0.5], 1)
    x /= 2**0.5

    def whitener(values: np.ndarray, penalty: float) -> np.ndarray:
        squares, vectors = np.linalg.eigh(values.T @ values)
        keep = penalty + squares > 1e-9
        scale = 1 / np.sqrt(squares[keep] + penalty)
        return (vectors[:, keep] * scale) @ vectors[:, keep].T

    images = x @ whitener(x, config.image_penalty)
    largest = np.linalg.eigvalsh(text.T @ text)[-1]
    texts = text @ whitener(text, config.text_penalty * largest)
    left, rho, right = np.linalg.svd(images.T @ texts)
    r = config.rank
    return images @ left[:, :r] * rho[:r] ** config.power, texts @ right[:r].T * rho[
        :r
    ] ** config.power


def found_for(tokenizer: Tokenizer, x: torch.Tensor, alignment: Alignment) -> Aligned:
    words = [_words(alignment, tokenizer, r) for r in REPORTS]
    return analyse(alignment.config, x, words, tokenizer.vocab_size)


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_space_is_that_of_regularised_canonical_correlation(power: float) -> None:
    tokenizer = Tokenizer.train(REPORTS, 300)
    model = model_for(tokenizer, power=power)
    alignment = model.alignment
    assert alignment is not None
    x = torch.randn(len(REPORTS), len(alignment.centre), dtype=torch.float64)
    alignment.set(found_for(tokenizer, x, alignment))
    images, texts = reference(alignment.config, x.numpy())
    seen = (x.float() - alignment.centre) @ alignment.directions
    tokens, mask = pair(tokenizer, REPORTS)
    read = alignment._known(tokens, mask)
    # Variates are unique up to signs: compare what does not change with them.
    for ours, theirs in ((seen, images), (read, texts)):
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-5)
    np.testing.assert_allclose(seen @ read.T, images @ texts.T, atol=2e-5)


def aligned_model() -> tuple[CoCa, Tokenizer]:
    tokenizer = Tokenizer.train(REPORTS, 300)
    model = model_for(tokenizer)
    assert model.alignment is not None
    x = torch.randn(len(REPORTS), len(model.alignment.centre), dtype=torch.float64)
    model.alignment.set(found_for(tokenizer, x, model.alignment))
    return model, tokenizer


def bags_of(*lengths: int) -> Bags:
    draw = torch.Generator().manual_seed(1)
    places = 1e4 * torch.rand(sum(lengths), 2, generator=draw)
    return Bags(torch.randn(sum(lengths), WIDTH, generator=draw), lengths, places, None, "um")


def test_training_starts_from_the_space_and_learns_beside_it() -> None:
    model, tokenizer = aligned_model()
    bags, (tokens, mask) = bags_of(4, 1, 7), pair(tokenizer, REPORTS[:3])
    before = model.encode_image(bags), model.encode_text(tokens, mask)
    assert all((e[:, 4:] == 0).all() for e in before)  # rank 4 of embed_dim 32
    trained = {n for n, p in model.named_parameters() if n.startswith("alignment.")}
    assert trained == {"alignment.image_gate", "alignment.text_gate"}
    output = model(bags, tokens, mask)
    (output.image_embedding @ output.text_embedding.T).diag().sum().backward()
    assert model.alignment is not None
    assert model.alignment.image_gate.grad.item() != 0
    assert model.alignment.text_gate.grad.item() != 0
    with torch.no_grad():
        model.alignment.image_gate.fill_(0.5)
        model.alignment.text_gate.fill_(0.5)
    after = model.encode_image(bags), model.encode_text(tokens, mask)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(before, after, strict=True))


def test_before_it_is_set_it_is_silent() -> None:
    tokenizer = Tokenizer.train(REPORTS, 300)
    model = model_for(tokenizer)
    plain = content()
    del plain["alignment"]
    other = build_model(from_dict(plain, "here"), tokenizer.vocab_size).eval()
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("alignment.")}
    other.load_state_dict(weights)
    bags, (tokens, mask) = bags_of(4, 1, 7), pair(tokenizer, REPORTS[:3])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(bags), other.encode_image(bags))
        # Nothing is known of words either: every report is at minus the centre, 0.
        torch.testing.assert_close(model.encode_text(tokens, mask), other.encode_text(tokens, mask))


def test_neither_batch_nor_padding_nor_pieces_change_an_embedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = aligned_model()
    bags, (tokens, mask) = bags_of(4, 1, 7), pair(tokenizer, REPORTS)
    with torch.no_grad():
        together, texts = model.encode_image(bags), model.encode_text(tokens, mask)
        monkeypatch.setitem(BYTES_AT_ONCE, "cpu", 3 * 4 * bags.features.shape[1])
        first = 0
        for number, length in enumerate(bags.lengths):
            rows = slice(first, first + length)
            assert bags.positions is not None
            one = Bags(bags.features[rows], (length,), bags.positions[rows], None, "um")
            torch.testing.assert_close(model.encode_image(one)[0], together[number])
            first += length
        for number, report in enumerate(REPORTS):
            alone = model.encode_text(*pair(tokenizer, [report]))
            torch.testing.assert_close(alone[0], texts[number], atol=1e-5, rtol=1e-4)


def test_random_features_are_means_over_tiles() -> None:
    model, _ = aligned_model()
    bags = bags_of(4, 3)
    assert model.alignment is not None
    found = model.alignment.statistics(bags.features, bags.lengths)
    weight, phase = model.alignment.frequencies.numpy(), model.alignment.phases.numpy()
    for row, bag in zip(found.numpy(), bags.features.split([4, 3]), strict=True):
        tiles = bag.numpy()
        centred = tiles - tiles.mean(1, keepdims=True)
        normal = centred / np.sqrt(tiles.var(1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(row[:WIDTH], tiles.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row[WIDTH : 2 * WIDTH], tiles.std(0), rtol=1e-4, atol=1e-5)
        expected = np.cos(normal @ weight + phase).mean(0)
        np.testing.assert_allclose(row[2 * WIDTH :], expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_dropped_in_training_alone() -> None:
    model, _ = aligned_model()
    bags = bags_of(4, 3)
    assert torch.equal(model.encode_image(bags), model.encode_image(bags))
    model.train()
    assert not torch.equal(model.encode_image(bags), model.encode_image(bags))


def test_words_of_an_embedding_are_those_that_go_with_it() -> None:
    model, tokenizer = aligned_model()
    assert model.alignment is not None
    tokens, mask = pair(tokenizer, ["glioblastoma"])
    with torch.no_grad():
        logits = model.alignment.words(model.encode_text(tokens, mask))[0]
    own = logits[tokens[0, 1:-1]].mean()
    assert own > logits[tokenizer.tokens("kidney")].mean()
    assert logits[tokenizer.eos_id] == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 33}, "rank of at most embed_dim"),
        ({"dropout": 1.0}, "alignment: dropout must be from 0 to below 1"),
        ({"image_penalty": 0}, "alignment.image_penalty must be above 0"),
        ({"components": 0}, "alignment.components must be at least 1"),
        ({"rnk": 3}, "rnk"),
    ],
)
def test_senseless_alignments_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_dict(content(**change), "here")


def test_an_alignment_stands_in_the_place_of_a_prior() -> None:
    both = content()
    both["text"]["prior_rank"] = 8
    with pytest.raises(ConfigError, match="in the place of a text prior"):
        from_dict(both, "here")
    config = from_dict(content(), "here")
    assert from_dict(config.to_dict(), "again") == config
    assert dataclasses.asdict(config.alignment)["rank"] == 4


def test_a_tokenizer_that_hides_where_words_begin_is_refused() -> None:
    alignment = alignment_for(Tokenizer.train(REPORTS, 300))
    with pytest.raises(ConfigError, match="do not tell where a word begins"):
        alignment.set_pieces(["colon"] * len(alignment.letters))

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.data.reports import normalise
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import CheckpointError, ConfigError

TEXTS = ["Invasive ductal carcinoma, grade 3.", "Benign tissue, no carcinoma."] * 5
TOKENIZER = Tokenizer.train(TEXTS, 400)


def test_special_tokens_are_distinct_and_frame_the_text():
    t = TOKENIZER
    ids = t.encode("carcinoma", 50)
    assert ids[0] == t.bos_id and ids[-1] == t.eos_id and t.pad_id not in ids
    assert len({t.pad_id, t.bos_id, t.eos_id}) == 3 and max(ids) < t.vocab_size <= 400
    assert len(ids) < 8, "words of the corpus are few tokens"
    assert t.encode("", 50) == [t.bos_id, t.eos_id]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, 10_000)) == normalise(text)


def test_words_like_special_tokens_are_plain_text():
    for tokenizer in (
        TOKENIZER,
        Tokenizer.from_json(TOKENIZER.to_json()),
        pickle.loads(pickle.dumps(TOKENIZER)),
    ):
        text = "<eos> a <bos><pad>b"
        ids = tokenizer.encode(text, 99)
        assert ids.count(tokenizer.eos_id) == 1 and tokenizer.decode(ids) == text
        assert ids == TOKENIZER.encode(text, 99)


def test_a_first_word_is_the_token_it_is_within_a_text():
    t = Tokenizer.train(["a tumor, well differentiated. tumor well."] * 9, 400)
    (word,) = t.tokens("well")
    assert word in t.tokens("tumor well") and t.tokens(" well ") == [word]
    assert t.decode([word]) == "well" and t.piece(word) == " well"


def test_truncation():
    long = "carcinoma " * 5000  # 50,000 characters
    ids = TOKENIZER.encode(long, 16)
    assert len(ids) == 16 and ids[-1] == TOKENIZER.eos_id and TOKENIZER.is_truncated(long, 16)
    exact = TOKENIZER.encode("Benign tissue", 99)
    assert not TOKENIZER.is_truncated("Benign tissue", len(exact))
    assert TOKENIZER.is_truncated("Benign tissue", len(exact) - 1)
    assert TOKENIZER.encode("Benign tissue", len(exact)) == exact


def test_decoding_stops_at_the_end():
    t = TOKENIZER
    ids = [*t.encode("Benign", 9), *t.encode("carcinoma", 9), t.pad_id]
    assert t.decode(ids) == "Benign"
    assert t.decode([t.pad_id, t.bos_id, *t.encode("a  b", 9)[1:-1]]) == "a b"


def test_training_is_deterministic_and_checked():
    assert Tokenizer.train(TEXTS, 400).to_json() == TOKENIZER.to_json()
    with pytest.raises(ConfigError, match="vocabulary of 258 tokens; at least 259"):
        Tokenizer.train(TEXTS, 258)
    assert Tokenizer.train([], 300).encode("a", 9)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_json("{")

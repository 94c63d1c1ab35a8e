from __future__ import annotations

import ctypes
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from slidevlm.data.reports import normalise
from slidevlm.data.tokenizer import Tokenizer, sentence_ends
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


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        *((f"before_{number}", ctypes.c_size_t) for number in range(4)),
        ("mapped", ctypes.c_size_t),
        *((f"between_{number}", ctypes.c_size_t) for number in range(2)),
        ("in_arenas", ctypes.c_size_t),
        *((f"after_{number}", ctypes.c_size_t) for number in range(2)),
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc since 2.33")
def test_nothing_stays_of_a_tokenizer_that_is_gone():
    counts = ctypes.CDLL(None).mallinfo2
    counts.restype = MallocInfo
    random = np.random.default_rng(0)
    text = " ".join("".join(map(chr, word)) for word in random.integers(97, 123, (1000, 8)))
    content = Tokenizer.train([text], 300).to_json()
    in_use = []
    for _ in range(20):
        Tokenizer.from_json(content).tokens(text)
        found = counts()
        in_use.append(found.in_arenas + found.mapped)
    assert in_use[-1] - in_use[9] < 10 * 20_000  # with the words of each: ten times 300 kB


def test_training_is_deterministic_and_checked():
    assert Tokenizer.train(TEXTS, 400).to_json() == TOKENIZER.to_json()
    with pytest.raises(ConfigError, match="vocabulary of 258 tokens; at least 259"):
        Tokenizer.train(TEXTS, 258)
    assert Tokenizer.train([], 300).encode("a", 9)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_json("{")


# --- truncation at sentences ----------------------------------------------------------------


def test_long_reports_end_with_a_sentence():
    text = "Benign tissue. Invasive ductal carcinoma, grade 3. Benign tissue, no carcinoma."
    t = TOKENIZER
    length = len(t.tokens(text))
    two, one = (len(t.tokens(text[: text.index(end)])) + 1 for end in (". Benign", ". Inv"))
    assert 1 < one < two < length
    for room in range(two, length):
        kept = t.decode(t.encode(text, room + 2))
        if 2 * two >= room:
            assert kept == "Benign tissue. Invasive ductal carcinoma, grade 3."
        else:
            assert len(t.tokens(kept)) == room, "less than half would be left: cut at the token"
    assert t.decode(t.encode(text, length + 2)) == text
    for room in range(2 * one + 1, two):
        assert t.encode(text, room + 2)[1:-1] == t.tokens(text)[:room]
    assert t.decode(t.encode(text, one + 2)) == t.decode(t.encode(text, one + 3)) == text[:14]
    assert t.encode(text, 2) == [t.bos_id, t.eos_id]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?"]),
        ("Size 2.5 cm. Grade 3.", ["Size 2.5 cm.", " Grade 3."]),
        ("1. Breast, left. 2. Skin. B. Node", ["1. Breast, left.", " 2. Skin."]),
        ('He said "no tumour." (See note.) More', ['He said "no tumour."', " (See note.)"]),
        ("By Dr. Smith, approx. 3 cm, e.g. here. End", ["By Dr. Smith, approx. 3 cm, e.g. here."]),
        ("\u764c\u3002\u826f\u6027\u3002x", ["\u764c\u3002", "\u826f\u6027\u3002"]),
        ("no mark at all", []),
        ("", []),
    ],
)  # fmt: skip
def test_sentence_ends(text, sentences):
    ends = sentence_ends(text)
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == sentences


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab.\u00e9 12A\u764c\u3002(", max_size=60), room=st.integers(0, 30))
def test_what_is_kept_is_a_beginning_of_at_least_half(text, room):
    t = TOKENIZER
    ids, whole = t.encode(text, room + 2), t.tokens(text)
    assert ids[0] == t.bos_id and ids[-1] == t.eos_id
    kept = ids[1:-1]
    assert kept == whole[: len(kept)] and len(kept) <= room
    if len(whole) <= room:
        assert kept == whole and not t.is_truncated(text, room + 2)
    else:
        assert t.is_truncated(text, room + 2)
        assert 2 * len(kept) >= room
        if len(kept) < room:
            decoded = t.decode(ids)
            assert len(decoded) in sentence_ends(normalise(text)), decoded


# --- tokenizers of a folder -----------------------------------------------------------------


def gpt2_like(folder: Path) -> None:
    """Byte-level BPE; one token is BOS, EOS and unknown, none is PAD; padding switched on."""
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train(TEXTS, 350).to_json())
    content = json.loads(backend.to_str())
    text = json.dumps(content).replace("<eos>", "<|endoftext|>").replace("<bos>", "<x>")
    backend = tokenizers.Tokenizer.from_str(text.replace("<pad>", "<y>"))
    backend.enable_padding(length=64, pad_id=2, pad_token="<|endoftext|>")
    backend.enable_truncation(5)
    backend.save(str(folder / "tokenizer.json"))
    end = {"content": "<|endoftext|>", "lstrip": False, "__type": "AddedToken"}
    config = {"bos_token": end, "eos_token": end, "unk_token": end, "model_max_length": 1024}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def bert_like(folder: Path) -> None:
    """WordPiece in lower case, CLS and SEP from the older of the two files."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "invasive", "duct", "##al", "carcinoma", ".", ","]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def copies(tokenizer: Tokenizer) -> tuple[Tokenizer, ...]:
    """As it is, as a checkpoint has it, as a worker has it."""
    return (
        tokenizer,
        Tokenizer.from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
    )


def test_a_folder_like_gpt2(tmp_path, caplog):
    gpt2_like(tmp_path)
    with caplog.at_level(logging.INFO, "slidevlm.data"):
        made = Tokenizer.from_folder(tmp_path)
    assert "added <bos>, <pad> to the vocabulary" in caplog.text
    before = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    for t in copies(made):
        assert t.eos_id == 2 and {t.bos_id, t.pad_id} == {before, before + 1}
        assert t.vocab_size == before + 2
        text = "Invasive \u2603 <|endoftext|> <pad> carcinoma. Benign tissue."
        ids = t.encode(text, 200)
        assert ids[0] == t.bos_id and ids.index(t.eos_id) == len(ids) - 1, "the text is plain"
        assert len(ids) > 7 and t.pad_id not in ids, "neither its truncation nor its padding"
        assert t.decode(ids) == text
        assert t.decode(t.encode(text, len(ids) - 2)).endswith("carcinoma.")
        assert ids == made.encode(text, 200) and t.to_json() == made.to_json()


def test_a_folder_like_bert(tmp_path):
    bert_like(tmp_path)
    made = Tokenizer.from_folder(tmp_path)
    for t in copies(made):
        assert (t.pad_id, t.bos_id, t.eos_id, t.vocab_size) == (0, 2, 3, 10)
        assert t.encode("Invasive DUCTAL carcinoma, zz.", 50) == [2, 4, 5, 6, 7, 9, 1, 8, 3]
        assert t.decode([2, 4, 5, 6, 7, 9, 1, 8, 3]) == "invasive ductal carcinoma, [UNK]."
        assert t.encode("carcinoma. Invasive carcinoma. Ductal", 7) == [2, 7, 8, 4, 7, 8, 3]
        assert t.encode("carcinoma. Invasive carcinoma. Ductal", 6) == [2, 7, 8, 3]
        assert t.encode("[SEP] carcinoma", 50).count(3) == 1
    assert made.special.pad == "[PAD]"


def test_a_folder_without_names_gets_tokens_of_ours(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1, "<eos>": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<eos>", "bos_token": null}')
    t = Tokenizer.from_folder(tmp_path)
    assert (t.eos_id, t.vocab_size) == (2, 5) and {t.bos_id, t.pad_id} == {3, 4}
    assert t.encode("a b <eos>", 9)[:3] == [t.bos_id, 0, 1] and t.encode("a <eos>", 9)[-1] == 2
    assert t.encode("a <eos>", 9).count(2) == 1


def test_the_config_wins_over_the_older_file(tmp_path):
    bert_like(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "carcinoma"}')
    t = Tokenizer.from_folder(tmp_path)
    assert (t.pad_id, t.bos_id, t.eos_id) == (0, 2, 7)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(
        ConfigError,
        match=r"no tokenizer in .* wanted are tokenizer\.json .* and, .*_config\.json",
    ):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    bert_like(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be used"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizers.Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="cannot encode every text .*unknown token"):
        Tokenizer.from_folder(tmp_path)
    gaps = models.WordLevel({"a": 0, "?": 2}, unk_token="?")
    tokenizers.Tokenizer(gaps).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(ConfigError, match="its ids have gaps, so <eos>, <bos>, <pad> cannot be"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_json('{"special_tokens": {"pad": "a"}, "tokenizer": {}}')

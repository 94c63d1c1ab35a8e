"""BioGPT's tokenizer, and the older files of GPT-2 and BERT, against transformers' own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("sacremoses")

TEXTS = [
    "Invasive ductal carcinoma, grade 3. Size 2.5 cm.",
    "ER+/PR-, HER2 (3+); Ki-67 ~ 40% & p53 <wild-type> [see note] | \"quoted\" 'single'",
    "A well-differentiated, non-small-cell lung carcinoma; margins aren't involved.",
    "T2N1M0 caf\u00e9 \u2265 5\u00d710 mm \u2603",
    "x",
]


def biogpt_folder(folder: Path) -> Path:
    """Merges learnt by hand from some words, in fastBPE's form: a pair and its count a line."""
    words = ("invasive", "ductal", "carcinoma", "grade", "size", "lung", "margins", "the", "small")
    merges: list[tuple[str, str]] = []
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    letters = sorted({c for text in TEXTS[:3] for c in text if c.isalnum() or c in ".,;-&@'\"()+/"})
    for letter in letters:
        vocab.setdefault(letter, len(vocab))
        vocab.setdefault(letter + "</w>", len(vocab))
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            # One merge of a published checkpoint need not be in its vocabulary.
            if pieces[0] != "car":
                vocab.setdefault(pieces[0], len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = "".join(f"{a} {b} {9 - i % 9}\n" for i, (a, b) in enumerate(merges))
    (folder / "merges.txt").write_text(lines)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_biogpt_as_in_transformers(tmp_path: Path, text: str) -> None:
    folder = biogpt_folder(tmp_path)
    theirs = transformers.BioGptTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ours = Tokenizer.from_folder(folder)
    expected = theirs.convert_tokens_to_ids(theirs.tokenize(text))
    assert ours.tokens(text) == expected
    assert ours.encode(text, 500) == [0, *expected, 2]
    assert (ours.bos_id, ours.pad_id, ours.eos_id) == (0, 1, 2)
    known = [i for i in expected if i != 3]
    assert ours.decode([0, *known, 2, 5]) == theirs.convert_tokens_to_string(
        theirs.convert_ids_to_tokens(known)
    )


def test_biogpt_survives_a_checkpoint_and_a_worker(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(biogpt_folder(tmp_path))
    for copy in (Tokenizer.from_json(ours.to_json()), pickle.loads(pickle.dumps(ours))):
        assert copy.encode(TEXTS[1], 300) == ours.encode(TEXTS[1], 300)
        assert copy.vocab_size == ours.vocab_size
        assert copy.to_json() == ours.to_json()


def test_biogpt_cuts_after_a_sentence(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(biogpt_folder(tmp_path))
    text = "Invasive ductal carcinoma. The lung margins"
    whole = len(ours.tokens("Invasive ductal carcinoma."))
    assert ours.decode(ours.encode(text, whole + 4)) == "Invasive ductal carcinoma."
    escaped = "The non-small cell & the lung. In grade"  # Moses writes & as &amp;
    whole = len(ours.tokens("The non-small cell & the lung."))
    assert ours.encode(escaped, whole + 3)[1:-1] == ours.tokens("The non-small cell & the lung.")


def test_a_piece_keeps_its_space(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(biogpt_folder(tmp_path))
    pieces = [ours.piece(i) for i in ours.tokens("ductal carcinoma lung")]
    assert "".join(pieces) == "ductal carcinoma lung "


def test_biogpt_without_unknown_token(tmp_path: Path) -> None:
    folder = biogpt_folder(tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab["<unk>"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ConfigError, match="no token <unk>"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_files_as_in_transformers(tmp_path: Path, text: str) -> None:
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS * 3, 330, min_frequency=2, special_tokens=["<|endoftext|>"])
    made.save_model(str(tmp_path))
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.tokens(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text, 500)) == text
    assert len({ours.bos_id, ours.eos_id, ours.pad_id}) == 3
    assert ours.piece(ours.eos_id) == "<|endoftext|>"


@pytest.mark.parametrize("lower", [True, False])
def test_bert_vocabulary_as_in_transformers(tmp_path: Path, lower: bool) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] invasive Invasive duct ##al carcinoma , . ( ) 3 grade"
    (tmp_path / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": lower, "tokenizer_class": "BertTokenizer"})
    )
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer.from_folder(tmp_path)
    text = "Invasive ductal carcinoma (grade 3), caf\u00e9."
    assert ours.tokens(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 3, 0)

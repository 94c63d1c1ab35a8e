"""Embeddings of reports: tf-idf, and language models from folders in Hugging Face's form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import torch

from slidevlm.cli import main
from slidevlm.errors import ConfigError
from slidevlm.eval.text_metrics.embedders import embedder

TEXTS = ["lung , adenocarcinoma", "colon , adenoma", "lung", "no tumor seen in the lung biopsy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of random weights with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    place: Path = tmp_path_factory.mktemp("bert")
    words = sorted({w for text in TEXTS for w in text.split()})
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words) + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(place)
    return place


def alone(folder: Path, text: str) -> np.ndarray:
    """Mean of the last hidden states of one text, without padding."""
    import transformers

    model = transformers.BertModel.from_pretrained(folder).eval()
    words = transformers.BertTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        mean: np.ndarray = model(**words).last_hidden_state[0].mean(0).numpy()
    return mean


def test_states_of_a_folder_are_averaged_without_padding(folder: Path) -> None:
    found = embedder(str(folder), TEXTS)(TEXTS)
    for row, text in zip(found, TEXTS, strict=True):
        np.testing.assert_allclose(row, alone(folder, text), atol=1e-5)


def test_score_takes_a_folder(folder: Path, tmp_path: Path) -> None:
    ours, true = tmp_path / "ours.json", tmp_path / "true.json"
    ours.write_text(json.dumps(dict(zip("ab", TEXTS[:2], strict=True))))
    true.write_text(json.dumps(dict(zip("ab", TEXTS[2:], strict=True))))
    words = ["score", ours, true, "--embedder", folder, "--output", tmp_path / "scores.json"]
    assert main([str(w) for w in [*words, "--bootstraps", 0]]) == 0
    scores = {k: v["value"] for k, v in json.loads(words[-1].read_text())["scores"].items()}
    rows = [alone(folder, text) for text in TEXTS]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(rows, rows[2:])]  # noqa: B905
    assert scores["embedding_similarity"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert scores["reg2025"] > 0.3 * scores["embedding_similarity"]


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=f"--embedder {tmp_path} cannot be used"):
        embedder(str(tmp_path), TEXTS)
    with pytest.raises(ConfigError, match="is neither"):
        embedder(str(tmp_path / "no"), TEXTS)


def test_tfidf_knows_the_words_of_the_references() -> None:
    found = embedder("tfidf", TEXTS)(["lung biopsy", "lung", "kidney"])
    assert found[0] @ found[1] > 0 and not found[2].any()
    with pytest.raises(ConfigError, match="no words"):
        embedder("tfidf", ["", "."])


def gpt(place: Path) -> Path:
    """A tiny GPT-2 of 32 places, whose tokenizer pads with nothing, knows no limit and no BOS."""
    transformers = pytest.importorskip("transformers")
    words = sorted({w for text in TEXTS for w in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *words])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary), n_positions=32, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    transformers.GPT2Model(config).save_pretrained(place)
    return place


def test_a_tokenizer_without_padding_or_limit(tmp_path: Path) -> None:
    embed = embedder(str(gpt(tmp_path)), TEXTS)
    alone, together = embed(["lung"]), embed(["lung", "lung adenocarcinoma " * 40, ""])
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(together[1], embed(["lung adenocarcinoma " * 16])[0], atol=1e-5)
    assert not together[2].any() and not embed(["", ""]).any()


def test_a_damaged_model_and_one_of_another_kind(tmp_path: Path) -> None:
    place = gpt(tmp_path)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"--embedder {place} cannot be used"):
        embedder(str(place), TEXTS)
    transformers = pytest.importorskip("transformers")
    weights.unlink()
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5Model(config).save_pretrained(place)
    with pytest.raises(ConfigError, match="cannot embed a text .* give an encoder such as BERT"):
        embedder(str(place), TEXTS)(TEXTS)

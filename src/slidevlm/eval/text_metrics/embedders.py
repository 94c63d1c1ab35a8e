"""Embeddings of reports for REG2025's score: tf-idf, or a language model from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slidevlm.errors import ConfigError
from slidevlm.eval.text_metrics.scoring import Embed

TF_IDF = "tfidf"
_WORDS = 4096  # of the vocabulary, the most frequent ones
_TEXTS = 32  # embedded at a time
_TOKENS = 4096  # of a text at most, where neither tokenizer nor model has a limit


def embedder(name: str, references: Sequence[str]) -> Embed:
    """`tfidf`, fitted on the references, or the model of a folder in Hugging Face's form.

    Raises:
        ConfigError: the folder is none, or the package that reads it is not there.
    """
    return _tf_idf(references) if name == TF_IDF else _language_model(Path(name))


def _tf_idf(references: Sequence[str]) -> Embed:
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(max_features=_WORDS, sublinear_tf=True)
    try:
        words.fit(references)
    except ValueError as error:
        raise ConfigError(f"--embedder tfidf: the references have no words ({error})") from error
    return lambda texts: np.asarray(words.transform(texts).toarray())


def _language_model(folder: Path) -> Embed:
    """Mean of the last hidden states of a text's tokens; 0 where it has none."""
    if not folder.is_dir():
        raise ConfigError(f"--embedder is tfidf or a folder of a model, and {folder} is neither")
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "--embedder FOLDER needs the extra: pip install 'slidevlm[hf]'"
        ) from error
    try:
        # Where nothing is said of code in the folder, transformers asks whether to run it.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        model = AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        ).eval()
    # Besides its own errors transformers lets through those of safetensors and of the files.
    except Exception as error:
        raise ConfigError(f"--embedder {folder} cannot be used: {error}") from error
    if tokenizer.pad_token is None:  # as GPT-2's; what is padded does not count
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    places = getattr(model.config, "max_position_embeddings", None)
    longest = min(tokenizer.model_max_length, places or _TOKENS)

    def states(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        if not batch["input_ids"].shape[1]:
            return torch.zeros(len(texts), model.config.hidden_size)
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return ((hidden * mask).sum(1) / mask.sum(1).clamp_min(1)).float()

    def embed(texts: Sequence[str]) -> np.ndarray:
        try:
            with torch.inference_mode():
                parts = [
                    states(list(texts[start : start + _TEXTS]))
                    for start in range(0, len(texts), _TEXTS)
                ]
        # What a model of another kind makes of one text alone: T5 wants two.
        except Exception as error:
            raise ConfigError(
                f"--embedder {folder} cannot embed a text ({error}); give an encoder such as BERT"
            ) from error
        return np.asarray(torch.cat(parts).numpy())

    return embed

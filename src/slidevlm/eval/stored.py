"""Predictions on disk: scored again at any time, without the model.

One `.npz` file of plain arrays, read without unpickling: embeddings as float32, and a JSON text
(as bytes) of everything that is not a number.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.documents import is_file_name
from slidevlm.errors import DataError
from slidevlm.files import replacing

FILE = "predictions.npz"
_FORM = 1
_LISTS = ("specimen_ids", "patient_ids", "reports", "generated")
_ARRAYS = ("report_ids", "image_embedding", "text_embedding")


@dataclass(frozen=True)
class Stored:
    """What an evaluation needs of a model."""

    splits: dict[str, Predictions]  # those that are scored
    references: dict[str, Predictions]  # those that tasks learn from: few-shot examples, ...
    texts: tuple[str, ...]  # T prompts
    text_embeddings: np.ndarray  # [T, E] float32, L2-normalised
    about: dict[str, Any] = field(default_factory=dict)  # hashes, settings, versions

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [n, E] of prompts that are stored.

        Raises:
            DataError: one is not.
        """
        place = {text: i for i, text in enumerate(self.texts)}
        lacking = [text for text in texts if text not in place]
        if lacking:
            raise DataError(
                f"the stored predictions lack the embeddings of {len(lacking)} of {len(texts)} "
                f"prompts, such as {lacking[0]!r}; evaluate the run with these prompts"
            )
        return self.text_embeddings[[place[text] for text in texts]]


def save(stored: Stored, path: Path) -> None:
    """Write the file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {"text_embeddings": stored.text_embeddings}
    content: dict[str, Any] = {"form": _FORM, "about": stored.about, "texts": list(stored.texts)}
    for kind in ("splits", "references"):
        content[kind] = []
        for number, (name, split) in enumerate(getattr(stored, kind).items()):
            lists = {k: getattr(split, k) for k in _LISTS if getattr(split, k) is not None}
            numbers = {"logit_scale": split.logit_scale, "losses": split.losses}
            content[kind].append({"name": name, **lists, **numbers})
            for key in (k for k in _ARRAYS if getattr(split, k) is not None):
                arrays[f"{kind}/{number}/{key}"] = getattr(split, key)
    text = json.dumps(content, ensure_ascii=False).encode()
    arrays["content"] = np.frombuffer(text, np.uint8)
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Stored:
    """Read what `save` wrote.

    Raises:
        DataError: missing, damaged, or something else.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file")
        with np.load(path, allow_pickle=False) as file:
            content = json.loads(file["content"].tobytes())
            if content["form"] != _FORM:
                raise DataError(f"{path} has form {content['form']}, this version reads {_FORM}")
            splits, references = (
                {_split_name(one["name"]): _predictions(one, file, f"{kind}/{i}")
                 for i, one in enumerate(content[kind])}
                for kind in ("splits", "references")
            )  # fmt: skip
            texts = file["text_embeddings"]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and json each have errors of their own
        raise DataError(
            f"{path} cannot be read as stored predictions ({error}); `slidevlm evaluate RUN` "
            f"writes {FILE}"
        ) from error
    return Stored(splits, references, tuple(content["texts"]), texts, content["about"])


def _split_name(name: Any) -> str:
    """The name of a split, which files are called by."""
    if not is_file_name(name):
        raise ValueError(f"{name!r:.80} is no name of a split")
    return str(name)


def _predictions(one: dict[str, Any], file: Any, place: str) -> Predictions:
    lists = {k: tuple(one[k]) for k in _LISTS if k in one}
    arrays = {k: file[f"{place}/{k}"] for k in _ARRAYS if f"{place}/{k}" in file.files}
    losses = {k: float(v) for k, v in one["losses"].items()}
    empty = {"image_embedding": None, "text_embedding": None}
    found = Predictions(
        **{**empty, **lists, **arrays}, logit_scale=one["logit_scale"], losses=losses
    )
    if {len(v) for v in (*lists.values(), *arrays.values())} != {len(found)}:
        raise ValueError(f"{one['name']}: columns of different lengths")
    return found


def select(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """Some of the specimens; losses, which belong to the whole, are left out."""
    lists = {
        k: None if (v := getattr(predictions, k)) is None else tuple(v[i] for i in rows)
        for k in _LISTS
    }
    arrays = {k: None if (v := getattr(predictions, k)) is None else v[rows] for k in _ARRAYS}
    return Predictions(**lists, **arrays, logit_scale=predictions.logit_scale)  # type: ignore[arg-type]

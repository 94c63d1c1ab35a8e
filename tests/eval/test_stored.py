"""Stored predictions come back as they were, or an error says what is wrong."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.errors import DataError
from slidevlm.eval.stored import Stored, load, save, select


def split(n: int, seed: int, generated: bool = False) -> Predictions:
    random = np.random.default_rng(seed)
    names = tuple(f"s{i} \u00e4,\n" for i in range(n))
    return Predictions(
        names,
        tuple(f"p{i // 2}" for i in range(n)),
        tuple(f'report "{i}"' for i in range(n)),
        random.integers(-(2**62), 2**62, n),
        random.random((n, 3)).astype(np.float32),
        random.random((n, 3)).astype(np.float32),
        14.25,
        tuple("w" * i for i in range(n)) if generated else None,
        {"contrastive": 1.5, "caption": float("nan")},
    )


def same(a: Predictions, b: Predictions) -> None:
    for name in (f.name for f in fields(Predictions)):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        elif name == "losses":
            assert x == pytest.approx(y, nan_ok=True)
        else:
            assert x == y


def stored() -> Stored:
    texts = ("a", "b")
    return Stored(
        {"val": split(4, 0), "test": split(3, 1, generated=True)},
        {"train": split(5, 2)},
        texts,
        np.eye(2, 3, dtype=np.float32),
        {"model_hash": "x", "settings": {"seed": 1}},
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    save(stored(), tmp_path / "in" / "p.npz")
    found, expected = load(tmp_path / "in" / "p.npz"), stored()
    assert list(found.splits) == ["val", "test"] and list(found.references) == ["train"]
    for name, one in (expected.splits | expected.references).items():
        same((found.splits | found.references)[name], one)
    assert found.texts == expected.texts and found.about == expected.about
    np.testing.assert_array_equal(found.embed_text(["b", "a", "b"]), np.eye(2, 3)[[1, 0, 1]])
    with pytest.raises(DataError, match=r"lack the embeddings of 1 of 2 prompts, such as 'c'"):
        found.embed_text(["a", "c"])
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["p.npz"]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    np.savez(path, content=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read as stored predictions"):
        load(path)


@pytest.mark.parametrize("kind", ["absent", "text", "cut", "other", "column", "form"])
def test_what_is_no_such_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "p.npz"
    save(stored(), path)
    whole = path.read_bytes()
    if kind == "absent":
        path.unlink()
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "other":
        np.savez(path, a=np.zeros(3))
    else:
        with np.load(path) as file:
            arrays = dict(file)
        content = json.loads(arrays["content"].tobytes())
        if kind == "column":
            content["splits"][0]["reports"].pop()
        else:
            content["form"] = 99
        arrays["content"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
        np.savez(path, **arrays)
    message = "has form 99" if kind == "form" else "cannot be read as stored predictions"
    with pytest.raises(DataError, match=message) as raised:
        load(path)
    assert "pickle" not in str(raised.value), "no advice to load it all the same"


def test_some_rows() -> None:
    one = split(5, 0, generated=True)
    some = select(one, np.array([3, 1]))
    assert some.specimen_ids == (one.specimen_ids[3], one.specimen_ids[1])
    assert some.generated == ("www", "w") and some.losses == {} and some.logit_scale == 14.25
    np.testing.assert_array_equal(some.image_embedding, one.image_embedding[[3, 1]])

"""Prompt and label files with any content: the mapping that was written, or an error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.errors import DataError
from slidevlm.eval.prompts import Prompts, read_classes, read_labels, read_prompts

MANY = settings(max_examples=200, deadline=None)

words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=10)
prompts = words.filter(str.strip)
# White space around a name is harmless, so names that differ in it alone are one.
names = words.map(str.strip).filter(bool)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=8,
)


def written(factory: pytest.TempPathFactory, content: object, name: str = "m.json") -> object:
    path = factory.getbasetemp() / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@MANY
@given(mapping=st.dictionaries(names, st.one_of(prompts, st.lists(prompts, min_size=1)),
                               min_size=2, max_size=5))  # fmt: skip
def test_prompts_are_those_written(tmp_path_factory, mapping):
    if {"classes", "classnames", "templates"} & set(mapping) or set(mapping) == {"0"}:
        return
    found = read_prompts(written(tmp_path_factory, mapping))
    assert found.classes == tuple(sorted(mapping))
    for name, texts in zip(found.classes, found.texts, strict=True):
        value = mapping[name]
        assert list(texts) == ([value] if isinstance(value, str) else value)


@MANY
@given(labels=st.dictionaries(names, st.sampled_from(["a", "b"]), min_size=1, max_size=5))
def test_labels_are_those_written(tmp_path_factory, labels):
    two = Prompts(("a", "b"), (("x",), ("y",)))
    path = written(tmp_path_factory, labels)
    assert read_labels(path, two).classes == {s: (c,) for s, c in labels.items()}
    nested = written(tmp_path_factory, {"patient": labels})
    assert read_labels(nested, two).classes == {s: (c,) for s, c in labels.items()}
    with pytest.raises(DataError, match=r"m\.json: classes without a prompt"):
        read_labels(path, Prompts(("c", "d"), (("x",), ("y",))))


@settings(max_examples=300, deadline=None)
@given(content=st.one_of(anything, st.text(st.characters(exclude_categories=("Cs",)), max_size=80)))
def test_any_content_is_a_mapping_or_an_error(tmp_path_factory, content):
    path = written(tmp_path_factory, content)
    try:
        found = read_prompts(path)
    except DataError as error:
        assert "m.json" in str(error)
    else:
        assert len(found.classes) == len(found.texts) > 1 and all(found.texts)
    for name in ("m.json", "m.csv"):
        path = written(tmp_path_factory, content, name)
        try:
            labels = read_classes(path)
        except DataError as error:
            assert name in str(error)
        else:
            assert all(isinstance(k, str) and isinstance(v, str) for k, v in labels.items())

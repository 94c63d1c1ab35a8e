"""Model configurations: what is wrong in a file is named with its part before a model is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slidevlm.errors import ConfigError
from slidevlm.models import from_dict, zoo

Content = dict[str, Any]


def without(part: str | None, key: str) -> Callable[[Content], object]:
    return lambda c: (c if part is None else c[part]).pop(key)


def with_value(part: str | None, key: str, value: Any) -> Callable[[Content], object]:
    return lambda c: (c if part is None else c[part]).update({key: value})


CASES = {
    # unknown keys, at the top and in each part, with a guess at what was meant
    "top": (with_value(None, "embed_dimm", 8), "m.json: unknown key 'embed_dimm'; did you mean"),
    "slide": (with_value("slide", "latent", 8), "m.json: slide: unknown key 'latent'"),
    "text": (with_value("text", "widht", 8), "m.json: text: unknown key 'widht'; did you mean"),
    "decoder": (with_value("decoder", "layer", 1), "m.json: decoder: unknown key 'layer'"),
    "lora": (
        with_value(None, "lora", [{"part": "text", "targets": ["query"], "r": 4}]),
        "m.json: lora: unknown key 'r'",
    ),
    "other encoder's": (with_value("slide", "branches", 2), "slide: unknown key 'branches'"),
    "generation": (
        with_value(None, "generation", {"no_repeat_gram": 3}),
        "m.json: generation: unknown key 'no_repeat_gram'; did you mean",
    ),
    "generation's type": (
        with_value(None, "generation", {"top_p": "0.9"}),
        "m.json: generation: top_p must be a number, not '0.9'",
    ),
    "generation's sense": (
        with_value(None, "generation", {"candidates": 16}),
        "m.json: generation: greedy decoding writes one report, not the 16 candidates",
    ),
    # missing keys
    "no family": (without(None, "family"), "m.json: missing key 'family'"),
    "no text": (without(None, "text"), "m.json: missing key 'text'"),
    "no type": (without("slide", "type"), "m.json: slide: missing key 'type'"),
    "no slide": (without(None, "slide"), "a model of family coca needs a 'slide'"),
    "no decoder": (without(None, "decoder"), "a model of family coca needs a 'decoder'"),
    "no targets": (with_value(None, "lora", [{"part": "text"}]), "lora: missing key 'targets'"),
    # wrong types
    "text for a number": (
        with_value(None, "embed_dim", "64"),
        "m.json: embed_dim must be a whole number, 0 or more, not '64'",
    ),
    "a fraction": (with_value("text", "layers", 1.5), "text: layers must be a whole number"),
    "a truth for a number": (with_value("text", "layers", True), "text: layers must be a whole"),
    "below 0": (with_value("slide", "latents", -1), "slide: latents must be a whole number, 0"),
    "a number for a truth": (with_value("slide", "moments", 1), "moments must be true or false"),
    "text for a float": (with_value("slide", "dropout", "no"), "slide: dropout must be a number"),
    "a list for a part": (with_value(None, "text", [1]), "m.json: text must be a mapping"),
    "a number for text": (with_value("slide", "read", 3), "slide: read must be text, not 3"),
    "a mapping for a list": (with_value(None, "lora", {}), "m.json: lora must be a list, not {}"),
    "tile_width": (
        with_value(None, "tile_width", "wide"),
        "tile_width must be a number above 0 or",
    ),
    # unknown names
    "family": (with_value(None, "family", "cocoa"), "unknown family 'cocoa'"),
    # numbers that torch would stumble over later
    "dropout": (with_value("slide", "moments_dropout", 1.5), "slide: moments_dropout must be from"),
    "no number": (with_value("text", "dropout", float("nan")), "text: dropout must be a number"),
    "without end": (
        with_value("decoder", "words", float("inf")),
        "words must be a number, not inf",
    ),
    "no width": (with_value("slide", "width", 0), "slide: slide.width must be at least 1, not 0"),
    "no text width": (with_value("text", "width", 0), "text: text.width 0 does not divide"),
    "no heads": (with_value("text", "heads", 0), "text.width 32 does not divide by 0 heads"),
    "no embedding": (with_value(None, "embed_dim", 0), "m.json: embed_dim must be at least 1"),
    "no decoder heads": (
        with_value("decoder", "heads", 0),
        "does not divide by the 0 heads of the",
    ),
    "decoder heads": (with_value("decoder", "heads", 3), "text.width 32 does not divide by the 3"),
    "slide type": (with_value("slide", "type", "perciever"), "did you mean perceiver"),
    "decoder type": (with_value("decoder", "type", "gpt3"), "m.json: decoder: unknown"),
    "pooling": (with_value(None, "pooling", "max"), "m.json: unknown pooling 'max'"),
}


def content() -> Content:
    return zoo.load("coca_tiny").to_dict()


def test_the_content_without_a_fault_is_read() -> None:
    assert from_dict(content(), "m.json") == zoo.load("coca_tiny")


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str) -> None:
    change, message = CASES[case]
    wrong = content()
    change(wrong)
    with pytest.raises(ConfigError) as error:
        from_dict(wrong, "m.json")
    assert message in str(error.value) and str(error.value).startswith("m.json")


@pytest.mark.parametrize("name", zoo.names())
def test_every_part_of_every_model_refuses_a_key_it_does_not_know(name: str) -> None:
    for part in ("slide", "text", "decoder"):
        wrong = zoo.load(name).to_dict()
        if part in wrong:
            wrong[part]["surplus"] = 1
            with pytest.raises(ConfigError, match=f"{part}: unknown key 'surplus'"):
                from_dict(wrong, name)


def test_a_file_is_named(tmp_path: Path) -> None:
    wrong = content()
    del wrong["text"]["type"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match=r"mine\.json: text: missing key 'type'"):
        zoo.load(str(file))


def test_generation_is_kept_and_needs_a_decoder() -> None:
    content = zoo.load("coca_tiny").to_dict()
    assert "generation" not in content, "nothing recommended, nothing said"
    wanted = {"top_k": 0, "top_p": 0.9, "candidates": 4, "choose": "similarity"}
    config = from_dict({**content, "generation": wanted}, "m.json")
    assert config.to_dict()["generation"] == wanted
    assert from_dict(config.to_dict(), "again") == config
    clip = {**zoo.load("clip_small").to_dict(), "generation": wanted}
    with pytest.raises(ConfigError, match="m.json: a model of family clip writes no reports"):
        from_dict(clip, "m.json")
    language = {**zoo.load("lm_tiny").to_dict(), "generation": wanted}
    with pytest.raises(ConfigError, match="generation: choose similarity compares"):
        from_dict(language, "m.json")

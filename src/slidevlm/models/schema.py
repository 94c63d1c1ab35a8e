"""Model configurations: frozen dataclasses, and a strict reader for them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from slidevlm.errors import ConfigError
from slidevlm.models.lora import LoRAConfig
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.models.text import DecoderConfig, TextConfig
from slidevlm.registry import unknown

T = TypeVar("T")
FAMILIES = ("coca", "clip")
POOLINGS = ("attentional", "cls", "none")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `slide` is the encoder's own dataclass, chosen by `slide_type`."""

    family: str  # coca: contrastive and captioning; clip: contrastive
    slide_type: str
    slide: Any
    text: TextConfig
    decoder: DecoderConfig | None
    embed_dim: int = 256
    tile_width: int | None = None  # None ("auto" in the file): taken from the data
    # How the slide encoder's tokens become the slide's embedding: a learned query attends to all
    # (attentional); token 0, projected (cls); token 0 as it is (none). In the last two the decoder
    # reads the other tokens.
    pooling: str = "attentional"
    lora: tuple[LoRAConfig, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The form of the JSON files; `from_dict` reads it back."""
        content = {
            "family": self.family,
            "embed_dim": self.embed_dim,
            "tile_width": self.tile_width or "auto",
            "pooling": self.pooling,
            "slide": {"type": self.slide_type, **asdict(self.slide)},
            "text": {"type": "scratch", **asdict(self.text)},
        }
        if self.decoder is not None:
            content["decoder"] = asdict(self.decoder)
        if self.lora:
            content["lora"] = [asdict(entry) for entry in self.lora]
        return content


@dataclass(frozen=True)
class _File:
    family: str
    slide: Mapping[str, Any]
    text: Mapping[str, Any]
    decoder: Mapping[str, Any] | None = None
    embed_dim: int = 256
    tile_width: Any = "auto"
    pooling: str = "attentional"
    lora: list[Any] = field(default_factory=list)
    description: str = field(default="")


def from_dict(content: Any, where: str) -> ModelConfig:
    """Read the form of the JSON files.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type; named with `where`.
    """
    top = build(_File, content, where)
    if top.family not in FAMILIES:
        raise ConfigError(f"{where}: {unknown('family', top.family, FAMILIES)}")
    if (top.decoder is None) != (top.family == "clip"):
        need = "has no" if top.family == "clip" else "needs a"
        raise ConfigError(f"{where}: a {top.family} model {need} 'decoder'")
    if top.tile_width != "auto" and not (isinstance(top.tile_width, int) and top.tile_width > 0):
        raise ConfigError(f'{where}: tile_width must be a number above 0 or "auto"')
    if top.pooling not in POOLINGS:
        raise ConfigError(f"{where}: {unknown('pooling', top.pooling, POOLINGS)}")
    slide = dict(top.slide)
    slide_type = _type_of(slide, f"{where}: slide")
    text = dict(top.text)
    if _type_of(text, f"{where}: text") != "scratch":
        raise ConfigError(f"{where}: {unknown('text type', str(top.text['type']), ['scratch'])}")
    decoder = top.decoder
    if decoder and decoder.get("words") and not text.get("prior_rank"):
        raise ConfigError(f"{where}: decoder.words needs a text prior; set text.prior_rank above 0")
    return ModelConfig(
        family=top.family,
        slide_type=slide_type,
        slide=build(SLIDE_ENCODERS[slide_type].Config, slide, f"{where}: slide"),
        text=build(TextConfig, text, f"{where}: text"),
        decoder=None if decoder is None else build(DecoderConfig, decoder, f"{where}: decoder"),
        embed_dim=top.embed_dim,
        tile_width=None if top.tile_width == "auto" else top.tile_width,
        pooling=top.pooling,
        lora=tuple(build(LoRAConfig, entry, f"{where}: lora") for entry in top.lora),
    )


def _type_of(section: dict[str, Any], where: str) -> str:
    if "type" not in section:
        raise ConfigError(f"{where}: missing key 'type'")
    return str(section.pop("type"))


def build(cls: type[T], content: Any, where: str) -> T:
    """Build a dataclass from a mapping; every key and type is checked."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: must be a mapping, not {type(content).__name__}")
    assert dataclasses.is_dataclass(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{where}: {unknown('key', str(key), known)}")
        if not _fits(hints[key], value):
            raise ConfigError(f"{where}: {key} must be {_word(hints[key])}, not {value!r}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{where}: missing key {name!r}")
    return typing.cast(T, cls(**content))


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(h, value) for h in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, origin)


def _word(hint: Any) -> str:
    return {
        int: "a whole number, 0 or more",
        float: "a number",
        str: "text",
        bool: "true or false",
    }.get(hint, "a list" if typing.get_origin(hint) is list else "a mapping")

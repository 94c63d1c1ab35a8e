"""Model configurations: frozen dataclasses, and a strict reader for them."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from slidevlm.errors import ConfigError
from slidevlm.models.alignment import AlignmentConfig
from slidevlm.models.decoding import Decoding
from slidevlm.models.generation import GenerationConfig
from slidevlm.models.lora import LoRAConfig
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.models.text import DECODERS, TEXT_ENCODERS
from slidevlm.registry import Registry, unknown

T = TypeVar("T")
# coca: contrastive and captioning; clip: contrastive; lm: the report alone, without its slide
FAMILIES = ("coca", "clip", "lm")
POOLINGS = ("attentional", "cls", "none")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. Each part is its own dataclass, chosen by the part's type."""

    family: str
    slide_type: str | None  # None in the family lm, which has no slide encoder
    slide: Any
    text: Any
    decoder: Any  # None in the family clip
    text_type: str = "scratch"
    decoder_type: str = "scratch"
    embed_dim: int = 256
    project_text: bool = True  # the text's embedding is projected to embed_dim
    tile_width: int | None = None  # None ("auto" in the file): taken from the data
    # How the slide encoder's tokens become the slide's embedding: a learned query attends to all
    # (attentional); token 0, projected (cls); token 0 as it is (none). In the last two the decoder
    # reads the other tokens.
    pooling: str = "attentional"
    lora: tuple[LoRAConfig, ...] = ()
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def to_dict(self) -> dict[str, Any]:
        """The form of the JSON files; `from_dict` reads it back."""
        content: dict[str, Any] = {
            "family": self.family,
            "embed_dim": self.embed_dim,
            "project_text": self.project_text,
            "tile_width": self.tile_width or "auto",
            "pooling": self.pooling,
        }
        if self.slide_type is not None:
            content["slide"] = {"type": self.slide_type, **asdict(self.slide)}
        content["text"] = {"type": self.text_type, **asdict(self.text)}
        if self.text_type == "hf":
            content["text"]["type"] = f"hf:{content['text'].pop('source')}"
        if self.decoder is not None:
            content["decoder"] = {"type": self.decoder_type, **asdict(self.decoder)}
        if self.lora:
            content["lora"] = [asdict(entry) for entry in self.lora]
        if self.alignment.rank:
            content["alignment"] = asdict(self.alignment)
        if self.generation.changed:
            content["generation"] = self.generation.changed
        return content


@dataclass(frozen=True)
class _File:
    family: str
    text: Mapping[str, Any]
    slide: Mapping[str, Any] | None = None
    decoder: Mapping[str, Any] | None = None
    embed_dim: int = 256
    project_text: bool = True
    tile_width: Any = "auto"
    pooling: str = "attentional"
    lora: list[Any] = field(default_factory=list)
    alignment: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    description: str = field(default="")


def from_dict(content: Any, where: str) -> ModelConfig:
    """Read the form of the JSON files.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type; named with `where`.
    """
    top = build(_File, content, where)
    if top.family not in FAMILIES:
        raise ConfigError(f"{where}: {unknown('family', top.family, FAMILIES)}")
    for part, absent in (("slide", "lm"), ("decoder", "clip")):
        if (getattr(top, part) is None) != (top.family == absent):
            need = "has no" if top.family == absent else "needs a"
            raise ConfigError(f"{where}: a model of family {top.family} {need} {part!r}")
    if top.tile_width != "auto" and not (isinstance(top.tile_width, int) and top.tile_width > 0):
        raise ConfigError(f'{where}: tile_width must be a number above 0 or "auto"')
    if top.embed_dim < 1:
        raise ConfigError(f"{where}: embed_dim must be at least 1, not {top.embed_dim}")
    if top.pooling not in POOLINGS:
        raise ConfigError(f"{where}: {unknown('pooling', top.pooling, POOLINGS)}")
    slide_type, slide = _part(SLIDE_ENCODERS, top.slide, f"{where}: slide")
    text_type, text = _part(TEXT_ENCODERS, top.text, f"{where}: text")
    decoder_type, decoder = _part(DECODERS, top.decoder, f"{where}: decoder", "scratch")
    config = ModelConfig(
        family=top.family,
        slide_type=slide_type,
        slide=slide,
        text=text,
        decoder=decoder,
        text_type=str(text_type),
        decoder_type=decoder_type or "scratch",
        embed_dim=top.embed_dim,
        project_text=top.project_text,
        tile_width=None if top.tile_width == "auto" else top.tile_width,
        pooling=top.pooling,
        lora=tuple(build(LoRAConfig, entry, f"{where}: lora") for entry in top.lora),
        alignment=build(AlignmentConfig, top.alignment, f"{where}: alignment"),
        generation=build(GenerationConfig, top.generation, f"{where}: generation"),
    )
    _check(config, where)
    return config


def _check(config: ModelConfig, where: str) -> None:
    """What the parts ask of each other."""
    decoder, text, rank = config.decoder, config.text, config.alignment.rank
    if decoder is not None:
        if not TEXT_ENCODERS[config.text_type].causal:
            raise ConfigError(
                f"{where}: no decoder can stand on a text tower of type {config.text_type}, whose "
                "states know the words to come; make it a clip model, or take another text type"
            )
        if decoder.heads < 1 or text.width % decoder.heads:
            raise ConfigError(
                f"{where}: text.width {text.width} does not divide by the {decoder.heads} heads of "
                "the decoder"
            )
        if decoder.words and not (text.prior_rank or rank):
            raise ConfigError(
                f"{where}: decoder.words needs a text prior; set text.prior_rank or "
                "alignment.rank above 0"
            )
    if rank and (text.prior_rank or config.family == "lm" or rank > config.embed_dim):
        raise ConfigError(
            f"{where}: an alignment stands in the place of a text prior (set text.prior_rank to "
            "0), in a model of family coca or clip, with a rank of at most embed_dim "
            f"({config.embed_dim}), not {rank}"
        )
    if config.family == "lm" and (text.prior_rank or decoder.gist or decoder.words):
        raise ConfigError(
            f"{where}: text.prior_rank, decoder.gist and decoder.words are about the slide's "
            "embedding, which a model of family lm has not"
        )
    if config.family != "lm" and not config.project_text and config.text_type != "hf":
        _same_width(text.width, config.embed_dim, where)
    _check_generation(config, where)


def _check_generation(config: ModelConfig, where: str) -> None:
    if config.decoder is None and config.generation.changed:
        raise ConfigError(
            f"{where}: a model of family clip writes no reports: leave out generation"
        )
    choose = config.generation.choose
    if config.family == "lm" and choose in ("similarity", "both"):
        raise ConfigError(
            f"{where}: generation: choose {choose} compares reports with the slide's embedding, "
            "which a model of family lm has not"
        )
    try:
        Decoding(1, 2, 0, **config.generation.settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: generation: {error}") from None


def _same_width(width: int, embed_dim: int, where: str) -> None:
    if width != embed_dim:
        raise ConfigError(
            f"{where}: without project_text the text's width {width} must be embed_dim {embed_dim}"
        )


def _part(
    known: Registry[Any], content: Mapping[str, Any] | None, where: str, default: str | None = None
) -> tuple[str | None, Any]:
    """Type and configuration of a part; None and None where there is none."""
    if content is None:
        return None, None
    section = dict(content)
    kind = default if default is not None and "type" not in section else _type_of(section, where)
    kind, _, source = kind.partition(":")
    if source and kind == "hf":
        section["source"] = source
    elif source:
        kind = f"{kind}:{source}"
    if kind not in known:
        raise ConfigError(f"{where}: {unknown(known.kind, kind, list(known))}")
    return kind, build(known[kind].Config, section, where)


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
        if key.endswith("dropout") and not 0 <= value < 1:
            raise ConfigError(f"{where}: {key} must be from 0 to below 1, not {value!r}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{where}: missing key {name!r}")
    try:
        return typing.cast(T, cls(**content))
    except ConfigError as error:  # what a part asks of its own values
        raise ConfigError(f"{where}: {error}") from None


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(h, value) for h in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    if origin is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) < math.inf
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

"""The published language models that a model configuration starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from slidevlm import hub
from slidevlm.models.files import read_weights
from slidevlm.models.schema import ModelConfig
from slidevlm.models.text.gpt import (
    Family,
    GptConfig,
    GptDecoder,
    GptDecoderConfig,
    GptTower,
    check_source,
    load_decoder,
    load_tower,
    our_names,
)
from slidevlm.models.text.huggingface import (
    HuggingFaceConfig,
    HuggingFaceTower,
    published_state,
    text_architecture,
)

log = logging.getLogger("slidevlm.models")

OPENAI_CLIP = "openai/clip-vit-base-patch32"


def resolve(config: ModelConfig) -> ModelConfig:
    """The configuration with what only a published model's folder tells: an hf tower's shape.

    Raises:
        ConfigError: the folder is missing.
    """
    text = config.text
    if not isinstance(text, HuggingFaceConfig) or text.architecture is not None:
        return config
    architecture = text_architecture(hub.read_config(text.source, "text type hf"))
    return replace(config, text=replace(text, architecture=architecture))


def openai_text_weights() -> dict[str, Tensor]:
    """Weights of the text encoder of OpenAI's CLIP (ViT-B/32), under transformers' names.

    Raises:
        ConfigError: it is neither in the hub's cache nor to be had from the hub.
    """
    argument = "--pretrained openai"
    architecture = text_architecture(hub.read_config(OPENAI_CLIP, argument))
    folder = hub.weight_files(OPENAI_CLIP, argument)[0].parent
    config = HuggingFaceConfig(OPENAI_CLIP, architecture=architecture)
    return published_state(config, str(folder))


def load_sources(model: nn.Module, config: ModelConfig) -> None:
    """Fill a new model's text tower and decoder from the checkpoints that its configuration names.

    What they lack (cross-attention, poolers, projections) keeps its first values.

    Raises:
        ConfigError: a folder is missing, or its model is another one than configured.
        CheckpointError: its weights are damaged or lack some.
    """
    text, decoder = config.text, config.decoder
    tower = model.get_submodule("text")
    if isinstance(text, HuggingFaceConfig):
        assert isinstance(tower, HuggingFaceTower)
        folder = hub.weight_files(text.source, "text type hf")[0].parent
        tower.load(published_state(text, str(folder)))
        log.info("text tower: weights of %s", text.source)
    elif isinstance(text, GptConfig) and text.source:
        assert isinstance(tower, GptTower)
        shape = {"width": text.width, "heads": text.heads, "inner": text.inner}
        shape["positions"] = text.positions
        weights = _published(tower.family, text.source, shape, text.end, "text.source")
        load_tower(tower, weights, text)
        log.info("text tower: layers %d to %d of %s", text.start, text.end, text.source)
    if isinstance(decoder, GptDecoderConfig) and decoder.source:
        part = model.get_submodule("decoder")
        assert isinstance(part, GptDecoder)
        shape = {"width": text.width, "heads": decoder.heads, "inner": decoder.inner}
        weights = _published(part.family, decoder.source, shape, decoder.end, "decoder.source")
        load_decoder(part, weights, decoder)
        log.info("decoder: layers %d to %d of %s", decoder.start, decoder.end, decoder.source)


def _published(
    family: Family, source: str, shape: Mapping[str, int], end: int, argument: str
) -> dict[str, Tensor]:
    """A folder's tensors under our names, its shape compared."""
    where = f"{argument} {source}"
    check_source(family, hub.read_config(source, argument), shape, end, where)
    weights: dict[str, Tensor] = {}
    for path in hub.weight_files(source, argument):
        weights |= read_weights(path)
    return our_names(family, weights)

"""Models: from a configuration to a module."""

from __future__ import annotations

import dataclasses
import math

from slidevlm.models import zoo
from slidevlm.models.coca import CoCa
from slidevlm.models.language import LanguageModel
from slidevlm.models.lora import add_lora
from slidevlm.models.schema import ModelConfig, from_dict
from slidevlm.models.sources import load_sources, resolve

__all__ = [
    "CoCa",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "build_model",
    "create_model",
    "from_dict",
    "load_sources",
    "resolve",
    "zoo",
]

# What trains, evaluates and generates takes any of these.
Model = CoCa | LanguageModel

# First scale and bias of the two contrastive losses (CLIP, 2021; SigLIP, 2023).
SOFTMAX_LOG_SCALE = math.log(1 / 0.07)
SIGLIP_LOG_SCALE, SIGLIP_BIAS = math.log(10.0), -10.0


def build_model(config: ModelConfig, vocab_size: int, *, siglip: bool = False) -> Model:
    """A model with fresh weights (torch's global seed decides them).

    Args:
        config: a configuration whose tile width is known.
        vocab_size: V, the tokenizer's.
        siglip: start the scale and the bias as the sigmoid loss wants them.
    """
    model: Model
    if config.family == "lm":
        model = LanguageModel(config, vocab_size)
    else:
        scale, bias = (SIGLIP_LOG_SCALE, SIGLIP_BIAS) if siglip else (SOFTMAX_LOG_SCALE, None)
        model = CoCa(config, vocab_size, scale, bias)
    add_lora(model, config.lora)
    return model


def create_model(name: str, *, tile_width: int, vocab_size: int, siglip: bool = False) -> Model:
    """A model by the name or path of its configuration, with fresh weights.

    Examples:
        >>> model = create_model("coca_tiny", tile_width=16, vocab_size=100)
        >>> type(model).__name__
        'CoCa'
    """
    config = dataclasses.replace(zoo.load(name), tile_width=tile_width)
    return build_model(config, vocab_size, siglip=siglip)

"""Text towers and decoders, registered by name."""

from __future__ import annotations

from slidevlm.models.text.base import TEXT_ENCODERS, TextTower
from slidevlm.models.text.decoder import (
    DECODERS,
    Decoder,
    DecoderCache,
    DecoderConfig,
    GenerationCache,
    ReportDecoder,
)
from slidevlm.models.text.encoder import TextConfig, TextEncoder
from slidevlm.models.text.gpt import BioGptTower, Gpt2Tower
from slidevlm.models.text.huggingface import HuggingFaceTower
from slidevlm.models.text.prior import TextPrior

__all__ = [
    "DECODERS",
    "TEXT_ENCODERS",
    "BioGptTower",
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "GenerationCache",
    "Gpt2Tower",
    "HuggingFaceTower",
    "ReportDecoder",
    "TextConfig",
    "TextEncoder",
    "TextPrior",
    "TextTower",
]

"""Text towers and decoders."""

from __future__ import annotations

from slidevlm.models.text.decoder import Decoder, DecoderCache, DecoderConfig
from slidevlm.models.text.encoder import TextConfig, TextEncoder
from slidevlm.models.text.prior import TextPrior

__all__ = ["Decoder", "DecoderCache", "DecoderConfig", "TextConfig", "TextEncoder", "TextPrior"]

"""Slide encoders: a bag of tiles -> a few tokens. One file each, registered by name.

An encoder is a module built from its own `Config` (a frozen dataclass; the `slide` part of a
model configuration) and the tile width, called with `Bags`, returning tokens [B, N, width].
"""

from __future__ import annotations

from slidevlm.models.slide.abmil import ABMIL
from slidevlm.models.slide.base import SLIDE_ENCODERS, SlideEncoder
from slidevlm.models.slide.longnet import LongNet
from slidevlm.models.slide.mean import Mean
from slidevlm.models.slide.perceiver import Perceiver
from slidevlm.models.slide.pooler import Pooler
from slidevlm.models.slide.transformer import Transformer
from slidevlm.models.slide.transmil import TransMIL

__all__ = [
    "ABMIL",
    "SLIDE_ENCODERS",
    "LongNet",
    "Mean",
    "Perceiver",
    "Pooler",
    "SlideEncoder",
    "TransMIL",
    "Transformer",
]

"""Slide encoders: a bag of tiles -> a few tokens. One file each, registered by name.

An encoder is a module built from its own `Config` (a frozen dataclass; the `slide` part of a
model configuration) and the tile width, called with `Bags`, returning tokens [B, N, width].
"""

from __future__ import annotations

from slidevlm.models.slide.base import SLIDE_ENCODERS, SlideEncoder
from slidevlm.models.slide.perceiver import Perceiver

__all__ = ["SLIDE_ENCODERS", "Perceiver", "SlideEncoder"]

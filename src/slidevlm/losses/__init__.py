"""Losses, in float32 or better. Each takes all rows of the global batch."""

from __future__ import annotations

from slidevlm.losses.caption import caption_loss_sum
from slidevlm.losses.contrastive import contrastive_loss
from slidevlm.losses.siglip import siglip_loss

__all__ = ["caption_loss_sum", "contrastive_loss", "siglip_loss"]

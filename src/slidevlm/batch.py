"""The shapes that cross the borders between layers.

Symbols: B specimens in a batch, T tiles of all bags together, D tile feature width,
L tokens of the longest report, E embedding width, V vocabulary size, N specimens of a split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # what scores predictions and reports starts without torch
    import torch
    from torch import Tensor


@dataclass
class Bags:
    """The bags of a batch laid end to end; no padding anywhere.

    The rows of a bag follow those of the bags before it. `lengths` are Python numbers, so that
    splitting a batch never waits for the device.
    """

    features: Tensor  # [T, D] float16, bfloat16 or float32
    lengths: tuple[int, ...]  # B numbers >= 1 whose sum is T
    positions: Tensor | None = None  # [T, 2] float32, x and y in `unit`, relative to the slide
    slides: Tensor | None = None  # [T] int64, index of the slide within its specimen
    unit: str | None = None  # "um" (micrometres) or "px" (level-0 pixels); None without positions

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Bags:
        """Move the tensors; copies from pinned memory do not block."""
        return Bags(
            self.features.to(device, non_blocking=True),
            self.lengths,
            None if self.positions is None else self.positions.to(device, non_blocking=True),
            None if self.slides is None else self.slides.to(device, non_blocking=True),
            self.unit,
        )

    def pin_memory(self) -> Bags:
        """Called by torch's DataLoader when it pins."""
        return Bags(
            self.features.pin_memory(),
            self.lengths,
            None if self.positions is None else self.positions.pin_memory(),
            None if self.slides is None else self.slides.pin_memory(),
            self.unit,
        )


@dataclass
class Batch:
    """What the loader hands to a training or evaluation step."""

    bags: Bags
    tokens: Tensor  # [B, L] int64, BOS ... EOS, then padding
    token_mask: Tensor  # [B, L] bool, True on real tokens (BOS and EOS included)
    report_ids: Tensor  # [B] int64, equal exactly where the normalised reports are equal
    specimen_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.specimen_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        return Batch(
            self.bags.to(device),
            self.tokens.to(device, non_blocking=True),
            self.token_mask.to(device, non_blocking=True),
            self.report_ids.to(device, non_blocking=True),
            self.specimen_ids,
            self.patient_ids,
        )

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins."""
        return Batch(
            self.bags.pin_memory(),
            self.tokens.pin_memory(),
            self.token_mask.pin_memory(),
            self.report_ids.pin_memory(),
            self.specimen_ids,
            self.patient_ids,
        )


@dataclass
class Output:
    """What a model's forward pass returns; None where the family lacks the part."""

    image_embedding: Tensor | None  # [B, E], L2-normalised
    text_embedding: Tensor | None  # [B, E], L2-normalised
    # [B, L - 1, V], position i predicts token i + 1; or [n, V], only where that token is real
    logits: Tensor | None
    logit_scale: Tensor  # [], the multiplier of the cosine itself (not its logarithm)
    logit_bias: Tensor | None  # [], for the sigmoid loss


@dataclass
class Predictions:
    """One evaluation pass over a split, gathered over ranks, each specimen exactly once."""

    specimen_ids: tuple[str, ...]  # N, in the order of the split
    patient_ids: tuple[str, ...]  # N
    reports: tuple[str, ...]  # N, the true reports
    report_ids: np.ndarray  # [N] int64, equal exactly where the normalised reports are equal
    image_embedding: np.ndarray | None  # [N, E] float32, L2-normalised
    text_embedding: np.ndarray | None  # [N, E] float32, L2-normalised
    logit_scale: float = 1.0
    generated: tuple[str, ...] | None = None  # N generated reports, when asked for
    losses: dict[str, float] = field(default_factory=dict)  # means over the split

    def __len__(self) -> int:
        return len(self.specimen_ids)

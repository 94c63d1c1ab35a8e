"""Short trainings in this process, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from slidevlm.app import train
from slidevlm.config import Config, with_values
from slidevlm.train import checkpoint as ckpt


def run(settings: dict[str, Any], **more: Any) -> Path:
    """Train with these arguments; the run folder."""
    values = {**settings, **more}
    train(with_values(Config(), values))
    return Path(values["logs"]) / values["name"]


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a kind."""
    told = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in told if line["kind"] == kind]


def weights(folder: Path, epoch: int = 2) -> dict[str, torch.Tensor]:
    """Of the checkpoint of an epoch."""
    return ckpt.load(folder / "checkpoints" / f"epoch_{epoch}.pt")[0].weights

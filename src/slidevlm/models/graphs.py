"""Whether a graph of the operations is being made: for `torch.compile`, or a trace."""

from __future__ import annotations

import torch


def outside_autograd() -> bool:
    """Whether one is, which knows no `autograd.Function`."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()

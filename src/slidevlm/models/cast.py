"""Weights in 16 bits, as some forms of --precision want them."""

from __future__ import annotations

import torch
from torch import nn

from slidevlm.models.mode import Resting


def cast_weights(model: Resting, dtype: torch.dtype, *, everything: bool) -> int:
    """Turn weights to `dtype`, in place; tied ones stay tied. Returns how many numbers.

    Scale and bias of the contrastive loss stay as they are: losses are computed in float32.

    Args:
        model: the model.
        dtype: a 16-bit type.
        everything: all parameters and saved statistics, not only the weights of linear layers and
            of attention.
    """
    spared = {id(p) for name, p in model.named_parameters() if name in ("log_scale", "bias")}
    count = 0
    for module in model.modules():
        if not (everything or isinstance(module, (nn.Linear, nn.MultiheadAttention))):
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) not in spared]
        if everything:
            # Those not saved are tables of wavelengths, for which 16 bits have no room.
            apart = module._non_persistent_buffers_set
            named = module.named_buffers(recurse=False)
            own += [b for name, b in named if name not in apart]  # type: ignore[misc]
        for tensor in own:
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
                count += tensor.numel()
    return count

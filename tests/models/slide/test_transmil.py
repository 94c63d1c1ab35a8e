"""TransMIL against its formulas written out for one bag, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.models.attention import initialise
from slidevlm.models.slide.transmil import TransMIL, TransMILConfig, pseudo_inverse


def nystrom(module: torch.nn.Module, x: Tensor, heads: int, m: int) -> Tensor:
    """Head by head, with loops over landmarks and taps of the convolution."""
    n = math.ceil(len(x) / m) * m
    padded = torch.zeros(n, x.shape[1], dtype=x.dtype)
    padded[n - len(x) :] = x
    d = x.shape[1] // heads
    q, k, v = (padded @ module.project.weight.T).chunk(3, 1)
    middles, parts = [], []
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        qh, kh, vh = q[:, own] / math.sqrt(d), k[:, own], v[:, own]
        group = n // m
        ql = torch.stack([qh[i * group : (i + 1) * group].mean(0) for i in range(m)])
        kl = torch.stack([kh[i * group : (i + 1) * group].mean(0) for i in range(m)])
        middles.append((ql @ kl.T).softmax(1))
        along = torch.zeros_like(vh)
        for i in range(n):
            for tap in range(33):
                j = i + tap - 16
                if 0 <= j < n:
                    along[i] += module.along.weight[h, 0, tap, 0] * vh[j]
        parts.append(((qh @ kl.T).softmax(1), (ql @ kh.T).softmax(1) @ vh, along))
    inverses = pseudo_inverse(torch.stack(middles), module.iterations)
    results = [a @ inv @ b + c for (a, b, c), inv in zip(parts, inverses, strict=True)]
    return module.out(torch.cat(results, 1))[n - len(x) :]


def published(encoder: TransMIL, features: Tensor, heads: int, m: int) -> Tensor:
    tiles = F.relu(encoder.project(features))
    side = math.ceil(math.sqrt(len(tiles)))
    tiles = torch.cat([tiles, tiles[: side**2 - len(tiles)]])
    x = torch.cat([encoder.whole, tiles])
    x = x + nystrom(encoder.first.attention, encoder.first.norm(x), heads, m)
    image = x[1:].view(side, side, -1).permute(2, 0, 1)
    total = image.clone()
    for conv in encoder.places.convolutions:
        size = conv.kernel_size[0]
        padded = F.pad(image, [size // 2] * 4)
        patches = padded.unfold(1, size, 1).unfold(2, size, 1)  # [width, S, S, size, size]
        total = total + (patches * conv.weight[:, 0, None, None]).sum((-1, -2))
        total = total + conv.bias[:, None, None]
    x = torch.cat([x[:1], total.flatten(1).T])
    x = x + nystrom(encoder.second.attention, encoder.second.norm(x), heads, m)
    return encoder.norm(x[:1])


@pytest.mark.parametrize("tiles", [1, 5, 16, 23])
def test_one_bag_goes_as_published(tiles: int) -> None:
    torch.manual_seed(0)
    encoder = TransMIL(TransMILConfig(width=12, heads=3, dropout=0.0), 5)
    initialise(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    encoder.double()
    features = torch.randn(tiles, 5, dtype=torch.float64)
    ours = encoder(Bags(features, (tiles,)))[0]
    torch.testing.assert_close(ours, published(encoder, features, 3, 6))


def test_the_iteration_converges_to_the_pseudo_inverse() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 7, 7, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(matrices, 40), torch.linalg.pinv(matrices))

"""--grad-checkpointing: the same gradients, dropout replayed, and fewer activations kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.mode import Recomputing
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

SMALL: dict[str, dict[str, Any]] = {
    "longnet": {"segments": [8, 32], "dilations": [1, 2]},
    "transmil": {"landmarks": 4},
    "transformer": {"layers": 3},
    "vit": {"layers": 3},
}
TOWERS = ("slide", "text", "decoder")


def model_of(slide: str, dropout: float) -> CoCa:
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": 6}
    if slide == "perceiver":
        content["slide"] = content["slide"] | {"blocks": 3, "self_layers": 2}
    else:
        heads = {} if slide in ("abmil", "mean") else {"heads": 4}
        content["slide"] = {"type": slide, "width": 32, **heads, **SMALL.get(slide, {})}
    for part in ("text", "decoder"):
        content[part] = content[part] | {"layers": 3}
    torch.manual_seed(0)
    model = build_model(from_dict(content, "here"), 20)
    assert isinstance(model, CoCa)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def checkpoint(model: CoCa, *towers: str) -> None:
    for tower in towers:
        part = model.get_submodule(tower)
        assert isinstance(part, Recomputing)
        part.checkpointing = True


def batch_of(size: int, seed: int, tiles: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple((tiles + torch.arange(size) * 3).tolist())
    tokens = torch.randint(3, 20, (size, 12), generator=generator)
    total = sum(lengths)
    names = tuple(f"s{i}" for i in range(size))
    return Batch(
        Bags(
            torch.randn(total, 6, generator=generator),
            lengths,
            1e4 * torch.rand(total, 2, generator=generator),
            None,
            "um",
        ),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.arange(size),
        names,
        names,
    )


def gradients(model: CoCa, *sizes: int) -> dict[str, Tensor | None]:
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.99), eps=1e-8
    )
    step = Step(model, optimizer, objective, resolve("fp32", torch.device("cpu")), None)
    torch.manual_seed(7)
    terms = step.gradients([batch_of(size, seed) for seed, size in enumerate(sizes)])
    return {"loss": terms.loss, **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("slide", list(SLIDE_ENCODERS))
@pytest.mark.parametrize("sizes", [(4,), (2, 3)], ids=["whole", "accumulated"])
def test_gradients_are_the_same_bit_for_bit(slide: str, sizes: tuple[int, ...]) -> None:
    plain, again = model_of(slide, 0.3), model_of(slide, 0.3)
    checkpoint(again, *TOWERS)
    expected, found = gradients(plain, *sizes), gradients(again, *sizes)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None
        else:
            assert torch.equal(found[name], value), name
    assert sum(v is not None for v in expected.values()) > 20


def kept_bytes(model: CoCa, batch: Batch) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    mine = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    given = {t.data_ptr() for t in (batch.bags.features, batch.tokens, batch.token_mask)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine | given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch.bags, batch.tokens, batch.token_mask)
    assert output.logits is not None
    return sum(kept.values())


@pytest.mark.parametrize("tower", TOWERS)
def test_each_tower_keeps_less(tower: str) -> None:
    batch = batch_of(4, 0, tiles=100)
    plain, again = model_of("perceiver", 0.1), model_of("perceiver", 0.1)
    checkpoint(again, tower)
    whole, less = kept_bytes(plain, batch), kept_bytes(again, batch)
    assert less < 0.85 * whole, (tower, less / whole)


@pytest.mark.parametrize("slide", [kind for kind in SLIDE_ENCODERS if kind not in ("mean",)])
def test_every_encoder_keeps_less(slide: str) -> None:
    batch = batch_of(2, 0, tiles=400)
    plain, again = model_of(slide, 0.1), model_of(slide, 0.1)
    checkpoint(again, "slide")
    assert kept_bytes(again, batch) < 0.85 * kept_bytes(plain, batch)


def test_nothing_is_computed_again_in_evaluation() -> None:
    model = model_of("perceiver", 0.1)
    checkpoint(model, *TOWERS)
    batch = batch_of(2, 0)
    expected = model.eval()(batch.bags, batch.tokens, batch.token_mask)
    with torch.inference_mode():
        found = model(batch.bags, batch.tokens, batch.token_mask)
    assert torch.equal(found.image_embedding, expected.image_embedding)

"""The perceiver in the form published for PRISM and MOSAIC, against recorded numbers of MOSAIC's,
and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.attention import initialise
from slidevlm.models.slide.perceiver import Perceiver, PerceiverConfig

PREFIX = "vision_encoder.vision_encoder."
READS = {"cross_attend_0": "first", "cross_attend_1": "further"}


def published(width: int, **changes: Any) -> PerceiverConfig:
    values: dict[str, Any] = {
        "cross_heads": 1,
        "read": "features",
        "positions": "none",
        "moments": False,
        "query_residual": False,
        "cross_hidden": width,
        "self_hidden": width,
        "self_activation": "gelu",
        "final_norm": False,
    }
    return PerceiverConfig(width=width, **{**values, **changes})


def renamed(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """MOSAIC's names to ours, written out independently of the importer."""

    def copy(theirs: str, ours: str, *kinds: str) -> None:
        for kind in kinds:
            result[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]

    both = ("weight", "bias")
    result = {"latents": state["z"]}
    for theirs, ours in READS.items():
        attention = f"{theirs}.attention"
        result[f"{ours}.key_values.project.weight"] = torch.cat(
            [state[f"{attention}.{p}_proj.weight"] for p in "kv"]
        )
        copy(f"{attention}.q_proj", f"{ours}.attention.query", "weight")
        copy(f"{attention}.out_proj", f"{ours}.attention.out", *both)
        copy(f"{theirs}.ln1", f"{ours}.attention.norm", *both)
        copy(f"{theirs}.ln2", f"{ours}.key_values.norm", *both)
        copy(f"{theirs}.ln3", f"{ours}.norm", *both)
        copy(f"{theirs}.mlp.dense1", f"{ours}.feed_forward.inner", *both)
        copy(f"{theirs}.mlp.dense2", f"{ours}.feed_forward.outer", *both)
    for i in range(layers):
        theirs, ours = f"self_attends.{i}", f"self_attention.{i}"
        result[f"{ours}.attention.project.weight"] = torch.cat(
            [state[f"{theirs}.attention.{p}_proj.weight"] for p in "qkv"]
        )
        copy(f"{theirs}.attention.out_proj", f"{ours}.attention.out", *both)
        copy(f"{theirs}.ln1", f"{ours}.attention.norm", *both)
        copy(f"{theirs}.ln2", f"{ours}.norm", *both)
        copy(f"{theirs}.mlp.dense1", f"{ours}.feed_forward.inner", *both)
        copy(f"{theirs}.mlp.dense2", f"{ours}.feed_forward.outer", *both)
    copy("output_projection", "output", *both)
    return result


@pytest.mark.parametrize("name", ["ref_perceiver", "ref_perceiver_lora"])
def test_it_reproduces_the_recorded_image_tokens(shared: Path, name: str) -> None:
    record = torch.load(shared / "oracles" / "mosaic" / f"{name}.pt", weights_only=True)
    extra = record["config"]["vision_cfg"]["extra_config"]
    config = published(
        extra["num_z_channels"],
        latents=extra["z_index_dim"],
        blocks=extra["num_blocks"],
        self_layers=extra["num_self_attends_per_block"],
        heads=extra["num_self_attend_heads"],
        output_width=record["config"]["embed_dim"],
    )
    state = {
        k.removeprefix(PREFIX): v for k, v in record["state_dict"].items() if k.startswith(PREFIX)
    }
    encoder = Perceiver(config, record["config"]["vision_cfg"]["input_dim"]).double().eval()
    encoder.load_state_dict(renamed(state, config.self_layers))
    mask = record["inputs"]["image_feature_attention_mask"].bool()
    features = record["inputs"]["vision_input"][mask].double()
    with torch.no_grad():
        tokens = encoder(Bags(features, tuple(mask.sum(1).tolist())))
    expected = record["outputs_fp64"]["image_features"]
    torch.testing.assert_close(tokens[:, 0], expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(tokens[:, 1:], record["image_embs"].double(), atol=1e-4, rtol=1e-5)


def test_blocks_after_the_first_share_their_weights() -> None:
    torch.manual_seed(0)
    few, many = (Perceiver(published(16, blocks=n, heads=4, latents=4), 6) for n in (2, 5))
    assert [p.shape for p in few.parameters()] == [p.shape for p in many.parameters()]
    initialise(many)
    few.load_state_dict(many.state_dict())
    bags = Bags(torch.randn(9, 6), (4, 5))
    assert not torch.allclose(few(bags), many(bags))


def test_published_form_passes_signal_at_the_start() -> None:
    torch.manual_seed(0)
    encoder = Perceiver(published(16, heads=4, latents=4), 6)
    initialise(encoder)
    tokens = encoder(Bags(torch.randn(10, 6), (5, 5)))
    assert (tokens[0] - tokens[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"read": "tiles"}, "slide.read 'tiles' is not one of projected, features"),
        ({"read": "features"}, "set slide.positions to none"),
        ({"self_activation": "relu"}, "slide.self_activation 'relu'"),
        ({"heads": 7}, "does not divide by 7 heads"),
        ({"cross_heads": 7}, "does not divide by 7 heads"),
        ({"latents": 0}, "slide.latents must be at least 1"),
        ({"positions": "grid"}, "slide.positions 'grid'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PerceiverConfig(**changes)

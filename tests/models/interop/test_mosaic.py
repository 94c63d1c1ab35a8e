"""MOSAIC's checkpoints give MOSAIC's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.losses import caption_loss_sum, contrastive_loss
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.decoding import Decoding
from slidevlm.models.generate import generate
from slidevlm.models.interop import mosaic

NAMES = ("ref_perceiver", "ref_perceiver_lora")


def oracle(shared: Path, name: str) -> dict[str, Any]:
    return torch.load(shared / "oracles" / "mosaic" / f"{name}.pt", weights_only=True)


def config_in(content: dict[str, Any]) -> dict[str, Any]:
    config = content["config"]
    return json.loads(config) if isinstance(config, str) else config


def model_of(content: dict[str, Any], dtype: torch.dtype = torch.float32) -> CoCa:
    config = from_dict(mosaic.config_of(config_in(content)), "the oracle")
    model = build_model(config, 128)
    model.load_state_dict(mosaic.convert(content["state_dict"]))
    assert isinstance(model, CoCa)
    return model.to(dtype).eval()


def inputs_of(content: dict[str, Any], dtype: torch.dtype) -> tuple[Bags, Tensor, Tensor]:
    given = content["inputs"]
    tiles = given["image_feature_attention_mask"].bool()
    lengths = tuple(int(n) for n in tiles.sum(1))
    bags = Bags(given["vision_input"][tiles].to(dtype), lengths)
    return bags, given["text_input_ids"], given["text_attention_mask"].bool()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["outputs", "outputs_fp64"])
def test_outputs(shared: Path, name: str, kind: str) -> None:
    content = oracle(shared, name)
    dtype = content[kind]["logits"].dtype
    model, expected = model_of(content, dtype), content[kind]
    bags, tokens, mask = inputs_of(content, dtype)
    with torch.no_grad():
        slide = model.slide(bags)[:, 0]
        text = model.text.pool(model.text(tokens, mask), mask)
        output = model(bags, tokens, mask)
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(slide, expected["image_features"], **tolerance)
    torch.testing.assert_close(text, expected["text_features"], **tolerance)
    # The state at EOS predicts nothing here, and there it was masked.
    counted = expected["labels"] != 1
    torch.testing.assert_close(output.logits[counted], expected["logits"][counted], **tolerance)
    assert output.logit_scale.item() == pytest.approx(expected["logit_scale"].item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients(shared: Path, name: str) -> None:
    content = oracle(shared, name)
    model, weights = model_of(content), content["loss_weights"]
    bags, tokens, mask = inputs_of(content, torch.float32)
    output = model(bags, tokens, mask)
    contrastive = contrastive_loss(
        output.image_embedding, output.text_embedding, output.logit_scale, None
    )
    caption = caption_loss_sum(output.logits, tokens, mask) / mask[:, 1:].sum()
    losses = content["losses"]
    assert contrastive.item() == pytest.approx(losses["contrastive_loss"], abs=1e-5)
    scale = weights["caption"]
    assert scale * caption.item() == pytest.approx(losses["caption_loss"], abs=1e-5)
    (weights["contrastive"] * contrastive + scale * caption).backward()
    expected = mosaic.convert(content["grads"])
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # float32 rounds by the largest terms of a sum; how, depends on the CPU.
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[parameter], gradient, atol=atol, rtol=1e-4, msg=parameter)
    learns = mosaic.convert({k: torch.tensor([v] * 3) for k, v in content["requires_grad"].items()})
    for parameter, value in model.named_parameters():
        assert value.requires_grad == bool(learns[parameter].any()), parameter


@pytest.mark.parametrize("name", NAMES)
def test_greedy_reports(shared: Path, name: str) -> None:
    content = oracle(shared, name)
    model = model_of(content)
    bags, _, _ = inputs_of(content, torch.float32)
    decoding = Decoding(bos_id=0, eos_id=2, pad_id=1, max_tokens=23, min_tokens=4)
    written = generate(model, bags, list("abcd"), decoding)
    expected = content["generate"]["top_k1"].tolist()
    for ours, theirs in zip(written, expected, strict=True):
        row = theirs[1:] if theirs[0] == 0 else theirs
        stop = row.index(2) if 2 in row else len(row)
        assert ours[: len(row[:stop])] == row[:stop], (ours, theirs)


def test_the_published_names_and_shapes(shared: Path) -> None:
    """coca_stage_2_perceiver_lora_uni, tensor for tensor, without building its weights."""
    lines = (shared / "oracles" / "mosaic" / "keys_coca_stage_2_perceiver_lora_uni.txt").read_text()
    theirs: dict[str, Tensor] = {}
    learns: dict[str, Tensor] = {}
    for line in lines.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, shape, _, state = line.split("\t")
        size = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        theirs[name] = torch.empty(size, device="meta")
        learns[name] = torch.full((3,), float(state == "trainable"))
    assert mosaic.recognises(theirs)
    with torch.device("meta"):
        config = zoo.load("coca_stage_2_perceiver_lora_uni")
        model = build_model(config, 42384)
    expected = {n: tuple(t.shape) for n, t in mosaic.convert(theirs).items()}
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == expected
    frozen = {n: bool(t.any()) for n, t in mosaic.convert(learns).items()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == frozen[name], name


def test_what_is_not_mosaic(shared: Path) -> None:
    content = oracle(shared, NAMES[0])
    assert mosaic.recognises(content["state_dict"])
    assert not mosaic.recognises({"text.tokens.weight": 0, "slide.latents": 0})
    weights = dict(content["state_dict"])
    weights["vision_encoder.vision_encoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"not known, such as .*extra\.weight"):
        mosaic.convert(weights)
    weights = dict(content["state_dict"])
    del weights["vision_encoder.vision_encoder.self_attends.0.attention.v_proj.weight"]
    with pytest.raises(CheckpointError, match=r"without .*v_proj\.weight"):
        mosaic.convert(weights)
    config = config_in(content)
    config["vision_cfg"]["method"] = "vit"
    with pytest.raises(ConfigError, match="method 'vit'"):
        mosaic.config_of(config)
    del config["vision_cfg"]
    with pytest.raises(ConfigError, match="no key 'vision_cfg'"):
        mosaic.config_of(config)

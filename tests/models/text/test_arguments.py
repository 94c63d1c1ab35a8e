"""Model arguments on published text towers: GPT layers of our own, and one of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags, Batch
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, LanguageModel, Model, build_model, from_dict, resolve
from slidevlm.models.compile import script_regions
from slidevlm.models.freeze import lock_text, text_groups
from slidevlm.models.mode import Recomputing
from slidevlm.models.trace import trace
from slidevlm.precision import resolve as resolve_precision
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

GPT = {"width": 16, "heads": 4, "inner": 24, "start": 0, "end": 2, "positions": 20}
KINDS = ("biogpt", "gpt2", "bert")


def model_of(kind: str, folder: Path, family: str = "coca", dropout: float = 0.0) -> Model:
    content: dict[str, Any] = {
        "family": family,
        "embed_dim": 16,
        "tile_width": 6,
        "slide": {"type": "pooler", "width": 16, "heads": 2, "tokens": 4},
    }
    if kind == "bert":
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=24,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
        )
        transformers.BertModel(config).save_pretrained(folder)
        content |= {"family": "clip", "text": {"type": f"hf:{folder}", "context_length": 20}}
    else:
        rates = {"dropout": dropout, "attention_dropout": dropout}
        content["text"] = {
            "type": kind,
            "source": "",
            "tokenizer": "train",
            "context_length": 18,
            **GPT,
            **rates,
        }
        decoder = {k: GPT[k] for k in ("heads", "inner", "start", "end")}
        content["decoder"] = {"type": kind, "source": "", "slide_tokens": 4, **decoder, **rates}
        if family == "lm":
            del content["slide"], content["embed_dim"]
            del content["decoder"]["slide_tokens"]
    torch.manual_seed(0)
    model = build_model(resolve(from_dict(content, "here")), 30)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(size: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 12, (size,), generator=generator)
    mask = torch.arange(int(words.max())) < words[:, None]
    tokens = torch.randint(4, 30, mask.shape, generator=generator) * mask
    names = tuple(f"s{i}" for i in range(size))
    lengths = tuple(range(2, 2 + size))
    bags = Bags(torch.randn(sum(lengths), 6, generator=generator), lengths)
    return Batch(bags, tokens, mask, torch.arange(size), names, names)


def step_for(model: Model) -> Step:
    contrastive = 0.0 if isinstance(model, LanguageModel) else 1.0
    objective = Objective(softmax_term, contrastive, 2.0, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.3), lr=1e-2, betas=(0.9, 0.99), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve_precision("fp32", torch.device("cpu")), None)


def gradients(model: Model, sizes: tuple[int, ...] = (4, 3)) -> dict[str, Tensor | None]:
    torch.manual_seed(3)
    step_for(model.train()).gradients([batch_of(size, i) for i, size in enumerate(sizes)])
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_lock_text(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path, dropout=0.5)
    groups = text_groups(model)
    assert [name.split(",")[0] for name, _ in groups] == ["embeddings", "layer_0", "layer_1"]
    lock_text(model, 1, freeze_layer_norm=True)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    step = step_for(model.train())
    step([batch_of(4)], 1e-2)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    of_text = {n for n, p in model.named_parameters() if n.startswith("text")}
    unlocked = {
        id(p)
        for part in groups[-1][1]
        for p in ([part] if isinstance(part, torch.nn.Parameter) else part.parameters())
    }
    expected = {n for n, p in model.named_parameters() if n in of_text and id(p) in unlocked}
    # A key's bias adds the same to all scores of a row: it has no gradient but rounding.
    assert moved & of_text <= expected
    assert {n for n in expected - moved if not n.endswith("key.bias")} == set()
    frozen = model.get_submodule(
        "text.layers.0" if kind != "bert" else "text.model.encoder.layer.0"
    )
    assert not any(m.training for m in frozen.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str, tmp_path: Path) -> None:
    plain, again = (model_of(kind, tmp_path, dropout=0.3) for _ in range(2))
    for module in again.modules():
        if isinstance(module, Recomputing):
            module.checkpointing = True
    expected, found = gradients(plain), gradients(again)
    for name, value in expected.items():
        assert (value is None and found[name] is None) or torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_traced_at_any_length(kind: str, tmp_path: Path) -> None:
    plain, traced = (model_of(kind, tmp_path).eval() for _ in range(2))
    assert isinstance(traced, CoCa) and isinstance(plain, CoCa)
    trace(traced)
    with torch.inference_mode():
        for size in (1, 2, 5, 9):
            batch = batch_of(size, size)
            found = traced.encode_text(batch.tokens, batch.token_mask)
            expected = plain.encode_text(batch.tokens, batch.token_mask)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["biogpt", "gpt2"])
def test_scripted_trains_as_plain(kind: str, tmp_path: Path) -> None:
    plain, scripted = (model_of(kind, tmp_path, dropout=0.3) for _ in range(2))
    names = script_regions(scripted)
    assert {"text.layers.0", "decoder.layers.1"} <= set(names)
    expected, found = gradients(plain), gradients(scripted)
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_a_tower_of_transformers_is_not_scripted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--torchscript: text \(HuggingFaceTower\) cannot be"):
        script_regions(model_of("bert", tmp_path))


def test_a_language_model_has_a_text_tower_to_lock(tmp_path: Path) -> None:
    model = model_of("gpt2", tmp_path, "lm")
    lock_text(model, 0, freeze_layer_norm=True)
    found = gradients(model)
    assert not any(g is not None for n, g in found.items() if n.startswith("text."))
    assert any(g is not None for n, g in found.items() if n.startswith("decoder.layers"))

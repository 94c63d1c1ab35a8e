"""Text towers of transformers, from folders that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm import hub
from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models import Model, build_model, from_dict, load_sources, resolve
from slidevlm.models.freeze import lock_text
from slidevlm.train.optim import parameter_groups

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}


def published(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZE))
    elif kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24
        )
        model = transformers.DistilBertModel(config)
    elif kind == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZE))
    elif kind == "deberta":
        model = transformers.DebertaModel(transformers.DebertaConfig(**SIZE))
    else:
        config = transformers.T5Config(
            vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
        )
        model = transformers.T5Model(config)
    model.eval().save_pretrained(folder)
    return model


def test_the_text_part_of_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 24}
    vision = {**small, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    published_config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 2}, vision_config=vision, projection_dim=8
    )
    theirs = transformers.CLIPModel(published_config).eval()
    theirs.save_pretrained(tmp_path)
    model = clip(tmp_path)
    tokens = torch.randint(4, 30, (2, 9))
    with torch.no_grad():
        base = theirs.text_model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(model.text(tokens, tokens > 0), base, atol=1e-5, rtol=0)
    assert model.text.width == 16 and model.text.pooler is not None


def clip(folder: Path | str, vocab: int = 30, **text: Any) -> Model:
    config = from_dict(
        {
            "family": "clip",
            "embed_dim": 8,
            "tile_width": 6,
            "slide": {"type": "mean", "width": 8},
            "text": {"type": f"hf:{folder}", "context_length": 20, "pool_heads": 2, **text},
        },
        "test",
    )
    config = resolve(config)
    assert from_dict(config.to_dict(), "again") == config
    model = build_model(config, vocab)
    load_sources(model, config)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5"])
def test_states_as_published_whatever_the_padding(kind: str, tmp_path: Path) -> None:
    theirs = published(kind, tmp_path)
    model = clip(tmp_path)
    tokens = torch.randint(4, 30, (3, 9))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    tokens[1, 5:], mask[1, 5:] = 0, False
    encoder = theirs.get_encoder() if kind == "t5" else theirs
    with torch.no_grad():
        base = encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        ours = model.text(tokens, mask)
        short = model.encode_text(tokens[1:2, :5], mask[1:2, :5])
        long = model.encode_text(tokens, mask)[1:2]
    torch.testing.assert_close(ours[mask], base[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)
    assert (model.text.pooler is None) == (kind != "t5")
    pooled = model.text.pool(ours, mask)
    if kind != "t5":
        torch.testing.assert_close(pooled, ours[:, 0])


def test_every_parameter_is_in_one_group_and_learns(tmp_path: Path) -> None:
    published("bert", tmp_path)
    model = clip(tmp_path, pooling="attention").train()
    groups = model.text.groups()
    assert [n for n, _ in groups] == ["embeddings", "layer_0", "layer_1", "final_norm"]
    found = [
        id(p)
        for _, members in groups
        for m in members
        for p in (m.parameters() if isinstance(m, torch.nn.Module) else [m])
    ]
    assert sorted(found) == sorted(id(p) for p in model.text.parameters())
    tokens = torch.randint(4, 30, (3, 9))
    output = model(Bags(torch.randn(3, 6), (1, 1, 1)), tokens, tokens > 0)
    (output.text_embedding * torch.randn(3, 8)).sum().backward()
    still = {n for n, p in model.text.named_parameters() if p.grad is None}
    assert not still
    frozen = clip(tmp_path, pooling="attention", freeze=True)
    assert not any(p.requires_grad for p in frozen.text.model.parameters())
    assert all(p.requires_grad for p in frozen.text.pooler.parameters())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5", "llama", "deberta"])
def test_norms_of_whatever_class_stay_trainable_in_a_locked_tower(
    kind: str, tmp_path: Path
) -> None:
    """In the layers and outside them."""
    published(kind, tmp_path)
    for frozen in (False, True):
        model = clip(tmp_path)
        lock_text(model, 0, freeze_layer_norm=frozen)
        trainable = {n for n, p in model.text.named_parameters() if p.requires_grad}
        norms = {n for n, _ in model.text.named_parameters() if "norm" in n.lower()}
        assert len(norms) > 4
        assert trainable == (set() if frozen else norms)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5"])
def test_position_vectors_do_not_decay(kind: str, tmp_path: Path) -> None:
    published(kind, tmp_path)
    model = clip(tmp_path)
    decayed, others = ({*group["names"]} for group in parameter_groups(model, 0.2))
    tables = {n for n, _ in model.named_parameters() if "position" in n or "relative" in n}
    assert tables and tables <= others
    assert any("word_embeddings" in n or "embed_tokens" in n for n in decayed)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointing(tmp_path: Path) -> None:
    published("bert", tmp_path)
    model = clip(tmp_path).train()
    tokens = torch.randint(4, 30, (3, 9))
    calls: list[int] = []
    layer = dict(model.text.groups())["layer_1"][0]
    part = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
    part.register_forward_pre_hook(lambda *a: calls.append(1))
    for wanted in (False, True):
        calls.clear()
        model.text.checkpointing = wanted
        assert model.text.checkpointing is wanted
        model.encode_text(tokens, tokens > 0).sum().backward()
        assert len(calls) == 1 + wanted


def test_tokens_that_were_added(tmp_path: Path) -> None:
    theirs = published("bert", tmp_path)
    model = clip(tmp_path, vocab=33)
    table = theirs.get_input_embeddings().weight
    torch.testing.assert_close(model.text.embedding.weight[:30], table)
    torch.testing.assert_close(model.text.embedding.weight[30:], table.mean(0).expand(3, -1))


def test_no_decoder_stands_on_it() -> None:
    with pytest.raises(ConfigError, match="no decoder can stand on a text tower of type hf"):
        from_dict(
            {
                "family": "coca",
                "slide": {"type": "mean", "width": 8},
                "text": {"type": "hf:x"},
                "decoder": {},
            },
            "test",
        )


def test_a_missing_model_says_what_is_wanted_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as raised:
        clip("someone/a-model")
    message = str(raised.value)
    assert "HF_HUB_OFFLINE is set" in message and "config.json" in message
    assert str(tmp_path / "home" / "hub" / "models--someone--a-model") in message
    with pytest.raises(ConfigError, match="no folder ./nothing"):
        clip("./nothing")


def test_the_cache_is_a_place_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "models--someone--a-model"
    theirs = published("bert", place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    model = clip("someone/a-model")
    table = theirs.get_input_embeddings().weight
    torch.testing.assert_close(model.text.embedding.weight, table)
    assert hub.read_config("someone/a-model", "x")["model_type"] == "bert"


def test_too_long_a_context(tmp_path: Path) -> None:
    published("bert", tmp_path)
    with pytest.raises(ConfigError, match="context_length 25 is more than the 24 positions"):
        clip(tmp_path, context_length=25)

"""BioGPT and GPT-2 in our own layers against transformers' models, from folders they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models import CoCa, LanguageModel, Model, build_model, from_dict, load_sources
from slidevlm.models.decoding import Decoding
from slidevlm.models.generate import generate
from slidevlm.models.text.gpt import GptDecoder, GptTower

transformers = pytest.importorskip("transformers")

KINDS = ("biogpt", "gpt2")
VOCAB = 40


def published(kind: str, folder: Path, layers: int = 3, seed: int = 0, **other: Any) -> Any:
    """A tiny model of random weights, saved; a language model with its head tied."""
    torch.manual_seed(seed)
    if kind == "biogpt":
        config = transformers.BioGptConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=20,
            **other,
        )
        model = transformers.BioGptForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=layers, n_head=4, n_inner=24, n_positions=20
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # norms and biases are not all ones and zeros
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def text_part(kind: str, folder: Path | str, **changed: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "source": str(folder),
        "start": 0,
        "end": 3,
        "width": 16,
        "heads": 4,
        "inner": 24,
        "positions": 20,
        "context_length": 16,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pool_heads": 2,
        **changed,
    }


def decoder_part(kind: str, folder: Path | str, **changed: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "source": str(folder),
        "start": 2,
        "end": 3,
        "heads": 4,
        "inner": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        **changed,
    }


SLIDE = {"type": "perceiver", "width": 16, "latents": 4, "blocks": 1, "self_layers": 1, "heads": 2}


def coca(kind: str, folder: Path | str, text: Any = None, decoder: Any = None) -> Model:
    content = {
        "family": "coca",
        "embed_dim": 16,
        "tile_width": 6,
        "slide": SLIDE,
        "text": text_part(kind, folder, end=2) | (text or {}),
        "decoder": decoder_part(kind, folder) | (decoder or {}),
    }
    config = from_dict(content, "test")
    assert from_dict(config.to_dict(), "again") == config
    model = build_model(config, VOCAB)
    load_sources(model, config)
    return model.eval()


def bags(lengths: tuple[int, ...] = (3, 5)) -> Bags:
    return Bags(torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(1)), lengths)


def tower_of(model: Model) -> GptTower:
    assert isinstance(model.text, GptTower)
    return model.text


@pytest.mark.parametrize("kind", KINDS)
def test_states_as_published(kind: str, tmp_path: Path) -> None:
    theirs = published(kind, tmp_path)
    config = from_dict(
        {
            "family": "lm",
            "text": text_part(kind, tmp_path),
            "decoder": decoder_part(
                kind, tmp_path, start=3, norm=False, head_norm=False, head_bias=False, tied=True
            ),
        },
        "test",
    )
    model = build_model(config, VOCAB)
    load_sources(model, config)
    model.eval()
    tokens = torch.randint(4, VOCAB, (3, 11))
    tokens[1, 7:], tokens[2, 4:] = 1, 1
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 7:], mask[2, 4:] = False, False
    with torch.no_grad():
        base = theirs.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        logits = theirs(input_ids=tokens, attention_mask=mask.long()).logits
        ours = tower_of(model)(tokens, mask)
        output = model(bags((1, 1, 1)), tokens, mask)
    torch.testing.assert_close(ours[mask], base[mask], atol=1e-5, rtol=0)
    assert output.image_embedding is None
    real = mask[:, :-1]
    torch.testing.assert_close(output.logits[real], logits[:, :-1][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_split_into_tower_and_decoder(kind: str, tmp_path: Path) -> None:
    """Without what is new, tower and decoder in a row are the published layers in a row."""
    theirs = published(kind, tmp_path)
    model = coca(kind, tmp_path, decoder={"head_norm": False, "head_bias": False})
    assert isinstance(model.decoder, GptDecoder)
    tokens = torch.randint(4, VOCAB, (2, 9))
    tower = tower_of(model)
    seen: list[Tensor] = []
    tower.norm.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    with torch.no_grad():
        tower(tokens)
        # Cross-attention starts at 0, so what the slide is does not matter yet.
        ours = model.decoder(seen[0], model.decoder.view(torch.randn(2, 5, 16)))
        logits = theirs(input_ids=tokens).logits
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["attention", "eos"])
def test_padding_changes_nothing_and_the_slide_something(
    kind: str, pooling: str, tmp_path: Path
) -> None:
    published(kind, tmp_path)
    model = coca(kind, tmp_path, text={"pooling": pooling})
    assert isinstance(model, CoCa) and isinstance(model.decoder, GptDecoder)
    shake(model)
    tokens = torch.randint(4, VOCAB, (2, 9))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    longer = torch.cat([tokens, torch.ones(2, 4, dtype=torch.int64)], 1)
    wider = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)
    with torch.no_grad():
        short, long = model(bags(), tokens, mask), model(bags(), longer, wider)
        other = model(bags((5, 3)), tokens, mask)
    torch.testing.assert_close(short.text_embedding, long.text_embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(short.logits, long.logits[:, :8], atol=1e-5, rtol=0)
    assert (short.logits - other.logits).abs().max() > 1e-3
    changed = tokens.clone()
    changed[:, 5] = 4 + (changed[:, 5] - 3) % 36
    with torch.no_grad():
        later = model(bags(), changed, mask)
    torch.testing.assert_close(short.logits[:, :5], later.logits[:, :5])
    assert (short.text_embedding - later.text_embedding).abs().max() > 1e-4


def shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["coca", "lm"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_full_passes(
    kind: str, family: str, beams: int, tmp_path: Path
) -> None:
    published(kind, tmp_path)
    model = coca(kind, tmp_path)
    if family == "lm":
        config = from_dict(
            {
                "family": "lm",
                "text": text_part(kind, tmp_path, end=2),
                "decoder": decoder_part(kind, tmp_path),
            },
            "test",
        )
        model = build_model(config, VOCAB).eval()
    shake(model)
    decoding = Decoding(bos_id=0, eos_id=2, pad_id=1, max_tokens=7, beams=beams, groups=1)
    written = generate(model, bags(), ["a", "b"], decoding)
    assert model.decoder is not None
    if beams > 1:
        alone = [generate(model, b, ["x"], decoding)[0] for b in one_by_one()]
        assert written == alone
        return
    for number, row in enumerate(written):
        tokens = [0]
        for token in row:
            given = torch.tensor([[*tokens, 5]])  # the state at the last token predicts nothing
            with torch.no_grad():
                logits = model(one_by_one()[number], given, torch.ones_like(given) > 0).logits
            logits[..., [0, 1]] = float("-inf")
            assert int(logits[0, -1].argmax()) == token
            tokens.append(token)
    assert any(written)


def one_by_one() -> list[Bags]:
    both = bags()
    return [Bags(both.features[:3], (3,)), Bags(both.features[3:], (5,))]


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_start_at_the_mean(kind: str, tmp_path: Path) -> None:
    theirs = published(kind, tmp_path)
    config = from_dict(
        {
            "family": "clip",
            "embed_dim": 16,
            "tile_width": 6,
            "slide": SLIDE,
            "text": text_part(kind, tmp_path),
        },
        "test",
    )
    model = build_model(config, VOCAB + 2)
    load_sources(model, config)
    table = theirs.get_input_embeddings().weight
    torch.testing.assert_close(model.text.embedding.weight[:VOCAB], table)
    torch.testing.assert_close(model.text.embedding.weight[VOCAB:], table.mean(0).expand(2, -1))


def test_frozen_parts_get_no_gradient(tmp_path: Path) -> None:
    published("biogpt", tmp_path)
    model = coca("biogpt", tmp_path, text={"freeze": True}, decoder={"freeze": True}).train()
    shake(model)
    tokens = torch.randint(4, VOCAB, (2, 6))
    output = model(bags(), tokens, tokens > 0)
    (output.logits.sum() + output.text_embedding.sum() + output.image_embedding.sum()).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert not [n for n in moved if n.startswith("text.") and "pooler" not in n]
    assert not [n for n in moved if n.startswith("decoder.") and "self_attention" in n]
    assert any("cross_attention" in n for n in moved) and any("text.pooler" in n for n in moved)


def test_lora_starts_from_the_published_weights(tmp_path: Path) -> None:
    theirs = published("biogpt", tmp_path)
    content = {
        "family": "clip",
        "embed_dim": 16,
        "tile_width": 6,
        "slide": SLIDE,
        "text": text_part("biogpt", tmp_path),
        "lora": [{"part": "text.layers", "targets": ["query", "key", "value"], "rank": 2}],
    }
    config = from_dict(content, "test")
    model = build_model(config, VOCAB).eval()
    load_sources(model, config)
    tokens = torch.randint(4, VOCAB, (2, 6))
    with torch.no_grad():
        base = theirs.base_model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(tower_of(model)(tokens), base, atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only(tmp_path: Path) -> None:
    published("biogpt", tmp_path)
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    tokens = torch.randint(4, VOCAB, (2, 6))
    for name in rates:
        tower = tower_of(coca("biogpt", tmp_path, text={**rates, name: 0.5}))
        with torch.no_grad():
            still = tower(tokens)
            torch.testing.assert_close(still, tower(tokens))
            tower.train()
            assert not torch.allclose(still, tower(tokens)), name


def test_groups_hold_each_parameter_once_from_input_to_output(tmp_path: Path) -> None:
    published("gpt2", tmp_path)
    model = coca("gpt2", tmp_path)
    for part in (model.text, model.decoder):
        found = [
            id(p)
            for _, members in part.groups()
            for m in members
            for p in (m.parameters() if isinstance(m, torch.nn.Module) else [m])
        ]
        assert sorted(found) == sorted(id(p) for p in part.parameters())
    names = [name for name, _ in model.text.groups()]
    assert names == ["embeddings", "layer_0", "layer_1", "final_norm"]


def test_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    published("biogpt", tmp_path)
    tokens = torch.randint(4, VOCAB, (2, 6))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = coca("biogpt", tmp_path, text={"dropout": 0.3}, decoder={"dropout": 0.3}).train()
        shake(model)
        calls = []
        layer = model.text.layers[0]
        layer.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        model.text.checkpointing = model.decoder.checkpointing = checkpointing
        torch.manual_seed(4)
        model(bags(), tokens, tokens > 0).logits.square().sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    published("biogpt", tmp_path / "bio")
    published("gpt2", tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r"text\.source .* is a model of type gpt2, not biogpt"):
        coca("biogpt", tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r'has inner 24, .* says 32; write "inner": 24'):
        coca("biogpt", tmp_path / "bio", text={"inner": 32})
    with pytest.raises(ConfigError, match=r"has 3 layers, but layers up to 9"):
        coca("biogpt", tmp_path / "bio", decoder={"end": 9})
    with pytest.raises(ConfigError, match="no folder .*nowhere"):
        coca("biogpt", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"context_length 21 is more than the 20 positions"):
        coca("biogpt", tmp_path / "bio", text={"context_length": 21})
    with pytest.raises(ConfigError, match=r"text\.tokenizer train"):
        coca("biogpt", tmp_path / "bio", text={"tokenizer": "train"})
    (tmp_path / "bio" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        coca("biogpt", tmp_path / "bio")
    (tmp_path / "bio" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no weights; wanted is one of model\.safetensors"):
        coca("biogpt", tmp_path / "bio")
    config = tmp_path / "gpt" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"activation_function": "relu"}))
    with pytest.raises(ConfigError, match="has the activation 'relu'"):
        coca("gpt2", tmp_path / "gpt")


def test_pickled_weights_are_read_without_running_code(tmp_path: Path) -> None:
    theirs = published("biogpt", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model = coca("biogpt", tmp_path)
    torch.testing.assert_close(model.text.embedding.weight, theirs.get_input_embeddings().weight)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="would run code"):
        coca("biogpt", tmp_path)


def test_language_model_is_a_model_of_its_own(tmp_path: Path) -> None:
    content = {"family": "lm", "text": text_part("biogpt", "x", pooling="eos")}
    with pytest.raises(ConfigError, match="of family lm needs a 'decoder'"):
        from_dict(content, "test")
    content["decoder"] = decoder_part("biogpt", "x", gist=True)
    with pytest.raises(ConfigError, match="decoder.gist"):
        from_dict(content, "test")
    with pytest.raises(ConfigError, match="of family lm has no 'slide'"):
        from_dict(content | {"slide": SLIDE}, "test")
    content["decoder"] = decoder_part("biogpt", "x")
    assert isinstance(build_model(from_dict(content, "test"), VOCAB), LanguageModel)

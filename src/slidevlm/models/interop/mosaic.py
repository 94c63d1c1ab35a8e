"""Checkpoints of MOSAIC: a perceiver, and BioGPT split into text encoder and decoder.

Its models are ours by configuration, tensor for tensor; only names and the layout of joint
projections differ. LoRA of the text encoder stays LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models.text.gpt import rename_biogpt

_VISION = "vision_encoder.vision_encoder."
_TEXT = "text_encoder.text_encoder."
_DECODER = "multimodal_decoder.multimodal_decoder."
_TOP = {
    "logit_scale": "log_scale",
    "text_encoder.learnable_query": "text.pooler.token",
    "text_encoder.vector_pooling.attention.out_proj.weight": "text.pooler.out.weight",
    "text_encoder.vector_pooling.attention.out_proj.bias": "text.pooler.out.bias",
    "text_encoder.vector_pooling.layer_norm.weight": "text.pooler.norm.weight",
    "text_encoder.vector_pooling.layer_norm.bias": "text.pooler.norm.bias",
    "multimodal_decoder.ln_final.weight": "decoder.head_norm.weight",
    "multimodal_decoder.ln_final.bias": "decoder.head_norm.bias",
    "multimodal_decoder.text_projection.weight": "decoder.vocabulary.weight",
    "multimodal_decoder.text_projection.bias": "decoder.vocabulary.bias",
    f"{_VISION}z": "slide.latents",
    f"{_VISION}output_projection.weight": "slide.output.weight",
    f"{_VISION}output_projection.bias": "slide.output.bias",
}
_READS = {"cross_attend_0": "slide.first", "cross_attend_1": "slide.further"}
_READ = {
    "attention.q_proj": "attention.query",
    "attention.out_proj": "attention.out",
    "mlp.dense1": "feed_forward.inner",
    "mlp.dense2": "feed_forward.outer",
    "ln1": "attention.norm",
    "ln2": "key_values.norm",
    "ln3": "norm",
}
_THINK = {
    "attention.out_proj": "attention.out",
    "mlp.dense1": "feed_forward.inner",
    "mlp.dense2": "feed_forward.outer",
    "ln1": "attention.norm",
    "ln2": "norm",
}
_POOL = "text_encoder.vector_pooling.attention.in_proj_"


def recognises(weights: Mapping[str, Any]) -> bool:
    """Whether these are the names of a MOSAIC checkpoint."""
    return any(n.startswith((_VISION, _TEXT)) for n in weights) and any(
        n.startswith(_DECODER) for n in weights
    )


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names.

    Raises:
        CheckpointError: a tensor that no known MOSAIC model has, or half of a joint projection.
    """
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in weights.items():
        if _is_part(name):
            continue
        if name.startswith(_POOL):
            kind = name.removeprefix(_POOL)
            for word, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[f"text.pooler.{word}.{kind}"] = third
            continue
        new = _rename(name)
        if new is None:
            unknown.append(name)
        else:
            ours[new] = tensor.reshape(1, -1) if new == "text.pooler.token" else tensor
    if unknown:
        raise CheckpointError(
            f"a MOSAIC checkpoint with {len(unknown)} tensors that are not known, such as "
            f"{unknown[0]}; only its perceiver models with BioGPT can be converted"
        )
    ours |= _joined(weights)
    return ours


def _is_part(name: str) -> bool:
    """Whether it is one of several projections that are one tensor here."""
    if not name.startswith(_VISION):
        return False
    joint = ("k_proj.weight", "v_proj.weight")
    return name.endswith((*joint, "q_proj.weight") if ".self_attends." in name else joint)


def _joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in weights:
        if not (name.startswith(_VISION) and name.endswith("k_proj.weight")):
            continue
        start = name.removesuffix("k_proj.weight")
        thinks = ".self_attends." in name
        parts = [f"{start}{p}_proj.weight" for p in ("qkv" if thinks else "kv")]
        lacking = [p for p in parts if p not in weights]
        if lacking:
            raise CheckpointError(f"a MOSAIC checkpoint without {lacking[0]}; it is damaged")
        if thinks:
            number = name.split(".self_attends.")[1].split(".")[0]
            target = f"slide.self_attention.{number}.attention.project.weight"
        else:
            read = _READS[name.removeprefix(_VISION).split(".")[0]]
            target = f"{read}.key_values.project.weight"
        found[target] = torch.cat([weights[p] for p in parts])
    return found


def _rename(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    if name.startswith(_VISION):
        return _rename_vision(name.removeprefix(_VISION))
    if name.startswith(_TEXT):
        inner = name.removeprefix(_TEXT).removeprefix("base_model.model.")
        return _rename_text(inner)
    if name.startswith(_DECODER):
        new = rename_biogpt(name.removeprefix(_DECODER))
        return None if new is None else f"decoder.{new}"
    return None


def _rename_vision(name: str) -> str | None:
    found = re.fullmatch(r"(cross_attend_[01])\.(.+)\.(weight|bias)", name)
    if found and found[2] in _READ:
        return f"{_READS[found[1]]}.{_READ[found[2]]}.{found[3]}"
    found = re.fullmatch(r"self_attends\.(\d+)\.(.+)\.(weight|bias)", name)
    if found and found[2] in _THINK:
        return f"slide.self_attention.{found[1]}.{_THINK[found[2]]}.{found[3]}"
    return None


def _rename_text(name: str) -> str | None:
    """BioGPT's names, with those that peft puts into them."""
    for theirs, ours in (("lora_A.default", "lora_a"), ("lora_B.default", "lora_b")):
        if f".{theirs}." in name:
            layer = rename_biogpt(name.replace(f".{theirs}.", "."))
            return None if layer is None else f"text.{layer.removesuffix('weight')}{ours}"
    wrapped = ".base_layer." in name
    layer = rename_biogpt(name.replace(".base_layer.", "."))
    if layer is None:
        return None
    if wrapped:
        start, _, kind = layer.rpartition(".")
        layer = f"{start}.base.{kind}"
    return f"text.{layer}"


_TARGETS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}


def config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """MOSAIC's configuration of a model as one of ours (the form of the JSON files).

    Raises:
        ConfigError: a part that is not known here.
    """
    try:
        return _config_of(theirs)
    except KeyError as error:
        raise ConfigError(f"this configuration of MOSAIC has no key {error}") from error


def _config_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    vision, text, decoder = theirs["vision_cfg"], theirs["text_cfg"], theirs["multimodal_cfg"]
    if vision["method"] != "perceiver" or vision["pooling_strategy"] != "none":
        raise ConfigError(
            f"a MOSAIC slide encoder of method {vision['method']!r} with pooling "
            f"{vision['pooling_strategy']!r}; only the perceiver without pooling is known"
        )
    if decoder["cross_attention_type"] != "default":
        raise ConfigError(
            f"MOSAIC's cross_attention_type {decoder['cross_attention_type']!r} is not known; "
            "only default is"
        )
    width = theirs["embed_dim"]
    content: dict[str, Any] = {
        "family": "coca",
        "embed_dim": width,
        "project_text": False,
        "pooling": "none",
        "tile_width": vision["input_dim"],
        "slide": _slide(vision["extra_config"], width),
        "text": {
            "type": "biogpt",
            **_layers(text),
            "width": width,
            "context_length": text["context_length"],
            "pooling": "attention",
            "pool_heads": text["attn_pooler_vector_heads"],
            "freeze": text["freeze_base"],
        },
        "decoder": {"type": "biogpt", **_layers(decoder), "freeze": decoder["freeze_base"]},
    }
    if text["lora"]:
        lora = text["lora_config"]
        content["lora"] = [
            {
                "part": "text.layers",
                "targets": [_TARGETS[name] for name in lora["target_modules"]],
                "rank": lora["r"],
                "alpha": lora["lora_alpha"],
                "dropout": lora["lora_dropout"],
            }
        ]
    return content


def _slide(extra: Mapping[str, Any], embed_dim: int) -> dict[str, Any]:
    width = extra["num_z_channels"]
    if extra["qk_channels"] not in (None, width) or extra["mlp_activation"] != "geglu":
        raise ConfigError("a MOSAIC perceiver with qk_channels or another activation is not known")
    return {
        "type": "perceiver",
        "width": width,
        "latents": extra["z_index_dim"],
        "blocks": extra["num_blocks"],
        "self_layers": extra["num_self_attends_per_block"],
        "heads": extra["num_self_attend_heads"],
        "cross_heads": extra["num_cross_attend_heads"],
        "dropout": extra["dropout_prob"],
        "positions": "none",
        "moments": False,
        "read": "features",
        "query_residual": extra["use_query_residual"],
        "cross_hidden": width * extra["cross_attend_widening_factor"],
        "self_hidden": width * extra["self_attend_widening_factor"],
        "self_activation": "gelu",
        "final_norm": False,
        "output_width": embed_dim,
    }


def _layers(part: Mapping[str, Any]) -> dict[str, Any]:
    """What text encoder and decoder say of the layers they take from BioGPT."""
    extra = part["extra_config"]
    return {
        "source": part["hf_model_name"] if part["load_pretrained"] else "",
        "start": part["load_pretrained_model_start_layer"],
        "end": part["load_pretrained_model_end_layer"],
        "heads": part["heads"],
        "inner": extra.get("intermediate_size", 4096),
        "dropout": extra.get("hidden_dropout_prob", 0.1),
        "attention_dropout": extra.get("attention_probs_dropout_prob", 0.1),
        "activation_dropout": extra.get("activation_dropout", 0.0),
    }

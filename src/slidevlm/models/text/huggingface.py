"""Any text encoder of Hugging Face's transformers as text tower: type `hf:<folder or name>`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.attention import LayerCache
from slidevlm.models.mode import Group, Unit
from slidevlm.models.text.base import NORMS, TEXT_ENCODERS, QueryPool, TextTower

# Models whose first token was trained to stand for the text.
CLS_FAMILIES = frozenset(
    (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "distilbert",
        "electra",
        "mpnet",
        "deberta",
        "deberta-v2",
        "albert",
        "roformer",
        "longformer",
        "big_bird",
        "modernbert",
        "nomic_bert",
    )
)
_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd", "hidden_dim")


@dataclass(frozen=True)
class HuggingFaceConfig:
    """The `text` part of a model configuration of type hf:<source>."""

    source: str  # folder or hub name
    context_length: int = 256  # tokens of a report at most, BOS and EOS included
    tokenizer: str = ""  # folder or hub name; empty: that of `source`
    pooling: str = "auto"  # cls; attention: by a learned query; auto: cls for the BERT family
    pool_heads: int = 8
    prior_rank: int = 0
    freeze: bool = False
    # The folder's config.json, taken when a run begins and kept in the checkpoint.
    architecture: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("text type hf: names no model; write hf:<folder or name>")
        if self.pooling not in ("auto", "cls", "attention"):
            raise ConfigError(f"text.pooling {self.pooling!r} is not one of auto, cls, attention")
        if self.tokenizer == "train":
            raise ConfigError(
                "text.tokenizer train: the token vectors of a published model belong to its own "
                "tokenizer; leave it out"
            )

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from."""
        return self.tokenizer or self.source

    @property
    def width(self) -> int:
        """Of the hidden states, known with the architecture."""
        assert self.architecture is not None, "the architecture must be known by now"
        for key in _WIDTHS:
            if isinstance(self.architecture.get(key), int):
                return int(self.architecture[key])
        raise ConfigError(f"text: {self.source} does not tell its width in config.json")

    @property
    def pools_cls(self) -> bool:
        """Whether the first token stands for the text."""
        if self.pooling != "auto":
            return self.pooling == "cls"
        assert self.architecture is not None, "the architecture must be known by now"
        return self.architecture.get("model_type") in CLS_FAMILIES


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "a text tower of type hf: needs the package transformers (pip install 'slidevlm[hf]')"
        ) from None
    return transformers


@TEXT_ENCODERS.register("hf")
class HuggingFaceTower(TextTower):
    """A model of transformers, its published code, run without remote code."""

    Config = HuggingFaceConfig
    causal = False

    def __init__(self, config: HuggingFaceConfig, vocab_size: int) -> None:
        super().__init__()
        self._recomputing = False
        self.width, self.context_length = config.width, config.context_length
        self.model = _build(config)
        if vocab_size > self.embedding.num_embeddings:
            self.model.resize_token_embeddings(vocab_size, mean_resizing=False)
        places = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(places, int) and config.context_length > places:
            raise ConfigError(
                f"text.context_length {config.context_length} is more than the {places} positions "
                f"of {config.source}"
            )
        self.pooler = None if config.pools_cls else QueryPool(config.width, config.pool_heads)
        if config.freeze:
            self.model.requires_grad_(requires_grad=False)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def checkpointing(self) -> bool:
        """Whether the published code recomputes its layers' activations."""
        return self._recomputing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        self._recomputing = wanted
        kind = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # its new name, before v6
            if wanted:
                self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kind)
            else:
                self.model.activation_checkpointing_disable()
        elif wanted:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        else:
            self.model.gradient_checkpointing_disable()

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        assert caches is None, "this tower is not causal"
        seen = torch.ones_like(tokens) if mask is None else mask.long()
        return self.model(input_ids=tokens, attention_mask=seen).last_hidden_state

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden[:, 0] if self.pooler is None else self.pooler(hidden, mask)

    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        raise AssertionError("this tower is not causal; the schema admits no decoder on it")

    def units(self) -> list[Unit]:
        return [(layer, ()) for layer in _layers(self.model)]

    def groups(self) -> list[Group]:
        layers = _layers(self.model)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        before: list[nn.Module | nn.Parameter] = []
        after: list[nn.Module | nn.Parameter] = []
        passed = False
        for part, parameters in _smallest(self.model):
            if inside.issuperset(map(id, parameters)):
                passed = True
            else:
                (after if passed else before).append(part)
        if self.pooler is not None:
            after.append(self.pooler)
        groups: list[Group] = [("embeddings", before)]
        groups += [(f"layer_{i}", [layer]) for i, layer in enumerate(layers)]
        return [*groups, ("final_norm", after)] if after else groups

    def position_tables(self) -> list[nn.Embedding]:
        # By the names that transformers gives them.
        names = r"position|relative_attention_bias|rel_embeddings|\bwpe$"
        return [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and re.search(names, name)
        ]

    def norms(self) -> list[nn.Module]:
        # Many models of transformers have a class of their own, of which nothing but the name
        # (T5LayerNorm, LlamaRMSNorm) tells what it does. Larger parts may be called after a norm
        # in them, as RobertaPreLayerNormAttention is.
        return [
            module
            for module in self.modules()
            if isinstance(module, NORMS)
            or (
                re.search("LayerNorm|RMSNorm", type(module).__name__)
                and not any(module.children())
                and all(p.ndim == 1 for p in module.parameters())
            )
        ]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a published model's tensors; rows of tokens that it lacks start at the mean."""
        mine = self.model.state_dict()
        for name, tensor in state.items():
            if name in mine and mine[name].shape != tensor.shape:
                rows = tensor.mean(0).expand(mine[name].shape).clone()
                rows[: len(tensor)] = tensor
                mine[name] = rows
            elif name in mine:
                mine[name] = tensor
        self.model.load_state_dict(mine)


def text_architecture(architecture: Mapping[str, Any]) -> Mapping[str, Any]:
    """That of the text part, where a config.json is of a model of images and texts (CLIP)."""
    if "text_config" not in architecture:
        return architecture
    content = {k: v for k, v in architecture.items() if k not in ("auto_map", "model_type")}
    whole = _transformers().AutoConfig.for_model(architecture.get("model_type"), **content)
    found: dict[str, Any] = json.loads(whole.text_config.to_json_string(use_diff=False))
    return found


def _build(config: HuggingFaceConfig) -> Any:
    transformers = _transformers()
    assert config.architecture is not None, "the architecture must be known by now"
    kind = config.architecture.get("model_type")
    try:
        published = _published_config(config)
        model = transformers.AutoModel.from_config(published, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"text: transformers {transformers.__version__} cannot build {config.source} of type "
            f"{kind!r}: {error}"
        ) from error
    if published.is_encoder_decoder:
        model = model.get_encoder()
    return _without_pooler(model)


def _published_config(config: HuggingFaceConfig) -> Any:
    assert config.architecture is not None, "the architecture must be known by now"
    content = {k: v for k, v in config.architecture.items() if k not in ("auto_map", "model_type")}
    kind = config.architecture.get("model_type")
    return _transformers().AutoConfig.for_model(kind, **content)


def _without_pooler(model: Any) -> Any:
    """BERT's own pooler feeds a task that is not ours; it would be trained by nothing."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None
    return model


def published_state(config: HuggingFaceConfig, folder: str) -> dict[str, Tensor]:
    """The tensors of a folder's weights under this model's names.

    Raises:
        ConfigError: transformers cannot read them, or they lack some.
    """
    transformers = _transformers()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder,
            config=_published_config(config),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds
        raise ConfigError(f"text: transformers cannot read {folder}: {error}") from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise ConfigError(f"text: the weights in {folder} lack {', '.join(sorted(missing)[:5])}")
    return _without_pooler(model).state_dict()


def _smallest(
    model: nn.Module,
) -> Iterator[tuple[nn.Module | nn.Parameter, list[nn.Parameter]]]:
    """What holds parameters, each once, in the order of `model.parameters()`.

    Modules without modules in them, as a lock asks of what kind they are; else the parameters.
    """
    seen = set[int]()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if own and not any(module.children()):
            yield module, own
        else:
            for parameter in own:
                yield parameter, [parameter]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the model: its longest list of modules that is not inside another."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len) if lists else []

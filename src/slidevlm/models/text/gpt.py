"""BioGPT and GPT-2: text tower and decoder of one published language model.

The layers are our own, in the arithmetic of the published ones (Luo et al., BioGPT, 2022; Radford
et al., GPT-2, 2019), so their weights load into them. As in PRISM and MOSAIC, layers `start` to
`end` of a checkpoint can be the text tower and others the decoder, which reads the slide by
cross-attention that is added between self-attention and feed-forward layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models.attention import LayerCache, OwnStart, next_places
from slidevlm.models.linear import gelu_linear, norm_linear
from slidevlm.models.mode import Group, Unit
from slidevlm.models.text.base import TEXT_ENCODERS, QueryPool, TextTower
from slidevlm.models.text.decoder import DECODERS, ReportDecoder


@dataclass(frozen=True)
class Family:
    """What distinguishes one published model from its relatives."""

    scaled: bool  # token vectors are multiplied by the root of the width
    position_offset: int  # rows of the position table before that of the first token
    gelu: str  # "none": exact; "tanh": its approximation


BIOGPT = Family(scaled=True, position_offset=2, gelu="none")
GPT2 = Family(scaled=False, position_offset=0, gelu="tanh")


@dataclass(frozen=True)
class GptConfig:
    """The `text` part of a model configuration of type biogpt or gpt2."""

    source: str = ""  # folder or hub name of the checkpoint to start from; empty: from scratch
    start: int = 0  # the first layer of the checkpoint that is used
    end: int = 12  # and the one before which it stops
    width: int = 1024
    heads: int = 16
    inner: int = 4096  # width of the feed-forward layers
    positions: int = 1024  # places of the position table
    context_length: int = 128  # tokens of a report at most, BOS and EOS included
    vocab_size: int = 42384  # at most, of a tokenizer that is trained
    tokenizer: str = ""  # a folder or hub name; empty: that of `source`; train: on the reports
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    pooling: str = "attention"  # by a learned query; eos: the state at the last real token
    pool_heads: int = 8
    prior_rank: int = 0  # as of type scratch
    freeze: bool = False  # what comes from the checkpoint is not trained

    def __post_init__(self) -> None:
        _check_layers("text", self.start, self.end, self.width, self.heads)
        if self.pooling not in ("attention", "eos"):
            raise ConfigError(f"text.pooling {self.pooling!r} is not one of attention, eos")
        if self.context_length > self.positions:
            raise ConfigError(
                f"text.context_length {self.context_length} is more than the {self.positions} "
                "positions of the table"
            )
        if self.source and self.tokenizer == "train":
            raise ConfigError(
                "text.tokenizer train: the token vectors of text.source belong to its own "
                "tokenizer; leave one of the two out"
            )
        if not (self.source or self.tokenizer):
            raise ConfigError(
                'text.tokenizer is missing: a folder, or "train", without text.source'
            )

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from, or "train"."""
        return self.tokenizer or self.source


@dataclass(frozen=True)
class BioGptConfig(GptConfig):
    """The `text` part of a model configuration of type biogpt."""

    source: str = "microsoft/biogpt"


@dataclass(frozen=True)
class Gpt2Config(GptConfig):
    """The `text` part of a model configuration of type gpt2."""

    source: str = "openai-community/gpt2"
    end: int = 6
    width: int = 768
    heads: int = 12
    inner: int = 3072
    vocab_size: int = 50257


@dataclass(frozen=True)
class GptDecoderConfig:
    """The `decoder` part of a model configuration of type biogpt or gpt2.

    Its width is the text tower's.
    """

    source: str = ""  # empty: from scratch
    start: int = 12
    end: int = 24
    heads: int = 16
    inner: int = 4096
    slide_tokens: int = 0  # queries of a pooler; 0: the decoder reads the slide's own tokens
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    norm: bool = True  # the checkpoint's final norm stands at the end
    head_norm: bool = True  # and a new one before the vocabulary projection
    head_bias: bool = True
    tied: bool = False  # the vocabulary projection is the token embedding
    gist: bool = False
    words: float = 0.0
    freeze: bool = False  # the self-attention that comes from the checkpoint is not trained

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ConfigError(f"decoder.start {self.start} comes after decoder.end {self.end}")


@dataclass(frozen=True)
class BioGptDecoderConfig(GptDecoderConfig):
    """The `decoder` part of a model configuration of type biogpt."""

    source: str = "microsoft/biogpt"


@dataclass(frozen=True)
class Gpt2DecoderConfig(GptDecoderConfig):
    """The `decoder` part of a model configuration of type gpt2."""

    source: str = "openai-community/gpt2"
    start: int = 6
    end: int = 12
    heads: int = 12
    inner: int = 3072


def _check_layers(part: str, start: int, end: int, width: int, heads: int) -> None:
    if start > end:
        raise ConfigError(f"{part}.start {start} comes after {part}.end {end}")
    if not heads or width % heads:
        raise ConfigError(f"{part}.width {width} does not divide by {heads} heads")


@dataclass(frozen=True)
class _Rates:
    """Dropout of what is added to the sum, of attention weights, of feed-forward activations."""

    branch: float
    attention: float
    activation: float


class GptAttention(nn.Module):
    """Multi-head attention, each projection by itself and with a bias."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, C] -> key and value, each [B, H, N, d]."""
        return self._split(self.key(context)), self._split(self.value(context))

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None
    ) -> Tensor:
        """x [B, L, width]; key, value [B, H, N, d]; mask [B, 1, L, N] -> [B, L, width].

        x may also be n B sequences, n after each other for each context (the beams of a slide).
        """
        query, beams = self._split(self.query(x)), len(x) // len(key)
        if beams > 1:  # n L queries of one context, whose keys and values are not copied
            query = query.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        if beams > 1:
            attended = attended.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, H, L, d]."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class GptLayer(OwnStart):
    """Pre-norm layer: causal self-attention, cross-attention where there is any, feed-forward."""

    def __init__(
        self, width: int, heads: int, inner: int, gelu: str, rates: _Rates, slide_width: int | None
    ) -> None:
        super().__init__()
        self.gelu = gelu
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = GptAttention(width, width, heads, rates.attention)
        self.cross_norm: nn.LayerNorm | None = None
        self.cross_attention: GptAttention | None = None
        if slide_width is not None:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = GptAttention(width, slide_width, heads, rates.attention)
        self.feed_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)
        self.dropout = nn.Dropout(rates.branch)
        self.activation_dropout = nn.Dropout(rates.activation)

    def forward(
        self,
        x: Tensor,
        slide: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, L, width], the slide's keys and values -> [B, L, width]."""
        normal = self.self_norm(x)
        key, value = self.self_attention.keys_values(normal)
        causal = cache is None or x.shape[1] > 1
        mask: Tensor | None = None
        if cache is not None:
            mask = cache.mask
            causal = causal and mask is None
            assert not causal or cache.length == 0, "a prompt goes into an empty cache"
            key, value = cache.append(key, value)
        x = x + self.dropout(self.self_attention(normal, key, value, causal=causal, mask=mask))
        if self.cross_attention is not None and self.cross_norm is not None:
            assert slide is not None, "this layer reads a slide"
            normal = self.cross_norm(x)
            read = self.cross_attention(normal, slide[0], slide[1], causal=False, mask=None)
            x = x + self.dropout(read)
        if torch.jit.is_scripting():
            added = self._plain(self.inner(self.feed_norm(x)))
        else:
            added = self._keeping_less(x)
        return x + self.dropout(added)

    def _plain(self, inner: Tensor) -> Tensor:
        return self.outer(self.activation_dropout(F.gelu(inner, approximate=self.gelu)))

    @torch.jit.unused
    def _keeping_less(self, x: Tensor) -> Tensor:
        """The feed-forward layer, its norm and exact GELU computed again in the backward pass."""
        inner = norm_linear(x, self.feed_norm, self.inner)
        dropped = self.training and self.activation_dropout.p > 0
        if self.gelu != "none" or dropped:
            return self._plain(inner)
        return gelu_linear(inner, self.outer)

    def new_cache(self, batch: int, capacity: int, like: Tensor) -> LayerCache:
        """An empty cache of `like`'s type and device."""
        attention = self.self_attention
        shape = (batch, attention.heads, capacity, attention.query.out_features // attention.heads)
        return LayerCache(like.new_zeros(shape), like.new_zeros(shape))

    def reset(self) -> None:
        """Start as the identity: every branch ends in zeros."""
        for end in (self.self_attention.out, self.outer):
            nn.init.zeros_(end.weight)
        if self.cross_attention is not None:
            nn.init.zeros_(self.cross_attention.out.weight)


class GptTower(TextTower):
    """The lower layers of a GPT as text tower."""

    family: ClassVar[Family]

    def __init__(self, config: GptConfig, vocab_size: int) -> None:
        super().__init__()
        self.width, self.context_length = config.width, config.context_length
        self.scale = config.width**0.5 if self.family.scaled else 1.0
        rates = _Rates(config.dropout, config.attention_dropout, config.activation_dropout)
        self.tokens = nn.Embedding(vocab_size, config.width)
        rows = config.positions + self.family.position_offset
        self.positions = nn.Embedding(rows, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            GptLayer(config.width, config.heads, config.inner, self.family.gelu, rates, None)
            for _ in range(config.start, config.end)
        )
        self.norm = nn.LayerNorm(config.width)
        self.pooler: QueryPool | None = None
        if config.pooling == "attention":
            self.pooler = QueryPool(config.width, config.pool_heads)
        if config.freeze:
            for part in (self.tokens, self.positions, self.layers, self.norm):
                part.requires_grad_(requires_grad=False)

    def position_tables(self) -> list[nn.Embedding]:
        return [self.positions]

    @property
    def embedding(self) -> nn.Embedding:
        return self.tokens

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        places = next_places(tokens, caches) + self.family.position_offset
        x = self.dropout(self.scale * self.tokens(tokens) + self.positions(places))
        for i, layer in enumerate(self.layers):
            x = self.run(layer, x, None, caches[i] if caches else None)
        return self.norm(x)

    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        layers = cast("list[GptLayer]", list(self.layers))
        return [layer.new_cache(batch, capacity, like) for layer in layers]

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.pooler is not None:
            return self.pooler(hidden, mask)
        last = mask.sum(1) - 1
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]

    def units(self) -> list[Unit]:
        return [(layer, ()) for layer in self.layers]

    def groups(self) -> list[Group]:
        final: list[nn.Module | nn.Parameter] = [self.norm]
        if self.pooler is not None:
            final.append(self.pooler)
        return [
            ("embeddings", [self.tokens, self.positions]),
            *((f"layer_{i}", [layer]) for i, layer in enumerate(self.layers)),
            ("final_norm", final),
        ]


@TEXT_ENCODERS.register("biogpt")
class BioGptTower(GptTower):
    """Lower layers of BioGPT."""

    Config = BioGptConfig
    family = BIOGPT


@TEXT_ENCODERS.register("gpt2")
class Gpt2Tower(GptTower):
    """Lower layers of GPT-2."""

    Config = Gpt2Config
    family = GPT2


class GptDecoder(ReportDecoder):
    """The upper layers of a GPT as decoder; each also reads the slide."""

    family: ClassVar[Family]

    def __init__(
        self, config: GptDecoderConfig, width: int, vocab_size: int, slide_width: int | None
    ) -> None:
        super().__init__()
        _check_layers("decoder", config.start, config.end, width, config.heads)
        rates = _Rates(config.dropout, config.attention_dropout, config.activation_dropout)
        self.layers = nn.ModuleList(
            GptLayer(width, config.heads, config.inner, self.family.gelu, rates, slide_width)
            for _ in range(config.start, config.end)
        )
        self.norm = nn.LayerNorm(width) if config.norm else None
        self.head_norm = nn.LayerNorm(width) if config.head_norm else None
        self.vocabulary = nn.Linear(width, vocab_size, bias=config.head_bias)
        if config.freeze:
            for layer in cast("list[GptLayer]", list(self.layers)):
                layer.self_attention.requires_grad_(requires_grad=False)

    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        layers = cast("list[GptLayer]", list(self.layers))
        return [layer.new_cache(batch, capacity, like) for layer in layers]

    def view(self, slide_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        layers = cast("list[GptLayer]", list(self.layers))
        attentions = [layer.cross_attention for layer in layers]
        return [a.keys_values(slide_tokens) for a in attentions if a is not None]

    def states(
        self,
        hidden: Tensor,
        slide: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        x = hidden
        for i, layer in enumerate(self.layers):
            x = self.run(layer, x, slide[i] if slide else None, caches[i] if caches else None)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head_norm is None else self.head_norm(x)

    def units(self) -> list[Unit]:
        layers = cast("list[GptLayer]", list(self.layers))
        attentions = [layer.cross_attention for layer in layers]
        # `view` calls these before their layers are called.
        readers: list[Unit] = [(a, ("keys_values",)) for a in attentions if a is not None]
        return [*readers, *((layer, ()) for layer in layers)]

    def groups(self) -> list[Group]:
        last: list[nn.Module | nn.Parameter | None] = [self.norm, self.head_norm, self.vocabulary]
        return [
            *((f"layer_{i}", [layer]) for i, layer in enumerate(self.layers)),
            ("vocabulary", [part for part in last if part is not None]),
        ]


@DECODERS.register("biogpt")
class BioGptDecoder(GptDecoder):
    """Upper layers of BioGPT."""

    Config = BioGptDecoderConfig
    family = BIOGPT


@DECODERS.register("gpt2")
class Gpt2Decoder(GptDecoder):
    """Upper layers of GPT-2."""

    Config = Gpt2DecoderConfig
    family = GPT2


# -- published weights -------------------------------------------------------------------------

# One layer's names: the published one -> ours. GPT-2 has q, k and v in one transposed matrix.
_BIOGPT_LAYER = {
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.out_proj": "self_attention.out",
    "self_attn_layer_norm": "self_norm",
    "cross_attn.q_proj": "cross_attention.query",
    "cross_attn.k_proj": "cross_attention.key",
    "cross_attn.v_proj": "cross_attention.value",
    "cross_attn.out_proj": "cross_attention.out",
    "cross_attn_layer_norm": "cross_norm",
    "fc1": "inner",
    "fc2": "outer",
    "final_layer_norm": "feed_norm",
}
_GPT2_LAYER = {
    "attn.c_proj": "self_attention.out",
    "ln_1": "self_norm",
    "mlp.c_fc": "inner",
    "mlp.c_proj": "outer",
    "ln_2": "feed_norm",
}
_BIOGPT_TOP = {
    "embed_tokens.weight": "tokens.weight",
    "embed_positions.weight": "positions.weight",
    "layer_norm.weight": "norm.weight",
    "layer_norm.bias": "norm.bias",
}
_GPT2_TOP = {
    "wte.weight": "tokens.weight",
    "wpe.weight": "positions.weight",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
}


def rename_biogpt(name: str) -> str | None:
    """BioGPT's name of a tensor -> ours, layers numbered as there; None for what we have not."""
    name = name.removeprefix("biogpt.")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return _BIOGPT_TOP.get(name)
    number, part, kind = found.groups()
    ours = _BIOGPT_LAYER.get(part)
    return None if ours is None else f"layers.{number}.{ours}.{kind}"


def _our_biogpt(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {rename_biogpt(name): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in named.items() if name is not None}


def _our_gpt2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for full, tensor in weights.items():
        name = full.removeprefix("transformer.")
        found = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", name)
        if found is None:
            if name in _GPT2_TOP:
                ours[_GPT2_TOP[name]] = tensor
            continue
        number, part, kind = found.groups()
        value = tensor.T if tensor.ndim == 2 else tensor
        if part == "attn.c_attn":
            for word, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                ours[f"layers.{number}.self_attention.{word}.{kind}"] = third
        elif part in _GPT2_LAYER:
            ours[f"layers.{number}.{_GPT2_LAYER[part]}.{kind}"] = value
    return ours


def our_names(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's tensors under our names, layers numbered as there."""
    return _our_biogpt(weights) if family == BIOGPT else _our_gpt2(weights)


_SHAPES = {  # ours -> the published configurations' words
    BIOGPT: {
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "positions": "max_position_embeddings",
    },
    GPT2: {"width": "n_embd", "heads": "n_head", "inner": "n_inner", "positions": "n_positions"},
}
_LAYERS = {BIOGPT: "num_hidden_layers", GPT2: "n_layer"}
_TYPES = {BIOGPT: "biogpt", GPT2: "gpt2"}


def check_source(
    family: Family, published: Mapping[str, Any], shape: Mapping[str, int], end: int, where: str
) -> None:
    """Compare a folder's config.json with what a model configuration says of it.

    Raises:
        ConfigError: another kind of model, another shape, fewer layers.
    """
    kind = published.get("model_type")
    if kind != _TYPES[family]:
        raise ConfigError(f"{where} is a model of type {kind}, not {_TYPES[family]}")
    had = {ours: published.get(theirs) for ours, theirs in _SHAPES[family].items()}
    if had.get("inner", 0) is None:
        had["inner"] = 4 * published["n_embd"]
    for name, value in shape.items():
        if had[name] != value:
            raise ConfigError(
                f"{where} has {name} {had[name]}, the model's configuration says {value}; write "
                f'"{name}": {had[name]} there'
            )
    layers = published.get(_LAYERS[family], 0)
    if end > layers:
        raise ConfigError(f"{where} has {layers} layers, but layers up to {end} are asked for")
    activation = published.get("hidden_act" if family == BIOGPT else "activation_function")
    wanted = ("gelu",) if family == BIOGPT else ("gelu_new", "gelu_pytorch_tanh")
    if activation not in wanted:
        raise ConfigError(f"{where} has the activation {activation!r}; only {wanted[0]} is known")


def _renumbered(ours: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Tensors of layers `start` to `end`, counted from 0, and those outside of layers."""
    kept: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found is None:
            kept[name] = tensor
        elif start <= int(found[1]) < end:
            kept[f"layers.{int(found[1]) - start}.{found[2]}"] = tensor
    return kept


@torch.no_grad()
def fill_embedding(embedding: nn.Embedding, rows: Tensor) -> None:
    """Take a published table; tokens beyond it start at its mean."""
    count = min(len(rows), embedding.num_embeddings)
    embedding.weight[:count] = rows[:count].to(embedding.weight)
    embedding.weight[count:] = rows.mean(0).to(embedding.weight)


@torch.no_grad()
def load_tower(tower: GptTower, weights: Mapping[str, Tensor], config: GptConfig) -> None:
    """Take a published checkpoint's tensors, under `our_names`."""
    mine = _renumbered(weights, config.start, config.end)
    table = mine.pop("tokens.weight", None)
    if table is None:
        raise CheckpointError(f"{config.source} has no token embedding")
    fill_embedding(tower.tokens, table)
    wanted = {n for n in tower.state_dict() if not n.startswith(("pooler.", "tokens."))}
    _load(tower, mine, wanted, config.source)


@torch.no_grad()
def load_decoder(
    decoder: GptDecoder, weights: Mapping[str, Tensor], config: GptDecoderConfig
) -> None:
    """The same for a decoder. Its vocabulary projection starts as the token embedding."""
    mine = _renumbered(weights, config.start, config.end)
    table = mine.pop("tokens.weight", None)
    if table is not None and not config.tied:
        count = min(len(table), len(decoder.vocabulary.weight))
        decoder.vocabulary.weight[:count] = table[:count].to(decoder.vocabulary.weight)
        decoder.vocabulary.weight[count:] = table.mean(0).to(decoder.vocabulary.weight)
    new = ("cross_", "head_norm", "vocabulary")
    wanted = {n for n in decoder.state_dict() if not any(part in n for part in new)}
    _load(decoder, mine, wanted, config.source)


def _load(module: nn.Module, weights: Mapping[str, Tensor], wanted: set[str], where: str) -> None:
    """Copy `weights` into the tensors named `wanted`, also where LoRA has wrapped a layer."""
    state = {name.replace(".base.", "."): t for name, t in module.state_dict().items()}
    for name in sorted(n.replace(".base.", ".") for n in wanted if ".lora_" not in n):
        if name not in weights:
            raise CheckpointError(f"{where} lacks the weights of {name}")
        if weights[name].shape != state[name].shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(weights[name].shape)}, not {tuple(state[name].shape)}"
            )
        state[name].copy_(weights[name])

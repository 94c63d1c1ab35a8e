"""A model and what belongs to it: new, or as a checkpoint has it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from slidevlm import dist
from slidevlm.app.aligning import align
from slidevlm.app.cohorts import Data
from slidevlm.app.pretrained import Pretrained
from slidevlm.app.weights import Start, differences
from slidevlm.config import Config
from slidevlm.data.cases import Bag
from slidevlm.data.statistics import tile_moments, token_table
from slidevlm.data.telling import telling
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import CheckpointError, ConfigError, DataError
from slidevlm.models import (
    CoCa,
    Model,
    ModelConfig,
    build_model,
    from_dict,
    load_sources,
    resolve,
    zoo,
)
from slidevlm.models.lora import merge_lora
from slidevlm.models.matching import Match, load, match
from slidevlm.train import checkpoint as ckpt

log = logging.getLogger("slidevlm")


@dataclass
class Trained:
    """A model and what belongs to it."""

    model: Model
    config: ModelConfig
    tokenizer: Tokenizer
    siglip: bool
    unit: str | None

    def state(self, weights: dict[str, torch.Tensor] | None = None) -> ckpt.ModelState:
        """For a checkpoint; `weights` where the model itself has parts of them."""
        return ckpt.ModelState(
            weights=self.model.state_dict() if weights is None else weights,
            config=self.config.to_dict(),
            tokenizer=self.tokenizer.to_json(),
            vocab_size=self.tokenizer.vocab_size,
            siglip=self.siglip,
            position_unit=self.unit,
        )


def model_for(config: Config, data: Data, start: Start, device: torch.device) -> Trained:
    """Tokenizer and model: from the checkpoint where there is one, else new."""
    tile = _first_tile(data)
    width, unit = tile.features.shape[1], tile.unit
    saved = start.model
    if saved is not None:
        trained = restore(saved)
        _same_model(config, saved)
        same_data(trained, width, unit)
    else:
        trained = _new_model(config, data, width, unit, start.pretrained)
    dist.broadcast_parameters(trained.model.to(device))
    return trained


def _first_tile(data: Data) -> Bag:
    """One tile of the first specimen that has any, which tells width and unit of all.

    Batches check that all others share them.
    """
    problem = DataError(f"no specimen of split {data.splits[0].name} has a tile")
    for case in data.splits[0].cases:
        try:
            if data.store.length(case):
                return data.store.read(case, np.zeros(1, dtype=np.int64))
        except DataError as error:  # the loader is what reports it, or drops it
            problem = error
    raise problem


def restore(saved: ckpt.ModelState) -> Trained:
    """A model as a checkpoint has it."""
    model_config = from_dict(saved.config, "the checkpoint's model")
    if type(saved.vocab_size) is not int or saved.vocab_size < 1:
        raise CheckpointError(f"the checkpoint's vocabulary has {saved.vocab_size!r:.80} tokens")
    if type(saved.siglip) is not bool or not isinstance(saved.position_unit, str | None):
        raise CheckpointError("the checkpoint does not say what its model was trained on")
    model = build_model(model_config, saved.vocab_size, siglip=saved.siglip)
    try:
        model.load_state_dict(saved.weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's weights do not fit its model: {error}") from error
    tokenizer = Tokenizer.from_json(saved.tokenizer)
    return Trained(model, model_config, tokenizer, saved.siglip, saved.position_unit)


def _same_model(config: Config, saved: ckpt.ModelState) -> None:
    if saved.siglip != config.loss.siglip:
        word = "with" if saved.siglip else "without"
        raise CheckpointError(f"the checkpoint was trained {word} --siglip; do the same here")
    if "model" not in config.given:
        return
    if differs := differences(config.model.model, saved):
        raise CheckpointError(
            f"--model {config.model.model} is not the checkpoint's model: "
            f"{', '.join(differs)} differ; leave --model out to take the checkpoint's"
        )


def same_data(trained: Trained, width: int, unit: str | None, place: str | None = None) -> None:
    """DataError where a model cannot read tiles of this width, or positions in this unit.

    `place` is where they are from; None: all of the data.
    """
    if trained.config.family == "lm":  # reads no tiles
        return
    where = "" if place is None else f"{place}: "
    if trained.config.tile_width != width:
        raise DataError(
            f"{where}the model reads tiles of width {trained.config.tile_width}, this data's "
            f"are {width} wide; use the features of the same tile encoder"
        )
    if trained.unit != unit:
        wants = f"positions in {trained.unit}" if trained.unit else "data without positions"
        has = f"positions in {unit}" if unit else "no positions"
        raise DataError(
            f"{where}the model was trained on {wants}, this data has {has}; convert or add the "
            "positions"
        )


def _new_model(
    config: Config, data: Data, width: int, unit: str | None, pretrained: Pretrained | None
) -> Trained:
    """A model of --model, or of the configuration that came with foreign weights."""
    where = f"--model {config.model.model}"
    if pretrained is not None and pretrained.config and "model" not in config.given:
        where = f"--pretrained {pretrained.name}"
        model_config = from_dict(pretrained.config, where)
    elif pretrained is not None and "model" not in config.given:
        raise ConfigError(
            f"--pretrained {pretrained.name} does not say which model its weights are of; give "
            "--model"
        )
    else:
        model_config = zoo.load(config.model.model)
    if model_config.family != "lm" and model_config.tile_width not in (None, width):
        raise DataError(
            f"{where} wants tiles of width {model_config.tile_width}, this data's are {width} wide"
        )
    model_config = resolve(replace(model_config, tile_width=width))
    # Made by the first process alone: the others must have exactly the same one.
    made = dist.from_main(lambda: _tokenizer_for(model_config, data, pretrained).to_json())
    tokenizer = Tokenizer.from_json(made)
    torch.manual_seed(config.evaluation.seed)
    model = build_model(model_config, tokenizer.vocab_size, siglip=config.loss.siglip)
    if dist.is_main():  # the others get them with the parameters
        _first_weights(config, data, model, model_config, tokenizer, pretrained)
    return Trained(model, model_config, tokenizer, config.loss.siglip, unit)


def _first_weights(
    config: Config,
    data: Data,
    model: Model,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    pretrained: Pretrained | None,
) -> None:
    """Published language models, statistics of the training split, pretrained weights."""
    found = None
    if pretrained is not None:
        weights = _plain_weights(pretrained)
        found = match(model, weights, _of_other_tokens(model, pretrained, tokenizer))
        _tell(config, pretrained, found)
    if found is None or not found.complete:
        load_sources(model, model_config)
        if isinstance(model, CoCa):
            assert data.train is not None, "an evaluation has complete weights"
            seed, rank = config.evaluation.seed, model_config.text.prior_rank
            moments = tile_moments(data.store, data.train.cases, seed)
            table = token_table(tokenizer, data.train.reports, rank, seed) if rank else None
            model.start_from(*moments, table)
            if model.alignment is not None:
                train = data.train
                align(model.alignment, data.store, train.cases, train.reports, tokenizer, seed)
    if found is not None:
        load(model, weights, found)


def _tell(config: Config, pretrained: Pretrained, found: Match) -> None:
    """Log what of pretrained weights is loaded.

    Raises:
        CheckpointError: nothing, or not all of a model that is not to be trained.
    """
    if not found.found:
        raise CheckpointError(
            f"--pretrained {pretrained.name}: nothing in it has name and shape of a tensor of the "
            f"model{_remedy(pretrained)}:\n{found.table()}"
        )
    if config.evaluation.test and not found.complete:
        raise CheckpointError(
            f"--pretrained {pretrained.name} does not fill the model that --test evaluates:\n"
            f"{found.table()}"
        )
    log.info("--pretrained %s:\n%s", pretrained.name, found.table())


def _remedy(pretrained: Pretrained) -> str:
    if pretrained.name != "openai":
        return ""
    return (
        "; OpenAI's CLIP text encoder goes into a text tower of its shape: choose --model "
        "clip_openai_text, or text type hf:openai/clip-vit-base-patch32 in your own configuration"
    )


def _plain_weights(pretrained: Pretrained) -> dict[str, torch.Tensor]:
    """Those of a model of ours with LoRA merged: they fit a model with another or none."""
    state = pretrained.state
    if state is None or not state.config.get("lora"):
        return pretrained.weights
    model = restore(state).model
    merge_lora(model)
    return model.state_dict()


def _of_other_tokens(model: Model, pretrained: Pretrained, tokenizer: Tokenizer) -> set[str]:
    """Tensors with a row for each token, where the weights were made with another tokenizer.

    And those of an alignment, which are one whole, where a part of it does not fit.
    """
    own = {n: t for n, t in model.state_dict().items() if n.startswith("alignment.")}
    given = pretrained.weights
    fits = all(n in given and given[n].shape == t.shape for n, t in own.items())
    state = pretrained.state
    if state is None or Tokenizer.from_json(state.tokenizer).to_json() == tokenizer.to_json():
        return set() if fits else set(own)
    of_tokens = ("text.tokens.", "text.model.", "decoder.vocabulary.", "prior.table")
    return set(own) | {
        name
        for name, tensor in model.state_dict().items()
        if name.startswith(of_tokens) and tensor.ndim and len(tensor) == tokenizer.vocab_size
    }


def _tokenizer_for(
    model_config: ModelConfig, data: Data, pretrained: Pretrained | None
) -> Tokenizer:
    """The tokenizer that token vectors of pretrained weights were made with, or a new one."""
    if model_config.text.tokenizer_source == "train":
        if pretrained is not None and pretrained.state is not None:
            before = from_dict(pretrained.state.config, f"--pretrained {pretrained.name}")
            if before.text.tokenizer_source == "train":
                return Tokenizer.from_json(pretrained.state.tokenizer)
        if data.train is None:
            raise CheckpointError(
                "these weights come without a tokenizer; they cannot be evaluated"
            )
    reports = () if data.train is None else data.train.reports
    return new_tokenizer(model_config.text, reports)


def new_tokenizer(text: Any, reports: Sequence[str]) -> Tokenizer:
    """Trained on the reports, or from the folder that the model's configuration names.

    `text` is the `text` part of a model's configuration, of any type.
    """
    if text.tokenizer_source == "train":
        told = telling(reports, "training the tokenizer on reports", len(reports))
        return Tokenizer.train(told, text.vocab_size)
    return Tokenizer.from_folder(text.tokenizer_source)

"""A model and what belongs to it: new, or as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from slidevlm import dist
from slidevlm.app.cohorts import Data
from slidevlm.app.weights import Start
from slidevlm.config import Config
from slidevlm.data.cases import Bag
from slidevlm.data.statistics import tile_moments, token_table
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import CheckpointError, DataError
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
from slidevlm.train import checkpoint as ckpt


@dataclass
class Trained:
    """A model and what belongs to it."""

    model: Model
    config: ModelConfig
    tokenizer: Tokenizer
    siglip: bool
    unit: str | None

    def state(self) -> ckpt.ModelState:
        """For a checkpoint."""
        return ckpt.ModelState(
            weights=self.model.state_dict(),
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
        _same_data(trained, width, unit)
    else:
        trained = _new_model(config, data, width, unit)
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
    model = build_model(model_config, saved.vocab_size, siglip=saved.siglip)
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights do not fit its model: {error}") from error
    tokenizer = Tokenizer.from_json(saved.tokenizer)
    return Trained(model, model_config, tokenizer, saved.siglip, saved.position_unit)


def _same_model(config: Config, saved: ckpt.ModelState) -> None:
    if saved.siglip != config.loss.siglip:
        word = "with" if saved.siglip else "without"
        raise CheckpointError(f"the checkpoint was trained {word} --siglip; do the same here")
    if "model" not in config.given:
        return
    # Read and written again, it has the keys that came after the checkpoint.
    had = from_dict(saved.config, "the checkpoint's model").to_dict()
    wanted = zoo.load(config.model.model).to_dict() | {"tile_width": had["tile_width"]}
    if wanted != had:
        differs = [k for k in wanted.keys() | had.keys() if wanted.get(k) != had.get(k)]
        raise CheckpointError(
            f"--model {config.model.model} is not the checkpoint's model: "
            f"{', '.join(sorted(differs))} differ; leave --model out to take the checkpoint's"
        )


def _same_data(trained: Trained, width: int, unit: str | None) -> None:
    if trained.config.family == "lm":  # reads no tiles
        return
    if trained.config.tile_width != width:
        raise DataError(
            f"the model reads tiles of width {trained.config.tile_width}, this data's are {width} "
            "wide; use the features of the same tile encoder"
        )
    if trained.unit != unit:
        raise DataError(
            f"the model was trained on positions in {trained.unit}, this data has {unit}; "
            "convert the positions"
        )


def _new_model(config: Config, data: Data, width: int, unit: str | None) -> Trained:
    model_config = zoo.load(config.model.model)
    if model_config.tile_width not in (None, width):
        raise DataError(
            f"--model {config.model.model} wants tiles of width {model_config.tile_width}, this "
            f"data's are {width} wide"
        )
    model_config = resolve(replace(model_config, tile_width=width))
    assert data.train is not None, "validate has made sure of a training split"
    reports, text = data.train.reports, model_config.text
    # Made by the first process alone: the others must have exactly the same one.
    made = dist.from_main(lambda: new_tokenizer(text, reports).to_json())
    tokenizer = Tokenizer.from_json(made)
    torch.manual_seed(config.evaluation.seed)
    model = build_model(model_config, tokenizer.vocab_size, siglip=config.loss.siglip)
    if dist.is_main():  # the others get them with the parameters
        seed, rank = config.evaluation.seed, model_config.text.prior_rank
        load_sources(model, model_config)
        if isinstance(model, CoCa):
            moments = tile_moments(data.store, data.train.cases, seed)
            table = token_table(tokenizer, data.train.reports, rank, seed) if rank else None
            model.start_from(*moments, table)
    return Trained(model, model_config, tokenizer, config.loss.siglip, unit)


def new_tokenizer(text: Any, reports: Sequence[str]) -> Tokenizer:
    """Trained on the reports, or from the folder that the model's configuration names.

    `text` is the `text` part of a model's configuration, of any type.
    """
    if text.tokenizer_source == "train":
        return Tokenizer.train(reports, text.vocab_size)
    return Tokenizer.from_folder(text.tokenizer_source)

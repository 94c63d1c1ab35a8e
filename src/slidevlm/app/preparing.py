"""What the model arguments make of a model that has its weights: locked, quantised, compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from slidevlm import dist, fsdp
from slidevlm.app.trained import Trained
from slidevlm.config import BNB_LINEAR, Config
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, Model
from slidevlm.models.cast import cast_weights
from slidevlm.models.compile import compile_regions, script_regions
from slidevlm.models.freeze import lock_image, lock_text, nothing_to_train
from slidevlm.models.mode import Recomputing
from slidevlm.models.quantize import quantise_linears
from slidevlm.models.trace import trace
from slidevlm.models.units import units
from slidevlm.precision import Precision

log = logging.getLogger("slidevlm")


def prepare(config: Config, trained: Trained, precision: Precision) -> None:
    """Change the model as the arguments say; after its weights are there, before the optimizer.

    Raises:
        ConfigError: what the model cannot be or have.
    """
    model, wanted = trained.model, config.model
    training = not config.evaluation.test
    if training:
        _lock(config, model)
    elif wanted.lock_image or wanted.lock_text:
        log.info("--lock-image and --lock-text have no effect here: nothing is trained")
    if config.distributed.use_bn_sync:
        dist.synchronise_batch_norm(model)
    if wanted.use_bnb_linear is not None:
        kind = BNB_LINEAR[wanted.use_bnb_linear]
        changed = quantise_linears(model, kind, training=training)
        log.info("--use-bnb-linear %s: %d linear layers changed", wanted.use_bnb_linear, changed)
    if precision.weights_dtype is not None:
        narrow, everything = precision.weights_dtype, precision.everything
        count = cast_weights(model, narrow, everything=everything)
        log.info("--precision %s: %d numbers in %s", config.optim.precision, count, narrow)
    if wanted.grad_checkpointing:
        for module in model.modules():
            if isinstance(module, Recomputing):
                module.checkpointing = True
    if wanted.torchcompile:
        log.info("--torchcompile: %s", ", ".join(compile_regions(model)))
    if wanted.torchscript:
        log.info("--torchscript: %s", ", ".join(script_regions(model)))
    if wanted.trace:
        if not isinstance(model, CoCa):
            raise ConfigError(
                f"--trace: model {config.model_name} encodes neither images nor texts; leave it out"
            )
        trace(model)


def cut(
    config: Config, trained: Trained, precision: Precision
) -> tuple[Trained, Callable[[], AbstractContextManager[None]]]:
    """--fsdp: leave this process its part of every weight; after `prepare`.

    Returns:
        What is evaluated, and a context within which it has the weights of that moment.
    """
    wanted = config.distributed.fsdp
    if wanted and config.evaluation.test:
        log.info("--fsdp has no effect here: nothing is trained")
    elif wanted and dist.world_size() == 1:
        log.info("--fsdp does nothing: this is one process; start several with torchrun or srun")
    elif wanted:
        whole = fsdp.Whole(trained.model)
        fsdp.shard(trained.model, units(trained.model), precision.device)
        numbers = sum(fsdp.part(p).numel() for p in trained.model.parameters())
        log.info("--fsdp: %.2f million numbers on this process", numbers / 1e6)
        return replace(trained, model=whole.model), whole.filled
    return trained, nullcontext


def _lock(config: Config, model: Model) -> None:
    wanted = config.model
    if wanted.lock_image:
        if not isinstance(model, CoCa):
            raise ConfigError(f"--lock-image: model {config.model_name} has no image tower")
        lock_image(
            model,
            wanted.lock_image_unlocked_groups,
            freeze_statistics=wanted.lock_image_freeze_bn_stats,
        )
    if wanted.lock_text:
        lock_text(
            model,
            wanted.lock_text_unlocked_layers,
            freeze_layer_norm=wanted.lock_text_freeze_layer_norm,
        )
    if nothing_to_train(model, with_captions=config.loss.coca_caption_loss_weight > 0):
        raise ConfigError(
            f"model {config.model_name}: everything is frozen and nothing is left to train; lock "
            "one tower, or leave some groups or layers unlocked"
        )
    if wanted.lock_image or wanted.lock_text:
        counts = [p.numel() for p in model.parameters() if p.requires_grad]
        whole = sum(p.numel() for p in model.parameters())
        log.info("%.2f of %.2f million parameters train", sum(counts) / 1e6, whole / 1e6)

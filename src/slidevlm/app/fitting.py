"""Training: everything the loop needs, chosen from the configuration."""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from slidevlm import dist, fsdp
from slidevlm.app.cohorts import Data
from slidevlm.app.datasets import bag_dataset
from slidevlm.app.judging import Judge
from slidevlm.app.trained import Trained
from slidevlm.app.weights import Start
from slidevlm.config import Config
from slidevlm.data.augment import Augmentation
from slidevlm.data.dataset import BagDataset, make_loader
from slidevlm.data.sampling import TrainBatches
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.flags import to_yaml
from slidevlm.models import CoCa
from slidevlm.precision import Precision
from slidevlm.run import CHECKPOINTS, Run, peak_memory
from slidevlm.train import checkpoint as ckpt
from slidevlm.train import schedule
from slidevlm.train.average import Average
from slidevlm.train.best import Best
from slidevlm.train.interrupt import Interrupts
from slidevlm.train.loop import Plan
from slidevlm.train.loop import train as run_loop
from slidevlm.train.optim import (
    describe,
    layer_factors,
    load_state,
    make_optimizer,
    parameter_groups,
)
from slidevlm.train.step import Objective, Step, sigmoid_term, softmax_term
from slidevlm.train.watch import Rhythm, RunWatcher

log = logging.getLogger("slidevlm")


@dataclass(frozen=True)
class Fitted:
    """How training ended."""

    metrics: dict[str, float]  # of the last evaluation
    finished: bool  # False: a signal ended it before


def fit(
    config: Config,
    data: Data,
    trained: Trained,
    precision: Precision,
    start: Start,
    run: Run,
    folder: Path | None,
    judge: Judge,
    interrupts: Interrupts,
) -> Fitted:
    """Train, from the first step or from where `start` has come; a collective call.

    Raises:
        SlideVLMError: arguments, data or a checkpoint that do not go together.
    """
    assert data.train is not None, "validate has made sure of a training split"
    optim = config.optim
    objective = _objective(config, trained)
    seed_everything(config.evaluation.seed + 1 + dist.rank())
    augmentation = _augmentation(config, trained)
    dataset = bag_dataset(config, data.store, data.train, trained, augmentation, training=True)
    batches = _train_batches(config, dataset)
    pin = precision.device.type == "cuda"
    loader = make_loader(dataset, batches, config.data.workers, pin_memory=pin, bad=judge.bad)
    optimizer = _optimizer(config, trained)
    groups = describe(optimizer)
    step = _step(config, trained, optimizer, objective, precision)
    log.debug("parameter groups:\n%s", groups)
    run.write("parameter_groups.txt", groups + "\n")
    steps_an_epoch = len(batches) // optim.accum_freq
    plan = Plan(optim.epochs, optim.accum_freq, _schedule(config, steps_an_epoch), precision.device)
    order = _order(config, dataset, batches)
    average = _average(config, trained, start)
    progress = ckpt.Progress()
    if start.training is not None:
        progress = _go_on(start.training, step, order, optim.accum_freq)
        if progress.epoch >= optim.epochs:
            log.warning(
                "the checkpoint has %d epochs behind it and --epochs is %d: nothing is left to "
                "train; give more --epochs to go on",
                progress.epoch,
                optim.epochs,
            )

    watcher = RunWatcher(
        run,
        _keeper(config, folder),
        _states(config, trained, step, average, order),
        _evaluation(judge, data, average, interrupts),
        _rhythm(config, steps_an_epoch),
        progress,
        {} if start.training is None else start.training.metrics,
        interrupts,
        peak_memory if config.logging.log_memory else dict,
        (lambda step: None) if average is None else average.update,
        _best(config, data, judge, start),
    )
    step.optimizer.register_step_pre_hook(lambda *_: watcher.settle())
    with _closing(watcher):
        end = run_loop(step, loader, batches, plan, watcher, progress)
    if step.skipped:
        log.warning("%d steps were skipped: loss or gradient not finite", step.skipped)
    if watcher.stops:
        _tell_how_to_go_on(folder, end)
    elif average is not None:
        average.put()  # what comes after training is of the averages
    return Fitted(watcher.metrics, finished=not watcher.stops)


def _evaluation(
    judge: Judge, data: Data, average: Average | None, interrupts: Interrupts
) -> Callable[[int, bool, int], dict[str, float]]:
    """Epoch, whether to write reports, step -> metrics; of the averages where there are any."""

    def evaluate(epoch: int, write: bool, at: int) -> dict[str, float]:
        with nullcontext() if average is None else average.in_place():
            return judge.epoch(data.vals, epoch, write, at, interrupts.came)

    return evaluate


@contextmanager
def _closing(watcher: RunWatcher) -> Iterator[None]:
    """Close the watcher at the end, at once where Ctrl-C has been pressed again."""
    try:
        yield
    except KeyboardInterrupt:
        watcher.close(at_once=True)
        raise
    finally:
        watcher.close()


def _order(config: Config, dataset: BagDataset, batches: TrainBatches) -> dict[str, int]:
    """What decides which specimens each step has: the same where a run goes on within an epoch."""
    data, optim = config.data, config.optim
    return {
        "specimens": len(dataset),
        "names": _checksum(case.specimen for case in dataset.cases),
        "reports": _checksum(dataset.reports),
        "global_batch": data.batch_size * dist.world_size() * optim.accum_freq,
        "seed": config.evaluation.seed,
        "similar_lengths": batches.lengths_id(),
    }


def _checksum(texts: Iterable[str]) -> int:
    value = 0
    for text in texts:
        value = zlib.crc32(text.encode(errors="surrogatepass") + b"\0", value)
    return value


def _states(
    config: Config, trained: Trained, step: Step, average: Average | None, order: dict[str, int]
) -> Callable[[ckpt.Progress, dict[str, float]], tuple[ckpt.ModelState, ckpt.TrainState]]:
    """Progress and metrics -> what a checkpoint holds; a collective call."""

    def state(
        at: ckpt.Progress, metrics: dict[str, float]
    ) -> tuple[ckpt.ModelState, ckpt.TrainState]:
        model = _steady(trained)
        if average is not None:
            model = replace(model, averaged=average.state())
        return model, ckpt.TrainState(
            progress=at,
            optimizer=step.optimizer.state_dict(),
            scaler=step.scaler.state_dict(),
            random=dist.gather_objects(ckpt.random_state()),
            order=order,
            skipped=step.skipped,
            config=to_yaml(config),
            metrics=metrics,
            threads=torch.get_num_threads(),
            accum_freq=config.optim.accum_freq,
        )

    return state


def _steady(trained: Trained) -> ckpt.ModelState:
    """The model's state, of which nothing changes before the optimizer's next step.

    Buffers such as BatchNorm's statistics would: they are copied. A model that is cut is joined.
    """
    if any(map(fsdp.is_cut, trained.model.parameters())):
        return trained.state(fsdp.state_dict(trained.model))
    parameters = {p.data_ptr() for p in trained.model.parameters()}
    state = trained.state()
    return replace(
        state,
        weights={
            name: tensor if tensor.data_ptr() in parameters else tensor.clone()
            for name, tensor in state.weights.items()
        },
    )


def _average(config: Config, trained: Trained, start: Start) -> Average | None:
    """Of --ema, as a checkpoint has it, or beginning with the weights there are."""
    decay, saved = config.checkpoint.ema, start.training is not None and start.model is not None
    had = start.model.averaged if saved and start.model is not None else {}
    if decay is None:
        if had:
            raise CheckpointError(
                "the checkpoint has an average of the weights, which would be lost: resume with "
                "--ema DECAY, too"
            )
        return None
    average = Average(trained.model, decay)
    if had:
        average.load_state(had)
    elif saved:
        log.warning("the checkpoint has no average of the weights; --ema begins with its weights")
    return average


def _best(config: Config, data: Data, judge: Judge, start: Start) -> Best | None:
    wanted = config.checkpoint.save_best
    if wanted is None:
        return None
    known = dist.from_main(lambda: judge.metric_names(data.vals))
    return Best(wanted, known, None if start.training is None else start.training.best)


def _optimizer(config: Config, trained: Trained) -> torch.optim.Optimizer:
    optim = config.optim
    factors = None
    if optim.layer_decay != 1:
        factors = layer_factors(trained.model, optim.layer_decay)
    return make_optimizer(
        optim.opt,
        parameter_groups(trained.model, optim.wd, factors),
        lr=_known(optim.lr),
        betas=(_known(optim.beta1), optim.beta2 or 0.0),  # None where the optimizer has none
        eps=optim.eps or 0.0,
    )


def _step(
    config: Config,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    precision: Precision,
) -> Step:
    ragged = config.data.skip_bad_specimens
    overlap = config.distributed.ddp_static_graph
    if overlap and dist.world_size() == 1:
        log.info("--ddp-static-graph does nothing: one process has no gradients to exchange")
    return Step(
        trained.model,
        optimizer,
        objective,
        precision,
        config.optim.grad_clip_norm,
        ragged=ragged,
        overlap=overlap,
    )


def _keeper(config: Config, folder: Path | None) -> ckpt.Keeper:
    return ckpt.Keeper(
        None if folder is None else folder / CHECKPOINTS,
        every_epochs=config.checkpoint.save_frequency,
        epochs=config.optim.epochs,
        most_recent=config.checkpoint.save_most_recent,
        delete_previous=config.checkpoint.delete_previous_checkpoint,
    )


def _rhythm(config: Config, steps_an_epoch: int) -> Rhythm:
    return Rhythm(
        epochs=config.optim.epochs,
        steps_an_epoch=steps_an_epoch,
        log_every_n_steps=config.logging.log_every_n_steps,
        save_every_n_steps=config.checkpoint.save_every_n_steps,
        val_frequency=config.evaluation.val_frequency,
        caption_val_frequency=config.evaluation.caption_val_frequency,
        eval_grace_period=config.evaluation.eval_grace_period,
        captions=config.evaluation.save_captions,
    )


def _tell_how_to_go_on(folder: Path | None, end: ckpt.Progress) -> None:
    if folder is None:
        log.warning("ended after step %d; nothing was saved (--logs None)", end.step)
    else:
        log.warning(
            "ended after step %d and saved; go on with the same command and --name %s --resume "
            "latest",
            end.step,
            folder.name,
        )


def _augmentation(config: Config, trained: Trained) -> Augmentation:
    """--aug-cfg, and a warning where nothing would come of it.

    Raises:
        ConfigError: it would move positions that are not there, or change tiles that nobody reads.
    """
    if not config.data.aug_transforms:
        return Augmentation()
    if not isinstance(trained.model, CoCa):
        raise ConfigError(
            "--aug-cfg changes bags of tiles, which a language model does not read; leave it out"
        )
    keys = {k: v for k, v in config.data.aug_cfg.items() if k != "transform_type"}
    augmentation = Augmentation(config.data.aug_transforms, **keys)
    if augmentation.moves and trained.unit is None:
        raise ConfigError(
            f"--aug-cfg {', '.join(augmentation.moves)} moves positions, and this data has none; "
            "leave it out or add positions to the data"
        )
    if augmentation.moves and not trained.model.slide.reads_positions:
        log.warning(
            "--aug-cfg %s: without effect; the slide encoder of model %s does not read positions",
            ", ".join(augmentation.moves),
            config.model_name,
        )
    return augmentation


def _train_batches(config: Config, dataset: BagDataset) -> TrainBatches:
    data, accum_freq, world_size = config.data, config.optim.accum_freq, dist.world_size()
    # A step that is one batch of one process has nothing to balance, and needs no lengths.
    parted = data.bucket == "balance" and world_size * accum_freq > 1
    return TrainBatches(
        len(dataset),
        data.batch_size,
        config.evaluation.seed,
        rank=dist.rank(),
        world_size=world_size,
        accum_freq=accum_freq,
        lengths=dist.from_main(dataset.lengths) if parted or data.bucket == "length" else None,
        similar=data.bucket == "length",
    )


def _known(value: float | None) -> float:
    assert value is not None, "with_adam_defaults has filled it"
    return value


def _objective(config: Config, trained: Trained) -> Objective:
    """The loss terms of the model's family.

    Raises:
        ConfigError: the weights leave it nothing to learn, or speak of what it lacks.
    """
    loss, family = config.loss, trained.config.family
    contrastive = loss.coca_contrastive_loss_weight
    if family == "clip" and contrastive == 0:
        raise ConfigError(
            "--coca-contrastive-loss-weight 0 leaves a clip model nothing to learn; "
            "train a coca model or give a weight"
        )
    if (
        family == "clip"
        and loss.coca_caption_loss_weight
        and "coca_caption_loss_weight" in config.given
    ):
        raise ConfigError(
            "--coca-caption-loss-weight is about reports that a model writes, and a clip model "
            "writes none; leave it out"
        )
    if family == "lm":
        asked = {
            "--siglip": loss.siglip,
            "--coca-contrastive-loss-weight": contrastive
            and "coca_contrastive_loss_weight" in config.given,
            "--local-loss": loss.local_loss,
            "--gather-with-grad": loss.gather_with_grad,
            "--false-negatives": "false_negatives" in config.given,
        }
        if wanted := ", ".join(flag for flag, value in asked.items() if value):
            raise ConfigError(
                "a language model does not read slides and has no contrastive loss: leave out "
                f"{wanted}"
            )
        if loss.coca_caption_loss_weight == 0:
            raise ConfigError(
                "--coca-caption-loss-weight 0 leaves a language model nothing to learn"
            )
        contrastive = 0.0
    return Objective(
        sigmoid_term if loss.siglip else softmax_term,
        contrastive,
        loss.coca_caption_loss_weight,
        mask_duplicates=loss.false_negatives == "mask",
        local_loss=loss.local_loss,
        gather_with_grad=loss.gather_with_grad,
    )


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random; data order and draws have seeds of their own."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _schedule(config: Config, steps_an_epoch: int) -> schedule.Schedule:
    optim = config.optim
    rate, total = _known(optim.lr), optim.epochs * steps_an_epoch
    if optim.skip_scheduler or optim.lr_scheduler == "const":
        return schedule.constant(rate, optim.warmup)
    if optim.lr_scheduler == "cosine":
        return schedule.cosine(rate, optim.warmup, total)
    cooldown = (optim.epochs_cooldown or 0) * steps_an_epoch
    return schedule.constant_cooldown(
        rate, optim.warmup, total, cooldown, optim.lr_cooldown_power, optim.lr_cooldown_end
    )


def _go_on(
    saved: ckpt.TrainState, step: Step, order: dict[str, int], accum_freq: int
) -> ckpt.Progress:
    """Restore optimizer, scaler and random state; refuse what would silently drift.

    Returns where to go on: a step may be made of other micro-batches than before.
    """
    progress = saved.progress
    # A checkpoint from before something was compared does not tell it.
    was = {name: saved.order.get(name, order[name]) for name in order}
    if was != order:
        differs = ", ".join(
            f"other {k}" if k in ("names", "reports") else f"{k} {was[k]} -> {order[k]}"
            for k in order
            if was[k] != order[k]
        )
        if progress.batch:
            raise CheckpointError(
                "the checkpoint lies within an epoch, but the data or its order changed "
                f"({differs}); use the same data and --seed, and keep --batch-size x processes x "
                "--accum-freq as it was, or take a checkpoint from the end of an epoch"
            )
        log.warning("the data or its order is not that of the checkpoint (%s)", differs)
    elif saved.accum_freq:
        progress = replace(progress, batch=progress.batch // saved.accum_freq * accum_freq)
    load_state(step.optimizer, saved.optimizer)
    step.scaler.load_state_dict(saved.scaler)
    step.skipped = saved.skipped
    if len(saved.random) == dist.world_size():
        ckpt.set_random_state(saved.random[dist.rank()])
    else:
        log.warning(
            "saved by %d processes, going on with %d: dropout is drawn anew",
            len(saved.random),
            dist.world_size(),
        )
    threads = torch.get_num_threads()
    if threads != saved.threads and step.precision.device.type == "cpu":
        log.warning(
            "saved with %d threads, going on with %d: sums on a CPU depend on their number, so "
            "the weights agree with those of an uninterrupted run only to rounding; for the same "
            "bits set OMP_NUM_THREADS=%d",
            saved.threads,
            threads,
            saved.threads,
        )
    return progress

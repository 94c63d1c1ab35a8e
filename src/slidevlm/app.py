"""The composition root: the only code that sees the whole Config and builds everything from it."""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidevlm import dist
from slidevlm.batch import Predictions
from slidevlm.config import Config, given_values, validate, with_adam_defaults, with_values
from slidevlm.data.augment import Augmentation
from slidevlm.data.cases import Bag, CaseStore, open_store
from slidevlm.data.cohort import hold_together
from slidevlm.data.dataset import BadSpecimens, BagDataset, StopAtBad, make_loader, pad
from slidevlm.data.reports import read_text_file
from slidevlm.data.sampling import EvalBatches, TrainBatches
from slidevlm.data.splits import Split, check_leakage, resolve
from slidevlm.data.statistics import tile_moments, token_table
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import CheckpointError, ConfigError, DataError, SlideVLMError
from slidevlm.eval import Task, TaskResult, evaluate
from slidevlm.eval.predict import Writing, predict
from slidevlm.eval.prompts import read_labels, read_prompts
from slidevlm.eval.tasks.captions import captions
from slidevlm.eval.tasks.retrieval import retrieval
from slidevlm.eval.tasks.zero_shot import ZeroShot, class_embeddings
from slidevlm.flags import read_yaml, to_yaml
from slidevlm.models import CoCa, ModelConfig, build_model, from_dict, zoo
from slidevlm.models.generate import Decoding
from slidevlm.models.mode import evaluation_mode
from slidevlm.models.text import TextConfig
from slidevlm.precision import Precision
from slidevlm.precision import resolve as resolve_precision
from slidevlm.report.summary import summary
from slidevlm.run import CHECKPOINTS, METRICS, Bar, Run, configure_logging, environment
from slidevlm.train import checkpoint as ckpt
from slidevlm.train import schedule
from slidevlm.train.loop import Plan
from slidevlm.train.loop import train as run_loop
from slidevlm.train.optim import adamw, load_state
from slidevlm.train.step import Objective, Step, sigmoid_term, softmax_term
from slidevlm.train.watch import Rhythm, RunWatcher

log = logging.getLogger("slidevlm")

_TEXTS = 256  # prompts embedded at a time: ensembles of published prompts are thousands


@dataclass(frozen=True)
class Data:
    """The cohort and its splits."""

    store: CaseStore
    train: Split | None
    vals: tuple[Split, ...]
    test: Split | None

    @property
    def splits(self) -> list[Split]:
        """Those that are there, in the order train, validation, test."""
        return [s for s in (self.train, *self.vals, self.test) if s is not None]


@dataclass(frozen=True)
class Start:
    """What a run begins with: nothing, weights, or a whole state."""

    model: ckpt.ModelState | None = None
    training: ckpt.TrainState | None = None


@dataclass
class Trained:
    """A model and what belongs to it."""

    model: CoCa
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


def train(config: Config) -> dict[str, float]:
    """Train (or, with --test, only evaluate) as the arguments say.

    Returns:
        The last metrics: those of the test split where one is given, else of validation.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    validate(config)
    config = with_adam_defaults(config)
    device = choose_device(config)
    dist.start(config.distributed.dist_backend, device)
    try:
        configure_logging(debug=config.logging.debug, main=dist.is_main())
        precision = resolve_precision(config.optim.precision, device)
        with _debugging(config.logging.debug):
            return _train(with_device(config, device), precision)
    finally:
        dist.stop()


def evaluate_run(run: Path, overrides: Config | None = None) -> dict[str, float]:
    """Evaluate a run's newest checkpoint on its splits, or as `overrides` says otherwise.

    Writes into `<run>/evaluation-<time>` unless `overrides` names another place.

    Returns:
        Metrics by `<split>/<task>/<metric>`.
    """
    saved = run / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    values = read_yaml(saved)
    given = {} if overrides is None else given_values(overrides)
    # What belongs to training alone would be refused, or evaluate the training split unasked.
    values = {k: v for k, v in values.items() if k not in ("train_split", "num_samples", "device")}
    place = {"logs": str(run), "name": time.strftime("evaluation-%Y_%m_%d-%H_%M_%S")}
    if "resume" not in given and "pretrained" not in given:
        values["pretrained"] = str(run)
    return train(with_values(Config(), {**values, **place, **given, "test": True}))


def choose_device(config: Config) -> torch.device:
    """--device, and the CPU where the default does not exist.

    Raises:
        ConfigError: a device asked for that does not exist.
    """
    name = config.optim.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device; try cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device {name} is not supported; use cuda or cpu")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        if "device" in config.given:
            raise ConfigError(f"--device {name}: torch finds no CUDA device here; use --device cpu")
        if dist.local_rank() == 0:
            log.warning("no CUDA device here; training on the CPU")
        return torch.device("cpu")
    if device.index is None:
        index = 0 if config.distributed.no_set_device_rank else dist.local_rank()
        device = torch.device("cuda", index)
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device: no {device}; torch sees {torch.cuda.device_count()} CUDA devices"
        )
    torch.cuda.set_device(device)
    return device


def with_device(config: Config, device: torch.device) -> Config:
    """The configuration as resolved, for the run folder."""
    return replace(config, optim=replace(config.optim, device=device.type))


@contextmanager
def _debugging(enabled: bool) -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(enabled):
        yield


def _train(config: Config, precision: Precision) -> dict[str, float]:
    with _claimed_folder(config) as folder:
        return _train_in(folder, config, precision)


@contextmanager
def _claimed_folder(config: Config) -> Iterator[Path | None]:
    """The run folder; gone again when a user's error ends the run before it did any work."""
    is_new = config.logs is not None and config.checkpoint.resume is None
    folder = _claim_folder(config)
    try:
        yield folder
    except SlideVLMError:
        if is_new and folder is not None and dist.is_main() and not _has_work(folder):
            shutil.rmtree(folder)
        raise


def _has_work(folder: Path) -> bool:
    metrics, saved = folder / METRICS, folder / CHECKPOINTS
    return (metrics.exists() and metrics.stat().st_size > 0) or saved.exists()


def _train_in(folder: Path | None, config: Config, precision: Precision) -> dict[str, float]:
    start = start_of(config, folder)
    data = open_data(config)
    trained = _model(config, data, start, precision.device)
    new = folder is not None and dist.is_main()
    with Run(folder if new else None, sorted(config.reports), _told_until(config, start)) as run:
        run.write(_config_name(config, folder), to_yaml(config))
        run.write("tokenizer.json", trained.tokenizer.to_json())
        run.write_json("model.json", trained.config.to_dict())
        run.write_json("environment.json", environment())
        for split in data.splits:
            if split.missing:
                run.write(f"missing_{split.name}.txt", "\n".join(split.missing) + "\n")
        parameters = sum(p.numel() for p in trained.model.parameters())
        log.info(
            "model %s: %.1f million parameters, tile width %d, vocabulary %d, on %s",
            config.model.model,
            parameters / 1e6,
            trained.config.tile_width,
            trained.tokenizer.vocab_size,
            precision.device,
        )
        if dist.is_main():
            _tell_truncated(config, data, trained)
        bad = BadSpecimens() if config.data.skip_bad_specimens else StopAtBad()
        judge = Judge(config, data.store, trained, precision, run, bad)
        if config.evaluation.test:
            metrics = judge.final(data.splits, "evaluation")
        else:
            metrics = _fit(config, data, trained, precision, start, run, folder, judge)
            if data.test is not None:
                metrics = judge.final([data.test], "test")
        _list_bad(bad, run)
    if folder is not None and dist.is_main():
        log.info("run folder: %s", folder)
    return metrics


def _told_until(config: Config, start: Start) -> int | None:
    """The step up to which an earlier process's lines still hold; None where all of them do."""
    if config.evaluation.test or config.checkpoint.resume is None:
        return None
    return 0 if start.training is None else start.training.progress.step


def _config_name(config: Config, folder: Path | None) -> str:
    """An evaluation in the folder of a training does not take the place of its settings."""
    if config.evaluation.test and folder is not None and (folder / "config.yaml").exists():
        return "evaluation.yaml"
    return "config.yaml"


def _tell_truncated(config: Config, data: Data, trained: Trained) -> None:
    for split in data.splits:
        cut = bag_dataset(config, data.store, split, trained, training=False).truncated()
        if cut:
            log.warning(
                "split %s: %d of %d reports are longer than the model's context of %d tokens and "
                "are cut, after a sentence where that keeps half of it",
                split.name,
                cut,
                len(split),
                trained.config.text.context_length,
            )


def _list_bad(bad: BadSpecimens | StopAtBad, run: Run) -> None:
    """Tell at the end what the processes have dropped."""
    found: dict[str, str] = {}
    for messages in dist.gather_objects(dict(bad.messages)):
        found |= messages
    if found:
        lines = [f"{name}: {message}" for name, message in sorted(found.items())]
        log.warning("%d bad specimens were dropped:\n%s", len(found), "\n".join(lines))
        run.write("bad_specimens.txt", "\n".join(lines) + "\n")


def _claim_folder(config: Config) -> Path | None:
    """The run folder, made by the first process; an existing run is an error on every rank."""
    logs = config.logs
    if logs is None:
        return None
    name = dist.broadcast_object(config.logging.name or default_name(config))
    folder = logs / name
    problem = None
    if dist.is_main():
        resumes = config.checkpoint.resume is not None
        if folder.exists() and not resumes:
            problem = f"run {name!r} exists in {logs}; choose another --name or --resume latest"
        else:
            try:
                folder.mkdir(parents=True, exist_ok=resumes)
            except OSError as error:
                problem = f"--logs: cannot make {folder}: {error}"
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)
    return folder


def default_name(config: Config) -> str:
    """`YYYY_MM_DD-HH_MM_SS-model_..-lr_..-b_..-j_..-p_..`."""
    return "-".join(
        [
            time.strftime("%Y_%m_%d-%H_%M_%S"),
            f"model_{Path(config.model.model).stem}",
            f"lr_{config.optim.lr:g}",
            f"b_{config.data.batch_size}",
            f"j_{config.data.workers}",
            f"p_{config.optim.precision}",
        ]
    )


def start_of(config: Config, folder: Path | None) -> Start:
    """What --resume and --pretrained name; `folder` is the run's."""
    resume, pretrained = config.checkpoint.resume, config.model.pretrained
    if resume == "latest":
        assert folder is not None, "validate has refused --resume latest without a run folder"
        found = ckpt.newest(folder / CHECKPOINTS)
        if found is not None:
            log.info("going on from %s", found[0])
            return Start(found[1], found[2])
        if config.evaluation.test:
            raise CheckpointError(f"no checkpoint in {folder / CHECKPOINTS}; train the run first")
        log.warning("no checkpoint in %s yet; starting at the beginning", folder / CHECKPOINTS)
    elif resume is not None:
        log.info("going on from %s", resume)
        return Start(*ckpt.load(Path(resume)))
    if pretrained is not None:
        return Start(load_pretrained(pretrained))
    return Start()


def load_pretrained(name: str) -> ckpt.ModelState:
    """Weights from a checkpoint file or the newest checkpoint of a run folder."""
    path = Path(name)
    if path.is_dir():
        found = ckpt.newest(path / CHECKPOINTS)
        if found is None:
            raise CheckpointError(f"--pretrained: no checkpoint in {path / CHECKPOINTS}")
        return found[1]
    if path.suffix == ".pt":
        return ckpt.load(path)[0]
    raise ConfigError(
        f"--pretrained {name!r} is neither a run folder nor a .pt checkpoint here; other forms "
        "are not available yet"
    )


def open_cohort(config: Config) -> CaseStore:
    """The specimens that the arguments name."""
    data = config.data
    return open_store(
        hdf5_filename=data.hdf5_filename,
        hdf5_feature_attribute=data.hdf5_feature_attribute,
        hdf5_text_attribute=data.hdf5_text_attribute,
        root_dir=data.root_dir,
        slide_table=data.slide_table,
    )


def open_data(config: Config) -> Data:
    """Open the cohort, read the splits, check them."""
    data, store = config.data, open_cohort(config)
    texts = None if data.text_data_file is None else read_text_file(Path(data.text_data_file))

    def split(path: str | None, name: str | None = None) -> Split | None:
        if path is None:
            return None
        found = resolve(Path(path), store, texts)
        return found if name is None else replace(found, name=name)

    train = split(data.train_split, "train")
    if train is not None and data.num_samples is not None:
        train = train.first(data.num_samples)
    vals = tuple(s for path in data.val_split or () if (s := split(path)) is not None)
    found = Data(store, train, vals, split(data.test_split, "test"))
    hold_together(store, [case for one in found.splits for case in one.cases])
    if not data.allow_patient_overlap:
        check_leakage(found.splits)
    for one in found.splits:
        log.info("split %s: %d specimens", one.name, len(one.cases))
    return found


def _model(config: Config, data: Data, start: Start, device: torch.device) -> Trained:
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
    model_config = replace(model_config, tile_width=width)
    assert data.train is not None, "validate has made sure of a training split"
    reports, text = data.train.reports, model_config.text
    # Made by the first process alone: the others must have exactly the same one.
    tokenizer = Tokenizer.from_json(dist.from_main(lambda: new_tokenizer(text, reports).to_json()))
    torch.manual_seed(config.evaluation.seed)
    model = build_model(model_config, tokenizer.vocab_size, siglip=config.loss.siglip)
    if dist.is_main():  # the others get them with the parameters
        seed, rank = config.evaluation.seed, model_config.text.prior_rank
        moments = tile_moments(data.store, data.train.cases, seed)
        table = token_table(tokenizer, data.train.reports, rank, seed) if rank else None
        model.start_from(*moments, table)
    return Trained(model, model_config, tokenizer, config.loss.siglip, unit)


def new_tokenizer(text: TextConfig, reports: Sequence[str]) -> Tokenizer:
    """Trained on the reports, or from the folder that the model's configuration names."""
    if text.tokenizer == "train":
        return Tokenizer.train(reports, text.vocab_size)
    return Tokenizer.from_folder(text.tokenizer)


def _fit(
    config: Config,
    data: Data,
    trained: Trained,
    precision: Precision,
    start: Start,
    run: Run,
    folder: Path | None,
    judge: Judge,
) -> dict[str, float]:
    assert data.train is not None, "validate has made sure of a training split"
    optim, seed = config.optim, config.evaluation.seed
    _check_losses(config, trained)
    seed_everything(seed + 1 + dist.rank())
    augmentation = _augmentation(config, trained)
    dataset = bag_dataset(config, data.store, data.train, trained, augmentation, training=True)
    batches = _train_batches(config, dataset)
    pin = precision.device.type == "cuda"
    loader = make_loader(dataset, batches, config.data.workers, pin_memory=pin, bad=judge.bad)
    optimizer = adamw(
        trained.model,
        lr=_known(optim.lr),
        betas=(_known(optim.beta1), _known(optim.beta2)),
        eps=_known(optim.eps),
        decay=optim.wd,
    )
    objective = Objective(
        sigmoid_term if config.loss.siglip else softmax_term,
        config.loss.coca_contrastive_loss_weight,
        config.loss.coca_caption_loss_weight,
        mask_duplicates=config.loss.false_negatives == "mask",
    )
    step = Step(
        trained.model,
        optimizer,
        objective,
        precision,
        optim.grad_clip_norm,
        ragged=config.data.skip_bad_specimens,
    )
    steps_an_epoch = len(batches) // optim.accum_freq
    plan = Plan(optim.epochs, optim.accum_freq, _schedule(config, steps_an_epoch), precision.device)
    order = {
        "specimens": len(dataset),
        "global_batch": config.data.batch_size * dist.world_size() * optim.accum_freq,
        "seed": seed,
        "similar_lengths": batches.lengths_id(),
    }
    progress = ckpt.Progress()
    if start.training is not None:
        progress = _go_on(start.training, step, order)

    def state(
        at: ckpt.Progress, metrics: dict[str, float]
    ) -> tuple[ckpt.ModelState, ckpt.TrainState]:
        return trained.state(), ckpt.TrainState(
            progress=at,
            optimizer=optimizer.state_dict(),
            scaler=step.scaler.state_dict(),
            random=dist.gather_objects(ckpt.random_state()),
            order=order,
            skipped=step.skipped,
            config=to_yaml(config),
            metrics=metrics,
            threads=torch.get_num_threads(),
        )

    keeper = ckpt.Keeper(
        None if folder is None else folder / CHECKPOINTS,
        every_epochs=config.checkpoint.save_frequency,
        epochs=optim.epochs,
        most_recent=config.checkpoint.save_most_recent,
        delete_previous=config.checkpoint.delete_previous_checkpoint,
    )
    rhythm = Rhythm(
        epochs=optim.epochs,
        steps_an_epoch=steps_an_epoch,
        log_every_n_steps=config.logging.log_every_n_steps,
        save_every_n_steps=config.checkpoint.save_every_n_steps,
        val_frequency=config.evaluation.val_frequency,
        caption_val_frequency=config.evaluation.caption_val_frequency,
        eval_grace_period=config.evaluation.eval_grace_period,
        captions=config.evaluation.save_captions,
    )
    watcher = RunWatcher(
        run,
        keeper,
        state,
        lambda epoch, write, at: judge.epoch(data.vals, epoch, write, at),
        rhythm,
        progress,
        {} if start.training is None else start.training.metrics,
    )
    try:
        run_loop(step, loader, batches, plan, watcher, progress)
    finally:
        watcher.close()
    if step.skipped:
        log.warning("%d steps were skipped: loss or gradient not finite", step.skipped)
    return watcher.metrics


def _augmentation(config: Config, trained: Trained) -> Augmentation:
    """--aug-cfg; ConfigError where it would move positions that are not there."""
    keys = {k: v for k, v in config.data.aug_cfg.items() if k != "transform_type"}
    augmentation = Augmentation(config.data.aug_transforms, **keys)
    if augmentation.moves and trained.unit is None:
        raise ConfigError(
            f"--aug-cfg {', '.join(augmentation.moves)} moves positions, and this data has none; "
            "leave it out or add positions to the data"
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


def _check_losses(config: Config, trained: Trained) -> None:
    if trained.model.decoder is None and config.loss.coca_contrastive_loss_weight == 0:
        raise ConfigError(
            "--coca-contrastive-loss-weight 0 leaves a clip model nothing to learn; "
            "train a coca model or give a weight"
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


def _go_on(saved: ckpt.TrainState, step: Step, order: dict[str, int]) -> ckpt.Progress:
    """Restore optimizer, scaler and random state; refuse what would silently drift."""
    was = {name: saved.order.get(name, 0) for name in order}
    if was != order:
        differs = ", ".join(f"{k} {was[k]} -> {order[k]}" for k in order if was[k] != order[k])
        if saved.progress.batch:
            raise CheckpointError(
                "the checkpoint lies within an epoch, but the order of the data changed "
                f"({differs}); "
                "use the same data, --batch-size, --accum-freq, --seed and number of processes, or "
                "a checkpoint from the end of an epoch"
            )
        log.warning("the order of the data differs from that of the checkpoint (%s)", differs)
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
    return saved.progress


def bag_dataset(
    config: Config,
    store: CaseStore,
    split: Split,
    trained: Trained,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
    *,
    training: bool,
) -> BagDataset:
    """The specimens of a split, ready for a loader."""
    return BagDataset(
        store,
        split.cases,
        split.reports,
        trained.tokenizer,
        max_tokens=trained.config.text.context_length,
        cutoff=config.data.image_features_cutoff,
        seed=config.evaluation.seed,
        training=training,
        augmentation=augmentation,
    )


class Judge:
    """Evaluates splits with the current weights, logs the metrics and writes the files."""

    def __init__(
        self,
        config: Config,
        store: CaseStore,
        trained: Trained,
        precision: Precision,
        run: Run,
        bad: BadSpecimens | StopAtBad,
    ) -> None:
        self.config, self.store, self.trained = config, store, trained
        self.precision, self.run, self.bad = precision, run, bad
        self.zero_shot = [
            (prompts, labels)
            for prompt_file, label_file in config.prompt_pairs
            for prompts in [read_prompts(Path(prompt_file))]
            for labels in [read_labels(Path(label_file), prompts)]
        ]
        if config.evaluation.save_captions and trained.model.decoder is None:
            raise ConfigError(
                f"--save-captions: model {config.model.model} has no decoder to write reports with"
            )

    def epoch(
        self, splits: Sequence[Split], epoch: int, write: bool, step: int
    ) -> dict[str, float]:
        """Evaluate validation splits after an epoch."""
        results = self._all(splits, write)
        metrics = _flat(results)
        if results:
            self.run.log("evaluation", step, {"epoch": float(epoch), **metrics})
            log.info("evaluation after epoch %d: %s", epoch, _headline(results))
        if write and results:
            self.run.write_json(f"captions_epoch_{epoch}.json", _captions(results))
            for name, (predictions, _) in results.items():
                self.run.text(f"{name}/report", step, _example(predictions))
        return metrics

    def final(self, splits: Sequence[Split], name: str) -> dict[str, float]:
        """Evaluate splits once, with files and a table to read."""
        results = self._all(splits, self.config.evaluation.save_captions)
        metrics = _flat(results)
        details = {s: result.details for s, (_, result) in results.items()}
        self.run.write_json(f"{name}.json", {"metrics": metrics, "details": details})
        if self.config.evaluation.save_captions:
            self.run.write_json(f"captions_{name}.json", _captions(results))
        text = summary(self.config.model.model, {s: (p, r) for s, (p, r) in results.items()})
        self.run.write(f"{name}.md", text)
        log.info("%s: %s", name, _headline(results))
        return metrics

    def _all(
        self, splits: Sequence[Split], write: bool
    ) -> dict[str, tuple[Predictions, TaskResult]]:
        if not splits:
            return {}
        # The prompts are embedded once for all splits.
        tasks: list[Task] = [retrieval]
        for prompts, labels in self.zero_shot:
            embeddings = class_embeddings(prompts, self._embed_text)
            tasks.append(ZeroShot(embeddings, prompts.classes, labels))
        if write:
            tasks.append(captions)
        return {split.name: self._one(split, write, tasks) for split in splits}

    def _one(
        self, split: Split, write: bool, tasks: Sequence[Task]
    ) -> tuple[Predictions, TaskResult]:
        dataset = bag_dataset(self.config, self.store, split, self.trained, training=False)
        batches = EvalBatches(
            len(dataset), self.config.data.batch_size, dist.rank(), dist.world_size()
        )
        workers = min(self.config.data.workers, len(batches))
        loader = make_loader(dataset, batches, workers, bad=self.bad)
        bar = Bar(f"evaluating {split.name}", len(dataset), shown=dist.is_main())
        try:
            predictions = predict(
                self.trained.model,
                loader,
                dict(zip((c.specimen for c in split.cases), split.reports, strict=True)),
                self.precision,
                self._writing() if write else None,
                lambda done: bar.update(done * dist.world_size()),
                complete=not self.config.data.skip_bad_specimens,
            )
        finally:
            bar.close()
        return predictions, evaluate(predictions, tasks)

    def _writing(self) -> Writing:
        tokenizer, evaluation = self.trained.tokenizer, self.config.evaluation
        decoding = Decoding(
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_tokens=evaluation.caption_val_max_seq_len,
            top_k=evaluation.val_gen_top_k,
            seed=evaluation.seed,
        )
        return Writing(decoding, tokenizer.decode)

    def _embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return embed_text(self.trained, texts, self.precision)


def embed_text(trained: Trained, texts: Sequence[str], precision: Precision) -> np.ndarray:
    """Texts, tokenised as in training -> [len(texts), E] float32, L2-normalised."""
    tokenizer, model = trained.tokenizer, trained.model
    rows = [tokenizer.encode(text, trained.config.text.context_length) for text in texts]
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(rows), _TEXTS):
            tokens, mask = pad(rows[start : start + _TEXTS], tokenizer.pad_id)
            with precision.autocast():
                part = model.encode_text(tokens.to(precision.device), mask.to(precision.device))
            parts.append(part.float().cpu().numpy())
    return np.concatenate(parts)


def _flat(results: dict[str, tuple[Predictions, TaskResult]]) -> dict[str, float]:
    return {
        f"{split}/{name}": value
        for split, (_, result) in results.items()
        for name, value in result.metrics.items()
    }


_HEADLINE = (
    "loss/contrastive",
    "loss/caption",
    "image_to_text/R@10",
    "balanced_accuracy",
    "bleu_4",
)


def _headline(results: dict[str, tuple[Predictions, TaskResult]]) -> str:
    parts = [
        f"{split} {name} {value:.3f}"
        for split, (_, result) in results.items()
        for name, value in result.metrics.items()
        if name.endswith(_HEADLINE) and not math.isnan(value)
    ]
    return "; ".join(parts)


def _captions(results: dict[str, tuple[Predictions, TaskResult]]) -> list[dict[str, Any]]:
    return [
        {"split": split, "id": specimen, "report": report, "generated": generated}
        for split, (predictions, _) in results.items()
        for specimen, report, generated in zip(
            predictions.specimen_ids, predictions.reports, predictions.generated or (), strict=True
        )
    ]


def _example(predictions: Predictions) -> str:
    generated = (predictions.generated or ("",))[0]
    return (
        f"{predictions.specimen_ids[0]}\n\ngenerated: {generated}\n\ntrue: {predictions.reports[0]}"
    )

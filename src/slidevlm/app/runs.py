"""A run from its arguments to its last metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from slidevlm import dist
from slidevlm.app import codebase, pretrained
from slidevlm.app.cohorts import Data, open_data
from slidevlm.app.datasets import bag_dataset
from slidevlm.app.devices import check_exchange, choose_device, with_device
from slidevlm.app.fitting import fit
from slidevlm.app.folders import (
    claimed_folder,
    config_name,
    evaluation_name,
    evaluation_prefix,
    local_log,
)
from slidevlm.app.judging import Judge
from slidevlm.app.outputs import Outcome
from slidevlm.app.preparing import cut, prepare
from slidevlm.app.syncing import fetch, syncing
from slidevlm.app.trained import Trained, model_for
from slidevlm.app.weights import Start, start_of, with_saved_model
from slidevlm.config import (
    BEAM_ARGUMENTS,
    Config,
    all_values,
    given_values,
    validate,
    with_adam_defaults,
    with_values,
    without_effect,
)
from slidevlm.data.dataset import BadSpecimens, StopAtBad
from slidevlm.errors import ConfigError
from slidevlm.flags import read_yaml, to_yaml
from slidevlm.models import zoo
from slidevlm.precision import Precision
from slidevlm.precision import check as check_precision
from slidevlm.precision import resolve as resolve_precision
from slidevlm.run import (
    CHECKPOINTS,
    Run,
    WandbSettings,
    configure_logging,
    environment,
    log_to,
    working,
)
from slidevlm.train.interrupt import Interrupts
from slidevlm.train.launcher import LauncherWatch
from slidevlm.train.ranks import RankWatch

log = logging.getLogger("slidevlm")

_SYNCING = ("remote_sync", "remote_sync_frequency", "remote_sync_protocol")


def train(config: Config) -> dict[str, float]:
    """Train (or, with --test, only evaluate) as the arguments say.

    Returns:
        The last metrics: those of the test split where one is given, else of validation.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    return run_all(config).metrics


def run_all(config: Config) -> Outcome:
    """`train`, with everything that the last evaluation found."""
    device = _checked(config)
    config = with_adam_defaults(config)
    with LauncherWatch():  # to wait for the others may take minutes
        if config.distributed.horovod:
            dist.start_horovod()
        else:
            dist.start(config.distributed.dist_backend, device, codebase.meeting(config))
        try:
            configure_logging(debug=config.logging.debug, main=dist.is_main())
            with RankWatch(), _debugging(config.logging.debug):
                precision = resolve_precision(config.optim.precision, device)
                return _train(with_device(config, device), precision)
        finally:
            dist.stop()


def _checked(config: Config) -> torch.device:
    """The device to work on.

    Raises:
        ConfigError: with everything that is wrong and can be told before data is opened.
    """
    problems: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.append(str(error))

    device = torch.device("cpu")
    with noted():
        zoo.load(config.model.model)
    with noted():
        pretrained.check(config)
    with noted():
        codebase.check(config)
    with noted():
        device = choose_device(config)
        check_exchange(config, device)
        check_precision(config.optim.precision, device)
    validate(config, problems)
    return device


def with_run_settings(run: Path, overrides: Config) -> Config:
    """The arguments of an evaluation of a run: its own where `overrides` gives no others.

    It writes into `<run>/evaluation-<time>` unless they name another place.

    Raises:
        ConfigError: `run` is neither a run folder nor a checkpoint of one, or has no checkpoint.
    """
    checkpoint = None
    if run.is_file():
        checkpoint, run = run, run.resolve().parent.parent
    saved = run / "config.yaml"
    if not saved.is_file():
        if not run.exists():
            raise ConfigError(f"no run {str(run)!r} (looked from {Path.cwd()})")
        what = "the folder above its own" if checkpoint is not None else "it"
        raise ConfigError(
            f"{checkpoint or run} is not of a run: {what} has no config.yaml; evaluate other "
            "weights with `slidevlm train --test --pretrained FILE`"
        )
    values, given = read_yaml(saved), given_values(overrides)
    others = {"resume", "pretrained"} & given.keys()
    if checkpoint is None and not others and not (run / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"{run} is a run without a checkpoint; train it on, or give other weights by "
            "--pretrained"
        )
    # What belongs to training alone would be refused, or evaluate the training split unasked.
    unwanted = {"device", "train_split", "num_samples", "copy_codebase", *_SYNCING}
    if given.get("probe"):  # it learns from the training split, which is not evaluated
        unwanted = {"device", "copy_codebase", *_SYNCING}
    decoding = {"val_gen_top_k", *BEAM_ARGUMENTS}
    if decoding & given.keys():  # another way to write reports is not mixed with the run's own
        unwanted |= decoding
    values = {k: v for k, v in values.items() if k not in unwanted}
    place = {"logs": str(run), "name": evaluation_name(run)}
    if not others:
        values["pretrained"] = str(checkpoint or run)
    return with_values(Config(), {**values, **place, **given, "test": True})


@contextmanager
def _debugging(enabled: bool) -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(enabled):
        yield


def _train(config: Config, precision: Precision) -> Outcome:
    with claimed_folder(config) as folder:
        return _train_in(folder, config, precision)


def _train_in(folder: Path | None, config: Config, precision: Precision) -> Outcome:
    fetch(config, folder)
    prefix = evaluation_prefix(config, folder)  # before the run writes a config.yaml
    with working("opening model and data", shown=dist.is_main()):
        start = start_of(config, folder)
        config = with_saved_model(config, start)
        data = open_data(config)
        trained = model_for(config, data, start, precision.device)
        prepare(config, trained, precision)
        judged, weights = cut(config, trained, precision)
    new = folder is not None and dist.is_main()
    wandb = WandbSettings(
        config.logging.wandb_project_name, config.logging.wandb_notes, all_values(config)
    )
    told_until = _told_until(config, start)
    within_epoch = start.training is not None and start.training.progress.batch > 0
    with (
        syncing(config, folder) as copies,  # left last, when everything is written
        log_to(local_log(config, folder)),
        Run(
            folder if new else None,
            config.sinks,
            told_until,
            wandb,
            evaluates_first=within_epoch,
        ) as run,
    ):
        run.write(config_name(config, folder), to_yaml(config))
        run.write("tokenizer.json", trained.tokenizer.to_json())
        run.write_json("model.json", trained.config.to_dict())
        run.write_json("environment.json", environment())
        for split in data.splits:
            if split.missing:
                run.write(f"missing_{split.name}.txt", "\n".join(split.missing) + "\n")
            if split.without_text:
                names = "\n".join(split.without_text) + "\n"
                run.write(f"without_report_{split.name}.txt", names)
        dist.from_main(copies.begin)
        parameters = sum(p.numel() for p in trained.model.parameters())
        log.info(
            "model %s: %.1f million parameters, tile width %d, vocabulary %d, on %s",
            config.model_name,
            parameters / 1e6,
            trained.config.tile_width,
            trained.tokenizer.vocab_size,
            precision.device,
        )
        if dist.is_main():
            for told in without_effect(config):
                log.warning("%s", told)
            _tell_truncated(config, data, trained)
        bad = BadSpecimens() if config.data.skip_bad_specimens else StopAtBad()
        judge = Judge(config, data.store, judged, precision, run, bad, weights)
        if config.evaluation.test:
            outcome = judge.final(data, "evaluation", prefix)
        else:
            judge.check_labels([split for split in data.splits if split is not data.train])
            with Interrupts() as asked:
                fitted = fit(config, data, trained, precision, start, run, folder, judge, asked)
            outcome = Outcome(fitted.metrics)
            if data.test is not None and fitted.finished:
                outcome = judge.final(data, "test")
        _list_bad(bad, run)
    if folder is not None and dist.is_main():
        log.info("run folder: %s", folder)
    return replace(outcome, folder=folder)


def _told_until(config: Config, start: Start) -> int | None:
    """The step up to which an earlier process's lines still hold; None where all of them do."""
    if config.evaluation.test or config.checkpoint.resume is None:
        return None
    return 0 if start.training is None else start.training.progress.step


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

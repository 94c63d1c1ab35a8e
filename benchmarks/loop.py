"""What the training loop costs besides forward, backward and optimizer.

    python benchmarks/loop.py [--threads N] [--rounds N] [--workers N] [--batch N] [--width N]
                              [--specimens N]

A real run (files, workers, run folder, metrics.jsonl, TensorBoard where installed, a log line every
10 steps) and a bare torch loop over the same batches, already in memory, take turns in one process:
the same model, losses, clipping and AdamW. `--width` chooses the model's size, and so the length of
a step. Printed are the medians over the rounds of milliseconds a step by the clock and of this
process's processor time, which other work on the machine disturbs less; the ratio of ours to the
bare loop's, round by round; and what the loop spends where: the step, waiting for an epoch's first
batch and for the others, and the rest (moving batches, log lines, the bar). "Steps alone" are
those of `Step` on the bare loop's batches, each batch through one and then the other, in turns:
what it computes beyond the bare loop. The last line is what is to be small, everything but
forward, backward and optimizer: what `Step` computes beyond them and what the loop does outside
it, in shares of a step of the bare loop. The whole ratio holds more: steps take longer where
workers that read share cores and memory with them, and the bare loop has its batches ready.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader

import slidevlm.app.fitting as fitting
from slidevlm.app.runs import run_all
from slidevlm.batch import Batch
from slidevlm.config import Config, with_values
from slidevlm.data.synthetic import synthesize
from slidevlm.losses import caption_loss_sum, contrastive_loss
from slidevlm.models import zoo
from slidevlm.train.checkpoint import Progress
from slidevlm.train.loop import Batches, Plan, train
from slidevlm.train.step import Step


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of this process's processor time."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Spent:
        """From then to now."""
        now = Spent.now()
        return Spent(now.clock - self.clock, now.processor - self.processor)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.clock + other.clock, self.processor + other.processor)


def bare(step: Step, batches: Sequence[Batch]) -> Spent:
    """What a plain loop over the batches spends."""
    model, optimizer = step.model, step.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = Spent.now()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        output = model(batch.bags, batch.tokens, batch.token_mask, only_real=True)
        contrastive = contrastive_loss(
            output.image_embedding, output.text_embedding, output.logit_scale, batch.report_ids
        )
        count = batch.token_mask[:, 1:].sum()
        caption = caption_loss_sum(output.logits, batch.tokens, batch.token_mask) / count
        (contrastive + 2 * caption).backward()
        torch.nn.utils.clip_grad_norm_(parameters, step.clip_norm)
        optimizer.step()
    return start.since()


def stepped(step: Step, batches: Sequence[Batch]) -> Spent:
    """What `Step` spends on batches that are there."""
    start = Spent.now()
    for batch in batches:
        step([batch], 0.0)
    return start.since()


def in_turns(step: Step, batches: Sequence[Batch]) -> tuple[Spent, Spent]:
    """Both of these, each batch in one and then the other.

    A whole epoch of one after a whole epoch of the other differs by percents for the order alone.
    """
    spent = {bare: Spent(0, 0), stepped: Spent(0, 0)}
    for number, batch in enumerate(batches):
        for run in (bare, stepped) if number % 2 else (stepped, bare):
            spent[run] += run(step, [batch])
    return spent[bare], spent[stepped]


class Clock:
    """A step that is timed."""

    def __init__(self, step: Step) -> None:
        self.inner, self.model, self.spent = step, step.model, Spent(0, 0)

    def __call__(self, batches: Sequence[Batch], rate: float) -> Any:
        start = Spent.now()
        terms = self.inner(batches, rate)
        self.spent += start.since()
        return terms


class Waits:
    """A loader whose batches are waited for with a clock in hand."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader, self.first, self.others = loader, Spent(0, 0), Spent(0, 0)

    def __iter__(self) -> Iterator[Batch]:
        start, first = Spent.now(), True
        for batch in self.loader:
            if first:
                self.first += start.since()
            else:
                self.others += start.since()
            first = False
            yield batch
            start = Spent.now()


def paired(rounds: int) -> Callable[..., Progress]:
    """Takes the loop's place: it and the bare loop in turn, an epoch each."""

    def run(
        step: Step,
        loader: DataLoader[Batch],
        batches: Batches,
        plan: Plan,
        watcher: Any,
        start: Progress,
    ) -> Progress:
        batches.set_epoch(0, 0)
        kept = list(loader)
        step.model.train()
        in_turns(step, kept)  # the first allocates, and makes the optimizer's state
        watcher.epoch = lambda progress: None  # neither evaluation nor checkpoint
        found: dict[str, list[Spent]] = {}
        for number in range(rounds):
            alone, inside = in_turns(step, kept)
            clock: Any = Clock(step)
            waits: Any = Waits(loader)
            began = Spent.now()
            at = Progress(number * len(kept), number, 0)
            train(clock, waits, batches, replace(plan, epochs=number + 1), watcher, at)
            whole = began.since()
            parts = (clock.spent, waits.first, waits.others)
            rest = Spent(
                whole.clock - sum(p.clock for p in parts),
                whole.processor - sum(p.processor for p in parts),
            )
            for name, spent in zip(
                (
                    *("bare loop", "steps alone", "our loop"),
                    *("of it: steps", "first batch", "other batches", "rest"),
                ),
                (alone, inside, whole, *parts, rest),
                strict=True,
            ):
                found.setdefault(name, []).append(spent)
        print("| ms a step | clock | processor |")
        print("|---|---|---|")
        for name, spent in found.items():
            per_step = [
                median(getattr(s, kind) for s in spent) / len(kept) * 1000
                for kind in ("clock", "processor")
            ]
            print(f"| {name} | {per_step[0]:.2f} | {per_step[1]:.2f} |")
        for name in ("steps alone", "our loop"):
            ratios = [
                median(
                    getattr(mine, kind) / getattr(alone, kind)
                    for mine, alone in zip(found[name], found["bare loop"], strict=True)
                )
                for kind in ("clock", "processor")
            ]
            print(f"| {name} / bare loop | {ratios[0]:.3f} | {ratios[1]:.3f} |")
        beyond = [100 * _beyond(found, kind) for kind in ("clock", "processor")]
        print(f"| besides the computation, % | {beyond[0]:.2f} | {beyond[1]:.2f} |", flush=True)
        return start

    return run


def _beyond(found: dict[str, list[Spent]], kind: str) -> float:
    """The share of a bare loop that is not forward, backward or optimizer: median over rounds."""
    shares = []
    for number, plain in enumerate(found["bare loop"]):
        outside = [found[n][number] for n in ("first batch", "other batches", "rest")]
        steps = getattr(found["steps alone"][number], kind) - getattr(plain, kind)
        shares.append((steps + sum(getattr(s, kind) for s in outside)) / getattr(plain, kind))
    return median(shares)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=96, help="of all towers")
    parser.add_argument("--specimens", type=int, default=2400, help="two thirds of them train")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, {asked.threads} thread(s), {asked.workers} worker(s)")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cohort = synthesize(folder / "cohort", specimens=asked.specimens, seed=0)
        model = zoo.load("coca_tiny").to_dict()
        model["slide"] |= {"width": asked.width, "latents": asked.width // 4}
        model["text"] |= {"width": asked.width, "layers": 2}
        model["decoder"] |= {"layers": 2}
        path = folder / "model.json"
        path.write_text(json.dumps(model))
        config = with_values(
            Config(),
            {
                "hdf5_filename": str(cohort.hdf5),
                "hdf5_feature_attribute": "demo",
                "hdf5_text_attribute": "report",
                "train_split": str(cohort.split("train")),
                "model": str(path),
                "batch_size": asked.batch,
                "workers": asked.workers,
                "epochs": 1,
                "precision": "fp32",
                "device": "cpu",
                "grad_clip_norm": 1.0,
                "log_every_n_steps": 10,
                "report_to": "tensorboard",
                "logs": str(folder / "logs"),
                "name": "run",
            },
        )
        fitting.run_loop = paired(asked.rounds)
        run_all(config)


if __name__ == "__main__":
    main()

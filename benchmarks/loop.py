"""What the training loop costs besides forward, backward and optimizer.

    python benchmarks/loop.py [--threads N] [--rounds N] [--workers N] [--batch N]

A real run (files, workers, run folder, metrics.jsonl, TensorBoard where installed, a log line every
10 steps) and a bare torch loop over the same batches, already in memory, take turns in one process:
the same model, losses, clipping and AdamW. The model is of a size that makes a step of about 100 ms
here. Printed are the medians over the rounds of milliseconds a step, their ratio, and what the loop
spends outside `Step` (fetching a batch, logging), told by its own clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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


def bare(step: Step, batches: Sequence[Batch]) -> float:
    """Seconds of a plain loop over the batches."""
    model, optimizer = step.model, step.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = time.perf_counter()
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
    return time.perf_counter() - start


class Clock:
    """A step that is timed."""

    def __init__(self, step: Step) -> None:
        self.inner, self.model, self.seconds = step, step.model, 0.0

    def __call__(self, batches: Sequence[Batch], rate: float) -> Any:
        start = time.perf_counter()
        terms = self.inner(batches, rate)
        self.seconds += time.perf_counter() - start
        return terms


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
        bare(step, kept)  # the first allocates, and makes the optimizer's state
        watcher.epoch = lambda progress: None  # neither evaluation nor checkpoint
        alone, whole, outside = [], [], []
        for number in range(rounds):
            alone.append(bare(step, kept) / len(kept) * 1000)
            clock: Any = Clock(step)
            began = time.perf_counter()
            at = Progress(number * len(kept), number, 0)
            one = replace(plan, epochs=number + 1)
            train(clock, loader, batches, one, watcher, at)
            seconds = time.perf_counter() - began
            whole.append(seconds / len(kept) * 1000)
            outside.append((seconds - clock.seconds) / len(kept) * 1000)
        ratio = median(w / a for w, a in zip(whole, alone, strict=True))
        print("| bare ms a step | the loop's | ratio | of it outside the step |")
        print("|---|---|---|---|")
        share = median(outside) / median(whole)
        print(
            f"| {median(alone):.1f} | {median(whole):.1f} | {ratio:.3f} | "
            f"{median(outside):.2f} ms, {100 * share:.1f} % |"
        )
        return start

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, {asked.threads} thread(s), {asked.workers} worker(s)")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cohort = synthesize(folder / "cohort", specimens=600, seed=0)
        model = zoo.load("coca_tiny").to_dict()
        model["slide"] |= {"width": 192, "latents": 48}
        model["text"] |= {"width": 192, "layers": 2}
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

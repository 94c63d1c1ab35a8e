"""What happens beside the steps of a run: log lines, the bar, evaluation, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from slidevlm import dist
from slidevlm.errors import CheckpointError
from slidevlm.eval.predict import LeftError
from slidevlm.run import Bar, Run
from slidevlm.train.best import Best
from slidevlm.train.checkpoint import BEST, LATEST, Keeper, ModelState, Progress, TrainState
from slidevlm.train.interrupt import Interrupts
from slidevlm.train.loop import StepLine
from slidevlm.train.saving import Writer

log = logging.getLogger("slidevlm.train")

_RETRY_SECONDS = 60.0  # after a checkpoint that could not be written
_LAST_TRIES = 3  # where there is no later chance
_LAST_SECONDS = 5.0  # between these
_BAR_SECONDS = 0.5  # showing the loss waits for the device, so not at every step


@dataclass(frozen=True)
class Rhythm:
    """When things are due; epochs are counted from 1."""

    epochs: int
    steps_an_epoch: int
    log_every_n_steps: int
    save_every_n_steps: int | None
    val_frequency: int
    caption_val_frequency: int
    eval_grace_period: int
    captions: bool

    def saves_at(self, step: int) -> bool:
        """Whether --save-every-n-steps asks for a checkpoint."""
        return self.save_every_n_steps is not None and step % self.save_every_n_steps == 0

    def evaluates(self, epoch: int) -> bool:
        """Whether --val-frequency asks for an evaluation."""
        return epoch > self.eval_grace_period and self._due(epoch, self.val_frequency)

    def generates(self, epoch: int) -> bool:
        """Whether reports are generated; that is an evaluation too."""
        due = self._due(epoch, self.caption_val_frequency)
        return self.captions and epoch > self.eval_grace_period and due

    def _due(self, epoch: int, frequency: int) -> bool:
        return epoch % frequency == 0 or epoch == self.epochs


class RunWatcher:
    """Logs, evaluates and saves.

    Args:
        run: the run folder, empty on every rank but the first.
        keeper: which checkpoints are kept; the same on every rank.
        state: progress and metrics -> what a checkpoint holds; a collective call.
        evaluate: (epoch, generate, step) -> metrics; a collective call. LeftError where a signal
            asks for an end meanwhile.
        rhythm: when.
        start: where training goes on.
        metrics: of the last evaluation before that; none for a new run.
        interrupts: signals that ask for an end.
        memory: further numbers of a log line, in MB.
        after_step: called with the number of every step that moved the weights.
        best: of --save-best; the same on every rank.
    """

    def __init__(
        self,
        run: Run,
        keeper: Keeper,
        state: Callable[[Progress, dict[str, float]], tuple[ModelState, TrainState]],
        evaluate: Callable[[int, bool, int], dict[str, float]],
        rhythm: Rhythm,
        start: Progress,
        metrics: Mapping[str, float],
        interrupts: Interrupts,
        memory: Callable[[], dict[str, float]] = dict,
        after_step: Callable[[int], None] = lambda step: None,
        best: Best | None = None,
    ) -> None:
        self.run, self.keeper, self.state = run, keeper, state
        self.memory, self.after_step, self.best = memory, after_step, best
        self._writer = Writer(keeper.store if dist.is_main() else None)
        self._storing_best = self._lost_best = False
        self.interrupts = interrupts
        self.stops = False
        self._retry_at: float | None = None
        self.evaluate, self.rhythm = evaluate, rhythm
        self.metrics, self._start = dict(metrics), start
        self._total = rhythm.epochs * rhythm.steps_an_epoch
        self._bar = Bar("training", self._total, shown=dist.is_main())
        self._shown = 0.0
        self._reset(start.step)

    def _reset(self, step: int) -> None:
        self._samples = self._tiles = 0
        self._data_seconds = self._step_seconds = 0.0
        self._since, self._since_step = time.perf_counter(), step

    def step(self, line: StepLine) -> None:
        """Sum up, and write a line when due."""
        self._samples += line.samples
        self._tiles += line.tiles
        self._data_seconds += line.data_seconds
        self._step_seconds += line.step_seconds
        step = line.progress.step
        if not line.terms.skipped:
            self.after_step(step)
        else:
            reason = "its loss or gradient was not finite" if line.samples else "no usable specimen"
            log.warning("step %d skipped: %s", step, reason)
        if step % self.rhythm.log_every_n_steps == 0 or step == self._total:
            self._line(line)
        elif self._bar.visible and time.perf_counter() - self._shown > _BAR_SECONDS:
            self._bar.update(step, self._note(line))
            self._shown = time.perf_counter()

    def _line(self, line: StepLine) -> None:
        step, steps = line.progress.step, line.progress.step - self._since_step
        seconds = max(time.perf_counter() - self._since, 1e-9)
        values = {
            "epoch": float(line.progress.epoch + 1),
            **line.terms.floats(),
            "learning_rate": line.rate,
            "samples_per_second": self._samples / seconds,
            "tiles_per_second": self._tiles * dist.world_size() / seconds,
            "data_seconds": self._data_seconds / steps,
            "step_seconds": self._step_seconds / steps,
        }
        memory = self.memory()
        values |= memory
        terms = {name: values.get(f"{name}_loss") for name in ("contrastive", "caption")}
        self.run.log("train", step, values)
        log.info(
            "epoch %d  step %d/%d  loss %.4f (%s)  scale %.2f  "
            "rate %.2e  norm %.2f  %.1f samples/s  %.0f tiles/s  data %.3f s  step %.3f s%s",
            line.progress.epoch + 1,
            step,
            self._total,
            values["loss"],
            ", ".join(f"{name} {loss:.4f}" for name, loss in terms.items() if loss is not None),
            values["logit_scale"],
            line.rate,
            values["gradient_norm"],
            values["samples_per_second"],
            values["tiles_per_second"],
            values["data_seconds"],
            values["step_seconds"],
            "".join(f"  {k.removesuffix('_mb')} {v:.0f} MB" for k, v in memory.items()),
        )
        self._bar.update(step, self._note(line))
        self._reset(step)

    def _note(self, line: StepLine) -> str:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        return (
            f"loss {line.terms.loss.item():.3f}  rate {line.rate:.1e}  "
            f"{self._samples / seconds:.1f} samples/s"
        )

    def settle(self) -> None:
        """Before anything changes weights or moments: wait until a save has copied them."""
        self._writer.settle()

    def save_within_epoch(self, progress: Progress) -> None:
        """Save when due, when asked to end, and again some time after a save that failed."""
        self._look()
        again = self._retry_at is not None and time.perf_counter() >= self._retry_at
        asked = self.interrupts.name is not None
        self.stops, again = dist.any_([asked, again])
        if self.stops or again or self.rhythm.saves_at(progress.step):
            self._save(progress, self.keeper.step_files(progress.step), last=self.stops)

    def epoch(self, progress: Progress) -> None:
        """Evaluate, then save: a kill in between repeats the epoch, and no evaluation is lost.

        Asked to end meanwhile it leaves the evaluation, which then is the first thing that is done
        by the process that goes on.
        """
        begun_here = progress == self._start
        before, progress = progress, progress.next_epoch()
        captions = self.rhythm.generates(progress.epoch)
        best = False
        if captions or self.rhythm.evaluates(progress.epoch):
            self.settle()  # an average may take the weights' place
            found: dict[str, float] | None = None
            with suppress(LeftError):
                found = self.evaluate(progress.epoch, captions, progress.step)
            if found is None:
                self._save_unevaluated(before)
                return
            self.metrics = found
            best = self.best is not None and self._improves(self.best)
        self._look()
        self.stops, failed = dist.any_(
            [self.interrupts.name is not None, self._retry_at is not None]
        )
        files = self.keeper.epoch_files(progress.epoch)
        # What `_save_unevaluated` of an earlier process has left is replaced.
        wanted = self.rhythm.saves_at(progress.step) or self.stops or failed or begun_here
        if wanted and all(f.name == LATEST for f in files):
            files = [*self.keeper.step_files(progress.step), *files]
        if best:
            files = [*files, *self.keeper.best_files()]
        self._save(progress, files, last=self.stops or progress.epoch == self.rhythm.epochs)
        self._reset(progress.step)

    def _save_unevaluated(self, progress: Progress) -> None:
        """An epoch's last step, when asked to end. Not as `epoch_N.pt`: the epoch is not over."""
        self.stops = True
        latest = [f for f in self.keeper.epoch_files(progress.epoch + 1) if f.name == LATEST]
        self._save(progress, [*self.keeper.step_files(progress.step), *latest], last=True)

    def _improves(self, best: Best) -> bool:
        """Whether the new metrics are better than those of the best checkpoint that is stored."""
        self.wait()
        (lost,) = dist.any_([self._lost_best])
        self._lost_best = False
        if lost:
            best.undo()
        return best.improves(self.metrics)

    def _look(self) -> None:
        """Take note of a save that has ended."""
        if self._writer.ended:
            self.wait()

    def wait(self) -> str | None:
        """Wait for the save in progress, if there is one; what went wrong, or None."""
        if not self._writer.busy:
            return None
        with dist.stepping:  # a writer that hangs is found like a step that does
            problem = self._writer.wait()
        self._retry_at = None if problem is None else time.perf_counter() + _RETRY_SECONDS
        if problem is not None and self._storing_best:
            self._lost_best = True
        return problem

    def _save(self, progress: Progress, files: list[Path], *, last: bool) -> None:
        """Begin to write a checkpoint, once the one before is written.

        What cannot be written is told and tried again later; the last one is waited for.

        Raises:
            CheckpointError: the last one could not be written; on every rank.
        """
        if not files:
            return
        with dist.stepping:
            model, training = self.state(progress, self.metrics)
        if self.best is not None:
            training = replace(training, best=self.best.state())
        for attempt in range(_LAST_TRIES if last else 1):
            time.sleep(_LAST_SECONDS if attempt else 0)
            self.wait()
            self._storing_best = any(f.name == BEST for f in files)
            with dist.stepping:
                self._writer.start(files, model, training)
            if not last:
                return
            problem = dist.broadcast_object(self.wait())
            if problem is None:
                return
        raise CheckpointError(problem or "")

    def close(self, *, at_once: bool = False) -> None:
        """Give the terminal back, and wait for the save in progress, or give it up `at_once`."""
        self._bar.close()
        if at_once:
            self.keeper.given_up.set()
        with dist.stepping:
            self._writer.wait()

"""The run folder and everything that writes to it or to the terminal."""

from __future__ import annotations

import html
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from slidevlm.documents import finite, json_of
from slidevlm.errors import ConfigError, without_secrets
from slidevlm.files import replacing

log = logging.getLogger("slidevlm")

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


class Sink(Protocol):
    """Where numbers go."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Store one line of numbers."""

    def text(self, name: str, step: int, content: str) -> None:
        """Store a text, such as an example of a generated report."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """metrics.jsonl: one JSON object a line, flushed line by line; NaN and infinity are null."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps(finite({"kind": kind, "step": step, **values})) + "\n")
        self._file.flush()

    def text(self, name: str, step: int, content: str) -> None:
        """Texts have files of their own."""

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under <run>/tensorboard."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--report-to tensorboard needs the extra: pip install 'slidevlm[tensorboard]'"
            ) from error
        # Hides what a killed process wrote after that step; the step itself is not done again.
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def text(self, name: str, step: int, content: str) -> None:
        self._writer.add_text(name, content, step)

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True)
class WandbSettings:
    """What a wandb run is told besides the numbers."""

    project: str
    notes: str
    config: Mapping[str, Any]


class Wandb:
    """A run of Weights & Biases, its files under <run>/wandb. WANDB_MODE=offline needs no network.

    A run that goes on is the same wandb run: its id is kept in the run folder.
    """

    def __init__(self, folder: Path, settings: WandbSettings) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "--report-to wandb needs the extra: pip install 'slidevlm[wandb]'"
            ) from error
        self._wandb = wandb
        kept = folder / "wandb_id.txt"
        try:
            self._run = wandb.init(
                project=settings.project,
                name=folder.name,
                notes=settings.notes or None,
                config=dict(settings.config),
                dir=str(folder),
                id=kept.read_text(encoding="utf-8").strip() if kept.exists() else None,
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"--report-to wandb: {without_secrets(str(error))}; log in with `wandb login`, or "
                "set WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from None
        write_text(kept, self._run.id + "\n")
        # Its own counter never goes back, as the steps of a killed run do.
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{kind}/{k}": v for k, v in values.items()}})

    def text(self, name: str, step: int, content: str) -> None:
        shown = self._wandb.Html(f"<pre>{html.escape(content)}</pre>")
        self._run.log({"step": step, name: shown})

    def close(self) -> None:
        self._run.finish()


class Run:
    """A run folder, or nothing at all: every method works either way.

    Args:
        folder: None where nothing may be written (--logs None, and every rank but the first).
        report_to: names of further sinks.
        resumed_step: the step that training goes on from; later lines of metrics.jsonl, which a
            killed process left, are dropped. None for a new run.
        wandb: for the sink of that name.
        evaluates_first: that step is to be evaluated; what was told of that is dropped, too.
    """

    def __init__(
        self,
        folder: Path | None,
        report_to: Sequence[str] = (),
        resumed_step: int | None = None,
        wandb: WandbSettings | None = None,
        *,
        evaluates_first: bool = False,
    ) -> None:
        self.folder = folder
        self._sinks: list[Sink] = []
        self._handler: logging.Handler | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if resumed_step is not None:
            evaluated = resumed_step - evaluates_first
            _drop_lines_after(folder / METRICS, resumed_step, evaluated)
        self._sinks.append(JsonLines(folder / METRICS))
        if "tensorboard" in report_to:
            self._sinks.append(TensorBoard(folder / "tensorboard", resumed_step))
        if "wandb" in report_to:
            assert wandb is not None, "the sink needs its settings"
            self._sinks.append(Wandb(folder, wandb))
        self._handler = _log_file(folder / "out.log")
        log.addHandler(self._handler)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send numbers to every sink."""
        for sink in self._sinks:
            sink.log(kind, step, values)

    def text(self, name: str, step: int, content: str) -> None:
        """Send a text to every sink."""
        for sink in self._sinks:
            sink.text(name, step, content)

    def write(self, name: str, content: str) -> None:
        """Write a text file of the run folder, whole or not at all."""
        if self.folder is not None:
            write_text(self.folder / name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run folder; NaN and infinity become null."""
        self.write(name, json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()
        if self._handler is not None:
            log.removeHandler(self._handler)
            self._handler.close()


def write_text(path: Path, content: str) -> None:
    """Write a text file, whole or not at all, and its folder where it lacks."""
    with replacing(path) as new:
        new.write_text(content, encoding="utf-8")


def _drop_lines_after(path: Path, step: int, evaluated: int) -> None:
    """Of evaluations those after step `evaluated`, of anything else those after `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            told = json_of(line)
            if told["step"] <= (evaluated if told["kind"] == "evaluation" else step):
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short, or a bad disk spoiled
    write_text(path, "".join(line + "\n" for line in kept))


def environment(
    packages: Sequence[str] = ("slidevlm", "torch", "numpy", "h5py", "tokenizers"),
) -> dict[str, Any]:
    """What the run ran on: versions, platform, command."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": sys.argv,
        "code": str(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class Bar:
    """Progress on a terminal; elsewhere it does nothing and the log lines tell."""

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        self._progress: Any = None
        if not (shown and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, note="")
        self._progress.start()

    @property
    def visible(self) -> bool:
        """Whether anything is shown, so that a note is worth making."""
        return self._progress is not None

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def working(title: str, *, shown: bool = True) -> Iterator[None]:
    """Within, a terminal shows that something is done of which nobody knows how long it takes.

    Not around a `Bar`, which tells more.
    """
    if not (shown and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{title} ..."):
        yield


class _Terminal(logging.Handler):
    """Writes to what stderr is at that moment: notebooks and tests exchange it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _of_every_process(record: logging.LogRecord) -> bool:
    own = logging.getLogger(record.name)
    return record.levelno >= logging.ERROR or (own is not log and own.level > 0)


def configure_logging(*, debug: bool, main: bool) -> None:
    """Log to stderr: everything from the first process, errors alone from the others.

    Loggers with a level of their own are heard from every process.
    """
    for handler in [h for h in log.handlers if isinstance(h, _Terminal)]:
        log.removeHandler(handler)
    terminal = _Terminal()
    terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if not main:
        terminal.addFilter(_of_every_process)
    log.addHandler(terminal)
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)


def _log_file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


@contextmanager
def log_to(path: Path | None) -> Iterator[None]:
    """Within, the log of this process is also written to a file; None: it is not."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _log_file(path)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def peak_memory() -> dict[str, float]:
    """Peak of resident memory of this process, and of what torch has taken on the device, MB."""
    import torch

    found = {"memory_mb": _peak_resident_mb()}
    if torch.cuda.is_available():
        found["device_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _peak_resident_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

"""Training on two processes that is struck down at random moments, and started again.

A strike is chosen by a seeded generator: whom it hits (a rank, the agent that torchrun is), with
what (SIGKILL, SIGTERM, SIGUSR1), and during what (a step, an evaluation, a save, the start).
What is found afterwards is judged here too: processes left behind and unreadable checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slidevlm.data.synthetic import DemoCohort
from slidevlm.flags import arguments
from slidevlm.models import zoo
from slidevlm.train import checkpoint as ckpt

RANKS, STEPS_AN_EPOCH, EPOCHS = 2, 10, 6
STEPS = STEPS_AN_EPOCH * EPOCHS
# Generous, because a busy machine is slow and not wrong; what hangs does so for ever.
GONE_SECONDS = 180.0  # after a strike nobody may be left
PHASE_SECONDS = 600.0  # until the moment of a strike has come
END_SECONDS = 900.0  # until a start has trained to the end
MARK = "SLIDEVLM_FAULTS_MARK"
_FLAGS = {a.name: a.flag for a in arguments()}
_STEP = re.compile(r" step (\d+)/")

HITS = (
    ("rank", signal.SIGKILL),
    ("rank", signal.SIGKILL),
    ("agent", signal.SIGKILL),
    ("agent", signal.SIGTERM),
    ("rank", signal.SIGTERM),
    ("rank", signal.SIGUSR1),
)
PHASES = ("step", "step", "save", "evaluation", "start")


@dataclass(frozen=True)
class Strike:
    """One blow."""

    whom: str  # rank or agent
    rank: int
    signal: signal.Signals
    phase: str
    after_steps: int  # of this start, before the phase is waited for
    delay_seconds: float  # after the phase was seen

    def __str__(self) -> str:
        whom = f"rank {self.rank}" if self.whom == "rank" else "the agent"
        return f"{self.signal.name} to {whom} during {self.phase}"


def strikes(number: int, seed: int) -> list[Strike]:
    """So many; the first ones already have each hit and each phase."""
    draw = random.Random(seed)
    hits, phases = list(HITS), list(PHASES)
    found = []
    for i in range(number):
        if i % len(hits) == 0:
            draw.shuffle(hits)
        if i % len(phases) == 0:
            draw.shuffle(phases)
        whom, number_of_signal = hits[i % len(hits)]
        phase = phases[i % len(phases)]
        delay = {"start": 6.0, "evaluation": 0.3, "step": 0.1, "save": 0.002}[phase]
        found.append(
            Strike(
                whom,
                draw.randrange(RANKS),
                number_of_signal,
                phase,
                draw.randrange(1, 6),
                draw.uniform(0.0, delay),
            )
        )
    return found


@dataclass
class Training:
    """One run, started as often as it takes."""

    folder: Path
    name: str
    words: list[str]
    told: Path = field(init=False)  # what its processes wrote to stderr, of the last start
    starts: int = 0

    def __post_init__(self) -> None:
        self.told = self.folder / f"{self.name}.stderr"

    @property
    def run(self) -> Path:
        return self.folder / self.name

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / f"epoch_{EPOCHS}.pt"

    def start(self) -> Started:
        mark = uuid.uuid4().hex
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={RANKS}", "-m", "--", "slidevlm", "train", *self.words]
        if self.run.exists():
            words += ["--resume", "latest"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
        with self.told.open("wb") as file:
            agent = subprocess.Popen(
                words, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.starts += 1
        return Started(self, agent, mark)


@dataclass
class Started:
    """The processes of one start."""

    training: Training
    agent: subprocess.Popen[bytes]
    mark: str

    def strike(self, strike: Strike) -> bool:
        """Wait for the moment, and hit; False where the run ended before it came."""
        if strike.phase == "start":
            time.sleep(strike.delay_seconds)
        elif not self._wait_for(strike):
            return False
        else:
            time.sleep(strike.delay_seconds)
        if self.agent.poll() is not None:
            return False
        victim = self.agent.pid
        if strike.whom == "rank":
            ranks = dict(self._ranks())
            victim = ranks.get(strike.rank, victim)  # at the very start there are no ranks yet
        try:
            os.kill(victim, strike.signal)
        except ProcessLookupError:
            return False
        return True

    def _wait_for(self, strike: Strike) -> bool:
        """Until so many steps were made, and then until the phase is seen."""
        folder = self.training.run / "checkpoints"
        until = time.monotonic() + PHASE_SECONDS
        seen = 0
        while self.agent.poll() is None:
            assert time.monotonic() < until, self.said()
            steps = [int(s) for s in _STEP.findall(self.said())]
            seen = max(seen, len(steps))
            if seen >= strike.after_steps:
                if strike.phase == "step":
                    return True
                if strike.phase == "save" and any(folder.glob(".*.tmp")):
                    return True
                if strike.phase == "evaluation" and steps[-1] % STEPS_AN_EPOCH == 0:
                    return True
            time.sleep(0.0005 if strike.phase == "save" else 0.005)
        return False

    def _ranks(self) -> Iterator[tuple[int, int]]:
        """Rank and process number of each."""
        for pid in self.processes():
            variables = _environment(pid)
            parent = _stat(pid)[1]
            if parent == self.agent.pid and "RANK" in variables:
                yield int(variables["RANK"]), pid

    def processes(self) -> list[int]:
        """All that this start has brought about and that live."""
        return [
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit()
            and _environment(int(p.name)).get(MARK) == self.mark
            and _stat(int(p.name))[0] not in ("Z", "")
        ]

    def wait_until_gone(self) -> float:
        """Seconds until no process is left.

        Raises:
            AssertionError: some are left, after GONE_SECONDS.
        """
        start = time.monotonic()
        while True:
            self.agent.poll()  # reaps it
            left = self.processes()
            passed = time.monotonic() - start
            if not left:
                return passed
            if passed > GONE_SECONDS:
                commands = [Path(f"/proc/{p}/cmdline").read_bytes()[:200] for p in left]
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"left behind: {commands}\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        return self.training.told.read_text(errors="replace")


def _environment(pid: int) -> dict[str, str]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in content.split(b"\0"))
    return {k.decode(errors="replace"): v.decode(errors="replace") for k, _, v in pairs if k}


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; ("", 0) where it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return words[0], int(words[1])


def training(cohort: DemoCohort, folder: Path, name: str, model: Path) -> Training:
    """60 steps of two ranks, with dropout, evaluations and a checkpoint every second step."""
    settings: dict[str, Any] = {
        "hdf5_filename": cohort.hdf5,
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": cohort.split("train"),
        "val_split": cohort.split("val"),
        "num_samples": STEPS_AN_EPOCH * RANKS * 2,
        "model": model,
        "batch_size": 2,
        "image_features_cutoff": 20,
        "workers": 1,
        "epochs": EPOCHS,
        "warmup": 5,
        "save_frequency": 1,
        "save_every_n_steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "dist_backend": "gloo",
        "log_every_n_steps": 1,
        "logs": folder,
        "name": name,
    }
    words = [word for key, value in settings.items() for word in (_FLAGS[key], str(value))]
    return Training(folder, name, words)


def model_with_dropout(folder: Path) -> Path:
    """The tiny model; random numbers take part in every step."""
    model = zoo.load("coca_tiny").to_dict()
    for part in ("slide", "text", "decoder"):
        model[part]["dropout"] = 0.1
    path = folder / "model.json"
    path.write_text(json.dumps(model))
    return path


def check_checkpoints(run: Path) -> int:
    """How many there are; each must be readable."""
    folder = run / "checkpoints"
    files = ckpt.checkpoints(folder) if folder.is_dir() else []
    for path in files:
        ckpt.load(path)  # raises where it is damaged
    return len(files)


def final_state(one: Training) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, and the optimizer's state."""
    model, state = ckpt.load(one.last)
    return model.weights, state.optimizer


def equal(a: Any, b: Any) -> bool:
    """To the last bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def losses(one: Training) -> list[tuple[int, float]]:
    """Step and loss of each step of the run's metrics."""
    return [(x["step"], x["loss"]) for x in _told(one) if x["kind"] == "train"]


def evaluations(one: Training) -> list[dict[str, Any]]:
    """Each line of the run's metrics that an evaluation has left."""
    return [x for x in _told(one) if x["kind"] == "evaluation"]


def _told(one: Training) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (one.run / "metrics.jsonl").read_text().splitlines()]

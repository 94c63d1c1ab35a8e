"""The command line. Parsing is instant: torch is imported only by the command that runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slidevlm import __version__
from slidevlm.config import arg
from slidevlm.errors import SlideVLMError
from slidevlm.flags import parse_config, parse_into

USAGE = """\
usage: slidevlm COMMAND ...

Train, evaluate and use vision-language models of whole slides.

commands:
  train            train a model on bags of tile features and reports
  evaluate         evaluate a trained run
  demo             synthesize a cohort, train on it, evaluate: a first look in minutes
  data synthesize  write a cohort of synthetic specimens with known truth

slidevlm COMMAND --help tells more; --version prints the version.
exit codes: 0 done, 1 a fault of slidevlm, 2 an error in arguments, data or checkpoint, 130 Ctrl-C.
"""


def _train(argv: Sequence[str]) -> None:
    config, _ = parse_config(argv)
    from slidevlm.app import train

    train(config)


@dataclass(frozen=True)
class _EvaluateArguments:
    """arguments: what is evaluated."""

    run: str = arg("", "folder of a run", positional=True)


EVALUATE_HELP = """\
Evaluate the newest checkpoint of a run on its splits: losses, retrieval, zero-shot
classification, and with --save-captions generated reports. The run's own arguments hold
unless others are given."""
EVALUATE_EPILOG = """\
example:
  slidevlm evaluate logs/first --save-captions --val-gen-top-k 1
"""


def _evaluate(argv: Sequence[str]) -> None:
    config, others = parse_config(
        argv, "slidevlm evaluate", EVALUATE_HELP, EVALUATE_EPILOG, _EvaluateArguments
    )
    from slidevlm.app import evaluate_run

    evaluate_run(Path(others["run"]), config)


@dataclass(frozen=True)
class _SynthesizeArguments:
    """arguments: the cohort."""

    folder: str = arg("", "where to write it", positional=True)
    specimens: int = arg(480, "number of specimens", minimum=20)
    seed: int = arg(0, "seed; equal seeds give equal cohorts", minimum=0)


SYNTHESIZE_HELP = """\
Write a cohort of synthetic specimens with known truth: bags of tile features with positions,
reports, labels, prompts, few-shot examples and splits by patient."""


def _synthesize(argv: Sequence[str]) -> None:
    arguments = parse_into(
        _SynthesizeArguments,
        argv,
        "slidevlm data synthesize",
        SYNTHESIZE_HELP,
        "example:\n  slidevlm data synthesize cohort --specimens 200\n",
    )
    from slidevlm.demo import synthesize_with_bar

    synthesize_with_bar(Path(arguments.folder), arguments.specimens, arguments.seed)
    print(f"wrote {arguments.folder}; its README.md tells what is in it")


@dataclass(frozen=True)
class _DemoArguments:
    """arguments: where and how long."""

    folder: str = arg("demo", "folder for the cohort and the run", positional=True)
    specimens: int = arg(480, "number of specimens", minimum=20)
    epochs: int = arg(14, "epochs", minimum=1)
    seed: int = arg(0, "seed of cohort and training", minimum=0)
    workers: int = arg(1, "loader processes", minimum=0)


DEMO_HELP = """\
Synthesize the demo cohort, train coca_small on it, evaluate it on its test split, and leave
a run folder to look at. Takes minutes on two cores."""


def _demo(argv: Sequence[str]) -> None:
    arguments = parse_into(_DemoArguments, argv, "slidevlm demo", DEMO_HELP)
    from slidevlm.demo import demo

    demo(
        Path(arguments.folder),
        specimens=arguments.specimens,
        epochs=arguments.epochs,
        seed=arguments.seed,
        workers=arguments.workers,
    )


COMMANDS: dict[tuple[str, ...], Callable[[Sequence[str]], None]] = {
    ("train",): _train,
    ("evaluate",): _evaluate,
    ("demo",): _demo,
    ("data", "synthesize"): _synthesize,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["version"]):
        print(f"slidevlm {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    for name, command in COMMANDS.items():
        if tuple(words[: len(name)]) == name:
            return _run(command, words[len(name) :])
    known = ", ".join(" ".join(name) for name in COMMANDS)
    print(f"slidevlm: no command {' '.join(words[:2])!r}; commands: {known}", file=sys.stderr)
    return 2


def _run(command: Callable[[Sequence[str]], None], argv: list[str]) -> int:
    try:
        command(argv)
    except SlideVLMError as error:
        if "--debug" in argv:
            raise
        print(f"slidevlm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("slidevlm: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

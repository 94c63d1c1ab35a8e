"""The command line. Parsing is instant: torch is imported only by the command that runs."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slidevlm import __version__, cli_use
from slidevlm.cli_use import path_of
from slidevlm.completion import SHELLS, script
from slidevlm.config import arg, validate_arguments
from slidevlm.errors import ConfigError, SlideVLMError
from slidevlm.flags import declared, parse_config, parse_into
from slidevlm.launch import keep_memory, share_cores
from slidevlm.registry import nearest
from slidevlm.train.launcher import note_launcher

USAGE = """\
usage: slidevlm COMMAND ...

Train, evaluate and use vision-language models of whole slides.

commands:
  train            train a model on bags of tile features and reports
  evaluate         evaluate a trained run
  caption          write reports of slides with a trained model
  classify         the classes of slides, by prompts
  embed            the vectors of slides
  score            score any two files of reports
  report           the page of a run: curves, tables, map, specimens; one HTML file
  attention        where a model attends in a slide: table, picture, QuPath annotations
  demo             synthesize a cohort, train on it, evaluate: a first look in minutes
  doctor           what is wrong with this machine or installation, and how to mend it
  completion       a script by which bash or zsh completes all this
  models list      the shipped configurations
  models show      a model's parts, groups for locking, memory of a step
  models new       copy a configuration to a file of one's own
  models export    a trained model as a folder in Hugging Face's form
  data inspect     what a file or a folder of features is
  data check       report on a whole cohort before it is trained on
  data convert     any cohort -> one HDF5 file of which few tiles of many are read fast
  data split       divide a cohort by patient or site, classes in proportion
  data synthesize  write a cohort of synthetic specimens with known truth

slidevlm COMMAND --help tells more; --version prints the version.
exit codes: 0 done, 1 a fault of slidevlm (data check, doctor: errors were found), 2 an error in
arguments, data, checkpoint or machine, 130 Ctrl-C, 141 the reader of the output has gone.
--debug shows the traceback of an error. docs/commands.md has more.
"""


@dataclass(frozen=True)
class _TrainArguments:
    """output: what is printed at the end."""

    json: bool = arg(False, cli_use.JSON + ": the run's folder and the last metrics")


def _train(argv: Sequence[str]) -> None:
    config, others = parse_config(argv, positional=_TrainArguments)
    from slidevlm.evaluation_commands import train

    train(config, argv, as_json=_TrainArguments(**others).json)


@dataclass(frozen=True)
class _EvaluateArguments:
    """arguments: what is evaluated."""

    run: str | None = arg("", "folder of a run, or a checkpoint file of one", positional=True)
    predictions: str | None = arg(
        None,
        "instead of a run: its stored predictions.npz, scored again without model or data",
        file=True,
    )
    compare: str | None = arg(
        None,
        "evaluation, run or predictions.npz to compare with: differences with intervals and "
        "p-values, on the same resamples",
        file=True,
    )
    format: str = arg("table", "of what is printed", choices=("table", "markdown", "latex"))
    json: bool = arg(False, cli_use.JSON + ": all metrics with intervals, and the comparison")


EVALUATE_HELP = """\
Evaluate the newest checkpoint of a run on its splits: losses, retrieval, zero-shot and few-shot
classification, probes, and with --save-captions generated reports; print a table and write files
into a new folder of the run. The run's own arguments hold unless others are given."""
EVALUATE_EPILOG = """\
examples:
  slidevlm evaluate logs/first --save-captions --val-gen-top-k 1
  slidevlm evaluate logs/first --probe --eval-metric-bootstraps 1000 --compare logs/second
  slidevlm evaluate --predictions logs/first/evaluation-.../predictions.npz --format latex
"""


def _evaluate(argv: Sequence[str]) -> None:
    config, others = parse_config(
        argv, "slidevlm evaluate", EVALUATE_HELP, EVALUATE_EPILOG, _EvaluateArguments
    )
    arguments = _EvaluateArguments(**others)
    validate_arguments(arguments)
    from slidevlm.evaluation_commands import Evaluation, evaluate

    evaluate(
        Evaluation(
            path_of(arguments.run or None),
            path_of(arguments.predictions),
            path_of(arguments.compare),
            arguments.format,
            arguments.json,
        ),
        config,
    )


@dataclass(frozen=True)
class _ScoreArguments:
    """arguments: what is compared, and how."""

    generated: str = arg(
        "",
        "file of generated reports: JSON, JSONL or CSV with id and report, or a run's "
        "captions_*.json",
        positional=True,
    )
    references: str | None = arg(
        "", "file of the true reports; not needed for a run's captions_*.json", positional=True
    )
    bootstraps: int = arg(
        1000,
        "resamples for intervals; 0: none",
        minimum=0,
        also=("--eval-metric-bootstraps",),
    )
    ci: float = arg(
        0.95, "coverage of the intervals", above=0.0, below=1.0, also=("--eval-metric-ci",)
    )
    seed: int = arg(0, "of the resamples", minimum=0, maximum=1e18)
    clinical: str | None = arg(
        None, "YAML of your own for clinical agreement; see docs/reports.md", file=True
    )
    meteor_data: str | None = arg(
        None,
        "folder of METEOR 1.5 with its jar and data, for synonyms and paraphrases",
        file=True,
    )
    embedder: str | None = arg(
        None, "for REG2025's score: tfidf, or the folder of a language model"
    )
    only_common: bool = arg(False, "score the specimens that both files have")
    format: str = arg("table", "of the output", choices=("table", "markdown", "latex"))
    output: str | None = arg(None, "JSON file to write the scores to")
    json: bool = arg(False, cli_use.JSON)


SCORE_HELP = """\
Score generated reports against true ones, without a model: BLEU, ROUGE-L, METEOR, CIDEr, clinical
agreement and more, with bootstrap intervals."""
SCORE_EPILOG = """\
examples:
  slidevlm score reports.json truth.csv
  slidevlm score logs/first/captions_test.json
"""


def _score(argv: Sequence[str]) -> None:
    a = parse_into(_ScoreArguments, argv, "slidevlm score", SCORE_HELP, SCORE_EPILOG)
    from slidevlm.eval.bootstrap import Bootstrap
    from slidevlm.score_commands import Comparing, score

    score(
        Comparing(
            generated=Path(a.generated),
            references=Path(a.references) if a.references else None,
            bootstrap=Bootstrap(a.bootstraps, a.ci, a.seed, "specimen"),
            clinical=path_of(a.clinical),
            meteor_data=path_of(a.meteor_data),
            embedder=a.embedder,
            only_common=a.only_common,
            form=a.format,
            output=path_of(a.output),
            as_json=a.json,
        )
    )


@dataclass(frozen=True)
class _ReportArguments:
    """arguments: which run, and where the page goes."""

    run: str = arg("", "folder of a run, or of one of its evaluations", positional=True)
    other: str | None = arg("", "another one, shown beside it", positional=True)
    output: str | None = arg(None, "file to write", default_text="report.html in RUN")
    attention: tuple[str, ...] = arg(
        (),
        "also where the model attends, with the check of it: in so many specimens of the test "
        "split, or in those named; reads the features that the run's config.yaml names",
    )
    device: str | None = arg(
        None, "of --attention: cuda, cuda:1 or cpu", default_text="cuda where there is one"
    )
    slide_files: tuple[str, ...] = arg(
        (),
        "of --attention: the slides, drawn under the tiles: files called as their specimens, or "
        "folders of them (extra slide or tiffslide); the page then contains small pictures of them",
    )
    mpp: float | None = arg(
        None,
        "micrometres a level-0 pixel, where positions are in micrometres",
        default_text="the slide files'",
        above=0.0,
    )
    json: bool = arg(False, cli_use.JSON)


REPORT_HELP = """\
Write the page of a run, or of two side by side: settings, learning curves, retrieval, tables of all
tasks, confusion matrices, ROC curves, a map of the embeddings, every specimen with its true and its
generated report. One HTML file that needs no network. It contains the reports of the specimens."""
REPORT_EPILOG = """\
examples:
  slidevlm report logs/first
  slidevlm report logs/first logs/second --output both.html
  slidevlm report logs/first --attention 8
  slidevlm report logs/first --attention 8 --slide-files slides/
"""


def _report(argv: Sequence[str]) -> None:
    a = parse_into(_ReportArguments, argv, "slidevlm report", REPORT_HELP, REPORT_EPILOG)
    if not a.attention:
        given = {"--device": a.device, "--slide-files": a.slide_files, "--mpp": a.mpp}
        for flag in (flag for flag, value in given.items() if value):
            raise ConfigError(f"{flag} is for --attention; without it the page computes nothing")
    if a.mpp is not None and not a.slide_files:
        raise ConfigError("--mpp is for --slide-files; without them nothing is drawn to its scale")
    if any(name.isdecimal() and int(name) == 0 for name in a.attention):
        raise ConfigError("--attention must be at least 1 specimen, not 0")
    from slidevlm.page_commands import Reporting, report

    report(
        Reporting(
            run=Path(a.run),
            other=path_of(a.other or None),
            output=path_of(a.output),
            attention=tuple(a.attention),
            device=a.device,
            slide_files=tuple(a.slide_files),
            mpp=a.mpp,
            as_json=a.json,
        )
    )


@dataclass(frozen=True)
class _SynthesizeArguments:
    """arguments: the cohort."""

    folder: str = arg("", "where to write it", positional=True)
    specimens: int = arg(480, "number of specimens", minimum=20)
    seed: int = arg(0, "seed; equal seeds give equal cohorts", minimum=0, maximum=1e18)


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
class _InspectArguments:
    """arguments: what is looked at."""

    path: str = arg("", "file of features of any known format, or folder of them", positional=True)
    json: bool = arg(False, "print JSON, with every bag that was looked at")


INSPECT_HELP = """\
Say what a file or a folder of features is: format, tiles, width, type, unit, encoder, storage."""
INSPECT_EPILOG = """\
example:
  slidevlm data inspect features/h5_files/slide_1.h5
"""


def _inspect(argv: Sequence[str]) -> None:
    arguments = parse_into(
        _InspectArguments, argv, "slidevlm data inspect", INSPECT_HELP, INSPECT_EPILOG
    )
    from slidevlm.data_commands import inspect

    inspect(Path(arguments.path), as_json=arguments.json)


@dataclass(frozen=True)
class _CheckArguments:
    """arguments: where the report goes."""

    output: str | None = arg(None, "folder that gets check.json and check.html, a page with plots")
    json: bool = arg(False, cli_use.JSON)


CHECK_HELP = """\
Read a whole cohort as a training with these arguments would, and list everything found: missing,
unreadable, NaN and infinite features, duplicate slides and reports, patients in two splits,
specimens in no split, reports longer than the context, mixtures of widths, encoders and units,
class balance, checksums. Exit code 0: no error, perhaps warnings; 1: errors; 2: the arguments."""
CHECK_EPILOG = """\
example:
  slidevlm data check --config training.yaml --output report
"""


def _check(argv: Sequence[str]) -> int:
    config, others = parse_config(
        argv, "slidevlm data check", CHECK_HELP, CHECK_EPILOG, _CheckArguments
    )
    from slidevlm.data_commands import check

    a = _CheckArguments(**others)
    return 0 if check(config, path_of(a.output), as_json=a.json) else 1


@dataclass(frozen=True)
class _ConvertArguments:
    """arguments: what is converted, and into what."""

    source: str = arg(
        "", "HDF5 file in the case layout, or file or folder of any known format", positional=True
    )
    target: str = arg("", "HDF5 file to write", positional=True)
    hdf5_feature_attribute: str | None = arg(
        None,
        "features of an HDF5 source that has several",
        flag="--hdf5_feature_attribute",
    )
    slide_table: str | None = arg(
        None,
        "slides of each specimen, as in training; without it each slide is a specimen",
        file=True,
    )
    text_data_file: str | None = arg(
        None, "reports to write beside the features, as in training", file=True
    )
    feature_attribute: str | None = arg(
        None,
        "name of the features in the target",
        default_text="the source's, else the encoder's, else features",
    )
    text_attribute: str | None = arg(
        None, "name in the target of the texts of --text-data-file", default_text="report"
    )
    dtype: str = arg(
        "float16",
        "type of the features written",
        choices=("float16", "float32", "bfloat16"),
    )
    chunk_rows: int | None = arg(
        None,
        "write chunks of N rows (readable by tools that want chunks)",
        default_text="contiguous, the fastest",
        minimum=1,
    )
    mpp: float | None = arg(
        None,
        "turn positions in level-0 pixels, and sizes of tiles, into micrometres: so many a pixel, "
        "the same for all slides",
        above=0.0,
    )
    workers: int = arg(2, "reading processes; 0 reads in one", minimum=0)
    json: bool = arg(False, cli_use.JSON)


CONVERT_HELP = """\
Convert any cohort to one HDF5 file in the case layout, with a checksum of each specimen. Killed or
interrupted, the same command goes on where it was."""
CONVERT_EPILOG = """\
example:
  slidevlm data convert features/ cohort.h5 --text-data-file reports.json --workers 4
"""


def _convert(argv: Sequence[str]) -> None:
    arguments = parse_into(
        _ConvertArguments, argv, "slidevlm data convert", CONVERT_HELP, CONVERT_EPILOG
    )
    if arguments.text_attribute is not None and arguments.text_data_file is None:
        raise ConfigError("--text-attribute names the texts of --text-data-file; give that too")
    from slidevlm.data_commands import Conversion, convert_path

    convert_path(
        Conversion(
            Path(arguments.source),
            Path(arguments.target),
            arguments.hdf5_feature_attribute,
            path_of(arguments.slide_table),
            path_of(arguments.text_data_file),
            arguments.feature_attribute,
            arguments.text_attribute or "report",
            arguments.dtype,
            arguments.chunk_rows,
            arguments.mpp,
            arguments.workers,
        ),
        as_json=arguments.json,
    )


@dataclass(frozen=True)
class _SplitArguments:
    """arguments: what is divided, and how."""

    source: str = arg(
        "", "HDF5 file in the case layout, or file or folder of any known format", positional=True
    )
    folder: str = arg("", "gets train.txt, val.txt and test.txt", positional=True)
    hdf5_feature_attribute: str | None = arg(
        None,
        "features of an HDF5 source that has several; specimens without them are left out",
        flag="--hdf5_feature_attribute",
    )
    slide_table: str | None = arg(
        None,
        "slides of each specimen, as in training; without it each slide is a specimen",
        file=True,
    )
    labels: str | None = arg(
        None,
        "label file, as --zsc-specimen-class-mapping takes it: every split gets its share of "
        "each class",
        file=True,
        also=("--zsc-specimen-class-mapping",),
    )
    fractions: tuple[float, ...] = arg(
        (0.7, 0.15, 0.15),
        "shares of train, val and test, or of train and val",
        default_text="0.7 0.15 0.15",
    )
    by_site: bool = arg(False, "keep each site of TCGA barcodes (second field) in one split")
    site_table: str | None = arg(
        None,
        "table (CSV, TSV) of patients or specimens; each of its sites is kept in one split",
        file=True,
    )
    site_column: str | None = arg(None, "column of --site-table", default_text="site")
    seed: int = arg(0, "equal seeds give equal splits", minimum=0, maximum=1e18)
    json: bool = arg(False, cli_use.JSON)


SPLIT_HELP = """\
Divide a cohort into split files by patient, or by site; no patient is ever in two splits. Says how
the classes came out. Existing files are not overwritten."""
SPLIT_EPILOG = """\
example:
  slidevlm data split cohort.h5 splits --labels diagnosis.json --fractions 0.8 0.1 0.1
"""


def _split(argv: Sequence[str]) -> None:
    arguments = parse_into(_SplitArguments, argv, "slidevlm data split", SPLIT_HELP, SPLIT_EPILOG)
    if arguments.by_site and arguments.site_table is not None:
        raise ConfigError("--by-site and --site-table both name sites; give one")
    if arguments.site_column is not None and arguments.site_table is None:
        raise ConfigError("--site-column is a column of --site-table; give that too")
    from slidevlm.data_commands import Dividing, split_path

    split_path(
        Dividing(
            Path(arguments.source),
            Path(arguments.folder),
            arguments.hdf5_feature_attribute,
            path_of(arguments.slide_table),
            path_of(arguments.labels),
            arguments.fractions,
            arguments.by_site,
            path_of(arguments.site_table),
            arguments.site_column or "site",
            arguments.seed,
        ),
        as_json=arguments.json,
    )


@dataclass(frozen=True)
class _ListArguments:
    """arguments: how they are listed."""

    json: bool = arg(False, cli_use.JSON)


MODELS_LIST_HELP = "List the shipped model configurations, names for --model."


def _models_list(argv: Sequence[str]) -> None:
    epilog = "example:\n  slidevlm models list\n"
    a = parse_into(_ListArguments, argv, "slidevlm models list", MODELS_LIST_HELP, epilog)
    from slidevlm.model_commands import list_models

    list_models(as_json=a.json)


@dataclass(frozen=True)
class _ShowArguments:
    """arguments: the model, and the step whose memory is told."""

    model: str = arg(
        "", "name of a shipped configuration, or file of one", positional=True, shipped=True
    )
    tiles: int = arg(10_000, "tiles of the bag", minimum=1)
    tokens: int | None = arg(
        None, "tokens of the report", minimum=2, default_text="the model's context"
    )
    json: bool = arg(False, cli_use.JSON)


SHOW_HELP = """\
Show a model: parameters of each part, the groups that --lock-image-unlocked-groups and
--lock-text-unlocked-layers count from the output, and the memory of a training step. No weights are
made and nothing is downloaded, save the config.json of a text tower of type hf."""
SHOW_EPILOG = """\
example:
  slidevlm models show coca_stage_1 --tiles 50000
"""


def _models_show(argv: Sequence[str]) -> None:
    arguments = parse_into(_ShowArguments, argv, "slidevlm models show", SHOW_HELP, SHOW_EPILOG)
    from slidevlm.model_commands import show

    show(arguments.model, arguments.tiles, arguments.tokens, as_json=arguments.json)


@dataclass(frozen=True)
class _NewArguments:
    """arguments: what is copied, and where to."""

    model: str = arg(
        "", "name of a shipped configuration, or file of one", positional=True, shipped=True
    )
    file: str = arg("", "file to write, ending in .json", positional=True)


def _models_new(argv: Sequence[str]) -> None:
    arguments = parse_into(
        _NewArguments,
        argv,
        "slidevlm models new",
        "Copy a model configuration to a file of one's own.",
        "example:\n  slidevlm models new coca_stage_1 mine.json\n",
    )
    from slidevlm.model_commands import new

    new(arguments.model, Path(arguments.file))


@dataclass(frozen=True)
class _ExportArguments:
    """arguments: what is exported, and where to."""

    model: str = arg("", "run folder or checkpoint, as --pretrained takes it", positional=True)
    folder: str = arg("", "new folder", positional=True)
    json: bool = arg(False, cli_use.JSON)


EXPORT_HELP = """\
Write a trained model as a folder: model.safetensors, config.json and the tokenizer, in Hugging
Face's form. LoRA is merged. --pretrained reads the folder, or the .safetensors file alone."""


def _models_export(argv: Sequence[str]) -> None:
    arguments = parse_into(
        _ExportArguments,
        argv,
        "slidevlm models export",
        EXPORT_HELP,
        "example:\n  slidevlm models export logs/first exported\n",
    )
    from slidevlm.model_commands import export_model

    export_model(arguments.model, Path(arguments.folder), as_json=arguments.json)


@dataclass(frozen=True)
class _DemoArguments:
    """arguments: where and how long."""

    folder: str = arg("demo", "folder for the cohort and the run", positional=True)
    specimens: int = arg(480, "number of specimens", minimum=20)
    epochs: int = arg(14, "epochs", minimum=1)
    seed: int = arg(0, "seed of cohort and training", minimum=0, maximum=1e18)
    workers: int = arg(1, "reading processes; 0 reads in one", minimum=0)
    json: bool = arg(False, cli_use.JSON)


DEMO_HELP = """\
Synthesize the demo cohort, train coca_small on it, evaluate it on its test split, and leave
a run folder to look at. Takes minutes on two cores."""


def _demo(argv: Sequence[str]) -> None:
    epilog = "example:\n  slidevlm demo first_look --epochs 5\n"
    arguments = parse_into(_DemoArguments, argv, "slidevlm demo", DEMO_HELP, epilog)
    from slidevlm.demo import demo

    demo(
        Path(arguments.folder),
        specimens=arguments.specimens,
        epochs=arguments.epochs,
        seed=arguments.seed,
        workers=arguments.workers,
        as_json=arguments.json,
    )


@dataclass(frozen=True)
class _DoctorArguments:
    """arguments: what is looked at, and how it is told."""

    skip_smoke_run: bool = arg(False, "no training and use of a tiny model, which takes seconds")
    json: bool = arg(False, cli_use.JSON)


DOCTOR_HELP = """\
Look at everything that slidevlm needs: Python, packages and what each extra is for, processor,
memory, shared memory, disk, GPU; train and use a tiny model; say what to mend and how. Exit code 0:
nothing has to be mended; 1: something has."""
DOCTOR_EPILOG = """\
examples:
  slidevlm doctor
  slidevlm doctor --json --skip-smoke-run
"""


def _doctor(argv: Sequence[str]) -> int:
    a = parse_into(_DoctorArguments, argv, "slidevlm doctor", DOCTOR_HELP, DOCTOR_EPILOG)
    from slidevlm.doctor import doctor

    return 0 if doctor(smoke_run=not a.skip_smoke_run, as_json=a.json) else 1


@dataclass(frozen=True)
class _CompletionArguments:
    """arguments: for which shell."""

    shell: str = arg("", "bash or zsh", choices=SHELLS, positional=True)


COMPLETION_HELP = """\
Print a script by which the shell completes commands, arguments and names of models."""
COMPLETION_EPILOG = """\
examples:
  eval "$(slidevlm completion bash)"     # in ~/.bashrc
  eval "$(slidevlm completion zsh)"      # in ~/.zshrc
"""


def _completion(argv: Sequence[str]) -> None:
    a = parse_into(
        _CompletionArguments, argv, "slidevlm completion", COMPLETION_HELP, COMPLETION_EPILOG
    )
    commands = {name: declared(command) for name, command in COMMANDS.items()}
    print(script(a.shell, commands), end="")


# What runs a command; its exit code, or None for 0.
Command = Callable[[Sequence[str]], int | None]

COMMANDS: dict[tuple[str, ...], Command] = {
    ("train",): _train,
    ("evaluate",): _evaluate,
    ("caption",): cli_use.caption,
    ("classify",): cli_use.classify,
    ("embed",): cli_use.embed,
    ("score",): _score,
    ("report",): _report,
    ("attention",): cli_use.attention,
    ("demo",): _demo,
    ("doctor",): _doctor,
    ("completion",): _completion,
    ("models", "list"): _models_list,
    ("models", "show"): _models_show,
    ("models", "new"): _models_new,
    ("models", "export"): _models_export,
    ("data", "inspect"): _inspect,
    ("data", "check"): _check,
    ("data", "convert"): _convert,
    ("data", "split"): _split,
    ("data", "synthesize"): _synthesize,
}


_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    note_launcher()
    share_cores(os.environ)
    keep_memory(os.environ)
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["version"]):
        print(f"slidevlm {__version__}")
        return 0
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in _HELP:
        print(USAGE, end="")
        return 0
    for name, command in COMMANDS.items():
        if tuple(words[: len(name)]) == name:
            return _run(command, words[len(name) :])
    family = [name for name in COMMANDS if len(name) > 1 and name[0] == words[0]]
    if family and (words[1:] == [] or words[1] in _HELP):
        print("".join(line for line in USAGE.splitlines(True) if f"  {words[0]} " in line), end="")
        print(f"\nslidevlm {words[0]} COMMAND --help tells more")
        return 0
    print(_no_command(words), file=sys.stderr)
    return 2


def _no_command(words: Sequence[str]) -> str:
    known = [" ".join(name) for name in COMMANDS]
    families = {name[0] for name in COMMANDS if len(name) > 1}
    asked = " ".join(words[:2]) if words[0] in families else words[0]
    near = " or ".join(nearest(asked, known))
    hint = f"did you mean {near}?" if near else f"commands: {', '.join(known)}"
    return f"slidevlm: no command {asked!r}; {hint}"


def _run(command: Command, argv: list[str]) -> int:
    try:
        code = command(argv) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("slidevlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush fails
        return 141
    except Exception as error:
        if "--debug" in argv:
            raise
        told = _told(error)
        if told is not None:
            print(f"slidevlm: error: {told}", file=sys.stderr)
            return 2
        print(_fault(error), file=sys.stderr)
        return 1


def _told(error: Exception) -> str | None:
    """What a user is told of an error of the arguments, the data or the machine; None: of none."""
    if isinstance(error, SlideVLMError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:  # disk full, no permission
        place = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{place}"
    # torch's own; torch is not imported for it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = (str(error).strip().splitlines() or ["no memory left"])[0]
        return (
            f"{first}\nlower --batch-size or --image-features-cutoff, or choose a smaller --model"
        )
    return None


def _fault(error: Exception) -> str:
    """What is told of a fault of slidevlm; the traceback goes to a file, as it cannot be had again
    from a run of days.
    """
    descriptor, path = tempfile.mkstemp(prefix="slidevlm-fault-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"slidevlm {__version__}: {' '.join(sys.argv)}\n\n")
        traceback.print_exception(type(error), error, error.__traceback__, file=file)
    return (
        f"slidevlm: a fault of slidevlm: {type(error).__name__}: {error}\n"
        f"The traceback is in {path}; please report it. --debug shows it here."
    )


if __name__ == "__main__":
    raise SystemExit(main())

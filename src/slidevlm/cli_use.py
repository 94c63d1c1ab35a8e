"""The words of the commands that use a model: caption, classify, embed, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slidevlm.config import Data, arg
from slidevlm.flags import parse_into

if TYPE_CHECKING:
    from slidevlm.app.using import Using

CHOICES = ("likelihood", "consensus", "similarity", "both")  # those of `slidevlm.models.decoding`
_MODELS = "the model's, else {}"
JSON = "print a JSON document in the place of text"


@dataclass(frozen=True)
class _SourceArguments:
    """arguments: a model, and what it is used on."""

    model: str = arg(
        "",
        "folder of a run, checkpoint (.pt), folder of weights, or hf-hub:owner/name",
        positional=True,
    )
    source: str = arg(
        "", "file of features of any known format, folder of them, or cohort", positional=True
    )
    split: str | None = arg(None, "file of the specimens to take, as in training", file=True)
    hdf5_feature_attribute: str | None = arg(
        None, "features of an HDF5 source that has several", flag="--hdf5_feature_attribute"
    )
    slide_table: str | None = arg(
        None, "slides of each specimen, as in training; without it each slide is one", file=True
    )
    image_features_cutoff: int = arg(
        Data.image_features_cutoff, "tiles read of one specimen at most", minimum=1
    )
    device: str | None = arg(None, "cuda, cuda:1 or cpu", default_text="cuda where there is one")
    precision: str | None = arg(
        None,
        "as in training: fp32, amp, amp_bf16",
        default_text="amp_bf16 on a GPU that computes in it, else fp32",
    )
    skip_bad_specimens: bool = arg(False, "leave out what cannot be read instead of stopping")
    json: bool = arg(False, JSON)


@dataclass(frozen=True)
class _UseArguments(_SourceArguments):
    """arguments: the same, read by other processes meanwhile."""

    workers: int = arg(2, "reading processes; 0 reads in one", minimum=0)


def path_of(name: str | None) -> Path | None:
    """The path that an argument names; None where it was not given."""
    return None if name is None else Path(name)


def _using(
    a: _SourceArguments, output: str, batch_size: int, workers: int, at_once: int = 1
) -> Using:
    from slidevlm.app.using import Using

    return Using(
        model=a.model,
        source=Path(a.source),
        output=None if output == "-" else Path(output),
        split=path_of(a.split),
        hdf5_feature_attribute=a.hdf5_feature_attribute,
        slide_table=path_of(a.slide_table),
        image_features_cutoff=a.image_features_cutoff,
        batch_size=batch_size,
        workers=workers,
        at_once=at_once,
        device=a.device,
        precision=a.precision,
        skip_bad=a.skip_bad_specimens,
    )


AT_ONCE = arg(
    1,
    "batches computed side by side, each by a thread of its own; as many as the CPU has cores is "
    "faster than one by all cores, and a kill costs up to so many",
    minimum=1,
)


# -- caption ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CaptionArguments(_UseArguments):
    """arguments: what reports are written of, and how."""

    output: str = arg(
        "captions.json",
        "file to write, whose ending tells the form: .json, .csv or .txt; - writes lines of JSON "
        "to the terminal",
    )
    batch_size: int = arg(
        8, "specimens written of at a time; each is kept when its own report is done", minimum=1
    )
    prompt: str = arg("", "words that every report begins with, such as Diagnosis:")
    max_tokens: int | None = arg(
        None,
        "tokens generated at most",
        default_text=_MODELS.format(100),
        minimum=1,
        also=("--caption-val-max-seq-len",),
    )
    min_tokens: int | None = arg(
        None, "tokens generated at least", default_text=_MODELS.format(0), minimum=0
    )
    top_k: int | None = arg(
        None,
        "draw from the k most likely tokens, 0 from all; 1 takes the most likely",
        default_text=_MODELS.format(1),
        minimum=0,
        also=("--val-gen-top-k",),
    )
    top_p: float | None = arg(
        None,
        "draw from the fewest tokens with this share",
        default_text=_MODELS.format(1.0),
        above=0.0,
        maximum=1.0,
    )
    temperature: float | None = arg(
        None, "of the draws", default_text=_MODELS.format(1.0), above=0.0
    )
    beams: int | None = arg(
        None,
        "search with so many beams",
        default_text=_MODELS.format(1),
        minimum=1,
        also=("--val-gen-num-beams",),
    )
    groups: int | None = arg(
        None,
        "groups of beams, which keep away from each other",
        default_text=_MODELS.format(1),
        minimum=1,
        also=("--val-gen-num-beam-groups",),
    )
    diversity: float | None = arg(
        None, "how far the groups keep away", default_text=_MODELS.format(0.5), minimum=0.0
    )
    length_penalty: float | None = arg(
        None, "score = log-probability / tokens ** this", default_text=_MODELS.format(1.0)
    )
    repetition_penalty: float | None = arg(
        None,
        "above 1, tokens that are there already cost",
        default_text=_MODELS.format(1.0),
        above=0.0,
    )
    no_repeat_ngram: int | None = arg(
        None, "no run of so many tokens twice; 0: any", default_text=_MODELS.format(0), minimum=0
    )
    best: int = arg(1, "reports of each specimen", minimum=1)
    candidates: int | None = arg(
        None,
        "write so many reports of each specimen, by draws or beams, and keep the best",
        default_text=_MODELS.format(1),
        minimum=1,
    )
    choose: str | None = arg(
        None,
        "which are the best: by the model's own score, by agreement of their words with those of "
        "the other candidates, by nearness to the slide in the joint space, or by both of the last",
        default_text=_MODELS.format("likelihood"),
        choices=CHOICES,
    )
    seed: int = arg(0, "of the draws", minimum=0, maximum=1e18)


CAPTION_HELP = """\
Write a report of every specimen with a trained model, the best first, with its score, the hash of
the model and the settings. Interrupted, the same command goes on where it was."""
CAPTION_EPILOG = """\
examples:
  slidevlm caption logs/first slide.h5 --output - --prompt "Diagnosis:"
  slidevlm caption logs/first features/ --output reports.json --beams 6 --groups 3 --best 3
  slidevlm caption logs/first features/ --top-p 0.9 --candidates 16 --choose consensus
"""


def caption(argv: Sequence[str]) -> None:
    """`slidevlm caption`."""
    a = parse_into(_CaptionArguments, argv, "slidevlm caption", CAPTION_HELP, CAPTION_EPILOG)
    names = (
        *("max_tokens", "min_tokens", "top_k", "top_p", "temperature", "repetition_penalty"),
        *("no_repeat_ngram", "beams", "groups", "diversity", "length_penalty", "best"),
        *("candidates", "choose", "seed"),
    )
    decoding = {n: getattr(a, n) for n in names if getattr(a, n) is not None}
    from slidevlm.caption_commands import Captioning
    from slidevlm.caption_commands import caption as run

    run(Captioning(_using(a, a.output, a.batch_size, a.workers), a.prompt, decoding, a.json))


# -- embed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EmbedArguments(_UseArguments):
    """arguments: what is embedded, and how."""

    output: str = arg(
        "embeddings.h5",
        "file to write, whose ending tells the form: .h5, .npz or .parquet; one that is there is "
        "added to; - writes lines of JSON to the terminal",
    )
    batch_size: int = arg(
        1, "specimens embedded, and kept, at a time; more help on a GPU with small bags", minimum=1
    )
    at_once: int = AT_ONCE


EMBED_HELP = """\
Embed every specimen with a trained model: ids, patients, numbers of tiles and vectors of length 1
in one file, with the hash of the model. Each is kept as soon as it is computed: killed or
interrupted, the same command goes on where it was; of an output that is there, only what it lacks
is embedded."""
EMBED_EPILOG = """\
examples:
  slidevlm embed logs/first features/ --output embeddings.h5
  slidevlm embed logs/first cohort.h5 --split cohort/test.txt --output test.parquet
"""


def embed(argv: Sequence[str]) -> None:
    """`slidevlm embed`."""
    a = parse_into(_EmbedArguments, argv, "slidevlm embed", EMBED_HELP, EMBED_EPILOG)
    from slidevlm.use_commands import Embedding
    from slidevlm.use_commands import embed as run

    run(Embedding(_using(a, a.output, a.batch_size, a.workers, a.at_once), a.json))


# -- classify --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ClassifyArguments(_UseArguments):
    """arguments: what is classified, and how."""

    prompts: tuple[str, ...] = arg(
        (),
        "must be given: file of classes and their prompts (JSON, YAML), as in training; or two or "
        "more texts, each a class",
        also=("--zsc-class-prompt-mapping",),
    )
    ensemble: str = arg(
        "mean",
        "of several prompts a class: mean of their embeddings, or sum of their probabilities",
        choices=("mean", "probabilities"),
        also=("--zsc-ensemble",),
    )
    output: str = arg(
        "classes.csv",
        "file to write, whose ending tells the form: .csv or .json; - writes lines of JSON to the "
        "terminal",
    )
    batch_size: int = arg(
        1,
        "specimens classified, and kept, at a time; more help on a GPU with small bags",
        minimum=1,
    )
    at_once: int = AT_ONCE


CLASSIFY_HELP = """\
Zero-shot classification: the probability of each class for every specimen, from how near the slide
is to the texts of the class. Interrupted, the same command goes on where it was."""
CLASSIFY_EPILOG = """\
examples:
  slidevlm classify logs/first features/ --prompts diagnosis_prompts.json --output classes.csv
  slidevlm classify logs/first slide.h5 --prompts "lung cancer" "kidney cancer" --output -
"""


def classify(argv: Sequence[str]) -> None:
    """`slidevlm classify`."""
    a = parse_into(_ClassifyArguments, argv, "slidevlm classify", CLASSIFY_HELP, CLASSIFY_EPILOG)
    from slidevlm.use_commands import Classifying
    from slidevlm.use_commands import classify as run

    using = _using(a, a.output, a.batch_size, a.workers, a.at_once)
    run(Classifying(using, tuple(a.prompts), a.ensemble, a.json))


# -- attention -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AttentionArguments(_SourceArguments):
    """arguments: a model, slides, and where the files go."""

    output: str = arg("attention", "folder to write into")
    specimen: str | None = arg(None, "only this one of the source")
    sentence_wise: bool = arg(False, "also write a report, and follow each of its sentences")
    slide_file: str | None = arg(
        None,
        "the slide itself, of a source of one, to draw over its thumbnail (extra slide or "
        "tiffslide)",
        file=True,
    )
    mpp: float | None = arg(
        None,
        "micrometres a level-0 pixel, where positions are in micrometres",
        default_text="the slide file's",
        above=0.0,
    )
    tile_size: float | None = arg(
        None,
        "side of a tile, in the unit of the positions",
        default_text="the least distance between tiles",
        above=0.0,
    )
    seed: int = arg(0, "of the tiles that are dropped at random", minimum=0, maximum=1e18)


ATTENTION_HELP = """\
Write where a model attends in slides: weights of the tiles as CSV, drawn at their positions as
PNG, as QuPath annotations (GeoJSON), and what dropping the most attended tiles does against
dropping random ones. Interrupted or killed, the same command goes on with the specimen it was at.
Attention says where a model reads, not why it decides."""
ATTENTION_EPILOG = """\
examples:
  slidevlm attention logs/first slide.h5 --output seen --slide-file slide.svs
  slidevlm attention logs/first cohort.h5 --split cohort/test.txt --sentence-wise
"""


def attention(argv: Sequence[str]) -> None:
    """`slidevlm attention`."""
    a = parse_into(
        _AttentionArguments, argv, "slidevlm attention", ATTENTION_HELP, ATTENTION_EPILOG
    )
    from slidevlm.page_commands import Attending
    from slidevlm.page_commands import attention as run

    run(
        Attending(
            using=_using(a, a.output, 1, 0),
            output=Path(a.output),
            specimen=a.specimen,
            sentence_wise=a.sentence_wise,
            slide_file=path_of(a.slide_file),
            mpp=a.mpp,
            tile_size=a.tile_size,
            seed=a.seed,
            as_json=a.json,
        )
    )

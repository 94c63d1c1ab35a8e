"""Every training argument, declared once: eight frozen dataclasses, one field an argument.

`flags.py` turns these declarations into the command line, the YAML form and the table in
docs/arguments.md. This module imports neither torch nor a parser, so `--help` is instant.
What each argument does is told in its help; the specification is docs/spec/flags.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from slidevlm.errors import ConfigError

SINKS = ("tensorboard", "wandb")  # of --report-to
LONGEST_NAME = 200  # bytes of --name: file systems take 255, and TensorBoard and copies add to it
# Of --opt: torch's, then those of pytorch-optimizer.
OPTIMIZERS = ("adamw", "adam", "adamax", "nadam", "radam", "sgd", "lion", "lamb", "adopt")
# What these do not have of beta2 and eps.
LACKS = {"sgd": ("beta2", "eps"), "lion": ("eps",)}


@dataclass(frozen=True)
class Spec:
    """What a declaration says beside its type and default."""

    help: str
    flag: str | None = None  # spelling, where it is not "--" + name with hyphens
    also: tuple[str, ...] = ()  # other spellings, those of the same thing in other commands
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # the value must be greater than this
    below: float | None = None  # and less than this
    default_text: str | None = None  # what help shows where None is not the whole truth
    positional: bool = False
    once: bool = False  # of two the first may not be lost; otherwise the last one counts
    file: bool = False  # the value names files that must exist
    shipped: bool = False  # the value may be the name of a shipped model configuration
    extra: bool = False  # not one of the 85 of the specification


def arg(default: Any, help: str, **spec: Any) -> Any:
    """Declare one argument; see `Spec` for what may be said of it."""
    metadata = {"spec": Spec(help=help, **spec)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


# --aug-cfg: transform -> its own keys; key -> the greatest value (the least is 0).
AUG_TRANSFORMS: dict[str, tuple[str, ...]] = {
    "random_flip": (),
    "random_rotate90": (),
    "tile_dropout": ("drop_fraction",),
    "feature_noise": ("noise_std",),
}
AUG_KEYS = {"probability": 1.0, "drop_fraction": 1.0, "noise_std": float("inf")}


@dataclass(frozen=True)
class Data:
    """data: what is read, and how."""

    train_split: str | None = arg(
        None,
        "file of the specimen or patient identifiers to train on: separated by commas and/or "
        "newlines, a JSON list, or a CSV with a column specimen, case_id, slide_id or patient",
        file=True,
    )
    test_split: str | None = arg(
        None,
        "the same for the test split; evaluated with --test, and once after training",
        file=True,
    )
    val_split: tuple[str, ...] | None = arg(
        None, "the same for one or more validation splits, each reported by its name", file=True
    )
    workers: int = arg(4, "loader processes a training process; 0 reads in it", minimum=0)
    batch_size: int = arg(64, "specimens a batch and process", minimum=1)
    aug_cfg: Mapping[str, Any] = arg(
        {},
        "augmentation of the training bags: transform_type=NAME[,NAME...] of random_flip, "
        "random_rotate90 (both move positions), tile_dropout, feature_noise; probability=P of each "
        "(default 0.5), drop_fraction=F of the tiles (default 0.1), noise_std=S in standard "
        "deviations of a channel (default 0.1)",
    )
    text_data_file: str | None = arg(
        None,
        "reports: JSON {patient: {specimen: text}} or {specimen: text}, a list of {id, report}, "
        "CSV or JSONL; wins over the text in the HDF5 file",
        file=True,
    )
    hdf5_filename: str | None = arg(
        None,
        "HDF5 file in the case layout (/patients/<patient>/<specimen>), or of one slide or more "
        "in any other known format",
        flag="--hdf5_filename",
        file=True,
    )
    hdf5_feature_attribute: str | None = arg(
        None,
        "group under a specimen that holds features (and positions), such as uni or hipt_4096",
        flag="--hdf5_feature_attribute",
    )
    hdf5_text_attribute: str | None = arg(
        None,
        "text dataset under a specimen, such as report",
        flag="--hdf5_text_attribute",
    )
    num_samples: int | None = arg(
        None, "train on the first N usable specimens of the split only", minimum=1
    )
    root_dir: str | None = arg(
        None,
        "instead of an HDF5 file: folder of one feature file a slide in any known format, or of "
        "data_*/feature_information.txt and data_*/extracted_features/*.pth",
        file=True,
    )
    slide_table: str | None = arg(
        None,
        "slides of each specimen: CSV, TSV or XLSX with a column case_id, specimen or patient and "
        "a column slide_id or filename; without it each slide is a specimen",
        file=True,
        extra=True,
    )
    image_features_cutoff: int = arg(
        100_000,
        "tiles read of one specimen at most, sampled without replacement: afresh each epoch in "
        "training, the same ones in every evaluation",
        minimum=1,
    )
    allow_patient_overlap: bool = arg(
        False, "let a patient be in several splits (otherwise an error: leakage)", extra=True
    )
    bucket: str = arg(
        "balance",
        "by the bags' lengths: balance parts the specimens of a step so that its batches, on all "
        "processes, have about as many tiles (the same loss, less waiting, less memory); length "
        "also makes up the steps of similar bags, for encoders that pad (with more memory); off "
        "does neither",
        choices=("balance", "length", "off"),
        extra=True,
    )
    skip_bad_specimens: bool = arg(
        False,
        "drop specimens that have no tiles, cannot be read or are not finite from their batches, "
        "and list them in bad_specimens.txt (otherwise the first one stops the run)",
        extra=True,
    )

    @property
    def aug_transforms(self) -> tuple[str, ...]:
        """Names in the `transform_type` of --aug-cfg: one, several with commas, or a list."""
        value = self.aug_cfg.get("transform_type", ())
        names = value.split(",") if isinstance(value, str) else tuple(value)
        return tuple(str(name).strip() for name in names)


@dataclass(frozen=True)
class Model:
    """model: what is trained."""

    model: str = arg(
        "coca_stage_1",
        "name of a shipped configuration, or the path of a JSON or YAML file of one",
        shipped=True,
    )
    pretrained: str | None = arg(
        None,
        "weights to start from: a checkpoint (.pt, .safetensors) of slidevlm or MOSAIC, a run "
        "folder, a Hugging Face folder, hf-hub:owner/name, or a tag of one's own; into another "
        "--model goes what matches by name and shape, and a table says what did",
    )
    lock_image: bool = arg(
        False,
        "freeze the image tower: slide encoder, pooler and projection; frozen layers run without "
        "dropout",
    )
    lock_image_unlocked_groups: int = arg(
        0, "last groups of the image tower that --lock-image leaves trainable", minimum=0
    )
    lock_image_freeze_bn_stats: bool = arg(
        False, "BatchNorm layers that --lock-image froze keep their running mean and variance"
    )
    lock_text: bool = arg(
        False,
        "freeze the text tower: token and position vectors, layers, projection; the weights of "
        "LayerNorms stay trainable; frozen layers run without dropout",
    )
    lock_text_unlocked_layers: int = arg(
        0, "last layers of the text tower that --lock-text leaves trainable", minimum=0
    )
    lock_text_freeze_layer_norm: bool = arg(
        False, "--lock-text freezes the weights of LayerNorms, too"
    )
    use_bnb_linear: str | None = arg(
        None,
        "linear layers of bitsandbytes (extra bnb): int8 multiplies integers of 8 bits and trains; "
        "int8-frozen, nf4 and fp4 keep frozen layers (of LoRA, or locked) in 8 or 4 bits; or a "
        "class of bitsandbytes.nn: Linear8bitLt, Linear4bit, LinearNF4, LinearFP4",
    )
    torchscript: bool = arg(
        False,
        "torch.jit.script the model's parts that compute on tensors; not a Hugging Face tower",
    )
    torchcompile: bool = arg(
        False, "torch.compile the model's parts that compute on tensors, for any lengths"
    )
    trace: bool = arg(
        False,
        "torch.jit.trace encode_image and encode_text for any number of tiles and tokens; for "
        "--test alone",
    )
    grad_checkpointing: bool = arg(
        False,
        "compute activations again in the backward pass instead of keeping them: the same "
        "gradients, less memory, more time",
    )


@dataclass(frozen=True)
class Optim:
    """optim: how it is trained."""

    epochs: int = arg(32, "passes over the training split", minimum=1)
    epochs_cooldown: int | None = arg(
        None, "last epochs over which const-cooldown lowers the rate", minimum=1
    )
    lr: float | None = arg(None, "learning rate", default_text="5e-4", minimum=0.0)
    beta1: float | None = arg(
        None,
        "Adam's beta1; the momentum of --opt sgd",
        default_text="0.9",
        minimum=0.0,
        below=1.0,
    )
    beta2: float | None = arg(
        None,
        "Adam's beta2",
        default_text="0.98 where the model's name has vit in it, else 0.999; 0.99 of --opt lion",
        minimum=0.0,
        below=1.0,
    )
    eps: float | None = arg(
        None,
        "Adam's epsilon",
        default_text="1e-6 where the model's name has vit in it, else 1e-8",
        above=0.0,
    )
    wd: float = arg(
        0.2,
        "weight decay of AdamW; vectors, scalars and positional embeddings are exempt",
        minimum=0.0,
    )
    opt: str = arg(
        "adamw",
        "optimizer: those of torch; or lion, lamb, adopt of pytorch-optimizer (extra opt). adam, "
        "adamax and sgd add the decay to the gradient, the others take it off the weights",
        choices=OPTIMIZERS,
        extra=True,
    )
    layer_decay: float = arg(
        1.0,
        "factor of the rate from each group of a tower to the one before it (models show lists "
        "them); the last group of either tower, and what belongs to neither, have the whole rate",
        above=0.0,
        maximum=1.0,
        extra=True,
    )
    warmup: int = arg(100, "optimizer steps over which the rate rises from 0", minimum=0)
    skip_scheduler: bool = arg(False, "constant rate after the warmup")
    lr_scheduler: str = arg(
        "cosine",
        "course of the rate after the warmup",
        choices=("cosine", "const", "const-cooldown"),
    )
    lr_cooldown_end: float = arg(0.0, "rate at the end of const-cooldown", minimum=0.0)
    lr_cooldown_power: float = arg(1.0, "power of const-cooldown; 1 is a line", above=0.0)
    accum_freq: int = arg(
        1,
        "batches a step; the gradient is exactly that of one batch as many times as large",
        minimum=1,
    )
    grad_clip_norm: float | None = arg(
        None, "largest norm of the gradient of all parameters", above=0.0
    )
    precision: str = arg(
        "amp",
        "amp: float16 autocast with scaling on CUDA, bfloat16 autocast on a CPU; amp_bf16: "
        "bfloat16 autocast; bf16, fp16: also the weights of linear layers in that type; pure_bf16, "
        "pure_fp16: everything but the losses in that type (the optimizer keeps float32 copies of "
        "16-bit weights); fp32. float16 forms are for CUDA alone",
        choices=(
            "amp",
            "amp_bf16",
            "amp_bfloat16",
            "bf16",
            "fp16",
            "pure_bf16",
            "pure_fp16",
            "fp32",
        ),
    )
    device: str = arg("cuda", "cuda, cuda:1, cpu; where there is no CUDA the default is the CPU")


@dataclass(frozen=True)
class Loss:
    """loss: what is minimised."""

    local_loss: bool = arg(
        False,
        "each process computes only its own rows of the contrastive logits: n x N of them in N x "
        "N's place; the gradient is the same, that of the global batch",
    )
    gather_with_grad: bool = arg(
        False,
        "the contrastive gradient travels back through the gather of the embeddings, which costs "
        "as much traffic again; the gradient is the same (docs/scaling.md compares all four ways)",
    )
    coca_caption_loss_weight: float = arg(
        2.0, "weight of the caption loss; 0 switches it off", minimum=0.0
    )
    coca_contrastive_loss_weight: float = arg(
        1.0, "weight of the contrastive loss; 0 switches it off", minimum=0.0
    )
    siglip: bool = arg(False, "sigmoid loss in the contrastive loss's place")
    false_negatives: str = arg(
        "mask",
        "identical reports in one batch: mask keeps them from being each other's negatives",
        choices=("keep", "mask"),
        extra=True,
    )


@dataclass(frozen=True)
class Logging:
    """logging: what is told and kept."""

    logs: str = arg("./logs/", "folder of the run folders; None writes nothing at all")
    log_local: bool = arg(
        False, "the first process of every node writes its log to out-<rank>.log in the run folder"
    )
    name: str | None = arg(
        None, "name of the run folder", default_text="date, time and the main settings"
    )
    report_to: str = arg(
        "",
        "tensorboard, wandb, both (with a comma) or all, besides the metrics.jsonl that is always "
        "written; wandb works without a network where WANDB_MODE is offline",
    )
    wandb_notes: str = arg("", "notes of the wandb run")
    wandb_project_name: str = arg("open-clip", "project of the wandb run")
    log_every_n_steps: int = arg(100, "optimizer steps between two log lines", minimum=1)
    log_memory: bool = arg(False, "peak memory of the process and of the device with each log line")
    debug: bool = arg(False, "debug level, anomaly detection, tracebacks")
    copy_codebase: bool = arg(
        False,
        "copy the package into the run folder and run the copy: what is edited meanwhile has no "
        "effect",
    )


@dataclass(frozen=True)
class Checkpoint:
    """checkpoint: what is saved and where training goes on."""

    save_frequency: int = arg(
        20, "epochs between two checkpoints; the last epoch is always saved", minimum=0
    )
    save_most_recent: bool = arg(False, "keep epoch_latest.pt of the last epoch besides")
    resume: str | None = arg(
        None, "checkpoint to go on from, or latest: the newest whole one of the run --name"
    )
    remote_sync: str | None = arg(
        None,
        "URL of a folder, such as s3://bucket/runs, into which the run folder is copied, under its "
        "name, at the start, from time to time and at the end; --resume latest goes on from there "
        "where the run folder has no checkpoint",
    )
    remote_sync_frequency: int = arg(300, "seconds between two copies", minimum=1)
    remote_sync_protocol: str = arg(
        "s3",
        "s3: any service that speaks it, at AWS_ENDPOINT_URL (extra s3); fsspec: any URL that "
        "fsspec knows, such as file:// or sftp://",
        choices=("s3", "fsspec"),
    )
    delete_previous_checkpoint: bool = arg(
        False, "delete the previous checkpoint once the new one is safely stored"
    )
    save_every_n_steps: int | None = arg(
        None, "optimizer steps between two checkpoints within an epoch", minimum=1, extra=True
    )
    save_best: str | None = arg(
        None,
        "metric of the validation, such as val/image_to_text/R@10: best.pt is the checkpoint with "
        "the best value so far; METRIC:max or METRIC:min where the direction is not known",
        extra=True,
    )
    ema: float | None = arg(
        None,
        "decay of an exponential moving average of the weights, such as 0.999: it is what is "
        "evaluated, and what users of a checkpoint get; training goes on with the last weights",
        minimum=0.0,
        below=1.0,
        extra=True,
    )


@dataclass(frozen=True)
class Distributed:
    """distributed: several processes (start them with torchrun or srun)."""

    dist_url: str = arg(
        "env://",
        "where the processes meet: env:// (what torchrun sets; under srun the job's first node), "
        "tcp://HOST:PORT, or file:///PATH of a new file on a shared disk",
    )
    dist_backend: str = arg(
        "nccl", "nccl, or gloo; where there is no CUDA gloo is taken, with a warning"
    )
    use_bn_sync: bool = arg(
        False, "BatchNorm layers take their statistics over all processes; on CUDA alone"
    )
    horovod: bool = arg(
        False, "Horovod in torch.distributed's place (an extra); start with horovodrun"
    )
    fsdp: bool = arg(
        False,
        "each process keeps a part of the weights, gradients and optimizer state (FSDP2), not all "
        "of them; the same training",
        extra=True,
    )
    ddp_static_graph: bool = arg(
        False,
        "every step gives the same parameters a gradient: gradients are added up over processes "
        "during the backward pass, not after it; an error where that is not so",
    )
    no_set_device_rank: bool = arg(
        False, "use the first visible CUDA device instead of the one of the local rank"
    )


@dataclass(frozen=True)
class Evaluation:
    """evaluation: what is measured, and the rest."""

    val_frequency: int = arg(
        1, "epochs between two evaluations; the last is always evaluated", minimum=1
    )
    save_captions: bool = arg(
        False,
        "generate reports for the evaluated splits, save them as captions_epoch_N.json and "
        "score them (BLEU, ROUGE-L, METEOR, CIDEr, clinical agreement and more)",
    )
    caption_val_frequency: int = arg(1, "epochs between two such generations", minimum=1)
    caption_val_max_seq_len: int = arg(
        100,
        "tokens generated at most",
        default_text="the model's own generation settings, else 100",
        minimum=1,
    )
    val_gen_top_k: int = arg(
        50,
        "draw each token from the k most likely, seeded; 1 is greedy, 0 diverse beam search; where "
        "only beam arguments are given, it is beam search",
        default_text="the model's own generation settings, else 50",
        minimum=0,
    )
    val_gen_num_beams: int = arg(6, "beams of --save-captions", minimum=1)
    val_gen_num_beam_groups: int = arg(
        3,
        "groups of these beams, which keep away from each other; 1 is plain beam search",
        minimum=1,
    )
    zsc_class_prompt_mapping: tuple[str, ...] | None = arg(
        None,
        "prompt files for zero-shot classification: {class: prompt}, {class: [prompts]} or "
        "{classes, templates}",
        file=True,
    )
    zsc_specimen_class_mapping: tuple[str, ...] | None = arg(
        None,
        "label files, {specimen: class}, or with lists of classes for a multi-label task; one for "
        "each prompt file or all for one",
        file=True,
    )
    eval_metric_bootstraps: int = arg(
        1,
        "resamples of patients for percentile intervals of every metric; 0 and 1: no intervals",
        minimum=0,
    )
    eval_metric_ci: float = arg(0.95, "coverage of the intervals", above=0, below=1)
    bootstrap_unit: str = arg(
        "patient",
        "what is resampled: patients, each with all specimens (the same as specimens where every "
        "patient has one), or specimens",
        choices=("patient", "specimen"),
        extra=True,
    )
    zsc_ensemble: str = arg(
        "mean",
        "of several prompts a class: mean compares with the normalised mean of their embeddings, "
        "probabilities adds up their probabilities",
        choices=("mean", "probabilities"),
        extra=True,
    )
    eval_grace_period: int = arg(0, "first epochs without evaluation", minimum=0)
    test: bool = arg(
        False, "no training: evaluate every split given, from --resume or --pretrained"
    )
    save_embeddings: bool = arg(
        False,
        "at the end, write slide embeddings as embeddings/<split>/<specimen>.h5 in TRIDENT's "
        "layout of slide features, and slide and report embeddings of a split as .npz",
        extra=True,
    )
    few_shot_examples: tuple[str, ...] | None = arg(
        None,
        "files {class: [specimens]} of examples, any specimens of the data: the other specimens of "
        "each split are classified by the nearest class mean and by logistic regression, for every "
        "label file of --zsc-specimen-class-mapping that has these classes",
        file=True,
    )
    survival_table: str | None = arg(
        None,
        "CSV or TSV of specimens or patients with the columns time and event: with --probe, the "
        "concordance index of a Cox model of the embeddings; needs the extra survival",
        file=True,
        extra=True,
    )
    probe: bool = arg(
        False,
        "at the end, learn each label file's classes from the embeddings of --train-split: a "
        "linear probe, nearest neighbours, k-shot curves, judged by --test-split (--val-split "
        "chooses the penalty; without both, cross-validation does)",
        extra=True,
    )
    seed: int = arg(0, "seed of everything random", minimum=0, maximum=1e18)


@dataclass(frozen=True)
class Config:
    """All arguments. `given` names the fields that a user set, in a file or on the command line."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    logging: Logging = field(default_factory=Logging)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    distributed: Distributed = field(default_factory=Distributed)
    evaluation: Evaluation = field(default_factory=Evaluation)
    given: frozenset[str] = frozenset()

    @property
    def logs(self) -> Path | None:
        """Folder of the run folders, or None when nothing may be written."""
        return None if self.logging.logs in ("None", "none") else Path(self.logging.logs)

    @property
    def reports(self) -> frozenset[str]:
        """Names in --report-to."""
        return frozenset(r.strip() for r in self.logging.report_to.split(",")) - {""}

    @property
    def sinks(self) -> list[str]:
        """What --report-to asks for, `all` spelt out."""
        return sorted(SINKS if "all" in self.reports else self.reports)

    @property
    def beam_search(self) -> bool:
        """Whether --save-captions searches with beams instead of drawing tokens."""
        asked = bool(self.given & BEAM_ARGUMENTS) and "val_gen_top_k" not in self.given
        return self.evaluation.val_gen_top_k == 0 or asked

    @property
    def model_name(self) -> str:
        """What is evaluated, in logs and results: --model, or weights that bring their own."""
        named = "model" in self.given or self.model.model != Model().model
        return self.model.model if named else self.model.pretrained or self.model.model

    @property
    def prompt_pairs(self) -> tuple[tuple[str, str], ...]:
        """(prompt file, label file) of every zero-shot task; `validate` has checked the counts."""
        prompts = self.evaluation.zsc_class_prompt_mapping or ()
        labels = self.evaluation.zsc_specimen_class_mapping or ()
        if not prompts:  # the labels are those of few-shot examples or probes
            return ()
        if len(prompts) == 1:
            prompts = prompts * len(labels)
        return tuple(zip(prompts, labels, strict=True))


GROUPS: dict[str, type] = {
    "data": Data,
    "model": Model,
    "optim": Optim,
    "loss": Loss,
    "logging": Logging,
    "checkpoint": Checkpoint,
    "distributed": Distributed,
    "evaluation": Evaluation,
}

# Forms of --precision in which weights have 16 bits.
SIXTEEN_BITS = frozenset(("bf16", "fp16", "pure_bf16", "pure_fp16"))

# Arguments that serve others, for `without_effect`.
_VALIDATION = ("val_frequency", "eval_grace_period", "caption_val_frequency")
_CAPTIONS = (
    "caption_val_max_seq_len",
    "val_gen_top_k",
    "val_gen_num_beams",
    "val_gen_num_beam_groups",
)
_INTERVALS = ("eval_metric_ci", "bootstrap_unit")
_PROMPTS = ("zsc_class_prompt_mapping", "zsc_ensemble")
_KEEPING = (
    *("save_frequency", "save_most_recent", "save_every_n_steps", "delete_previous_checkpoint"),
    *("log_local", "report_to", "save_embeddings"),
)

BEAM_ARGUMENTS = frozenset(("val_gen_num_beams", "val_gen_num_beam_groups"))

# --use-bnb-linear -> what is done; bitsandbytes' own classes by their names.
BNB_LINEAR: Mapping[str, str] = {
    "int8": "int8",
    "int8-frozen": "int8-frozen",
    "nf4": "nf4",
    "fp4": "fp4",
    "Linear8bitLt": "int8",
    "Linear4bit": "fp4",
    "LinearFP4": "fp4",
    "LinearNF4": "nf4",
}

# (lr, beta1, beta2, eps), as the specification gives them for models with "vit" in their name.
ADAM_VIT = (5e-4, 0.9, 0.98, 1e-6)
ADAM = (5e-4, 0.9, 0.999, 1e-8)


def flag_of(name: str, spec: Spec) -> str:
    """The spelling on the command line: `batch_size` -> `--batch-size`."""
    return spec.flag or "--" + name.replace("_", "-")


def declarations(group: type) -> Iterator[tuple[str, Any, Spec]]:
    """(name, default, spec) of every argument of a group, in order."""
    for f in fields(group):
        default = {} if f.default_factory is dict else f.default
        yield f.name, default, f.metadata["spec"]


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with `values` (field name -> value) set and marked as given."""
    changed: dict[str, Any] = {}
    known: set[str] = set()
    for name, group in GROUPS.items():
        names = {f.name for f in fields(group)}
        known |= names
        mine = {k: v for k, v in values.items() if k in names}
        if mine:
            changed[name] = replace(getattr(config, name), **mine)
    unknown = set(values) - known
    assert not unknown, f"no such argument: {sorted(unknown)}"
    return replace(config, **changed, given=config.given | frozenset(values))


def given_values(config: Config) -> dict[str, Any]:
    """{field name: value} of what a user set."""
    return {
        f.name: getattr(getattr(config, name), f.name)
        for name, group in GROUPS.items()
        for f in fields(group)
        if f.name in config.given
    }


def all_values(config: Config) -> dict[str, Any]:
    """{field name: value} of everything, given or not."""
    return {
        f.name: getattr(getattr(config, name), f.name)
        for name, group in GROUPS.items()
        for f in fields(group)
    }


def with_adam_defaults(config: Config) -> Config:
    """Fill --lr, --beta1, --beta2 and --eps where not given, and where --opt has them."""
    # A configuration of one's own is named by its file, not by the folders above it.
    defaults = ADAM_VIT if "vit" in Path(config.model.model).stem.lower() else ADAM
    optim = config.optim
    names = ("lr", "beta1", "beta2", "eps")
    values = (optim.lr, optim.beta1, optim.beta2, optim.eps)
    if optim.opt == "lion":  # as published (Chen et al., 2023)
        defaults = (*defaults[:2], 0.99, defaults[3])
    filled: dict[str, Any] = {
        n: d
        for n, v, d in zip(names, values, defaults, strict=True)
        if v is None and n not in LACKS.get(optim.opt, ())
    }
    return replace(config, optim=replace(optim, **filled))


def validate(config: Config, others: Iterable[str] = ()) -> None:
    """Check everything that can be checked before data is opened.

    Args:
        config: the arguments.
        others: problems that have been found elsewhere.

    Raises:
        ConfigError: listing every problem found, not only the first.
    """
    _raise([*_values(_entries(config)), *_combinations(config), *others])


def without_effect(config: Config) -> list[str]:
    """What a user gave and a training does not need, in words: nothing is wrong, but nothing comes
    of it either. Of an evaluation, which has the arguments of its run, nothing is said.
    """
    if config.evaluation.test:
        return []
    data, evaluation = config.data, config.evaluation
    judged = bool(data.val_split or data.test_split)
    reasons: dict[str, tuple[str, ...]] = {}
    if data.text_data_file:
        reasons["all reports are those of --text-data-file"] = ("hdf5_text_attribute",)
    if config.optim.skip_scheduler and config.optim.lr_scheduler != "const":
        reasons["--skip-scheduler keeps the rate constant after the warmup"] = ("lr_scheduler",)
    if config.loss.coca_contrastive_loss_weight == 0:
        reasons["there is no contrastive loss: --coca-contrastive-loss-weight is 0"] = (
            "local_loss", "gather_with_grad", "false_negatives",
        )  # fmt: skip
    if not judged:
        reasons["no split is evaluated: give --val-split or --test-split"] = (
            *_CAPTIONS, *_INTERVALS, *_PROMPTS, "save_captions", "eval_metric_bootstraps",
            "zsc_specimen_class_mapping", "few_shot_examples",
        )  # fmt: skip
    if not data.val_split:
        reasons["they are about validation: give --val-split"] = _VALIDATION
    if data.val_split and evaluation.eval_grace_period >= config.optim.epochs:
        reasons["no epoch comes after it"] = ("eval_grace_period",)
    if not data.test_split:
        reasons["it is done with the test split: give --test-split"] = ("save_embeddings",)
    if judged and not evaluation.save_captions:
        reasons["they belong to --save-captions"] = (*_CAPTIONS, "caption_val_frequency")
    if judged and evaluation.eval_metric_bootstraps <= 1:
        reasons["there are no intervals: give --eval-metric-bootstraps"] = _INTERVALS
    if judged and not evaluation.zsc_class_prompt_mapping:
        reasons["there are no prompts"] = ("zsc_ensemble",)
    if config.logs is None:
        reasons["--logs None writes nothing"] = _KEEPING
    values = all_values(config)
    given = {n for n in config.given if values[n] not in ("", ()) and values[n] is not None}
    given -= {n for n in given if values[n] is False}  # which --no-NAME has undone
    return [
        f"{', '.join('--' + name.replace('_', '-') for name in named)}: without effect; {reason}"
        for reason, names in reasons.items()
        if (named := [name for name in names if name in given])
    ]


def validate_data(config: Config) -> None:
    """The same of what concerns data alone: no split and no report need be given.

    Raises:
        ConfigError: listing every problem found, not only the first.
    """
    problems = _values(_entries(config))
    _raise([*problems, *_sources(config), *_pairs(config), *_resuming(config)])


def validate_evaluation(config: Config) -> None:
    """The same of what scoring stored predictions needs: no data, no model.

    Raises:
        ConfigError: listing every problem found, not only the first.
    """
    _raise([*_values(_entries(config)), *_pairs(config)])


def validate_arguments(values: Any) -> None:
    """Check the values of one dataclass of arguments, such as those of a command.

    Raises:
        ConfigError: listing every problem found, not only the first.
    """
    entries = (
        (flag_of(name, spec), getattr(values, name), spec)
        for name, _, spec in declarations(type(values))
    )
    _raise(list(_values(entries)))


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise ConfigError(f"{len(problems)} problems with the arguments:\n{lines}")


def _entries(config: Config) -> Iterator[tuple[str, Any, Spec]]:
    for name, group in GROUPS.items():
        values = getattr(config, name)
        for key, _, spec in declarations(group):
            yield flag_of(key, spec), getattr(values, key), spec


def _values(entries: Iterable[tuple[str, Any, Spec]]) -> Iterator[str]:
    for flag, value, spec in entries:
        if value is None:
            continue
        if spec.choices and value not in spec.choices:
            yield f"{flag} {value!r} is not one of {', '.join(spec.choices)}"
        yield from out_of_range(flag, value, spec)
        words = value if isinstance(value, tuple) else (value,)
        if any("\0" in word for word in words if isinstance(word, str)):
            # Not on a command line, but in a file of arguments: no file and no program takes it.
            yield f"{flag} has a character of code 0; remove it"
        elif spec.file:
            for path in words:
                if not _is_there(path):
                    yield f"{flag}: no file or folder {path!r} (looked in {Path.cwd()})"


def _is_there(path: str) -> bool:
    try:
        return path != "" and Path(path).exists()  # Path("") is the folder that one is in
    except OSError:  # too long for a name
        return False


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long for a name; a character of code 0
        return False


def out_of_range(flag: str, value: Any, spec: Spec) -> Iterator[str]:
    """What is wrong with a number; nothing where it is right, or not a number at all."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    # `not (a <= b)` also catches NaN.
    if spec.minimum is not None and not value >= spec.minimum:
        yield f"{flag} must be at least {spec.minimum:g}, not {value}"
    if spec.above is not None and not value > spec.above:
        yield f"{flag} must be greater than {spec.above:g}, not {value}"
    if spec.maximum is not None and not value <= spec.maximum:
        yield f"{flag} must be at most {spec.maximum:g}, not {value}"
    if spec.below is not None and not value < spec.below:
        yield f"{flag} must be less than {spec.below:g}, not {value}"
    if value in (float("inf"), float("-inf")):
        yield f"{flag} must be finite, not {value}"


def _augmentation(data: Data) -> Iterator[str]:
    values, kind = data.aug_cfg, data.aug_cfg.get("transform_type")
    if not values:
        return
    known = f"it knows transform_type, {', '.join(AUG_KEYS)}"
    unknown = [str(key) for key in values if key != "transform_type" and key not in AUG_KEYS]
    if unknown:
        yield f"--aug-cfg does not know {', '.join(unknown)}; {known}"
    transforms = ", ".join(AUG_TRANSFORMS)
    if not isinstance(kind, (str, list, tuple)) or not kind:
        yield f"--aug-cfg needs transform_type, one or several of {transforms}"
        return
    names = data.aug_transforms
    if bad := [name for name in names if name not in AUG_TRANSFORMS]:
        yield f"--aug-cfg transform_type does not know {', '.join(bad)}; it knows {transforms}"
    if len(set(names)) < len(names):
        yield f"--aug-cfg transform_type names one twice: {', '.join(names)}"
    for key in (key for key in values if key in AUG_KEYS):
        value, most = values[key], AUG_KEYS[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value <= most and value != float("inf")):
            limit = "0 or more" if most == float("inf") else f"from 0 to {most:g}"
            yield f"--aug-cfg {key} must be a number {limit}, not {value!r}"
        owners = [name for name, keys in AUG_TRANSFORMS.items() if key in keys]
        if owners and not set(owners) & set(names):
            yield f"--aug-cfg {key} belongs to {owners[0]}, which transform_type does not name"


def _sources(config: Config) -> Iterator[str]:
    data = config.data
    if data.hdf5_filename and data.root_dir:
        yield "--hdf5_filename and --root-dir are both given; data comes from one of them"
    if not data.hdf5_filename and not data.root_dir:
        yield "no data: give --hdf5_filename (with --hdf5_feature_attribute) or --root-dir"
    if data.root_dir and (data.hdf5_feature_attribute or data.hdf5_text_attribute):
        yield "--hdf5_feature_attribute and --hdf5_text_attribute belong to --hdf5_filename"


def _pairs(config: Config) -> Iterator[str]:
    data, evaluation = config.data, config.evaluation
    names = ["train", "test", *(Path(path).stem for path in data.val_split or ())]
    if len(set(names)) < len(names):
        yield (
            f"--val-split files are reported by their stems ({', '.join(names[2:])}), which must "
            "differ from each other and from train and test"
        )
    prompts = evaluation.zsc_class_prompt_mapping or ()
    labels = evaluation.zsc_specimen_class_mapping or ()
    learns = evaluation.probe or bool(evaluation.few_shot_examples)
    learns_classes = bool(evaluation.few_shot_examples) or not evaluation.survival_table
    if learns and learns_classes and not labels:
        yield "--few-shot-examples and --probe need labels: give --zsc-specimen-class-mapping"
    alone = (
        learns and bool(labels) and not prompts
    )  # nothing zero-shot, which is what prompts serve
    if (not alone and bool(prompts) != bool(labels)) or (
        len(prompts) > 1 and len(prompts) != len(labels)
    ):
        yield (
            f"--zsc-class-prompt-mapping has {len(prompts)} and --zsc-specimen-class-mapping "
            f"{len(labels)} files; they go in pairs, or one prompt file serves all label files"
        )
    stems = [Path(label).stem for label in labels]
    if len(set(stems)) < len(stems):
        yield (
            f"--zsc-specimen-class-mapping files are reported by their stems ({', '.join(stems)}), "
            "which must differ; copy a file to another name to use it with two prompt files"
        )
    stems = [Path(examples).stem for examples in evaluation.few_shot_examples or ()]
    if len(set(stems)) < len(stems):
        yield (
            f"--few-shot-examples files are reported by their stems ({', '.join(stems)}), which "
            "must differ; leave one out, or copy it to another name"
        )


def _beams(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    beams, groups = evaluation.val_gen_num_beams, evaluation.val_gen_num_beam_groups
    given = config.given & BEAM_ARGUMENTS
    if given and not config.beam_search:
        flags = " and ".join("--" + name.replace("_", "-") for name in sorted(given))
        yield (
            f"--val-gen-top-k {evaluation.val_gen_top_k} draws tokens, {flags} belongs to beam "
            "search; give one of them, or --val-gen-top-k 0"
        )
    if config.beam_search and groups >= 1 and beams % groups:
        yield (
            f"--val-gen-num-beams {beams} does not divide into --val-gen-num-beam-groups {groups}; "
            "give a multiple of the groups, or fewer groups (1 is plain beam search)"
        )


def _horovod(distributed: Distributed) -> Iterator[str]:
    if not distributed.horovod:
        return
    if distributed.use_bn_sync:
        yield "--use-bn-sync is torch.distributed's; leave it or --horovod out"
    for name, value in (("dist_url", "env://"), ("dist_backend", "nccl")):
        if getattr(distributed, name) != value:
            yield f"--{name.replace('_', '-')} is torch.distributed's; leave it or --horovod out"


def _fsdp(config: Config) -> Iterator[str]:
    if not config.distributed.fsdp or config.evaluation.test:  # then it has no effect
        return
    reasons = {
        "horovod": "it is torch.distributed's",
        "ddp_static_graph": "it adds gradients up during the backward pass in its own way",
        "use_bn_sync": "the two are not tested together",
        "skip_bad_specimens": "every process gathers the weights for a batch of its own",
        "torchcompile": "weights come and go between its regions",
        "torchscript": "a script does not gather weights",
        "use_bnb_linear": "it keeps weights of its own, which cannot be cut",
    }
    parts = (config.distributed, config.data, config.model)
    for name, reason in reasons.items():
        if next(getattr(part, name) for part in parts if hasattr(part, name)):
            yield f"--fsdp goes without --{name.replace('_', '-')}: {reason}; leave one of them out"
    if config.optim.precision in ("bf16", "fp16"):
        yield (
            f"--fsdp goes without --precision {config.optim.precision}: a block's weights must be "
            f"of one type; use pure_{config.optim.precision}, amp_bf16 or fp32"
        )
    if config.optim.opt == "lamb":
        yield (
            "--fsdp goes without --opt lamb: it scales by the norms of whole weights, and a "
            "process has parts; choose another optimizer"
        )


def _resuming(config: Config) -> Iterator[str]:
    for flag, value in (
        ("--pretrained", config.model.pretrained),
        ("--resume", config.checkpoint.resume),
    ):
        if value == "":  # which as a path is the present folder
            yield f"{flag} is empty; say what to begin with, or leave it out"
    resume = config.checkpoint.resume
    if resume == "latest":
        if config.logs is None:
            yield "--resume latest looks in the run folder, but --logs is None"
        elif config.logging.name is None:
            yield "--resume latest needs --name, the run to go on with"
    elif resume and not _is_file(resume):
        yield (
            f"--resume: no checkpoint at {resume!r} (looked in {Path.cwd()}); give the path of a "
            ".pt file, or latest with the --name of a run"
        )


def _remote(config: Config) -> Iterator[str]:
    saved = config.checkpoint
    if saved.remote_sync is None:
        for field_name in ("remote_sync_frequency", "remote_sync_protocol"):
            if field_name in config.given and getattr(saved, field_name) != getattr(
                Checkpoint(), field_name
            ):
                yield f"--{field_name.replace('_', '-')} belongs to --remote-sync"
        return
    scheme, there, rest = saved.remote_sync.partition("://")
    if not there or not rest:
        yield "--remote-sync must be a URL, such as s3://bucket/runs"
    elif saved.remote_sync_protocol == "s3" and scheme != "s3":
        yield (
            f"--remote-sync-protocol s3 wants s3://bucket/folder, not {scheme}://; give "
            "--remote-sync-protocol fsspec for other URLs"
        )
    if ("@" in rest and ":" in rest.rpartition("@")[0]) or "?" in rest:
        # The URL stands in config.yaml, in the log and on the command line.
        yield (
            "--remote-sync must not hold a password or key; give them as AWS_* or in fsspec's own "
            "configuration"
        )
    if config.logs is None:
        yield "--remote-sync copies the run folder, but --logs is None"


def _best(config: Config) -> Iterator[str]:
    wanted = config.checkpoint.save_best
    if wanted is None or config.evaluation.test:  # an evaluation of a run has the run's arguments
        return
    name, colon, direction = wanted.partition(":")
    if not name or (colon and direction not in ("min", "max")):
        yield f"--save-best {wanted}: write METRIC, METRIC:max or METRIC:min"
    if not config.data.val_split:
        yield "--save-best needs --val-split, whose evaluations it compares"
    if config.logs is None:
        yield "--save-best keeps a checkpoint, but --logs is None"
    if config.evaluation.eval_grace_period >= config.optim.epochs:
        yield "--save-best: --eval-grace-period leaves no evaluation"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    of_locks = {
        "lock_image": ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"),
        "lock_text": ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm"),
    }
    for lock, details in of_locks.items():
        for detail in details:
            if getattr(model, detail) and not getattr(model, lock):
                yield f"--{detail.replace('_', '-')} belongs to --{lock.replace('_', '-')}"
    ways = [f"--{w}" for w in ("torchscript", "torchcompile", "trace") if getattr(model, w)]
    if len(ways) > 1:
        yield f"{', '.join(ways)}: give one of them"
    if model.trace and not config.evaluation.test:
        yield "--trace is for evaluation alone; give --test, or --torchcompile for training"
    if model.use_bnb_linear is not None and model.use_bnb_linear not in BNB_LINEAR:
        known = ", ".join(BNB_LINEAR)
        yield f"--use-bnb-linear {model.use_bnb_linear!r} is not one of {known}"
    if model.use_bnb_linear is not None and config.optim.precision in SIXTEEN_BITS:
        yield (
            f"--use-bnb-linear keeps weights of its own; use --precision amp_bf16 or fp32 with it, "
            f"not {config.optim.precision}"
        )
    if model.use_bnb_linear is not None and ways:
        yield f"--use-bnb-linear and {ways[0]}: its products are not torch's; give one of them"


def _reports(data: Data) -> Iterator[str]:
    if data.hdf5_filename and not (data.hdf5_text_attribute or data.text_data_file):
        yield "no reports: give --hdf5_text_attribute or --text-data-file"
    if data.root_dir and not data.text_data_file:
        yield "--root-dir has no reports of its own; give --text-data-file"


def _splits(config: Config) -> Iterator[str]:
    """What is trained and evaluated needs splits, and an evaluation a model."""
    data, evaluation = config.data, config.evaluation
    if evaluation.test:
        if not (config.checkpoint.resume or config.model.pretrained):
            yield "--test evaluates a trained model; give it by --resume or --pretrained"
        if not (data.train_split or data.val_split or data.test_split):
            yield "--test needs a split: --test-split, --val-split or --train-split"
    elif not data.train_split:
        yield "training needs --train-split"
    if evaluation.probe and not (data.train_split and (data.test_split or evaluation.test)):
        yield "--probe learns from --train-split and is judged by --test-split; give both"
    if evaluation.survival_table and not evaluation.probe:
        yield "--survival-table is for --probe; give both"
    if evaluation.probe and not (data.test_split or data.val_split):
        yield "--probe needs a split to be judged by: --test-split or --val-split"


def _optimization(config: Config) -> Iterator[str]:
    """What belongs to one schedule or optimizer alone."""
    optim = config.optim
    if optim.lr_scheduler == "const-cooldown" and not optim.skip_scheduler:
        if optim.epochs_cooldown is None:
            yield "--lr-scheduler const-cooldown needs --epochs-cooldown"
    else:
        for field_name in ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"):
            if field_name in config.given and getattr(optim, field_name) is not None:
                yield (
                    f"--{field_name.replace('_', '-')} works only with --lr-scheduler "
                    "const-cooldown and without --skip-scheduler"
                )
    for field_name in LACKS.get(optim.opt, ()):
        if field_name in config.given and getattr(optim, field_name) is not None:
            yield f"--opt {optim.opt} has no --{field_name}; leave it out"


def _processes(config: Config) -> Iterator[str]:
    distributed, ragged = config.distributed, config.data.skip_bad_specimens
    if distributed.use_bn_sync and ragged:
        yield "--use-bn-sync needs a batch on every process; leave --skip-bad-specimens out"
    yield from _horovod(distributed)
    yield from _fsdp(config)
    if distributed.ddp_static_graph and ragged:
        yield "--ddp-static-graph needs a batch on every process; leave --skip-bad-specimens out"


def _sinks(config: Config) -> Iterator[str]:
    if config.logging.logs == "":
        yield "--logs is empty; give a folder, or None to write nothing at all"
    if config.logging.copy_codebase and config.logs is None:
        yield "--copy-codebase copies into the run folder, but --logs is None"
    bad = config.reports - {*SINKS, "all"}
    if bad:
        yield (
            f"--report-to does not know {', '.join(sorted(bad))}; it knows {', '.join(SINKS)}, all"
        )
    if "wandb" not in config.sinks:
        for field_name in ("wandb_notes", "wandb_project_name"):
            default = getattr(Logging(), field_name)
            if field_name in config.given and getattr(config.logging, field_name) != default:
                yield f"--{field_name.replace('_', '-')} works only with --report-to wandb"


def _run_name(name: str | None) -> Iterator[str]:
    if name is not None and (
        name in ("", ".", "..")
        or any(c in "/\\" or not c.isprintable() for c in name)
        or len(name.encode(errors="replace")) > LONGEST_NAME
    ):
        yield f"--name {name!r} must be the name of one folder, of at most {LONGEST_NAME} bytes"


def _combinations(config: Config) -> Iterator[str]:
    """Problems that arguments of a training make together."""
    yield from _sources(config)
    yield from _pairs(config)
    yield from _augmentation(config.data)
    yield from _beams(config)
    yield from _reports(config.data)
    yield from _splits(config)
    yield from _optimization(config)
    yield from _model(config)
    yield from _processes(config)
    loss = config.loss
    if not (loss.coca_caption_loss_weight or loss.coca_contrastive_loss_weight):
        yield "both loss weights are 0; nothing would be trained"
    yield from _sinks(config)
    yield from _resuming(config)
    yield from _best(config)
    yield from _remote(config)
    yield from _run_name(config.logging.name)

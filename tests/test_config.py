"""The declarations against the specification, and every check before data is opened."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from slidevlm.config import Config, validate, with_adam_defaults, with_values, without_effect
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments, parse_config, parse_key_values, to_yaml

ROOT = Path(__file__).resolve().parents[1]


def specification() -> list[dict[str, Any]]:
    """The shared file where it is there, else the repository's copy."""
    shared = Path(os.environ.get("SLIDEVLM_SHARED", ROOT.parent / "shared")) / "spec/flags.json"
    path = shared if shared.is_file() else ROOT / "docs/spec/flags.json"
    return json.loads(path.read_text())


def test_the_85_arguments_are_those_of_the_specification() -> None:
    ours = {a.flag: a for a in arguments() if not a.spec.extra}
    assert list(ours) == [entry["flag"] for entry in specification()]
    assert len(ours) == 85
    for entry in specification():
        a = ours[entry["flag"]]
        assert a.group == entry["group"], a.flag
        assert a.kind == entry["type"], a.flag
        expected = None if entry["default"] == "model-dependent" else entry["default"]
        assert a.default == expected, a.flag
        assert type(a.default) is type(expected), a.flag
        assert a.spec.choices == tuple(entry.get("choices", ())), a.flag


def test_the_copy_of_the_specification_is_current(shared: Path) -> None:
    copy = json.loads((ROOT / "docs/spec/flags.json").read_text())
    assert copy == json.loads((shared / "spec/flags.json").read_text())


def parsed(*words: str) -> Config:
    return parse_config(list(words))[0]


def test_underscores_and_hyphens_are_the_same() -> None:
    for flag in ("--hdf5_filename", "--hdf5-filename"):
        assert parsed(flag, "x.h5").data.hdf5_filename == "x.h5"
    assert parsed("--batch_size", "3").data.batch_size == 3
    assert parsed("--batch-size=3").data.batch_size == 3


@pytest.mark.parametrize("words", [["--batch", "3"], ["--epoch", "3"], ["--nonsense"], ["stray"]])
def test_abbreviations_and_unknown_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--help"):
        parsed(*words)


def test_lists_switches_numbers() -> None:
    config = parsed("--val-split", "a.txt", "b.txt", "--siglip", "--lr", "5e-4", "--epochs", "2")
    assert config.data.val_split == ("a.txt", "b.txt")
    assert config.loss.siglip is True
    assert config.optim.lr == 5e-4
    assert config.given == {"val_split", "siglip", "lr", "epochs"}
    assert config.model_name == config.model.model
    assert with_values(config, {"pretrained": "exported"}).model_name == "exported"
    named = with_values(config, {"pretrained": "exported", "model": "coca_tiny"})
    assert named.model_name == "coca_tiny"


def test_key_value_lists() -> None:
    assert parse_key_values(["p=0.5", "path=a/b=c", "n=None", "t=random_flip"]) == {
        "p": 0.5,
        "path": "a/b=c",
        "n": None,
        "t": "random_flip",
    }
    with pytest.raises(ConfigError, match="key=value"):
        parse_key_values(["oops"])


def test_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch-size: 7\nlr: 5e-4\nsiglip: true\nval_split: one.txt\nlogs: null\n")
    config = parsed("--config", str(file), "--batch-size", "9", "--no-siglip")
    assert config.data.batch_size == 9, "the command line wins"
    assert config.optim.lr == 5e-4, "YAML reads 5e-4 as text"
    assert config.loss.siglip is False
    assert config.data.val_split == ("one.txt",)
    assert config.logs is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise: 3", "did you mean batch_size"),
        ("batch_size: many", "must be a whole number"),
        ("batch_size: true", "must be a whole number"),
        ("siglip: 1", "must be true or false"),
        ("- a", "must be a mapping"),
        ("a: [", "not plain YAML"),
        ("lr: !!python/object/apply:os.system ['true']", "not plain YAML"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        parsed("--config", str(file))
    assert str(file) in str(caught.value)


def test_the_saved_configuration_runs_again_as_it_is(tmp_path: Path) -> None:
    config = with_adam_defaults(
        parsed("--name", "first", "--val-split", "a b.txt", "--wd", "0.1", "--val-gen-top-k", "50")
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    again = parsed("--config", str(file))
    assert again.logging.name is None, "a second run must not collide with the first"
    assert again.given == {"val_split", "wd", "val_gen_top_k", "lr", "beta1", "beta2", "eps"}
    for group in ("data", "model", "optim", "loss", "checkpoint", "distributed", "evaluation"):
        assert getattr(again, group) == getattr(config, group)
    assert "# batch_size: 64" in file.read_text()


@pytest.mark.parametrize(
    ("model", "betas_eps"),
    [
        ("coca_stage_1", (0.9, 0.999, 1e-8)),
        ("coca_vit_large", (0.9, 0.98, 1e-6)),
        ("/home/vita/coca.json", (0.9, 0.999, 1e-8)),
        ("models/my_ViT.yaml", (0.9, 0.98, 1e-6)),
    ],
)
def test_optimizer_defaults_follow_the_model(model: str, betas_eps: tuple[float, ...]) -> None:
    optim = with_adam_defaults(parsed("--model", model)).optim
    assert (optim.beta1, optim.beta2, optim.eps) == betas_eps
    assert optim.lr == 5e-4
    given = with_adam_defaults(parsed("--model", model, "--beta2", "0.5", "--lr", "0")).optim
    assert (given.beta2, given.lr) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("words", "beams"),
    [
        ([], False),
        (["--val-gen-top-k", "50"], False),
        (["--val-gen-top-k", "0"], True),
        (["--val-gen-num-beams", "9"], True),
        (["--val-gen-num-beam-groups", "2"], True),
        (["--val-gen-top-k", "0", "--val-gen-num-beams", "9"], True),
    ],
)
def test_when_reports_are_searched_with_beams(words: list[str], beams: bool) -> None:
    config = parsed(*words)
    assert config.beam_search is beams
    try:
        validate(config)
    except ConfigError as error:  # there is no data; the beams are no problem
        assert "beam" not in str(error)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"ddp_static_graph": True, "skip_bad_specimens": True},
            "--ddp-static-graph needs a batch on every process; leave --skip-bad-specimens out",
        ),
        *(
            ({"fsdp": True, name: value}, f"--fsdp goes without --{name.replace('_', '-')}")
            for name, value in {
                "horovod": True,
                "ddp_static_graph": True,
                "use_bn_sync": True,
                "skip_bad_specimens": True,
                "torchcompile": True,
                "torchscript": True,
                "use_bnb_linear": "SwitchBackLinearGlobal",
                "precision": "bf16",
                "opt": "lamb",
            }.items()
        ),
        ({"fsdp": True, "precision": "fp16"}, "use pure_fp16, amp_bf16 or fp32"),
        ({"horovod": True, "use_bn_sync": True}, "--use-bn-sync is torch.distributed's; leave it"),
        ({"horovod": True, "dist_url": "tcp://a:1"}, "--dist-url is torch.distributed's; leave"),
        ({"horovod": True, "dist_backend": "gloo"}, "--dist-backend is torch.distributed's; leave"),
        ({"val_gen_top_k": -1}, "--val-gen-top-k must be at least 0"),
        ({"val_gen_num_beams": 0}, "--val-gen-num-beams must be at least 1"),
        ({"val_gen_num_beam_groups": 0}, "--val-gen-num-beam-groups must be at least 1"),
        (
            {"val_gen_top_k": 5, "val_gen_num_beams": 6},
            "--val-gen-top-k 5 draws tokens, --val-gen-num-beams belongs to beam search",
        ),
        ({"val_gen_num_beams": 5}, "5 does not divide into --val-gen-num-beam-groups 3"),
        ({"val_gen_num_beam_groups": 4}, "--val-gen-num-beams 6 does not divide into"),
        ({"val_gen_num_beams": 1}, r"give a multiple of the groups, or fewer groups \(1 is plain"),
        ({"val_gen_top_k": 0, "val_gen_num_beams": 4}, "4 does not divide into"),
        ({"report_to": "mlflow"}, "--report-to does not know mlflow; it knows tensorboard, wandb"),
        ({"wandb_notes": "x"}, "--wandb-notes works only with --report-to wandb"),
        (
            {"report_to": "tensorboard", "wandb_project_name": "x"},
            "--wandb-project-name works only with --report-to wandb",
        ),
        ({"report_to": "mlflow"}, "does not know mlflow"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"lr": -1.0}, "--lr must be at least 0"),
        ({"lr": float("nan")}, "--lr must be at least 0, not nan"),
        ({"lr": float("inf")}, "--lr must be finite"),
        ({"beta1": 1.5}, "--beta1 must be less than 1"),
        ({"beta2": 1.0}, "--beta2 must be less than 1, not 1.0"),
        ({"eps": 0.0}, "--eps must be greater than 0"),
        ({"lr_scheduler": "linear"}, "--lr-scheduler 'linear' is not one of cosine, const"),
        ({"train_split": "nowhere.txt"}, "--train-split: no file or folder 'nowhere.txt'"),
        ({"val_split": ("nowhere.txt",)}, "--val-split: no file or folder 'nowhere.txt'"),
        ({"hdf5_filename": "a.h5", "root_dir": "b"}, "both given"),
        ({"root_dir": "b", "hdf5_feature_attribute": "uni"}, "belong to --hdf5_filename"),
        ({}, "no data: give --hdf5_filename"),
        ({}, "training needs --train-split"),
        ({"test": True}, "give it by --resume or --pretrained"),
        ({"test": True, "resume": "x.pt"}, "--test needs a split"),
        ({"lr_scheduler": "const-cooldown"}, "needs --epochs-cooldown"),
        ({"epochs_cooldown": 3}, "--epochs-cooldown works only with"),
        ({"lr_cooldown_end": 1e-5}, "--lr-cooldown-end works only with"),
        ({"lr_cooldown_power": 2.0, "lr_scheduler": "const"}, "--lr-cooldown-power works only"),
        (
            {"epochs_cooldown": 3, "lr_scheduler": "const-cooldown", "skip_scheduler": True},
            "--epochs-cooldown works only with .* without --skip-scheduler",
        ),
        ({"coca_caption_loss_weight": 0.0, "coca_contrastive_loss_weight": 0.0}, "both loss"),
        ({"zsc_class_prompt_mapping": ("p.json",)}, "has 1 and .* 0 files"),
        (
            {
                "zsc_class_prompt_mapping": ("p",),
                "zsc_specimen_class_mapping": ("a/l.json", "l.csv"),
            },
            r"--zsc-specimen-class-mapping .* stems \(l, l\), which must differ",
        ),
        (
            {"few_shot_examples": ("a/5.json", "b/5.json")},
            r"--few-shot-examples .* stems \(5, 5\), which must differ; leave one out, or copy it",
        ),
        ({"train_split": ""}, "--train-split: no file or folder ''"),
        ({"resume": "latest"}, "--resume latest needs --name"),
        ({"resume": "nowhere.pt"}, "--resume: no checkpoint at 'nowhere.pt' .looked in .*latest"),
        ({"resume": ""}, "--resume is empty"),
        ({"resume": "x" * 5000}, "--resume: no checkpoint at 'x"),
        ({"resume": "a\0b"}, "--resume has a character of code 0"),
        ({"logs": ""}, "--logs is empty; give a folder, or None to write nothing"),
        ({"resume": "latest", "name": "a", "logs": "None"}, "--logs is None"),
        ({"name": "../up"}, "must be the name of one folder"),
        ({"name": ".."}, "must be the name of one folder"),
        ({"name": "a\\b"}, "must be the name of one folder"),
        ({"name": "two\nlines"}, "must be the name of one folder"),
        ({"name": "é" * 101}, "must be the name of one folder, of at most 200 bytes"),
        ({"name": "a\0b"}, "--name has a character of code 0"),
        ({"train_split": "a\0b"}, "--train-split has a character of code 0"),
        ({"val_split": ("a", "a\0b")}, "--val-split has a character of code 0"),
        ({"model": "a\0b"}, "--model has a character of code 0"),
        ({"train_split": "x" * 5000}, "--train-split: no file or folder"),
        ({"test_split": ""}, "--test-split: no file or folder ''"),
        ({"val_split": ("",)}, "--val-split: no file or folder ''"),
        ({"pretrained": ""}, "--pretrained is empty"),
        ({"seed": 2**70}, "--seed must be at most 1e\\+18"),
        ({"lock_image_unlocked_groups": 1}, "unlocked-groups belongs to --lock-image"),
        ({"lock_image_freeze_bn_stats": True}, "freeze-bn-stats belongs to --lock-image"),
        ({"lock_image": True, "lock_text_unlocked_layers": 2}, "layers belongs to --lock-text"),
        ({"lock_text_freeze_layer_norm": True}, "layer-norm belongs to --lock-text"),
        ({"lock_text": True, "lock_text_unlocked_layers": -1}, "must be at least 0"),
        ({"torchscript": True, "torchcompile": True}, "--torchscript, --torchcompile: give one"),
        ({"trace": True, "torchcompile": True, "test": True}, "--torchcompile, --trace: give one"),
        ({"trace": True, "train_split": "x"}, "--trace is for evaluation alone"),
        ({"use_bnb_linear": "int4"}, "'int4' is not one of int8, int8-frozen, nf4, fp4, Linear8"),
        ({"use_bnb_linear": "nf4", "torchcompile": True}, "--use-bnb-linear and --torchcompile"),
        ({"val_split": ("a/x.txt", "b/x.txt")}, "must differ"),
        ({"save_best": "a:up"}, "--save-best a:up: write METRIC, METRIC:max or METRIC:min"),
        ({"save_best": "val/loss/caption"}, "--save-best needs --val-split"),
        ({"save_best": "a", "logs": "None"}, "--save-best keeps a checkpoint, but --logs is"),
        ({"save_best": "a", "eval_grace_period": 32}, "leaves no evaluation"),
        ({"ema": 1.0}, "--ema must be less than 1"),
        ({"remote_sync_frequency": 5}, "--remote-sync-frequency belongs to --remote-sync"),
        ({"remote_sync": "a/b"}, "--remote-sync must be a URL, such as s3://bucket/runs"),
        ({"remote_sync": "file:///a"}, "wants s3://bucket/folder, not file://"),
        ({"remote_sync": "s3://key:word@a/b"}, "must not hold a password or key"),
        ({"remote_sync": "s3://a/b?token=x"}, "must not hold a password or key"),
        ({"remote_sync": "s3://a/b", "logs": "None"}, "copies the run folder, but --logs is None"),
        ({"opt": "adamx"}, "--opt 'adamx' is not one of adamw, adam, "),
        ({"opt": "sgd", "beta2": 0.9}, "--opt sgd has no --beta2; leave it out"),
        ({"opt": "lion", "eps": 1e-6}, "--opt lion has no --eps; leave it out"),
        ({"layer_decay": 0.0}, "--layer-decay must be greater than 0"),
        ({"layer_decay": 1.5}, "--layer-decay must be at most 1"),
        ({"val_split": ("a/test.txt",)}, "must differ"),
    ],
)
def test_checks_before_data_is_opened(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(with_values(Config(), values))


def test_one_message_lists_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(
            with_values(
                Config(), {"batch_size": 0, "lock_image_unlocked_groups": 1, "train_split": "no"}
            )
        )
    text = str(caught.value)
    for part in (
        "4 problems",
        "--batch-size",
        "belongs to --lock-image",
        "--train-split",
        "no data",
    ):
        assert part in text


VAL, TEST = {"val_split": ("v.txt",)}, {"test_split": "t.txt"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, []),
        ({**VAL, **TEST, "save_captions": True, "val_gen_top_k": 0, "val_frequency": 2}, []),
        ({"save_captions": True}, ["--save-captions: .*give --val-split or --test-split"]),
        ({"save_captions": False}, []),
        ({"zsc_ensemble": "mean", "val_gen_top_k": 0}, ["--val-gen-top-k, --zsc-ensemble: "]),
        ({**TEST, "val_frequency": 2, "eval_grace_period": 1}, ["--val-f.*, --eval-g.*--val-sp"]),
        ({**VAL, "eval_grace_period": 32}, ["--eval-grace-period: .*no epoch comes after it"]),
        ({**VAL, "save_embeddings": True}, ["--save-embeddings: .*give --test-split"]),
        ({**VAL, "val_gen_num_beams": 6}, ["--val-gen-num-beams: .*belong to --save-captions"]),
        ({**VAL, "eval_metric_ci": 0.9}, ["--eval-metric-ci: .*give --eval-metric-bootstraps"]),
        ({**VAL, "zsc_ensemble": "mean"}, ["--zsc-ensemble: .*there are no prompts"]),
        (
            {"coca_contrastive_loss_weight": 0.0, "local_loss": True, "false_negatives": "keep"},
            ["--local-loss, --false-negatives: .*there is no contrastive loss"],
        ),
        ({"logs": "None", "report_to": "tensorboard"}, ["--report-to: .*--logs None"]),
        ({"logs": "None", "report_to": "", "log_local": True}, ["--log-local: .*--logs None"]),
        ({"test": True, "save_captions": True, "logs": "None", "log_local": True}, []),
        (
            {"skip_scheduler": True, "lr_scheduler": "cosine"},
            ["--lr-scheduler: .*--skip-scheduler keeps the rate constant"],
        ),
        ({"skip_scheduler": True, "lr_scheduler": "const"}, []),
        ({"skip_scheduler": True}, []),
        (
            {"text_data_file": "t.json", "hdf5_text_attribute": "report"},
            ["--hdf5-text-attribute: .*all reports are those of --text-data-file"],
        ),
    ],
)
def test_what_has_no_effect_is_told(values: dict[str, Any], told: list[str]) -> None:
    found = without_effect(with_values(Config(), values))
    assert len(found) == len(told)
    for text, pattern in zip(found, told, strict=True):
        assert re.match(pattern, text) and "without effect" in text


def test_what_is_as_by_default_needs_no_wandb() -> None:
    """So that a file of arguments of a run with wandb can be used without it."""
    values = {"wandb_notes": "", "wandb_project_name": "open-clip"}
    with pytest.raises(ConfigError) as error:  # there is no data
        validate(with_values(Config(), values))
    assert "wandb" not in str(error.value)


def test_one_prompt_file_serves_several_label_files() -> None:
    config = with_values(
        Config(),
        {"zsc_class_prompt_mapping": ("p",), "zsc_specimen_class_mapping": ("a", "b")},
    )
    assert config.prompt_pairs == (("p", "a"), ("p", "b"))

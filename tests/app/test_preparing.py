"""The model arguments in whole runs: what a checkpoint holds afterwards, and how runs go on."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm.app import train
from slidevlm.app.preparing import prepare
from slidevlm.app.trained import Trained
from slidevlm.config import Config, with_values
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models import build_model, from_dict, zoo
from slidevlm.precision import resolve
from slidevlm.train import checkpoint as ckpt

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra bnb is not installed"
)
IMAGE = ("slide.", "slide_pooler.", "slide_project.")
LORA = {"lora": [{"part": "text", "targets": ["project"], "rank": 2}]}
SPECIMENS = 40
SETTINGS = {
    "val_split": "val",
    "image_features_cutoff": 30,
    "warmup": 0,
    "lr": 3e-3,
    "save_frequency": 1,
}


def run(settings: dict[str, Any], **more: Any) -> dict[str, float]:
    return train(with_values(Config(), {**settings, **more}))


def weights(settings: dict[str, Any], name: str, epoch: int = 2) -> dict[str, torch.Tensor]:
    path = Path(settings["logs"]) / name / "checkpoints" / f"epoch_{epoch}.pt"
    return ckpt.load(path)[0].weights


def moved(settings: dict[str, Any], name: str, since: str) -> set[str]:
    before, after = weights(settings, since), weights(settings, name)
    return {n for n, v in after.items() if not torch.equal(v, before[n])}


def model_with(settings: dict[str, Any], part: dict[str, Any]) -> str:
    path = Path(settings["logs"]).parent / "model.json"
    path.write_text(json.dumps(zoo.load("coca_tiny").to_dict() | part))
    return str(path)


def test_a_locked_run_moves_what_is_unlocked_and_resumes_exactly(settings: dict[str, Any]) -> None:
    run(settings, name="first")
    first = str(Path(settings["logs"]) / "first")
    locks = {"lock_image": True, "lock_image_unlocked_groups": 1, "lock_text": True}
    run(settings, name="locked", pretrained=first, **locks)
    names = moved(settings, "locked", "first")
    of_image = {n for n in names if n.startswith(IMAGE)}
    assert of_image and all(n.startswith(IMAGE[1:]) for n in of_image)
    of_text = {n for n in names if n.startswith(("text", "prior"))}
    assert of_text and all("norm" in n for n in of_text)
    assert any(n.startswith("decoder.layers") for n in names)
    source = Path(settings["logs"]) / "locked/checkpoints/epoch_1.pt"
    run(settings, name="again", resume=str(source), **locks)
    again, locked = weights(settings, "again"), weights(settings, "locked")
    assert all(torch.equal(again[n], v) for n, v in locked.items())
    with pytest.raises(CheckpointError, match=r"are trained now that were not.*same --lock-\*"):
        run(settings, name="unlocked", resume=str(source))


def test_locks_say_that_they_do_nothing_without_training(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, epochs=1)
    first = str(Path(settings["logs"]) / "run")
    more = {"train_split": None, "test": True, "pretrained": first, "lock_text": True}
    run(settings, name="tested", **more)
    assert "--lock-image and --lock-text have no effect here" in capsys.readouterr().err


def test_what_the_model_cannot_is_refused_and_leaves_no_folder(settings: dict[str, Any]) -> None:
    everything = {"lock_image": True, "lock_text": True, "lock_text_freeze_layer_norm": True}
    cases = [
        ({**everything, "coca_caption_loss_weight": 0.0}, "everything is frozen"),
        ({"lock_image": True, "lock_image_unlocked_groups": 99}, "leaves nothing locked"),
        ({"lock_image": True, "lock_image_freeze_bn_stats": True}, "have no BatchNorm"),
    ]
    for values, message in cases:
        with pytest.raises(ConfigError, match=message):
            run(settings, **values)
        assert not (Path(settings["logs"]) / "run").exists()


def test_checkpointing_gives_the_same_weights(settings: dict[str, Any]) -> None:
    run(settings, name="plain")
    run(settings, name="again", grad_checkpointing=True)
    assert not moved(settings, "again", "plain")


def test_a_scripted_run_is_the_plain_one(settings: dict[str, Any], messages) -> None:
    plain = run(settings, name="plain")
    scripted = run(settings, name="scripted", torchscript=True)
    assert "--torchscript: " in messages.text and "decoder.layers.0" in messages.text
    assert scripted.keys() == plain.keys()
    for name in ("val/loss/contrastive", "val/loss/caption"):
        assert scripted[name] == pytest.approx(plain[name], abs=1e-4)
    assert weights(settings, "scripted").keys() == weights(settings, "plain").keys()


def test_a_traced_evaluation_is_the_untraced_one(settings: dict[str, Any], messages) -> None:
    run(settings, name="first", epochs=1)
    more = {"test": True, "train_split": None, "pretrained": str(Path(settings["logs"]) / "first")}
    plain = run(settings, name="plain", **more)
    traced = run(settings, name="traced", trace=True, **more)
    assert "traced the slide encoder Perceiver" in messages.text
    assert "traced the text tower TextEncoder" in messages.text
    for name in ("val/loss/contrastive", "val/loss/caption", "val/image_to_text/MRR"):
        assert traced[name] == pytest.approx(plain[name], abs=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize(("value", "part"), [("int8", {}), ("LinearNF4", LORA)])
def test_quantised_runs_resume_exactly(
    settings: dict[str, Any], messages, value: str, part: dict[str, Any]
) -> None:
    settings |= {"model": model_with(settings, part), "use_bnb_linear": value}
    with messages.at_level(logging.INFO):
        run(settings)
    assert f"--use-bnb-linear {value}: " in messages.text
    assert "linear layers changed" in messages.text
    run(settings, name="plain", use_bnb_linear=None)
    assert moved(settings, "run", "plain"), "it makes a difference"
    source = Path(settings["logs"]) / "run/checkpoints/epoch_1.pt"
    run(settings, name="again", resume=str(source))
    assert not moved(settings, "again", "run")
    run(settings, name="plainly", resume=str(source), use_bnb_linear=None)


@needs_bitsandbytes
def test_frozen_forms_need_frozen_layers(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is for frozen layers, and none is"):
        run(settings, use_bnb_linear="nf4")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lock_image": True}, "--lock-image: model logs/lm has no image tower"),
        (
            {"trace": True, "test": True},
            "--trace: model logs/lm encodes neither images nor texts",
        ),
    ],
)
def test_a_language_model_has_no_image_tower(values: dict[str, Any], message: str) -> None:
    content = {
        "family": "lm",
        "tile_width": 6,
        "text": {"type": "scratch", "width": 16, "layers": 1, "heads": 2},
        "decoder": {"layers": 1, "heads": 2},
    }
    config = from_dict(content, "here")
    trained = Trained(build_model(config, 20), config, None, siglip=False, unit=None)
    given = with_values(Config(), {**values, "pretrained": "logs/lm"})
    with pytest.raises(ConfigError, match=message):
        prepare(given, trained, resolve("fp32", torch.device("cpu")))

"""--pretrained in every form, and language models, in whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm.app import train
from slidevlm.app.export import export
from slidevlm.app.pretrained import read_pretrained
from slidevlm.app.trained import restore
from slidevlm.config import Config, with_values
from slidevlm.data.synthetic import DemoCohort, synthesize
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models import zoo
from slidevlm.train import checkpoint as ckpt

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return synthesize(tmp_path_factory.mktemp("demo") / "cohort", specimens=40, seed=1)


def settings_of(cohort: DemoCohort, logs: Path, **more: Any) -> Config:
    values = {
        "hdf5_filename": str(cohort.hdf5),
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": str(cohort.split("train")),
        "val_split": (str(cohort.split("val")),),
        "batch_size": 8,
        "image_features_cutoff": 30,
        "workers": 0,
        "epochs": 1,
        "warmup": 1,
        "precision": "fp32",
        "device": "cpu",
        "logs": str(logs),
    }
    return with_values(Config(), {**values, **more})


@pytest.fixture(scope="module")
def run(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    train(settings_of(cohort, logs, model="coca_tiny", name="first"))
    return logs / "first"


def evaluated(cohort: DemoCohort, logs: Path, name: str, source: Path | str) -> dict[str, float]:
    return train(settings_of(cohort, logs, pretrained=str(source), test=True, name=name))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    found = ckpt.newest(run / "checkpoints")
    assert found is not None
    return found[1].weights


def test_all_forms_of_a_whole_model_give_the_same_numbers(
    cohort: DemoCohort, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exported"
    assert {p.name for p in export(str(run), folder)} >= {"model.safetensors", "config.json"}
    alone = tmp_path / "alone.safetensors"
    shutil.copy(folder / "model.safetensors", alone)
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tags = tmp_path / "tags.yaml"
    tags.write_text(f"mine: {run}\n")
    monkeypatch.setenv("SLIDEVLM_REGISTRY", str(tags))
    sources = [run, next((run / "checkpoints").glob("*.pt")), folder, alone, "hf-hub:a/b", "mine"]
    results = [evaluated(cohort, tmp_path, f"e{i}", s) for i, s in enumerate(sources)]
    assert all(r == results[0] for r in results) and results[0]
    for i, source in enumerate(sources):
        told = (tmp_path / f"e{i}" / "evaluation.md").read_text()
        assert told.startswith(f"# Results of {source}\n"), "not of the default of --model"
    tokenizer = Tokenizer.from_folder(folder)
    kept = restore(read_pretrained(str(folder)).state).tokenizer
    text = "Invasive carcinoma, grade 2."
    assert tokenizer.encode(text, 60) == kept.encode(text, 60)


def test_wrappers_are_stripped_and_a_plain_state_dict_needs_a_model(
    cohort: DemoCohort, run: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "plain.pt"
    named = {f"module._orig_mod.{n}": t for n, t in weights_of(run).items()}
    torch.save({"state_dict": named, "epoch": 3}, file)
    with pytest.raises(ConfigError, match="does not say which model"):
        train(settings_of(cohort, tmp_path, pretrained=str(file), name="x"))
    train(
        settings_of(
            cohort, tmp_path, pretrained=str(file), model="coca_tiny", name="y", lr=0.0, wd=0.0
        )
    )
    before, after = weights_of(run), weights_of(tmp_path / "y")
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert "unused in the file" in messages.text


def tiny_stage_2(folder: Path, cohort_text: list[str]) -> Path:
    """coca_tiny's slide encoder with a tiny BioGPT from scratch, its tokenizer trained."""
    content = zoo.load("coca_tiny").to_dict()
    content["text"] = {
        "type": "biogpt",
        "source": "",
        "tokenizer": "train",
        "end": 1,
        "width": 16,
        "heads": 2,
        "inner": 24,
        "positions": 64,
        "context_length": 48,
        "vocab_size": 400,
        "pool_heads": 2,
    }
    content["decoder"] = {
        "type": "biogpt",
        "source": "",
        "start": 1,
        "end": 2,
        "heads": 2,
        "inner": 24,
        "slide_tokens": 4,
    }
    content["lora"] = [{"part": "text.layers", "targets": ["query"], "rank": 2}]
    file = folder / "stage_2.json"
    file.write_text(json.dumps(content))
    return file


def test_stage_1_into_stage_2(
    cohort: DemoCohort, run: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    model = tiny_stage_2(tmp_path, [])
    more = {"pretrained": str(run), "model": str(model), "name": "second"}
    train(settings_of(cohort, tmp_path, lr=0.0, wd=0.0, **more))
    first, second = weights_of(run), weights_of(tmp_path / "second")
    slide = [n for n in second if n.startswith(("slide.", "slide_pooler", "slide_project"))]
    assert slide and all(torch.equal(first[n], second[n]) for n in slide)
    assert "not in the file" in messages.text and "of another shape" in messages.text
    with pytest.raises(CheckpointError, match="does not fill the model that --test evaluates"):
        train(settings_of(cohort, tmp_path, test=True, **{**more, "name": "third"}))
    # LoRA is merged on export: plain layers of the same function.
    export(str(tmp_path / "second"), tmp_path / "out")
    ours = evaluated(cohort, tmp_path, "with-lora", tmp_path / "second")
    assert evaluated(cohort, tmp_path, "merged", tmp_path / "out") == pytest.approx(ours, abs=1e-5)
    names = read_pretrained(str(tmp_path / "out")).weights
    assert not [n for n in names if "lora" in n or ".base." in n]


def write_clip(folder: Path, seed: int, reports: list[str]) -> None:
    """A tiny model in the form of OpenAI's CLIP, with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(reports, 300)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "intermediate_size": 24, "vocab_size": 300, "max_position_embeddings": 48}
    vision = {**small, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    for name, content in tokenizer.files().items():
        (folder / name).write_text(content)


def test_the_text_tower_starts_from_openais_clip(
    cohort: DemoCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = ["tumour of grade 2, margins free", "no tumour is seen"] * 9
    snapshot = tmp_path / "cache/models--openai--clip-vit-base-patch32/snapshots/abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    write_clip(snapshot, 1, reports)
    write_clip(tmp_path / "another", 2, reports)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    content = zoo.load("coca_tiny").to_dict() | {"family": "clip"}
    del content["decoder"]
    content["text"] = {
        "type": f"hf:{tmp_path / 'another'}",
        "context_length": 48,
        "pool_heads": 2,
    }
    model = tmp_path / "clip.json"
    model.write_text(json.dumps(content))
    still = {"lr": 0.0, "wd": 0.0, "model": str(model)}
    train(settings_of(cohort, tmp_path, name="own", **still))
    train(settings_of(cohort, tmp_path, name="openai", pretrained="openai", **still))
    own, openai = weights_of(tmp_path / "own"), weights_of(tmp_path / "openai")
    theirs = read_pretrained("openai").weights
    assert len(theirs) > 20
    assert all(torch.equal(openai[name], tensor) for name, tensor in theirs.items())
    layers = [name for name in theirs if "proj.weight" in name or "fc1.weight" in name]
    assert layers and not any(torch.equal(own[name], openai[name]) for name in layers)
    with pytest.raises(CheckpointError, match="--model clip_openai_text"):
        train(settings_of(cohort, tmp_path, name="c", model="coca_tiny", pretrained="openai"))


def test_openais_clip_is_not_scripted(
    cohort: DemoCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is fetched, with the other problems."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    more = {"model": "clip_openai_text", "pretrained": "openai", "torchscript": True}
    settings = settings_of(cohort, tmp_path, name="no", batch_size=0, **more)
    with pytest.raises(ConfigError, match="--batch-size must be") as told:
        train(settings)
    assert "--pretrained openai and --torchscript" in str(told.value)
    assert "leave --torchscript out" in str(told.value)
    tags = tmp_path / "tags.yaml"
    tags.write_text("openai: nowhere\n")
    monkeypatch.setenv("SLIDEVLM_REGISTRY", str(tags))
    with pytest.raises(ConfigError, match="--batch-size must be") as told:
        train(settings)
    assert "--torchscript" not in str(told.value), "a tag of one's own is something else"


def test_what_cannot_be_used(
    cohort: DemoCohort, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path | str, kind: type[Exception], words: str) -> None:
        with pytest.raises(kind, match=words):
            more = {"pretrained": str(source), "model": "coca_tiny", "name": "no"}
            train(settings_of(cohort, tmp_path, **more))
        assert not (tmp_path / "no").exists()

    other = tmp_path / "other.pt"
    torch.save({"a.weight": torch.zeros(2)}, other)
    refused(other, CheckpointError, "nothing in it has name and shape")
    torch.save({"epoch": 3}, other)
    refused(other, CheckpointError, "holds no weights")
    import pickle

    other.write_bytes(pickle.dumps(Path("x")))
    refused(other, CheckpointError, "would run code")
    damaged = tmp_path / "a.safetensors"
    damaged.write_bytes(b"12345678")
    refused(damaged, CheckpointError, "damaged or no safetensors")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "neither a run folder .* nor a Hugging Face")
    (tmp_path / "empty" / "model.json").write_text("{}")
    refused(tmp_path / "empty", CheckpointError, "is a run that has no checkpoint")
    refused("nowhere", ConfigError, "nothing that is here .* tag of")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    refused("openai", ConfigError, r"--pretrained openai: .*HF_HUB_OFFLINE is set.*models--openai")
    refused("hf-hub:a/b", ConfigError, "HF_HUB_OFFLINE is set.*model.safetensors.*models--a--b")
    tags = tmp_path / "tags.yaml"
    tags.write_text("a: b\nb: c\n")
    monkeypatch.setenv("SLIDEVLM_REGISTRY", str(tags))
    refused("a", ConfigError, "a stand for other tags")
    with pytest.raises(ConfigError, match="is not empty"):
        export(str(run), tmp_path)


def test_a_mosaic_checkpoint_in_a_run(
    cohort: DemoCohort, shared: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    """Its slide encoder, whose tiles are as wide as the demo's, starts a model of one's own."""
    from slidevlm.models.interop import mosaic

    source = shared / "oracles" / "mosaic" / "ref_perceiver.pt"
    found = read_pretrained(str(source))
    assert found.config is not None and found.config["slide"]["latents"] == 16
    content = {**found.config, "tile_width": "auto"}
    content["text"] = {**content["text"], "source": "", "tokenizer": "train", "vocab_size": 300}
    content["decoder"] = {**content["decoder"], "source": ""}
    model = tmp_path / "mosaic.json"
    model.write_text(json.dumps(content))
    more = {"pretrained": str(source), "model": str(model), "name": "m", "lr": 0.0, "wd": 0.0}
    train(settings_of(cohort, tmp_path, **more))
    weights = weights_of(tmp_path / "m")
    expected = mosaic.convert(torch.load(source, weights_only=True)["state_dict"])
    loaded = [n for n in expected if n in weights and weights[n].shape == expected[n].shape]
    assert "slide.self_attention.1.attention.project.weight" in loaded
    assert all(torch.equal(weights[n], expected[n]) for n in loaded)
    # The demo's tiles have another width: what reads them starts anew, and the table says so.
    assert "slide.first.key_values.project.weight" not in loaded
    assert "of another shape: " in messages.text


@pytest.mark.parametrize("beams", [False, True])
def test_a_language_model_trains_writes_and_is_evaluated(
    cohort: DemoCohort, tmp_path: Path, beams: bool
) -> None:
    more: dict[str, Any] = {"save_captions": True, "caption_val_max_seq_len": 8}
    more |= {"val_gen_num_beams": 4, "val_gen_num_beam_groups": 2} if beams else {}
    config = settings_of(
        cohort, tmp_path, model="lm_tiny", name="lm", epochs=3, lr=5e-3, log_every_n_steps=1, **more
    )
    metrics = train(config)
    lines = [json.loads(x) for x in (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()]
    losses = [x["caption_loss"] for x in lines if "caption_loss" in x]
    assert losses[-1] < losses[0] - 0.1
    assert not any("contrastive_loss" in x for x in lines)
    assert metrics["val/loss/caption"] < losses[0]
    assert not [m for m in metrics if "contrastive" in m or "image_to_text" in m]
    assert (tmp_path / "lm" / "captions_epoch_3.json").is_file()
    again = evaluated(cohort, tmp_path, "again", tmp_path / "lm")
    assert again["val/loss/caption"] == pytest.approx(metrics["val/loss/caption"], abs=1e-6)


def test_what_a_language_model_cannot_do(cohort: DemoCohort, tmp_path: Path) -> None:
    for more, words in (
        ({"siglip": True}, "has no contrastive loss: leave out --siglip"),
        ({"coca_contrastive_loss_weight": 1.0}, "leave out --coca-contrastive-loss-weight"),
        (
            {"local_loss": True, "gather_with_grad": True, "false_negatives": "keep"},
            "leave out --local-loss, --gather-with-grad, --false-negatives",
        ),
        ({"coca_caption_loss_weight": 0.0}, "leaves a language model nothing"),
        ({"aug_cfg": {"transform_type": "tile_dropout"}}, "--aug-cfg changes bags of tiles"),
        ({"save_embeddings": True}, "leave out --save-embeddings"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(settings_of(cohort, tmp_path, model="lm_tiny", name="x", **more))


def test_a_clip_model_has_no_caption_loss_to_weigh(cohort: DemoCohort, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a clip model writes none; leave it out"):
        more = {"coca_caption_loss_weight": 3.0}
        train(settings_of(cohort, tmp_path, model="clip_small", name="x", **more))

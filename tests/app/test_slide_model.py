"""`slidevlm.load` and what a loaded model does with bags in every form."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import slidevlm
from slidevlm import testing
from slidevlm.app.slide_model import SlideModel
from slidevlm.batch import Bags
from slidevlm.errors import CheckpointError, ConfigError, DataError, SlideVLMError
from slidevlm.models import few_rows, fused, sketch
from slidevlm.models.generate import Lookup
from slidevlm.precision import for_use


@pytest.fixture(scope="module")
def model() -> SlideModel:
    return testing.model()


def plain(model: SlideModel, features: np.ndarray) -> np.ndarray:
    """The embedding straight from the module, no code of SlideModel between."""
    with torch.no_grad():
        bags = Bags(torch.from_numpy(features.astype(np.float32)), (len(features),))
        return model.trained.model.encode_image(bags)[0].numpy()


def test_a_bag_is_the_same_in_every_form(model: SlideModel, tmp_path: Path) -> None:
    features = testing.bag()
    wanted = plain(model, features)
    np.save(tmp_path / "a.npy", features)
    torch.save(torch.from_numpy(features), tmp_path / "b.pt")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"] = features
    forms = [
        features,
        features.astype(np.float64),
        features.astype(">f4"),
        np.asfortranarray(features),
        torch.from_numpy(features),
        torch.from_numpy(features).requires_grad_(),
        slidevlm.Tiles(features),
        tmp_path / "a.npy",
        str(tmp_path / "b.pt"),
        tmp_path / "c.h5",
    ]
    frozen = features.copy()
    frozen.setflags(write=False)
    for form in [*forms, frozen]:
        found = model.embed(form)
        assert found.shape == (32,) and found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    together = model.embed(forms, batch_size=3)
    np.testing.assert_allclose(together, np.stack([wanted] * len(forms)), atol=1e-6)
    assert model.embed([]).shape == (0, 32)
    for half in (features.astype(np.float16), torch.from_numpy(features).bfloat16()):
        close = model.embed(half)
        assert 0 < np.abs(close - wanted).max() < 0.05


def test_positions_count_and_need_their_unit() -> None:
    torch.manual_seed(0)
    model = testing.model(unit="um")
    with torch.no_grad():  # a new model does not look at positions yet
        for parameter in model.trained.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    features = testing.bag()
    spread = np.random.default_rng(1).uniform(0, 5000, (20, 2))
    one = model.embed(slidevlm.Tiles(features, spread, "um"))
    # Positions are relative to the slide, so moving all of them changes nothing.
    moved = model.embed(slidevlm.Tiles(features, spread + 1000, "um"))
    np.testing.assert_allclose(moved, one, atol=1e-5)
    other = model.embed(slidevlm.Tiles(features, torch.from_numpy(spread[::-1].copy()), "um"))
    assert np.abs(other - one).max() > 1e-4
    slides = np.repeat([0, 1], 10)
    parted = model.embed(slidevlm.Tiles(features, spread, "um", slides))
    assert np.abs(parted - one).max() > 1e-5
    for tiles, message in (
        (slidevlm.Tiles(features, spread), "need their unit"),
        (slidevlm.Tiles(features, spread, "px"), "positions in um, this data has positions in px"),
        (slidevlm.Tiles(features), "positions in um"),
        (features, "positions in um"),
        (slidevlm.Tiles(features, spread[:5], "um"), r"\[20, 2\], not \[5, 2\]"),
        (slidevlm.Tiles(features, spread * np.nan, "um"), "finite"),
        (slidevlm.Tiles(features, spread, "um", slides - 1), "from 0"),
        (slidevlm.Tiles(features, spread, "um", slides / 2), "whole numbers"),
        (slidevlm.Tiles(features, None, "um"), "give them too"),
    ):
        with pytest.raises(DataError, match=message):
            model.embed(tiles)


@pytest.mark.parametrize(
    ("bag", "message"),
    [
        (testing.bag(tile_width=8), "of width 16, this data's are 8"),
        (np.zeros(16, np.float32), r"\[tiles, features\], not \[16\]"),
        (np.zeros((1, 3, 16), np.float32), r"not \[1, 3, 16\]"),
        (np.zeros((3, 16), np.int64), "floating point"),
        (torch.zeros(3, 16, dtype=torch.int32), "floating point"),
        (np.zeros((0, 16), np.float32), "0 tiles"),
        (np.full((3, 16), np.nan, np.float32), "NaN"),
        ({"features": 1}, "a dict is no bag"),
    ],
)
def test_bags_that_are_none(model: SlideModel, bag: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.embed(bag)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="bag 1 of the list"):
        model.embed([testing.bag(), bag])  # type: ignore[list-item]


def test_paths_that_are_no_bag(model: SlideModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        model.embed(tmp_path / "none.h5")
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", testing.bag())
    with pytest.raises(DataError, match=r"2 specimens with features \(a, b\)"):
        model.embed(tmp_path)
    np.save(tmp_path / "a.npy", testing.bag(tile_width=8))
    with pytest.raises(DataError, match=r"a\.npy: .* 8"):
        model.embed(tmp_path / "a.npy")


def test_the_cut_off_takes_the_same_tiles_every_time(tmp_path: Path) -> None:
    whole = testing.model()
    cut = SlideModel(whole.trained, whole.precision, image_features_cutoff=50)
    features = testing.bag(200)
    np.save(tmp_path / "a.npy", features)
    first = cut.embed(features)
    np.testing.assert_array_equal(cut.embed(features), first)
    assert np.abs(first - whole.embed(features)).max() > 1e-3
    assert cut.embed(tmp_path / "a.npy").shape == (32,)
    with pytest.raises(ConfigError, match="at least 1"):
        SlideModel(whole.trained, whole.precision, image_features_cutoff=0)


def test_texts(model: SlideModel) -> None:
    rows = model.embed_text(["lung tumour", "kidney"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model.embed_text("kidney"), rows[1], atol=1e-6)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    assert model.embed_text([]).shape == (0, 32)
    with pytest.raises(ConfigError, match="strings, not int"):
        model.embed_text(["a", 3])  # type: ignore[list-item]


def test_classify_is_a_softmax_over_the_classes(model: SlideModel, tmp_path: Path) -> None:
    prompts = {"lung": ["lung", "pulmonary tissue"], "kidney": "kidney", "breast": "breast"}
    bags = [testing.bag(seed=s) for s in range(3)]
    found = model.classify(bags, prompts)
    assert found[0].classes == ("breast", "kidney", "lung")
    # By hand: the mean of a class's texts, normalised; cosine; the model's scale; softmax.
    lung = model.embed_text(["lung", "pulmonary tissue"]).mean(0)
    rows = [model.embed_text("breast"), model.embed_text("kidney"), lung / np.linalg.norm(lung)]
    scale = float(model.trained.model.log_scale.detach().exp())
    for bag, one in zip(bags, found, strict=True):
        odds = np.exp(scale * np.array([row @ model.embed(bag) for row in rows]))
        np.testing.assert_allclose(one.probabilities, odds / odds.sum(), atol=1e-4)
        assert one.label == one.classes[int(np.argmax(odds))]
        assert one.to_dict()["lung"] == pytest.approx(float(one.probabilities[2]))
        alone = model.classify(bag, prompts)
        np.testing.assert_allclose(alone.probabilities, one.probabilities, atol=1e-5)
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(prompts))
    from_file = model.classify(bags[0], file)
    np.testing.assert_allclose(from_file.probabilities, found[0].probabilities, atol=1e-6)
    other = model.classify(bags[0], prompts, ensemble="probabilities")
    assert np.abs(other.probabilities - found[0].probabilities).max() > 1e-4
    assert model.classify(bags[0], ["lung", "kidney"]).classes == ("kidney", "lung")
    assert model.classify([], prompts) == []


def test_prompts_that_are_none(model: SlideModel) -> None:
    bag = testing.bag()
    for prompts in (["lung"], {"lung": []}, {"lung": "x"}, ["lung", ""], ["lung", "lung"]):
        with pytest.raises(DataError, match="the prompts"):
            model.classify(bag, prompts)
    with pytest.raises(ConfigError, match="not one of mean"):
        model.classify(bag, ["a", "b"], ensemble="median")


@pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")
def test_a_caption_is_guessed_by_rounded_weights(
    model: SlideModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once enough has been written one at a time, and with the same text."""
    expected = [model.caption(testing.bag(), max_tokens=20, seed=seed, top_k=4) for seed in (1, 2)]
    monkeypatch.setattr(few_rows, "LEAST", 0)
    monkeypatch.setattr(sketch, "LEAST_WEIGHTS", 0)
    rounded, enter = [], fused.Fused.rounded
    monkeypatch.setattr(fused.Fused, "rounded", lambda *a: (rounded.append(1), enter(*a))[1])
    model._lookup = Lookup()
    monkeypatch.setattr(model._lookup, "worth", lambda *_: 1)
    for _ in range(sketch.LEAST_WRITTEN // 20 + 2):
        for seed, text in zip((1, 2), expected, strict=True):
            assert model.caption(testing.bag(), max_tokens=20, seed=seed, top_k=4) == text
    assert rounded


def test_captions(model: SlideModel, tmp_path: Path) -> None:
    bags = [testing.bag(seed=s) for s in range(3)]
    alone = [model.caption(bag, max_tokens=6) for bag in bags]
    assert model.caption(bags, max_tokens=6, batch_size=2) == alone
    assert all(text.startswith("kidney") for text in model.caption(bags, prompt="kidney"))
    best = model.drafts(bags[0], beams=4, best=3, max_tokens=5)[0]
    assert 1 < len(best) <= 3
    scores = [report.score for report in best if report.score is not None]
    assert len(scores) == len(best) and scores == sorted(scores, reverse=True)
    drawn = [model.caption(bags[0], top_k=None, seed=seed, max_tokens=20) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="beams"):
        model.caption(bags[0], beams=0)
    with pytest.raises(ConfigError, match="batch_size"):
        model.caption(bags, batch_size=0)
    with pytest.raises(TypeError, match="unknown setting 'beems'; did you mean beams"):
        model.caption(bags[0], beems=4)


def test_what_a_model_cannot_do() -> None:
    language, contrastive = testing.model("lm_tiny"), testing.model("clip_small")
    assert isinstance(language.caption(testing.bag(), max_tokens=3), str)
    for call in (
        lambda: language.embed(testing.bag()),
        lambda: language.embed_text("a"),
        lambda: language.classify(testing.bag(), ["a", "b"]),
        lambda: contrastive.caption(testing.bag()),
    ):
        with pytest.raises(ConfigError, match="language model|no decoder"):
            call()


def test_threads_get_what_one_alone_gets(model: SlideModel, tmp_path: Path) -> None:
    bags = [testing.bag(10 + s, seed=s) for s in range(12)]
    paths = []
    for number, bag in enumerate(bags):
        paths.append(tmp_path / f"{number}.h5")
        with h5py.File(paths[-1], "w") as file:
            file["features"] = bag
    prompts = ["lung", "kidney"]

    def work(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
        chances = model.classify(path, prompts).probabilities
        return model.embed(path), chances, model.caption(path, top_k=None, max_tokens=8)

    wanted = [work(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, paths * 6))
    for number, (embedding, chances, text) in enumerate(found):
        one = wanted[number % len(paths)]
        np.testing.assert_array_equal(embedding, one[0])
        np.testing.assert_array_equal(chances, one[1])
        assert text == one[2]
    assert not model.trained.model.training


def test_load_takes_every_form_and_leaves_the_draws_alone(tmp_path: Path, monkeypatch) -> None:
    settings = testing.settings(tmp_path)
    run = slidevlm.train(settings, name="run", save_frequency=1).folder
    assert run is not None
    monkeypatch.chdir(tmp_path)
    exported = testing.run(tmp_path / "exported")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    models = [slidevlm.load(f, device="cpu") for f in (run, str(run / "checkpoints/epoch_1.pt"))]
    np.testing.assert_array_equal(torch.rand(3).numpy(), wanted.numpy())
    assert models[0].hash == models[1].hash and len(models[0].hash) == 64
    assert models[0].unit == "um" and models[0].embed_dim == 32
    assert "family coca" in repr(models[0])
    small = [slidevlm.load(f) for f in (exported, exported / "model.safetensors")]
    np.testing.assert_array_equal(small[0].embed(testing.bag()), small[1].embed(testing.bag()))
    np.testing.assert_array_equal(
        small[0].embed(testing.bag()), testing.model().embed(testing.bag())
    )


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model '.*none' is nothing that is here"):
        slidevlm.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="neither a run folder"):
        slidevlm.load(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="no configuration and tokenizer"):
        slidevlm.load(tmp_path / "foreign.pt")
    run = testing.run(tmp_path / "run")
    for device in ("gpu", "mps", "cuda:99"):
        with pytest.raises(ConfigError, match="--device"):
            slidevlm.load(run, device=device)
    with pytest.raises(ConfigError, match="--precision"):
        slidevlm.load(run, device="cpu", precision="fp8")


def test_a_broken_embedding_is_told() -> None:
    model = testing.model(seed=3)
    with torch.no_grad():
        model.trained.model.slide_project.weight.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="not finite"):
        model.embed(testing.bag())


def test_precision_for_use_is_exact_on_a_cpu() -> None:
    assert for_use(torch.device("cpu")) == "fp32"


def test_train_is_called_though_a_folder_has_its_name() -> None:
    code = (
        "import slidevlm\n"
        "assert callable(slidevlm.train)\n"
        "import slidevlm.train.loop as loop\n"
        "from slidevlm.train import checkpoint\n"
        "assert callable(slidevlm.train) and slidevlm.train.loop is loop\n"
        "try: slidevlm.train({'bath_size': 3})\n"
        "except Exception as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "did you mean batch_size" in result.stdout


def test_everything_public_is_there() -> None:
    assert set(slidevlm.__all__) <= set(dir(slidevlm))
    for name in slidevlm.__all__:
        assert getattr(slidevlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        slidevlm.lod  # noqa: B018


def test_train_and_evaluate_take_every_form_of_arguments(tmp_path: Path) -> None:
    settings = testing.settings(tmp_path)
    first = slidevlm.train(settings, name="first")
    assert first.folder is not None and first.folder.name == "first"
    assert np.isfinite(first.metrics["test/loss/contrastive"])
    # The run's own file, with paths of a program and a list in the place of a tuple.
    second = slidevlm.train(first.folder / "config.yaml", name="second")
    assert second.metrics == first.metrics and second.folder != first.folder
    split = Path(settings["test_split"])
    copied = split.with_name("other.txt")
    copied.write_text(split.read_text())
    third = slidevlm.train({**settings, "val-split": [copied]}, test_split=None, name="third")
    assert {name.split("/")[0] for name in third.metrics} == {"other"}
    config = slidevlm.app.notebook.config_of(settings, name="fourth")
    assert slidevlm.train(config).metrics == first.metrics
    found = slidevlm.evaluate(first.folder)
    assert found.folder is not None and found.folder.parent == first.folder
    assert found.metrics["test/loss/contrastive"] == first.metrics["test/loss/contrastive"]
    newest = max((first.folder / "checkpoints").iterdir())
    assert slidevlm.evaluate(newest, {"name": "again"}).metrics == found.metrics
    for wrong, message in (
        ({"batch_size": "many"}, "whole number"),
        ({"batch-size": 3, "batch_size": 3}, "twice"),
        ({"bach_size": 3}, "did you mean batch_size"),
    ):
        with pytest.raises(SlideVLMError, match=message):
            slidevlm.train(wrong)

"""slidevlm models list, show, new; what show says against what a step really keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.cli import main
from slidevlm.model_commands import groups, memory, parts, vocabulary
from slidevlm.models import build_model, zoo

SMALL = ["coca_small", "clip_small", "coca_small_cohort", "lm_tiny"]


def test_every_shipped_model_is_listed_and_can_be_built(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "list"]) == 0
    told = capsys.readouterr().out
    assert "learns by LoRA of rank 16" in told, "descriptions are whole"
    listed = {line.split()[0] for line in told.splitlines()}
    names = (shared / "oracles" / "mosaic" / "NAMES.txt").read_text().split()
    assert set(names) <= listed and len(names) == 21
    assert {"prism", "lm_stage_1", "clip_stage_1", "coca_stage_2_lora"} <= listed
    for name in zoo.names():
        config = zoo.load(name)
        with torch.device("meta"):
            model = build_model(replace(config, tile_width=config.tile_width or 8), 300)
        total = parts(model)[-1]
        assert total[1] == sum(p.numel() for p in model.parameters())
        for tower in ("slide", "text", "decoder"):
            found = [
                id(p)
                for _, members in groups(model, tower)
                for m in members
                for p in (m.parameters() if isinstance(m, torch.nn.Module) else [m])
            ]
            assert len(set(found)) == len(found), f"{name}: a parameter is in two groups"


@pytest.mark.parametrize("name", SMALL)
def test_memory_is_what_a_step_keeps(name: str) -> None:
    """To 1 %: the count is that of the tensors autograd keeps in a real pass."""
    config = replace(zoo.load(name), tile_width=24)
    told = memory(config, 3000, 20)
    model = build_model(config, vocabulary(config))
    model.train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    bags = Bags(torch.randn(3000, 24), (3000,), torch.rand(3000, 2), None, "um")
    tokens = torch.full((1, 20), 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(bags, tokens, tokens > 0)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    assert told.activations == pytest.approx(real, rel=0.01)
    assert told.weights == sum(4 * p.numel() for p in model.parameters())
    (output.logits if output.logits is not None else output.image_embedding).sum().backward()
    assert told.optimizer == 2 * told.gradients


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "coca_small", "--tiles", "500"]) == 0
    text = capsys.readouterr().out
    for word in (
        "first_read",
        "pooler and projection",
        "embeddings",
        "layer_1",
        "vocabulary",
        "a bag of 500 tiles",
    ):
        assert word in text
    assert main(["models", "show", "coca_vit_stage_1"]) == 0
    assert "depend on where the tiles lie" in capsys.readouterr().out
    assert main(["models", "show", "coca_smal"]) == 2
    assert "did you mean coca_small" in capsys.readouterr().err


def test_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    assert main(["models", "new", "coca_small", str(file)]) == 0
    assert zoo.load(str(file)) == zoo.load("coca_small")
    assert main(["models", "new", "coca_tiny", str(file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert zoo.load(str(file)) == zoo.load("coca_small")
    assert main(["models", "new", "coca_tiny", str(tmp_path / "mine.txt")]) == 2
    content = json.loads(file.read_text())
    content["text"]["widht"] = 3
    file.write_text(json.dumps(content))
    assert main(["models", "show", str(file)]) == 2
    assert "text: unknown key 'widht'; did you mean width" in capsys.readouterr().err

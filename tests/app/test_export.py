"""slidevlm models export: LoRA that has learned something is merged, the outputs are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slidevlm.app.pretrained import read_pretrained
from slidevlm.app.trained import Trained, restore
from slidevlm.batch import Bags
from slidevlm.cli import main
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.models import CoCa, build_model, zoo
from slidevlm.models.lora import LoRAConfig
from slidevlm.train import checkpoint as ckpt

pytest.importorskip("safetensors")

LORA = (
    LoRAConfig("text", ["project", "inner"], rank=3, alpha=6.0),
    LoRAConfig("slide", ["query", "project"], rank=2, alpha=2.0),
)
REPORTS = ["Invasive carcinoma, grade 2.", "Benign tissue of the breast, no tumour seen."] * 8


def trained() -> Trained:
    """A model whose every parameter, LoRA's second factor too, is away from where it starts."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(REPORTS, 300)
    config = replace(zoo.load("coca_tiny"), tile_width=6, lora=LORA)
    model = build_model(config, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Trained(model, config, tokenizer, siglip=False, unit="um")


def outputs(of: Trained) -> dict[str, Tensor]:
    assert isinstance(of.model, CoCa)
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 2, 30)
    positions = 1e4 * torch.rand(41, 2, generator=generator)
    bags = Bags(torch.randn(41, 6, generator=generator), lengths, positions, None, "um")
    tokens = torch.randint(3, 200, (3, 12), generator=generator)
    with torch.inference_mode():
        out = of.model.eval()(bags, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert out.logits is not None
    return {"image": out.image_embedding, "text": out.text_embedding, "logits": out.logits}


def test_lora_is_merged_and_the_exported_folder_gives_the_same_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = trained()
    file = tmp_path / "run.pt"
    training = ckpt.TrainState(ckpt.Progress(), {}, {}, [], {}, 0, "", {}, 1)
    ckpt.save(file, mine.state(), training)
    expected = outputs(mine)
    plain = restore(mine.state())
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
    for name, value in outputs(plain).items():
        assert (value - expected[name]).abs().max() > 0.01, f"LoRA has no effect on {name}"

    folder = tmp_path / "out"
    assert main(["models", "export", str(file), str(folder)]) == 0, capsys.readouterr().err
    written = json.loads((folder / "config.json").read_text())
    assert "lora" not in written["slidevlm"]["config"]
    for source in (folder, folder / "model.safetensors"):
        found = read_pretrained(str(source))
        assert found.state is not None
        assert not [n for n in found.state.weights if "lora" in n or ".base." in n]
        theirs = restore(found.state)
        assert theirs.config == replace(mine.config, lora=())
        assert theirs.tokenizer.encode(REPORTS[0], 30) == mine.tokenizer.encode(REPORTS[0], 30)
        for name, value in outputs(theirs).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=name)
    # The checkpoint keeps its LoRA.
    assert [n for n in read_pretrained(str(file)).state.weights if "lora" in n]

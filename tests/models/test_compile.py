"""Compiled and scripted parts: the same numbers as plain ones, for batches of any composition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.compile import Fast, compile_regions, regions, script_regions
from slidevlm.models.decoding import Decoding
from slidevlm.models.freeze import lock_text
from slidevlm.models.generate import generate
from slidevlm.models.lora import LoRAConfig, add_lora
from slidevlm.models.mode import Recomputing
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "longnet": {"segments": [4, 8], "dilations": [1, 2]},
    "transmil": {"landmarks": 4},
    "abmil": {"input_norm": "batch"},
}
# Micro-batches of a step: one or two, of different sizes, and bags of different lengths in each.
COMPOSITIONS = [(4,), (4,), (4, 4), (4, 4), (5, 3), (2, 6), (7,), (3, 3), (6, 2)]


def model_of(slide: str = "perceiver", dropout: float = 0.0, **more: Any) -> CoCa:
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": 6} | more
    if slide != "perceiver":
        heads = {} if slide in ("abmil", "mean") else {"heads": 4}
        content["slide"] = {"type": slide, "width": 16, **heads, **SMALL.get(slide, {})}
    torch.manual_seed(0)
    model = build_model(from_dict(content, "here"), 20)
    assert isinstance(model, CoCa)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(sizes: tuple[int, ...], seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        lengths = tuple(torch.randint(2, 30, (size,), generator=generator).tolist())
        words = torch.randint(3, 12, (size,), generator=generator)
        mask = torch.arange(int(words.max())) < words[:, None]
        total = sum(lengths)
        bags = Bags(
            torch.randn(total, 6, generator=generator),
            lengths,
            1e4 * torch.rand(total, 2, generator=generator),
            None,
            "um",
        )
        tokens = torch.randint(3, 20, mask.shape, generator=generator) * mask
        names = tuple(f"s{i}" for i in range(size))
        made.append(Batch(bags, tokens, mask, torch.arange(size), names, names))
    return made


def step_for(model: CoCa) -> Step:
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.99), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve("fp32", CPU), None)


def gradients(model: CoCa, sizes: tuple[int, ...], seed: int) -> dict[str, Tensor | None]:
    step = step_for(model)
    step.optimizer.zero_grad()
    torch.manual_seed(seed)  # of the dropout
    terms = step.gradients(batches(sizes, seed))
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"loss": terms.loss, **found}


def assert_same(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is None:
            assert mine[name] is None, name
        else:
            torch.testing.assert_close(mine[name], value, atol=2e-5, rtol=1e-3, msg=name)


def checkpoint(model: CoCa) -> None:
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.checkpointing = True


def outputs(model: CoCa, batch: Batch) -> list[Tensor]:
    with torch.inference_mode():
        out = model.eval()(batch.bags, batch.tokens, batch.token_mask)
    return [t for t in (out.image_embedding, out.text_embedding, out.logits) if t is not None]


# --- what is chosen ---------------------------------------------------------------------------


def test_regions_are_the_largest_parts_on_tensors() -> None:
    model = model_of()
    names = [name for name, _ in regions(model)]
    assert {"text", "slide_pooler", "slide.self_attention.0", "slide.first.key_values"} <= set(
        names
    )
    assert not any(a != b and a.startswith(f"{b}.") for a in names for b in names)
    assert not any(type(m).__module__.startswith("torch.") for _, m in regions(model))
    model.text.checkpointing = True
    assert "text.layers.0" in [name for name, _ in regions(model)]


# --- torch.jit.script -------------------------------------------------------------------------


@pytest.mark.parametrize("slide", list(SLIDE_ENCODERS))
def test_scripted_trains_and_evaluates_as_plain(slide: str) -> None:
    """Dropout included: micro-batches go through twice, and must drop the same both times."""
    plain, scripted = model_of(slide, 0.3), model_of(slide, 0.3)
    names = script_regions(scripted)
    assert any(n.startswith("text") for n in names)
    assert {n.partition(".")[0] for n in names} >= {"text", "decoder", "report_pooler"}
    assert scripted.state_dict().keys() == plain.state_dict().keys()
    for model in (plain, scripted):
        model.train()
    for seed, sizes in enumerate([(4,), (3, 5), (2, 2)]):
        assert_same(gradients(scripted, sizes, seed), gradients(plain, sizes, seed))
        for model in (plain, scripted):
            torch.manual_seed(seed)
            step_for(model)(batches(sizes, seed), 1e-3)
    for seed, size in enumerate((1, 3, 8)):
        batch = batches((size,), seed)[0]
        for mine, theirs in zip(outputs(scripted, batch), outputs(plain, batch), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)


def test_scripted_parts_really_run_as_scripts() -> None:
    model = model_of()
    names = script_regions(model)
    for name in names:
        fast = model.get_submodule(name).forward
        assert isinstance(fast, Fast) and isinstance(fast.fast.graph, torch.jit.ScriptModule)
    # The weights of the scripts are the model's.
    graph = model.get_submodule(names[0]).forward.fast.graph
    mine = dict(model.get_submodule(names[0]).state_dict())
    assert all(v.data_ptr() == mine[n].data_ptr() for n, v in graph.state_dict().items())


def test_scripts_follow_the_modes_of_their_modules() -> None:
    model = model_of(dropout=0.5)
    script_regions(model)
    batch = batches((4,), 0)[0]

    def texts() -> Tensor:
        return model.encode_text(batch.tokens, batch.token_mask)

    model.train()
    assert not torch.equal(texts(), texts())
    model.eval()
    assert torch.equal(texts(), texts())
    lock_text(model, 0, freeze_layer_norm=True)
    model.train()
    assert torch.equal(texts(), texts()), "a frozen tower runs without dropout"


def test_a_copy_of_a_scripted_model_has_weights_of_its_own() -> None:
    model = model_of().eval()
    script_regions(model)
    batch = batches((3,), 0)[0]
    before = outputs(model, batch)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    for mine, theirs in zip(outputs(model, batch), before, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    plain = model_of()
    plain.load_state_dict(copied.state_dict())
    for mine, theirs in zip(outputs(copied, batch), outputs(plain, batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_scripted_model_writes_the_same_reports() -> None:
    plain, scripted = model_of().eval(), model_of().eval()
    script_regions(scripted)
    bags = batches((4,), 3)[0].bags
    decoding = Decoding(bos_id=1, eos_id=2, pad_id=0, max_tokens=8, top_k=1)
    assert generate(scripted, bags, "abcd", decoding) == generate(plain, bags, "abcd", decoding)


def test_lora_can_be_scripted() -> None:
    lora = LoRAConfig("text", ["project"])
    plain, scripted = model_of(), model_of()
    for model in (plain, scripted):
        torch.manual_seed(2)
        add_lora(model, [lora])
        nn.init.normal_(model.get_submodule("text.layers.0.attention.project").lora_b, std=0.1)
        model.train()
    script_regions(scripted)
    found = gradients(scripted, (4, 3), 1)
    assert_same(found, gradients(plain, (4, 3), 1))
    assert found["text.layers.0.attention.project.lora_a"].any()


@pytest.mark.parametrize("slide", [s for s in SLIDE_ENCODERS if s != "vit"])
def test_scripts_compute_their_activations_again(slide: str) -> None:
    plain, scripted = model_of(slide, 0.3), model_of(slide, 0.3)
    checkpoint(scripted)
    assert "text.layers.0" in script_regions(scripted)
    for model in (plain, scripted):
        model.train()
    for seed, sizes in enumerate([(4,), (3, 5)]):
        assert_same(gradients(scripted, sizes, seed), gradients(plain, sizes, seed))


def kept_bytes(model: CoCa, batch: Batch) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch.bags, batch.tokens, batch.token_mask)
    assert output.logits is not None
    return sum(kept.values())


def test_scripts_that_compute_again_keep_less() -> None:
    keeping, again = model_of(), model_of()
    checkpoint(again)
    kept = []
    for model in (keeping, again):
        script_regions(model)
        kept.append(kept_bytes(model.train(), batches((8,), 0)[0]))
    assert kept[1] < 0.85 * kept[0]


def test_scripted_parts_count_rows_anew() -> None:
    """One script for bags of any length, where a trace's or compiler's numbers would be fixed."""
    model = model_of("transmil")
    names = script_regions(model)
    assert {"slide.first", "slide.places", "slide.second"} <= set(names)


class Unscriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + len({*"abc"})


def test_a_part_that_cannot_be_scripted_is_named() -> None:
    model = nn.ModuleDict({"tower": nn.ModuleDict({"odd": Unscriptable()})})
    with pytest.raises(ConfigError, match=r"--torchscript: tower\.odd \(Unscriptable\) cannot be"):
        script_regions(model)


# --- torch.compile ----------------------------------------------------------------------------


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def counted(model: CoCa, name: str) -> list[None]:
    """A list that grows with each run of a compiled part."""
    runs: list[None] = []
    fast = model.get_submodule(name).forward
    assert isinstance(fast, Fast)
    plain = fast.fast

    def run(*args: Any, **kwargs: Any) -> Any:
        runs.append(None)
        return plain(*args, **kwargs)

    fast.fast = run
    return runs


def test_parts_that_count_rows_are_not_compiled() -> None:
    assert not any(n.startswith("slide.") for n, _ in regions(model_of("transmil")))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("again", [False, True], ids=["keeping", "checkpointing"])
def test_compiled_trains_as_plain_and_settles(again: bool) -> None:
    """The same numbers, dropout included, and no graph more after the first few batches."""
    torch._dynamo.reset()
    plain, compiled = model_of(dropout=0.3), model_of(dropout=0.3)
    if again:
        checkpoint(compiled)
    assert len(compile_regions(compiled)) > 5
    runs = counted(compiled, "slide.self_attention.0")
    times = compiled.slide.blocks
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    before, counts = graphs(), []
    for model in (plain, compiled):
        model.train()
    for seed, sizes in enumerate(COMPOSITIONS):
        del runs[:]
        assert_same(gradients(compiled, sizes, seed), gradients(plain, sizes, seed))
        counts.append(graphs())
        accumulated = len(sizes) > 1  # each goes through once before, without a graph
        assert len(runs) == times * len(sizes) * (1 + accumulated + again)
    assert counts[0] > before, "it is compiled"
    assert len(set(counts[-4:])) == 1, f"batches of other compositions made graphs: {counts}"
    for seed, size in enumerate((3, 8, 5, 6)):
        batch = batches((size,), seed)[0]
        for mine, theirs in zip(outputs(compiled, batch), outputs(plain, batch), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
        counts.append(graphs())
    assert counts[-1] == counts[-2], f"evaluation made graphs: {counts}"
    bags = batches((4,), 3)[0].bags
    decoding = Decoding(bos_id=1, eos_id=2, pad_id=0, max_tokens=8, top_k=1)
    assert generate(compiled, bags, "abcd", decoding) == generate(plain, bags, "abcd", decoding)
    copied = copy.deepcopy(compiled)
    nn.init.zeros_(copied.text.norm.weight)
    for mine, theirs in zip(outputs(compiled, batch), outputs(plain, batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)

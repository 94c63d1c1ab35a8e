"""Steps of 2 and 3 processes with --fsdp: those of one process with the whole batch, and of a model
in one piece on as many processes.

This file is also the program of the processes.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_batch import objective, replayed, start_ranks

from slidevlm import dist, fsdp
from slidevlm.batch import Bags, Batch, Output
from slidevlm.models import Model, build_model, from_dict, zoo
from slidevlm.models.cast import cast_weights
from slidevlm.models.freeze import lock_image
from slidevlm.models.lora import LoRAConfig
from slidevlm.models.mode import Recomputing
from slidevlm.models.units import units
from slidevlm.precision import Precision, resolve
from slidevlm.train.average import Average
from slidevlm.train.optim import load_state, make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, sigmoid_term, softmax_term

CPU = torch.device("cpu")
GLOBAL_BATCH, STEPS, VOCAB = 12, 5, 21  # 21 rows are cut into 11 and 10, or 7, 7 and 7
PLAIN = resolve("fp32", CPU)


@dataclass(frozen=True)
class Case:
    """One training of five steps."""

    accum: int = 1
    dropout: bool = False
    frozen: bool = False
    siglip: bool = False
    weights: tuple[float, float] = (1.0, 2.0)
    dtype: torch.dtype = torch.float64
    local_loss: bool = False
    gather_with_grad: bool = False


CASES = [
    Case(),
    Case(2, dropout=True, local_loss=True),
    Case(4, siglip=True, gather_with_grad=True),
    Case(2, frozen=True, local_loss=True, gather_with_grad=True),
    Case(1, dropout=True, frozen=True, siglip=True, local_loss=True),
    Case(2, weights=(1.0, 0.0)),
    Case(2, dropout=True, weights=(0.0, 2.0)),
    Case(2, dropout=True, dtype=torch.float32),
    Case(1, siglip=True, dtype=torch.float32, gather_with_grad=True),
]


def shaken(model: nn.Module) -> None:
    """Away from the zeros in which a new model's branches end, which would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("log_scale", "bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))


def tiny(case: Case) -> Model:
    torch.manual_seed(0)
    config = replace(zoo.load("coca_tiny"), tile_width=6)
    model = build_model(config, VOCAB, siglip=case.siglip).to(case.dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if case.dropout else 0.0
    shaken(model)
    if case.frozen:
        lock_image(model, 1, freeze_statistics=False)
    return model.train()


def cut(model: Model) -> Model:
    fsdp.shard(model, units(model), CPU)
    return model


def joined(model: Model) -> dict[str, Tensor]:
    """Whole weights, on every process."""
    named = model.state_dict(keep_vars=True).items()
    return {name: fsdp.whole(fsdp.part(tensor), tensor).clone() for name, tensor in named}


def batch_of(step: int, numbers: range, dtype: torch.dtype = torch.float64) -> Batch:
    draws = [torch.Generator().manual_seed(100 * step + number) for number in numbers]
    bags = [torch.randn(1 + n % 4, 6, generator=g) for n, g in zip(numbers, draws, strict=True)]
    places = [1e4 * torch.rand(len(b), 2, generator=g) for b, g in zip(bags, draws, strict=True)]
    lengths = torch.tensor([3 + n % 3 for n in numbers])
    tokens = torch.stack([torch.randint(3, VOCAB, (6,), generator=g) for g in draws])
    mask = torch.arange(6) < lengths[:, None]
    names = tuple(f"s{n}" for n in numbers)
    return Batch(
        Bags(torch.cat(bags).to(dtype), tuple(len(b) for b in bags), torch.cat(places), None, "um"),
        tokens * mask,
        mask,
        torch.tensor([n % 9 for n in numbers]),
        names,
        names,
    )


def micro_batches(step: int, rank: int, world: int, case: Case) -> list[Batch]:
    mine = GLOBAL_BATCH // world
    size = max(1, mine // case.accum)
    starts = range(rank * mine, (rank + 1) * mine, size)
    return [batch_of(step, range(start, start + size), case.dtype) for start in starts]


def optimizer_for(model: Model, name: str = "adamw") -> torch.optim.Optimizer:
    # Adam makes of a gradient that is nothing but rounding a whole step, unless epsilon is larger.
    eps = 1e-8 if next(model.parameters()).dtype == torch.float64 else 1e-5
    groups = parameter_groups(model, 0.1)
    return make_optimizer(name, groups, lr=1e-3, betas=(0.9, 0.98), eps=eps)


def step_for(
    model: Model, case: Case, precision: Precision = PLAIN, opt: str = "adamw", clip: float = 1.0
) -> Step:
    objective = Objective(
        sigmoid_term if case.siglip else softmax_term,
        *case.weights,
        mask_duplicates=True,
        local_loss=case.local_loss,
        gather_with_grad=case.gather_with_grad,
    )
    return Step(model, optimizer_for(model, opt), objective, precision, clip)


def moved(step: Step, case: Case, numbers: range = range(STEPS)) -> list[float]:
    rank, world = dist.rank(), dist.world_size()
    norms = []
    for number in numbers:
        torch.manual_seed(1000 * number + rank)
        terms = step(micro_batches(number, rank, world, case), 1e-3)
        norms.append(terms.gradient_norm.item())
    return norms


def reference(case: Case, world: int) -> dict[str, Tensor]:
    """Plain autograd in one process, every graph in memory at once."""
    model = tiny(case)
    optimizer = optimizer_for(model)
    norms = []
    for number in range(STEPS):
        outputs: list[Output] = []
        batches: list[Batch] = []
        for rank in range(world):
            torch.manual_seed(1000 * number + rank)
            mine = micro_batches(number, rank, world, case)
            outputs += replayed(model, mine)
            batches += mine
        optimizer.zero_grad()
        objective(case, outputs, batches).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        model.clamp_scale()
    return {**model.state_dict(), "norms": torch.stack(norms)}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- other models, against the same model in one piece ------------------------------------------


def of(**parts: Any) -> Callable[[], Model]:
    def make() -> Model:
        torch.manual_seed(0)
        content = {**zoo.load("coca_tiny").to_dict(), "tile_width": 6, **parts}
        model = build_model(from_dict(content, "test"), VOCAB).double()
        shaken(model)
        return model.train()

    return make


def recomputing(make: Callable[[], Model]) -> Callable[[], Model]:
    def made() -> Model:
        model = make()
        for module in model.modules():
            if isinstance(module, Recomputing):
                module.checkpointing = True
        return model

    return made


DROPPING = {"type": "scratch", "width": 16, "layers": 3, "heads": 2, "context_length": 16,
            "vocab_size": VOCAB, "dropout": 0.2}  # fmt: skip
DECODER = {"layers": 2, "heads": 2, "slide_tokens": 4, "dropout": 0.2, "tied": True}
VIT = {"type": "vit", "width": 32, "layers": 2, "heads": 4, "tokens": 5, "dropout": 0.1}


def language_model() -> Model:
    torch.manual_seed(0)
    model = build_model(replace(zoo.load("lm_tiny"), tile_width=6), VOCAB).double()
    shaken(model)
    return model.train()


def adapted() -> Model:
    torch.manual_seed(0)
    lora = (LoRAConfig("text", ["project", "inner"], rank=3, alpha=6.0),)
    model = build_model(replace(zoo.load("coca_tiny"), tile_width=6, lora=lora), VOCAB).double()
    shaken(model)
    return model.train()


GPT = {"type": "gpt2", "source": "none", "heads": 4, "inner": 24, "dropout": 0.1}
GPT_TEXT = {**GPT, "start": 0, "end": 2, "width": 16, "positions": 20, "context_length": 16,
            "pool_heads": 2}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 16}  # fmt: skip
HUGGING_FACE = {"type": "hf", "source": "none", "context_length": 16, "architecture": BERT}


MODELS: dict[str, Callable[[], Model]] = {
    "vit": of(slide=VIT, text=DROPPING, decoder=DECODER),
    "longnet": of(slide={"type": "longnet", "width": 32, "layers": 2, "heads": 4, "tokens": 5}),
    "transmil": of(slide={"type": "transmil", "width": 32, "heads": 4, "landmarks": 4}),
    "abmil": of(slide={"type": "abmil", "width": 32}, pooling="cls"),
    "recomputed": recomputing(of(slide=VIT, text=DROPPING, decoder=DECODER)),
    "recomputed perceiver": recomputing(of(text=DROPPING, decoder=DECODER)),
    "gpt2": of(text=GPT_TEXT, decoder={**GPT, "start": 2, "end": 4}),
    "gpt2, frozen": of(text={**GPT_TEXT, "freeze": True}, decoder={**GPT, "start": 2, "end": 4}),
    "hugging face": of(text=HUGGING_FACE, decoder=None, family="clip"),
    "lora": adapted,
    "language": language_model,
}
OPTIMIZERS = ("adam", "adamax", "nadam", "radam", "sgd", "lion", "adopt")


def compared() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights after three steps of each model, in one piece and cut."""
    found = {}
    for name, make in MODELS.items():
        if name == "hugging face" and not installed("transformers"):
            continue
        weights = {"language": (0.0, 1.0), "hugging face": (1.0, 0.0)}.get(name, (1.0, 2.0))
        case, results = Case(2, weights=weights), []
        for model in (make(), cut(make())):
            norms = moved(step_for(model, case), case, range(3))
            results.append({**joined(model), "norms": torch.tensor(norms, dtype=torch.float64)})
        found[name] = tuple(results)
    return found


def optimized() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    found = {}
    for name in OPTIMIZERS:
        if name in ("lion", "adopt") and not installed("pytorch_optimizer"):
            continue
        results = []
        for model in (tiny(Case()), cut(tiny(Case()))):
            moved(step_for(model, Case(), opt=name), Case(), range(3))
            results.append(joined(model))
        found[name] = tuple(results)
    return found


def sixteen_bits() -> dict[str, Any]:
    """Gradients of bfloat16 weights, cut and not; what moves them is float32, and is cut."""
    case, found = Case(2, dtype=torch.float32), {}
    for name in ("plain", "cut"):
        model = tiny(case)
        cast_weights(model, torch.bfloat16, everything=True)
        if name == "cut":
            cut(model)
        step = step_for(model, case, resolve("pure_bf16", CPU))
        batches = micro_batches(0, dist.rank(), dist.world_size(), case)
        step.gradients(batches)
        found[name] = {
            n: fsdp.whole(step.masters.of(p).grad, p)
            for n, p in model.named_parameters()
            if step.masters.of(p).grad is not None
        }
        before = joined(model)
        step(batches, 1e-3)
        after = joined(model)
        found[f"{name} moved"] = sum(not torch.equal(before[n], after[n]) for n in before)
        state = step.optimizer.state_dict()
        found[f"{name} saved"] = {
            f"{number} {key}": (str(value.dtype), tuple(value.shape))
            for number, values in state["state"].items()
            for key, value in values.items()
        }
    return found


def scaled() -> dict[str, Any]:
    """With scaled gradients as float16 has them; one rank's part overflows."""
    case = Case(dtype=torch.float32)
    plain, model = cut(tiny(case)), cut(tiny(case))
    moved(step_for(plain, case), case, range(2))
    step = step_for(model, case, replace(PLAIN, scale_gradients=True))
    moved(step, case, range(2))
    before, scale = joined(model), step.scaler.get_scale()
    gradients = step.gradients

    def broken(batches: list[Batch]) -> Any:
        terms = gradients(batches)
        if dist.rank() == 1:
            next(p for p in step.parameters if p.numel() > 1).grad[0] = float("inf")
        return terms

    step.gradients = broken  # type: ignore[method-assign]
    terms = step(micro_batches(2, dist.rank(), dist.world_size(), case), 1e-3)
    return {
        "plain": joined(plain),
        "scaled": before,
        "skipped": terms.skipped,
        "unmoved": all(torch.equal(v, before[n]) for n, v in joined(model).items()),
        "scales": (scale, step.scaler.get_scale()),
    }


def sizes() -> dict[str, Any]:
    """Numbers that this process keeps, after a step."""
    model = tiny(Case(dtype=torch.float32))
    whole = sum(p.numel() for p in model.parameters())
    step = step_for(cut(model), Case(dtype=torch.float32))
    moved(step, Case(dtype=torch.float32), range(1))
    state = step.optimizer.state.values()
    return {
        "whole": whole,
        "weights": sum(fsdp.part(p).numel() for p in model.parameters()),
        "memory": sum(fsdp.part(p).untyped_storage().nbytes() for p in model.parameters()),
        "gradients": sum(p.grad.numel() for p in step.parameters if p.grad is not None),
        "moments": sum(v.numel() for s in state for v in s.values() if v.ndim),
        "left whole": [n for n, p in model.named_parameters() if not fsdp.is_cut(p)],
    }


def resumed() -> dict[str, Any]:
    """Two steps, saved, two more; and the last two by others from what was saved."""
    case = Case(2, dropout=True)
    model = cut(tiny(case))
    step, average = step_for(model, case), Average(model, 0.9)
    moved(step, case, range(2))
    average.update(1)
    box = [fsdp.state_dict(model), step.optimizer.state_dict(), average.state()]
    box = copy.deepcopy([dist.broadcast_object(part) for part in box])
    moved(step, case, range(2, 4))
    average.update(2)
    found: dict[str, Any] = {"went on": {**joined(model), **averaged(average)}, "saved": box}
    for name, others in (("cut", cut), ("in one piece", lambda model: model)):
        other = tiny(case)
        other.load_state_dict(box[0])
        others(other)
        again, mean = step_for(other, case), Average(other, 0.9)
        load_state(again.optimizer, copy.deepcopy(box[1]))  # torch does not copy all of it
        mean.load_state(box[2])
        moved(again, case, range(2, 4))
        mean.update(2)
        found[name] = {**joined(other), **averaged(mean)}
    return found


def averaged(average: Average) -> dict[str, Tensor]:
    return {f"mean {n}": dist.broadcast_object(v.clone()) for n, v in average.state().items()}


def evaluated() -> dict[str, Any]:
    """Outputs of the whole model, where each process asks another number of times."""
    plain, model = tiny(Case()).eval(), tiny(Case())
    whole = fsdp.Whole(model)
    cut(model)
    empty = sum(p.numel() for p in whole.model.parameters())
    whole.model.eval()
    found = []
    with whole.filled(), torch.inference_mode():
        for number in range(1 + dist.rank()):
            batch = batch_of(number, range(3))
            pairs = (m.encode_image(batch.bags) for m in (plain, whole.model))
            found.append(torch.equal(*pairs))
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                plain.state_dict().values(), whole.model.state_dict().values(), strict=True
            )
        )
    moved(step_for(model, Case()), Case(), range(1))
    with whole.filled():
        weight = whole.model.text.tokens.weight.clone()
    return {
        "empty": (empty, sum(p.numel() for p in whole.model.parameters())),
        "same": same and all(found),
        "tied": whole.model.decoder.vocabulary.weight is whole.model.text.tokens.weight,
        "follows": torch.equal(weight, joined(model)["text.tokens.weight"])
        and not torch.equal(weight, plain.text.tokens.weight),
    }


def work(folder: Path) -> None:
    dist.start("gloo", CPU)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"cases": []}
    for case in CASES:
        model = cut(tiny(case))
        norms = moved(step_for(model, case), case)
        found["cases"].append({**joined(model), "norms": torch.tensor(norms, dtype=torch.float64)})
    found |= {"sizes": sizes(), "resumed": resumed(), "evaluated": evaluated()}
    if dist.world_size() == 2:
        found |= {"models": compared(), "optimizers": optimized()}
        found |= {"16 bits": sixteen_bits(), "scaled": scaled()}
    torch.save(found, folder / f"{dist.rank()}.pt")
    dist.stop()


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start_ranks(__file__, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start_ranks(__file__, tmp_path_factory.mktemp("three"), 3)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float, what: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value.to(found[name].dtype),
            atol=atol,
            rtol=1e-6 if name == "norms" and atol > 1e-9 else 0,
            msg=lambda text, n=name: f"{n}, {what}: {text}",
        )


@pytest.fixture(params=["two", "three"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue(request.param)


pytestmark = pytest.mark.slow


def test_five_steps_are_those_of_one_process_with_one_batch(ranks) -> None:
    for i, case in enumerate(CASES):
        expected = reference(case, len(ranks))
        atol = 1e-10 if case.dtype == torch.float64 else 1e-5
        for rank in ranks:
            close(rank["cases"][i], expected, atol, case)


def test_each_process_keeps_its_part(ranks) -> None:
    world = len(ranks)
    for rank in ranks:
        kept = rank["sizes"]
        assert sorted(kept["left whole"]) == ["log_scale", "prior.gate"]
        # Rows that do not divide are rounded up.
        most = kept["whole"] / world * 1.15
        assert kept["weights"] <= most and kept["gradients"] <= most
        assert kept["moments"] <= 2 * most and kept["memory"] <= 4 * most
    whole, numbers = ranks[0]["sizes"]["whole"], 2
    for name in ("weights", "gradients"):  # every process has the two numbers
        total = sum(rank["sizes"][name] for rank in ranks)
        assert total == whole + numbers * (world - 1), name
    assert sum(rank["sizes"]["moments"] for rank in ranks) == 2 * (whole - numbers)


def test_what_is_saved_is_whole_and_goes_on_cut_or_not(ranks) -> None:
    plain = tiny(Case())
    for rank in ranks:
        weights, optimizer, averages = rank["resumed"]["saved"]
        shapes = {n: t.shape for n, t in plain.state_dict().items()}
        assert {n: t.shape for n, t in weights.items()} == shapes
        assert (
            weights["decoder.vocabulary.weight"].data_ptr()
            == weights["text.tokens.weight"].data_ptr()
        )
        named = dict(plain.named_parameters())
        assert {n: t.shape for n, t in averages.items()} == {n: p.shape for n, p in named.items()}
        for group in optimizer["param_groups"]:
            for number, name in zip(group["params"], group["names"], strict=True):
                assert optimizer["state"][number]["exp_avg"].shape == named[name].shape
        went_on = rank["resumed"]["went on"]
        assert all(torch.equal(rank["resumed"]["cut"][n], v) for n, v in went_on.items())
        close(rank["resumed"]["in one piece"], went_on, 1e-10, "in one piece")


def test_each_process_evaluates_as_often_as_it_likes(ranks) -> None:
    for rank in ranks:
        assert rank["evaluated"] == {"empty": (0, 0), "same": True, "tied": True, "follows": True}


@pytest.mark.parametrize("name", list(MODELS))
def test_other_models_are_as_in_one_piece(two, name: str) -> None:
    if name not in two[0]["models"]:
        pytest.skip("transformers is not installed")
    for rank in two:
        plain, found = rank["models"][name]
        close(found, plain, 1e-10, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_are_as_in_one_piece(two, name: str) -> None:
    if name not in two[0]["optimizers"]:
        pytest.skip("pytorch-optimizer is not installed")
    for rank in two:
        plain, found = rank["optimizers"][name]
        close(found, plain, 1e-10, name)


def test_weights_of_16_bits_are_moved_in_float32(two) -> None:
    for rank in two:
        found = rank["16 bits"]
        assert found["cut"].keys() == found["plain"].keys()
        for name, gradient in found["plain"].items():
            assert found["cut"][name].dtype == torch.float32
            # The sum over processes is rounded to bfloat16 once more, for each micro-batch.
            error = (found["cut"][name] - gradient).abs().max()
            assert error <= 2**-6 * gradient.abs().max(), name
        assert found["cut moved"] == found["plain moved"] > 20
    main = two[0]["16 bits"]
    assert main["cut saved"] == main["plain saved"]
    assert any("master" in key for key in main["cut saved"])


def test_scaled_gradients_and_an_overflow_in_one_part(two) -> None:
    for rank in two:
        found = rank["scaled"]
        close(found["scaled"], found["plain"], 1e-6, "scaled")
        assert found["skipped"] and found["unmoved"]
        assert found["scales"][1] == found["scales"][0] / 2


if __name__ == "__main__":
    work(Path(sys.argv[1]))

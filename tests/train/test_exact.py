"""Steps of 1, 2 and 4 processes, in all four ways of the contrastive gradient, against one process
with the whole batch and plain autograd.

This file is also the program of the processes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_batch import objective, replayed, start_ranks

from slidevlm import dist
from slidevlm.batch import Bags, Batch, Output
from slidevlm.models import CoCa, build_model, zoo
from slidevlm.models.freeze import lock_image
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, sigmoid_term, softmax_term

CPU = torch.device("cpu")
GLOBAL_BATCH, STEPS = 16, 5
WAYS = list(product((False, True), repeat=2))  # local_loss, gather_with_grad


@dataclass(frozen=True)
class Case:
    """One training of five steps."""

    accum: int
    dropout: bool
    frozen: bool
    siglip: bool
    weights: tuple[float, float]
    dtype: torch.dtype
    local_loss: bool = False
    gather_with_grad: bool = False


def cases() -> list[Case]:
    """Every accumulation, dropout and frozen tower, twice; the ways and the losses take turns."""
    found = []
    for i, settings in enumerate(product((1, 2, 4), (False, True), (False, True))):
        weights = ((1.0, 2.0), (1.0, 0.0))[i % 5 == 2]
        for turn in (0, 1):
            way = WAYS[(i + i // 4 + 2 * turn) % 4]
            found.append(Case(*settings, turn == i // 2 % 2, weights, torch.float64, *way))
    for siglip, way in product((False, True), WAYS):
        found.append(Case(2, True, False, siglip, (1.0, 2.0), torch.float32, *way))
    found.append(Case(2, True, False, False, (0.0, 2.0), torch.float64))
    return found


CASES = cases()


def tiny(case: Case) -> CoCa:
    torch.manual_seed(0)
    config = replace(zoo.load("coca_tiny"), tile_width=6)
    config = replace(config, slide=replace(config.slide, blocks=1))
    model = build_model(config, 20, siglip=case.siglip).to(case.dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if case.dropout else 0.0
    with torch.no_grad():  # a new model's residual branches are 0 and would hide mistakes
        for name, parameter in model.named_parameters():
            if name not in ("log_scale", "bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    if case.frozen:
        lock_image(model, 1, freeze_statistics=False)
    return model.train()


def batch_of(step: int, numbers: range, dtype: torch.dtype) -> Batch:
    """Specimens that step and number decide: bags and reports of different lengths, equal ones."""
    draws = [torch.Generator().manual_seed(100 * step + number) for number in numbers]
    bags = [torch.randn(1 + n % 4, 6, generator=g) for n, g in zip(numbers, draws, strict=True)]
    places = [1e4 * torch.rand(len(b), 2, generator=g) for b, g in zip(bags, draws, strict=True)]
    lengths = torch.tensor([3 + n % 3 for n in numbers])
    tokens = torch.stack([torch.randint(3, 20, (6,), generator=g) for g in draws])
    mask = torch.arange(6) < lengths[:, None]
    names = tuple(f"s{n}" for n in numbers)
    return Batch(
        Bags(torch.cat(bags).to(dtype), tuple(len(b) for b in bags), torch.cat(places), None, "um"),
        tokens * mask,
        mask,
        torch.tensor([n % 11 for n in numbers]),  # 0 and 11, 1 and 12, ... on different ranks
        names,
        names,
    )


def micro_batches(step: int, rank: int, world: int, case: Case) -> list[Batch]:
    size = GLOBAL_BATCH // (world * case.accum)
    starts = range(rank * size * case.accum, (rank + 1) * size * case.accum, size)
    return [batch_of(step, range(start, start + size), case.dtype) for start in starts]


def optimizer_for(model: CoCa) -> torch.optim.AdamW:
    # Adam makes of a gradient that is nothing but rounding a whole step, unless epsilon is larger.
    eps = 1e-8 if model.log_scale.dtype == torch.float64 else 1e-5
    return make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.98), eps=eps
    )


def trained(case: Case, rank: int, world: int) -> dict[str, Tensor]:
    """All weights after five steps of `Step` as one of `world` ranks."""
    model = tiny(case)
    wanted = Objective(
        sigmoid_term if case.siglip else softmax_term,
        *case.weights,
        mask_duplicates=True,
        local_loss=case.local_loss,
        gather_with_grad=case.gather_with_grad,
    )
    step = Step(model, optimizer_for(model), wanted, resolve("fp32", CPU), 1.0)
    losses = []
    for number in range(STEPS):
        torch.manual_seed(1000 * number + rank)
        losses.append(step(micro_batches(number, rank, world, case), 1e-3).loss)
    return {**model.state_dict(), "losses": torch.stack(losses)}


def reference(case: Case, world: int) -> dict[str, Tensor]:
    """The same in one process, every graph in memory at once, the objective as it is written down.

    With dropout, each part of the batch drops what the rank that had it dropped; without, the
    batch is in one piece.
    """
    model = tiny(case)
    optimizer = optimizer_for(model)
    losses = []
    for number in range(STEPS):
        if case.dropout:
            outputs, batches = dropped(model, number, case, world)
        else:
            batches = [batch_of(number, range(GLOBAL_BATCH), case.dtype)]
            outputs = [model(batches[0].bags, batches[0].tokens, batches[0].token_mask)]
        loss = objective(case, outputs, batches)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.clamp_scale()
    return {**model.state_dict(), "losses": torch.stack(losses)}


def dropped(model: CoCa, number: int, case: Case, world: int) -> tuple[list[Output], list[Batch]]:
    outputs, batches = [], []
    for rank in range(world):
        torch.manual_seed(1000 * number + rank)
        mine = micro_batches(number, rank, world, case)
        outputs += replayed(model, mine)
        batches += mine
    return outputs, batches


def work(folder: Path) -> None:
    dist.start("gloo", CPU)
    torch.set_num_threads(1)
    rank, world = dist.rank(), dist.world_size()
    results = {i: trained(case, rank, world) for i, case in enumerate(CASES)}
    results["oracles"] = oracles(Path(sys.argv[2])) if world == 2 and len(sys.argv) > 2 else {}
    torch.save(results, folder / f"{rank}.pt")
    dist.stop()


# --- the recorded oracles, of two ranks ------------------------------------------------------


class Recorded(nn.Module):
    """A model whose outputs are its parameters: gradients of outputs become visible."""

    def __init__(self, inputs: dict[str, Tensor], rows: slice, siglip: bool) -> None:
        super().__init__()
        self.image = nn.Parameter(inputs["img"][rows].double())
        self.text = nn.Parameter(inputs["txt"][rows].double())
        self.decoder = nn.Module()
        self.logits = nn.Parameter(inputs["logits"][rows].double())
        scale = inputs["sig_log_scale" if siglip else "log_scale"]
        self.log_scale = nn.Parameter(torch.as_tensor(scale).double())
        self.bias = nn.Parameter(torch.as_tensor(inputs["bias"]).double()) if siglip else None

    def forward(
        self, bags: Bags, tokens: Tensor, mask: Tensor, *, with_logits: bool, only_real: bool
    ) -> Output:
        logits = self.logits[mask[:, 1:]] if with_logits else None
        return Output(self.image, self.text, logits, self.log_scale.exp(), self.bias)


def oracles(file: Path) -> dict[str, Tensor]:
    """This rank's own gradients in all ways: sums over ranks would hide whose they are."""
    inputs = torch.load(file, weights_only=True)["inputs"]
    rows = slice(4 * dist.rank(), 4 * dist.rank() + 4)
    tokens = torch.cat([torch.ones(4, 1, dtype=torch.int64), inputs["labels"][rows]], dim=1)
    mask = torch.cat([torch.ones(4, 1, dtype=torch.bool), inputs["labels"][rows] != 0], dim=1)
    ids = torch.arange(rows.start, rows.stop)
    names = tuple(str(int(i)) for i in ids)
    batch = Batch(Bags(torch.zeros(4, 1), (1,) * 4), tokens, mask, ids, names, names)
    found = {}
    dist.sum_gradients, exchange = (lambda parameters: None), dist.sum_gradients
    for siglip, way in product((False, True), WAYS):
        model = Recorded(inputs, rows, siglip)
        term = sigmoid_term if siglip else softmax_term
        wanted = Objective(term, 1.0, 0.0 if siglip else 2.0, True, *way)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        Step(model, optimizer, wanted, resolve("fp32", CPU), None).gradients([batch])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{siglip}/{way}/{name}"] = parameter.grad
    dist.sum_gradients = exchange
    return found


# --- the tests -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    shared = Path(os.environ.get("SLIDEVLM_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    file = shared / "oracles/losses/losses_ws2.pt"
    more = [str(file)] if file.is_file() else []
    found = {1: [{i: trained(case, 0, 1) for i, case in enumerate(CASES)}]}
    for world in (2, 4):
        found[world] = start_ranks(__file__, tmp_path_factory.mktemp(f"world{world}"), world, *more)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_five_steps_are_those_of_one_process_with_one_batch(
    of_world: dict[int, list[dict]], world: int
) -> None:
    known: dict[object, dict[str, Tensor]] = {}
    for i, case in enumerate(CASES):
        # Without dropout the reference does not depend on how the batch was cut.
        cut = (case.accum, case.dropout) if case.dropout else None
        key = (cut, case.frozen, case.siglip, case.weights, case.dtype)
        if key not in known:
            known[key] = reference(case, world)
        atol = 1e-10 if case.dtype == torch.float64 else 1e-5
        for rank in range(world):
            for name, value in known[key].items():
                torch.testing.assert_close(
                    of_world[world][rank][i][name],
                    value,
                    atol=atol,
                    rtol=0,
                    msg=lambda text, n=name, c=case: f"{n}, {c}: {text}",
                )


@pytest.mark.slow
def test_what_is_compared_has_moved_and_differs(of_world: dict[int, list[dict]]) -> None:
    """A frozen tower stays, the rest moves; dropout and the losses make a difference."""
    for i, case in enumerate(CASES):
        before, after = tiny(case).state_dict(), of_world[2][0][i]
        frozen = [n for n in before if n.startswith("slide.") and torch.equal(before[n], after[n])]
        moved = [n for n in before if not torch.equal(before[n], after[n])]
        assert len(moved) > 20
        assert bool([n for n in frozen if "norm" in n or "weight" in n]) or not case.frozen
    first = {(c.dropout, c.siglip, c.frozen): of_world[2][0][i]["losses"][-1].item()
             for i, c in enumerate(CASES) if c.weights == (1.0, 2.0)}  # fmt: skip
    assert len(set(first.values())) == len(first)


@pytest.mark.slow
def test_recorded_gradients_of_two_ranks_in_all_ways(of_world, shared) -> None:
    truth = torch.load(shared / "oracles/losses/losses_ws1.pt", weights_only=True)["ranks"][0]
    ranks = torch.load(shared / "oracles/losses/losses_ws2.pt", weights_only=True)["ranks"]
    keys = {"image": "g_img", "text": "g_txt", "logits": "g_logits"}
    for siglip, way in product((False, True), WAYS):
        whole = truth["siglip/bidir/chunk=0" if siglip else "coca/local=0/gwg=0"]
        for rank in (0, 1):
            for name in ("image", "text") if siglip else keys:
                mine = of_world[2][rank]["oracles"][f"{siglip}/{way}/{name}"]
                expected = whole[keys[name]][4 * rank : 4 * rank + 4].double()
                torch.testing.assert_close(mine, expected, atol=1e-10, rtol=0)
                # That trainer divides by the number of ranks afterwards.
                theirs = ranks[rank]["siglip/bidir/chunk=0" if siglip else "coca/local=1/gwg=1"]
                if name != "logits":
                    torch.testing.assert_close(
                        mine, theirs[keys[name]].double() / 2, atol=1e-10, rtol=0
                    )
        for name in ("log_scale", "bias") if siglip else ("log_scale",):
            parts = [of_world[2][r]["oracles"][f"{siglip}/{way}/{name}"] for r in (0, 1)]
            expected = torch.as_tensor(whole[f"g_{name}"]).double()
            torch.testing.assert_close(parts[0] + parts[1], expected, atol=1e-10, rtol=0)


@pytest.mark.slow
def test_faults_of_known_trainers_are_absent(of_world, shared) -> None:
    """Each is first shown in the recorded numbers of another trainer, or in its formula."""
    truth = torch.load(shared / "oracles/losses/losses_ws1.pt", weights_only=True)["ranks"][0]
    theirs = torch.load(shared / "oracles/losses/losses_ws2.pt", weights_only=True)["ranks"]
    ours = [of_world[2][rank]["oracles"] for rank in (0, 1)]
    whole = truth["coca/local=0/gwg=0"]["g_img"].double()

    # Features gathered without gradient: half of the truth, or another direction.
    for key, way in (("coca/local=0/gwg=0", (False, False)), ("coca/local=1/gwg=0", (True, False))):
        averaged = torch.cat([r[key]["g_img"].double() for r in theirs]) / 2
        assert (averaged - whole).abs().max() > 1e-3
        found = torch.cat([o[f"False/{way}/image"] for o in ours])
        torch.testing.assert_close(found, whole, atol=1e-10, rtol=0)

    # Under accumulation: the temperature's gradient k times too large, captions likewise, the
    # contrastive term 1/k. Ours is the same for every k (dropout off, one process).
    gradients = {k: temperature_and_captions(k) for k in (1, 2, 4)}
    for k in (2, 4):
        torch.testing.assert_close(gradients[k], gradients[1], atol=1e-10, rtol=0)
    assert (gradients[1].abs() > 1e-4).all()

    # --siglip without effect in CoCa: the oracle's scale and bias get the sigmoid loss's gradient.
    assert all(f"True/{way}/bias" in o for way in WAYS for o in ours)

    # A contrastive weight of 0 stops a distributed run: the last case has it, on 2 and 4 ranks.
    assert CASES[-1].weights[0] == 0
    for world in (2, 4):
        assert torch.isfinite(of_world[world][0][len(CASES) - 1]["losses"]).all()


def temperature_and_captions(k: int) -> Tensor:
    """[3] gradients of log_scale, and norms of those of an image and of a decoder weight."""
    case = Case(k, False, False, False, (1.0, 2.0), torch.float64)
    model = tiny(case)
    wanted = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    step = Step(model, optimizer_for(model), wanted, resolve("fp32", CPU), None)
    step.gradients(micro_batches(0, 0, 1, case))
    decoder = next(p for n, p in model.decoder.named_parameters() if p.ndim > 1)
    tensors = (model.log_scale, model.slide_project.weight, decoder)
    return torch.stack([t.grad.norm() for t in tensors])


if __name__ == "__main__":
    work(Path(sys.argv[1]))

"""Steps of two processes that have unequal numbers of specimens, or none.

This file is also the program of the two processes.
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from whole_batch import start_ranks

from slidevlm import dist
from slidevlm.batch import Bags, Batch
from slidevlm.errors import DataError, TrainingError
from slidevlm.losses import caption_loss_sum, contrastive_loss, siglip_loss
from slidevlm.models import CoCa, create_model
from slidevlm.models.freeze import lock_image, lock_text
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import (
    MAX_SKIPPED_IN_A_ROW,
    Objective,
    Step,
    sigmoid_term,
    softmax_term,
)

CPU = torch.device("cpu")
# Sizes of the micro-batches of rank 0 and of rank 1; weights of the two losses.
UNEQUAL: list[tuple[tuple[tuple[int, ...], ...], tuple[float, float]]] = [
    (((4,), (2,)), (1.0, 2.0)),
    (((4,), ()), (1.0, 2.0)),
    (((), (5,)), (1.0, 2.0)),
    (((2, 1), (3,)), (1.0, 2.0)),
    (((2, 2), (1, 1)), (1.0, 2.0)),
    (((1,), (1, 2)), (1.0, 0.0)),
    (((), (2, 2)), (0.0, 2.0)),
]
# --local-loss and --gather-with-grad, and whether the loss is the sigmoid one.
WAYS = list(product((False, True), repeat=2))
CASES = [(*case, way, siglip) for siglip in (False, True) for way in WAYS for case in UNEQUAL]


def tiny(*, siglip: bool = False) -> CoCa:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tile_width=6, vocab_size=20, siglip=siglip).double()
    with torch.no_grad():  # a new model's residual branches are 0 and would hide mistakes
        for name, parameter in model.named_parameters():
            if name not in ("log_scale", "bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch_of(numbers: range) -> Batch:
    """Specimens that their number decides: bags and reports of different lengths."""
    draws = [torch.Generator().manual_seed(number) for number in numbers]
    bags = [
        torch.randn(1 + n % 4, 6, generator=g, dtype=torch.float64)
        for n, g in zip(numbers, draws, strict=True)
    ]
    places = [1e4 * torch.rand(len(b), 2, generator=g) for b, g in zip(bags, draws, strict=True)]
    lengths = torch.tensor([3 + n % 3 for n in numbers])
    tokens = torch.stack([torch.randint(3, 20, (6,), generator=g) for g in draws])
    mask = torch.arange(6) < lengths[:, None]
    names = tuple(f"s{n}" for n in numbers)
    return Batch(
        Bags(torch.cat(bags), tuple(len(b) for b in bags), torch.cat(places), None, "um"),
        tokens * mask,
        mask,
        torch.tensor([min(n, 4) for n in numbers]),
        names,
        names,
    )  # fmt: skip


def step_for(
    model: CoCa, weights: tuple[float, float], way: tuple[bool, bool] = (False, False)
) -> Step:
    term = softmax_term if model.bias is None else sigmoid_term
    objective = Objective(term, *weights, True, *way)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.98), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve("fp32", CPU), None, ragged=True)


def work(folder: Path) -> None:
    dist.start("gloo", CPU)
    torch.set_num_threads(1)
    rank, results = dist.rank(), {}
    for case, (sizes, weights, way, siglip) in enumerate(CASES):
        first = sum(sizes[0]) if rank else 0
        mine = []
        for size in sizes[rank]:
            mine.append(batch_of(range(first, first + size)))
            first += size
        model = tiny(siglip=siglip)
        terms = step_for(model, weights, way).gradients(mine)
        results[case] = {n: p.grad for n, p in model.named_parameters()}
        results[case]["loss"] = terms.loss
    results["frozen"] = frozen_step([batch_of(range(3 * rank, 3 * rank + 3))])
    results["nothing"] = nothing()
    rows = dist.rows_of(rank * 2, 3 * rank, ragged=True)
    results["rows"] = rows.gather(torch.full((rank * 2, rows.width), float(rank)))
    results["summed"] = rows.scatter_sum(torch.arange(6.0).view(2, 3) * (rank + 1))
    none = dist.rows_of(0, 0, ragged=True)
    results["none"] = tuple(none.gather(torch.zeros(0, none.width)).shape)
    results["made"] = dist.from_main(lambda: f"made by {rank}")
    try:
        dist.from_main(refuse)
    except DataError as error:
        results["refused"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.stop()


def frozen_step(batches: list[Batch]) -> dict[str, Tensor]:
    """All weights after a step with a locked image tower but for its end, and a locked text."""
    model = tiny()
    lock_image(model, 1, freeze_statistics=False)
    lock_text(model, 0, freeze_layer_norm=False)
    step_for(model, (1.0, 2.0))(batches, 1e-2)
    return model.state_dict()


def refuse() -> str:
    assert dist.is_main(), "the others do not try"
    raise DataError("cannot be made")


def nothing() -> dict[str, bool]:
    model = tiny()
    step = step_for(model, (1.0, 2.0))
    step([batch_of(range(3))], 1e-3)  # the optimizer has momentum, which must not move anything
    before = {n: p.clone() for n, p in model.named_parameters()}
    terms = step([], 1e-3)
    found = {
        "skipped": terms.skipped and step.skipped == 1,
        "unmoved": all(torch.equal(p, before[n]) for n, p in model.named_parameters()),
        "gives_up": False,
    }
    try:
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            step([], 1e-3)
    except TrainingError:
        found["gives_up"] = step.skipped == MAX_SKIPPED_IN_A_ROW
    return found


@cache
def reference(count: int, weights: tuple[float, float], siglip: bool) -> dict[str, Tensor | None]:
    """The objective as it is written down, on all specimens together, by plain autograd."""
    model, batch = tiny(siglip=siglip), batch_of(range(count))
    out = model(batch.bags, batch.tokens, batch.token_mask)
    pair, ids = (out.image_embedding, out.text_embedding), batch.report_ids
    if siglip:
        contrastive = siglip_loss(*pair, out.logit_scale, out.logit_bias, ids)
    else:
        contrastive = contrastive_loss(*pair, out.logit_scale, ids)
    caption = caption_loss_sum(out.logits, batch.tokens, batch.token_mask)
    loss = weights[0] * contrastive + weights[1] * caption / batch.token_mask[:, 1:].sum()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return start_ranks(__file__, tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_unequal_ranks_have_the_gradient_of_all_specimens(results: list[dict], case: int) -> None:
    sizes, weights, _, siglip = CASES[case]
    expected = reference(sum(map(sum, sizes)), weights, siglip)
    for rank in (0, 1):
        for name, value in expected.items():
            found = results[rank][case][name]
            # A weight of 0 leaves no gradient in one, and a sum of zeros in the other.
            if value is None or found is None:
                assert (value is None or not value.any()) and (found is None or not found.any())
                continue
            torch.testing.assert_close(found, value, atol=1e-11, rtol=0, msg=name)


def test_a_step_with_frozen_towers_is_that_of_one_process(results: list[dict]) -> None:
    before = tiny().state_dict()
    alone = frozen_step([batch_of(range(6))])
    for rank in (0, 1):
        for name, value in results[rank]["frozen"].items():
            torch.testing.assert_close(value, alone[name], atol=1e-6, rtol=0, msg=name)
            if name.startswith(("slide.", "text.")) and "norm" not in name:
                assert torch.equal(value, before[name]), name
        assert not torch.equal(
            results[rank]["frozen"]["slide_project.weight"], before["slide_project.weight"]
        )


def test_a_step_without_any_specimen_moves_nothing(results: list[dict]) -> None:
    for rank in (0, 1):
        assert results[rank]["nothing"] == {"skipped": True, "unmoved": True, "gives_up": True}


def test_rows_and_what_the_first_makes(results: list[dict]) -> None:
    for rank in (0, 1):
        rows = results[rank]["rows"]
        assert rows.shape == (2, 3) and (rows == 1).all()
        expected = (torch.zeros(0, 3), 3 * torch.arange(6.0).view(2, 3))[rank]
        assert torch.equal(results[rank]["summed"], expected)
        assert results[rank]["none"] == (0, 0)
        assert results[rank]["made"] == "made by 0"
        assert results[rank]["refused"] == "cannot be made"


if __name__ == "__main__":
    work(Path(sys.argv[1]))

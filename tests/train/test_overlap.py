"""Gradients added up during the backward pass: the same as after it, in two real processes.

This file is also the program of the two processes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm import dist
from slidevlm.batch import Bags, Batch
from slidevlm.errors import TrainingError
from slidevlm.models import CoCa, create_model
from slidevlm.models.freeze import lock_image
from slidevlm.precision import resolve
from slidevlm.train import overlap
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

CPU = torch.device("cpu")
STEPS = 2
# Micro-batches a step, whether most of the image tower is frozen, the weights' type.
CASES = [
    (1, False, torch.float64),
    (3, False, torch.float64),
    (2, True, torch.float64),
    (2, False, torch.bfloat16),
]


def tiny(*, frozen: bool, dtype: torch.dtype) -> CoCa:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tile_width=6, vocab_size=20).double()
    assert isinstance(model, CoCa)
    with torch.no_grad():  # a new model's residual branches are 0 and would hide mistakes
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    if frozen:
        lock_image(model, 1, freeze_statistics=False)
    return model.to(dtype).eval()


def batch_of(numbers: range, dtype: torch.dtype) -> Batch:
    draw = torch.Generator().manual_seed(numbers.start)
    bags = [torch.randn(1 + n % 4, 6, generator=draw).to(dtype) for n in numbers]
    tokens = torch.randint(3, 20, (len(numbers), 6), generator=draw)
    mask = torch.arange(6) < torch.tensor([3 + n % 3 for n in numbers])[:, None]
    names = tuple(f"s{n}" for n in numbers)
    places = [1e4 * torch.rand(len(b), 2, generator=draw) for b in bags]
    return Batch(
        Bags(torch.cat(bags), tuple(len(b) for b in bags), torch.cat(places), None, "um"),
        tokens * mask,
        mask,
        torch.tensor(list(numbers)),
        names,
        names,
    )


def step_for(model: CoCa, *, beside: bool) -> Step:
    objective = Objective(softmax_term, 1.0, 2.0, True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.98), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve("fp32", CPU), None, overlap=beside)


def mine(step: int, accum: int, dtype: torch.dtype) -> list[Batch]:
    first = 100 * step + 10 * accum * dist.rank()
    return [batch_of(range(first + 10 * k, first + 10 * k + 2), dtype) for k in range(accum)]


def gradients(case: int, *, beside: bool) -> list[dict[str, Any]]:
    """Of each step, all weights in between moved."""
    accum, frozen, dtype = CASES[case]
    model = tiny(frozen=frozen, dtype=dtype)
    step = step_for(model, beside=beside)
    found = []
    for number in range(STEPS):
        step(mine(number, accum, dtype), 1e-3)
        named = [(n, step.masters.of(p)) for n, p in model.named_parameters()]
        found.append({n: None if p.grad is None else p.grad.clone() for n, p in named})
    return found


def events() -> list[list[str]]:
    """Of three steps, what happened in which order: a gradient was finished, a sum was begun."""
    model = tiny(frozen=False, dtype=torch.float64)
    step, happened = step_for(model, beside=True), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: happened.append("gradient"))
    begin = dist.begin_sum

    def told(tensor: torch.Tensor) -> Any:
        happened.append("sum")
        return begin(tensor)

    dist.begin_sum = told
    steps = []
    for number in range(3):
        happened.clear()
        step(mine(number, 2, torch.float64), 1e-3)
        steps.append(list(happened))
    dist.begin_sum = begin
    return steps


def changed(*, first: bool) -> str:
    """The error of a parameter that loses its gradient on rank 1: in the first step, or after."""
    model = tiny(frozen=False, dtype=torch.float64)
    step = step_for(model, beside=True)
    if not first:
        step(mine(0, 1, torch.float64), 1e-3)
    if dist.rank() == 1:
        dict(model.named_parameters())[NAME].requires_grad_(False)
    try:
        step(mine(1, 1, torch.float64), 1e-3)
    except TrainingError as error:
        return str(error)
    return "no error"


NAME = next(n for n, p in tiny(frozen=False, dtype=torch.float64).named_parameters() if p.ndim == 2)


def work(folder: Path) -> None:
    dist.start("gloo", CPU)
    torch.set_num_threads(1)
    overlap._BUCKET_ELEMENTS = 5_000
    cases = range(len(CASES))
    torch.save(
        {
            "beside": [gradients(case, beside=True) for case in cases],
            "after": [gradients(case, beside=False) for case in cases],
            "events": events(),
            "later": changed(first=False),
            "first": changed(first=True),
        },
        folder / f"{dist.rank()}.pt",
    )
    dist.stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("overlap")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_gradients_are_those_of_the_sum_afterwards(results: list[dict], case: int) -> None:
    for rank in (0, 1):
        beside, after = results[rank]["beside"][case], results[rank]["after"][case]
        assert len(beside) == STEPS
        for mine, other in zip(beside, after, strict=True):
            assert sum(g is not None for g in mine.values()) > 20
            for name, gradient in other.items():
                torch.testing.assert_close(mine[name], gradient, atol=1e-10, rtol=0)


def test_ranks_have_equal_gradients(results: list[dict]) -> None:
    for case in range(len(CASES)):
        for one, other in zip(results[0]["beside"][case], results[1]["beside"][case], strict=True):
            for name, gradient in one.items():
                torch.testing.assert_close(gradient, other[name], atol=0, rtol=0)


def test_sums_begin_during_the_last_backward_pass_once_buckets_are_known(
    results: list[dict],
) -> None:
    for rank in (0, 1):
        first, *later = results[rank]["events"]
        buckets, half = first.count("sum"), first.count("gradient") // 2
        assert buckets > 3
        assert first[-buckets:] == ["sum"] * buckets, "the first pass only learns the order"
        for step in later:
            assert (step.count("sum"), step.count("gradient")) == (buckets, 2 * half)
            assert "sum" not in step[:half], "micro-batches but the last only add up"
            begun = step.index("sum")
            assert step[begun:].count("gradient") > half // 2, "sent while much was to be computed"


def test_a_gradient_that_is_lost_ends_every_rank_with_its_name(results: list[dict]) -> None:
    for rank in (0, 1):
        later, first = results[rank]["later"], results[rank]["first"]
        assert later.startswith(f"--ddp-static-graph: {NAME} got its gradient in another way")
        assert first.startswith(f"--ddp-static-graph: {NAME} got a gradient on some processes")
        assert later.endswith("leave --ddp-static-graph out")


if __name__ == "__main__":
    work(Path(sys.argv[1]))

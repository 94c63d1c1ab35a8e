"""Alone every call does nothing; two real processes exchange what they should."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from slidevlm import dist
from slidevlm.errors import ConfigError

CPU = torch.device("cpu")

# --- one process ----------------------------------------------------------------------------


def test_alone() -> None:
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    value = {"a": [1, 2]}
    assert dist.broadcast_object(value) is value
    assert dist.gather_objects(value) == [value]
    dist.barrier()
    dist.stop()


def test_alone_tensors_are_what_they_were() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    rows = dist.rows_of(2, 3, ragged=False)
    assert (rows.sizes, rows.mine) == ((2,), slice(0, 2))
    gathered = rows.gather(tensor)
    assert torch.equal(rows.scatter_sum(tensor), tensor)
    assert torch.equal(gathered, tensor)
    assert not gathered.requires_grad, "values, not graphs"
    counted = torch.tensor([2.0, 3.0])
    assert dist.sum_(counted) is counted
    assert counted.tolist() == [2.0, 3.0]


def test_alone_gradients_stay_also_those_that_are_missing() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), 3.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dist.sum_gradients(model.parameters())
    dist.broadcast_parameters(model)
    assert torch.equal(model.weight.grad, torch.full((2, 2), 3.0))
    assert model.bias.grad is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_start_without_a_launcher_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    dist.start("nccl", CPU)
    assert dist.world_size() == 1 and dist.local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert dist.local_rank() == 3


def test_half_of_torchruns_variables_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="MASTER_ADDR not; start with torchrun"):
        dist.start("gloo", CPU)


def test_an_unknown_backend_is_refused_also_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="--dist-backend 'mpi' is not one of nccl, gloo"):
        dist.start("mpi", CPU)


# --- two processes --------------------------------------------------------------------------

# Each process runs every call on its own values and saves what it got.
WORKER = """
import logging, sys
import torch
from torch import nn
from slidevlm import dist

heard = []
logging.getLogger("slidevlm.dist").warning = lambda message, *a: heard.append(message % a)
dist.start("nccl", torch.device("cpu"))
rank = dist.rank()
got = {"heard": heard, "rank": rank, "world": dist.world_size(), "main": dist.is_main()}
mine = (torch.arange(6.0).reshape(2, 3) + 10 * rank).requires_grad_()
# Not contiguous, so that memory order cannot stand in for the order of elements.
rows = dist.rows_of(3, 2, ragged=False)
got["gather"] = rows.gather(mine.T)
got["gather_graph"] = got["gather"].requires_grad
weights = torch.arange(12.0).view(6, 2) * (1 + 2 * rank)
(rows.gather_with_gradient(mine.T) * weights).sum().backward()
got["through"] = mine.grad
got["sum"] = dist.sum_(torch.tensor([1.0, 2.0]) + rank)
got["objects"] = dist.gather_objects({"rank": rank, "size": [0] * (1 + 50 * rank)})
got["broadcast"] = dist.broadcast_object({"from": rank} if rank == 0 else None)

torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
with torch.no_grad():
    model[1].running_mean.fill_(rank + 5.0)
    model[1].num_batches_tracked.fill_(rank + 7)
got["before"] = {k: v.clone() for k, v in model.state_dict().items()}
dist.broadcast_parameters(model)
got["after"] = {k: v.clone() for k, v in model.state_dict().items()}

# At most 10 elements a bucket: 4 + 6 | 4 | 12, alone though too large | 2, float64 | 3 + 1.
dist._BUCKET_ELEMENTS = 10
calls = []
reduce = dist.td.all_reduce
def counted(tensor):
    calls.append(tensor.numel())
    return reduce(tensor)
dist.td.all_reduce = counted
shapes = [(4,), (2, 3), (4,), (3, 4), (2,), (3,), ()]
parameters = [
    nn.Parameter(torch.zeros(s, dtype=torch.float64 if i == 4 else torch.float32))
    for i, s in enumerate(shapes)
]
for i, p in enumerate(parameters):
    if i == 5 or (i == 2 and rank == 1) or (i == 6 and rank == 0):
        continue  # 5: no rank has it; 2 and 6: one rank has it
    p.grad = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) + 100 * i + 1000 * rank
if rank == 0:  # laid out the other way round in memory
    parameters[3].grad = parameters[3].grad.T.contiguous().T
dist.sum_gradients(parameters)
dist.td.all_reduce = reduce
got["gradients"] = [None if p.grad is None else p.grad.clone() for p in parameters]
got["calls"] = calls
dist.barrier()
dist.stop()
got["world_after"] = dist.world_size()
torch.save(got, sys.argv[1])
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes got."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(folder / f"{rank}.pt")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_find_each_other(two: list[dict[str, Any]]) -> None:
    assert [g["rank"] for g in two] == [0, 1]
    assert [g["world"] for g in two] == [2, 2]
    assert [g["main"] for g in two] == [True, False]
    assert [g["world_after"] for g in two] == [1, 1]
    told = [sum("needs CUDA; using gloo" in line for line in got["heard"]) for got in two]
    assert told == [1, 0], "once, by the first"


def test_gather_is_in_the_order_of_ranks_without_graph(two: list[dict[str, Any]]) -> None:
    expected = [(torch.arange(6.0).reshape(2, 3) + 10 * rank).T for rank in range(2)]
    for got in two:
        assert not got["gather_graph"]
        assert torch.equal(got["gather"], torch.cat(expected))


def test_gradients_through_a_gather_add_up_at_their_owner(two: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(two):
        mine = torch.arange(12.0).view(6, 2)[3 * rank : 3 * rank + 3]
        assert torch.equal(got["through"], ((1 + 3) * mine).T)


def test_sums_and_objects(two: list[dict[str, Any]]) -> None:
    for got in two:
        assert got["sum"].tolist() == [3.0, 5.0]
        assert [o["rank"] for o in got["objects"]] == [0, 1]
        assert [len(o["size"]) for o in got["objects"]] == [1, 51]
        assert got["broadcast"] == {"from": 0}


def test_all_start_with_rank_0s_parameters_and_buffers(two: list[dict[str, Any]]) -> None:
    first, second = two
    for name, value in first["before"].items():
        assert torch.equal(first["after"][name], value), name
        assert torch.equal(second["after"][name], value), name
    changed = [k for k, v in second["before"].items() if not torch.equal(v, first["before"][k])]
    assert set(changed) >= {"0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"}


def test_gradients_are_summed_over_ranks_in_buckets(two: list[dict[str, Any]]) -> None:
    shapes = [(4,), (2, 3), (4,), (3, 4), (2,), (3,), ()]
    for got in two:
        for i, (gradient, shape) in enumerate(zip(got["gradients"], shapes, strict=True)):
            if i == 5:
                assert gradient is None, "no rank has one, so the optimizer must pass it over"
                continue
            base = torch.arange(float(math.prod(shape))).reshape(shape) + 100 * i
            ranks = {2: [0], 6: [1]}.get(i, [0, 1])
            expected = sum(base + 1000 * rank for rank in ranks)
            assert gradient.shape == expected.shape, i
            torch.testing.assert_close(gradient.float(), expected.float(), rtol=0, atol=0)
        assert got["gradients"][4].dtype == torch.float64
        # Elements and one count a parameter: 4 + 6 | 4 | 12 | 2 | 3 + 1.
        assert got["calls"] == [12, 5, 13, 3, 6]


def test_synchronised_batch_norm_needs_one_and_cuda() -> None:
    with pytest.raises(ConfigError, match="has no BatchNorm"):
        dist.synchronise_batch_norm(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="for CUDA alone"):
        dist.synchronise_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))

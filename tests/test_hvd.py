"""Horovod in torch.distributed's place: two processes of horovodrun, where it is installed.

This file is also the program of the two processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slidevlm import dist, testing
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments

FLAGS = {a.name: a.flag for a in arguments()}
VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "HOROVOD_RANK", "HOROVOD_SIZE")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_horovod_the_error_says_what_to_install(alone: pytest.MonkeyPatch) -> None:
    alone.setitem(sys.modules, "horovod", None)
    alone.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(ConfigError, match=r"slidevlm\[horovod\].*scripts/build_horovod.sh"):
        dist.start_horovod()
    assert dist.world_size() == 1


def test_torchruns_variables_are_refused(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("RANK", "0")
    alone.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK or WORLD_SIZE are set; start with horovodrun"):
        dist.start_horovod()


def test_horovodrun_needs_the_argument(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("HOROVOD_RANK", "0")
    alone.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(ConfigError, match="started by horovodrun, without --horovod"):
        dist.start("gloo", torch.device("cpu"))


# --- two processes --------------------------------------------------------------------------


def exchanged() -> dict[str, Any]:
    rank = dist.rank()
    rows = dist.rows_of(1 + 2 * rank, 2, ragged=True)
    mine = (torch.arange(2.0 + 4 * rank).reshape(-1, 2) + 10 * rank).requires_grad_()
    got: dict[str, Any] = {"rank": rank, "world": dist.world_size(), "main": dist.is_main()}
    got["gather"] = rows.gather(mine)
    got["flags"] = rows.gather(torch.tensor([rank == 1] * (1 + 2 * rank)))
    (rows.gather_with_gradient(mine) * torch.arange(8.0).view(4, 2) * (1 + rank)).sum().backward()
    got["through"] = mine.grad
    got["sum"] = dist.sum_(torch.tensor([1.0, 2.0], dtype=torch.bfloat16) + rank)
    got["any"] = dist.any_([rank == 0, rank == 1, False])
    got["objects"] = dist.gather_objects({"rank": rank, "size": [0] * (1 + 50 * rank)})
    got["broadcast"] = dist.broadcast_object({"from": rank} if rank == 0 else None)
    linear, norm = nn.Linear(3, 2).bfloat16(), nn.BatchNorm1d(2)
    model = nn.Sequential(linear, norm)
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        linear.weight.fill_(rank + 0.5)
        norm.num_batches_tracked.fill_(rank + 7)
    dist.broadcast_parameters(model)
    got["model"] = dict(model.state_dict())
    parameters = [nn.Parameter(torch.zeros(3, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 1.0 + rank).T
    if rank == 0:
        parameters[1].grad = torch.full((3, 2), 5.0)
    dist.sum_gradients(parameters)
    got["gradients"] = [p.grad for p in parameters]
    begun = torch.full((3,), 1.0 + rank)
    dist.begin_sum(begun)()
    got["begun"] = begun
    dist.barrier()
    return got


def run(command: list[str], launcher: list[str]) -> None:
    result = subprocess.run(
        [*launcher, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


HOROVODRUN = [sys.executable, "-m", "horovod.runner.launch", "-np", "2", "--gloo", sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="needs Horovod: scripts/build_horovod.sh"
)


@needs_horovod
def test_everything_is_exchanged(tmp_path: Path) -> None:
    run([__file__, str(tmp_path)], HOROVODRUN)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, got in enumerate(two):
        assert (got["rank"], got["world"], got["main"]) == (rank, 2, rank == 0)
        expected = torch.tensor([[0.0, 1], [10, 11], [12, 13], [14, 15]])
        assert torch.equal(got["gather"], expected)
        assert got["flags"].tolist() == [False, True, True, True]
        mine = (slice(0, 1), slice(1, 4))[rank]
        assert torch.equal(got["through"], 3 * torch.arange(8.0).view(4, 2)[mine])
        assert got["sum"].tolist() == [3.0, 5.0] and got["sum"].dtype == torch.bfloat16
        assert got["any"] == [True, True, False]
        assert [o["rank"] for o in got["objects"]] == [0, 1] and len(
            got["objects"][1]["size"]
        ) == 51
        assert got["broadcast"] == {"from": 0}
        assert (got["model"]["0.weight"] == 0.5).all()
        assert got["model"]["1.num_batches_tracked"] == 7
        assert (got["gradients"][0] == 3).all() and got["gradients"][0].shape == (3, 2)
        assert (got["gradients"][1] == 5).all() and got["gradients"][2] is None
        assert got["begun"].tolist() == [3.0] * 3


@needs_horovod
@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["after", "beside"])
def test_a_training_has_the_weights_of_torchruns(tmp_path: Path, beside: bool) -> None:
    settings = {**testing.settings(tmp_path), "accum_freq": 2, "batch_size": 2, "epochs": 2}
    settings["log_every_n_steps"] = 1
    losses = {}
    for name, launcher in (("torch", [*TORCHRUN, "-m", "--"]), ("horovod", [*HOROVODRUN, "-m"])):
        words = ["slidevlm", "train", FLAGS["name"], name]
        for key, value in settings.items():
            words += [FLAGS[key], str(value)]
        words += [FLAGS["horovod"]] if name == "horovod" else []
        run(words + [FLAGS["ddp_static_graph"]] * beside, launcher)
        lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [x["loss"] for x in map(json.loads, lines) if x["kind"] == "train"]
    assert len(losses["torch"]) > 1 and losses["torch"] == losses["horovod"]
    files = [tmp_path / "logs" / n / "checkpoints" / "epoch_2.pt" for n in losses]
    from slidevlm.train import checkpoint

    one, other = (checkpoint.load(file)[0].weights for file in files)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


if __name__ == "__main__":
    dist.start_horovod()
    torch.save(exchanged(), Path(sys.argv[1]) / f"{dist.rank()}.pt")
    dist.stop()

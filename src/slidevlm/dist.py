"""Everything that needs several processes; in one process every function is the identity.

The contrastive loss needs the embeddings of all ranks, but not their graphs: each rank learns the
gradient of the global loss with respect to its own embeddings (train/contrast.py says how) and
sends that through its own graph. Summed over ranks the gradients of the parameters are then
exactly those of one process with the whole batch.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from slidevlm import hvd, launch
from slidevlm.errors import ConfigError, SlideVLMError

log = logging.getLogger("slidevlm.dist")
T = TypeVar("T")

# The name that torch 2.13 prefers, and the one that versions before it have.
_reduce_scatter: Any = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor

_horovod: hvd.Horovod | None = None  # in torch.distributed's place, with --horovod

_AGENT_SECONDS = 30.0  # torchrun's store is there at once, but a network may fail for a while
_BUCKET_ELEMENTS = 8 * 1024 * 1024  # 32 MB of float32: few messages, little extra memory


def start(
    backend: str, device: torch.device, url: str = "env://", timeout_minutes: float = 10.0
) -> None:
    """Join the other processes, where torchrun, Slurm or the environment says there are any.

    Raises:
        ConfigError: an unknown backend or URL, or only a part of the variables.
    """
    if backend not in ("nccl", "gloo"):
        raise ConfigError(f"--dist-backend {backend!r} is not one of nccl, gloo")
    place = launch.place_of(os.environ, url)
    if place is None and int(os.environ.get("HOROVOD_SIZE", "1")) > 1:
        raise ConfigError("started by horovodrun, without --horovod: give it, or use torchrun")
    if place is None or td.is_initialized():
        return
    if backend == "nccl" and device.type != "cuda":
        if place.rank == 0:
            log.warning("--dist-backend nccl needs CUDA; using gloo")
        backend = "gloo"
    launch.check_meeting_file(place.url, 60 * timeout_minutes, time.time())
    launch.check_agent_store(os.environ, place.url, _AGENT_SECONDS)
    if place.started_by == "Slurm" and place.rank == 0:
        log.info("Slurm: waiting at %s for %d processes", place.url, place.world_size)
    try:
        timeout = timedelta(minutes=timeout_minutes)
        store, _, _ = next(td.rendezvous(place.url, place.rank, place.world_size, timeout=timeout))
        store.set_timeout(timeout)
        # Started anew by torchrun at the same store, processes must not read the addresses of
        # those that went before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        td.init_process_group(
            backend,
            store=td.PrefixStore(f"attempt_{attempt}", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
    except (td.DistError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {place.rank} of {place.world_size} did not meet the others at {place.url} "
            f"({' '.join(str(error).split())[:200]}); are all of them started (with srun or "
            "torchrun), and is the address free and within reach?"
        ) from error


def start_horovod() -> None:
    """Join the other processes of horovodrun, in torch.distributed's place.

    Raises:
        ConfigError: Horovod is not there, or another launcher has started several processes.
    """
    global _horovod
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "--horovod, and torchrun's RANK or WORLD_SIZE are set; start with horovodrun alone, or "
            "leave --horovod out"
        )
    _horovod = hvd.Horovod()
    if _horovod.size == 1 and launch.place_of(os.environ) is not None:
        stop()
        raise ConfigError(
            "--horovod: Slurm has started several processes, of which Horovod knows nothing; start "
            "with horovodrun, or leave --horovod out"
        )
    if _horovod.size == 1:
        log.info("--horovod does nothing: this is one process; start several with horovodrun")


def private_store() -> Any | None:
    """A connection of its own to the store where the processes met, with keys of this start alone.

    None for a process of its own, and under Horovod, which ends all where one fails. A collective
    call.
    """
    if world_size() == 1 or _horovod is not None:
        return None
    # torchrun may start processes anew at the same store.
    start_of_all = broadcast_object(uuid.uuid4().hex)
    store: Any = td.distributed_c10d._get_default_store()
    return td.PrefixStore(f"slidevlm/{start_of_all}", store.clone())


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective has failed because another process is gone."""
    if isinstance(error, td.DistError):
        return True
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    return type(error) is RuntimeError and any(sign in str(error) for sign in signs)


def stop() -> None:
    """Leave the group; harmless where there is none."""
    global _horovod
    if _horovod is not None:
        _horovod.stop()
        _horovod = None
    if td.is_initialized():
        td.destroy_process_group()


class Region:
    """Notes that the main thread is within some part of the program. Not to be nested."""

    def __init__(self) -> None:
        self.mark = 0  # grows at every entry and exit

    @staticmethod
    def within(mark: int) -> bool:
        """Whether this mark was made at an entry."""
        return mark % 2 == 1

    def __enter__(self) -> None:
        self.mark += 1

    def __exit__(self, *_: object) -> None:
        self.mark += 1


class Alone(Region):
    """What waits for no other process and no device.

    There alone a process that stands still can be told from one that waits for another by itself
    (train/idle.py).
    """

    def each(self, values: Iterable[T]) -> Iterator[T]:
        """The same values, each fetched within."""
        with self:
            iterator = iter(values)
        while True:
            with self:
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value
            del value  # or a batch would stay in memory while the next one is read


alone = Alone()
stepping = Region()  # a step or a save, in which processes may wait for each other


def collectives() -> int:
    """How many collectives this process has begun; of two that wait, the earlier has fewer."""
    if _horovod is not None or not td.is_initialized():
        return 0
    group: Any = td.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())


def rank() -> int:
    """Number of this process, 0 when alone."""
    if _horovod is not None:
        return _horovod.rank
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    if _horovod is not None:
        return _horovod.size
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine."""
    names = ("LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID")
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def is_main() -> bool:
    """Whether this process writes the run folder."""
    return rank() == 0


def is_main_of_environment() -> bool:
    """The same after the group was left, by what torchrun or Slurm says."""
    for name in ("RANK", "HOROVOD_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return True


def barrier() -> None:
    """Wait for all."""
    if _horovod is not None:
        _horovod.barrier()
    elif td.is_initialized():
        td.barrier()


@dataclass(frozen=True)
class Rows:
    """Whose rows of the global batch are which: those of rank 0 come first."""

    sizes: tuple[int, ...]  # rows of each rank
    width: int  # E of the embeddings, also on a rank that has none

    @property
    def total(self) -> int:
        """N."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """Place of this rank's first row."""
        return sum(self.sizes[: rank()])

    @property
    def mine(self) -> slice:
        """Place of this rank's rows."""
        return slice(self.first, self.first + self.sizes[rank()])

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of each rank -> [N, ...], without graph."""
        mine = tensor.detach()
        if len(self.sizes) == 1:
            return mine
        most = max(self.sizes)
        if most == 0:
            return mine
        if _horovod is not None:
            return _horovod.gather(mine)
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        everyone = mine.new_empty(most * len(self.sizes), *mine.shape[1:])
        td.all_gather(list(everyone.split(most)), mine.contiguous())
        if min(self.sizes) == most:
            return everyone
        parts = everyone.split(most)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def gather_with_gradient(self, tensor: Tensor) -> Tensor:
        """The same with its graph: a row's gradients of all ranks add up at the row's owner."""
        return cast(Tensor, _Gather.apply(tensor, self))

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        """[N, ...] on each rank -> the sum over ranks of this rank's rows, [n, ...]."""
        if len(self.sizes) == 1:
            return tensor
        if _horovod is not None:  # it has no sum that leaves each rank its part
            return sum_(tensor.contiguous().clone())[self.mine]
        most = max(self.sizes)
        if min(self.sizes) < most:
            padded = tensor.new_zeros(len(self.sizes), most, *tensor.shape[1:])
            for place, part in zip(padded, tensor.split(self.sizes), strict=True):
                place[: len(part)] = part
            tensor = padded.flatten(0, 1)
        mine = tensor.new_empty(most, *tensor.shape[1:])
        _reduce_scatter(mine, tensor.contiguous())
        return mine[: self.sizes[rank()]]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.gather(tensor).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.scatter_sum(gradients[0]), None


def rows_of(count: int, width: int, *, ragged: bool) -> Rows:
    """The ranks' shares of a step. Only `ragged` ones need to tell each other.

    Args:
        count: this rank's rows.
        width: of its embeddings; 0 on a rank that has no row and cannot know.
        ragged: whether ranks may have unequal numbers of rows.
    """
    if not ragged:
        return Rows((count,) * world_size(), width)
    told = gather_objects((count, width))
    return Rows(tuple(n for n, _ in told), max(w for _, w in told))


def from_main(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; where it fails, every rank raises its error."""
    made: tuple[T | None, SlideVLMError | None] = (None, None)
    if is_main():
        try:
            made = (make(), None)
        except SlideVLMError as error:
            made = (None, error)
    value, problem = broadcast_object(made)
    if problem is not None:
        raise problem
    return cast("T", value)


def gather_objects(value: T) -> list[T]:
    """Picklable values of all ranks, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    if _horovod is not None:
        return _horovod.gather_objects(value)
    parts: list[Any] = [None] * world_size()
    td.all_gather_object(parts, value)
    return parts


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    if _horovod is not None:
        return cast(T, _horovod.broadcast_object(value))
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if _horovod is not None:
        _horovod.sum_(tensor)
    elif world_size() > 1:
        td.all_reduce(tensor)
    return tensor


def begin_sum(tensor: Tensor) -> Callable[[], object]:
    """Begin to sum over ranks, in place.

    Returns:
        What waits for the end; until then the tensor is not to be touched.
    """
    if _horovod is not None:
        return _horovod.begin_sum(tensor)
    work: td.Work = td.all_reduce(tensor, async_op=True)
    return work.wait


def any_(flags: Sequence[bool]) -> list[bool]:
    """Of each flag, whether any rank has set it; the same on every rank."""
    if world_size() == 1:
        return list(flags)
    if _horovod is not None:
        most = _horovod.most(torch.tensor(flags, dtype=torch.int32))
        return [bool(flag) for flag in most.tolist()]
    on_device = td.get_backend() == "nccl"
    tensor = torch.tensor(flags, dtype=torch.int32, device="cuda" if on_device else "cpu")
    td.all_reduce(tensor, op=td.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up every parameter's gradient over ranks, in place, in large buckets.

    A gradient that a rank lacks counts as zeros, so that ranks never wait for each other. One
    that all lack stays None: the optimizer then passes over the parameter, as in one process.
    """
    if world_size() == 1:
        return
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (
            size + parameter.numel() > _BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype
        ):
            _sum_bucket(bucket)
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(parameters: list[torch.nn.Parameter]) -> None:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # How many ranks have each gradient travels with the gradients.
    have = gradients[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([*(g.reshape(-1) for g in gradients), have])
    sum_(flat)
    *parts, have = flat.split([*(g.numel() for g in gradients), len(have)])
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        # Looked at only where this rank has none: reading it waits for the device.
        if parameter.grad is not None or have[i] > 0:
            parameter.grad = gradient.copy_(parts[i].view_as(gradient))


def broadcast_parameters(module: torch.nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank, so that all start equal."""
    if world_size() == 1:
        return
    for tensor in module.state_dict().values():
        if _horovod is not None:
            _horovod.broadcast_(tensor)
        else:
            td.broadcast(tensor, src=0)


def synchronise_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
    """BatchNorm layers whose statistics are of the batches of all ranks, on CUDA.

    Raises:
        ConfigError: there is no BatchNorm, or the device is one for which torch has no such kernel.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        raise ConfigError("--use-bn-sync: the model has no BatchNorm; leave it out")
    if any(p.device.type != "cuda" for p in module.parameters()):
        raise ConfigError("--use-bn-sync: torch's SyncBatchNorm is for CUDA alone; leave it out")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)

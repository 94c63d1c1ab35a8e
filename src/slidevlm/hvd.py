"""Horovod in torch.distributed's place: what dist.py needs of it, for any type of tensor.

Horovod knows neither bfloat16 nor booleans. What is only passed on travels as bytes, exactly; sums
of bfloat16 are made in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slidevlm.errors import ConfigError


class Horovod:
    """This process among those that horovodrun has started.

    Raises:
        ConfigError: Horovod is not there, or cannot start.
    """

    def __init__(self) -> None:
        try:
            import horovod.torch as horovod
        except ImportError as error:
            raise ConfigError(
                "--horovod needs the extra: pip install 'slidevlm[horovod]', or, where that does "
                f"not build with this torch, scripts/build_horovod.sh PYTHON ({error})"
            ) from error
        try:
            horovod.init()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--horovod: Horovod cannot start ({error}); start with horovodrun"
            ) from error
        self._horovod: Any = horovod
        self.rank: int = horovod.rank()
        self.size: int = horovod.size()

    def stop(self) -> None:
        """Leave the group."""
        self._horovod.shutdown()

    def barrier(self) -> None:
        """Wait for all."""
        self._horovod.barrier()

    def sum_(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        self.begin_sum(tensor)()

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum over ranks, in place; what it returns waits for the end."""
        sent = tensor.detach().contiguous()
        if sent.dtype == torch.bfloat16:
            sent = sent.float()
        handle = self._horovod.allreduce_async_(sent, op=self._horovod.Sum)

        def wait() -> None:
            self._horovod.synchronize(handle)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

        return wait

    def most(self, tensor: Tensor) -> Tensor:
        """Of each element, the greatest of all ranks."""
        most: Tensor = self._horovod.allreduce(tensor, op=self._horovod.Max)
        return most

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of each rank -> [N, ...]; the ranks may have unequal n."""
        parts: Tensor = self._horovod.allgather(_bytes(tensor)).view(tensor.dtype)
        return parts.view(-1, *tensor.shape[1:])

    def broadcast_(self, tensor: Tensor) -> None:
        """Rank 0's values on every rank, in place."""
        if not tensor.numel():
            return
        sent = self._horovod.broadcast(_bytes(tensor), root_rank=0)
        tensor.detach().copy_(sent.view(tensor.dtype).view(tensor.shape))

    def gather_objects(self, value: Any) -> list[Any]:
        """Picklable values of all ranks, in the order of ranks."""
        return list(self._horovod.allgather_object(value, name="objects"))

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        # Its own name would be that of the value's type, which ranks need not share: they'd wait.
        return self._horovod.broadcast_object(value, root_rank=0, name="object")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

"""Which specimens make up which batch, on which rank; and numbers that depend on names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from slidevlm.errors import ConfigError


def generator(*parts: int | str) -> np.random.Generator:
    """A generator fixed by `parts` alone: the same in every process, worker and order of use."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, index) for one rank.

    The epoch's order is a permutation of `range(n)` by (seed, epoch), cut into global
    micro-batches of `world_size * batch_size`, of which rank r takes its r-th slice. So a step's
    `accum_freq` micro-batches of all ranks together are what one process with a batch
    `accum_freq * world_size` times as large would take. The last incomplete step is dropped.

    The epoch goes with each index because persistent workers never see the parent's variables.

    ConfigError when not even one step can be made.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accum_freq: int = 1,
    ) -> None:
        step = batch_size * world_size * accum_freq
        if n < step:
            largest = n // (world_size * accum_freq)
            remedy = (
                f"lower --batch-size to at most {largest}"
                if largest
                else "lower --accum-freq or use fewer processes"
            )
            raise ConfigError(
                f"{n} training specimens do not fill one step of {step} (--batch-size {batch_size} "
                f"x {world_size} process(es) x --accum-freq {accum_freq}); {remedy}"
            )
        assert 0 <= rank < world_size, (rank, world_size)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0
        self._count = n // step * accum_freq

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the micro-batch to go on from after a resume."""
        assert 0 <= start_batch <= self._count, (start_batch, self._count)
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Micro-batches of this rank in a whole epoch, whatever `start_batch`."""
        return self._count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = generator("order", self.seed, epoch).permutation(self.n)
        for batch in range(self.start_batch, self._count):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


class EvalBatches(Sampler[list[int]]):
    """Batches of indices in order; rank r gets r, r + W, ...: each index once, no padding.

    Ranks may differ by one batch, and a rank without specimens yields nothing.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size and batch_size > 0, (rank, world_size, batch_size)
        self.indices = list(range(rank, n, world_size))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size]

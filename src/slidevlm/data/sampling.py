"""Which specimens make up which batch, on which rank; and numbers that depend on names alone."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from slidevlm.errors import ConfigError

SIMILAR_STEPS = 16  # enough to tell small bags from large, few enough to mix over the epochs


def generator(*parts: int | str) -> np.random.Generator:
    """A generator fixed by `parts` alone: the same in every process, worker and order of use."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, index) for one rank.

    The epoch's order is a permutation of `range(n)` by (seed, epoch), cut into steps of
    `batch_size * world_size * accum_freq` specimens. The last incomplete step is dropped. Which
    specimens make up a step depends on its size alone, however many processes share it, so any
    number of them takes the steps of one process with a larger batch.

    Without `lengths` a step is cut into micro-batches in order: the m-th of rank r has the place
    `m * world_size + r`.

    With `lengths` a step is parted into micro-batches of equal numbers of specimens and nearly
    equal numbers of tiles (the longest first, each to the lightest micro-batch with room). The
    loss is that of the whole step, so this changes nothing of what is learned; it keeps ranks from
    waiting for one that happens to have all the large bags, and the memory of that one low.

    `similar=True` also makes up the steps themselves of bags of similar length: within every
    `SIMILAR_STEPS` steps' worth of the permutation, specimens are sorted by length, and the order
    of all steps is drawn anew.

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
        *,
        lengths: np.ndarray | None = None,
        similar: bool = False,
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
        assert lengths is None or len(lengths) == n, "one length a specimen"
        assert lengths is not None or not similar, "similar lengths need lengths"
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accum_freq = accum_freq
        self.lengths = lengths
        self.similar = similar
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
        steps = self.steps(epoch)
        for batch in range(self.start_batch, self._count):
            step, micro = divmod(batch, self.accum_freq)
            place = micro * self.world_size + self.rank
            yield [(epoch, int(index)) for index in self._parts(steps[step])[place]]

    def lengths_id(self) -> int:
        """A number that differs where the make-up of the steps does by the lengths; 0: it is not
        made by them."""
        if not self.similar or self.lengths is None:
            return 0
        digest = hashlib.blake2b(self.lengths.astype("<i8").tobytes(), digest_size=6).digest()
        return int.from_bytes(digest, "little") or 1

    def steps(self, epoch: int) -> np.ndarray:
        """The epoch's specimens [steps, specimens of a step], in the order they are trained on."""
        size = self.batch_size * self.world_size * self.accum_freq
        count = self.n // size
        order = generator("order", self.seed, epoch).permutation(self.n)[: count * size]
        if not self.similar:
            return order.reshape(count, size)
        assert self.lengths is not None
        for start in range(0, count * size, SIMILAR_STEPS * size):
            window = order[start : start + SIMILAR_STEPS * size]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        shuffled = generator("steps", self.seed, epoch).permutation(count)
        return order.reshape(count, size)[shuffled]

    def _parts(self, step: np.ndarray) -> np.ndarray:
        """[specimens of a step] -> [micro-batches of all ranks, batch size]."""
        parts = len(step) // self.batch_size
        if self.lengths is None or parts == 1:
            return step.reshape(parts, self.batch_size)
        return step[balanced(self.lengths[step], parts)]


def balanced(lengths: np.ndarray, parts: int) -> np.ndarray:
    """Part items into groups of equal number and nearly equal total length.

    Longest first, each to the group with the smallest total that has room (Graham, 1969).

    Args:
        lengths: [N], N a multiple of `parts`.
        parts: number of groups.

    Returns:
        [parts, N / parts] indices of the items; ties go by index, so the result is unique.
    """
    size = len(lengths) // parts
    groups: list[list[int]] = [[] for _ in range(parts)]
    room = [(0, group) for group in range(parts)]  # a heap of (total length, group)
    for item in np.argsort(-lengths, kind="stable").tolist():
        total, group = heapq.heappop(room)
        groups[group].append(item)
        if len(groups[group]) < size:
            heapq.heappush(room, (total + int(lengths[item]), group))
    return np.array(groups)


class EvalBatches(Sampler[list[int]]):
    """Batches of indices in order; rank r gets batches r, r + W, ...: each index once, no padding.

    The batches are the same for any number of ranks, so that rounding, which depends on a batch's
    composition, is too. Ranks may differ by one batch, and one without specimens yields nothing.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size and batch_size > 0, (rank, world_size, batch_size)
        self.starts = range(rank * batch_size, n, world_size * batch_size)
        self.n, self.batch_size = n, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.n)))

"""Tiles as encoders read them, some rows at a time: standardised, normalised, summed up.

Each bag is read once, and no copy of it is made. On a CPU that is one compiled pass with numba
(`models/tile_kernels.py`), for which torch needs a dozen; the numbers are the same to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm.models import jit
from slidevlm.models.graphs import outside_autograd
from slidevlm.models.pieces import share
from slidevlm.models.ragged import bags_of
from slidevlm.precision import wide

# Of rows in float32: on a CPU what is made of them stays in its cache, and in memory that the
# process has (a tensor of 20 MB is new pages each time, which cost as much as what it holds);
# elsewhere a call costs more than what lies in between.
BYTES_AT_ONCE = {"cpu": 1 << 21}
BYTES_ELSEWHERE = 1 << 25
LEAST = 1 << 21  # numbers; of fewer it is not worth a second in which numba starts

# Mean and deviation [D] by which features are standardised.
Standard = tuple[Tensor, Tensor]


def are_data(features: Tensor) -> bool:
    """Whether tiles need no gradient, and may be taken some rows at a time."""
    return not features.requires_grad and not outside_autograd()


def rows_of(features: Tensor) -> tuple[Tensor, ...]:
    """Some rows of [T, D] after the other."""
    most = BYTES_AT_ONCE.get(features.device.type, BYTES_ELSEWHERE)
    return features.split(max(1, most // (4 * max(1, features.shape[1]))))


def standardised(features: Tensor, standard: Standard | None) -> Tensor:
    """`(features - mean) / deviation` [n, D], in float32 or wider; without `standard` the same."""
    rows = wide(features)
    if standard is None:
        return rows
    mean, deviation = standard
    return (rows - mean).div_(deviation)


def normalised_rows(
    features: Tensor, eps: float, dtype: torch.dtype, standard: Standard | None = None
) -> Iterator[Tensor]:
    """Layer-normalised rows [n, D], without affine part, one piece of the tiles after the other.

    A piece is good until the next one is asked for.

    Args:
        features: [T, D] of any float type, without gradient.
        eps: of the layer norm.
        dtype: of what comes; it is computed in float32 or wider.
        standard: by which the features are standardised before the norm.
    """
    compiled = _Pass.of(features, standard, dtype)
    parts = rows_of(features)
    if compiled is None:
        for some in parts:
            yield _normalised(standardised(some, standard), eps, dtype)
        return
    together = torch.get_num_threads()
    shape, nothing = parts[0].shape, compiled.nothing
    memory = [torch.empty(shape, dtype=torch.float32, device="cpu") for _ in parts[:together]]
    for begin in range(0, len(parts), together):
        here = parts[begin : begin + together]
        rows = [one[: len(some)] for one, some in zip(memory, here, strict=False)]

        def work(number: int, here: Any = here, rows: Any = rows) -> None:
            compiled.normalise(here[number], eps, rows[number], nothing)

        share(work, len(rows))
        for one in rows:
            yield one.to(dtype)


def use_normalised(
    use: Callable[[int, Tensor], None],
    features: Tensor,
    eps: float,
    dtype: torch.dtype,
    standard: Standard | None = None,
    moments: Moments | None = None,
) -> None:
    """Give the same to a function, which gets the number of their first row and some rows.

    On a CPU several threads may call it at once, for different rows, and without gradients.

    Args:
        use: the function.
        features: [T, D] of any float type, without gradient.
        eps: of the layer norm.
        dtype: of what it gets.
        standard: by which the features are standardised before the norm.
        moments: gets to know the rows before the norm.
    """
    compiled = _Pass.of(features, standard, dtype)
    if compiled is None:
        begin = 0
        for some in rows_of(features):
            rows = standardised(some, standard)
            if moments is not None:
                moments.add(rows)
            use(begin, _normalised(rows, eps, dtype))
            begin += len(rows)
        return
    lengths = (len(features),) if moments is None else moments.lengths
    parts = [rows for bag in bags_of(features, lengths) for rows in rows_of(bag)]
    begins = [0, *accumulate(len(rows) for rows in parts)]
    found, nothing = compiled.no_moments(0 if moments is None else len(parts)), compiled.nothing
    pieces = _pieces(begins, len(rows_of(features)[0]))

    def work(number: int) -> None:
        piece = pieces[number]
        first, last = begins[piece.start], begins[piece.stop]
        rows = _memory(last - first, features.shape[1])
        for part in piece:
            of_part = rows[begins[part] - first : begins[part + 1] - first]
            compiled.normalise(parts[part], eps, of_part, found[part] if len(found) else nothing)
        use(first, rows.to(dtype))

    share(work, len(pieces))
    if moments is not None:
        moments.join_all([len(some) for some in parts], found)


def moments_of(features: Tensor, lengths: tuple[int, ...], standard: Standard) -> Tensor:
    """Mean and deviation of each bag's standardised tiles: [T, D] -> [B, 2 D].

    Bag by bag: those of one depend on the others by no more than whether all are `LEAST` numbers.
    """
    moments = Moments(lengths)
    compiled = _Pass.of(features, standard, torch.float32)
    parts = [rows for bag in bags_of(features, lengths) for rows in rows_of(bag)]
    if compiled is None:
        for some in parts:
            moments.add(standardised(some, standard))
        return moments.found()
    found = compiled.no_moments(len(parts))
    share(lambda number: compiled.see(parts[number], found[number]), len(parts))
    moments.join_all([len(some) for some in parts], found)
    return moments.found()


class Moments:
    """Mean and standard deviation of each bag, from rows that come some at a time.

    The squares are those of distances to the mean of the rows that came together; what such parts
    hold is joined as Chan et al. (1979) do, and loses no digits where a mean is large.

    Args:
        lengths: rows of each bag, one or more; bags come end to end.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"bags of {lengths} tiles: each must have one or more")
        self.lengths = lengths
        self._found: list[tuple[Tensor, Tensor]] = []  # mean and sum of squares of whole bags
        self._seen = 0  # rows of the next one
        self._mean, self._squares = torch.empty(0), torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """The next rows [n, D], float32 or wider, without gradient.

        Raises:
            ValueError: there are more than the bags have.
        """
        while len(rows):
            some, rows = rows.tensor_split([self._wanted(len(rows))])
            mean = some.mean(0)
            self.join(len(some), mean, (some - mean).square_().sum(0))

    def join(self, new: int, mean: Tensor, squares: Tensor) -> None:
        """What the next rows have in common, all of one bag: their mean and sum of squares, [D].

        Raises:
            ValueError: there are more than the bag has.
        """
        if new > self._wanted(new):
            raise ValueError(f"{new} tiles do not end with a bag of {self.lengths}")
        seen = self._seen
        self._seen = seen + new
        if seen:
            # By numbers of Python: a tensor of counts would make a GPU's host wait.
            away = mean - self._mean
            mean = self._mean + away * (new / self._seen)
            squares = self._squares + squares + away.square() * (seen * new / self._seen)
        self._mean, self._squares = mean, squares
        length = self.lengths[len(self._found)]
        if self._seen == length:
            self._found.append((mean, squares / length))
            self._seen = 0

    def join_all(self, new: Sequence[int], found: Tensor) -> None:
        """The same of many parts [n, 2, D], one after the other."""
        if tuple(new) == self.lengths and not self._found and not self._seen:
            counts = torch.tensor(new, dtype=found.dtype, device=found.device)[:, None]
            self._found = list(zip(found[:, 0], found[:, 1] / counts, strict=True))
            return
        for count, (mean, squares) in zip(new, found, strict=True):
            self.join(count, mean, squares)

    def _wanted(self, new: int) -> int:
        """How many rows the next bag lacks."""
        if len(self._found) == len(self.lengths):
            raise ValueError(f"{new} tiles more than the bags' {sum(self.lengths)}")
        return self.lengths[len(self._found)] - self._seen

    def found(self) -> Tensor:
        """[B, 2 D] of all bags.

        Raises:
            ValueError: rows have not come.
        """
        if len(self._found) < len(self.lengths):
            raise ValueError(f"fewer tiles than the bags' {sum(self.lengths)}")
        return joined(self._found)


def joined(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean and variance of each bag, side by side and as a deviation: [B, 2 D]."""
    mean, variance = (torch.stack(rows) for rows in zip(*found, strict=True))
    return torch.cat([mean, (variance + 1e-12).sqrt() - 1e-6], 1)


def _normalised(rows: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(rows, rows.shape[-1:], eps=eps).to(dtype)


def _pieces(begins: list[int], most: int) -> list[range]:
    """Parts of bags one after the other, as many as have up to so many rows together."""
    pieces, first = [], 0
    for part in range(1, len(begins) - 1):
        if begins[part + 1] - begins[first] > most:
            pieces.append(range(first, part))
            first = part
    return [*pieces, range(first, len(begins) - 1)]


_own = threading.local()


def _memory(rows: int, width: int) -> Tensor:
    """[rows, width] of this thread, used again: new memory is new pages, which cost as much."""
    size = rows * width
    if getattr(_own, "memory", None) is None or len(_own.memory) < size:
        with torch.inference_mode(False):
            _own.memory = torch.empty(size, dtype=torch.float32, device="cpu")
    found: Tensor = _own.memory[:size].view(rows, width)
    return found


def are_in_pieces(features: Tensor) -> bool:
    """Whether threads take pieces of these tiles, and share no operation of torch's on them."""
    return features.dtype != torch.float64 and _kernels(features) is not None


def _kernels(features: Tensor) -> Any:
    if features.device.type != "cpu" or features.numel() < LEAST:
        return None
    kernels = jit.kernels("tile_kernels", threaded=False)
    if kernels is None:
        jit.suggest("tiles are read")
    return kernels


class _Pass:
    """The compiled pass over tiles, by one thread; each piece of a bag with its own moments."""

    def __init__(self, kernels: Any, width: int, standard: Standard | None) -> None:
        self._kernels = kernels
        self._width, self.nothing = width, torch.empty(0, width, dtype=torch.float64, device="cpu")
        if standard is None:
            self._mean, self._deviation = np.zeros(width, np.float32), np.ones(width, np.float32)
        else:
            self._mean, self._deviation = (
                t.detach().float().contiguous().numpy() for t in standard
            )

    @classmethod
    def of(cls, features: Tensor, standard: Standard | None, dtype: torch.dtype) -> _Pass | None:
        """For features on a CPU, where it serves and pays."""
        wide_ones = (features, *(standard or ()))
        if dtype == torch.float64 or any(t.dtype == torch.float64 for t in wide_ones):
            return None
        kernels = _kernels(features)
        return None if kernels is None else cls(kernels, features.shape[1], standard)

    def no_moments(self, parts: int) -> Tensor:
        """[parts, 2, D] for the moments of parts of bags."""
        return torch.empty(parts, 2, self._width, dtype=torch.float64, device="cpu")

    def normalise(self, some: Tensor, eps: float, rows: Tensor, moments: Tensor) -> None:
        """Leave rows normalised in others [n, D]; their moments in [2, D], or nowhere: [0, D]."""
        self._run(some, eps, rows.numpy(), moments.numpy())

    def see(self, some: Tensor, moments: Tensor) -> None:
        """The moments of rows alone."""
        self._run(some, 0.0, np.empty((0, some.shape[1]), np.float32), moments.numpy())

    def _run(self, some: Tensor, eps: float, rows: Any, moments: Any) -> None:
        half = some.dtype == torch.float16 and self._kernels.READS_HALVES
        tiles = (some.view(torch.int16) if half else some.float()).contiguous().detach().numpy()
        self._kernels.pass_over(tiles, self._mean, self._deviation, eps, rows, moments)

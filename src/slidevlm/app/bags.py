"""Bags as users give them: paths, arrays, tensors, and lists of these."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidevlm.app.cohorts import open_path
from slidevlm.app.trained import Trained, same_data
from slidevlm.batch import Batch
from slidevlm.data.cases import Bag, Case, CaseStore, make_bag
from slidevlm.data.dataset import BagDataset, Sample, collate
from slidevlm.data.splits import some
from slidevlm.errors import DataError

UNITS = ("um", "px")


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one slide or specimen, in memory.

    Examples:
        >>> import numpy as np
        >>> tiles = Tiles(np.zeros((3, 16), np.float32), positions=np.zeros((3, 2)), unit="um")

    Args:
        features: [N, D] of N tiles, floating point.
        positions: [N, 2], x and y of each tile.
        unit: of the positions: "um" (micrometres) or "px" (pixels at level 0).
        slides: [N] whole numbers from 0, the slide of each tile; None: all are of one slide.
    """

    features: np.ndarray | Tensor
    positions: np.ndarray | Tensor | None = None
    unit: str | None = None
    slides: np.ndarray | Tensor | None = None


BagLike = str | os.PathLike[str] | np.ndarray | Tensor | Tiles


def batches_of(
    trained: Trained, bags: Sequence[BagLike], cutoff: int, batch_size: int
) -> Iterator[Batch]:
    """The bags in order, read when their turn comes, `batch_size` at a time, on the CPU.

    Args:
        trained: the model whose tile width and unit of positions the bags must have.
        bags: paths in any known format, each of one specimen, or arrays.
        cutoff: tiles read of one bag at most; which ones depends on its name alone.
        batch_size: bags of a batch, at most.

    Raises:
        DataError: a bag that cannot be read, is empty, not finite, or not what the model reads.
        ConfigError: a path of several specimens or features.
    """
    for start in range(0, len(bags), batch_size):
        numbers = range(start, min(start + batch_size, len(bags)))
        yield collate([_sample(trained, bags[i], _place(i, bags), cutoff) for i in numbers])


def _place(number: int, bags: Sequence[BagLike]) -> str:
    return "the bag" if len(bags) == 1 else f"bag {number} of the list"


def _sample(trained: Trained, bag: BagLike, place: str, cutoff: int) -> Sample:
    store, case, place = opened(bag, place)
    return sample_of(trained, store, case, place, cutoff)


def opened(bag: BagLike, place: str = "the bag") -> tuple[CaseStore, Case, str]:
    """The store of one bag, its one specimen, and what errors call it."""
    if isinstance(bag, (str, os.PathLike)):
        place, store = str(bag), open_path(Path(bag).expanduser(), None, None)
        return store, _only(store, place), place
    memory = _Memory(_bag(bag, place), place)
    return memory, memory.cases[0], place


def sample_of(trained: Trained, store: CaseStore, case: Case, place: str, cutoff: int) -> Sample:
    """A specimen's tiles, fit for the model.

    Raises:
        DataError: they cannot be read, or are not what the model reads.
    """
    dataset = BagDataset(
        store,
        [case],
        [""],
        trained.tokenizer,
        max_tokens=2,
        cutoff=cutoff,
        seed=0,
        training=False,
    )
    sample = dataset[0]
    same_data(trained, sample.bag.features.shape[1], sample.bag.unit, place)
    return sample


def _only(store: CaseStore, place: str) -> Case:
    cases = [case for case in store.cases if store.has_features(case)]
    if len(cases) != 1:
        names = some((case.specimen for case in cases), 3) or "none"
        raise DataError(
            f"{place} holds {len(cases)} specimens with features ({names}), not one; give the file "
            "of one, or a whole cohort to `slidevlm embed`, `classify` or `caption`"
        )
    return cases[0]


class _Memory:
    """A store of one specimen that is in memory already."""

    def __init__(self, bag: Bag, place: str) -> None:
        self.path = Path(place)
        # One name for all: what is drawn for a bag is the same alone and in any list.
        self.cases: tuple[Case, ...] = (Case("bag", "bag", place),)
        self._bag = bag

    def has_features(self, case: Case) -> bool:
        return True

    def length(self, case: Case) -> int:
        return len(self._bag.features)

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        if rows is None:
            return self._bag
        bag, chosen = self._bag, torch.from_numpy(rows)
        parts = (bag.features, bag.positions, bag.slides, bag.centres)
        features, positions, slides, centres = (None if p is None else p[chosen] for p in parts)
        assert features is not None, "every bag has features"
        return Bag(features, positions, slides, bag.unit, centres)

    def text(self, case: Case) -> str | None:
        return None


def _bag(given: np.ndarray | Tensor | Tiles, place: str) -> Bag:
    tiles = given if isinstance(given, Tiles) else Tiles(given)
    features = _features(tiles.features, place)
    count = len(features)
    slides = np.zeros(count, np.int64)
    if tiles.slides is not None:
        slides = _numbers(tiles.slides, (count,), f"{place}: slides", np.int64)
        if count and slides.min() < 0:
            raise DataError(f"{place}: slides are numbers from 0, not {slides.min()}")
    if tiles.positions is None:
        if tiles.unit is not None:
            raise DataError(f"{place}: unit {tiles.unit!r} is of positions; give them too")
        return make_bag(features, None, slides, None, None)
    positions = _numbers(tiles.positions, (count, 2), f"{place}: positions", np.float64)
    if tiles.unit not in UNITS:
        raise DataError(
            f"{place}: positions need their unit, one of {', '.join(UNITS)}, not {tiles.unit!r}"
        )
    return make_bag(features, positions, slides, tiles.unit, None)


def _features(given: Any, place: str) -> Tensor:
    """[N, D] float16, bfloat16 or float32 on the CPU; float64 becomes float32."""
    if not isinstance(given, (np.ndarray, Tensor)):
        raise DataError(
            f"{place}: a {type(given).__name__} is no bag; give a path, an array or tensor of "
            "[tiles, features], or slidevlm.Tiles"
        )
    if given.ndim != 2:
        raise DataError(
            f"{place}: features must be of shape [tiles, features], not {list(given.shape)}"
        )
    if isinstance(given, Tensor):
        features = given.detach().cpu()
    elif given.dtype.kind == "f":
        # Of the machine's own byte order, and writable, as torch wants it.
        kind = given.dtype.newbyteorder("=")
        kind = np.dtype(np.float32) if kind.itemsize > 4 else kind
        features = torch.from_numpy(np.require(given, kind, ["C", "W"]))
    else:
        raise DataError(f"{place}: features are floating point numbers, not {given.dtype}")
    if not features.is_floating_point():
        raise DataError(f"{place}: features are floating point numbers, not {features.dtype}")
    if features.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        features = features.float()
    return features.contiguous()


def _numbers(given: Any, shape: tuple[int, ...], what: str, kind: type) -> np.ndarray:
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.shape != shape:
        raise DataError(f"{what} must be of shape {list(shape)}, not {list(array.shape)}")
    wanted = "iu" if kind is np.int64 else "iuf"
    if array.dtype.kind not in wanted or not np.isfinite(array).all():
        words = "whole numbers" if wanted == "iu" else "finite numbers"
        raise DataError(f"{what} must be {words}")
    return array.astype(kind)

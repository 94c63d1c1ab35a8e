"""Reading a whole specimen, in blocks of bounded memory, to say what is in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from slidevlm.data.cases import Bag, Case, CaseStore, Described, Facts, Verified
from slidevlm.data.digest import Digest
from slidevlm.errors import DataError

_BLOCK_BYTES = 2**25  # large enough that a chunk of a compressed file is seldom read twice


@dataclass(frozen=True)
class Scan:
    """What one specimen holds."""

    specimen: str
    length: int = 0
    width: int | None = None  # None where there is no tile to tell it
    dtype: str | None = None
    facts: Facts = field(default_factory=Facts)
    has_positions: bool = False
    slides: tuple[str, ...] = ()  # a digest of each slide's features
    bad_rows: int = 0  # with a NaN or an infinite feature
    damaged: tuple[str, ...] = ()  # parts whose checksum is another
    verified: bool = False  # whether there was a checksum to compare with
    problem: str | None = None  # why it could not be read to the end


def scan(store: CaseStore, case: Case) -> Scan:
    """Read `case` wholly. What is wrong with it comes back as `problem`, never as an error."""
    found = Scan(case.specimen)
    try:
        found = replace(found, length=store.length(case), facts=facts_of(store, case))
        return _content(store, case, found)
    except DataError as error:
        return replace(found, problem=str(error))
    # Whatever a damaged file leads a library to, the other specimens are still to be looked at.
    except Exception as error:
        return replace(found, problem=f"{case.location}: {type(error).__name__}: {error}")


def facts_of(store: CaseStore, case: Case) -> Facts:
    """What the format tells beside the features; nothing where it tells nothing."""
    return store.facts(case) if isinstance(store, Described) else Facts()


def blocks(store: CaseStore, case: Case, length: int) -> Iterator[tuple[int, Bag]]:
    """(first row, bag) of consecutive blocks of rows that together are the whole specimen."""
    start, step = 0, min(length, 256)
    while start < length:
        stop = min(start + step, length)
        whole = start == 0 and stop == length
        bag = store.read(case, None if whole else np.arange(start, stop, dtype=np.int64))
        yield start, bag
        features = bag.features
        step = max(256, _BLOCK_BYTES // max(1, features.shape[1] * features.element_size()))
        start = stop


def _content(store: CaseStore, case: Case, found: Scan) -> Scan:
    verified = isinstance(store, Verified) and store.has_checksum(case)
    whole, slides = Digest(), dict[int, Digest]()
    bad = 0
    for _, bag in blocks(store, case, found.length):
        features = bag.features
        # A sum of 64-bit floats cannot overflow, and is not finite as soon as one term is not.
        if not torch.isfinite(features.sum(dtype=torch.float64)):
            bad += int((~torch.isfinite(features)).any(dim=1).sum())
        if verified:
            whole.update(features)
        for slide, first, last in _runs(bag, len(features)):
            slides.setdefault(slide, Digest()).update(features[first:last])
        found = replace(
            found,
            width=features.shape[1],
            dtype=str(features.dtype).removeprefix("torch."),
            facts=replace(found.facts, unit=bag.unit),
            has_positions=bag.positions is not None,
        )
    damaged: tuple[str, ...] = ()
    if verified and isinstance(store, Verified):
        damaged = store.damaged(case, whole.hexdigest())
    digests = tuple(slides[slide].hexdigest() for slide in sorted(slides))
    return replace(found, slides=digests, bad_rows=bad, verified=verified, damaged=damaged)


def _runs(bag: Bag, length: int) -> Iterator[tuple[int, int, int]]:
    """(slide, first, last + 1) of rows that follow each other on one slide."""
    if bag.slides is None:
        yield 0, 0, length
        return
    slides = bag.slides.numpy()
    edges = [0, *(np.flatnonzero(np.diff(slides)) + 1).tolist(), length]
    for first, last in itertools.pairwise(edges):
        yield int(slides[first]), first, last

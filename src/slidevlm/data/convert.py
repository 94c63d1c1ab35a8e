"""Any cohort -> one HDF5 file in the case layout, of which few rows of many are cheap to read.

Two passes: the first looks at every specimen's shape and lays the file out, the second fills it,
by processes that work in parallel. A kill at any moment loses at most the last second: the file
being filled and a journal of the specimens done lie beside the target under hidden names, and the
same command goes on from there. The target's name appears when the file is whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidevlm.data.cases import Case, CaseStore, Described, Keyed
from slidevlm.data.digest import Digest
from slidevlm.data.formats.hdf5_target import (
    CaseTarget,
    Layout,
    PlannedCase,
    TargetError,
    lay_out,
    tiles_checksum,
)
from slidevlm.data.parallel import each
from slidevlm.data.scan import blocks, facts_of
from slidevlm.data.splits import some
from slidevlm.documents import json_of
from slidevlm.errors import ConfigError, DataError

log = logging.getLogger("slidevlm.data")

DTYPES = ("float16", "float32", "bfloat16")
_LEVEL_0 = re.compile(r"([0-9.e+]+) px at level 0")  # size of a tile
_SYNC_SECONDS = 1.0  # so much work a kill may cost


@dataclass(frozen=True)
class Converted:
    """What came of it."""

    specimens: int
    tiles: int
    size: int  # bytes of the file
    resumed: int  # specimens that were done before
    without_features: tuple[str, ...]  # left out
    not_finite: tuple[str, ...]  # specimens with NaN or infinite features, kept as they are


Progress = Callable[[str, int, int], None]  # (what, done, of)


def convert(
    store: CaseStore,
    target: Path,
    layout: Layout,
    texts_of: Callable[[Case], Mapping[str, str]],
    *,
    workers: int,
    settings: str = "",
    progress: Progress = lambda what, done, of: None,
    mpp: float | None = None,
) -> Converted:
    """Write all specimens of `store` that have features to `target`.

    Args:
        texts_of: case -> its texts, by the name of the attribute to keep each in.
        workers: reading and writing processes; 0 works in this one.
        settings: whatever else makes the result another; an unfinished conversion is gone on with
            only where it is the same.
        mpp: micrometres a level-0 pixel; positions in pixels become micrometres. None: all stay.

    Raises:
        ConfigError: `target` exists, or an unfinished conversion with other settings does.
        DataError: specimens that cannot be read, cannot be in one file, do not fit the type, or
            have no pixels for `mpp`, the first twenty of them listed; the others stay done.
    """
    if target.exists():
        raise ConfigError(f"{target} exists; choose another name or remove it")
    if not target.parent.is_dir():
        raise ConfigError(f"the folder {target.parent} does not exist; make it first")
    cases = [case for case in store.cases if store.has_features(case)]
    absent = tuple(case.specimen for case in store.cases if not store.has_features(case))
    if not cases:
        raise DataError(f"{store.path}: none of its {len(store.cases)} specimens has features")
    partial = target.with_name(f".{target.name}.partial")
    with _Journal(partial.with_name(partial.name + ".journal")) as journal:
        identity = _identity(store, cases, f"{layout} {settings} {mpp}")
        if not (partial.exists() and journal.belongs_to(identity)):
            _refuse_another(partial, journal)
            planned = _plan(store, cases, layout, texts_of, workers, progress, mpp)
            journal.remove()  # it would tell of another file than the one that comes now
            _lay_out(store, partial, planned, layout)
            journal.begin(identity)
        resumed = len(journal.done())
        _fill(store, cases, partial, layout, journal, workers, progress, mpp)
        done, size = journal.done(), partial.stat().st_size
        os.replace(partial, target)
        journal.remove()
    bad = tuple(one.specimen for one in done.values() if not one.finite)
    tiles = sum(one.tiles for one in done.values())
    return Converted(len(cases), tiles, size, resumed, absent, bad)


def _identity(store: CaseStore, cases: Sequence[Case], settings: str) -> str:
    """Equal where an unfinished file can be gone on with: same source, same settings."""
    whole = hashlib.blake2b(settings.encode(), digest_size=16)
    stamps: dict[Path, str] = {}
    for case in cases:
        whole.update(f"{case.patient}\n{case.specimen}\n".encode())
        for file in store.files(case) if isinstance(store, Described) else (store.path,):
            if file not in stamps:
                status = file.stat()
                stamps[file] = f"{file} {status.st_size} {status.st_mtime_ns}\n"
            whole.update(stamps[file].encode())
    return whole.hexdigest()


def _refuse_another(partial: Path, journal: _Journal) -> None:
    if partial.exists() and journal.begun():
        raise ConfigError(
            f"{partial} is an unfinished conversion of other data or with other settings; use "
            f"the same again to finish it, or remove it and {journal.path}"
        )


# -- the first pass --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What one specimen is, before its features are read."""

    rows: int = 0
    width: int | None = None  # None without tiles
    unit: str | None = None
    positions: bool = False
    keys: np.dtype[Any] | None = None
    encoder: str | None = None
    attributes: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()
    problem: str | None = None


def look(store: CaseStore, case: Case) -> _Look:
    """Shape and facts of a specimen, from one of its rows."""
    try:
        rows, facts = store.length(case), facts_of(store, case)
        found = {
            "format": facts.format,
            "encoder": facts.encoder,
            "tile_size": facts.tile_size,
            "source": facts.source or store.path.name,
        }
        attributes = {name: value for name, value in found.items() if value is not None}
        if rows == 0:
            return _Look(encoder=facts.encoder, attributes=attributes, warnings=facts.warnings)
        bag = store.read(case, np.zeros(1, np.int64))
        keys = _keys(store, case)
        return _Look(
            rows,
            bag.features.shape[1],
            bag.unit,
            bag.positions is not None,
            None if keys is None else keys.dtype,
            facts.encoder,
            attributes,
            facts.warnings,
        )
    except DataError as error:
        return _Look(problem=str(error))


def _keys(store: CaseStore, case: Case) -> np.ndarray | None:
    """The keys of the tiles, strings of at least one byte as HDF5 wants them."""
    keys = store.tile_keys(case) if isinstance(store, Keyed) else None
    if keys is not None and keys.dtype == np.dtype("S"):
        return keys.astype("S1")
    return keys


def _plan(
    store: CaseStore,
    cases: Sequence[Case],
    layout: Layout,
    texts_of: Callable[[Case], Mapping[str, str]],
    workers: int,
    progress: Progress,
    mpp: float | None,
) -> list[PlannedCase]:
    looks: dict[str, _Look] = {}
    for case, found in each(look, store, cases, workers):
        looks[case.specimen] = found
        progress("looking at specimens", len(looks), len(cases))
    _raise_all(store, [look.problem for look in looks.values() if look.problem])
    for text, count in Counter(t for found in looks.values() for t in found.warnings).items():
        log.warning("%d of %d specimens: %s", count, len(cases), text)
    full = {name: found for name, found in looks.items() if found.rows}
    _same("feature width", {name: found.width for name, found in full.items()})
    _same("tile encoder", {n: found.encoder for n, found in full.items() if found.encoder})
    _same("unit of positions", {n: found.unit for n, found in full.items() if found.positions})
    _same("positions", {n: "with" if found.positions else "without" for n, found in full.items()})
    widths = [found.width for found in full.values() if found.width is not None]
    if not widths:
        raise DataError(f"{store.path}: none of its {len(cases)} specimens has a tile")
    if mpp is not None:
        looks = {name: _in_micrometres(store, found, mpp) for name, found in looks.items()}
    return [
        PlannedCase(
            case.patient,
            _name(case),
            found.rows,
            widths[0],
            found.unit if found.positions else None,
            found.keys,
            texts_of(case),
            found.attributes or {},
        )
        for case in cases
        for found in [looks[case.specimen]]
    ]


def _in_micrometres(store: CaseStore, found: _Look, mpp: float) -> _Look:
    """What a specimen is once its positions are converted.

    Raises:
        DataError: it has none in pixels.
    """
    if found.rows and found.unit != "px":
        has = "positions in micrometres already" if found.positions else "no positions"
        raise DataError(f"{store.path}: its specimens have {has}; leave --mpp out")
    attributes = dict(found.attributes or {})
    if size := _LEVEL_0.fullmatch(attributes.get("tile_size", "")):
        attributes["tile_size"] = f"{mpp * float(size[1]):g} um"
    return replace(found, unit="um" if found.positions else None, attributes=attributes)


def _same(what: str, values: Mapping[str, object]) -> None:
    """DataError when specimens differ, with how many have which and examples."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return
    parts = [
        f"{value}: {count} ({some((n for n, v in values.items() if v == value), 3)})"
        for value, count in counts.most_common()
    ]
    raise DataError(
        f"the specimens differ in {what}, so they cannot be one cohort: {'; '.join(parts)}; "
        "convert those that belong together"
    )


def _raise_all(store: CaseStore, problems: Sequence[str], remark: str = "") -> None:
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(
            f"{store.path}: specimens that cannot be converted: {len(problems)}"
            f"{lines}{more}{remark}"
        )


def _lay_out(
    store: CaseStore, partial: Path, planned: Sequence[PlannedCase], layout: Layout
) -> None:
    needed = sum(layout.size(case) for case in planned)
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise DataError(
            f"{partial.parent} has {free / 1e9:.1f} GB free, the features need "
            f"{needed / 1e9:.1f} GB; make room or choose another folder"
        )
    attributes = {
        "source": store.path.name,
        "feature_attribute": layout.feature_attribute,  # whose checksums the index has
    }
    if units := {case.unit for case in planned if case.unit is not None}:
        attributes["unit"] = units.pop()
    beginning = partial.with_name(partial.name + ".new")
    try:
        lay_out(beginning, planned, layout, attributes)
        os.replace(beginning, partial)
    finally:
        beginning.unlink(missing_ok=True)


# -- the second pass -------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """One specimen is in the file, or could not be."""

    specimen: str
    tiles: int = 0
    finite: bool = True  # whether all of its features are
    problem: str | None = None


def _fill(
    store: CaseStore,
    cases: Sequence[Case],
    partial: Path,
    layout: Layout,
    journal: _Journal,
    workers: int,
    progress: Progress,
    mpp: float | None,
) -> None:
    """Fill what the journal lacks, and note it there."""
    target = CaseTarget(partial, layout.feature_attribute)
    numbers = {case.specimen: number for number, case in enumerate(cases)}
    before = journal.done()
    left = [case for case in cases if case.specimen not in before]
    problems: list[str] = []
    waiting: list[Filled] = []
    synced = time.monotonic()

    def keep() -> None:
        # The journal must not tell of what a power cut could still take.
        if waiting:
            target.sync()
            journal.add(waiting)
            waiting.clear()

    work = functools.partial(fill, target=target, dtype=layout.dtype, numbers=numbers, mpp=mpp)
    done = len(before)
    progress("converting", done, len(cases))
    try:
        for _, filled in each(work, store, left, workers):
            if filled.problem is not None:
                problems.append(filled.problem)
                continue
            waiting.append(filled)
            if time.monotonic() - synced >= _SYNC_SECONDS:
                keep()
                synced = time.monotonic()
            done += 1
            progress("converting", done, len(cases))
    finally:
        keep()
        target.close()
    kept = f"\nthe others are kept in {partial}: the same command goes on with what is left"
    _raise_all(store, problems, kept)


def fill(
    store: CaseStore,
    case: Case,
    *,
    target: CaseTarget,
    dtype: str,
    numbers: Mapping[str, int],
    mpp: float | None = None,
) -> Filled:
    """Read a specimen in blocks and write each to its place."""
    try:
        return _fill_case(store, case, numbers[case.specimen], target, dtype, mpp)
    except TargetError:
        raise  # it would be the same with every other specimen
    except DataError as error:
        return Filled(case.specimen, problem=str(error))


def _fill_case(
    store: CaseStore, case: Case, number: int, target: CaseTarget, dtype: str, mpp: float | None
) -> Filled:
    location = f"/patients/{case.patient}/{_name(case)}"
    length, digest, finite = store.length(case), Digest(), True
    positions: list[np.ndarray] = []
    unit = None
    for first, bag in blocks(store, case, length):
        features, whole = _cast(bag.features, dtype, f"{store.path}: specimen {case.specimen!r}")
        finite &= whole
        digest.update(features)
        target.write(location, "features", first, _stored(features))
        if bag.positions is not None:
            positions.append(bag.positions.numpy() * np.float32(1 if mpp is None else mpp))
            unit = bag.unit if mpp is None else "um"
    where = np.concatenate(positions) if positions else None
    if where is not None:
        target.write(location, "positions", 0, where)
    keys = _keys(store, case) if length else None
    if keys is not None:
        target.write(location, "tile_keys", 0, keys)
    target.write_checksum(number, tiles_checksum(digest.hexdigest(), where, unit, keys))
    return Filled(case.specimen, length, finite)


def _name(case: Case) -> str:
    """The specimen's name, without the patient's that tells it from another's of that name."""
    return case.specimen.removeprefix(f"{case.patient}/")


def _cast(features: torch.Tensor, dtype: str, where: str) -> tuple[torch.Tensor, bool]:
    """[K, D] in `dtype`, and whether all are finite; DataError where a number becomes infinite."""
    cast = features.to(getattr(torch, dtype))
    if torch.isfinite(cast.sum(dtype=torch.float64)):
        return cast, True
    lost = torch.isfinite(features) & ~torch.isfinite(cast)
    if lost.any():
        largest = float(features[lost].abs().max())
        raise DataError(
            f"{where}: {int(lost.any(dim=1).sum())} tiles have features too large for {dtype}, up "
            f"to {largest:g}; convert with --dtype bfloat16 or float32"
        )
    return cast, bool(torch.isfinite(cast).all())


def _stored(features: torch.Tensor) -> np.ndarray:
    """As the file has them: bfloat16 as its bits."""
    if features.dtype == torch.bfloat16:
        bits: np.ndarray = features.contiguous().view(torch.int16).numpy().view(np.uint16)
        return bits
    values: np.ndarray = features.contiguous().numpy()
    return values


class _Journal:
    """Which specimens are done: a file of JSON lines that only grows.

    Used as a context manager it belongs to one process at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Journal:
        self._lock = _locked(self.path.with_name(self.path.name + ".lock"))
        self._lock.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)

    def _lines(self) -> Iterator[Any]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json_of(line)
            except ValueError:
                continue  # a line that a kill cut short

    def begun(self) -> bool:
        """Whether there is a first line."""
        return next(self._lines(), None) is not None

    def belongs_to(self, identity: str) -> bool:
        """Whether it was begun for the same data and settings."""
        return next(self._lines(), None) == {"identity": identity}

    def begin(self, identity: str) -> None:
        """Forget everything and write the first line."""
        self._append([{"identity": identity}], "w")

    def done(self) -> dict[str, Filled]:
        """The specimens that are on the disk, by name."""
        lines = list(self._lines())
        return {line["specimen"]: Filled(**line) for line in lines[1:]}

    def add(self, specimens: Iterable[Filled]) -> None:
        """Note specimens that are on the disk."""
        lines = [{"specimen": s.specimen, "tiles": s.tiles, "finite": s.finite} for s in specimens]
        self._append(lines, "a")

    def _append(self, lines: Iterable[Any], mode: str) -> None:
        # A line that a kill cut short must not swallow the next one.
        cut = mode == "a" and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, mode, encoding="utf-8") as file:
            file.write("\n" if cut else "")
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The conversion is complete."""
        self.path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a second conversion to the same target out; a kill opens the lock."""
    try:
        import fcntl
    except ImportError:  # not on this platform; the user must not start two
        yield
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{path} is locked: another conversion to the same target is running"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

"""Survival: a table of times and events, a penalised Cox model, the concordance index."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.data.reports import names_of, read_table, read_utf8
from slidevlm.errors import ConfigError, DataError

_IDS = ("specimen", "specimen_id", "case_id", "slide_id", "patient", "patient_id", "id")
_EVENTS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
PENALTIES = np.logspace(-2, 5, 15)  # of the L2 norm; embeddings are standardised
_ELEMENTS = 16_000_000


@dataclass(frozen=True)
class SurvivalTable:
    """When each patient or specimen was last seen, and whether the event was then."""

    name: str  # stem of the file
    rows: Mapping[str, tuple[float, bool]]  # by specimen or patient

    def of(self, specimen: str, patient: str) -> tuple[float, bool] | None:
        """Time and event of a specimen; None where the table names neither it nor its patient."""
        for key in (*names_of(specimen, patient), patient):
            if key in self.rows:
                return self.rows[key]
        return None


def read_survival(path: Path) -> SurvivalTable:
    """Read a CSV or TSV with a column of specimens or patients, `time`, and `event` (1 or 0).

    Raises:
        ConfigError: the package that fits the model is not installed.
        DataError: columns or values that are missing or make no sense.
    """
    if importlib.util.find_spec("sksurv") is None:
        raise ConfigError("--survival-table needs the extra: pip install 'slidevlm[survival]'")
    header, rows = read_table(read_utf8(path), path)
    key = next((c for c in _IDS if c in header), None)
    if key is None or "time" not in header or "event" not in header:
        raise DataError(
            f"{path}: needs the columns time, event and one of {', '.join(_IDS)}; it has "
            f"{', '.join(header)}"
        )
    found: dict[str, tuple[float, bool]] = {}
    for row in rows:
        name, value = row[key].strip(), (_time(row["time"]), _EVENTS.get(_word(row["event"])))
        if value[0] is None or value[1] is None:
            raise DataError(
                f"{path}: {name!r} has time {row['time']!r} and event {row['event']!r}; a time is "
                "a number of 0 or more, an event 1 or 0"
            )
        if found.setdefault(name, (value[0], value[1])) != value:
            raise DataError(f"{path}: {name!r} has two rows that differ; keep one")
    if not found:
        raise DataError(f"{path}: has a header but no rows")
    return SurvivalTable(path.stem, found)


def _time(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def _word(text: str) -> str:
    word = text.strip().lower()
    return word.removesuffix(".0")


def concordance(
    time: np.ndarray, event: np.ndarray, risk: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Harrell's concordance index of each resample (Harrell et al., 1996).

    A pair is comparable where the shorter time ends in an event (or, of equal times, one does and
    the other does not); it is concordant where that one has the higher risk, half where risks tie.

    Args:
        time: [N].
        event: [N] bool.
        risk: [N].
        counts: [N, R].

    Returns:
        [R], NaN without a comparable pair. Takes N * N * R operations.
    """
    weight = counts.astype(np.float64)
    right, pairs = np.zeros((2, counts.shape[1]))
    rows = max(1, _ELEMENTS // max(1, len(time)))
    for part in (slice(s, s + rows) for s in range(0, len(time), rows)):
        later = (time[part, None] < time) | ((time[part, None] == time) & ~event)
        comparable = later & event[part, None]
        score = comparable * (
            (risk[part, None] > risk).astype(np.float64) + (risk[part, None] == risk) / 2
        )
        pairs += np.einsum("ir,ir->r", weight[part], comparable.astype(np.float64) @ weight)
        right += np.einsum("ir,ir->r", weight[part], score @ weight)
    result: np.ndarray = np.divide(right, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return result


@dataclass(frozen=True)
class Cox:
    """A Cox model with an L2 penalty on standardised embeddings."""

    model: Any
    mean: np.ndarray  # [E]
    deviation: np.ndarray  # [E]
    penalty: float
    curve: tuple[float, ...]  # concordance at each of PENALTIES

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[N, E] -> [N] risk."""
        result: np.ndarray = self.model.predict((x - self.mean) / self.deviation)
        return result


def fit_cox(
    x: np.ndarray, time: np.ndarray, event: np.ndarray, patients: np.ndarray, seed: int
) -> Cox:
    """Choose the penalty by the concordance of five folds, no patient in two, the least in a tie.

    Args:
        x: [N, E].
        time: [N].
        event: [N] bool.
        patients: [N] names.
        seed: of the folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(5, len(np.unique(patients[event])), len(np.unique(patients)))
    if folds < 2:
        raise DataError(
            "--survival-table: the training split has events of fewer than 2 patients; a Cox model "
            "cannot be fitted"
        )
    # scikit-learn takes 32 bits.
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    curves = []
    for a, b in splitter.split(x, event, patients):
        risks = [_fit(x[a], time[a], event[a], p)(x[b]) for p in PENALTIES]
        whole = np.ones((len(b), 1))
        curves.append([concordance(time[b], event[b], r, whole)[0] for r in risks])
    curve = np.nan_to_num(np.nanmean(curves, axis=0), nan=0.5)
    best = _fit(x, time, event, float(PENALTIES[int(np.argmax(curve))]))
    return Cox(best.model, best.mean, best.deviation, best.penalty, tuple(curve.tolist()))


def _fit(x: np.ndarray, time: np.ndarray, event: np.ndarray, penalty: float) -> Cox:
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-12)
    model = CoxPHSurvivalAnalysis(alpha=penalty, ties="efron")
    model.fit((x - mean) / deviation, Surv.from_arrays(event, time))
    return Cox(model, mean, deviation, penalty, ())

"""Which specimens of a split a label file names, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.eval.prompts import Labels


@dataclass(frozen=True)
class Labelled:
    """n specimens of a split that have a label."""

    rows: np.ndarray  # [n] int64, their places in the split
    member: np.ndarray  # [n, C] bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def y_true(self) -> np.ndarray:
        """[n] class numbers, where each specimen has one class."""
        return self.member.argmax(1)


def labelled(predictions: Predictions, labels: Labels, classes: Sequence[str]) -> Labelled:
    """Find the specimens whose classes are among `classes`; others are as if without a label."""
    number = {c: i for i, c in enumerate(classes)}
    rows, members = [], []
    names = zip(predictions.specimen_ids, predictions.patient_ids, strict=True)
    for i, (specimen, patient) in enumerate(names):
        found = labels.of(specimen, patient)
        if found is not None and all(c in number for c in found):
            row = np.zeros(len(number), bool)
            row[[number[c] for c in found]] = True
            rows.append(i)
            members.append(row)
    return Labelled(
        np.array(rows, np.int64), np.array(members, bool).reshape(len(rows), len(number))
    )

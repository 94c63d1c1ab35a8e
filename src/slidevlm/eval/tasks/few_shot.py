"""Few-shot classification from given examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.errors import DataError
from slidevlm.eval import learners
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import classify
from slidevlm.eval.labelled import labelled
from slidevlm.eval.prompts import Labels, read_examples
from slidevlm.eval.task import TaskResult, merge

log = logging.getLogger("slidevlm.eval")

_LEARNERS = {
    "class_mean": learners.class_mean,
    "logistic_regression": learners.logistic_regression,
}


@dataclass(frozen=True)
class FewShotFile:
    """Examples of each class, and the label files whose classes they are."""

    name: str  # stem of the file
    examples: Mapping[str, tuple[str, ...]]  # class -> specimens, as the file writes them
    labels: tuple[Labels, ...]


def read_few_shot(path: Path, known: Sequence[Labels]) -> FewShotFile:
    """Read `{class: [specimens]}` and find the label files that it belongs to.

    Raises:
        DataError: unreadable, fewer than two classes, or no label file has all its classes.
    """
    examples = read_examples(path)
    fitting = tuple(one for one in known if not one.several and set(examples) <= set(one.names))
    if not fitting:
        files = "; ".join(f"{one.name}: {', '.join(one.names[:10])}" for one in known)
        raise DataError(
            f"{path}: no label file has all of its classes {', '.join(sorted(examples)[:10])} "
            f"(with one class a specimen); the label files have: {files}"
        )
    for labels in fitting:
        for c, specimens in examples.items():
            for specimen in specimens:
                if labels.classes.get(specimen, (c,)) != (c,):
                    raise DataError(
                        f"{path}: {specimen!r} is an example of {c!r}, but "
                        f"{labels.classes[specimen][0]!r} in the label file {labels.name}; correct "
                        "one of them"
                    )
    return FewShotFile(path.stem, examples, fitting)


def resolve_examples(
    file: FewShotFile, support: Predictions, *, lenient: bool = False
) -> dict[str, tuple[str, ...]]:
    """Specimens of each class: a name is that of a specimen or, failing that, of a patient.

    Args:
        file: names of specimens or patients.
        support: what has been embedded.
        lenient: leave out what `support` lacks, since bad specimens are dropped; nothing is left
            where a class has no other examples.

    Raises:
        DataError: `support` lacks a name, or see `check_examples`.
    """
    patients = dict(zip(support.specimen_ids, support.patient_ids, strict=True))
    check_examples(file, patients)
    own = _by_name(patients)
    lacking = [s for found in file.examples.values() for s in found if s not in own]
    whole = all(set(found) - set(lacking) for found in file.examples.values())
    if lacking and lenient:
        log.warning(
            "few-shot examples %s: %d could not be used, such as %s; %s",
            file.name,
            len(lacking),
            lacking[0],
            "the others are" if whole else "a class has no other, so the file is left out",
        )
        if not whole:
            return {}
    elif lacking:
        raise DataError(
            f"few-shot examples {file.name}: {len(lacking)} specimens have no features here, such "
            f"as {lacking[0]!r}; leave them out or add them to the data"
        )
    return {
        c: tuple(dict.fromkeys(s for name in found for s in own.get(name, ())))
        for c, found in file.examples.items()
    }


def check_examples(file: FewShotFile, patients: Mapping[str, str]) -> None:
    """Check that no name of a patient makes a specimen an example of a second class.

    Args:
        file: names of specimens or patients.
        patients: specimen -> patient, of all that are there.

    Raises:
        DataError: it does, by this file or by a label file.
    """
    own, said = _by_name(patients), dict[str, str]()
    for c, names in file.examples.items():
        for specimen in (s for name in names for s in own.get(name, ())):
            others = {f"{file.name} itself": said.setdefault(specimen, c)}
            for labels in file.labels:
                if (kinds := labels.of(specimen, patients[specimen])) is not None:
                    others[f"the label file {labels.name}"] = kinds[0]
            for where, other in others.items():
                if other != c:
                    raise DataError(
                        f"few-shot examples {file.name}: {specimen!r} of patient "
                        f"{patients[specimen]!r} is an example of {c!r}, but {other!r} in {where}; "
                        "name specimens in the place of the patient, or correct one of them"
                    )


def _by_name(patients: Mapping[str, str]) -> dict[str, list[str]]:
    """Specimens by what an example may be called: its own name or, failing that, its patient's."""
    own: dict[str, list[str]] = {}
    for specimen, patient in patients.items():
        own.setdefault(patient, []).append(specimen)
    return own | {specimen: [specimen] for specimen in patients}


@dataclass(frozen=True)
class FewShot:
    """Task: classify by the nearest class mean and by logistic regression, learnt from examples.

    Specimens of the patients that gave examples are left out of the split, and so are those of
    classes without examples.

    Args:
        name: of the file of examples.
        support: embeddings of the examples (others are passed over).
        examples: class -> their specimen ids in `support`.
        labels: the true classes.
        bootstrap: resamples the split, not the examples.
    """

    name: str
    support: Predictions
    examples: Mapping[str, tuple[str, ...]]
    labels: Labels
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `few_shot/<label file>/<examples file>/<learner>/<metric>`."""
        classes = tuple(sorted(self.examples))
        given = self._examples(classes)
        name = f"few_shot/{self.labels.name}/{self.name}"
        known = labelled(predictions, self.labels, classes)
        shown, patients = set(self.support_ids), set(given.patients)
        kept = np.array(
            [
                i
                for i, row in enumerate(known.rows)
                if predictions.specimen_ids[row] not in shown
                and predictions.patient_ids[row] not in patients
            ],
            np.int64,
        )
        if not len(kept):
            log.warning("%s: no specimen of this split is left to be judged by; left out", name)
            return TaskResult()
        image = predictions.image_embedding
        assert image is not None, "few-shot classification needs slide embeddings"
        rows = known.rows[kept]
        queries, units = image[rows].astype(np.float64), self.bootstrap.units(predictions)
        parts = []
        for learner, scores in _LEARNERS.items():
            part = classify(
                f"{name}/{learner}",
                known.y_true[kept],
                _finite(scores, given, queries),
                classes,
                [units[i] for i in rows],
                self.bootstrap,
                rows,
                len(predictions),
            )
            for details in part.details.values():
                details["examples"] = {c: len(self.examples[c]) for c in classes}
                details["left_out"] = len(known) - len(kept)
            parts.append(part)
        return merge(parts)

    @property
    def support_ids(self) -> tuple[str, ...]:
        """Specimens of all examples."""
        return tuple(s for found in self.examples.values() for s in found)

    def _examples(self, classes: tuple[str, ...]) -> learners.Examples:
        place = {s: i for i, s in enumerate(self.support.specimen_ids)}
        pairs = [(place[s], c) for c, name in enumerate(classes) for s in self.examples[name]]
        rows, y = np.array(pairs, np.int64).T
        image = self.support.image_embedding
        assert image is not None, "examples are embedded"
        patients = np.array(self.support.patient_ids)[rows]
        return learners.Examples(image[rows].astype(np.float64), y, patients)


def _finite(learner: learners.Learner, given: learners.Examples, queries: np.ndarray) -> np.ndarray:
    """Scores, or NaN throughout where an embedding is not finite."""
    if not (np.isfinite(given.x).all() and np.isfinite(queries).all()):
        return np.full((len(queries), given.classes), np.nan)
    return learner(given, queries)

"""Few-shot classification as a task: who is an example, who is judged."""

from __future__ import annotations

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.errors import DataError
from slidevlm.eval import learners
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.prompts import Labels
from slidevlm.eval.tasks.few_shot import FewShot, FewShotFile, check_examples, resolve_examples
from slidevlm.eval.tasks.probe import fit_probes

LABELS = Labels("t", {f"s{i}": ("ab"[i % 2],) for i in range(40)})


def split_of(numbers: list[int]) -> Predictions:
    """Two specimens a patient; the class is in the first direction."""
    random = np.random.default_rng(0)
    everything = random.normal(size=(40, 4)) + 2 * np.eye(4)[0] * (np.arange(40)[:, None] % 2)
    names = tuple(f"s{i}" for i in numbers)
    patients = tuple(f"p{i // 2}" for i in numbers)
    image = everything[numbers].astype(np.float32)
    return Predictions(names, patients, names, np.arange(len(numbers)), image, None)


def test_examples_and_their_patients_are_not_judged() -> None:
    whole = split_of(list(range(30)))
    examples = {"a": ("s0", "s4"), "b": ("s1", "s7")}
    task = FewShot("few", split_of([7, 0, 1, 4, 9]), examples, LABELS, Bootstrap(20))
    result = task(whole)
    name = "few_shot/t/few/class_mean"
    # Patients p0 (s0, s1), p2 (s4, s5) and p3 (s6, s7) have given examples.
    judged = [i for i in range(30) if i // 2 not in (0, 2, 3)]
    assert result.details[name]["left_out"] == 6 and result.details[name]["specimens"] == 24
    assert result.details[name]["examples"] == {"a": 2, "b": 2}
    shown = split_of([0, 4, 1, 7])
    x = shown.image_embedding.astype(np.float64)
    given = learners.Examples(x, np.array([0, 0, 1, 1]), np.array(shown.patient_ids))
    queries = split_of(judged).image_embedding.astype(np.float64)
    guess = learners.class_mean(given, queries).argmax(1)
    expected = np.mean(guess == np.array(judged) % 2)
    assert result.metrics[f"{name}/accuracy"] == expected > 0.5
    column = result.columns[f"{name}/predicted"]
    assert [i for i in range(30) if column[i] == ""] == [0, 1, 4, 5, 6, 7]
    assert set(result.resampled) == set(result.metrics)


def test_nobody_left(caplog: pytest.LogCaptureFixture) -> None:
    task = FewShot("few", split_of([0, 1]), {"a": ("s0",), "b": ("s1",)}, LABELS)
    assert task(split_of([0, 1])).metrics == {}


def test_embeddings_that_are_not_finite_give_no_metric() -> None:
    whole = split_of(list(range(20)))
    whole.image_embedding[15] = np.nan
    task = FewShot("few", split_of([0, 1]), {"a": ("s0",), "b": ("s1",)}, LABELS)
    values = task(whole).metrics
    assert len(values) == 22 and np.isnan(list(values.values())).all()


def test_names_are_of_specimens_or_patients() -> None:
    of_patients = Labels("t", {f"s{i}": ("ab"[i // 2 % 2],) for i in range(40)})
    file = FewShotFile("few", {"a": ("s0", "p2"), "b": ("s2",)}, (of_patients,))
    found = resolve_examples(file, split_of([0, 1, 2, 4, 5]))
    assert found == {"a": ("s0", "s4", "s5"), "b": ("s2",)}


def test_a_patient_is_no_example_of_a_class_that_its_specimens_are_not_of() -> None:
    patients = {f"s{i}": f"p{i // 2}" for i in range(6)}
    twice = FewShotFile("few", {"a": ("p0",), "b": ("s1", "s2")}, ())
    with pytest.raises(
        DataError, match="'s1' of patient 'p0' is an example of 'b', but 'a' in few"
    ):
        check_examples(twice, patients)
    other = FewShotFile("few", {"a": ("s0", "p2"), "b": ("s1",)}, (LABELS,))
    with pytest.raises(DataError, match="'s5' of patient 'p2' is .* but 'b' in the label file t"):
        check_examples(other, patients)
    with pytest.raises(DataError, match="'s5'"):
        resolve_examples(other, split_of([0, 1, 4, 5]))
    check_examples(FewShotFile("few", {"a": ("s0", "s4"), "b": ("s1",)}, (LABELS,)), patients)


def test_what_was_dropped_as_bad(messages: pytest.LogCaptureFixture) -> None:
    file = FewShotFile("few", {"a": ("s0", "s2"), "b": ("s1",)}, (LABELS,))
    with pytest.raises(DataError, match="1 specimens have no features here, such as 's2'"):
        resolve_examples(file, split_of([0, 1]))
    found = resolve_examples(file, split_of([0, 1]), lenient=True)
    assert found == {"a": ("s0",), "b": ("s1",)}
    assert "1 could not be used, such as s2; the others are" in messages.text
    assert resolve_examples(file, split_of([0, 2]), lenient=True) == {}
    assert "the file is left out" in messages.text


def test_probes_of_one_class_are_left_out(messages: pytest.LogCaptureFixture) -> None:
    train = split_of(list(range(0, 20, 2)))
    assert fit_probes(train, (), LABELS, Bootstrap()) is None
    assert "the training split has 1 classes of t" in messages.text

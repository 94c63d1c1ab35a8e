"""METEOR by hand, against the formula, against the original program, and a recorded score."""

from __future__ import annotations

import gzip
import itertools
import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from slidevlm.errors import DataError
from slidevlm.eval.text_metrics import meteor
from slidevlm.eval.text_metrics.meteor import MeteorData, align, read_data


def score(candidate: str, reference: str, data: MeteorData = MeteorData()) -> float:  # noqa: B008
    return float(
        meteor.finish(meteor.statistics([candidate.split()], [reference.split()], data))[0]
    )


def test_by_hand() -> None:
    assert score("lung carcinoma", "lung carcinoma") == pytest.approx(1.0)
    assert score("lung", "breast") == 0 == score("", "breast") == score("lung", "")
    # Two of two words match, in one chunk; two of three of the reference.
    p, r = 1.0, 2 / 3
    mean = p * r / (0.85 * p + 0.15 * r)
    penalty = 0.6 * (1 / 2) ** 0.2
    assert score("lung carcinoma", "lung carcinoma left") == pytest.approx((1 - penalty) * mean)
    # Both words match, in two chunks.
    assert score("carcinoma lung", "lung carcinoma") == pytest.approx(1 - 0.6)


def test_stems_weigh_less_than_words_and_function_words_less_than_others() -> None:
    p = r = 1.6 / 2
    assert score("lung carcinomas", "lung carcinoma") == pytest.approx(0.8 * p * r / (p * r))
    one = (0.25 * 1 + 0.75 * 0) / 1.0  # "the" of "the lung"
    penalty = 0.6 * 1.0
    assert score("the lung", "the colon") == pytest.approx((1 - penalty) * one)


def slow(candidate: list[str], reference: list[str]) -> tuple[int, int, int]:
    """Best (matches, chunks, distance) over all ways to pair equal words."""
    best = (0, 0, 0)
    places = [[j for j, w in enumerate(reference) if w == word] for word in candidate]
    for chosen in itertools.product(*([None, *p] for p in places)):
        pairs = [(i, j) for i, j in enumerate(chosen) if j is not None]
        if len({j for _, j in pairs}) < len(pairs):
            continue
        chunks, end = 0, None
        for i, j in pairs:
            chunks += end != (i, j)
            end = (i + 1, j + 1)
        value = (-len(pairs), chunks, sum(abs(i - j) for i, j in pairs))
        best = min(best, value)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_alignment_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        a, b = ([draw.choice("pqrst") for _ in range(draw.randrange(7))] for _ in range(2))
        found = align(a, b)
        chunks, end = 0, None
        for match in found:
            assert a[match.start] == b[match.other]
            chunks += end != (match.start, match.other)
            end = (match.start + 1, match.other + 1)
        distance = sum(abs(m.start - m.other) for m in found)
        assert (-len(found), chunks, distance) == slow(a, b), (a, b)


def data_folder(folder: Path) -> Path:
    """Data in METEOR's form, of a few words."""
    (folder / "data").mkdir(parents=True)
    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\nof\n")
        jar.writestr("synonym/english.synsets", "tumor\n1 2\nneoplasm\n2 3\nlung\n9\n")
        jar.writestr("synonym/english.exceptions", "neoplasmata\nneoplasm\n")
    with gzip.open(folder / "data/paraphrase-en.gz", "wt") as file:
        file.write("0.5\nspread to\ninvolving\n")
    return folder


def test_synonyms_and_paraphrases_of_the_data(tmp_path: Path) -> None:
    data = read_data(data_folder(tmp_path / "meteor"))
    assert data.name == "meteor" and MeteorData().name == "meteor_exact_stem"
    assert data.function_words == {"the", "of"}
    assert score("tumor", "neoplasm") == 0
    assert score("tumor", "neoplasm", data) == pytest.approx(0.8)
    assert score("tumor", "neoplasmata", data) == pytest.approx(0.8)
    assert score("tumor", "lung", data) == 0
    phrase = align(["tumor", "spread", "to", "lung"], ["tumor", "involving", "lung"], data)
    assert [(m.start, m.length, m.other, m.other_length) for m in phrase] == [
        (0, 1, 0, 1), (1, 2, 1, 1), (3, 1, 2, 1)
    ]  # fmt: skip
    assert score("tumor spread to lung", "tumor involving lung", data) == pytest.approx(
        (p := 3.2 / 4) * (r := 2.6 / 3) / (0.85 * p + 0.15 * r)
    )


def test_data_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*meteor-1.5.jar; give the folder"):
        read_data(tmp_path)
    folder = data_folder(tmp_path / "meteor")
    (folder / "meteor-1.5.jar").write_text("nothing")
    with pytest.raises(DataError, match="cannot be read"):
        read_data(folder)


def jar_folder() -> Path:
    package = pytest.importorskip("pycocoevalcap.meteor")
    folder = Path(package.__path__[0])
    if shutil.which("java") is None or not (folder / "meteor-1.5.jar").is_file():
        pytest.skip("no Java or no METEOR here")
    return folder


def test_the_original_program(recorded, tmp_path: Path) -> None:
    """Equal on nearly all pairs; its beams sometimes miss the fewest chunks."""
    folder = jar_folder()
    pairs = [(a, b) for a, b in zip(*recorded, strict=True) if a and b][:400]
    for name, place in (("hyp", 0), ("ref", 1)):
        (tmp_path / name).write_text("".join(" ".join(p[place]).lower() + "\n" for p in pairs))
    command = ["java", "-jar", "meteor-1.5.jar", str(tmp_path / "hyp"), str(tmp_path / "ref")]
    command += ["-l", "en", "-m", "exact stem", "-w", "1.0 0.6"]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.splitlines()
    theirs = [float(x.split("\t")[-1]) for x in lines if x.startswith("Segment")]
    data = MeteorData(function_words=read_data(folder).function_words)
    lower = [[[w.lower() for w in p[i]] for p in pairs] for i in (0, 1)]
    ours = meteor.finish(meteor.statistics(*lower, data))
    assert len(theirs) == len(ours)
    assert (np.abs(ours - theirs) < 1e-6).mean() > 0.9
    assert np.abs(ours - theirs).max() < 0.03


def two_references(shared: Path, data: MeteorData) -> float:
    """METEOR of the recorded texts, by the better of two references."""
    folder = shared / "oracles/captions/nlg_eval"
    hyp, *refs = (
        [line.split() for line in (folder / name).read_text().splitlines()]
        for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    rows = np.stack([meteor.statistics(hyp, ref, data) for ref in refs])
    best = meteor.finish(rows).argmax(0)
    return float(meteor.finish(rows[best, np.arange(len(hyp))].sum(0)))


def test_recorded_score_without_data_is_near(shared: Path) -> None:
    """Words and stems alone, and another list of function words."""
    assert two_references(shared, MeteorData()) == pytest.approx(0.2673, abs=1e-4)


def test_recorded_score_with_data(shared: Path) -> None:
    found = two_references(shared, read_data(jar_folder()))
    assert found == pytest.approx(0.295797, abs=1e-6)

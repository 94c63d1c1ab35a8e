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
from slidevlm.eval.text_metrics.meteor import align
from slidevlm.eval.text_metrics.meteor_data import MeteorData, read_data


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


def slow(candidate: list[str], reference: list[str]) -> tuple[int, int]:
    """Best (matches, chunks) over all ways to pair equal words."""
    best = (0, 0)
    places = [[j for j, w in enumerate(reference) if w == word] for word in candidate]
    for chosen in itertools.product(*([None, *p] for p in places)):
        pairs = [(i, j) for i, j in enumerate(chosen) if j is not None]
        if len({j for _, j in pairs}) < len(pairs):
            continue
        best = min(best, (-len(pairs), count_chunks(pairs)))
    return best


def count_chunks(pairs: list[tuple[int, int]]) -> int:
    chunks, end = 0, None
    for i, j in sorted(pairs, key=lambda pair: pair[1]):
        chunks += end != (i, j)
        end = (i + 1, j + 1)
    return chunks


@pytest.mark.parametrize("seed", range(8))
def test_the_alignment_of_short_texts_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        a, b = ([draw.choice("pqrst") for _ in range(draw.randrange(6))] for _ in range(2))
        pairs = [(m.start, m.other) for m in align(a, b)]
        assert all(a[i] == b[j] for i, j in pairs)
        assert (-len(pairs), count_chunks(pairs)) == slow(a, b), (a, b)


def random_pairs(seed: int, n: int) -> list[tuple[list[str], list[str]]]:
    """Texts of few words, some with a common stem: many alignments, so the search matters."""
    draw = random.Random(seed)
    few = [
        "lung",
        "tumor",
        "tumors",
        "invasive",
        "invasion",
        "grade",
        "i",
        "the",
        "of",
        ",",
        ".",
        "3",
    ]
    found = []
    for _ in range(n):
        words = draw.sample(few, draw.randrange(4, len(few)))
        reference = [draw.choice(words) for _ in range(draw.randrange(1, 50))]
        kept = [word for word in reference if draw.random() < 0.8]
        other = [draw.choice(words) for _ in range(draw.randrange(1, 50))]
        candidate = (kept if draw.random() < 0.5 else other) or ["x"]
        if draw.random() < 0.3:
            draw.shuffle(candidate)
        found.append((candidate, reference))
    return found


# Of random_pairs(0, 16) by METEOR 1.5 (meteor-1.5.jar -l en -m "exact stem" -w "1.0 0.6").
RECORDED = [
    0.33055665707848747,
    0.3807164863515424,
    0.2804346975114393,
    0.3662010275715082,
    0.41501857995307945,
    0.4558330677197014,
    0.27203521284636883,
    0.46387028869801356,
    0.43161350474346005,
    0.4122929393395878,
    0.08768267223382048,
    0.30443901756562974,
    0.3550622342558517,
    0.3796764525609283,
    0.07129397940631724,
    0.3460172357267759,
]
RECORDED_CORPUS = 0.3491097790460977


def test_recorded_scores_of_the_original_program() -> None:
    """Not the best alignments but those that its search finds."""
    pairs = random_pairs(0, len(RECORDED))
    rows = meteor.statistics([a for a, _ in pairs], [b for _, b in pairs])
    np.testing.assert_allclose(meteor.finish(rows), RECORDED, atol=1e-12)
    assert meteor.finish(rows.sum(0)) == pytest.approx(RECORDED_CORPUS, abs=1e-12)


def data_folder(folder: Path) -> Path:
    """Data in METEOR's form, of a few words."""
    (folder / "data").mkdir(parents=True)
    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\nof\n")
        jar.writestr("synonym/english.synsets", "tumor\n1 2\nneoplasm\n2 3\nlung\n9\n")
        jar.writestr("synonym/english.exceptions", "neoplasm\nneoplasmata neoplasmen\n")
    with gzip.open(folder / "data/paraphrase-en.gz", "wt") as file:
        file.write("0.5\nspread to\ninvolving\n")
    return folder


def test_synonyms_and_paraphrases_of_the_data(tmp_path: Path) -> None:
    data = read_data(data_folder(tmp_path / "meteor"))
    assert data.name == "meteor" and MeteorData().name == "meteor_exact_stem"
    assert data.function_words == {"the", "of"}
    assert score("tumor", "neoplasm") == 0
    assert score("tumor", "neoplasm", data) == pytest.approx(0.8)
    assert score("tumor", "neoplasmata", data) == pytest.approx(0.8)  # irregular
    assert score("tumor", "neoplasms", data) == pytest.approx(0.8)  # regular
    assert score("tumor", "neoplasmas", data) == 0
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


def original(
    folder: Path, scratch: Path, pairs: list[tuple[list[str], list[str]]], *modules: str
) -> tuple[list[float], float]:
    """Scores of the pairs and of the corpus by METEOR 1.5 itself."""
    for name, place in (("hyp", 0), ("ref", 1)):
        (scratch / name).write_text("".join(" ".join(p[place]) + "\n" for p in pairs))
    command = ["java", "-jar", "meteor-1.5.jar", str(scratch / "hyp"), str(scratch / "ref")]
    command += ["-l", "en", *modules]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.splitlines()
    segments = [float(x.split("\t")[-1]) for x in lines if x.startswith("Segment")]
    return segments, next(float(x.split(":")[-1]) for x in lines if x.startswith("Final"))


EXACT_STEM = ("-m", "exact stem", "-w", "1.0 0.6")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["meteor_exact_stem", "meteor"])
def test_the_original_program(
    recorded: tuple[list[list[str]], list[list[str]]], tmp_path: Path, form: str
) -> None:
    """The same on every pair and on the corpus, with two of its modules and with all."""
    folder = jar_folder()
    data = MeteorData() if form == "meteor_exact_stem" else read_data(folder)
    assert data.name == form and MeteorData().function_words == read_data(folder).function_words
    lower = [tuple([w.lower() for w in text] for text in pair) for pair in zip(*recorded)]  # noqa: B905
    pairs = [(a, b) for a, b in lower if a and b] + random_pairs(1, 400)
    modules = EXACT_STEM if form == "meteor_exact_stem" else ()
    theirs, corpus = original(folder, tmp_path, pairs, *modules)
    rows = meteor.statistics([a for a, _ in pairs], [b for _, b in pairs], data)
    assert len(theirs) == len(rows) > 1300
    np.testing.assert_allclose(meteor.finish(rows), theirs, atol=1e-12)
    assert meteor.finish(rows.sum(0)) == pytest.approx(corpus, abs=1e-12)


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


@pytest.mark.slow
def test_recorded_score_with_data(shared: Path) -> None:
    found = two_references(shared, read_data(jar_folder()))
    assert found == pytest.approx(0.295797, abs=1e-6)

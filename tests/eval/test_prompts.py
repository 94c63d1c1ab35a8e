"""Prompt files and label files: every form, and what is said about those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slidevlm.errors import DataError
from slidevlm.eval.prompts import (
    Labels,
    Prompts,
    read_classes,
    read_examples,
    read_labels,
    read_prompts,
)

AB = Prompts(("A", "B"), (("a",), ("b",)))


def write(tmp_path: Path, content: Any, name: str = "file.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- prompts ---------------------------------------------------------------------------------


def test_one_prompt_a_class_sorted_by_class(tmp_path: Path) -> None:
    path = write(tmp_path, {"LUSC": "squamous", "LUAD": "adenocarcinoma"})
    assert read_prompts(path) == Prompts(("LUAD", "LUSC"), (("adenocarcinoma",), ("squamous",)))


def test_several_prompts_a_class_keep_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, {"2": ["z", "y", "z"], "1": "x"})
    assert read_prompts(path) == Prompts(("1", "2"), (("x",), ("z", "y", "z")))


@pytest.mark.parametrize("key", ["classes", "classnames"])
@pytest.mark.parametrize("place", ["CLASSNAME", "{}", "{class}"])
def test_every_template_is_filled_with_every_name(tmp_path: Path, key: str, place: str) -> None:
    content = {
        key: {"B": "beta", "A": ["alpha", "first"]},
        "templates": [f"{place}.", f"{place}, or {place}"],
    }
    filled = read_prompts(write(tmp_path, content))
    assert filled.classes == ("A", "B")
    assert filled.texts == (
        ("alpha.", "first.", "alpha, or alpha", "first, or first"),
        ("beta.", "beta, or beta"),
    )


def test_a_name_with_braces_is_put_in_as_it_is(tmp_path: Path) -> None:
    content = {"classes": {"A": "{} CLASSNAME {class}", "B": "b"}, "templates": "a CLASSNAME"}
    assert read_prompts(write(tmp_path, content)).texts[0] == ("a {} CLASSNAME {class}",)


def test_listed_classes_are_their_own_names(tmp_path: Path) -> None:
    content = {"classes": ["tumour", "normal"], "templates": "a slide of CLASSNAME"}
    assert read_prompts(write(tmp_path, content)) == Prompts(
        ("normal", "tumour"), (("a slide of normal",), ("a slide of tumour",))
    )


def test_a_class_may_be_called_classes(tmp_path: Path) -> None:
    path = write(tmp_path, {"classes": ["several"], "other": "one"})
    assert read_prompts(path) == Prompts(("classes", "other"), (("several",), ("one",)))


def test_conch_files_as_they_are(tmp_path: Path) -> None:
    sets = {
        "classnames": {"LUSC": ["squamous cell carcinoma", "LUSC"], "LUAD": ["adenocarcinoma"]},
        "templates": ["CLASSNAME.", "an H&E image of CLASSNAME."],
    }
    prompts = read_prompts(write(tmp_path, {"0": sets}))
    assert prompts.classes == ("LUAD", "LUSC")
    assert prompts.texts[0] == ("adenocarcinoma.", "an H&E image of adenocarcinoma.")
    assert len(prompts.texts[1]) == 4


TITAN = """
aggregation: slide
cohorts:
- TCGA
label_dict:
  AASTR: 0
  NO: 1
metric: bacc
num_classes: 2
prompts:
  NO:
  - "uterine malignant mixed M\\xFCllerian tumor"
  AASTR:
  - anaplastic astrocytoma
  - astrocytoma, anaplastic
"""


@pytest.mark.parametrize("ending", ["yaml", "yml"])
def test_titan_files_as_they_are(tmp_path: Path, ending: str) -> None:
    """YAML, its settings beside the prompts; a class NO is a name, not false."""
    assert read_prompts(write(tmp_path, TITAN, f"config.{ending}")) == Prompts(
        ("AASTR", "NO"),
        (
            ("anaplastic astrocytoma", "astrocytoma, anaplastic"),
            ("uterine malignant mixed Müllerian tumor",),
        ),
    )


def test_prompts_with_templates_beside_them(tmp_path: Path) -> None:
    content = {"prompts": {"A": ["x", "y"], "B": "z"}, "templates": ["CLASSNAME!"], "more": 1}
    assert read_prompts(write(tmp_path, content)).texts == (("x!", "y!"), ("z!",))


def test_byte_order_mark_and_white_space_are_harmless(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps({" A ": "a", "B": "b"}))
    assert read_prompts(path) == AB


def test_shared_prompt_files(shared: Path) -> None:
    one = read_prompts(shared / "data/tcga/class_prompt.json")
    many = read_prompts(shared / "data/tcga/class_prompts_ensemble.json")
    assert one.classes == many.classes and len(one.classes) == 15
    assert {len(texts) for texts in one.texts} == {1}
    assert all(len(texts) > 1 for texts in many.texts)
    assert not any("CLASSNAME" in t for texts in many.texts for t in texts)
    labels = read_labels(shared / "data/tcga/specimen_class.json", many)
    assert len(labels.classes) == 846 and labels.names == one.classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not JSON .*it must be a mapping of classes to prompts"),
        ([["A", "a"]], r"holds list; it must be a mapping of classes to prompts"),
        ({}, r"holds an empty dict; it must be a mapping"),
        ("null", r"holds NoneType; it must be a mapping"),
        ({"A": "a"}, r"at least 2 classes, it has 1; add the others"),
        ({"A": "a", "A ": "b"}, r"differ only by white space; keep one"),
        ({"A": [], "B": "b"}, r"A must be a text or a list of texts, none empty, not \[\]"),
        ({"A": " ", "B": "b"}, r"A must be a text or a list of texts, none empty"),
        ({"A": ["a", ""], "B": "b"}, r"A must be a text or a list"),
        ({"A": ["a", 3], "B": "b"}, r"A must be a text or a list"),
        ({"A": 1, "B": "b"}, r"A must be a text or a list of texts, none empty, not 1"),
        ({"A": {"x": "a"}, "B": "b"}, r"A must be a text or a list"),
        (
            {"classes": {"A": "a", "B": "b"}, "templates": ["CLASSNAME", "a slide"]},
            r"template 'a slide' has no place for the class; write CLASSNAME where it belongs",
        ),
        ({"classes": {"A": "a", "B": "b"}, "templates": []}, r"templates must be a text or a"),
        ({"classes": {"A": "", "B": "b"}, "templates": "{}"}, r"A must be a text or a list"),
        ({"classes": ["A", ""], "templates": "{}"}, r"classes must be a text or a list"),
        (
            {"classes": "A", "templates": "{}"},
            r"has the keys classes, templates; .*a mapping of classes to their names or a list",
        ),
        ({"templates": "{}", "A": "a"}, r"has the keys templates, A; beside 'templates'"),
        (
            {"classes": ["A", "B"], "templates": "{}", "C": "c"},
            r"has the keys classes, templates, C; .*'classes' alone",
        ),
    ],
)
def test_bad_prompts(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_bad_yaml_missing_file_and_wrong_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)p\.yaml is not YAML .*must be a mapping of classes"):
        read_prompts(write(tmp_path, "A: [a\nB: b", "p.yaml"))
    with pytest.raises(DataError, match=r"absent\.json cannot be read.*check the path"):
        read_prompts(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes('{"A": "\xe9", "B": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.json is not UTF-8.*save it as UTF-8"):
        read_prompts(tmp_path / "latin.json")


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"s1": "A", "s2": "B"}, "task.json"),
        ({"p1": {"s1": "A"}, "p2": {"s2": "B"}}, "task.json"),
        ({"p1": {"s1": "A"}, "s2": "B"}, "task.json"),
        ({" s1": "A ", "s2 ": " B"}, "task.json"),
        ("s1: A\ns2: B\n", "task.yaml"),
        ("specimen,label\ns1,A\ns2,B\n", "task.csv"),
        ("\ufeffother;Subtype;Case_ID\n1; A ; s1\n\n2;B;s2\n", "task.csv"),
        ("id\tclass\r\ns1\tA\r\ns2\tB\r\ns1\tA\r\n", "task.tsv"),
        ("slide_id,diagnosis\ns1,A\ns2,B", "task.CSV"),
        ("specimen_id,class,diagnosis\ns1,A,x\ns2,B,y", "task.csv"),
    ],
)
def test_every_form_of_labels(tmp_path: Path, content: Any, name: str) -> None:
    labels = read_labels(write(tmp_path, content, name), AB)
    assert labels == Labels("task", {"s1": ("A",), "s2": ("B",)})


def test_classes_are_text(tmp_path: Path) -> None:
    numbers = Prompts(("0", "1"), (("a",), ("b",)))
    assert read_labels(write(tmp_path, {"s": 1}), numbers).classes == {"s": ("1",)}
    assert read_labels(write(tmp_path, "id,label\ns,1\n", "t.csv"), numbers).classes == {
        "s": ("1",)
    }


def test_patients_that_share_a_specimen_name_are_told_apart(tmp_path: Path) -> None:
    content = {"p1": {"s1": "A", "s2": "A"}, "p2": {"s1": "B"}}
    labels = read_labels(write(tmp_path, content), AB)
    assert labels.classes == {"p1/s1": ("A",), "p2/s1": ("B",), "s2": ("A",)}
    # Specimens are called so too where the data shares the name, and plainly where it does not.
    assert labels.of("p1/s1", "p1") == ("A",) and labels.of("p2/s1", "p2") == ("B",)
    assert labels.of("s1", "p2") == ("B",)
    assert labels.of("s2", "p9") == ("A",)
    mixed = read_labels(write(tmp_path, {"p1": {"s1": "A"}, "s1": "B"}), AB)
    assert mixed.of("s1", "p1") == ("A",) and mixed.of("s1", "p2") == ("B",)
    assert labels.of("s1", "p3") is None and labels.of("s3", "p1") is None


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("[", "f.json", r"is not JSON .*it must be a mapping of specimens to classes"),
        ("a: [", "f.yaml", r"(?s)is not YAML .*it must be a mapping of specimens to classes"),
        (["s1"], "f.json", r"holds list; it must be a mapping of specimens to classes"),
        ({}, "f.json", r"holds an empty dict; it must be a mapping of specimens"),
        (
            {"s1": "A", "s2": "C", "s3": ""},
            "f.json",
            r"classes without a prompt: '' \(of 's3'\), 'C' \(of 's2'\); the prompts are for A, B; "
            "add a prompt or leave",
        ),
        ({"s1": None}, "f.json", r"without a prompt: '' \(of 's1'\)"),
        ({"A": ["s1", "s2"]}, "f.json", r"without a prompt: .*s1.*\(of 'A'\)"),
        ({"p": {"s1": {"x": "A"}}}, "f.json", r"without a prompt: .*\(of 's1'\)"),
        ("id,label\ns1,A\ns1,B\n", "f.csv", r"two classes for 's1': 'A' and 'B'; keep one"),
        ("id,label\ns1,\n", "f.csv", r"classes without a prompt: '' \(of 's1'\)"),
        ("id,label\n", "f.csv", r"has a header but no rows; write a specimen and its class"),
        ("", "f.csv", r"needs a column specimen or .* and a column label or .*; it has "),
        ("id,value\ns1,A\n", "f.csv", r"a column label or class .*; it has id, value"),
        ("name,label\ns1,A\n", "f.csv", r"a column specimen or specimen_id .*; it has name, label"),
    ],
)
def test_bad_labels(tmp_path: Path, content: Any, name: str, message: str) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(DataError, match=message) as caught:
        read_labels(path, AB)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"s1": "A", "s2": None}, "f.json"),
        ({"s1": ["A"], "s2": ["B", " "]}, "f.json"),
        ("id,label\ns1,A\ns2,\n", "f.csv"),
    ],
)
def test_without_prompts_an_empty_class_is_none(tmp_path: Path, content: Any, name: str) -> None:
    """Of few-shot examples and probes: what is not known would be a class of its own."""
    with pytest.raises(DataError, match=r"f\.\w+: 1 specimens have an empty class, such as 's2'"):
        read_labels(write(tmp_path, content, name))


def test_ten_strange_classes_are_enough(tmp_path: Path) -> None:
    path = write(tmp_path, {f"s{i}": f"C{i:02}" for i in range(30)})
    with pytest.raises(DataError) as caught:
        read_labels(path, AB)
    assert "C09" in str(caught.value) and "C10" not in str(caught.value)


def test_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv cannot be read"):
        read_labels(tmp_path / "absent.csv", AB)


def test_numbered_ensembles_are_one_and_are_remembered(tmp_path: Path) -> None:
    """MI-Zero's form."""
    content = {
        "0": {
            "classnames": {"A": "an a", "B": "a b"},
            "templates": ["CLASSNAME.", "see CLASSNAME"],
        },
        "1": {"classnames": {"B": "bee", "A": "an a"}, "templates": ["CLASSNAME."]},
    }
    found = read_prompts(write(tmp_path, content))
    assert found.classes == ("A", "B")
    assert found.texts == (("an a.", "see an a"), ("a b.", "see a b", "bee."))
    assert found.sets == (
        (("an a.", "see an a"), ("a b.", "see a b")),
        (("an a.",), ("bee.",)),
    )
    content["1"]["classnames"] = {"A": "an a", "C": "sea"}
    with pytest.raises(DataError, match="numbered ensembles differ in their classes"):
        read_prompts(write(tmp_path, content))


def test_lists_of_classes_are_a_multi_label_task(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, {"s1": ["A", "B"], "s2": [], "s3": "B"}), AB)
    assert labels.several and labels.of("s1", "p") == ("A", "B")
    assert labels.of("s2", "p") == () and labels.of("s3", "p") == ("B",)
    with pytest.raises(DataError, match=r"classes without a prompt: 'C' \(of 's1'\)"):
        read_labels(write(tmp_path, {"s1": ["A", "C"]}), AB)
    with pytest.raises(DataError, match="here every specimen must have one class"):
        read_classes(write(tmp_path, {"s1": ["A"]}))


def test_labels_without_prompts_may_have_any_class(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, {"s1": "Z", "s2": "A", "s3": "Z"}))
    assert labels.names == ("A", "Z") and not labels.several


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"A": ["s"]}, "examples of 1 class"),
        ({"A": ["s"], "B": []}, "B must be a text or a list"),
        ({"A": ["s"], "B": ["t", " s"]}, "'s' is an example of both 'A' and 'B'"),
        (["s"], "mapping of classes to lists"),
    ],
)
def test_bad_examples(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path, content))


def test_examples(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, {"A": ["s1", "s1 ", "s2"], "B": "s3"}))
    assert found == {"A": ("s1", "s2"), "B": ("s3",)}

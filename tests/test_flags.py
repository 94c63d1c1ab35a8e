"""Declarations <-> words <-> YAML: round trips, spellings, hints. What each holds: test_config."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slidevlm.config import GROUPS, Config, arg, with_values
from slidevlm.errors import ConfigError
from slidevlm.flags import (
    Argument,
    arguments,
    parse,
    parse_config,
    parse_into,
    parse_key_values,
    read_yaml,
    to_yaml,
)

ARGUMENTS = {a.name: a for a in arguments()}
ids = {"ids": lambda a: a.flag}


def parsed(*words: str) -> Config:
    return parse_config(list(words))[0]


def value_in(config: Config, a: Argument) -> Any:
    return getattr(getattr(config, a.group), a.name)


# One value of each kind that is no argument's default, and how it is typed.
TYPED: dict[str, tuple[Any, list[str]]] = {
    "str": ("some text", ["some text"]),
    "int": (7, ["7"]),
    "float": (0.375, ["0.375"]),
    "switch": (True, []),
    "list[str]": (("a.txt", "b c.txt"), ["a.txt", "b c.txt"]),
    "key=value...": ({"p": 0.5, "kind": "flip"}, ["p=0.5", "kind=flip"]),
}


def typed(a: Argument) -> tuple[Any, list[str]]:
    if a.spec.choices:
        choice = next(c for c in a.spec.choices if c != a.default)
        return choice, [choice]
    return TYPED[a.kind]


@pytest.mark.parametrize("a", ARGUMENTS.values(), **ids)
def test_every_argument_in_every_spelling(a: Argument) -> None:
    value, words = typed(a)
    for flag in {a.flag, a.flag.replace("_", "-"), "--" + a.flag[2:].replace("-", "_")}:
        config = parsed(flag, *words)
        assert value_in(config, a) == value
        assert config.given == {a.name}
        others = [b for b in ARGUMENTS.values() if b.name != a.name]
        assert all(value_in(config, b) == b.default for b in others)


@pytest.mark.parametrize("a", ARGUMENTS.values(), **ids)
def test_no_abbreviation_is_an_argument(a: Argument) -> None:
    _, words = typed(a)
    spellings = {b.flag.replace("_", "-") for b in ARGUMENTS.values()}
    short = a.flag[:-1]
    if short.replace("_", "-") in spellings:
        pytest.skip("the abbreviation is another argument")
    with pytest.raises(ConfigError, match="unrecognized arguments"):
        parsed(short, *words)


@pytest.mark.parametrize("a", ARGUMENTS.values(), **ids)
def test_every_argument_through_a_file(a: Argument, tmp_path: Path) -> None:
    value, words = typed(a)
    config = parsed(a.flag, *words)
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    again = parsed("--config", str(file))
    if a.name in ("name", "resume"):
        assert again.given == frozenset(), "of one run: not for the next"
    else:
        assert value_in(again, a) == value
        assert again.given == {a.name}


@pytest.mark.parametrize("a", [a for a in ARGUMENTS.values() if a.kind == "switch"], **ids)
def test_the_command_line_undoes_a_switch_of_the_file(a: Argument, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{a.name}: true\n")
    undo = "--" + a.flag[5:] if a.flag.startswith("--no-") else "--no-" + a.flag[2:]
    assert value_in(parsed("--config", str(file)), a) is True
    assert value_in(parsed("--config", str(file), undo), a) is False
    assert value_in(parsed(undo, "--config", str(file)), a) is False, "wherever it stands"


def test_the_command_line_wins_in_any_order_and_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 7\nepochs: 3\nval_split: [x.txt, y.txt]\n")
    first, second = ["--config", str(file)], ["--batch-size=9"]
    for words in (first + second, second + first):
        config = parsed(*words, "--val-split", "z.txt")
        assert (config.data.batch_size, config.optim.epochs) == (9, 3)
        assert config.data.val_split == ("z.txt",), "a list replaces, it does not add"
        assert config.given == {"batch_size", "epochs", "val_split"}


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
by_kind: dict[str, st.SearchStrategy[Any]] = {
    "str": text,
    "int": st.integers(-(10**12), 10**12),
    "float": st.floats(allow_nan=False),
    "switch": st.booleans(),
    "list[str]": st.lists(text, min_size=1, max_size=4).map(tuple),
    "key=value...": st.dictionaries(
        text, st.one_of(st.none(), st.booleans(), st.integers(), text, st.lists(text, max_size=2))
    ),
}
FILED = [a for a in ARGUMENTS.values() if not a.spec.choices]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=st.fixed_dictionaries({}, optional={a.name: by_kind[a.kind] for a in FILED}))
@example(values={"name": "two\nlines", "resume": "a\nbatch_size: 3", "batch_size": 5})
@example(values={"train_split": "1e3", "test_split": "null", "model": "2024-02-30", "lr": 1e-8})
@example(values={"val_split": ("a: b", "# c", "- d", "é", "x" * 11_000, " e ")})
def test_any_configuration_survives_its_file(tmp_path: Path, values: dict[str, Any]) -> None:
    config = with_values(Config(), values)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = with_values(Config(), read_yaml(file))
    kept = {k: v for k, v in values.items() if k not in ("name", "resume")}
    assert again == with_values(Config(), kept)


def test_the_file_shows_every_argument_with_its_group() -> None:
    shown = to_yaml(Config())
    assert yaml.safe_load(shown) is None, "all are defaults, all are comments"
    uncommented = "\n".join(
        line[2:] for line in shown.splitlines() if line.startswith("# ") and ": " in line
    )
    assert list(yaml.safe_load(uncommented)) == list(ARGUMENTS)
    assert [line[2:] for line in shown.splitlines() if line[2:] in GROUPS] == list(GROUPS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1\nlr: 2\n", "lr given twice"),
        ("batch-size: 1\nbatch_size: 2\n", "batch_size given twice"),
        ("name: 2024-02-30\n", "not plain YAML"),
        ("epochs: 2.5\n", "epochs must be a whole number, not 2.5"),
        ("lr: fast\n", "lr must be a number, not 'fast'"),
        ("val_split: 3\n", "val_split must be a file name or a list of them"),
        ("aug_cfg: [a]\n", "aug_cfg must be a mapping"),
        ("batch_size: null\n", "batch_size must be a whole number, not None"),
        ("name: [a]\n", "name must be text"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)


def test_keys_and_values_of_a_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    """YAML reads 1e-2 as text."""
    words = ["transform_type=random_flip,feature_noise", "probability=1", "noise_std=1e-2"]
    file = tmp_path / "c.yaml"
    file.write_text("aug_cfg:\n" + "".join(f"  {word.replace('=', ': ')}\n" for word in words))
    expected = parsed("--aug-cfg", *words).data.aug_cfg
    assert parsed("--config", str(file)).data.aug_cfg == expected
    assert expected["noise_std"] == 0.01


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    for path in (tmp_path / "nowhere.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            read_yaml(path)
        assert str(path) in str(caught.value)


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# all defaults\n")
    assert read_yaml(tmp_path / "c.yaml") == {}


# --- words that are nobody's ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("--batch-sise", "--batch-size"),
        ("--batch", "--batch-size"),
        ("--hdf5_filenam=x", "--hdf5_filename"),
        ("--train_splits", "--train-split"),
        ("--siglp", "--siglip"),
        ("--no-set-device", "--no-set-device-rank"),
        ("--learning-rate", "--lr"),  # by its help
    ],
)
def test_an_unknown_flag_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(wrong, "3")
    hint = str(caught.value).partition("did you mean ")[2].partition("?")[0]
    assert near in hint.split(" or ")
    assert "see slidevlm train --help" in str(caught.value)


def test_what_resembles_little_is_not_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("--lrr", "3")
    assert "did you mean --lr?" in str(caught.value)


def test_help_never_breaks_an_argument_at_its_hyphens(capsys) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    told = capsys.readouterr().out
    assert "--lock-image" in told and not re.search(r"\w-\n", told)


def test_words_that_resemble_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("--qqqq", "--epochs", "3", "stray")
    assert "unrecognized arguments: --qqqq stray\n" in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--val-split"], "--val-split: expected at least one argument"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--siglip=yes"], "--siglip: ignored explicit argument 'yes'"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_values_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert message in str(caught.value)


# --- key=value ------------------------------------------------------------------------------


def test_key_values_by_hand() -> None:
    words = ["a=1", "b=1e-3", "c=[1, 2]", "d=a=b", "e=", "f='1'", "g=None", "h=x y", "i={[]: 1}"]
    assert parse_key_values(words) == {
        "a": 1,
        "b": 1e-3,
        "c": [1, 2],
        "d": "a=b",
        "e": "",
        "f": "1",
        "g": None,
        "h": "x y",
        "i": "{[]: 1}",
    }


@settings(deadline=None)
@given(key=st.text("abc_", min_size=1), value=st.text(max_size=30))
@example(key="a", value="-" * 100_000 + "1")
@example(key="a", value="(" * 1_000)
@example(key="a", value="9" * 5_000)
@example(key="a", value="__import__('os').getcwd()")
def test_any_value_is_a_literal_or_itself(key: str, value: str) -> None:
    result = parse_key_values([f"{key}={value}"])[key]
    if result != value:
        assert ast.literal_eval(value) == result or result != result


@pytest.mark.parametrize(
    ("words", "message"),
    [(["=3"], "'=3' is not of the form"), (["a"], "'a'"), (["a=1", "a=2"], "'a' is given twice")],
)
def test_key_values_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_key_values(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--val-split", "a.txt", "--val-split", "b.txt"],
        ["--val-split", "a.txt", "--val_split=b.txt"],
        ["--aug-cfg", "transform_type=random_flip", "--aug-cfg", "probability=0.3"],
        ["--zsc-class-prompt-mapping", "a", "--zsc-class-prompt-mapping", "b"],
    ],
)
def test_several_values_stand_after_one_flag(words: list[str]) -> None:
    """The second flag would have put the first one's values out of the way, without a word."""
    with pytest.raises(ConfigError, match=f"{words[0]} is given twice; write all its values after"):
        parsed(*words)


def test_there_is_one_file_of_arguments() -> None:
    with pytest.raises(ConfigError, match="--config is given twice; leave one out"):
        parsed("--config", "a.yaml", "--config", "b.yaml")


def test_of_a_flag_with_one_value_the_last_counts() -> None:
    """So that what a script ends with can be appended to."""
    assert parsed("--batch-size", "3", "--batch_size", "5").data.batch_size == 5


# --- other commands -------------------------------------------------------------------------


@dataclass(frozen=True)
class Few:
    """arguments: of a command with few."""

    place: str = arg("", "where", positional=True)
    count: int = arg(3, "how many", minimum=2)
    share: float = arg(0.5, "what part", above=0.0, below=1.0)
    loud: bool = arg(False, "say so")


def test_a_command_with_arguments_of_its_own() -> None:
    assert parse_into(Few, ["here", "--count", "4", "--loud"], "x", "") == Few("here", 4, 0.5, True)
    assert parse_into(Few, ["here"], "x", "") == Few("here")
    assert parse(["there"], "x", {"arguments": Few}, "") == {"place": "there"}


def test_ranges_hold_there_too_and_all_problems_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_into(Few, ["here", "--count", "1", "--share", "1"], "x", "")
    assert "--count must be at least 2, not 1" in str(caught.value)
    assert "--share must be less than 1, not 1.0" in str(caught.value)


def test_a_positional_may_stand_before_arguments_of_training() -> None:
    config, others = parse_config(["run", "--batch-size", "3"], positional=Few)
    assert others == {"place": "run"} and config.given == {"batch_size"}
    assert config == with_values(Config(), {"batch_size": 3})


def test_help_names_kind_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_into(Few, ["-h"], "x", "D")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: x PLACE [--argument value ...]" in shown and "--count N" in shown
    assert "how many (default: 3)" in shown and "--no-loud" not in shown


@dataclass(frozen=True)
class _Places:
    """arguments: places."""

    run: str = arg("", "needed", positional=True)
    other: str | None = arg("", "or not", positional=True)
    folder: str = arg("demo", "has a default", positional=True)


def test_usage_has_brackets_where_a_word_may_be_left_out(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], "prog", {"arguments": _Places}, "what it does")
    assert capsys.readouterr().out.splitlines()[0] == (
        "usage: prog RUN [OTHER] [FOLDER] [--argument value ...]"
    )


def test_a_missing_word_is_named() -> None:
    with pytest.raises(ConfigError, match=r"required: RUN\nsee prog --help"):
        parse([], "prog", {"arguments": _Places}, "what it does")
    assert parse(["a"], "prog", {"arguments": _Places}, "what it does") == {"run": "a"}

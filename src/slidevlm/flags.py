"""Dataclasses of arguments <-> command line <-> YAML, and the table in docs/arguments.md.

The only module that knows a command line parser.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from slidevlm.config import (
    GROUPS,
    Config,
    Spec,
    arg,
    declarations,
    flag_of,
    validate_arguments,
    with_values,
)
from slidevlm.documents import DocumentError, yaml_keys, yaml_of
from slidevlm.errors import ConfigError
from slidevlm.registry import nearest, unknown

G = TypeVar("G")


@dataclass(frozen=True)
class Argument:
    """One declaration, ready for a parser."""

    name: str
    flag: str
    kind: str  # str, int, float, switch, list[str], list[float], key=value...
    default: Any
    spec: Spec
    group: str
    may_be_none: bool = False

    @property
    def required(self) -> bool:
        """Of a positional: whether the command cannot do without it."""
        return self.default == "" and not self.may_be_none

    @property
    def usage(self) -> str:
        """A positional in a line of usage: in brackets where it may be left out."""
        return self.flag if self.required else f"[{self.flag}]"


def kind_of(annotation: Any) -> str:
    """Type annotation -> the word of flags.json: `int | None` -> "int"."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if annotation is bool:
        return "switch"
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return f"list[{typing.get_args(annotation)[0].__name__}]"
    if origin is not None and issubclass(origin, Mapping):
        return "key=value..."
    return str(annotation.__name__)


def arguments(groups: Mapping[str, type] = GROUPS) -> tuple[Argument, ...]:
    """Every argument of the groups, in order."""
    found = []
    for group, cls in groups.items():
        hints = typing.get_type_hints(cls)
        for name, default, spec in declarations(cls):
            flag = name.upper() if spec.positional else flag_of(name, spec)
            optional = type(None) in typing.get_args(hints[name])
            kind = kind_of(hints[name])
            found.append(Argument(name, flag, kind, default, spec, group, optional))
    return tuple(found)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\nsee {self.prog} --help")


class _Once(argparse.Action):
    """A flag that stands there once. Of two the values of the first would be gone, unsaid."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            remedy = "leave one out" if self.nargs is None else "write all its values after one"
            parser.error(f"{option_string} is given twice; {remedy}")
        setattr(namespace, self.dest, values)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        # Broken at its hyphens, --lock-image reads as "--lock- image" and cannot be copied.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 100)
    return _Formatter(prog, max_help_position=34, width=width)


def _help(argument: Argument) -> str:
    spec = argument.spec
    default = spec.default_text or argument.default
    text = spec.help.replace("%", "%%")
    if argument.kind != "switch" and default not in (None, "", {}, ()):
        return f"{text} (default: {default})"
    return f"{text} (may be left out)" if spec.positional and not argument.required else text


def _add(parser: Any, argument: Argument) -> None:
    spec, kind = argument.spec, argument.kind
    options: dict[str, Any] = {"help": _help(argument), "default": argparse.SUPPRESS}
    if spec.positional:
        if not argument.required:
            options["nargs"] = "?"
        if spec.choices:
            options["choices"] = spec.choices
        parser.add_argument(argument.name, metavar=argument.flag, **options)
        return
    if kind == "switch":
        parser.add_argument(
            argument.flag, *spec.also, dest=argument.name, action="store_true", **options
        )
        # The only way to undo a switch that a --config file sets.
        parser.add_argument(
            _negated(argument.flag),
            dest=argument.name,
            action="store_false",
            help=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
        )
        return
    if spec.choices:
        options |= {"choices": spec.choices}
    if spec.once:
        options |= {"action": _Once}
    if kind == "list[str]":
        options |= {"nargs": "+", "action": _Once, "metavar": "FILE" if spec.file else "TEXT"}
    elif kind == "list[float]":
        options |= {"nargs": "+", "action": _Once, "metavar": "X", "type": float}
    elif kind == "key=value...":
        options |= {"nargs": "+", "action": _Once, "metavar": "KEY=VALUE"}
    else:
        numbers: dict[str, Any] = {"int": int, "float": float}
        options |= {"type": numbers.get(kind, str)}
        if not spec.choices:
            options["metavar"] = {"int": "N", "float": "X"}.get(
                kind, "FILE" if spec.file else "TEXT"
            )
    parser.add_argument(argument.flag, *spec.also, dest=argument.name, **options)


def _negated(flag: str) -> str:
    return "--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:]


LIST = "--list-arguments"  # what completion asks of a command in the place of running it


class Listed(Exception):  # noqa: N818 (no error)
    """The answer to `LIST`: what a command takes."""

    def __init__(self, known: Sequence[Argument]) -> None:
        super().__init__("the arguments of a command")
        self.arguments = tuple(known)


def declared(command: Callable[[Sequence[str]], Any]) -> tuple[Argument, ...]:
    """The arguments that a command takes; it is not run."""
    try:
        command([LIST])
    except Listed as answer:
        return answer.arguments
    raise AssertionError("every command parses its words before anything else")


def parse(
    argv: Sequence[str], prog: str, groups: Mapping[str, type], description: str, epilog: str = ""
) -> dict[str, Any]:
    """Parse a command line into {field name: value}, only what was given.

    Underscores and hyphens are the same in a flag's name; abbreviations are refused.

    Raises:
        ConfigError: for anything the declarations do not allow.
        Listed: the only word is `LIST`.
    """
    known = arguments(groups)
    if list(argv) == [LIST]:
        raise Listed(known)
    positional = "".join(f" {a.usage}" for a in known if a.spec.positional)
    parser = _Parser(
        prog=prog,
        usage=f"{prog}{positional} [--argument value ...]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=_formatter,
    )
    sections: dict[str, Any] = {}
    for argument in known:
        if argument.group not in sections:
            doc = (groups[argument.group].__doc__ or "").partition(": ")[2].rstrip(".")
            sections[argument.group] = parser.add_argument_group(argument.group, doc)
        _add(sections[argument.group], argument)
    spellings = {
        flag.replace("_", "-"): flag
        for a in known
        if not a.spec.positional
        for flag in (a.flag, *a.spec.also, _negated(a.flag))
    }
    found, stray = parser.parse_known_args([_canonical(word, spellings) for word in argv])
    if stray:
        parser.error(_stray(stray, known))
    values = vars(found)
    kinds = {a.name: a.kind for a in known}
    return {name: _finish(kinds[name], value) for name, value in values.items()}


def _canonical(word: str, spellings: Mapping[str, str]) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return spellings.get(name.replace("_", "-"), name) + equals + value


def _stray(words: Sequence[str], known: Sequence[Argument]) -> str:
    """What to say of words that no argument takes."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    help_of = {a.flag: a.spec.help for a in known if not a.spec.positional}
    hints = [f"; for {f}, did you mean {near}?" for f in flags if (near := _meant(f, help_of))]
    return f"unrecognized arguments: {' '.join(words)}{''.join(hints)}"


def _meant(flag: str, help_of: Mapping[str, str]) -> str:
    """The flags that look like it, else those whose help says it: --learning-rate is --lr."""
    word = flag.lstrip("-").replace("_", "-")
    near = nearest(word, [f.lstrip("-") for f in help_of])
    if near:
        return " or ".join(f"--{name}" for name in near)
    return " or ".join([f for f, text in help_of.items() if word.replace("-", " ") in text][:3])


def _finish(kind: str, value: Any) -> Any:
    if kind in ("list[str]", "list[float]"):
        return tuple(value)
    if kind == "key=value...":
        return parse_key_values(value)
    return value


def parse_key_values(words: Sequence[str]) -> dict[str, Any]:
    """`["p=0.5", "path=a/b=c"]` -> `{"p": 0.5, "path": "a/b=c"}`.

    Values are Python literals where they read as such, else strings.
    """
    result: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"{word!r} is not of the form key=value")
        if key in result:
            raise ConfigError(f"{key!r} is given twice; leave one out")
        result[key] = _literal(text)
    return result


def _literal(text: str) -> Any:
    """A Python literal where the text reads as such, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def parse_into(
    group: type[G], argv: Sequence[str], prog: str, description: str, epilog: str = ""
) -> G:
    """Command line of a command with a few arguments of its own -> an instance of `group`.

    Raises:
        ConfigError: also for values out of the declared ranges, all in one message.
    """
    found = parse(argv, prog, {"arguments": group, "faults": _Faults}, description, epilog)
    found.pop("debug", None)  # `main` looks for the word itself
    values = group(**found)
    validate_arguments(values)
    return values


@dataclass(frozen=True)
class _Faults:
    """faults: what is told of an error."""

    debug: bool = arg(False, "show the traceback of an error")


TRAIN_HELP = "Train a vision-language model of whole slides on bags of tile features and reports."
TRAIN_EPILOG = """\
Underscores and hyphens are the same. --no-NAME undoes a switch that --config sets.

example:
  slidevlm train --hdf5_filename cohort.h5 --hdf5_feature_attribute uni \\
      --hdf5_text_attribute report --train-split train.txt --val-split val.txt --name first
"""


@dataclass(frozen=True)
class _ConfigFile:
    """config: a file of arguments."""

    config: str | None = arg(
        None, "YAML file of arguments; the command line wins", file=True, once=True, extra=True
    )


def parse_config(
    argv: Sequence[str],
    prog: str = "slidevlm train",
    description: str = TRAIN_HELP,
    epilog: str = TRAIN_EPILOG,
    positional: type | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Command line (and its --config file) -> Config, and the values of `positional`'s fields."""
    first: dict[str, type] = {} if positional is None else {"arguments": positional}
    values = parse(argv, prog, {**first, "config": _ConfigFile, **GROUPS}, description, epilog)
    others = {a.name for a in arguments(first)}
    config = Config()
    path = values.pop("config", None)
    if path is not None:
        config = with_values(config, read_yaml(Path(path)))
    mine = {k: v for k, v in values.items() if k not in others}
    return with_values(config, mine), {k: v for k, v in values.items() if k in others}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a --config file into {field name: value}.

    Raises:
        ConfigError: unreadable, not a mapping, an unknown name, a value of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml_of(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except DocumentError as error:
        raise ConfigError(f"--config {path} is not plain YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of argument names to values")
    values = read_values(content, f"--config {path}")
    # Of two equal keys the last was kept, without a word.
    written = [_field(key) for key in yaml_keys(text)]
    twice = sorted({name for name in written if written.count(name) > 1})
    if twice:
        raise ConfigError(f"--config {path}: {', '.join(twice)} given twice; leave one out")
    return values


def read_values(content: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """{argument: value} of a file or a program -> {field name: value}.

    Args:
        content: by name, with hyphens or underscores; file names may be `Path`s.
        where: it comes from, for messages.

    Raises:
        ConfigError: an unknown name, one given twice, a value of the wrong type.
    """
    known = {a.name: a for a in arguments()}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = _field(key)
        if name not in known:
            raise ConfigError(f"{where}: {unknown('argument', name, known)}")
        if name in values:
            raise ConfigError(f"{where}: {name} given twice; leave one out")
        values[name] = _typed(known[name], _plain(value), where)
    return values


def _plain(value: Any) -> Any:
    """What programs give beside what YAML has: paths and tuples."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _field(key: object) -> str:
    return str(key).lstrip("-").replace("-", "_")


def _typed(argument: Argument, value: Any, where: str) -> Any:
    """Check and convert a YAML value (YAML reads 5e-4 as text, and one file name as text)."""
    kind = argument.kind
    if value is None:
        if argument.name == "logs":
            return "None"
        if argument.default is None:
            return None
    elif kind == "switch" and isinstance(value, bool):
        return value
    elif kind == "list[str]" and isinstance(value, (str, list)):
        return (value,) if isinstance(value, str) else tuple(str(v) for v in value)
    elif kind == "key=value..." and isinstance(value, dict):
        return {key: _literal(one) if isinstance(one, str) else one for key, one in value.items()}
    elif kind == "str" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif kind == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError(f"{where}: {argument.name} must be {_KIND_WORDS[kind]}, not {value!r}")


_KIND_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "switch": "true or false",
    "list[str]": "a file name or a list of them",
    "key=value...": "a mapping",
}

# A run's own: repeated as they are they would stop the next run, or continue the wrong one.
_OF_ONE_RUN = ("name", "resume")


def to_yaml(config: Config) -> str:
    """The resolved configuration as a --config file that can be run again as it is.

    What was neither given nor resolved stands as a comment, since giving a flag can mean
    more than its value (a given --device cuda must exist, the default one need not).
    """
    import yaml

    lines = ["# slidevlm train --config THIS_FILE repeats the run; # marks defaults."]
    for group in GROUPS:
        lines += ["", f"# {group}"]
        for argument in (a for a in arguments() if a.group == group):
            value = getattr(getattr(config, group), argument.name)
            plain = list(value) if isinstance(value, tuple) else value
            plain = dict(plain) if isinstance(plain, Mapping) else plain
            shown = yaml.safe_dump(plain, default_flow_style=True, width=10_000, sort_keys=False)
            text = f"{argument.name}: {shown.removesuffix('...' + chr(10))}"
            if argument.name in _OF_ONE_RUN or (
                value == argument.default and argument.name not in config.given
            ):
                text = "# " + text.rstrip("\n").replace("\n", "\n# ")
            lines.append(text.rstrip("\n"))
    return "\n".join(lines) + "\n"


def markdown_table() -> str:
    """The table of docs/arguments.md: one row an argument, a section a group."""
    parts = [
        "# Arguments of `slidevlm train`",
        "",
        "Generated from `src/slidevlm/config.py` by `python -m slidevlm.flags`; do not edit. At",
        "the end stands where each takes effect, and which tests show it.",
        "Beside the 85 of the specification there are a few more, marked +.",
    ]
    for group, cls in GROUPS.items():
        parts += ["", f"## {(cls.__doc__ or group).rstrip('.')}", ""]
        parts += ["| argument | type | default | effect |", "|---|---|---|---|"]
        for a in (a for a in arguments() if a.group == group):
            default = a.spec.default_text or ("" if a.default in (None, "", {}) else a.default)
            mark = " +" if a.spec.extra else ""
            choices = f" ({', '.join(a.spec.choices)})" if a.spec.choices else ""
            parts.append(f"| `{a.flag}`{mark} | {a.kind}{choices} | {default} | {a.spec.help} |")
    return "\n".join(parts) + "\n"


def markdown_effects(effects: Mapping[str, Any]) -> str:
    """The second part of docs/arguments.md: where each argument takes effect, what shows it.

    Args:
        effects: docs/spec/effects.yaml, {flag: {"in": modules, "shown": tests, "edges": {...}}}.
    """
    parts = [
        "",
        "## Where each takes effect, and the tests that show it",
        "",
        "Modules lie below `src/slidevlm`, tests below `tests`. An edge is a case at the border of",
        "what an argument can mean, with its test; ranges and choices are tested for all of them.",
        "The source is `docs/spec/effects.yaml`, which `tests/test_effects.py` holds to the code.",
        "",
        "| argument | takes effect in | shown by | edges |",
        "|---|---|---|---|",
    ]
    for a in arguments():
        effect = effects.get(a.flag, {})
        edges = [f"{what}: {_test(test)}" for what, test in effect.get("edges", {}).items()]
        if bounds := _bounds(a.spec):
            edges.insert(0, bounds)
        cells = [
            f"`{a.flag}`",
            ", ".join(f"`{module}.py`" for module in effect.get("in", ())),
            ", ".join(map(_test, effect.get("shown", ()))),
            "; ".join(edges),
        ]
        parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _test(name: str) -> str:
    file, _, function = name.partition("::")
    return f"`{file}.py::{function}`"


def _bounds(spec: Spec) -> str:
    """The range of a number in words."""
    bounds = {
        "at least": spec.minimum,
        "greater than": spec.above,
        "at most": spec.maximum,
        "less than": spec.below,
    }
    return ", ".join(f"{word} {limit:g}" for word, limit in bounds.items() if limit is not None)


def _main() -> None:
    """Print docs/arguments.md; of a checkout, since the package itself has no tests."""
    import yaml

    file = Path(__file__).parents[2] / "docs/spec/effects.yaml"
    effects = yaml.safe_load(file.read_text(encoding="utf-8"))
    print(markdown_table() + markdown_effects(effects), end="")


if __name__ == "__main__":
    _main()

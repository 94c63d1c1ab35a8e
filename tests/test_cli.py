"""The command line as a user meets it: processes, exit codes, messages."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import slidevlm.testing
from slidevlm.cli import COMMANDS, USAGE, main
from slidevlm.config import GROUPS
from slidevlm.errors import DataError
from slidevlm.flags import arguments, declared


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slidevlm", *words], capture_output=True, text=True, check=False
    )


def test_help_shows_every_argument_in_eight_groups_without_torch() -> None:
    code = "import sys; from slidevlm.cli import main; sys.argv = ['slidevlm', 'train', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("False False\n")
    for argument in arguments():
        assert argument.flag in result.stdout
    assert all(f"\n{group}:" in result.stdout for group in GROUPS)


def test_top_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == USAGE
    assert all(" ".join(name) in USAGE for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slidevlm 0.")


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_debug(
    name: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: slidevlm {' '.join(name)}" in told
    head, example = re.split(r"\nexamples?:\n", told)
    assert f"slidevlm {' '.join(name)}" in example
    assert "--debug" in head


# A flag of several commands means one thing: it has one type, and in help one metavar.
def test_equal_names_are_of_equal_kind() -> None:
    kinds: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for a in declared(command):
            for flag in (a.flag, *a.spec.also):
                kinds.setdefault(flag, set()).add(a.kind)
    # The training's take files in pairs, several of them.
    several = {"--zsc-specimen-class-mapping"}
    assert {f: k for f, k in kinds.items() if len(k) > 1 and f not in several} == {}


def test_errors_have_no_traceback_and_exit_with_2() -> None:
    result = run("train", "--batch-size", "0")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "slidevlm: error:" in result.stderr
    assert "--batch-size must be at least 1" in result.stderr
    assert "Traceback" in run("train", "--batch-size", "0", "--debug").stderr


def test_debug_shows_the_traceback_of_any_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "inspect", str(tmp_path / "none.h5")]
    assert main(words) == 2
    assert "no file or folder" in capsys.readouterr().err
    with pytest.raises(DataError, match="no file or folder"):
        main([*words, "--debug"])


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("slidevlm.model_commands.list_models", fail)
    return main(["models", "list"])


def test_errors_of_the_machine_have_no_traceback(monkeypatch, capsys) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "logs/run/model.pt")
    assert failing(monkeypatch, full) == 2
    told = capsys.readouterr().err
    assert told == "slidevlm: error: No space left on device: logs/run/model.pt\n"
    assert failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried ...")) == 2
    told = capsys.readouterr().err
    assert "CUDA out of memory" in told and "lower --batch-size" in told
    assert failing(monkeypatch, MemoryError()) == 2
    assert "no memory left" in capsys.readouterr().err


def test_a_fault_keeps_its_traceback_in_a_file(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert failing(monkeypatch, KeyError("a fault")) == 1
    told = capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    assert str(path) in told and "KeyError: 'a fault'" in told and "Traceback" not in told
    assert "in fail\n" in path.read_text() and path.read_text().startswith("slidevlm 0.")


JSON_COMMANDS = {
    " ".join(n) for n, c in COMMANDS.items() if any(a.flag == "--json" for a in declared(c))
}


def test_all_commands_but_those_that_only_write_speak_json() -> None:
    others = {"completion", "models new", "data synthesize"}
    assert {" ".join(name) for name in COMMANDS} - JSON_COMMANDS == others


def test_json_of_commands_without_a_model(tmp_path, capsys) -> None:
    def told(*words: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert told("models", "list")["coca_tiny"]["family"] == "coca"
    shown = told("models", "show", "coca_tiny", "--tiles", 100)
    assert shown["memory_bytes"]["tiles"] == 100 and shown["memory_bytes"]["weights"] > 0
    assert shown["parts"] and shown["groups"]["slide"]
    settings = slidevlm.testing.settings(tmp_path)
    source = settings["hdf5_filename"]
    divided = told("data", "split", source, tmp_path / "splits", "--fractions", 0.5, 0.5)
    assert sum(split["specimens"] for split in divided.values()) == 20
    converted = told("data", "convert", source, tmp_path / "c.h5", "--workers", 0)
    assert converted["specimens"] == 20 and Path(converted["target"]).is_file()
    words = [w for k, v in settings.items() for w in (f"--{k}", v)]
    report = told("data", "check", *words)
    assert report
    trained = told("train", *words, "--name", "first")
    assert Path(trained["folder"]).is_dir() and trained["metrics"]["test/loss/contrastive"] > 0
    evaluated = told("evaluate", trained["folder"])
    value = evaluated["metrics"]["test/loss/contrastive"]["value"]
    assert value == trained["metrics"]["test/loss/contrastive"]
    exported = told("models", "export", trained["folder"], tmp_path / "exported")
    assert "model.safetensors" in exported["files"]
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"a": "a lung tumour", "b": "a kidney"}))
    scored = told("score", texts, texts, "--eval-metric-bootstraps", 0)
    assert scored["reports"] == 2 and scored["scores"]["bleu_4"]["value"] is not None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "no command 'trian'; did you mean train"),
        (["data", "inspekt", "x"], "no command 'data inspekt'; did you mean data inspect"),
        (["qqq"], "no command 'qqq'; commands: train, evaluate"),
    ],
)
def test_unknown_command_names_the_known_ones(words, told, capsys) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["help", "data"]])
def test_a_family_of_commands_tells_its_own(words, capsys) -> None:
    assert main(words) == 0
    told = capsys.readouterr().out
    family = [" ".join(name) for name in COMMANDS if name[0] == "data"]
    assert all(name in told for name in family) and "models list" not in told
    assert told.count("\n") == len(family) + 2


def test_help_takes_the_name_of_a_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["help", "data", "split"])
    assert "usage: slidevlm data split SOURCE FOLDER" in capsys.readouterr().out


def test_help_tells_what_may_be_left_out(capsys) -> None:
    for command, told in (("report", "beside it (may be left out)"), ("demo", "(default: demo)")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert told in " ".join(capsys.readouterr().out.split())


def test_synthesize(tmp_path: Path) -> None:
    result = run("data", "synthesize", str(tmp_path / "c"), "--specimens", "20")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "c" / "cohort.h5").is_file()
    result = run("data", "synthesize", str(tmp_path / "c"), "--specimens", "30")
    assert result.returncode == 2
    assert "is not empty" in result.stderr and "choose another folder" in result.stderr


def test_a_reader_who_has_seen_enough_gets_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "slidevlm", "models", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 141 and told == ""

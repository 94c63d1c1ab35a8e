"""The command line as a user meets it: processes, exit codes, messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slidevlm.cli import COMMANDS, USAGE, main
from slidevlm.config import GROUPS
from slidevlm.flags import arguments


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
    assert "not available yet" in result.stdout


def test_top_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == USAGE
    assert all(" ".join(name) in USAGE for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slidevlm 0.")


@pytest.mark.parametrize("command", [" ".join(name) for name in COMMANDS])
def test_every_command_has_help(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    assert f"usage: slidevlm {command}" in result.stdout


def test_errors_have_no_traceback_and_exit_with_2() -> None:
    result = run("train", "--batch-size", "0")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "slidevlm: error:" in result.stderr
    assert "--batch-size must be at least 1" in result.stderr
    assert "Traceback" in run("train", "--batch-size", "0", "--debug").stderr


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train, evaluate" in capsys.readouterr().err


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

"""Completion, by a bash that sources the script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from slidevlm.cli import COMMANDS, main
from slidevlm.flags import declared

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "slidevlm.bash"
    path.write_text(text.getvalue())
    return path


def complete(script: Path, *words: str) -> list[str]:
    """What the shell offers for the last of `words`, which may be empty."""
    quoted = " ".join(f"'{word}'" for word in ("slidevlm", *words))
    code = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _slidevlm; "
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_commands(script: Path) -> None:
    assert set(complete(script, "")) == {name[0] for name in COMMANDS}
    assert complete(script, "eva") == ["evaluate"]
    assert set(complete(script, "data", "")) == {n[1] for n in COMMANDS if n[0] == "data"}
    assert complete(script, "models", "sh") == ["show"]


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_every_argument_of_every_command(script: Path, name: tuple[str, ...]) -> None:
    flags = {a.flag for a in declared(COMMANDS[name]) if not a.spec.positional}
    assert set(complete(script, *name, "--")) == flags | {"--help"}


def test_values(script: Path) -> None:
    assert complete(script, "evaluate", "run", "--format", "") == ["table", "markdown", "latex"]
    assert "coca_stage_1" in complete(script, "train", "--model", "coca_st")
    assert complete(script, "models", "show", "coca_ti") == ["coca_tiny"]
    assert complete(script, "completion", "") == ["bash", "zsh"]
    assert complete(script, "classify", "m", "s", "--zsc-ensemble", "pro") == ["probabilities"]
    # Files are the shell's business.
    assert complete(script, "evaluate", "") == [] == complete(script, "train", "--config", "")


def test_zsh_gets_the_same_by_its_bash_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("autoload -Uz compinit bashcompinit\n")
    assert main(["completion", "bash"]) == 0
    assert text.endswith(capsys.readouterr().out)
    assert main(["completion", "fish"]) == 2

"""Progress on a terminal, and nothing of it where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slidevlm import testing

pty = pytest.importorskip("pty")  # Windows has none

# Shows what is fleeting long enough to be drawn.
SLOW = """
import sys, time
from slidevlm.app.slide_model import SlideModel
from slidevlm.app import using
from slidevlm.cli import main
whole, load = SlideModel.embed_bags, using.load
def slow(self, bags):
    time.sleep(0.2)
    return whole(self, bags)
def slow_load(*a, **k):
    time.sleep(0.5)
    return load(*a, **k)
SlideModel.embed_bags, using.load = slow, slow_load
raise SystemExit(main(sys.argv[1:]))
"""


def told(words: list[str], *, terminal: bool) -> tuple[str, str]:
    """Standard output and standard error of a command whose standard error is a terminal or not."""
    command = [sys.executable, "-c", SLOW, *words]
    if not terminal:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return result.stdout, result.stderr
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # what Linux says where the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.stdout is not None
    out = process.stdout.read().decode()
    process.stdout.close()
    os.close(ours)
    assert process.wait() == 0
    return out, shown.decode()


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "bags").mkdir()
    for number in range(5):
        np.save(tmp_path / "bags" / f"s{number}.npy", testing.bag(seed=number))
    model = testing.run(tmp_path / "model")
    return ["embed", str(model), str(tmp_path / "bags"), "--workers", "0", "--device", "cpu"]


def test_a_terminal_shows_what_is_going_on(words: list[str], tmp_path: Path) -> None:
    more = ["--output", str(tmp_path / "e.npz")]
    out, shown = told([*words, *more], terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "reading the model ..." in plain
    assert "embedding" in plain and "3/5" in plain
    assert out == f"wrote {tmp_path / 'e.npz'}: 5 embeddings\n"


def test_elsewhere_it_is_quiet(words: list[str], tmp_path: Path) -> None:
    out, errors = told([*words, "--output", str(tmp_path / "e.npz")], terminal=False)
    assert errors == ""
    assert out == f"wrote {tmp_path / 'e.npz'}: 5 embeddings\n"
    out, errors = told([*words, "--output", "-"], terminal=False)
    assert errors == "" and len(out.splitlines()) == 5

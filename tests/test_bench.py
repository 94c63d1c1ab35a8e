"""The benchmarks' runner: what it reads from outputs, the table, the comparison, the page.

The benchmarks themselves are run by hand: `make bench`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Lines as the benchmarks print them.
SAVING = (
    "checkpoint of 3 MB, step of 100 ms\n"
    "beside the loop, the loop stands still for 1.0 ms a checkpoint, 1.0 % of a step\n"
    "beside: 2.1 ms a checkpoint (1.0 to 3.0), 2.1 % of a step\n"
    "in the loop: 90.0 ms a checkpoint (80.0 to 95.0), 90.0 % of a step\n"
)
OUTPUTS = {
    "data": "| converted | 4096 | 0 | 0.0249 | 0.3604 | 14.5 | 266 (+30) | 867 (+600) |\n\nbars:\n"
    "workers 0: 17.0 times, 266 MB\nworkers 1: 11.2 times, 247 MB\n"
    "| case layout | 6.60 | 6.61 | 283 (+40) |\n| case layout without /case-index | 8 | 8 | 9 |\n",
    "loop": "torch 2.13.0, 1 thread(s)\n| ms a step | clock | processor |\n|---|---|---|\n"
    "| our loop | 280.10 | 279.00 |\n| our loop / bare loop | 1.100 | 1.043 |\n"
    "| besides the computation, % | 2.40 | 1.70 |\n",
    "models": "step  ours        2.71 s      261 MB\nstep  padded      5.73 s      709 MB\n"
    "step  padded / ours: time 2.11, memory 2.72\nbag   ours       50.00 s     2116 MB\n"
    "bag   padded     75.00 s     7211 MB\nbag   padded / ours: time 1.50, memory 3.41\n",
    "tiles": "ours    1.40 s     497 MB\nplain   2.91 s    1369 MB\n"
    "plain / ours: time 2.08, memory 2.76\n",
    "pieces": "coca_small, 2 threads beside nothing       : operations   16.5 ms, pieces   13.2 "
    "ms, ratio 1.25\ncoca_small, 2 threads beside a busy process: operations   51.5 ms, pieces   "
    "21.3 ms, ratio 2.41\n",
    "generate": "| model | form | cached s | uncached s | ratio | last / first | x | y | ratio |\n"
    "| small | greedy | 1.30 | 6.79 | 5.2 | 1.00 | 0.52 | 6.76 | 13.0 |\n"
    "the slide takes 0.14 s and reading the weights 2.3 ms a token: "
    "no more than 10.9 times without guesses\n"
    "| large | greedy | 10.61 | 46.56 | 4.4 | 1.10 | 3.67 | 46.61 | 12.7 |\n"
    "the slide takes 0.14 s and reading the weights 48.0 ms a token: "
    "no more than 7.6 times without guesses\n",
    "beams": "| model | form | cached s | uncached s | ratio | last / first |\n"
    "| small | beams | 1.30 | 24.70 | 18.8 | 1.11 |\n"
    "| large | beams | 12.00 | 130.00 | 10.9 | 1.02 |\n",
    "evaluation": "1,000 resamples         seconds   the loop   times\n"
    "retrieval both ways, N = 2,000, E = 512                        0.20      297.0    1485\n"
    "zero-shot metrics with both AUROC, N = 2,000, 10 classes       0.34      118.0     347\n",
    "text_metrics": "counting    13.10 s, 4.20 s of the processor\n"
    "resampling  1.90 s, 0.60 s of the processor\n",
    "saving": SAVING,
    "saving_busy": SAVING,
    "spinning": "alone, libgomp's own / ours: 0.98 times\n"
    "beside a busy process, libgomp's own / ours: 5.60 times\n",
    "scaling": "| 1 process, 2 threads, specimens/s | 2 processes | ratio |\n|---|---|---|\n"
    "| 3.41 | 5.02 | 1.47 |\n",
    "report_page": "made in 3.0 s, 13.8 MB\nready: 2800 ms\nmap: 1100 ms\n",
    "embed": "whole command: 40.0 s, 2.50 bags/s, 0.1 s of CPU a bag; on 90% of the cores, with "
    "work for 82%\nbag 2 to 100: 35.0 s, 2.80 bags/s, 0.114 s of CPU a bag; on 95% of the cores, "
    "with work for 98%\n",
}
EXPECTED = {
    "data: plain / ours, 4096 of 100,000 rows": 17.0,
    "data: the same, read by a worker": 11.2,
    "loop: a run's step / a bare loop's, processor": 1.043,
    "models: a step, padded / ours, time": 2.11,
    "models: a step, padded / ours, memory": 2.72,
    "models: a bag of 100,000, padded / ours, time": 1.5,
    "models: a bag of 100,000, padded / ours, memory": 3.41,
    "tiles: 100,000 before attention, at once / in pieces, time": 2.08,
    "tiles: the same, memory": 2.76,
    "pieces: embedding a bag, threads share operations / pieces": 1.25,
    "pieces: the same beside a busy process": 2.41,
    "generate: small, greedy: without cache / with": 5.2,
    "generate: small, greedy: the last tokens' time / the first's": 1.0,
    "generate: small, greedy: the same, were it reading the weights alone": 10.9,
    "generate: small, greedy: eight at a time, without cache / with": 13.0,
    "generate: large, greedy: without cache / with": 4.4,
    "generate: large, greedy: the last tokens' time / the first's": 1.1,
    "generate: large, greedy: the same, were it reading the weights alone": 7.6,
    "generate: large, greedy: eight at a time, without cache / with": 12.7,
    "beams: small, beams: without cache / with": 18.8,
    "beams: small, beams: the last tokens' time / the first's": 1.11,
    "beams: large, beams: without cache / with": 10.9,
    "beams: large, beams: the last tokens' time / the first's": 1.02,
    "evaluation: retrieval, 1,000 resamples: loop / ours": 1485.0,
    "evaluation: zero-shot, 1,000 resamples: loop / ours": 347.0,
    "spinning: a step alone, libgomp's waiting / ours": 0.98,
    "spinning: a step beside a busy process, likewise": 5.6,
    "scaling: 2 processes of a thread / 1 of two": 1.47,
}


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.all")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def measured(bench: Any) -> list[Any]:
    return [m for b in bench.BENCHMARKS for m in bench.read(b, OUTPUTS[b.name])]


def test_every_figure_is_read(bench: Any, measured: list[Any]) -> None:
    assert [m.key for m in measured if m.value is None] == []
    assert bench.record(measured, {})["ratios"] == EXPECTED
    others = {m.key: m.value for m in measured if not m.figure.ratio}
    assert others["data: indexing 20,000 specimens"] == 6.6
    assert others["loop: besides forward, backward and optimizer, of a step"] == 2.4
    assert others["saving: the loop stands still for a checkpoint, of a step"] == 1.0
    assert others["saving: a checkpoint beside the loop, a core free, of a step"] == 2.1
    assert others["embed: cores with work"] == 98.0
    assert others["report_page: size of a page of 2,000"] == 13.8


def test_the_words_of_every_benchmark_are_its_own(bench: Any) -> None:
    """And what is read from its output is in what it prints."""
    for benchmark in bench.BENCHMARKS:
        name = (benchmark.module or benchmark.name).removeprefix("benchmarks.")
        source = (ROOT / f"benchmarks/{name}.py").read_text()
        assert 'if __name__ == "__main__":' in source
        for word in (*benchmark.words, *benchmark.short):
            if word.startswith("--"):
                assert f'"{word}"' in source, (benchmark.name, word)


def test_a_missed_bar_is_said(bench: Any, measured: list[Any]) -> None:
    table = bench.table(measured)
    assert "forward, backward and optimizer, of a step | 2.4 % | at most 2 % | **no** |" in table
    assert "| models | a step, padded / ours, time | 2.11 times | at least 2 times | yes |" in table
    assert (
        "| scaling | 2 processes of a thread / 1 of two | 1.47 times | at least 0.85 times | yes |"
        in table
    )
    assert "| evaluation | zero-shot, 1,000 resamples: loop / ours | 347 times |  |  |" in table
    lacking = bench.read(bench.BENCHMARKS[0], "nothing")
    assert bench.table(lacking).count("not printed") == len(lacking)


def test_ratios_are_compared_and_nothing_else(bench: Any, measured: list[Any]) -> None:
    recorded = bench.record(measured, {})
    text, worse = bench.compare(measured, recorded, 0.25)
    assert worse == [] and " MB" not in text and "indexing" not in text
    slower = {**OUTPUTS, "models": OUTPUTS["models"].replace("time 2.11", "time 1.60")}
    slower["loop"] = slower["loop"].replace("1.043", "1.400")
    slower["data"] = slower["data"].replace("6.60", "60.0").replace("17.0 times", "15.0 times")
    slower["scaling"] = "nothing"
    now = [m for b in bench.BENCHMARKS for m in bench.read(b, slower[b.name])]
    _, worse = bench.compare(now, recorded, 0.25)
    assert [w.split(":")[0] for w in worse] == ["loop", "models", "scaling"]
    assert "2.11 was recorded, now 1.6, 32% worse" in worse[1]
    _, worse = bench.compare(now, recorded, 0.5)
    assert [w.split(":")[0] for w in worse] == ["scaling"]


def test_the_page_keeps_what_is_around(bench: Any, measured: list[Any]) -> None:
    page = (ROOT / "docs/performance.md").read_text()
    on = bench.machine()
    assert on["cores"] >= 1 and on["versions"]["torch"] == torch.__version__
    text = bench.put_into(page, bench.section(measured, on))
    assert bench.put_into(text, bench.section(measured, on)) == text
    begin, end = text.index(bench.BEGIN), text.index(bench.END)
    assert text[:begin] == page[: page.index(bench.BEGIN)]
    assert text[end:] == page[page.index(bench.END) :]
    assert on["processor"] in text[begin:end] and "| embed |" in text[begin:end]
    for bad in ("", bench.BEGIN, bench.END + bench.BEGIN, bench.BEGIN + page):
        with pytest.raises(ValueError, match="once each"):
            bench.put_into(bad, "x")


def test_a_benchmark_that_fails_records_nothing(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = bench.Benchmark("loop", ("--no-such-word",), ("--no-such-word",), ())
    monkeypatch.setattr(bench, "BENCHMARKS", (broken,))
    monkeypatch.setattr(bench, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(bench, "RECORD", tmp_path / "recorded.json")
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    assert bench.main([]) == 1
    told = capsys.readouterr().err
    assert "loop ended with 2: " in told and "--no-such-word" in told
    assert "nothing is recorded" in told and not (tmp_path / "recorded.json").exists()
    assert bench.main(["--check"]) == 2
    assert "`make bench` writes it" in capsys.readouterr().err


def test_what_is_recorded_is_compared_with(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = dict(OUTPUTS)
    monkeypatch.setattr(bench, "output_of", lambda b, *, short: outputs[b.name])
    monkeypatch.setattr(bench, "RECORD", tmp_path / "recorded.json")
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(f"a\n{bench.BEGIN}\nold\n{bench.END}\nb\n")
    assert bench.main(["--short"]) == 0 and not (tmp_path / "recorded.json").exists()
    assert bench.main(["--only", "loop"]) == 0 and not (tmp_path / "recorded.json").exists()
    assert bench.main([]) == 0
    assert json.loads((tmp_path / "recorded.json").read_text())["ratios"] == EXPECTED
    assert re.search(r"^a\n.*\| loop \|.*\nb\n$", (tmp_path / "page.md").read_text(), re.DOTALL)
    assert bench.main(["--check"]) == 0
    outputs["generate"] = outputs["generate"].replace("13.0", "3.0")
    capsys.readouterr()
    assert bench.main(["--check"]) == 1
    assert "small, greedy: eight at a time, without cache / with" in capsys.readouterr().err


def test_one_gpu_is_measured_or_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is timed there runs, in small, on a CPU; without a GPU the command says so."""
    gpu = importlib.import_module("benchmarks.gpu")
    from slidevlm import testing

    model = testing._trained("coca_tiny", None, 0).model
    monkeypatch.setattr(gpu.models, "TILE_WIDTH", testing.TILE_WIDTH)
    monkeypatch.setattr(gpu, "WORDS", 30)
    device = torch.device("cpu")
    gpu.generation(model, device, 20, [1, 2], tokens=3)
    gpu.evaluation(model, device, [5, 9], 2, vocabulary=200)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 + 4 + 1 + 3 and "6 beams in 3 groups" in told
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu"])
        with pytest.raises(SystemExit, match="finds no CUDA device"):
            gpu.main()

"""`slidevlm doctor`: what it finds, what it says to do, its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from slidevlm import doctor
from slidevlm.cli import main
from slidevlm.doctor import EXTRAS, Finding, look, memory_limit, smoke

if sys.version_info >= (3, 11):
    import tomllib


def found(name: str) -> Finding:
    return next(finding for finding in look() if finding.name == name)


def test_all_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is True
    names = {f["name"] for f in told["findings"]}
    assert {"python", "torch", "processor", "memory", "shared memory", "disk"} <= names
    assert told["findings"][-1]["name"] == "smoke run" and told["findings"][-1]["status"] == "ok"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with 3.11")
def test_every_extra_is_told() -> None:
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"test", "dev", "docs"}
    needed = {need.partition(">")[0] for need in project["dependencies"]}
    assert needed == {
        {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(m, m) for m in doctor._NEEDED
    }


def test_a_missing_extra_names_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "zarr", (("no_such_module",), "features in zarr folders"))
    one = found("extra zarr")
    assert one.status == "note" and "pip install 'slidevlm[zarr]'" in one.found
    assert "features in zarr folders" in one.found


def test_a_broken_or_old_package_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert found("h5py").status == "error" and "pip install" in found("h5py").remedy
    assert main(["doctor", "--skip-smoke-run"]) == 1
    out = capsys.readouterr().out
    assert "h5py: pip install --force-reinstall h5py" in out and "will not work" in out
    monkeypatch.setattr(doctor, "_least", lambda name: "99.5" if name == "rich" else None)
    assert found("rich").status == "error" and "rich>=99.5" in found("rich").remedy


def test_a_failing_smoke_run_is_an_error() -> None:
    def fail(folder: Path) -> None:
        assert folder.is_dir()
        print("the last line", file=sys.stderr)
        raise RuntimeError("no kernel image")

    one = smoke(fail)
    assert one.status == "error"
    assert "RuntimeError: no kernel image" in one.found and "the last line" in one.found


def test_memory_of_a_container(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1500 kB\n")
    assert memory_limit(tmp_path) == (2000 * 1024, 1500 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1024000\n")
    (group / "memory.current").write_text("24000\n")
    assert memory_limit(tmp_path) == (1024000, 1000000)
    (group / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == (2000 * 1024, 1500 * 1024)


@pytest.mark.parametrize(("name", "free"), [("shared memory", 1e8), ("disk", 1e9)])
def test_little_room_is_a_warning(name: str, free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": free, "total": 6.4e9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    one = found(name)
    assert one.status == "warning" and one.remedy


def test_a_gpu_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_cards", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    assert found("gpu").status == "warning"
    assert "built for CUDA" in found("gpu").remedy
    monkeypatch.setattr(doctor.torch.version, "cuda", "13.0")
    assert "too old for CUDA 13.0" in found("gpu").remedy
    monkeypatch.setattr(doctor, "_cards", list)
    assert found("gpu").status == "note"

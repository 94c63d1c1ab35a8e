"""Copies of a folder in S3 (a real server of moto's), in folders and in memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from slidevlm import remote as module
from slidevlm.errors import ConfigError
from slidevlm.remote import RECORD, Mirror, Remote, Syncing, told

SECRET = "xSECRETx-never-in-a-log"  # of the fixture s3, too


@pytest.fixture(params=["s3", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(URL, protocol) of an empty place."""
    if request.param == "s3":
        return request.getfixturevalue("s3"), "s3"
    if request.param == "file":
        return f"file://{tmp_path}/elsewhere", "fsspec"
    return f"memory://{uuid.uuid4().hex}", "fsspec"


def folder(path: Path) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("epochs: 2\n")
    (path / "empty.txt").write_text("")
    (path / "checkpoints/step_1.pt").write_bytes(bytes(range(256)) * 40_000)  # 10 MB
    (path / "checkpoints/.epoch_2.pt.12.tmp").write_text("half a checkpoint")
    (path / "latest").symlink_to(path / "config.yaml")
    return path


FILES = {"config.yaml", "empty.txt", "checkpoints/step_1.pt"}


def test_what_arrives_is_what_left_and_comes_back(place: tuple[str, str], tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    remote = Remote(*place, "run")
    assert remote.sizes() == {}
    assert Mirror(remote, run).sync() == 3
    assert remote.sizes() == {n: (run / n).stat().st_size for n in FILES}
    for name in FILES:
        got = Remote(*place, "run").get(name, tmp_path / "back")
        assert got.read_bytes() == (run / name).read_bytes()
    assert Remote(*place, "another").sizes() == {}


@pytest.mark.parametrize("inside", ["", "runs", "runs/run/copies"])
def test_a_copy_into_the_folder_itself_is_refused(inside: str, tmp_path: Path) -> None:
    """Every copy would be copied again, and be no copy at all where it is the folder itself."""
    run = folder(tmp_path / "runs/run")
    remote = Remote(f"file://{tmp_path}/{inside}", "fsspec", "run")
    if not inside:
        assert Mirror(remote, run).sync() == 3
        return
    with pytest.raises(ConfigError, match="would copy the run folder .* into itself; name"):
        Mirror(remote, run)


def test_only_what_changed_is_copied_also_by_the_next_process(
    place: tuple[str, str], tmp_path: Path
) -> None:
    run = folder(tmp_path / "run")
    mirror = Mirror(Remote(*place, "run"), run)
    mirror.sync()
    assert mirror.sync() == 0
    with (run / "config.yaml").open("a") as file:
        file.write("lr: 1\n")
    assert Mirror(Remote(*place, "run"), run).sync() == 1
    Remote(*place, "run").remove("empty.txt")
    assert Mirror(Remote(*place, "run"), run).sync() == 1, "what is gone there is copied again"
    assert Mirror(Remote(*place, "elsewhere"), run).sync() == 3


def test_a_checkpoint_removed_here_is_removed_there_after_the_new_one_is_there(
    place: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, remote = folder(tmp_path / "run"), Remote(*place, "run")
    mirror = Mirror(remote, run)
    mirror.sync()
    (run / "checkpoints/step_1.pt").rename(run / "checkpoints/step_2.pt")
    (run / "empty.txt").unlink()
    seen: list[set[str]] = []
    remove = Remote.remove
    monkeypatch.setattr(
        Remote, "remove", lambda self, name: (seen.append({*self.sizes()}), remove(self, name))
    )
    mirror.sync()
    assert seen == [FILES | {"checkpoints/step_2.pt"}]
    assert {*remote.sizes()} == {"config.yaml", "empty.txt", "checkpoints/step_2.pt"}


def test_the_last_written_comes_first_and_what_came_after_the_record_before_it(
    place: tuple[str, str], tmp_path: Path
) -> None:
    """However fast they were copied, and in whatever order."""
    run, remote = tmp_path / "run", Remote(*place, "run")
    (run / "checkpoints").mkdir(parents=True)
    for age, name in enumerate(("step_9.pt", "epoch_4.pt", "step_11.pt", "best.pt")):
        (run / "checkpoints" / name).write_text("x")
        os.utime(run / "checkpoints" / name, (1000 + age, 1000 + age))
    Mirror(remote, run).sync()
    remote.put(run / "checkpoints/best.pt", "checkpoints/epoch_5.pt")
    names = ["epoch_5.pt", "best.pt", "step_11.pt", "epoch_4.pt", "step_9.pt"]
    assert remote.newest_first("checkpoints/") == [f"checkpoints/{n}" for n in names]


def test_a_machine_that_has_only_the_newest_leaves_the_others_there(
    place: tuple[str, str], tmp_path: Path
) -> None:
    run, remote = folder(tmp_path / "run"), Remote(*place, "run")
    Mirror(remote, run).sync()
    other = tmp_path / "other"
    times = remote.record()
    for name in ("config.yaml", RECORD):
        remote.get(name, other, times[name][1] if name in times else None)
    assert Mirror(Remote(*place, "run"), other).sync() == 0, "it is the same file"
    assert {*remote.sizes()} == FILES


def test_without_a_record_the_last_copied_comes_first(
    place: tuple[str, str], tmp_path: Path
) -> None:
    remote = Remote(*place, "run")
    for number in (3, 1, 2):
        path = tmp_path / f"step_{number}.pt"
        path.write_text("x")
        remote.put(path, f"checkpoints/{path.name}")
        time.sleep(1.1)  # S3 tells whole seconds
    names = [f"checkpoints/step_{n}.pt" for n in (2, 1, 3)]
    assert remote.newest_first("checkpoints/") == names


def test_half_a_copy_is_never_taken_for_whole(
    place: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path / "run")
    remote = Remote(*place, "run")
    put_file = remote._files.put_file

    def half(source: str, target: str, **options: Any) -> None:
        short = tmp_path / "short"
        short.write_bytes(Path(source).read_bytes()[:100])
        put_file(str(short), target)

    monkeypatch.setattr(remote._files, "put_file", half)
    with pytest.raises(OSError, match=r"step_1\.pt: 100 of 10240000 bytes arrived"):
        remote.put(run / "checkpoints/step_1.pt", "checkpoints/step_1.pt")
    if place[1] != "s3":  # there no object is cut short by a broken connection
        assert remote.sizes() == {}
    monkeypatch.undo()
    if place[1] == "s3":
        return
    Mirror(Remote(*place, "run"), run).sync()
    assert remote.sizes()["checkpoints/step_1.pt"] == 10_240_000


# --- beside training ----------------------------------------------------------------------------


def test_begin_every_while_and_end(place: tuple[str, str], tmp_path: Path) -> None:
    run, remote = folder(tmp_path / "run"), Remote(*place, "run")
    with Syncing(Mirror(remote, run), 0.05) as syncing:
        syncing.begin()
        assert {*Remote(*place, "run").sizes()} == FILES
        (run / "metrics.jsonl").write_text("1\n")
        until = time.monotonic() + 20
        while "metrics.jsonl" not in Remote(*place, "run").sizes():
            assert time.monotonic() < until
            time.sleep(0.05)
        (run / "last.txt").write_text("written at the very end")
    assert "last.txt" in Remote(*place, "run").sizes()


def test_what_does_not_work_at_the_start_is_an_error(
    s3_server: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path / "run")
    missing = Remote("s3://no-such-bucket/x", "s3", "run")
    with pytest.raises(ConfigError, match="no-such-bucket.*look at the address") as caught:
        Syncing(Mirror(missing, run), 60).begin()
    assert SECRET not in str(caught.value)
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    with pytest.raises(ConfigError, match="--remote-sync file://"):
        Syncing(Mirror(Remote(f"file://{obstacle}/x", "fsspec", "run"), run), 60).begin()


def test_failures_are_told_tried_again_and_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    run = folder(tmp_path / "run")
    mirror = Mirror(Remote(f"memory://{uuid.uuid4().hex}", "fsspec", "run"), run)
    sync, broken = mirror.sync, [False]

    def perhaps() -> int:
        if broken[0]:
            raise OSError(f"refused for key {SECRET}")
        return sync()

    monkeypatch.setattr(mirror, "sync", perhaps)
    with Syncing(mirror, 0.02) as syncing:
        syncing.begin()
        broken[0] = True
        until = time.monotonic() + 10
        while messages.text.count("remote sync failed") < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        broken[0] = False
        while "works again" not in messages.text:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert SECRET not in messages.text and "<AWS_SECRET_ACCESS_KEY>" in messages.text


def test_an_end_that_cannot_be_reached_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_STALLED_SECONDS", 0.2)
    mirror = Mirror(Remote(f"memory://{uuid.uuid4().hex}", "fsspec", "run"), folder(tmp_path / "r"))
    with Syncing(mirror, 60) as syncing:
        syncing.begin()
        monkeypatch.setattr(mirror, "sync", lambda: time.sleep(30))
    assert "is not complete" in messages.text


def test_a_hanging_copy_does_not_keep_a_crashed_process_alive(tmp_path: Path) -> None:
    code = (
        "import sys, time, logging\n"
        "from pathlib import Path\n"
        "from slidevlm.remote import *\n"
        "mirror = Mirror(Remote('memory://a', 'fsspec', 'run'), Path(sys.argv[1]))\n"
        "syncing = Syncing(mirror, 0.01).__enter__()\n"
        "syncing.begin()\n"
        "mirror.sync = lambda: time.sleep(600)\n"
        "time.sleep(0.2)\n"
        "raise SystemExit(7)\n"
    )
    words = [sys.executable, "-c", code, str(folder(tmp_path / "run"))]
    done = subprocess.run(words, timeout=60, capture_output=True, check=False)
    assert done.returncode == 7, done.stderr


def test_without_a_remote_nothing_happens() -> None:
    with Syncing(None, 1) as syncing:
        syncing.begin()


def test_the_record_is_no_file_of_the_run_and_a_damaged_one_is_no_trouble(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    place = (f"memory://{uuid.uuid4().hex}", "fsspec", "run")
    Mirror(Remote(*place), run).sync()
    assert (run / RECORD).exists() and RECORD not in Remote(*place).sizes()
    assert Remote(*place).record().keys() == FILES
    (run / RECORD).write_text("{")
    assert Mirror(Remote(*place), run).sync() == 3


@pytest.mark.parametrize(
    ("package", "protocol", "extra"), [("s3fs", "s3", "s3"), ("fsspec", "fsspec", "remote")]
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, protocol: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package} .*slidevlm\[{extra}\]"):
        Remote("s3://a/b", protocol, "run")


def test_an_unknown_kind_of_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "not known")  # as the error has it
    with pytest.raises(ConfigError, match="--remote-sync nowhere://a: .*<AWS_SESSION_TOKEN>"):
        Remote("nowhere://a", "fsspec", "run")


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID",
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
    ],
)  # fmt: skip
def test_told_hides_what_the_environment_keeps_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, in a URL, and as Python shows it."""
    monkeypatch.setenv(name, SECRET)
    assert told(OSError(f"a {SECRET}\nb")) == f"OSError: a <{name}>"
    monkeypatch.setenv(name, "a/b\tc")
    told_of = told(OSError(f"{'a/b' + chr(9) + 'c'!r} ?key=a%2Fb%09c {'x' * 300}"))
    assert told_of.startswith(f"OSError: '<{name}>' ?key=<{name}> xxx")
    assert len(told_of) < 320
    assert logging.getLogger("slidevlm.remote")

"""Checkpoints: whole or not at all, nothing run on reading, the right one found and kept."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slidevlm.errors import CheckpointError
from slidevlm.train import checkpoint as ckpt
from slidevlm.train.checkpoint import (
    Keeper,
    ModelState,
    Progress,
    TrainState,
    checkpoints,
    load,
    newest,
    save,
)


def states(step: int = 3, epoch: int = 1, batch: int = 2) -> tuple[ModelState, TrainState]:
    """Every field filled; `step` marks the weights too."""
    weight = torch.arange(60.0).reshape(6, 10) + step
    model = ModelState(
        weights={"a.weight": weight, "b": torch.tensor(step), "tied": weight},
        config={"family": "coca", "embed_dim": 8, "text": {"layers": 2}},
        tokenizer='{"version": "1.0"}',
        vocab_size=17,
        siglip=False,
        position_unit="um",
    )
    training = TrainState(
        progress=Progress(step, epoch, batch),
        optimizer={"state": {0: {"exp_avg": weight / 2}}, "param_groups": [{"params": [0]}]},
        scaler={},
        random=[{"cpu": torch.arange(16, dtype=torch.uint8)}],
        order={"specimens": 39, "global_batch": 12, "seed": 0},
        skipped=1,
        config="epochs: 2\n",
        metrics={"val/loss/caption": 1.5},
        threads=2,
    )
    return model, training


def equal(a: Any, b: Any) -> bool:
    """Deep equality, tensors bit for bit and of the same type."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and equal(vars(a), vars(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        same = type(a) is type(b) and len(a) == len(b)
        return same and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# --- written whole or not at all ------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "epoch_1.pt"
    save(path, *states())
    assert equal(load(path), states())
    assert names(path.parent) == {"epoch_1.pt"}, "no temporary file is left"


def test_a_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    model, training = states()
    save(tmp_path / "a.pt", model, dataclasses.replace(training, random=[ckpt.random_state()]))
    expected = torch.rand(7)
    torch.manual_seed(99)
    ckpt.set_random_state(load(tmp_path / "a.pt")[1].random[0])
    assert torch.equal(torch.rand(7), expected)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("short")])
def test_an_error_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "epoch_1.pt"
    save(path, *states(step=1))

    def half(content: object, file: io.BufferedWriter) -> None:
        file.write(b"PK\x03\x04 half of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*epoch_1\.pt") as caught:
        save(path, *states(step=2))
    assert "free space" in str(caught.value)
    monkeypatch.undo()
    assert equal(load(path), states(step=1))
    assert names(tmp_path) == {"epoch_1.pt"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real path through torch's writer: a write that the kernel refuses."""
    opened = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        return opened(Path("/dev/full") if self.suffix == ".tmp" else self, *args, **kwargs)

    path = tmp_path / "epoch_1.pt"
    save(path, *states(step=1))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*epoch_1\.pt"):
        save(path, *states(step=2))
    monkeypatch.undo()
    assert equal(load(path), states(step=1))


def test_an_interrupt_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "epoch_1.pt"
    save(path, *states(step=1))

    def interrupted(content: object, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, *states(step=2))
    monkeypatch.undo()
    assert equal(load(path), states(step=1))
    assert names(tmp_path) == {"epoch_1.pt"}


def test_killed_just_before_the_rename(tmp_path: Path) -> None:
    """No handler runs: the process is gone. The old file is whole, `newest` passes the rest."""
    save(tmp_path / "epoch_1.pt", *states(step=1))
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from slidevlm.train import checkpoint as ckpt\n"
        "model, training = ckpt.load(Path(sys.argv[1]))\n"
        "Path.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        "ckpt.save(Path(sys.argv[1]), model, training)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "epoch_1.pt")], check=False, capture_output=True
    )
    assert result.returncode == -9, result.stderr
    left = names(tmp_path) - {"epoch_1.pt"}
    assert len(left) == 1 and left.pop().endswith(".tmp"), "the kill left a temporary file"
    found = newest(tmp_path)
    assert found is not None and found[0] == tmp_path / "epoch_1.pt"
    assert equal(found[1:], states(step=1))
    Keeper(tmp_path, every_epochs=1, epochs=2, most_recent=False, delete_previous=False)
    assert names(tmp_path) == {"epoch_1.pt"}, "whoever goes on clears it away"


# --- damaged, foreign and hostile files -----------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "epoch_1.pt"
    save(path, *states())
    return path.read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(path) in str(caught.value), "the message names the file"
    return str(caught.value)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_harmless(
    whole: bytes, tmp_path: Path, where: float, bit: int
) -> None:
    """Harmless: in the padding between the parts of the archive, which nothing reads."""
    content = bytearray(whole)
    content[int(where * len(content))] ^= 1 << bit
    path = tmp_path / "epoch_1.pt"
    path.write_bytes(content)
    try:
        read = load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert equal(read, states()), "damage went unnoticed"


def test_a_tensor_marked_as_a_folder_is_found(whole: bytes, tmp_path: Path) -> None:
    """One bit in the archive's directory, for which torch reads nothing; of each part in turn."""
    path, marked = tmp_path / "epoch_1.pt", 0
    entry = whole.find(b"PK\x01\x02")
    while entry >= 0:
        content = bytearray(whole)
        content[entry + 38] ^= 0x10
        path.write_bytes(content)
        assert "folder" in refused(path)
        marked += 1
        entry = whole.find(b"PK\x01\x02", entry + 4)
    assert marked > 3


def test_a_flipped_bit_of_a_weight_is_found(whole: bytes, tmp_path: Path) -> None:
    """Nothing but the checksum can see it."""
    weight = states()[0].weights["a.weight"].numpy().tobytes()
    place = whole.index(weight) + 21
    content = bytearray(whole)
    content[place] ^= 1
    path = tmp_path / "epoch_1.pt"
    path.write_bytes(content)
    assert "damaged" in refused(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(whole: bytes, tmp_path: Path, part: float) -> None:
    path = tmp_path / "epoch_1.pt"
    path.write_bytes(whole[: int(part * len(whole))])
    assert "use an older one" in refused(path)


class Boom:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return os.system, (f"touch '{self.path}'",)  # type: ignore[return-value]


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    torch.save({"format": ckpt.FORMAT, "model": Boom(proof)}, tmp_path / "zip.pt")
    refused(tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Boom(proof)))
    refused(tmp_path / "plain.pt")
    torch.save(Boom(proof), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt")
    assert not proof.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert proof.exists(), "the test's own bomb works"


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "an archive of something else")
    (tmp_path / "b.pt").write_text("text")
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "c.pt")
    torch.save(torch.ones(3), tmp_path / "d.pt")
    for name in "abcd":
        assert "not a slidevlm checkpoint" in refused(tmp_path / f"{name}.pt")


@pytest.mark.parametrize(("more", "version"), [(1, "a later"), (-1, "an earlier")])
def test_a_checkpoint_of_another_version(tmp_path: Path, more: int, version: str) -> None:
    torch.save({"format": ckpt.FORMAT + more}, tmp_path / "e.pt")
    message = refused(tmp_path / "e.pt")
    assert f"of format {ckpt.FORMAT + more}" in message and f"use it with {version}" in message


def whole_content() -> dict[str, Any]:
    model, training = states()
    progress = vars(training.progress)
    return {
        "format": ckpt.FORMAT,
        "model": vars(model),
        "training": {**vars(training), "progress": progress},
    }


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", None),
        ("model", "text"),
        ("training", "text"),
        ("training", {}),
        ("training", {"progress": {"epoch": 1}}),
        ("training", {"progress": {"hour": 1}}),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, part: str, value: Any) -> None:
    content = whole_content()
    torch.save(content, tmp_path / "good.pt")
    assert equal(load(tmp_path / "good.pt"), states()), "the same, unspoilt, is read"
    content[part] = value
    torch.save(content, tmp_path / "epoch_1.pt")
    assert "lacks a part" in refused(tmp_path / "epoch_1.pt")
    del content[part]
    torch.save(content, tmp_path / "epoch_1.pt")
    assert part in refused(tmp_path / "epoch_1.pt")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert "no checkpoint at" in refused(tmp_path / "nowhere.pt")
    assert "give the path of a .pt file" in refused(tmp_path)


# --- which one is the newest ----------------------------------------------------------------


def test_the_newest_is_the_furthest_whatever_its_name_or_time(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None
    for name, step in [("epoch_10.pt", 30), ("epoch_9.pt", 27), ("step_29.pt", 29)]:
        save(tmp_path / name, *states(step))
    save(tmp_path / "epoch_2.pt", *states(6))  # the last by time and by name
    found = newest(tmp_path)
    assert found is not None and found[0].name == "epoch_10.pt"
    assert equal(found[1:], states(30))
    save(tmp_path / "epoch_latest.pt", *states(33))
    assert newest(tmp_path)[0].name == "epoch_latest.pt"  # type: ignore[index]


def test_temporary_files_and_results_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "epoch_1.pt", *states(3))
    whole = (tmp_path / "epoch_1.pt").read_bytes()
    save(tmp_path / "furthest.pt", *states(99))
    further = (tmp_path / "furthest.pt").read_bytes()
    for name in (".epoch_2.pt.123.tmp", "epoch_2.pt.tmp", "results.pt", "val_epoch_2.pt"):
        (tmp_path / name).write_bytes(further)
    (tmp_path / ".epoch_3.pt.9.tmp").write_bytes(whole[:100])
    (tmp_path / "captions_epoch_2.json").write_text(json.dumps({}))
    assert [p.name for p in checkpoints(tmp_path)] == ["epoch_1.pt"]
    assert newest(tmp_path)[0].name == "epoch_1.pt"  # type: ignore[index]


def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "epoch_1.pt", *states(3))
    save(tmp_path / "epoch_2.pt", *states(6))
    last = tmp_path / "epoch_2.pt"
    last.write_bytes(last.read_bytes()[:-50])
    found = newest(tmp_path)
    assert found is not None and equal(found[1:], states(3))
    (warning,) = [r for r in messages.records if r.levelno == logging.WARNING]
    assert str(last) in warning.getMessage() and "damaged" in warning.getMessage()


def test_none_whole_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pt").write_bytes(b"")
    (tmp_path / "step_4.pt").write_text("x")
    with pytest.raises(CheckpointError, match=r"every checkpoint .*: epoch_1\.pt, step_4\.pt"):
        newest(tmp_path)


# --- which are kept -------------------------------------------------------------------------


def keeper(folder: Path | None, **options: Any) -> Keeper:
    plain = {"every_epochs": 2, "epochs": 5, "most_recent": False, "delete_previous": False}
    return Keeper(folder, **{**plain, **options})


def kept(files: list[Path]) -> list[str]:
    return [f.name for f in files]


@pytest.mark.parametrize(
    ("every_epochs", "expected"),
    [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (20, [5])],
)
def test_save_frequency_and_always_the_last(
    tmp_path: Path, every_epochs: int, expected: list[int]
) -> None:
    keep = keeper(tmp_path, every_epochs=every_epochs)
    due = [name for epoch in range(1, 6) for name in kept(keep.epoch_files(epoch))]
    assert due == [f"epoch_{epoch}.pt" for epoch in expected]


def test_the_most_recent_besides(tmp_path: Path) -> None:
    keep = keeper(tmp_path, most_recent=True)
    assert kept(keep.epoch_files(1)) == ["epoch_latest.pt"]
    assert kept(keep.epoch_files(2)) == ["epoch_2.pt", "epoch_latest.pt"]
    for epoch in (1, 2):
        keep.store(keep.epoch_files(epoch), *states(3 * epoch))
    assert names(tmp_path) == {"epoch_2.pt", "epoch_latest.pt"}
    assert equal(load(tmp_path / "epoch_latest.pt"), states(6))


def test_without_a_folder_nothing_is_due() -> None:
    keep = keeper(None, most_recent=True)
    assert keep.epoch_files(5) == [] and keep.step_files(3) == []


def test_the_previous_goes_only_when_the_new_one_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = keeper(tmp_path, every_epochs=1, delete_previous=True)
    keep.store(keep.epoch_files(1), *states(3))
    keep.store(keep.step_files(4), *states(4))
    assert names(tmp_path) == {"step_4.pt"}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError):
        keep.store(keep.epoch_files(2), *states(6))
    assert equal(load(tmp_path / "step_4.pt"), states(4)), "the only one must not be lost"
    monkeypatch.undo()
    keep.store(keep.epoch_files(2), *states(6))
    assert names(tmp_path) == {"epoch_2.pt"}
    keep.store(keep.epoch_files(2), *states(7))
    assert equal(load(tmp_path / "epoch_2.pt"), states(7)), "the same name replaces itself"


def test_order_of_storing_and_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = keeper(tmp_path, every_epochs=1, most_recent=True, delete_previous=True)
    keep.store(keep.epoch_files(1), *states(3))
    seen: list[set[str]] = []
    unlink = Path.unlink

    def watched(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".pt":
            seen.append(names(tmp_path))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    keep.store(keep.epoch_files(2), *states(6))
    assert seen == [{"epoch_1.pt", "epoch_2.pt", "epoch_latest.pt"}]
    assert names(tmp_path) == {"epoch_2.pt", "epoch_latest.pt"}


def test_epoch_latest_alone_deletes_nothing(tmp_path: Path) -> None:
    """epoch_latest.pt is overwritten every epoch; the kept file before it stays until the next."""
    keep = keeper(tmp_path, most_recent=True, delete_previous=True)
    for epoch in (2, 3):
        keep.store(keep.epoch_files(epoch), *states(3 * epoch))
    assert names(tmp_path) == {"epoch_2.pt", "epoch_latest.pt"}
    keep.store(keep.epoch_files(4), *states(12))
    assert names(tmp_path) == {"epoch_4.pt", "epoch_latest.pt"}


def test_a_resumed_run_deletes_the_one_before_and_not_what_was_kept_on_purpose(
    tmp_path: Path,
) -> None:
    for age, (name, step) in enumerate([("epoch_2.pt", 6), ("epoch_4.pt", 12), ("step_13.pt", 13)]):
        save(tmp_path / name, *states(step))
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    keep = keeper(tmp_path, delete_previous=True)
    keep.store(keep.epoch_files(5), *states(15))
    assert names(tmp_path) == {"epoch_2.pt", "epoch_4.pt", "epoch_5.pt"}


def test_only_the_newest_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 12, 6):
        save(tmp_path / f"step_{step}.pt", *states(step))
    read = []
    whole_load = ckpt.load
    monkeypatch.setattr(ckpt, "load", lambda path: read.append(path.name) or whole_load(path))
    found = newest(tmp_path)
    assert found is not None and found[0].name == "step_12.pt" and read == ["step_12.pt"]

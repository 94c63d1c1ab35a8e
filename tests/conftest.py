"""What all tests share."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# On a machine that does other work too, threads mostly wait for each other: two took ten times as
# long as one. The models of the tests are too small to gain from more anyway.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and oracles beside the checkout (or at $SLIDEVLM_SHARED); not for distribution."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("SLIDEVLM_SHARED", beside))
    if not (folder / "oracles").is_dir():
        pytest.skip("no shared folder with real data and oracles here")
    return folder


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """caplog with the package's records, each once, also after a run took its log off the root."""
    log = logging.getLogger("slidevlm")
    before = log.level, log.propagate
    log.addHandler(caplog.handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield caplog
    log.removeHandler(caplog.handler)
    log.setLevel(before[0])
    log.propagate = before[1]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of a server that speaks S3."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket of its own."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "xSECRETx-never-in-a-log"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/runs"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, as Debian has it. One for a whole process: playwright has no second beside it."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


# Files that take minutes: begun last they would run alone, the other process idle. pytest-xdist
# keeps this order with --no-loadscope-reorder alone, as the Makefile has it: by itself it takes the
# files with the most tests first.
_LONG = (
    *("test_ranks.py", "test_fsdp.py", "test_kills.py", "test_exact.py", "test_runs.py"),
    *("test_damage.py", "test_ending.py", "test_soak.py", "test_codebase.py", "test_malicious.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; within a file, and among the others, the order stays."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))

"""A copy of a folder elsewhere: in S3, or wherever fsspec can write."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from slidevlm.documents import DocumentError, json_of
from slidevlm.errors import ConfigError, without_secrets
from slidevlm.files import replacing

log = logging.getLogger("slidevlm.remote")

RECORD = ".remote_sync.json"  # what of a folder has been copied where
_PARTIAL = ".part"
_CHECKPOINTS = "checkpoints/"
_STALLED_SECONDS = 60.0  # without a byte or a file more, nothing is waited for any longer
_LONGEST_SECONDS = 1800.0  # that the end of a run waits for its last copy
_FIRST_PAUSE_SECONDS = 5.0  # after a failure; doubled after every further one
_LAST_TRIES, _LAST_PAUSE_SECONDS = 3, 1.0


def _file_system(url: str, protocol: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise ConfigError(
            "--remote-sync needs the package fsspec (pip install 'slidevlm[remote]')"
        ) from None
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "s3":
        try:
            import s3fs  # noqa: F401
        except ImportError:
            raise ConfigError(
                "--remote-sync-protocol s3 needs the package s3fs (pip install 'slidevlm[s3]')"
            ) from None
        options |= {
            "endpoint_url": os.environ.get("AWS_ENDPOINT_URL"),
            "config_kwargs": {"connect_timeout": 10, "read_timeout": 60},
        }
    try:
        return fsspec.core.url_to_fs(url.rstrip("/"), **options)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"--remote-sync {url}: {told(error)}") from None


def told(error: BaseException) -> str:
    """The first line of an error, without what the environment keeps secret."""
    text = without_secrets((str(error).splitlines() or [""])[0])[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _recorded(content: bytes, url: str | None) -> dict[str, list[int]]:
    """Name -> bytes and time (ns) of a record, that of another `url` being empty.

    Raises:
        ValueError: it is no record.
    """
    try:
        record = json_of(content)
        if url is not None and record["url"] != url:
            return {}
        return {name: [int(size), int(at)] for name, (size, at) in record["files"].items()}
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DocumentError(f"no record of what was copied: {error!r}") from error


def _inside(folder: Path, name: str) -> Path:
    """The place of a file of the run; OSError where its name leads out of the folder."""
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        raise OSError(f"{name!r} would lead out of {folder}; it is not copied")
    return path


class Remote:
    """A remote folder of one run.

    Args:
        url: of the folder that holds the folders of runs.
        protocol: "s3" or "fsspec".
        name: of the run.

    Raises:
        ConfigError: a package is missing, or nothing knows such a URL.
    """

    def __init__(self, url: str, protocol: str, name: str) -> None:
        self.url = f"{url.rstrip('/')}/{name}"
        self._files, root = _file_system(url, protocol)
        self._root = f"{root.rstrip('/')}/{name}"
        # An object of S3 is there whole or not at all; elsewhere a file grows.
        self._whole = protocol == "s3" or url.startswith("s3://")
        self.beat = time.monotonic()  # when a byte or a file arrived

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine; None where it is elsewhere."""
        protocols = self._files.protocol
        names = (protocols,) if isinstance(protocols, str) else tuple(protocols)
        return Path(self._root).resolve() if "file" in names else None

    def _tell(self, *_: Any) -> None:
        self.beat = time.monotonic()

    def sizes(self) -> dict[str, int]:
        """Every file there and its bytes; those half copied are not among them."""
        return {name: int(info["size"]) for name, info in self._list().items()}

    def _list(self) -> dict[str, dict[str, Any]]:
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        self._tell()
        start = len(self._root.lstrip("/")) + 1
        names = {path.lstrip("/")[start:]: info for path, info in found.items()}
        return {n: i for n, i in names.items() if n and n != RECORD and not n.endswith(_PARTIAL)}

    def newest_first(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, the one that was written last first.

        Times are those of the machine that copied; what came after its last record is newer.
        """
        known = self.record()
        return sorted(
            (name for name in self._list() if name.startswith(prefix)),
            key=lambda n: (known[n][1] if n in known else math.inf, self._modified(n)),
            reverse=True,
        )

    def _modified(self, name: str) -> float:
        return float(self._files.modified(self._path(name)).timestamp())

    def record(self) -> dict[str, list[int]]:
        """Name -> bytes and time (ns) of what was copied, as of the last copy that was complete."""
        try:
            return _recorded(self._files.cat_file(self._path(RECORD)), None)
        except (FileNotFoundError, ValueError):
            return {}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def put(self, source: Path, name: str) -> None:
        """Copy a file there, whole or not at all; it may be written to meanwhile.

        Raises:
            OSError: fewer bytes arrived than the file has.
        """
        from fsspec.callbacks import Callback

        before, target = source.stat().st_size, self._path(name)
        folder, _, base = target.rpartition("/")
        partial = target if self._whole else f"{folder}/.{base}{_PARTIAL}"
        if not self._whole:
            self._files.makedirs(folder, exist_ok=True)
        beats = Callback(hooks={"beat": self._tell})
        self._files.put_file(str(source), partial, callback=beats)
        self._files.invalidate_cache()
        arrived, after = int(self._files.info(partial)["size"]), source.stat().st_size
        if not before <= arrived <= max(before, after):
            raise OSError(f"{name}: {arrived} of {before} bytes arrived")
        if partial != target:
            self._files.mv(partial, target)
        self._tell()

    def get(self, name: str, folder: Path, nanoseconds: int | None = None) -> Path:
        """Copy a file from there into a folder, whole or not at all; `nanoseconds` is its time.

        Raises:
            OSError: fewer bytes arrived than it has.
        """
        path = _inside(folder, name)
        with replacing(path) as new:
            self._files.get_file(self._path(name), str(new))
            size = int(self._files.info(self._path(name))["size"])
            if new.stat().st_size != size:
                raise OSError(f"{name}: {new.stat().st_size} of {size} bytes arrived")
            if nanoseconds is not None:
                os.utime(new, ns=(nanoseconds, nanoseconds))
        return path

    def remove(self, name: str) -> None:
        """Remove a file there; harmless where there is none."""
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))


class Mirror:
    """Copies what changes in a folder, and remembers in it what is copied.

    Raises:
        ConfigError: the copy would lie in the folder, and every copy be copied again.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        own, there = folder.resolve(), remote.folder
        if there is not None and own in (there, *there.parents):
            raise ConfigError(
                f"--remote-sync {remote.url} would copy the run folder {folder} into itself; name "
                "a folder outside of it"
            )
        self.remote, self.folder = remote, folder
        self._copied: dict[str, list[int]] | None = None
        self._seen: set[str] = set()  # what there was in the folder since this process began

    def sync(self) -> int:
        """Copy what is new or changed; then remove there checkpoints that were removed here.

        Returns:
            The number of files copied.
        """
        if self._copied is None:
            self._copied = self._remembered()
        copied, count = self._copied, 0
        for name, path in self._files():
            self._seen.add(name)
            try:
                stat = path.stat()
                mark = [stat.st_size, stat.st_mtime_ns]
                if copied.get(name) == mark:
                    continue
                self.remote.put(path, name)
            except FileNotFoundError:
                if path.exists():  # it is the remote that lacks something
                    raise
                continue  # removed meanwhile
            copied[name] = mark
            self._remember(copied)
            count += 1
        gone = [n for n in copied if n.startswith(_CHECKPOINTS) and n in self._seen]
        gone = [n for n in gone if not (self.folder / n).exists()]
        for name in gone:
            self.remote.remove(name)
            del copied[name]
            self._remember(copied)
        if count or gone:
            self.remote.put(self.folder / RECORD, RECORD)
        return count

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(name, path): checkpoints last, so that what belongs to them is there before."""
        found = []
        for root, folders, files in os.walk(self.folder):
            folders[:] = [f for f in folders if not f.startswith((".", "__pycache__"))]
            for file in files:
                path = Path(root, file)
                if not file.startswith(".") and not path.is_symlink():
                    found.append((path.relative_to(self.folder).as_posix(), path))
        return iter(sorted(found, key=lambda f: (f[0].startswith(_CHECKPOINTS), f[0])))

    def _remembered(self) -> dict[str, list[int]]:
        """What an earlier process copied and is still there."""
        try:
            recorded = _recorded((self.folder / RECORD).read_bytes(), self.remote.url)
        except (OSError, ValueError):
            recorded = {}
        there = self.remote.sizes()
        return {n: m for n, m in recorded.items() if there.get(n) == m[0]}

    def _remember(self, copied: dict[str, list[int]]) -> None:
        with replacing(self.folder / RECORD) as new:
            new.write_text(json.dumps({"url": self.remote.url, "files": copied}))


class Syncing:
    """Within, a folder is copied from time to time by a thread that nothing waits for.

    The thread ends with the process, however that ends. Leaving copies once more, and waits for
    that only as long as something moves.

    Args:
        mirror: None: nothing is copied.
        every_seconds: between two copies.
    """

    def __init__(self, mirror: Mirror | None, every_seconds: float) -> None:
        self._mirror, self._every = mirror, every_seconds
        self._first, self._end, self._done = (threading.Event() for _ in range(3))
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The first copy, which shows that it works.

        Raises:
            ConfigError: it does not.
        """
        if self._mirror is None:
            return
        self._mirror.remote.beat = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="remote sync", daemon=True)
        self._thread.start()
        if not self._moving(self._first):
            self._problem = f"nothing arrived within {_STALLED_SECONDS:g} seconds"
        if self._problem is not None:
            raise ConfigError(
                f"--remote-sync {self._mirror.remote.url}: {self._problem}; look at the address, "
                "the rights there and the credentials (AWS_*, or fsspec's own configuration)"
            )
        log.info("copying the run folder to %s", self._mirror.remote.url)

    def _work(self) -> None:
        assert self._mirror is not None
        try:
            self._mirror.sync()
        except Exception as error:  # libraries of all kinds of services raise all kinds of errors
            self._problem = told(error)
            self._first.set()
            return
        self._first.set()
        pause, failures, last = self._every, 0, 0
        while last < _LAST_TRIES:
            if self._end.wait(pause):
                last += 1
            try:
                self._mirror.sync()
            except Exception as error:
                pause = min(self._every, _FIRST_PAUSE_SECONDS * 2**failures)
                failures += 1
                log.warning("remote sync failed (%s); trying again", told(error))
                if last:
                    time.sleep(_LAST_PAUSE_SECONDS)
                continue
            if failures:
                log.info("remote sync works again")
            pause, failures = self._every, 0
            if last:
                self._done.set()
                return

    def _moving(self, event: threading.Event) -> bool:
        """Wait for an event while something moves; whether it came."""
        assert self._mirror is not None and self._thread is not None
        until = time.monotonic() + _LONGEST_SECONDS
        while not event.wait(0.05):
            now = time.monotonic()
            if now > until or now - self._mirror.remote.beat > _STALLED_SECONDS:
                return False
            if not self._thread.is_alive():
                return event.is_set()
        return True

    def __enter__(self) -> Syncing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mirror is None or not self._first.is_set() or self._problem is not None:
            return
        self._end.set()
        if isinstance(error, KeyboardInterrupt):
            return
        self._mirror.remote.beat = time.monotonic()
        if not self._moving(self._done):
            log.error(
                "the last copy to %s is not complete; `--resume latest` from there goes on from "
                "the checkpoint before",
                self._mirror.remote.url,
            )

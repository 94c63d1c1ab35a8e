"""--copy-codebase: the package is copied into the run folder, and the copy is what runs.

The command makes the run folder and the copy, and then becomes `python RUN/code train ...` (exec:
the same process for torchrun, Slurm and a terminal). Several processes meet before, to agree on the
folder, and their copies meet at another address than the one that is used up.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from slidevlm import dist, launch
from slidevlm.app.folders import CLAIMED, claimed_folder
from slidevlm.config import Config, validate, with_adam_defaults
from slidevlm.errors import ConfigError
from slidevlm.run import configure_logging, write_text

log = logging.getLogger("slidevlm")

PACKAGE = Path(__file__).resolve().parents[1]
# What a copy is told by the process that it was.
CODE, MEETING = "SLIDEVLM_CODE", "SLIDEVLM_MEETING"

_MAIN = '''\
"""`python {folder}` is `slidevlm`, with the copy of the package that lies here."""

from slidevlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
'''


def is_copy(config: Config) -> bool:
    """Whether what runs is the copy that was made for it.

    Raises:
        ConfigError: a copy was made, and Python has imported the package from elsewhere.
    """
    code = os.environ.get(CODE)
    if not config.logging.copy_codebase or code is None:
        return False
    if PACKAGE.parent != Path(code).resolve():
        raise ConfigError(
            f"--copy-codebase: Python imports slidevlm from {PACKAGE}, not from the copy in {code}"
        )
    return True


def check(config: Config) -> None:
    """ConfigError where the copy is asked for in a process that cannot become it."""
    if config.logging.copy_codebase and not is_copy(config):
        raise ConfigError(
            "--copy-codebase starts Python anew, with the copy: it works only with the command "
            "`slidevlm train`; leave it out (copy_codebase=False) here"
        )


def meeting(config: Config) -> str:
    """Where the processes meet: --dist-url, or for copies what their forerunners agreed on."""
    agreed = os.environ.get(MEETING) if is_copy(config) else None
    return agreed or config.distributed.dist_url


def run_copy(config: Config, words: Sequence[str]) -> NoReturn:
    """Make run folder and copy, and become the copy.

    Args:
        config: what `words` say.
        words: of the command line, after `slidevlm train`.

    Raises:
        ConfigError: bad arguments, the run exists, or the copy cannot be made or seen.
    """
    validate(config)
    if config.distributed.horovod:
        raise ConfigError("--copy-codebase works with torchrun or srun, not with --horovod")
    if sys.platform == "win32":
        raise ConfigError("--copy-codebase: Windows cannot put a program in another's place")
    # gloo: no CUDA is touched by a process that is about to become another.
    dist.start("gloo", torch.device("cpu"), config.distributed.dist_url)
    try:
        configure_logging(debug=config.logging.debug, main=dist.is_main())
        with claimed_folder(with_adam_defaults(config)) as folder:
            assert folder is not None, "validate has looked"
            resumes = config.checkpoint.resume is not None
            code, url = dist.from_main(lambda: (_copy(folder, resumes=resumes), _address(config)))
            seen = dist.gather_objects((code / "slidevlm" / "__init__.py").is_file())
            if not all(seen):
                raise ConfigError(
                    f"--copy-codebase: rank {seen.index(False)} does not see {code}; --logs must "
                    "lie on a disk that all machines share"
                )
        log.info("running the copy of the package in %s", code)
        dist.barrier()
    finally:
        dist.stop()
    named = [] if config.logging.name else ["--name", folder.name]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(
        sys.executable,
        [sys.executable, str(code), "train", *words, *named],
        _environment(os.environ, folder, code, url),
    )


def _copy(folder: Path, *, resumes: bool) -> Path:
    """The folder that holds the copy of the package; a run that goes on gets one of its own."""
    name = time.strftime("code-%Y_%m_%d-%H_%M_%S") if resumes else "code"
    code = folder.resolve() / name
    try:
        shutil.copytree(
            PACKAGE, code / "slidevlm", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
        write_text(code / "__main__.py", _MAIN.format(folder=name))
    except OSError as error:  # of shutil too
        raise ConfigError(f"--copy-codebase: cannot copy {PACKAGE} to {code}: {error}") from error
    return code


def _address(config: Config) -> str | None:
    """A free address of this machine, which the others reach as they reached the first one."""
    place = launch.place_of(os.environ, config.distributed.dist_url)
    if place is None:
        return None
    host = os.environ.get("MASTER_ADDR", "")
    if place.url.startswith("tcp://"):
        host = place.url.removeprefix("tcp://").rpartition(":")[0]
    for name in (host, socket.gethostname()):
        with socket.socket() as probe:
            try:
                probe.bind((name, 0))
            except OSError:  # an address of another machine: the store need not be at rank 0
                continue
            if name:
                return f"tcp://{name}:{probe.getsockname()[1]}"
    raise ConfigError(
        f"--copy-codebase: no address of this machine is known; {socket.gethostname()} is none"
    )


def _environment(
    present: Mapping[str, str], folder: Path, code: Path, url: str | None
) -> dict[str, str]:
    paths = [str(code), *filter(None, [present.get("PYTHONPATH")])]
    told = {
        **present,
        "PYTHONPATH": os.pathsep.join(paths),  # for every process that the run starts
        "PYTHONDONTWRITEBYTECODE": "1",  # the copy stays what was copied
        CLAIMED: str(folder.resolve()),
        CODE: str(code),
    }
    if url is not None:
        told[MEETING] = url
    if "TORCHELASTIC_USE_AGENT_STORE" in present:
        told["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it still holds the first meeting
    return told

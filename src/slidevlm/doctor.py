"""`slidevlm doctor`: what a machine and an installation have, and what to mend."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path

import torch

from slidevlm.app import train
from slidevlm.app.slide_model import load
from slidevlm.config import Config, with_values
from slidevlm.data.parallel import usable_cores
from slidevlm.data.synthetic import FEATURES, TEXT, synthesize
from slidevlm.precision import cpu_has_bfloat16
from slidevlm.report.plain import table
from slidevlm.run import Bar

# What the package itself cannot do without.
_NEEDED = ("torch", "numpy", "h5py", "yaml", "tokenizers", "rich", "isal", "sklearn")
# Extra -> (modules of it, what it is for).
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard",), "--report-to tensorboard"),
    "wandb": (("wandb",), "--report-to wandb"),
    "report": (("plotly",), "pages with plots: report, data check --output"),
    "slide": (("openslide",), "the picture of a slide under the attention of a model"),
    "tiffslide": (("tiffslide",), "the same, without OpenSlide"),
    "cpu": (("numba",), "embed, and caption by larger models, on a CPU up to twice as fast"),
    "umap": (("umap",), "a UMAP beside the PCA in the map of report"),
    "hf": (
        ("transformers", "sacremoses", "safetensors", "huggingface_hub"),
        "language models of Hugging Face, hf-hub: names, models export",
    ),
    "parquet": (("pyarrow",), "embed --output FILE.parquet"),
    "opt": (("pytorch_optimizer",), "--opt with the name of one of that package"),
    "zarr": (("zarr",), "features in zarr folders"),
    "xlsx": (("openpyxl",), "slide tables in XLSX"),
    "survival": (("sksurv",), "--survival-table"),
    "bnb": (("bitsandbytes",), "--use-bnb-linear"),
    "s3": (("s3fs",), "--remote-sync to S3"),
    "remote": (("fsspec",), "--remote-sync by --remote-sync-protocol fsspec"),
    "horovod": (("horovod",), "--horovod"),
}
_SHARED = Path("/dev/shm")
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: str  # "ok", "note" (nothing to mend), "warning", "error" (must be mended)
    found: str
    remedy: str = ""


def doctor(*, smoke_run: bool, as_json: bool) -> bool:
    """Print what was found; whether nothing must be mended."""
    bar = Bar("looking", 2, shown=True)
    try:
        findings = list(look())
        bar.update(1, "training a tiny model")
        if smoke_run:
            findings.append(smoke())
    finally:
        bar.close()
    healthy = not any(finding.status == "error" for finding in findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(f) for f in findings]}, indent=1))
        return healthy
    print(table(("", "status", "found"), [(f.name, f.status, f.found) for f in findings]))
    mend = [f for f in findings if f.remedy and f.status in ("warning", "error")]
    if mend:
        print("\nwhat to mend:")
        for f in mend:
            print(f"  {f.name}: {f.remedy}")
    print("\n" + ("everything needed is there" if healthy else "slidevlm will not work here"))
    return healthy


def look() -> Iterator[Finding]:
    """All but the smoke run."""
    yield _python()
    yield from (_package(module) for module in _NEEDED)
    yield _processor()
    yield _memory()
    yield _shared_memory()
    yield _disk()
    yield from _gpus()
    yield from (_extra(name, *what) for name, what in EXTRAS.items())


def _python() -> Finding:
    # An older one than 3.10 cannot even read this file.
    return Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}")


def _package(module: str) -> Finding:
    name = {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(module, module)
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        problem = f"cannot be imported: {type(error).__name__}: {error}"
        return Finding(name, "error", problem, f"pip install --force-reinstall {name}")
    version = metadata.version(name)
    wanted = _least(name)
    if wanted is not None and _numbers(version) < _numbers(wanted):
        return Finding(name, "error", version, f"pip install '{name}>={wanted}'")
    return Finding(name, "ok", version)


def _least(name: str) -> str | None:
    """The oldest version that slidevlm's own metadata allow."""
    try:
        needs = metadata.requires("slidevlm") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return None
    found = (re.fullmatch(rf"{re.escape(name)}>=([\d.]+)", need, re.IGNORECASE) for need in needs)
    return next((match[1] for match in found if match), None)


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _processor() -> Finding:
    cores, threads = usable_cores(), torch.get_num_threads()
    fast = "bfloat16 instructions" if cpu_has_bfloat16() else "no bfloat16: use --precision fp32"
    found = f"{cores} cores, torch uses {threads} threads, {fast}"
    if threads < cores and "OMP_NUM_THREADS" in os.environ:
        return Finding(
            "processor", "note", f"{found} (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})"
        )
    return Finding("processor", "ok", found)


def memory_limit(root: Path = Path("/")) -> tuple[float, float] | None:
    """Bytes of memory of this machine or container, and those that are free; None: not known."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines}
        total, free = values["MemTotal"], values["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit = float((group / "memory.max").read_text())  # "max" where there is none
        used = float((group / "memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, max(0.0, limit - used))


def _memory() -> Finding:
    found = memory_limit()
    if found is None:
        return Finding("memory", "note", "cannot be told on this system")
    total, free = found
    text = f"{free / _GB:.1f} GB free of {total / _GB:.1f} GB"
    if free < 2 * _GB:
        remedy = "close other programs; lower --workers, --batch-size, --image-features-cutoff"
        return Finding("memory", "warning", text, remedy)
    return Finding("memory", "ok", text)


def _shared_memory() -> Finding:
    if not _SHARED.is_dir():
        return Finding("shared memory", "note", "this system has no /dev/shm")
    usage = shutil.disk_usage(_SHARED)
    text = f"{usage.free / _GB:.1f} GB free of {usage.total / _GB:.1f} GB in {_SHARED}"
    if usage.free < 0.5 * _GB:
        remedy = (
            "readers hand bags over by it: start the container with --shm-size=8g (or "
            "--ipc=host), empty it, or use --workers 0"
        )
        return Finding("shared memory", "warning", text, remedy)
    return Finding("shared memory", "ok", text)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / _GB:.1f} GB free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("disk", "warning", f"{Path.cwd()} cannot be written to", "use --logs FOLDER")
    if free < 2 * _GB:
        return Finding(
            "disk", "warning", text, "checkpoints need room: delete, or --logs elsewhere"
        )
    return Finding("disk", "ok", text)


def _gpus() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(number)
        return
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    cards = _cards()
    if cards:
        remedy = (
            "install a torch that is built for CUDA (see pytorch.org)"
            if torch.version.cuda is None
            else f"the driver is too old for CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES "
            "hides the GPU: update the driver, or install a torch for an older CUDA"
        )
        text = f"{', '.join(cards)}, but torch (built {built}) finds none"
        yield Finding("gpu", "warning", text, remedy)
    else:
        yield Finding("gpu", "note", f"none; torch is built {built}, training is on the CPU")


def _gpu(number: int) -> Finding:
    name = f"gpu {number}"
    try:
        place = torch.device("cuda", number)
        properties = torch.cuda.get_device_properties(place)
        free, total = torch.cuda.mem_get_info(place)
        ones = torch.ones(64, 64, device=place)
        right = float((ones @ ones).sum()) == 64**3
    except Exception as error:  # of the driver
        remedy = "restart the machine or its driver; see nvidia-smi"
        return Finding(name, "error", f"{type(error).__name__}: {error}", remedy)
    kind = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    text = f"{kind}, {free / _GB:.1f} GB free of {total / _GB:.1f} GB"
    if not right:
        return Finding(name, "error", f"{text}; a product came out wrong", "the GPU is damaged")
    if free < total / 2:
        return Finding(name, "warning", text, "another program uses it; see nvidia-smi")
    return Finding(name, "ok", text)


def _cards() -> list[str]:
    """Names of GPUs that the driver knows, whatever torch says."""
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        result = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


# Horovod's own build fails with the torch of today.
_REMEDIES = {"horovod": "scripts/build_horovod.sh of the repository"}


def _extra(name: str, modules: tuple[str, ...], purpose: str) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        remedy = _REMEDIES.get(name, f"pip install 'slidevlm[{name}]'")
        text = f"not installed; for {purpose}: {remedy}"
        return Finding(f"extra {name}", "note", text, remedy)
    return Finding(f"extra {name}", "ok", purpose)


def smoke(run: Callable[[Path], None] | None = None) -> Finding:
    """Train a tiny model on a tiny cohort and use it, in a folder that is removed again."""
    began, told = time.perf_counter(), StringIO()
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(told):
            (run or _train_and_use)(Path(folder))
    except Exception as error:  # whatever is wrong is what this is for
        last = "\n".join(told.getvalue().strip().splitlines()[-3:])
        text = f"{type(error).__name__}: {error}" + (f" after: {last}" if last else "")
        remedy = "mend what stands above; else report it with the output of slidevlm doctor --json"
        return Finding("smoke run", "error", text, remedy)
    seconds = time.perf_counter() - began
    return Finding("smoke run", "ok", f"trained and used a tiny model in {seconds:.0f} s")


def _train_and_use(folder: Path) -> None:
    made = synthesize(folder / "cohort", specimens=20, seed=0)
    settings = {
        "hdf5_filename": str(made.hdf5),
        "hdf5_feature_attribute": FEATURES,
        "hdf5_text_attribute": TEXT,
        "train_split": str(made.split("train")),
        "test_split": str(made.split("test")),
        "model": "coca_tiny",
        "epochs": 1,
        "batch_size": 4,
        "workers": 1,  # so that a reading process and shared memory are tried too
        "image_features_cutoff": 64,
        "logs": str(folder / "logs"),
        "name": "smoke",
        "precision": "amp" if torch.cuda.is_available() else "fp32",
    }
    train(with_values(Config(), settings))
    model = load(folder / "logs" / "smoke")
    assert model.embed_text("a tumour").shape == (model.embed_dim,)

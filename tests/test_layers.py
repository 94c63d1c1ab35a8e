"""Who may import whom: the rule of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "slidevlm"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# From the left to the right; a module may import only what stands to its right.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("cli_use",),
    (
        *("demo", "doctor", "data_commands", "model_commands", "evaluation_commands"),
        *("caption_commands", "score_commands", "use_commands", "page_commands"),
        "completion",
    ),
    ("app",),
    ("train", "report"),
    ("eval",),
    ("data", "models", "losses"),
    ("config", "flags", "run"),
    (
        *("errors", "registry", "documents", "files", "batch", "dist", "fsdp", "hvd", "launch"),
        *("precision", "hub", "remote"),
    ),
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
# Within these two, neighbours may know each other (flags reads config, registry raises errors).
NEIGHBOURS = {DEPTH["config"], DEPTH["errors"]}
# These show the whole package to users and import what stands above the ground inside functions.
FACADES = ("__init__", "testing")

# Library -> the only modules (or folders, ending in a dot) of the package that may import it.
OWNERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("argparse", "optparse", "getopt", "click", "typer"), ("flags",)),
    "torch.distributed": ("dist", "fsdp"),
    "h5py": ("data.formats.",),
    **dict.fromkeys(("fsspec", "s3fs"), ("remote",)),
    **dict.fromkeys(("wandb", "tensorboard", "torch.utils.tensorboard"), ("run",)),
}
# Those that come with an extra: imported where they are used, so that slidevlm works without.
EXTRAS = (
    "tensorboard",
    "torch.utils.tensorboard",
    "wandb",
    "bitsandbytes",
    "horovod",
    "s3fs",
    "fsspec",
    "plotly",
    "transformers",
    "sacremoses",
    "safetensors",
    "huggingface_hub",
    "zarr",
    "numcodecs",
    "openpyxl",
    "sksurv",
    "pytorch_optimizer",
)


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    line: int
    module: str  # `from a import b` is "a.b"
    lazy: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING:`


class _Reader(ast.NodeVisitor):
    """Collects the imports of one module, however they are written."""

    def __init__(self, package: str) -> None:
        self.package = package  # what a leading dot stands for
        self.imports: list[Import] = []
        self._functions = 0
        self._typing = 0

    def _add(self, node: ast.AST, module: str) -> None:
        line = getattr(node, "lineno", 0)
        self.imports.append(Import(line, module, self._functions > 0, self._typing > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            self._add(node, f"{base}.{alias.name}")

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called in ("importlib.import_module", "import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                self._add(node, first.value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        # `import torch` alone already gives torch.distributed.
        if ast.unparse(node) == "torch.distributed":
            self._add(node, "torch.distributed")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        typing = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self._typing += typing
        for child in node.body:
            self.visit(child)
        self._typing -= typing
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node)

    def _function(self, node: ast.AST) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1


def _within(module: str, library: str) -> bool:
    return module == library or module.startswith(library + ".")


def _libraries(module: str, libraries: Iterator[str]) -> str | None:
    return next((library for library in libraries if _within(module, library)), None)


def violations(root: Path) -> list[str]:
    """What in the package at `root` breaks the rule: `train/loop.py:12: train imports app`."""
    files = sorted(root.rglob("*.py"))
    own = {_name(file, root) for file in files}
    found = []
    for file in files:
        name = _name(file, root)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        reader = _Reader(".".join([PACKAGE, *([package] if package else [])]))
        reader.visit(ast.parse(file.read_text(encoding="utf-8"), str(file)))
        where = file.relative_to(root).as_posix()
        top = name.partition(".")[0] or "__init__"
        if top not in DEPTH and top not in FACADES:
            found.append(f"{where}:1: {top} has no layer; give it one in LAYERS")
            continue
        # One import may be seen twice: as a statement and as an attribute.
        for item in dict.fromkeys(reader.imports):
            found += [
                f"{where}:{item.line}: {problem}" for problem in _problems(item, name, top, own)
            ]
    return found


def _name(file: Path, root: Path) -> str:
    """src/slidevlm/train/loop.py -> "train.loop"; src/slidevlm/__init__.py -> ""."""
    parts = file.relative_to(root).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def _problems(item: Import, name: str, top: str, own: set[str]) -> Iterator[str]:
    if _within(item.module, PACKAGE):
        yield from _inner(item, top, own)
        return
    library = _libraries(item.module, iter(OWNERS))
    if library is not None and not any(
        f"{name}.".startswith(owner) if owner.endswith(".") else name == owner
        for owner in OWNERS[library]
    ):
        places = " or ".join(owner.rstrip(".") for owner in OWNERS[library])
        yield f"{library} is imported in {places} alone"
    extra = _libraries(item.module, iter(EXTRAS))
    if extra is not None and not item.lazy and not item.typing:
        yield f"{extra} comes with an extra; import it inside the function that needs it"


def _inner(item: Import, top: str, own: set[str]) -> Iterator[str]:
    target = item.module.removeprefix(PACKAGE).lstrip(".")
    known = target.partition(".")[0]
    if known.startswith("__") and known != "__main__":
        return  # slidevlm.__version__
    if known not in {module.partition(".")[0] for module in own if module}:
        yield f"{item.module} goes through the public door; import from the module that has it"
        return
    if known == top:
        return
    if top in FACADES:
        ground = DEPTH.get(known) == len(LAYERS) - 1
        if not (item.lazy or item.typing or ground):
            yield f"{top} imports {known} eagerly; do it inside a function"
        return
    if known not in DEPTH:
        yield f"{top} imports {known}, which is for users alone"
        return
    mine, its = DEPTH[top], DEPTH[known]
    if its < mine:
        yield f"{top} imports {known}, which stands to its left"
    elif its == mine and mine not in NEIGHBOURS:
        yield f"{top} imports {known}; the two do not know each other"


def test_the_package_keeps_to_its_layers() -> None:
    assert SOURCE.is_dir()
    assert violations(SOURCE) == []


@pytest.mark.parametrize("module", ["slidevlm", "slidevlm.cli", "slidevlm.config"])
def test_imported_without_what_takes_long(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "slow = {'torch', 'numpy', 'h5py', 'tokenizers', 'rich', 'yaml'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# The checker itself: what it must see, and what it must let pass.


def _tree(root: Path, files: Mapping[str, str]) -> Path:
    """A package that has a module (or a folder) of every layer, and `files`."""
    content = {
        **{f"{name}.py": "" for name in ("cli", "app", "config", "flags", "run", "dist", "batch")},
        **{f"{name}/__init__.py": "" for name in ("train", "eval", "data", "models", "losses")},
        "__init__.py": "",
        "errors.py": "",
        "report/__init__.py": "",
        **files,
    }
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


BROKEN = {
    "upwards": ("train/loop.py", "from slidevlm.app import train", "train imports app"),
    "upwards, plain import": ("eval/a.py", "import slidevlm.train", "eval imports train"),
    "upwards, from the package": ("batch.py", "from slidevlm import run", "batch imports run"),
    "upwards, relative": ("models/slide/a.py", "from ... import eval", "models imports eval"),
    "upwards, relative from a module": ("dist.py", "from .data.x import y", "dist imports data"),
    "upwards, relative in a package": ("data/__init__.py", "from ..app import x", "imports app"),
    "upwards, inside a function": (
        "errors.py",
        "def f():\n    import slidevlm.config",
        "errors.py:2: errors imports config",
    ),
    "upwards, for types alone": (
        "models/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from slidevlm.train import x",
        "models imports train",
    ),
    "upwards, by importlib": (
        "data/a.py",
        "import importlib\nimportlib.import_module('slidevlm.train.loop')",
        "data imports train",
    ),
    "upwards, in an else": ("data/a.py", "if x:\n    pass\nelse:\n    import slidevlm.app", "app"),
    "siblings data, models": ("data/a.py", "from slidevlm.models import x", "do not know"),
    "siblings losses, data": ("losses/a.py", "from slidevlm.data import x", "do not know"),
    "siblings train, report": ("train/a.py", "from slidevlm.report import x", "do not know"),
    "report, from eval": ("eval/a.py", "from slidevlm.report import x", "eval imports report"),
    "public door": ("eval/a.py", "from slidevlm import create_model", "public door"),
    "public door, plain": ("eval/a.py", "import slidevlm", "public door"),
    "no layer": ("helpers.py", "", "helpers has no layer"),
    "parser": ("app.py", "import argparse", "argparse is imported in flags alone"),
    "parser, another": ("cli.py", "from click import command", "click is imported in flags alone"),
    "torch.distributed": ("train/a.py", "import torch.distributed as d", "in dist or fsdp alone"),
    "torch.distributed, from torch": (
        "train/a.py",
        "from torch import distributed",
        "dist or fsdp alone",
    ),
    "torch.distributed, below it": (
        "models/a.py",
        "from torch.distributed.fsdp import fully_shard",
        "models/a.py:1: torch.distributed is imported in dist or fsdp alone",
    ),
    "torch.distributed, attribute": (
        "train/a.py",
        "import torch\ndef f():\n    torch.distributed.barrier()",
        "train/a.py:3: torch.distributed is imported in dist or fsdp alone",
    ),
    "h5py": ("data/cases.py", "import h5py", "h5py is imported in data.formats alone"),
    "h5py, in a function": ("eval/a.py", "def f():\n    import h5py", "in data.formats alone"),
    "h5py, a like-named module": ("data/formats_old.py", "import h5py", "in data.formats alone"),
    "wandb": ("train/a.py", "def f():\n    import wandb", "wandb is imported in run alone"),
    "wandb, eager": ("run.py", "import wandb", "wandb comes with an extra"),
    "tensorboard": (
        "app.py",
        "def f():\n    from torch.utils.tensorboard import SummaryWriter",
        "torch.utils.tensorboard is imported in run alone",
    ),
    **{
        f"extra {extra}, eager": ("models/a.py", f"import {extra}.x", f"{extra} comes with")
        for extra in ("bitsandbytes", "plotly", "transformers", "horovod")
    },
    "extra, in try": (
        "models/a.py",
        "try:\n    import transformers\nexcept ImportError:\n    pass",
        "transformers comes with an extra",
    ),
    "extra, in a class": ("models/a.py", "class A:\n    import plotly", "plotly comes with"),
    "facade, eager": ("__init__.py", "from slidevlm.models import x", "__init__ imports models"),
    "testing, eager": ("testing.py", "from slidevlm.data import x", "testing imports data"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_checker_reports(kind: str, tmp_path: Path) -> None:
    file, text, message = BROKEN[kind]
    found = violations(_tree(tmp_path / PACKAGE, {file: text}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{file}:")
    assert message in found[0]


def test_checker_reports_use_of_the_testing_module(tmp_path: Path) -> None:
    files = {"testing.py": "", "eval/a.py": "from slidevlm.testing import tiny"}
    assert violations(_tree(tmp_path / PACKAGE, files)) == [
        "eval/a.py:1: eval imports testing, which is for users alone"
    ]


def test_checker_reports_everything_at_once(tmp_path: Path) -> None:
    files = {"losses/a.py": "import h5py\nfrom slidevlm import app, data", "batch.py": ""}
    assert violations(_tree(tmp_path / PACKAGE, files)) == [
        "losses/a.py:1: h5py is imported in data.formats alone",
        "losses/a.py:2: losses imports app, which stands to its left",
        "losses/a.py:2: losses imports data; the two do not know each other",
    ]


def test_checker_lets_pass_what_is_allowed(tmp_path: Path) -> None:
    files = {
        "__init__.py": (
            "from typing import TYPE_CHECKING\n"
            "__version__ = '1'\n"
            "if TYPE_CHECKING:\n    from slidevlm.app import train\n"
            "def __getattr__(name):\n    from slidevlm import models\n"
        ),
        "testing.py": (
            "from slidevlm.batch import Bags\ndef tiny():\n    import slidevlm.data.cases\n"
        ),
        "cli.py": (
            "from slidevlm import __version__\nfrom slidevlm.flags import parse\n"
            "def f():\n    from slidevlm.app import train\n"
        ),
        "app.py": (
            "import slidevlm.train.loop as loop\nfrom slidevlm import data, dist, eval, report\n"
        ),
        "flags.py": "import argparse\nfrom slidevlm.config import Config",
        "dist.py": "import torch.distributed as td\nimport torch\nx = torch.distributed.ReduceOp",
        "data/formats/a.py": "import h5py\nfrom ..cases import b\nfrom slidevlm.run import c",
        "data/formats/__init__.py": "import h5py",
        "report/page.py": "from slidevlm.eval import a\ndef f():\n    import plotly.graph_objects",
        "eval/a.py": "from slidevlm.data import b\nfrom slidevlm.models.c import d",
        "run.py": "def f():\n    import wandb\n    from torch.utils.tensorboard import a",
        "models/a.py": (
            "from typing import TYPE_CHECKING\n"
            "import torch.utils.data\n"
            "if TYPE_CHECKING:\n    import transformers\n"
            "def f():\n    import bitsandbytes, transformers\n"
        ),
    }
    assert violations(_tree(tmp_path / PACKAGE, files)) == []

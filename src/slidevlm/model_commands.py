"""The commands on models: list, show, new, export."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from slidevlm.app.export import export
from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, Model, ModelConfig, build_model, resolve, zoo
from slidevlm.models.freeze import image_groups, text_groups
from slidevlm.models.mode import Group
from slidevlm.models.text.huggingface import HuggingFaceConfig
from slidevlm.report.plain import table
from slidevlm.run import configure_logging, working, write_text

_TILE_WIDTH = 1024  # where a configuration takes it from the data
_TOWERS = ("slide", "text", "decoder")


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step with one bag in float32."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int | None  # None: they depend on where the tiles lie

    @property
    def total(self) -> int | None:
        """All of it."""
        if self.activations is None:
            return None
        return self.weights + self.gradients + self.optimizer + self.activations


def list_models(*, as_json: bool = False) -> None:
    """Print every shipped configuration and what it is."""
    contents = {name: json.loads(_text_of(name)) for name in zoo.names()}
    if as_json:
        wanted = ("family", "description")
        print(json.dumps({n: {k: c[k] for k in wanted} for n, c in contents.items()}, indent=1))
        return
    before = max(map(len, contents)) + len("  family  ")
    # Of many names the descriptions differ at their ends, so none is cut.
    room = shutil.get_terminal_size().columns - before if sys.stdout.isatty() else sys.maxsize
    rows: list[tuple[str, str, str]] = []
    for name, content in contents.items():
        first, *more = textwrap.wrap(content["description"], max(room, 40))
        rows += [(name, content["family"], first), *(("", "", line) for line in more)]
    print(table(("model", "family", "what"), rows))


def _text_of(name: str) -> str:
    return resources.files(zoo.__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")


def show(name: str, tiles: int, tokens: int | None, *, as_json: bool = False) -> None:
    """Print a model's parts, its groups for locking, and the memory of a training step."""
    config = zoo.load(name)
    known = config.tile_width is not None
    config = resolve(replace(config, tile_width=config.tile_width or _TILE_WIDTH))
    with torch.device("meta"):
        model = build_model(config, vocabulary(config))
    length = tokens or config.text.context_length
    if as_json:
        print(json.dumps(_shown(config, model, tiles, length), indent=1))
        return
    print(f"{name}: family {config.family}, embedding {config.embed_dim} wide")
    if config.family != "lm":
        width = "" if known else " (taken from the data; assumed here)"
        print(f"tiles {config.tile_width} wide{width}")
    print(f"vocabulary {vocabulary(config)}, reports of {config.text.context_length} tokens")
    if config.generation.changed:
        chosen = (f"{key} {value}" for key, value in config.generation.changed.items())
        print(f"reports are written with {', '.join(chosen)}")
    print()
    print(table(("part", "parameters", "trainable"), parts(model)))
    for tower in _TOWERS:
        rows = [(group, _count(_parameters(part))) for group, part in groups(model, tower)]
        if rows:
            print(f"\n{tower}: groups from input to output")
            print(table(("group", "parameters"), rows))
    print("\n" + _memory_lines(memory(config, tiles, length), tiles, length))


def _shown(config: ModelConfig, model: Model, tiles: int, tokens: int) -> dict[str, object]:
    """What `show` prints, as values."""
    found = memory(config, tiles, tokens)
    return {
        "family": config.family,
        "embed_dim": config.embed_dim,
        "tile_width": config.tile_width,
        "vocabulary": vocabulary(config),
        "context_length": config.text.context_length,
        "generation": config.generation.changed,
        "parts": {n: {"parameters": p, "trainable": t} for n, p, t in parts(model)},
        "groups": {
            tower: {group: _count(_parameters(part)) for group, part in groups(model, tower)}
            for tower in _TOWERS
        },
        "memory_bytes": {**asdict(found), "tiles": tiles, "tokens": tokens},
    }


def vocabulary(config: ModelConfig) -> int:
    """Tokens of the vocabulary, at most: a trained tokenizer may have fewer."""
    text = config.text
    if isinstance(text, HuggingFaceConfig):
        assert text.architecture is not None, "resolve has found it"
        return int(text.architecture["vocab_size"])
    return int(text.vocab_size)


def parts(model: nn.Module) -> list[tuple[str, int, int]]:
    """(part, parameters, trainable ones) of a model, and their sum. Tied ones count once."""
    rows, seen = [], set[int]()
    members = [(name, list(part.parameters())) for name, part in model.named_children()]
    own = [p for _, p in model.named_parameters(recurse=False)]
    for name, parameters in [*members, ("temperature and weights", own)]:
        new = [p for p in parameters if id(p) not in seen]
        seen |= {id(p) for p in new}
        if new:
            rows.append((name, _count(new), _count([p for p in new if p.requires_grad])))
    return [*rows, ("all", sum(r[1] for r in rows), sum(r[2] for r in rows))]


def groups(model: Model, tower: str) -> list[Group]:
    """The groups of a tower, as the lock arguments count them; none where the model lacks it."""
    if tower == "text":
        return text_groups(model)
    if tower == "slide":
        return image_groups(model) if isinstance(model, CoCa) else []
    return [] if model.decoder is None else model.decoder.groups()


def _parameters(members: Sequence[nn.Module | nn.Parameter]) -> list[nn.Parameter]:
    return [p for m in members for p in (m.parameters() if isinstance(m, nn.Module) else [m])]


def _count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def memory(config: ModelConfig, tiles: int, tokens: int) -> Memory:
    """What one training step holds, counted in a pass over tensors without content.

    Activations are what autograd keeps for the backward pass; what a kernel needs while it runs,
    at most a few of the largest tensors, comes on top.
    """
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    with FakeTensorMode():
        model = build_model(config, vocabulary(config))
        model.train()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        bags = Bags(
            torch.zeros(tiles, config.tile_width or 1), (tiles,), torch.zeros(tiles, 2), None, "um"
        )
        words = torch.zeros(1, tokens, dtype=torch.int64)
        try:
            kept = _kept(model, bags, words)
        except DynamicOutputShapeException:
            kept = None
    return Memory(weights, gradients, 2 * gradients, kept)


def _kept(model: Model, bags: Bags, tokens: Tensor) -> int:
    """Bytes of all tensors that the backward pass would need, each storage once."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            kept[place] = tensor  # held, so that no later one gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(bags, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _memory_lines(found: Memory, tiles: int, tokens: int) -> str:
    rows = [
        ("weights", _megabytes(found.weights)),
        ("gradients", _megabytes(found.gradients)),
        ("AdamW", _megabytes(found.optimizer)),
        ("activations", _megabytes(found.activations)),
        ("together", _megabytes(found.total)),
    ]
    text = f"MB in float32 of a training step with a bag of {tiles} tiles and {tokens} tokens\n"
    text += table(("of", "MB"), rows)
    if found.activations is None:
        text += "\nactivations depend on where the tiles lie (windows of neighbours)"
    return text


def _megabytes(count: int | None) -> float | str:
    return "not known" if count is None else round(count / 1e6, 1)


def new(name: str, file: Path) -> None:
    """Write a shipped configuration to a file, to be edited and given to --model.

    Raises:
        ConfigError: no such model, or the file exists.
    """
    if file.suffix != ".json":
        raise ConfigError(f"{file} must end in .json, the form of the shipped models")
    if file.exists():
        raise ConfigError(f"{file} exists; choose another name")
    zoo.load(name)
    text = _text_of(name) if name in zoo.names() else Path(name).read_text(encoding="utf-8")
    write_text(file, text)
    print(f"wrote {file}; edit it and train with --model {file}")


def export_model(source: str, folder: Path, *, as_json: bool = False) -> None:
    """Write a trained model as a folder, and say what is in it."""
    configure_logging(debug=False, main=True)
    with working("writing the model"):
        files = export(source, folder)
    if as_json:
        print(json.dumps({"folder": str(folder), "files": [file.name for file in files]}, indent=1))
        return
    for path in files:
        kilobytes = path.stat().st_size / 1e3
        size = f"{kilobytes:.0f} kB" if kilobytes < 1000 else f"{kilobytes / 1e3:.1f} MB"
        print(f"wrote {path} ({size})")
    print(f"use it by --pretrained {folder}, in every command that uses a model, or slidevlm.load")

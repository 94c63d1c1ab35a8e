"""--torchcompile and --torchscript: the parts of a model that compute on tensors alone, made fast.

A bag's length is a number, and a graph that contained numbers would have to be made anew for each
batch. So what is compiled are the largest parts whose inputs and outputs are tensors: text towers,
transformer layers, projections to keys and values, poolers. What stands between, the attention
over each bag and the choice of rows, stays Python. Weights stay where they are: state
dictionaries, optimizers and copies of the model do not notice.
"""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.mode import CountsRows, Recomputing
from slidevlm.models.text.huggingface import HuggingFaceTower

# Layers of one kind share their graphs, one for each of their shapes, modes and types.
GRAPHS_OF_A_KIND = 64


class Fast:
    """In the place of a module's `forward`: `fast` for calls with tensors, else the module's own.

    Calls with something else are those of generation, whose caches grow with each token.
    """

    def __init__(self, module: nn.Module, fast: Callable[..., Any]) -> None:
        self.module, self.fast = module, fast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if all(_is_tensors(value) for value in (*args, *kwargs.values())):
            return self.fast(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def compile_regions(model: nn.Module) -> list[str]:
    """torch.compile the parts of a model, for tensors of any length; returns their names.

    Random numbers are drawn as without it, so that dropout is the same.
    """
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, GRAPHS_OF_A_KIND)
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    names = []
    for name, module in regions(model):
        kind = type(module)
        if kind not in compiled:
            compiled[kind] = torch.compile(
                kind.forward, dynamic=True, options={"fallback_random": True}
            )
        module.forward = Fast(module, compiled[kind])
        names.append(name)
    return names


def script_regions(model: nn.Module) -> list[str]:
    """torch.jit.script the parts of a model; returns their names.

    Raises:
        ConfigError: a part that cannot be scripted, named.
    """
    for name, module in model.named_modules():
        if isinstance(module, HuggingFaceTower):
            raise ConfigError(
                f"--torchscript: {name} ({type(module).__name__}) cannot be scripted; leave it "
                "out, or choose another model"
            )
        if isinstance(module, Recomputing):
            module.stops_early = False
    names = []
    for name, module in regions(model, counting=True):
        names += _script(name, module)
    return names


def _script(name: str, module: nn.Module) -> list[str]:
    """Script a part, or else the parts that it consists of."""
    scripted = Scripted()
    try:
        scripted.build(module)
    except Exception as error:  # torch.jit raises many kinds
        smaller = list(regions(module, f"{name}.", counting=True))
        if not smaller:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"--torchscript: {name} ({type(module).__name__}) cannot be scripted: {reason}"
            ) from error
        return [n for name, part in smaller for n in _script(name, part)]
    module.forward = Fast(module, scripted)
    return [name]


class Scripted:
    """A module's `forward` in TorchScript, with the module's own weights and its modes.

    A copy of the module makes a script of its own when it is first called.
    """

    def __init__(self) -> None:
        self.graph: Any = None
        self.modes: tuple[bool, ...] = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.graph is None:
            self.build(module)
        modes = tuple(m.training for m in module.modules())
        if modes != self.modes:
            # Module by module: those that rest stay in evaluation mode.
            for (_, copied), mode in zip(self.graph.named_modules(), modes, strict=True):
                copied.training = mode
            self.modes = modes
        # Optimised, a script draws the dropout of a pass with graph otherwise than that of one
        # without, and accumulation needs them equal.
        with torch.jit.optimized_execution(False):
            return self.graph(*args, **kwargs)

    def build(self, module: nn.Module) -> None:
        """Script the module's own `forward`."""
        for kind in {type(m) for m in module.modules()}:
            _resolve_annotations(kind)
        fast = module.__dict__.pop("forward", None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit as a whole
                self.graph = torch.jit.script(module)
        finally:
            if fast is not None:
                module.forward = fast

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return Scripted()


def _resolve_annotations(kind: type[nn.Module]) -> None:
    """TorchScript does not read annotations of a class that are text."""
    for base in kind.__mro__:
        if base.__module__.startswith("slidevlm."):
            hints = typing.get_type_hints(base)
            if own := inspect.get_annotations(base):
                base.__annotations__ = {name: hints[name] for name in own}


def regions(
    model: nn.Module, prefix: str = "", *, counting: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """(name, part) of the largest parts that compute on tensors alone.

    A tower that computes activations again is not one of them, but its layers are. Parts that
    count their rows are among them with `counting`.
    """
    for name, child in model.named_children():
        again = isinstance(child, Recomputing) and child.checkpointing
        counts = isinstance(child, CountsRows) and not counting
        if not again and not counts and computes_on_tensors(type(child)):
            yield prefix + name, child
        else:
            yield from regions(child, f"{prefix}{name}.", counting=counting)


def computes_on_tensors(kind: type[nn.Module]) -> bool:
    """Whether `forward` of a kind of module needs nothing but tensors, and returns nothing else.

    Torch's own modules, and what is derived of one, are left: by themselves they would not gain.
    """
    if any(b.__module__.startswith("torch.") for b in kind.__mro__ if b is not nn.Module):
        return False
    hints = typing.get_type_hints(kind.forward)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is inspect.Parameter.empty]
    positional = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    return (
        positional
        and bool(parameters)
        and all(_of_tensors(hints.get(p.name)) for p in needed)
        and _of_tensors(hints.get("return"))
    )


def _of_tensors(hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return all(h is type(None) or _of_tensors(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return all(_of_tensors(h) for h in typing.get_args(hint))
    return hint is Tensor


def _is_tensors(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_tensors(v) for v in value)
    return value is None or isinstance(value, Tensor)

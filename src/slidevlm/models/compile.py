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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slidevlm.models.mode import Recomputing

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


def regions(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, part) of the largest parts that compute on tensors alone.

    A tower that computes activations again is not one of them, but its layers are.
    """
    for name, child in model.named_children():
        again = isinstance(child, Recomputing) and child.checkpointing
        if not again and computes_on_tensors(type(child)):
            yield prefix + name, child
        else:
            yield from regions(child, f"{prefix}{name}.")


def computes_on_tensors(kind: type[nn.Module]) -> bool:
    """Whether `forward` of a kind of module needs nothing but tensors, and returns nothing else.

    Torch's own modules are left: by themselves they would not gain.
    """
    if kind.__module__.startswith("torch."):
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

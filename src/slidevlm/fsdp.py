"""--fsdp: each process keeps a part of every weight, of its gradient and of its moments (FSDP2).

`shard` makes a model's parameters DTensors, cut along their first dimension. A block's weights are
gathered when it is called and dropped after it, forward and backward; its gradients are summed over
processes, each process getting its part (Zhao et al., PyTorch FSDP, 2023). A parameter that is one
number stays whole on every process: it cannot be cut, and the step sums its gradient itself.

Everything else of slidevlm works on plain tensors: `part` is the memory of this process's part,
`whole` and `on_main` put parts together, `part_of` cuts.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slidevlm import dist
from slidevlm.batch import Output

M = TypeVar("M", bound=nn.Module)
# A module that is called as a whole, and the names of other methods by which it is called.
Unit = tuple[nn.Module, Sequence[str]]


def is_cut(tensor: Tensor) -> bool:
    """Whether each process has a part of it only."""
    return hasattr(tensor, "to_local")


def part(tensor: Tensor) -> Tensor:
    """The memory of this process's part, without graph; of a whole tensor all of it."""
    mine: Any = tensor.detach()
    local: Tensor = mine.to_local() if is_cut(mine) else mine
    return local


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor belongs into this process's part of `like`, in memory of its own."""
    if not is_cut(like):
        return tensor
    rows = math.ceil(len(tensor) / dist.world_size())  # as torch.chunk cuts, and so DTensor
    return tensor[rows * dist.rank() : rows * (dist.rank() + 1)].clone()


def whole(mine: Tensor, like: Tensor) -> Tensor:
    """All processes' parts of a tensor of the shape of `like`, on every process; collective."""
    if not is_cut(like):
        return mine
    from torch.distributed.tensor import DTensor

    cut: Any = like
    joined = DTensor.from_local(
        mine,
        cut.device_mesh,
        cut.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return joined.full_tensor()


def on_main(mine: Tensor, like: Tensor) -> Tensor:
    """The same on the first process, in CPU memory; nothing on the others."""
    if not is_cut(like):
        return mine
    joined = whole(mine, like)
    return joined.cpu() if dist.is_main() else joined.new_empty(0, device="cpu")


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights and buffers on the first process, tied ones once; collective."""
    known: dict[int, Tensor] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            mine = part(tensor)
            # Buffers change within the next step, before a state is copied.
            known[id(tensor)] = on_main(mine, tensor) if is_cut(tensor) else mine.clone()
        found[name] = known[id(tensor)]
    return found


def shard(model: nn.Module, units: Iterable[Unit], device: torch.device) -> None:
    """Cut a model's parameters, in place; they must be equal on all processes before.

    Args:
        model: everything that is in no unit is gathered for the whole pass.
        units: inner ones before those they lie in.
        device: of the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    _show_tensors_of_outputs()
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    numbers = {p for p in model.parameters() if p.ndim == 0}
    narrow = any(p.dtype.itemsize < 4 for p in model.parameters())
    sums = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    for module, methods in (*units, (model, ())):
        # The root, too, is cut again after its forward pass: whatever moves the weights between two
        # passes (the optimizer, an average) is seen by the next one.
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=sums,
            ignored_params=numbers,
        )
        cut: Any = module
        cut.set_gradient_divide_factor(1.0)  # the gradient of the whole batch is a sum
        cut.set_force_sum_reduction_for_comms(True)  # gloo has no product beside a sum
        for method in methods:
            register_fsdp_forward_method(module, method)


def _show_tensors_of_outputs() -> None:
    """FSDP gathers weights again when a gradient reaches an output: it must find its tensors."""
    if Output in _pytree.SUPPORTED_NODES:
        return
    names = tuple(Output.__dataclass_fields__)
    _pytree.register_pytree_node(
        Output,
        lambda output: ([getattr(output, name) for name in names], None),
        lambda values, _: Output(*values),
    )


class Whole(Generic[M]):
    """The same model in one piece, for evaluation, on every process.

    An evaluation calls a model as often as its own slides, words and prompts want, differently on
    each process; gathering block by block would wait for calls that never come. So its weights are
    there, complete, within `filled`, and empty otherwise. Buffers are shared.

    Args:
        model: before it is cut.
    """

    def __init__(self, model: M) -> None:
        known: dict[int, Any] = {
            id(p): nn.Parameter(p.new_empty(0), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        known |= {id(buffer): buffer for buffer in model.buffers()}
        self.model = copy.deepcopy(model, known)
        self._cut = model

    @contextmanager
    @torch.no_grad()
    def filled(self) -> Iterator[None]:
        """Within, the weights are those that the cut model has now; entering is collective."""
        pairs = list(zip(self.model.parameters(), self._cut.parameters(), strict=True))
        for mine, cut in pairs:
            mine.data = whole(part(cut), cut)
        try:
            yield
        finally:
            for mine, _ in pairs:
                mine.data = mine.data.new_empty(0)


def norm(parameters: Iterable[nn.Parameter], cut: Iterable[bool]) -> Tensor:
    """Norm of the gradients of all processes.

    Args:
        parameters: their gradients are parts, or whole and equal on all processes.
        cut: which of both.
    """
    parts: list[Tensor] = []
    equal: list[Tensor] = []
    for parameter, is_part in zip(parameters, cut, strict=True):
        if parameter.grad is not None:
            (parts if is_part else equal).append(parameter.grad)
    squares = dist.sum_(_square(parts)) if parts else torch.zeros(())
    return (squares + _square(equal).to(squares.device) if equal else squares).sqrt()


def _square(gradients: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).square()

"""Checkpoints beside the loop: copied while the next step computes, written by another thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidevlm.errors import CheckpointError
from slidevlm.train.checkpoint import AbandonedError, ModelState, TrainState

log = logging.getLogger("slidevlm.checkpoint")

Store = Callable[[Sequence[Path], ModelState, TrainState], None]


class Snapshots:
    """Copies of states on the CPU, in memory that is used again for the next one."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, model: ModelState, training: TrainState) -> tuple[ModelState, TrainState]:
        """Both with all their tensors copied, equal ones once; what was taken before is gone."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        states = self._copy(model, copies), self._copy(training, copies)
        for device in {key[1] for key in copies if key[1].type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return states

    def _copy(self, value: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), copies)
        if isinstance(value, dict):
            return {k: self._copy(v, copies) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(v, copies) for v in value)
        if isinstance(value, (ModelState, TrainState)):
            parts = {f.name: getattr(value, f.name) for f in fields(value)}
            return replace(value, **{k: self._copy(v, copies) for k, v in parts.items()})
        return value

    def _tensor(self, tensor: Tensor, copies: dict[tuple[Any, ...], Tensor]) -> Tensor:
        if not tensor.numel():
            return tensor.cpu()
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:  # tied weights stay one tensor of the file
            place = len(copies)
            if place == len(self._buffers) or not _alike(self._buffers[place], tensor):
                made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[place : place + 1] = [made]
            copies[key] = self._buffers[place].copy_(tensor, non_blocking=True)
        return copies[key]


def _alike(buffer: Tensor, tensor: Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


class Writer:
    """Stores one checkpoint at a time in a thread of its own.

    The loop may go on at once, but has to `settle` before it changes a tensor of the state: until
    then weights and moments are copied. Reading them at the same time does no harm.

    Args:
        store: writes the files, or raises CheckpointError; None: nothing is stored.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._snapshots = Snapshots()
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._problem: str | None = None
        self._fault: BaseException | None = None

    def start(self, files: Sequence[Path], model: ModelState, training: TrainState) -> None:
        """Begin to store; the one before must have been waited for."""
        assert self._thread is None, "one at a time"
        if self._store is None:
            return
        self._copied.clear()
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(
            target=self._work, args=(files, model, training, ready), name="checkpoint"
        )
        self._thread.start()

    def settle(self) -> None:
        """Wait until the state is copied."""
        self._copied.wait()

    @property
    def busy(self) -> bool:
        """Whether something is being stored, or was and has not been waited for."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether there is an end that has not been waited for."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> str | None:
        """Wait for the end, if anything is being stored; what went wrong, or None."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        return self._problem

    def _work(
        self,
        files: Sequence[Path],
        model: ModelState,
        training: TrainState,
        ready: torch.cuda.Event | None,
    ) -> None:
        self._problem = None
        assert self._store is not None
        try:
            try:
                states = self._copy(model, training, ready)
            finally:
                self._copied.set()
            self._store(files, *states)
        except CheckpointError as error:
            self._problem = str(error)
            log.error("%s; training goes on, and saving is tried again", error)
        except AbandonedError:
            log.warning("a checkpoint was given up half written; those before it stay")
        except BaseException as error:  # a fault of the program, raised where it is waited for
            self._fault = error

    def _copy(
        self, model: ModelState, training: TrainState, ready: torch.cuda.Event | None
    ) -> tuple[ModelState, TrainState]:
        if ready is None:
            return self._snapshots.take(model, training)
        # A stream of its own: the copy waits for the last step, and no step for the copy's start.
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(ready)
            return self._snapshots.take(model, training)

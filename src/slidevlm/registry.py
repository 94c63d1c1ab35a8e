"""Named builders: a name in a configuration -> the class or function that builds it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from slidevlm.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary whose missing keys are explained by the present ones.

    >>> losses = Registry("loss")
    >>> @losses.register("mean")
    ... def mean(x):
    ...     return sum(x) / len(x)
    >>> losses["mean"]([1, 3])
    2.0
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument under `name`; a second one is a bug."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(unknown(self.kind, name, self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def unknown(kind: str, name: str, known: object) -> str:
    """Message for an unknown name: the nearest known ones first, else all of them."""
    names = sorted(known)  # type: ignore[call-overload]
    near = " or ".join(nearest(name, names))
    hint = f"did you mean {near}?" if near else f"choose one of: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names that look like `name`, the nearest first."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.6)

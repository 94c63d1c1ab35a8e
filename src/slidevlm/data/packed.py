"""Names and reports of many specimens in a form that forked workers share.

A process that so much as looks at a Python object writes its count of references. A forked worker
then has a page of memory of its own, and after an epoch all pages of the index. Here the texts
lie in one block without counts, and the objects are made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from slidevlm.data.cases import Case

_AS_IT_IS = "surrogatepass"  # names of folders need not be UTF-8


class Texts:
    """N texts, unchangeable."""

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode(errors=_AS_IT_IS) for text in texts]
        self._block = b"".join(parts)
        self._bounds = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=self._bounds[1:])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # IndexError, and negative ones count from the end
        start, stop = self._bounds[index : index + 2].tolist()
        return self._block[start:stop].decode(errors=_AS_IT_IS)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class Cases:
    """N specimens, unchangeable."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._specimens = Texts(case.specimen for case in cases)
        self._patients = Texts(case.patient for case in cases)
        self._locations = Texts(case.location for case in cases)

    def __len__(self) -> int:
        return len(self._specimens)

    def __getitem__(self, index: int) -> Case:
        return Case(self._specimens[index], self._patients[index], self._locations[index])

    def __iter__(self) -> Iterator[Case]:
        return map(Case, self._specimens, self._patients, self._locations)

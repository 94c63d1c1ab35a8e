"""Numbers that tell whether two bags of features are the same, bit for bit."""

from __future__ import annotations

import hashlib

from torch import Tensor, uint8


class Digest:
    """BLAKE2b of the rows of features, taken block by block; the blocks' sizes do not matter."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._form = ""
        self.rows = 0

    def update(self, features: Tensor) -> None:
        """Go on with [K, D] rows, all of one type and width."""
        form = f"{features.dtype}[{features.shape[1]}]".removeprefix("torch.")
        assert self._form in ("", form), (self._form, form)
        self._form = form
        self.rows += len(features)
        if features.numel():
            self._hash.update(features.contiguous().view(uint8).numpy().data)

    def hexdigest(self) -> str:
        """32 hexadecimal digits of values, type, width and number of rows."""
        whole = self._hash.copy()
        whole.update(f"{self._form}{self.rows}".encode())
        return whole.hexdigest()

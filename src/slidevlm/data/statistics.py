"""Statistics of the training split that a new model starts from.

A cohort of a few hundred slides cannot teach a text encoder what words mean. Latent semantic
analysis of its own reports (Deerwester et al., 1990) is a prior that needs nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.sampling import generator
from slidevlm.data.tokenizer import TextTokenizer
from slidevlm.errors import DataError

_SPECIMENS, _ROWS = 512, 512  # enough for two moments of a channel, read in a second or two
_REPORTS = 50_000


def tile_moments(store: CaseStore, cases: Sequence[Case], seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature channel, each [D] float32.

    From at most 512 specimens and 512 tiles of each, drawn by `seed`. A constant channel has
    standard deviation 1.
    """
    draw = generator("moments", seed)
    chosen = draw.permutation(len(cases))[:_SPECIMENS]
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    problem: DataError | None = None
    for index in chosen:
        case = cases[index]
        try:
            length = store.length(case)
            rows = None
            if length > _ROWS:
                rows = np.sort(draw.choice(length, _ROWS, replace=False))
            features = store.read(case, rows).features.double()
        except DataError as error:  # the loader is what reports it, or drops it
            problem = error
            continue
        finite = features[features.isfinite().all(1)]  # likewise
        count += len(finite)
        total = total + finite.sum(0)
        squares = squares + finite.square().sum(0)
    if problem is not None and not total.ndim:  # nothing could be read
        raise problem
    mean = total / max(count, 1)
    deviation = (squares / max(count, 1) - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(deviation > 1e-6, deviation, 1.0).float()


def token_table(tokenizer: TextTokenizer, reports: Sequence[str], rank: int, seed: int) -> Tensor:
    """Latent semantic analysis of reports, as a table of token vectors [V, rank] float32.

    Reports are rows of `(1 + log count) * idf`, normalised; their first `rank` right singular
    vectors, times idf, are the table. A text's place in that space is the sum of its tokens'
    vectors, each weighted by `1 + log count`. Tokens that differ only in case or in a leading
    space share a vector. Tokens of no report have zeros.

    At most 50,000 reports, drawn by `seed`, are used; the decomposition is a randomised one
    (Halko et al., 2011) of a sparse matrix.
    """
    fold = _folded(tokenizer)
    picked = np.sort(generator("reports", seed).permutation(len(reports))[:_REPORTS])
    counts = [Counter(fold[tokenizer.tokens(reports[i])].tolist()) for i in picked]
    row = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
    column = np.array([token for c in counts for token in c], dtype=np.int64)
    value = 1 + np.log(np.array([n for c in counts for n in c.values()], dtype=np.float64))
    frequency = np.bincount(column, minlength=int(fold.max()) + 1)
    idf = np.where(frequency > 0, np.log((1 + len(counts)) / (1 + frequency)) + 1, 0.0)
    value = value * idf[column]
    norms = np.sqrt(np.bincount(row, weights=value**2, minlength=len(counts)))
    value = value / np.maximum(norms[row], 1e-12)
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([row, column])),
        torch.from_numpy(value),
        (len(counts), len(idf)),
        check_invariants=True,
    ).coalesce()
    size = min(matrix.shape)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        _, _, right = torch.svd_lowrank(matrix, q=min(size, rank + 16), niter=6)
    table = torch.zeros(len(idf), rank, dtype=torch.float64)
    kept = min(rank, right.shape[1])
    table[:, :kept] = right[:, :kept] * torch.from_numpy(idf)[:, None]
    return table[torch.from_numpy(fold)].float()


def _folded(tokenizer: TextTokenizer) -> np.ndarray:
    """[V]: equal numbers for tokens that read the same, case and spaces aside."""
    numbers: dict[str, int] = {}
    return np.array(
        [
            numbers.setdefault(tokenizer.piece(i).strip().casefold() or f"#{i}", len(numbers))
            for i in range(tokenizer.vocab_size)
        ]
    )

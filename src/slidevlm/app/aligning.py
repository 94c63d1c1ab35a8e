"""A new model's alignment: canonical correlations of the training split's features and reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.sampling import generator
from slidevlm.data.tokenizer import TextTokenizer
from slidevlm.errors import DataError
from slidevlm.models.alignment import Aligned, Alignment, AlignmentConfig

log = logging.getLogger("slidevlm")
_PAIRS, _ROWS = 4096, 1024  # specimens at most, and tiles of each: minutes of reading at most


def align(
    alignment: Alignment,
    store: CaseStore,
    cases: Sequence[Case],
    reports: Sequence[str],
    tokenizer: TextTokenizer,
    seed: int,
) -> None:
    """Let a model's alignment start from the training split's pairs.

    Of at most 4,096 specimens and 1,024 tiles of each, drawn by `seed`. Specimens that cannot be
    read are left out here; the loader is what reports them.

    Raises:
        DataError: fewer than two specimens could be read, or their reports have no words.
    """
    alignment.set_pieces([tokenizer.piece(i) for i in range(tokenizer.vocab_size)])
    draw = generator("alignment", seed)
    rows, kept = [], []
    for index in np.sort(draw.permutation(len(cases))[:_PAIRS]):
        found = _features(store, cases[index], draw)
        if found is not None:
            rows.append(alignment.statistics(found, (len(found),))[0].double())
            kept.append(reports[index])
    words = [_words(alignment, tokenizer, report) for report in kept]
    if len(rows) < 2 or not any(len(of_tokens) for of_tokens, _ in words):
        raise DataError(
            f"{len(rows)} training specimens could be read with words of their reports; the "
            "model's alignment needs two at least: see the warnings of slidevlm data check, or set "
            "alignment.rank to 0"
        )
    aligned = analyse(alignment.config, torch.stack(rows), words, len(alignment.pieces))
    alignment.set(aligned)
    log.info("alignment: %d specimens, %d words", len(rows), len(aligned.hashes))


def _features(store: CaseStore, case: Case, draw: np.random.Generator) -> Tensor | None:
    try:
        length = store.length(case)
        rows = np.sort(draw.choice(length, _ROWS, replace=False)) if length > _ROWS else None
        features = store.read(case, rows).features
    except DataError:
        return None
    features = features[features.isfinite().all(1)]
    return features if len(features) else None


# A report's n words: their numbers [n], and [2, m] places of words and the tokens they are made of.
Words = tuple[np.ndarray, np.ndarray]


def _words(alignment: Alignment, tokenizer: TextTokenizer, report: str) -> Words:
    tokens = np.array(tokenizer.tokens(report), dtype=np.int64)
    given = torch.from_numpy(tokens)[None]
    if not len(tokens):
        return tokens, np.zeros((2, 0), dtype=np.int64)
    hashes, ends, starts = alignment.word_hashes(given, torch.ones_like(given, dtype=torch.bool))
    last = ends[0].nonzero()[:, 0]
    spans = [range(a, b + 1) for a, b in zip(starts[0][last].tolist(), last.tolist(), strict=True)]
    places = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
    made_of = tokens[np.array([i for span in spans for i in span], dtype=np.int64)]
    return hashes[0][last].numpy(), np.stack([places, made_of])


def analyse(config: AlignmentConfig, x: Tensor, words: Sequence[Words], vocab_size: int) -> Aligned:
    """Regularised canonical correlation analysis of n pairs, in float64.

    Statistics: standardised, each kind (mean and deviation; random features) scaled to a mean
    squared length of 1, ridge `image_penalty`. Reports: tf-idf of `(1 + log count)`, normalised,
    their first `components` singular vectors, centred; ridge `text_penalty` times the largest
    eigenvalue. The canonical variates of both sides are scaled by their correlation to `power`, so
    that directions of which features tell nothing count for nothing.

    Computed as the ridge regression of the whitened reports from the statistics: along the
    canonical directions it is diagonal, and multiplies by the squared correlations.

    Args:
        config: the model's.
        x: [n, S] statistics.
        words: of each of the n reports.
        vocab_size: V.
    """
    n = len(x)
    hashes, columns, counts = _table_of(words, config)
    frequency = (counts > 0).sum(0)
    idf = torch.from_numpy(np.log((1 + n) / (1 + frequency)) + 1)
    text = torch.from_numpy(np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0.0)) * idf
    text = text / text.norm(dim=1, keepdim=True).clamp_min(1e-12)
    right = _right_vectors(text, config.components)  # [W, c]
    seen = text @ right
    middle = seen.mean(0)
    seen = seen - middle
    values, vectors = torch.linalg.eigh(seen.T @ seen)
    whiten = vectors * (values.clamp_min(0) + config.text_penalty * values[-1]).rsqrt()
    seen = seen @ whiten

    centre, spread = x.mean(0), x.std(0, correction=0)
    sizes = [x.shape[1] - config.random_features, config.random_features]
    blocks = torch.cat([torch.full((s,), float(s) * sum(b > 0 for b in sizes)) for s in sizes])
    scale = torch.where(spread > 1e-9, spread, 1.0) * blocks.double().sqrt()
    images = (x - centre) / scale
    dual = torch.linalg.solve(
        images @ images.T + config.image_penalty * torch.eye(n, dtype=x.dtype), seen
    )
    weight = images.T @ dual  # [S, c]
    agreement = seen.T @ (images @ weight)
    squared, turn = torch.linalg.eigh((agreement + agreement.T) / 2)
    order = squared.argsort(descending=True)[: config.rank]
    squared, turn = squared[order].clamp_min(1e-9), turn[:, order]
    directions = weight @ turn * squared ** ((config.power - 1) / 2) / scale[:, None]
    into = whiten @ turn * squared ** (config.power / 2)  # [c, r]
    table = idf[:, None] * (right @ into)  # [W, r]
    pad = config.rank - len(order)

    def wide(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, pad)).float()

    return Aligned(
        centre.float(),
        wide(directions),
        torch.from_numpy(hashes),
        idf.float(),
        wide(table),
        wide(middle @ into),
        wide(_of_pieces(table, words, columns, vocab_size)),
    )


def _table_of(
    words: Sequence[Words], config: AlignmentConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which words count, and how often each is in each of the n reports.

    Returns:
        Hashes [W] of the words that count, ascending; for every word of all reports, end to end,
        its place among them, -1 where it does not count; and counts [n, W] float64.
    """
    n = len(words)
    known, inverse = np.unique(np.concatenate([h for h, _ in words]), return_inverse=True)
    row = np.repeat(np.arange(n), [len(h) for h, _ in words])
    # Counted by pairs: a table of all reports by all words would be gigabytes.
    pairs, times = np.unique(row * len(known) + inverse, return_counts=True)
    row, word = np.divmod(pairs, len(known))
    frequency = np.bincount(word, minlength=len(known))
    # A share of very few reports would leave no words; one that is in one report is in every share.
    allowed = np.flatnonzero(frequency <= max(1.0, config.most_reports * n))
    most = allowed[np.argsort(-frequency[allowed], kind="stable")[: config.words]]
    chosen = np.sort(most)  # by hash, as known is
    place = np.full(len(known), -1)
    place[chosen] = np.arange(len(chosen))
    kept = place[word] >= 0
    counts = np.zeros((n, len(chosen)))
    counts[row[kept], place[word[kept]]] = times[kept]
    return known[chosen], place[inverse], counts


def _right_vectors(matrix: Tensor, count: int) -> Tensor:
    """[n, W] -> [W, c]: the first right singular vectors, c at most `count` and the rank."""
    values, left = torch.linalg.eigh(matrix @ matrix.T)
    order = values.argsort(descending=True)[:count]
    order = order[values[order] > 1e-9 * values[-1]]
    return matrix.T @ left[:, order] * values[order].rsqrt()


def _of_pieces(table: Tensor, words: Sequence[Words], rows: np.ndarray, vocab_size: int) -> Tensor:
    """[V, r]: the mean vector of the words a token occurs in, scaled to a mean square of 1.

    `rows`: of the table, for each report's words one after the other; -1 where it has none.
    """
    first = np.cumsum([0, *(len(h) for h, _ in words)])
    word = np.concatenate([p[0] + begin for (_, p), begin in zip(words, first, strict=False)])
    token = np.concatenate([p[1] for _, p in words])
    row = rows[word]
    total = torch.zeros(vocab_size, table.shape[1], dtype=table.dtype)
    given = torch.where(torch.from_numpy(row >= 0)[:, None], table[torch.from_numpy(row)], 0.0)
    total.index_add_(0, torch.from_numpy(token), given)
    count = torch.bincount(torch.from_numpy(token), minlength=vocab_size).clamp_min(1)
    mean = total / count[:, None]
    used = mean.square().sum(1)
    return mean / used[used > 0].mean().clamp_min(1e-12).sqrt()

"""Where a trained model attends in a bag, and whether it matters to the model's own embedding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slidevlm.app.trained import Trained
from slidevlm.batch import Bags
from slidevlm.data.dataset import Sample, collate
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa
from slidevlm.models.attention_maps import report_attention, slide_attention
from slidevlm.models.generate import Decoding, draft
from slidevlm.precision import Precision

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


@dataclass(frozen=True, eq=False)
class Attention:
    """Weights of the T tiles of a bag; each set of weights adds up to 1.

    Args:
        specimen: its name; "bag" for one in memory.
        tiles: [T] float32, of the slide embedding.
        positions: [T, 2] as the data have them, in `unit`; None without.
        slides: [T] number of each tile's slide.
        unit: "um" or "px".
        sentences: P sentences of a report written greedily; empty where none was asked for.
        by_sentence: [P, T] float32.
        tokens: [L] of the report, BOS first; empty where none was asked for.
        parts: [P, L - 1] float32, how much tokens 1 to L - 1 count in each sentence; rows sum to 1.
    """

    specimen: str
    tiles: np.ndarray
    positions: np.ndarray | None
    slides: np.ndarray
    unit: str | None
    sentences: tuple[str, ...]
    by_sentence: np.ndarray
    tokens: tuple[int, ...]
    parts: np.ndarray


@dataclass(frozen=True)
class Dropped:
    """What dropping a share of the tiles does to the slide embedding.

    Cosines of the embedding of what is left with that of all tiles: 1 is no effect.
    """

    share: float
    most_attended: float
    least_attended: float
    random_mean: float
    random_least: float
    random_most: float


@dataclass(frozen=True)
class Changed:
    """What dropping a share of the tiles does to a sentence of the report.

    Changes of the sentence's mean log-probability a token, in nats, given the words before it: 0 is
    no effect, below 0 the model would write it less readily.
    """

    share: float
    most_attended: float
    random_mean: float
    random_least: float
    random_most: float


@dataclass(frozen=True)
class Faithfulness:
    """The check of attention: of the slide embedding, and of each of P sentences."""

    slide: list[Dropped]
    sentences: list[list[Changed]]


def attend(trained: Trained, precision: Precision, sample: Sample, *, sentences: bool) -> Attention:
    """Follow the attention of one specimen.

    Raises:
        ConfigError: the model has no attention over single tiles, or no report to follow.
    """
    model, bags, bag = _coca(trained), _bags(sample, precision), sample.bag
    with precision.autocast():
        tiles = slide_attention(model, bags)
    texts, parts = _sentences(trained, precision, bags) if sentences else ((), None)
    found, ids = np.zeros((0, len(tiles)), np.float32), ()
    shares = np.zeros((0, 0), np.float32)
    if parts is not None:
        ids, shares = tuple(parts[0].tolist()), parts[1].cpu().numpy()
        with precision.autocast():
            found = report_attention(model, bags, *parts).float().cpu().numpy()
    positions = bag.positions
    if positions is not None and bag.centres is not None:
        positions = positions + bag.centres  # as they were before they were centred
    return Attention(
        sample.case.specimen,
        tiles.float().cpu().numpy(),
        None if positions is None else positions.numpy(),
        np.zeros(len(tiles), np.int64) if bag.slides is None else bag.slides.numpy(),
        bag.unit,
        texts,
        found,
        ids,
        shares,
    )


def faithfulness(
    trained: Trained, precision: Precision, sample: Sample, seen: Attention, seeds: Sequence[int]
) -> Faithfulness:
    """Drop the most attended tiles, the least attended, and random ones, in several shares.

    A sentence is judged by the tiles that it attends to most itself.

    Args:
        seen: of `attend`, of the same sample.
        seeds: one random choice each.
    """
    model, bags = _coca(trained), _bags(sample, precision)
    count, device = len(seen.tiles), bags.features.device
    tokens = torch.tensor([seen.tokens], dtype=torch.int64, device=device)  # [1, L]
    parts = torch.from_numpy(seen.parts).to(device)

    def of(kept: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The slide embedding [E], and each sentence's mean log-probability a token [P]."""
        rows = torch.from_numpy(np.sort(kept)).to(device)
        left = Bags(
            bags.features[rows],
            (len(rows),),
            None if bags.positions is None else bags.positions[rows],
            None if bags.slides is None else bags.slides[rows],
            bags.unit,
        )
        with torch.inference_mode(), precision.autocast():
            if not seen.sentences:
                return model.encode_image(left)[0].float(), np.zeros(0)
            output = model(left, tokens, torch.ones_like(tokens, dtype=torch.bool))
        assert output.logits is not None, "it has written the sentences"
        logs = output.logits[0].float().log_softmax(-1)
        likely = logs.gather(1, tokens[0, 1:, None])[:, 0]  # [L - 1]
        return output.image_embedding[0].float(), (parts @ likely).cpu().numpy()

    whole, text = of(np.arange(count))
    order = np.argsort(-seen.tiles, kind="stable")
    by_sentence = [np.argsort(-row, kind="stable") for row in seen.by_sentence]
    draws = [np.random.default_rng(seed).permutation(count) for seed in seeds]
    slide: list[Dropped] = []
    sentences: list[list[Changed]] = [[] for _ in seen.sentences]
    for share in SHARES:
        dropped = min(count - 1, max(1, round(share * count)))
        most = float(of(order[dropped:])[0] @ whole)
        least = float(of(order[: count - dropped])[0] @ whole)
        random = [of(draw[dropped:]) for draw in draws]
        chance = [float(embedding @ whole) for embedding, _ in random]
        mean = sum(chance) / len(chance)
        slide.append(Dropped(dropped / count, most, least, mean, min(chance), max(chance)))
        for number, mine in enumerate(by_sentence):
            change = float(of(mine[dropped:])[1][number] - text[number])
            others = [float(found[number] - text[number]) for _, found in random]
            mean = sum(others) / len(others)
            sentences[number].append(
                Changed(dropped / count, change, mean, min(others), max(others))
            )
    return Faithfulness(slide, sentences)


def _coca(trained: Trained) -> CoCa:
    if not isinstance(trained.model, CoCa):
        raise ConfigError("this model is a language model: it reads no tiles to attend to")
    return trained.model


def _bags(sample: Sample, precision: Precision) -> Bags:
    return collate([sample]).bags.to(precision.device)


def _sentences(
    trained: Trained, precision: Precision, bags: Bags
) -> tuple[tuple[str, ...], tuple[Tensor, Tensor] | None]:
    """A greedy report's sentences; its tokens [L] and the part [P, L - 1] of each sentence."""
    tokenizer, model = trained.tokenizer, _coca(trained)
    decoding = Decoding(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    with torch.inference_mode(), precision.autocast():
        ((written, *_),) = draft(model, bags, ["bag"], decoding)
    tokens = list(written.tokens)
    text = tokenizer.decode(tokens)
    ends = [m.end() for m in _SENTENCE_END.finditer(text)]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    # A token belongs to the sentence in which its last character stands.
    lasts = [len(tokenizer.decode(tokens[: k + 1])) for k in range(len(tokens))]
    owner = np.searchsorted(ends, np.maximum(lasts, 1)).clip(max=len(ends) - 1)
    starts = [0, *ends[:-1]]
    names, rows = [], []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mine = owner == number
        if mine.any() and text[start:end].strip():
            names.append(text[start:end].strip())
            rows.append(mine / mine.sum())
    if not rows:
        return (), None
    device = bags.features.device
    ids = torch.tensor([tokenizer.bos_id, *tokens], device=device)
    return tuple(names), (ids, torch.tensor(np.stack(rows), dtype=torch.float32, device=device))

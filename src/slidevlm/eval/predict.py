"""One evaluation pass over a split: model and loader -> Predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm import dist
from slidevlm.batch import Batch, Predictions
from slidevlm.errors import DataError
from slidevlm.eval.text_metrics.ptb import tokenize
from slidevlm.losses import caption_loss_sum
from slidevlm.models import Model
from slidevlm.models.generate import Decoding, Lookup, generate
from slidevlm.models.mode import evaluation_mode
from slidevlm.precision import Precision

log = logging.getLogger("slidevlm.eval")

_ELEMENTS = 1 << 24  # of the similarity matrix held at a time, and five times that beside it
_ROWS = 1024  # of it at most


class LeftError(Exception):
    """An evaluation was left before its end, on purpose; it has no result."""


@dataclass(frozen=True)
class Writing:
    """How reports are generated: token choice, and token ids -> text."""

    decoding: Decoding
    decode: Callable[[Sequence[int]], str]

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Of a report, as it is scored: by them reports are chosen that agree."""
        return tokenize(self.decode(tokens))


@dataclass
class _Part:
    """What one rank knows after its share of the split."""

    specimens: list[str]
    patients: list[str]
    report_ids: np.ndarray
    image: np.ndarray
    text: np.ndarray
    generated: list[str]
    caption_sums: list[float]  # of each batch
    caption_tokens: int


def predict(
    model: Model,
    batches: Sequence[Batch] | torch.utils.data.DataLoader[Batch],
    reports: dict[str, str],
    precision: Precision,
    writing: Writing | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
    leave: Callable[[], bool] = lambda: False,
    *,
    complete: bool = True,
) -> Predictions:
    """Embed (and, with `writing`, describe) every specimen once; the same result on every rank.

    Args:
        model: the training mode of each of its modules is restored, also after an error.
        batches: this rank's share of the split.
        reports: specimen -> report of the whole split, in the split's order.
        precision: of the forward pass; embeddings and losses are float32.
        writing: generate reports too.
        on_batch: told the number of specimens done on this rank.
        leave: asked before the first batch and after each, on every rank for itself: True on one
            ends the evaluation of all.
        complete: False where the loader may drop specimens; the result then lacks them.

    Raises:
        DataError: all have been dropped.
        LeftError: a rank was to leave; on every rank.
    """
    with evaluation_mode(model), torch.inference_mode():
        mine = _share(model, batches, precision, writing, on_batch, leave)
    shares = dist.gather_objects(mine)
    if None in shares:
        raise LeftError
    parts = [p for p in shares if p is not None and p.specimens]  # a rank may have had none
    found = {s for p in parts for s in p.specimens}
    if not found:
        raise DataError(f"none of the split's {len(reports)} specimens could be used")
    if not complete:
        reports = {name: text for name, text in reports.items() if name in found}
    return _merge(parts, reports, model, writing is not None)


def _share(
    model: Model,
    batches: Sequence[Batch] | torch.utils.data.DataLoader[Batch],
    precision: Precision,
    writing: Writing | None,
    on_batch: Callable[[int], None],
    leave: Callable[[], bool],
) -> _Part | None:
    """What this rank finds, or None where it has left."""
    if leave():
        return None
    part = _Part([], [], np.zeros(0, np.int64), np.zeros((0, 0)), np.zeros((0, 0)), [], [], 0)
    ids: list[np.ndarray] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    lookup = Lookup()
    for cpu_batch in dist.alone.each(batches):
        if not len(cpu_batch):  # all its specimens were bad
            continue
        with dist.stepping:
            batch = cpu_batch.to(precision.device)
            with precision.autocast():
                output = model(batch.bags, batch.tokens, batch.token_mask, only_real=True)
            if output.image_embedding is not None:  # a language model embeds nothing
                images.append(output.image_embedding)
                texts.append(output.text_embedding)
            ids.append(cpu_batch.report_ids.numpy().copy())  # or it would hold the bags' memory
            if output.logits is not None:
                total = caption_loss_sum(output.logits, batch.tokens, batch.token_mask)
                part.caption_sums.append(total.item())
                part.caption_tokens += int(cpu_batch.token_mask[:, 1:].sum())
            if writing is not None:
                with precision.autocast():
                    rows = generate(
                        model,
                        batch.bags,
                        batch.specimen_ids,
                        writing.decoding,
                        lookup=lookup,
                        words=writing.words,
                    )
                part.generated += [writing.decode(row) for row in rows]
            part.specimens += batch.specimen_ids
            part.patients += batch.patient_ids
        on_batch(len(part.specimens))
        if leave():
            return None
    if ids:
        part.report_ids = np.concatenate(ids)
    if images:
        part.image = torch.cat(images).float().cpu().numpy()
        part.text = torch.cat(texts).float().cpu().numpy()
    return part


def _merge(
    parts: list[_Part], reports: dict[str, str], model: Model, generated: bool
) -> Predictions:
    specimens = [s for p in parts for s in p.specimens]
    place = {specimen: i for i, specimen in enumerate(specimens)}
    assert len(place) == len(specimens) == len(reports), "each specimen exactly once"
    order = [place[specimen] for specimen in reports]
    patients = [s for p in parts for s in p.patients]
    texts = [s for p in parts for s in p.generated]
    report_ids = np.concatenate([p.report_ids for p in parts])[order]
    scale = float(model.log_scale.detach().exp())
    bias = None if model.bias is None else float(model.bias.detach())
    losses: dict[str, float] = {}
    image: np.ndarray | None = None
    text: np.ndarray | None = None
    if all(len(p.image) for p in parts):
        image = np.concatenate([p.image for p in parts])[order]
        text = np.concatenate([p.text for p in parts])[order]
        _warn_of_broken("slide", image, tuple(reports))
        _warn_of_broken("report", text, tuple(reports))
        losses["contrastive"] = split_contrastive_loss(image, text, report_ids, scale, bias)
    tokens = sum(p.caption_tokens for p in parts)
    if tokens:
        # Exactly the same in whatever order processes did the batches.
        losses["caption"] = math.fsum(s for p in parts for s in p.caption_sums) / tokens
    return Predictions(
        specimen_ids=tuple(reports),
        patient_ids=tuple(patients[i] for i in order),
        reports=tuple(reports.values()),
        report_ids=report_ids,
        image_embedding=image,
        text_embedding=text,
        logit_scale=scale,
        generated=tuple(texts[i] for i in order) if generated else None,
        losses=losses,
    )


def _warn_of_broken(what: str, embeddings: np.ndarray, specimens: tuple[str, ...]) -> None:
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        log.warning(
            "%d of %d %s embeddings are not finite (%s%s): no query finds them, losses are not "
            "defined; the weights have diverged, or --precision has too narrow a range",
            len(broken),
            len(embeddings),
            what,
            ", ".join(specimens[i] for i in broken[:10]),
            ", ..." if len(broken) > 10 else "",
        )


def split_contrastive_loss(
    image: np.ndarray, text: np.ndarray, report_ids: np.ndarray, scale: float, bias: float | None
) -> float:
    """The contrastive loss over a whole split, identical reports masked.

    It does not depend on the batch size, unlike a mean over batches. Bounded memory: a block
    of rows at a time.

    Args:
        image: [N, E].
        text: [N, E].
        report_ids: [N].
        scale: multiplies the cosine.
        bias: given for a model of the sigmoid loss, which is then what is computed.
    """
    return (
        _one_way(image, text, report_ids, scale, bias) / 2
        + _one_way(text, image, report_ids, scale, bias) / 2
    )


def _one_way(
    queries: np.ndarray, keys: np.ndarray, ids: np.ndarray, scale: float, bias: float | None
) -> float:
    q, k, names = torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(ids)
    total, step = 0.0, max(1, min(_ROWS, _ELEMENTS // len(k)))
    for start in range(0, len(q), step):
        rows = torch.arange(start, min(start + step, len(q)))
        own = rows[:, None] == torch.arange(len(k))
        same = (names[rows][:, None] == names) & ~own
        logits = scale * q[rows] @ k.T
        if bias is None:
            total += F.cross_entropy(
                logits.masked_fill(same, float("-inf")), rows, reduction="sum"
            ).item()
        else:
            terms = -F.logsigmoid(torch.where(own, 1.0, -1.0) * (logits + bias))
            total += terms.masked_fill(same, 0.0).sum().item()
    return total / len(q)

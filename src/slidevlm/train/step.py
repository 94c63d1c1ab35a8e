"""One exact optimizer step over any number of micro-batches and processes.

The contrastive loss compares every slide with every report of the whole step, so its
gradient is not a sum over micro-batches. With accumulation a step therefore goes twice
through the model: once without graph for all embeddings, then, knowing the gradient of the
global loss with respect to them, each micro-batch again with graph, its dropout replayed
(Gao et al., GradCache, 2021). One micro-batch needs one pass. The caption loss is a sum over
tokens divided by the tokens of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slidevlm import dist
from slidevlm.batch import Batch, Output
from slidevlm.errors import TrainingError
from slidevlm.losses import caption_loss_sum, contrastive_loss, siglip_loss
from slidevlm.models import Model
from slidevlm.precision import Precision
from slidevlm.train.optim import set_rate

# image [N, E], text [N, E], scale [], bias [] or None, report_ids [N] -> []
Contrastive = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Objective:
    """What is minimised: the weighted sum of the terms; a weight of 0 drops its term."""

    contrastive: Contrastive
    contrastive_weight: float
    caption_weight: float
    mask_duplicates: bool


def softmax_term(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, report_ids: Tensor | None
) -> Tensor:
    """CLIP's loss as a `Contrastive`."""
    return contrastive_loss(image, text, scale, report_ids)


def sigmoid_term(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, report_ids: Tensor | None
) -> Tensor:
    """SigLIP's loss as a `Contrastive`."""
    assert bias is not None, "a model for the sigmoid loss has a bias"
    return siglip_loss(image, text, scale, bias, report_ids)


@dataclass
class Terms:
    """What a step tells the log; tensors, so that nothing waits for the device needlessly."""

    loss: Tensor
    contrastive: Tensor
    caption: Tensor
    scale: Tensor
    gradient_norm: Tensor
    skipped: bool

    def floats(self) -> dict[str, float]:
        """Values for the log."""
        return {
            "loss": self.loss.item(),
            "contrastive_loss": self.contrastive.item(),
            "caption_loss": self.caption.item(),
            "logit_scale": self.scale.item(),
            "gradient_norm": self.gradient_norm.item(),
        }


class Step:
    """Computes gradients of the global objective and moves the weights.

    With `ragged`, ranks may have unequal numbers of specimens, or none: the gradient is that of
    all there are, and where there are none at all the weights stay. Otherwise all must have the
    same number, and need not tell each other.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        precision: Precision,
        clip_norm: float | None,
        *,
        ragged: bool = False,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.precision = precision
        self.scaler = precision.scaler()
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.with_logits = objective.caption_weight > 0 and model.decoder is not None
        self.ragged = ragged
        self._gather = dist.gather_rows if ragged else dist.gather
        self.skipped = 0
        self._skipped_in_a_row = 0

    def __call__(self, batches: Sequence[Batch], rate: float) -> Terms:
        """One optimizer step on this rank's micro-batches."""
        if self.ragged and not any(dist.gather_objects(len(batches))):
            return self._nothing()
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.gradients(batches)
        return self._move(terms, rate, batches)

    def gradients(self, batches: Sequence[Batch]) -> Terms:
        """Leave the gradient of the global objective in every parameter's `grad`."""
        if len(batches) == 1:
            outputs = [self._forward(batches[0], with_logits=self.with_logits)]
            terms = self._backward(batches, outputs, iter(outputs))
        else:
            seeds = torch.randint(2**62, (len(batches),)).tolist()
            pairs = list(zip(batches, seeds, strict=True))
            with torch.no_grad():  # the embeddings alone are kept
                outputs = [self._replay(b, s, with_logits=False) for b, s in pairs]
            again = (self._replay(b, s, with_logits=self.with_logits) for b, s in pairs)
            terms = self._backward(batches, outputs, again)
        dist.sum_gradients(self.parameters)
        return terms

    def _nothing(self) -> Terms:
        """A step of which no rank has any specimen left: skipped, without touching the weights."""
        self._skip([])
        lost = torch.tensor(math.nan)
        scale = self.model.log_scale.detach().exp()
        return Terms(lost, lost, lost, scale, torch.zeros(()), skipped=True)

    def _forward(self, batch: Batch, *, with_logits: bool) -> Output:
        with self.precision.autocast():
            output: Output = self.model(
                batch.bags,
                batch.tokens,
                batch.token_mask,
                with_logits=with_logits,
                only_real=True,
            )
        return output

    def _replay(self, batch: Batch, seed: int, *, with_logits: bool) -> Output:
        """A forward pass whose dropout depends on `seed` alone."""
        device = batch.tokens.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._forward(batch, with_logits=with_logits)

    def _backward(
        self, batches: Sequence[Batch], embedded: Sequence[Output], outputs: Iterator[Output]
    ) -> Terms:
        """Gradients of this rank's share; `outputs` yields each micro-batch with its graph.

        One at a time: with accumulation the graph of a micro-batch is built, used and freed
        before the next one's.
        """
        contrastive, image_gradients, text_gradients = self._contrastive(batches, embedded)
        count = self.model.log_scale.new_zeros((), dtype=torch.int64)
        for batch in batches:
            count = count + batch.token_mask[:, 1:].sum()
        count = dist.sum_(count).clamp_min(1)
        caption = torch.zeros((), device=count.device)
        self.scaler.scale(caption)  # makes it ready, also where this rank has no specimen
        for batch, image_gradient, text_gradient in zip(
            batches, image_gradients, text_gradients, strict=True
        ):
            output = next(outputs)
            # Sending the known gradient of the global loss through this graph.
            surrogate = output.logit_scale.new_zeros(())
            if self.objective.contrastive_weight > 0:
                surrogate = surrogate + (_present(output.image_embedding) * image_gradient).sum()
                surrogate = surrogate + (_present(output.text_embedding) * text_gradient).sum()
            if self.with_logits:
                assert output.logits is not None
                mine = caption_loss_sum(output.logits, batch.tokens, batch.token_mask) / count
                surrogate = surrogate + self.objective.caption_weight * mine
                caption = caption + mine.detach()
            self.scaler.scale(surrogate).backward()
            del output, surrogate
        caption = dist.sum_(caption.float())  # of one type, also where this rank had none
        weights = self.objective
        return Terms(
            loss=weights.contrastive_weight * contrastive + weights.caption_weight * caption,
            contrastive=contrastive,
            caption=caption,
            scale=self.model.log_scale.detach().exp(),
            gradient_norm=torch.zeros(()),
            skipped=False,
        )

    def _contrastive(
        self, batches: Sequence[Batch], embedded: Sequence[Output]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """The global contrastive loss, and its weighted gradients for this rank's micro-batches.

        Every rank computes the whole loss from everybody's embeddings. Scale and bias, which
        every rank would thus count in full, are divided by the number of ranks.
        """
        sizes = [len(b) for b in batches]
        if self.objective.contrastive_weight == 0:
            nothing = self.model.log_scale.detach().new_zeros(())
            return nothing, [nothing] * len(sizes), [nothing] * len(sizes)
        images = self._of_all([_present(o.image_embedding) for o in embedded])
        texts = self._of_all([_present(o.text_embedding) for o in embedded])
        none = self.model.log_scale.new_zeros(0, dtype=torch.int64)
        ids = torch.cat(self._gather(torch.cat([none, *(b.report_ids for b in batches)])))
        # [N, E] each, as leaves to differentiate by.
        image, text = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
        masked = ids if self.objective.mask_duplicates else None
        loss = self.objective.contrastive(
            image, text, self.model.log_scale.exp(), self.model.bias, masked
        )
        temperature = [p for p in (self.model.log_scale, self.model.bias) if p is not None]
        temperature = [p for p in temperature if p.requires_grad]
        gradients = torch.autograd.grad(loss, [image, text, *temperature])
        weight = self.objective.contrastive_weight
        scale = self.scaler.scale(loss.new_tensor(weight / dist.world_size()))
        for parameter, gradient in zip(temperature, gradients[2:], strict=True):
            parameter.grad = gradient * scale
        first = sum(len(part) for part in images[: dist.rank()])
        mine = slice(first, first + sum(sizes))
        return (
            loss.detach(),
            (weight * gradients[0][mine]).split(sizes),
            (weight * gradients[1][mine]).split(sizes),
        )

    def _of_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings of all micro-batches of every rank, [n, E] each, without graph."""
        if not parts:  # a rank without specimens cannot know E
            return self._gather(torch.zeros((0, 0), device=self.model.log_scale.device))
        return self._gather(torch.cat([part.detach() for part in parts]))

    def _move(self, terms: Terms, rate: float, batches: Sequence[Batch]) -> Terms:
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        finite = bool(torch.isfinite(norm) & torch.isfinite(terms.loss))
        if finite:
            set_rate(self.optimizer, rate)
            self.scaler.step(self.optimizer)
            self.model.clamp_scale()
            self._skipped_in_a_row = 0
        else:
            self._skip(batches)
        self.scaler.update()
        return replace(terms, gradient_norm=norm, skipped=not finite)

    def _skip(self, batches: Sequence[Batch]) -> None:
        """Count a skipped step, and give up when that is hopeless."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        specimens = ", ".join(s for b in batches for s in b.specimen_ids) or "none"
        raise TrainingError(
            f"loss or gradient was not finite, or no specimen usable, in {MAX_SKIPPED_IN_A_ROW} "
            f"steps in a row; the last step's specimens: {specimens}. Look at their features, or "
            "lower --lr, or use --precision fp32 or --grad-clip-norm 1"
        )


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the contrastive loss needs both embeddings"
    return tensor

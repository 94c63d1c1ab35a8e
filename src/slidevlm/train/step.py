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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slidevlm import dist, fsdp
from slidevlm.batch import Batch, Output
from slidevlm.errors import TrainingError
from slidevlm.losses import caption_loss_sum
from slidevlm.models import Model
from slidevlm.precision import Precision, wide
from slidevlm.train.contrast import Contrastive, Pairs, Sigmoid, Softmax, way
from slidevlm.train.masters import Masters
from slidevlm.train.optim import set_rate
from slidevlm.train.overlap import Overlap
from slidevlm.train.parts import save_whole

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Objective:
    """What is minimised: the weighted sum of the terms; a weight of 0 drops its term."""

    contrastive: Contrastive
    contrastive_weight: float
    caption_weight: float
    mask_duplicates: bool
    # How the contrastive gradient is computed over ranks, never what it is: see contrast.py.
    local_loss: bool = False
    gather_with_grad: bool = False


softmax_term, sigmoid_term = Softmax(), Sigmoid()


@dataclass
class Terms:
    """What a step tells the log; tensors, so that nothing waits for the device needlessly."""

    loss: Tensor
    contrastive: Tensor | None  # None: the model has no such loss, or it has no weight
    caption: Tensor | None
    scale: Tensor
    gradient_norm: Tensor
    skipped: bool

    def floats(self) -> dict[str, float]:
        """Values for the log."""
        losses = {"contrastive_loss": self.contrastive, "caption_loss": self.caption}
        return {
            "loss": self.loss.item(),
            **{name: loss.item() for name, loss in losses.items() if loss is not None},
            "logit_scale": self.scale.item(),
            "gradient_norm": self.gradient_norm.item(),
        }


class Step:
    """Computes gradients of the global objective and moves the weights.

    With `ragged`, ranks may have unequal numbers of specimens, or none: the gradient is that of
    all there are, and where there are none at all the weights stay. Otherwise all must have the
    same number, and need not tell each other. With `overlap` gradients are added up over ranks
    during the backward pass; it is not for `ragged` ones.

    A model that `fsdp.shard` has cut adds up the gradients of what is cut in its own backward pass,
    after each micro-batch: kept until the last one they would be whole on every rank. It is neither
    for `ragged` ones nor for `overlap`.
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
        overlap: bool = False,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.precision = precision
        self.scaler = precision.scaler()
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.masters = Masters(optimizer)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [self.masters.of(p) for p in self._trained]
        self._cut = [fsdp.is_cut(p) for p in self._trained]
        if any(self._cut):
            save_whole(optimizer, self.masters)
            assert not (ragged or overlap), "a model that is cut sums its gradients its own way"
        cut = zip(self.parameters, self._cut, strict=True)
        self._whole = [parameter for parameter, is_cut in cut if not is_cut]
        self.with_pairs = objective.contrastive_weight > 0
        self.with_logits = objective.caption_weight > 0 and model.decoder is not None
        self.ragged = ragged
        assert not (ragged and overlap), "a rank without specimens has no backward pass"
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        several = dist.world_size() > 1
        self._overlap = Overlap(named, self.masters) if overlap and several else None
        self._share = way(
            local_loss=objective.local_loss, gather_with_grad=objective.gather_with_grad
        )
        self.skipped = 0
        self._skipped_in_a_row = 0

    def __call__(self, batches: Sequence[Batch], rate: float) -> Terms:
        """One optimizer step on this rank's micro-batches."""
        if self.ragged and not any(dist.gather_objects(len(batches))):
            return self._nothing()
        for parameter in (*self.parameters, *self._trained):
            parameter.grad = None
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
        self.masters.take_gradients()  # of a rank without specimens, too
        if self._overlap is None:  # else it has done so
            dist.sum_gradients(self._whole)
        return terms

    def _nothing(self) -> Terms:
        """A step of which no rank has any specimen left: skipped, without touching the weights."""
        self._skip([])
        lost = torch.tensor(math.nan)
        return self._terms(lost, lost, lost, skipped=True)

    def _terms(
        self, loss: Tensor, contrastive: Tensor, caption: Tensor, *, skipped: bool = False
    ) -> Terms:
        return Terms(
            loss,
            contrastive if self.with_pairs else None,
            caption if self.with_logits else None,
            scale=self.model.log_scale.detach().exp(),
            gradient_norm=torch.zeros(()),
            skipped=skipped,
        )

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
        of_each = list(zip(batches, image_gradients, text_gradients, strict=True))
        for number, (batch, image_gradient, text_gradient) in enumerate(of_each, 1):
            output = next(outputs)
            # Sending the known gradient of the global loss through this graph.
            surrogate = output.logit_scale.new_zeros(())
            if self.with_pairs:
                surrogate = surrogate + (_present(output.image_embedding) * image_gradient).sum()
                surrogate = surrogate + (_present(output.text_embedding) * text_gradient).sum()
            if self.with_logits:
                assert output.logits is not None
                mine = caption_loss_sum(output.logits, batch.tokens, batch.token_mask) / count
                surrogate = surrogate + self.objective.caption_weight * mine
                caption = caption + mine.detach()
            if self._overlap is not None and number == len(of_each):
                self._overlap.begin()
            self.scaler.scale(surrogate).backward()
            self.masters.take_gradients()
            del output, surrogate
        if self._overlap is not None:
            self._overlap.end()
        # Of one type, also where this rank had no specimen.
        both = torch.stack([contrastive, caption.to(contrastive.dtype)])
        contrastive, caption = dist.sum_(both).unbind()
        weights = self.objective
        loss = weights.contrastive_weight * contrastive + weights.caption_weight * caption
        return self._terms(loss, contrastive, caption)

    def _contrastive(
        self, batches: Sequence[Batch], embedded: Sequence[Output]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """This rank's share of the global contrastive loss, and the weighted gradients of the
        global loss for its micro-batches; those of scale and bias are left in the parameters.
        """
        sizes, model = [len(b) for b in batches], self.model
        weight, kind = self.objective.contrastive_weight, wide(model.log_scale.detach())
        if not self.with_pairs:
            nothing = kind.new_zeros(())
            return nothing, [nothing] * len(sizes), [nothing] * len(sizes)
        images = [_present(o.image_embedding).detach() for o in embedded]
        texts = [_present(o.text_embedding).detach() for o in embedded]
        width = images[0].shape[1] if images else 0
        rows = dist.rows_of(sum(sizes), width, ragged=self.ragged)
        none = kind.new_zeros(0, rows.width)  # for a rank without specimens
        pairs = Pairs(
            torch.cat(images or [none]).requires_grad_(),
            torch.cat(texts or [none]).requires_grad_(),
            wide(model.log_scale.detach()).exp().requires_grad_(),
            None if model.bias is None else wide(model.bias.detach()).clone().requires_grad_(),
            self._report_ids(batches, rows) if self.objective.mask_duplicates else None,
            rows,
        )
        share = self._share(self.objective.contrastive, pairs)
        leaves = [t for t in (pairs.image, pairs.text, pairs.scale, pairs.bias) if t is not None]
        image, text, scale, *bias = torch.autograd.grad(share.surrogate, leaves)
        of_rank = self.scaler.scale(share.loss.new_tensor(weight * share.temperature))
        _leave(model.log_scale, of_rank * scale * pairs.scale.detach())  # of its logarithm
        for gradient in bias:
            _leave(model.bias, of_rank * gradient)
        return share.loss, (weight * image).split(sizes), (weight * text).split(sizes)

    def _report_ids(self, batches: Sequence[Batch], rows: dist.Rows) -> Tensor:
        none = torch.zeros(0, dtype=torch.int64, device=self.model.log_scale.device)
        return rows.gather(torch.cat([none, *(b.report_ids for b in batches)]))

    def _move(self, terms: Terms, rate: float, batches: Sequence[Batch]) -> Terms:
        norm = self._clip()
        finite = bool(torch.isfinite(norm) & torch.isfinite(terms.loss))
        if finite:
            set_rate(self.optimizer, rate)
            self.scaler.step(self.optimizer)
            self.masters.give_weights()
            self.model.clamp_scale()
            self._skipped_in_a_row = 0
        else:
            self._skip(batches)
        self.scaler.update()
        return replace(terms, gradient_norm=norm, skipped=not finite)

    def _clip(self) -> Tensor:
        """Take the scaler's factor off the gradients and clip them; their norm before."""
        if not any(self._cut):
            self.scaler.unscale_(self.optimizer)
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if self.scaler.is_enabled():
            # What overflows does so in one rank's part; all scalers must see it.
            broken = 0 * fsdp.norm(self.parameters, self._cut)  # 0, or not a number
            some = next(p.grad for p in self.parameters if p.grad is not None and p.numel())
            some.add_(broken.to(some.device))
        self.scaler.unscale_(self.optimizer)
        norm = fsdp.norm(self.parameters, self._cut)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm

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


def _leave(parameter: Tensor | None, gradient: Tensor) -> None:
    if parameter is not None and parameter.requires_grad:
        parameter.grad = gradient.to(parameter.dtype)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the contrastive loss needs both embeddings"
    return tensor

"""A trained model as its users have it: embeds, classifies and describes slides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from slidevlm.app.attending import Attention, attend
from slidevlm.app.bags import BagLike, Tiles, batches_of, opened, sample_of
from slidevlm.app.devices import device_of
from slidevlm.app.judging import embed_text
from slidevlm.app.outputs import model_hash
from slidevlm.app.pretrained import read_pretrained
from slidevlm.app.trained import Trained, restore
from slidevlm.batch import Bags
from slidevlm.config import Data
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.eval.predict import Writing
from slidevlm.eval.prompts import Prompts, prompts_of, read_prompts
from slidevlm.eval.tasks.zero_shot import ClassTexts, embed_prompts
from slidevlm.models import CoCa
from slidevlm.models.cast import cast_weights
from slidevlm.models.generate import Decoding, Draft, Lookup, Sketch, draft
from slidevlm.precision import Precision, for_use
from slidevlm.precision import resolve as resolve_precision
from slidevlm.registry import unknown

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class DecodingSettings(TypedDict, total=False):
        """How tokens are chosen; see `slidevlm.models.decoding.Decoding`."""

        max_tokens: int
        min_tokens: int
        top_k: int | None
        top_p: float
        temperature: float
        repetition_penalty: float
        no_repeat_ngram: int
        beams: int
        groups: int
        diversity: float
        length_penalty: float
        candidates: int
        choose: str
        seed: int


CUTOFF = Data.image_features_cutoff  # tiles of a bag, where nobody asks for another number

PromptsLike = str | os.PathLike[str] | Mapping[str, str | Sequence[str]] | Sequence[str] | Prompts


@dataclass(frozen=True, eq=False)
class Classification:
    """What zero-shot classification says of one bag.

    Args:
        classes: C names, sorted.
        probabilities: [C] float64 whose sum is 1, in the order of `classes`.
    """

    classes: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    def to_dict(self) -> dict[str, float]:
        """Class -> probability."""
        return dict(zip(self.classes, self.probabilities.tolist(), strict=True))


@dataclass(frozen=True)
class Report:
    """A generated report.

    Args:
        text: the report, with the prompt it begins with.
        score: log-probability / tokens ** length_penalty; None where it is not finite.
        ended: whether the model ended it, rather than the limit of tokens.
        merit: what it was chosen by: mean agreement of its words with those of the other candidates
            (consensus), cosine with the slide (similarity), or the sum of the first and half of the
            second, in standard deviations (both); None where that is the score.
    """

    text: str
    score: float | None
    ended: bool
    merit: float | None = None


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    image_features_cutoff: int = CUTOFF,
) -> SlideModel:
    """A trained model, ready for use.

    Examples:
        >>> import slidevlm, slidevlm.testing, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> run = slidevlm.testing.run(folder.name)  # stands for the folder of a training
        >>> model = slidevlm.load(run, device="cpu")
        >>> model.embed(slidevlm.testing.bag()).shape
        (32,)
        >>> folder.cleanup()

    Args:
        source: folder of a run, a checkpoint (.pt), a folder of weights or a .safetensors file as
            `slidevlm models export` writes them, "hf-hub:owner/name", or a tag of the registry.
        device: "cpu", "cuda" or "cuda:1"; None: CUDA where there is one, else the CPU.
        precision: "fp32", "amp" or "amp_bf16" as in training; None: amp_bf16 on a GPU that
            computes in it, else fp32.
        image_features_cutoff: tiles read of one bag at most; which ones depends on its name alone.

    Raises:
        ConfigError: nothing is there, or the device does not exist.
        CheckpointError: it cannot be read, or comes without configuration and tokenizer.
    """
    state = read_pretrained(os.fspath(source), "model").state
    if state is None:
        raise CheckpointError(
            f"{source} has weights, but no configuration and tokenizer of slidevlm beside them; "
            "give the folder of a run, one of its checkpoints, or what `slidevlm models export` "
            "wrote"
        )
    # The first weights, which those of the state replace, are no business of the caller's draws.
    with torch.random.fork_rng(devices=[]):
        trained = restore(state)
    place = device_of(None if device is None else str(device))
    chosen = resolve_precision(precision or for_use(place), place)
    return SlideModel(trained, chosen, image_features_cutoff=image_features_cutoff)


class SlideModel:
    """A trained model: slides and texts in, embeddings, classes and reports out.

    A bag is a path in any format that slidevlm reads (HDF5 of CLAM, TRIDENT and STAMP, .pt, .npy,
    .npz, .safetensors, zarr, ...), an array or tensor of features [N, D], or `slidevlm.Tiles` where
    there are positions too. A list of bags gives a list of results, or an array with a row for
    each. A bag's result is the same alone and in any list, apart from rounding.

    Any number of threads may use one object: what it remembers of earlier calls changes no result.

    Examples:
        >>> import slidevlm.testing
        >>> model = slidevlm.testing.model()
        >>> model.tile_width, model.embed_dim, model.unit
        (16, 32, None)

    Args:
        trained: model, configuration and tokenizer. The model is moved to the precision's device
            and stays in evaluation mode.
        precision: of all computations, with their device.
        image_features_cutoff: tiles read of one bag at most.
    """

    def __init__(
        self, trained: Trained, precision: Precision, *, image_features_cutoff: int = CUTOFF
    ) -> None:
        if image_features_cutoff < 1:
            raise ConfigError(
                f"image_features_cutoff must be at least 1, not {image_features_cutoff}"
            )
        trained.model.to(precision.device).eval()
        if precision.weights_dtype is not None:
            cast_weights(trained.model, precision.weights_dtype, everything=precision.everything)
        self.trained = trained
        self.precision = precision
        self.image_features_cutoff = image_features_cutoff
        self._lookup, self._sketch = Lookup(), Sketch()  # of what it has written
        self._class_texts = lru_cache(maxsize=8)(self._embed_prompts)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.precision.device

    @property
    def computes_in(self) -> str:
        """The type of its numbers: "float32", "bfloat16" or "float16"."""
        narrow = self.precision.autocast_dtype or self.precision.weights_dtype
        dtype = narrow or torch.float32
        return str(dtype).removeprefix("torch.")

    @property
    def tile_width(self) -> int:
        """D, the features of a tile; 0 of a language model, which reads none."""
        return 0 if self.trained.config.family == "lm" else self.trained.config.tile_width or 0

    @property
    def embed_dim(self) -> int:
        """E, the width of embeddings."""
        return self.trained.config.embed_dim

    @property
    def unit(self) -> str | None:
        """Of the positions it was trained with: "um", "px", or None: without positions."""
        return self.trained.unit

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all weights: which model made a result."""
        return model_hash(self.trained.model)

    # -- bags --------------------------------------------------------------------------------

    def embed(self, bag: BagLike | Sequence[BagLike], *, batch_size: int = 8) -> np.ndarray:
        """Embed a slide, or each of several.

        Examples:
            >>> import slidevlm.testing
            >>> model, bag = slidevlm.testing.model(), slidevlm.testing.bag()
            >>> model.embed(bag).shape, model.embed([bag, bag]).shape
            ((32,), (2, 32))

        Args:
            bag: a bag, or a list of bags.
            batch_size: bags of a list that are embedded at a time.

        Returns:
            [E] float32 of length 1; of a list of B bags [B, E].

        Raises:
            DataError: a bag that cannot be read or is not what the model reads.
            ConfigError: the model is a language model.
            CheckpointError: the embedding is not finite.
        """
        parts = [self.embed_bags(bags) for bags, _ in self.batches(bag, batch_size)]
        rows = np.concatenate(parts) if parts else np.zeros((0, self.embed_dim), np.float32)
        return rows if isinstance(bag, (list, tuple)) else rows[0]

    def embed_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embed a text, or each of several; longer ones than the model's context are cut.

        Examples:
            >>> import slidevlm.testing
            >>> model = slidevlm.testing.model()
            >>> model.embed_text("a tumour").shape, model.embed_text(["a", "b", "c"]).shape
            ((32,), (3, 32))

        Returns:
            [E] float32 of length 1; of T texts [T, E].

        Raises:
            ConfigError: the model is a language model, or nothing but texts is wanted.
        """
        self._coca()
        several = [texts] if isinstance(texts, str) else list(texts)
        strange = next((t for t in several if not isinstance(t, str)), None)
        if strange is not None:
            raise ConfigError(f"texts are strings, not {type(strange).__name__}")
        if not several:
            return np.zeros((0, self.embed_dim), np.float32)
        rows = embed_text(self.trained, several, self.precision)
        return rows[0] if isinstance(texts, str) else rows

    @overload
    def classify(  # type: ignore[overload-overlap]
        self, bag: BagLike, prompts: PromptsLike, *, ensemble: str = ..., batch_size: int = ...
    ) -> Classification: ...

    @overload
    def classify(
        self,
        bag: Sequence[BagLike],
        prompts: PromptsLike,
        *,
        ensemble: str = ...,
        batch_size: int = ...,
    ) -> list[Classification]: ...

    def classify(
        self,
        bag: BagLike | Sequence[BagLike],
        prompts: PromptsLike,
        *,
        ensemble: str = "mean",
        batch_size: int = 8,
    ) -> Classification | list[Classification]:
        """Zero-shot classification: how near a slide is to the texts of each class.

        Examples:
            >>> import slidevlm.testing
            >>> model, bag = slidevlm.testing.model(), slidevlm.testing.bag()
            >>> found = model.classify(bag, {"lung": ["lung", "pulmonary"], "kidney": "kidney"})
            >>> found.classes, round(float(found.probabilities.sum()), 6)
            (('kidney', 'lung'), 1.0)

        Args:
            bag: a bag, or a list of bags.
            prompts: `{class: text or texts}`, a list of texts that are each a class, or a file of
                prompts as `--zsc-class-prompt-mapping` takes it.
            ensemble: of several texts a class: "mean" or "probabilities", as `--zsc-ensemble`.
            batch_size: bags of a list that are read at a time.

        Raises:
            DataError: bags or prompts that cannot be used.
            ConfigError: the model is a language model, or no such ensemble.
        """
        texts = self.class_texts(prompts, ensemble)
        image = self.embed(bag, batch_size=batch_size)
        chances = self.probabilities(np.atleast_2d(image), texts)
        found = [Classification(texts.classes, row) for row in chances]
        return found if isinstance(bag, (list, tuple)) else found[0]

    @overload
    def caption(  # type: ignore[overload-overlap]
        self,
        bag: BagLike,
        *,
        prompt: str = ...,
        batch_size: int = ...,
        **decoding: Unpack[DecodingSettings],
    ) -> str: ...

    @overload
    def caption(
        self,
        bag: Sequence[BagLike],
        *,
        prompt: str = ...,
        batch_size: int = ...,
        **decoding: Unpack[DecodingSettings],
    ) -> list[str]: ...

    def caption(
        self,
        bag: BagLike | Sequence[BagLike],
        *,
        prompt: str = "",
        batch_size: int = 8,
        **decoding: Unpack[DecodingSettings],
    ) -> str | list[str]:
        """Write the report of a slide, or of each of several.

        Examples:
            >>> import slidevlm.testing
            >>> model = slidevlm.testing.model()
            >>> text = model.caption(slidevlm.testing.bag(), prompt="lung", max_tokens=4)
            >>> text.startswith("lung")
            True

        Args:
            bag: a bag, or a list of bags.
            prompt: words that every report begins with.
            batch_size: bags of a list that are written of at a time.
            decoding: settings of `slidevlm.models.decoding.Decoding`: `max_tokens`, `beams`,
                `top_k`, `temperature`, `candidates`, `choose`, `seed`, ...; by default
                as the model's configuration says (`generation`), else the most likely token each
                time.

        Raises:
            DataError: a bag that cannot be read or is not what the model reads.
            ConfigError: settings that cannot work, or a model without a decoder.
            CheckpointError: the weights, or the features, make no numbers.
        """
        drafts = self.drafts(bag, prompt=prompt, batch_size=batch_size, **decoding)
        texts = [reports[0].text for reports in drafts]
        return texts if isinstance(bag, (list, tuple)) else texts[0]

    def drafts(
        self,
        bag: BagLike | Sequence[BagLike],
        *,
        prompt: str = "",
        batch_size: int = 8,
        best: int = 1,
        **decoding: Unpack[DecodingSettings],
    ) -> list[list[Report]]:
        """The `best` best reports of each bag with their scores: a list a bag, the best first.

        Arguments and errors are those of `caption`.
        """
        chosen = self.decoding(best=best, **decoding)
        return [
            reports
            for bags, names in self.batches(bag, batch_size)
            for reports in self.write(bags, names, chosen, prompt)
        ]

    def attention(self, bag: BagLike, *, sentences: bool = False) -> Attention:
        """Where the model attends in a bag: weights of its tiles, which add up to 1.

        Attention says where a model reads, not why it decides; see docs/report-page.md.

        Examples:
            >>> import slidevlm.testing
            >>> model = slidevlm.testing.model()
            >>> found = model.attention(slidevlm.testing.bag(7))
            >>> found.tiles.shape, round(float(found.tiles.sum()), 4)
            ((7,), 1.0)

        Args:
            bag: one.
            sentences: also write a report, and give the weights of each of its sentences.

        Raises:
            ConfigError: the slide encoder has no attention over single tiles, such as mean.
            DataError: the bag cannot be read, or is not what the model reads.
        """
        store, case, place = opened(bag)
        sample = sample_of(self.trained, store, case, place, self.image_features_cutoff)
        return attend(self.trained, self.precision, sample, sentences=sentences)

    # -- batches, for programs that read bags themselves -------------------------------------

    def batches(
        self, bag: BagLike | Sequence[BagLike], batch_size: int = 8
    ) -> Iterator[tuple[Bags, tuple[str, ...]]]:
        """The bags on the device, `batch_size` at a time, with their names."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        given = list(bag) if isinstance(bag, (list, tuple)) else [bag]
        for batch in batches_of(self.trained, given, self.image_features_cutoff, batch_size):  # type: ignore[arg-type]
            yield batch.bags.to(self.device), batch.specimen_ids

    def embed_bags(self, bags: Bags) -> np.ndarray:
        """B bags on the device -> [B, E] float32, L2-normalised."""
        model = self._coca()
        with torch.inference_mode(), self.precision.autocast():
            rows: np.ndarray = model.encode_image(bags).float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise CheckpointError(
                "a slide's embedding is not finite: the weights have diverged, or precision has "
                "too narrow a range; try fp32"
            )
        return rows

    def class_texts(self, prompts: PromptsLike, ensemble: str = "mean") -> ClassTexts:
        """The embedded texts of classes; remembered for the last few prompts."""
        if ensemble not in ("mean", "probabilities"):
            raise ConfigError(f"ensemble {ensemble!r} is not one of mean, probabilities")
        if isinstance(prompts, (str, os.PathLike)):
            prompts = read_prompts(Path(prompts).expanduser())
        elif not isinstance(prompts, Prompts):
            prompts = prompts_of(prompts)
        return self._class_texts(prompts, ensemble)

    def _embed_prompts(self, prompts: Prompts, ensemble: str) -> ClassTexts:
        return embed_prompts(prompts, self.embed_text, ensemble)

    def probabilities(self, image: np.ndarray, texts: ClassTexts) -> np.ndarray:
        """[B, E] embeddings of slides -> [B, C] float64, each row's sum 1."""
        scale = float(self._coca().log_scale.detach().exp())
        logits = texts.logits(image, scale)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        result: np.ndarray = chances / chances.sum(1, keepdims=True)
        return result

    def decoding(self, **settings: Any) -> Decoding:
        """`Decoding` with the ids of this model's tokenizer.

        Settings that are not given are those of the model's configuration.

        Raises:
            TypeError: there is no such setting.
            ConfigError: a value out of range, or settings that do not go together.
        """
        known = {field.name for field in fields(Decoding)} - {"bos_id", "eos_id", "pad_id"}
        for name in settings:
            if name not in known:
                raise TypeError(unknown("setting", name, known))
        tokenizer = self.trained.tokenizer
        chosen = self.trained.config.generation.with_given(settings)
        return Decoding(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, **chosen)

    def write(
        self,
        bags: Bags,
        names: Sequence[str],
        decoding: Decoding,
        prompt: str = "",
        finished: Callable[[int, list[Report]], None] | None = None,
    ) -> list[list[Report]]:
        """Reports of B bags on the device, a list a bag; `names` seed the draws.

        `finished` is told of each bag, by its number, as soon as its reports are there.
        """
        tokenizer = self.trained.tokenizer
        given = tokenizer.tokens(prompt) if prompt else []
        words = Writing(decoding, tokenizer.decode).words

        def reports(drafts: Sequence[Draft]) -> list[Report]:
            return [
                Report(
                    tokenizer.decode([*given, *one.tokens]),
                    one.score if math.isfinite(one.score) else None,
                    one.ended,
                    one.merit,
                )
                for one in drafts
            ]

        def told(number: int, drafts: Sequence[Draft]) -> None:
            if finished is not None:
                finished(number, reports(drafts))

        with torch.inference_mode(), self.precision.autocast():
            found = draft(
                self.trained.model,
                bags,
                names,
                decoding,
                given,
                told,
                self._lookup,
                words,
                self._sketch,
                finite=True,
            )
        return [reports(drafts) for drafts in found]

    def _coca(self) -> CoCa:
        model = self.trained.model
        if not isinstance(model, CoCa):
            raise ConfigError(
                "this model is a language model: it embeds neither slides nor texts, and "
                "classifies nothing"
            )
        return model

    def __repr__(self) -> str:
        config, width = self.trained.config, self.tile_width
        return (
            f"SlideModel(family {config.family}, tiles {width} wide, embedding "
            f"{self.embed_dim}, on {self.device})"
        )


__all__ = ["Attention", "BagLike", "Classification", "Report", "SlideModel", "Tiles", "load"]

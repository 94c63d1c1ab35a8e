"""Locking towers: which weights stay, which layers still train, and what runs without dropout.

A tower is a list of groups from input to output. Locking it leaves the last n groups trainable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidevlm.errors import ConfigError
from slidevlm.models.coca import CoCa
from slidevlm.models.language import LanguageModel
from slidevlm.models.mode import Group


def image_groups(model: CoCa) -> list[Group]:
    """The image tower from input to output: the slide encoder's groups, then what embeds it."""
    end: list[nn.Module | nn.Parameter] = list(_image_end(model))
    return [*model.slide.groups(), *([("pooler and projection", end)] if end else [])]


def text_groups(model: CoCa | LanguageModel) -> list[Group]:
    """The text tower from input to output, one group a layer.

    What is before the first layer is a group; what comes after the last belongs to it: to leave
    the last layer trainable and what makes an embedding of it frozen would be of no use.
    """
    end: list[nn.Module | nn.Parameter] = list(_text_end(model))
    groups = [*model.text.groups(), *([("projection", end)] if end else [])]
    last = max((i for i, (name, _) in enumerate(groups) if name.startswith("layer")), default=0)
    names, parts = zip(*groups[last:], strict=True)
    return [*groups[:last], (", ".join(names), [part for each in parts for part in each])]


def lock_image(model: CoCa, unlocked: int, *, freeze_statistics: bool) -> None:
    """Freeze the image tower but for its last groups.

    Args:
        model: a model with an image tower.
        unlocked: groups left trainable, counted from the output.
        freeze_statistics: BatchNorm layers of locked groups keep their running mean and variance;
            otherwise those follow the data, as in training.

    Raises:
        ConfigError: more groups than there are, or no BatchNorm whose statistics could be kept.
    """
    groups = image_groups(model)
    locked = _locked(groups, unlocked, "--lock-image-unlocked-groups", "image")
    _freeze(locked, spared=())
    resting = list(_resting([model.slide, *_modules(_image_end(model))], groups[len(locked) :]))
    norms = [m for m in resting if isinstance(m, _BatchNorm)]
    if freeze_statistics and not norms:
        raise ConfigError(
            "--lock-image-freeze-bn-stats: the locked groups have no BatchNorm; leave it out"
        )
    model.rest(m for m in resting if freeze_statistics or not isinstance(m, _BatchNorm))


def lock_text(model: CoCa | LanguageModel, unlocked: int, *, freeze_layer_norm: bool) -> None:
    """Freeze the text tower but for its last layers.

    Args:
        model: a model with a text tower.
        unlocked: layers left trainable, counted from the output.
        freeze_layer_norm: freeze the weights of the norms of locked layers, too.

    Raises:
        ConfigError: more layers than there are.
    """
    groups = text_groups(model)
    locked = _locked(groups, unlocked, "--lock-text-unlocked-layers", "text")
    _freeze(locked, spared=() if freeze_layer_norm else model.text.norms())
    model.rest(_resting([model.text, *_modules(_text_end(model))], groups[len(locked) :]))


def nothing_to_train(model: CoCa | LanguageModel, *, with_captions: bool) -> bool:
    """Whether nothing is left but the temperature; without captions the decoder learns nothing."""
    decoder = ("decoder.", "report_pooler.", "gist.", "words")
    return not any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if name not in ("log_scale", "bias") and (with_captions or not name.startswith(decoder))
    )


def _image_end(model: CoCa) -> Iterator[nn.Module | nn.Parameter]:
    for part in (model.slide_pooler, model.slide_project):
        if part is not None:
            yield part
    if model.alignment is not None:
        yield model.alignment.image_gate


def _text_end(model: CoCa | LanguageModel) -> Iterator[nn.Module | nn.Parameter]:
    if isinstance(model, CoCa):
        for part in (model.text_project, model.prior):
            if part is not None:
                yield part
        if model.alignment is not None:
            yield model.alignment.text_gate


def _modules(parts: Iterable[nn.Module | nn.Parameter]) -> Iterator[nn.Module]:
    return (part for part in parts if isinstance(part, nn.Module))


def _locked(groups: Sequence[Group], unlocked: int, flag: str, tower: str) -> Sequence[Group]:
    if unlocked >= len(groups):
        names = "; ".join(name for name, _ in groups)
        raise ConfigError(
            f"{flag} {unlocked} leaves nothing locked: the {tower} tower has {len(groups)} groups "
            f"({names}); give a smaller number, or leave --lock-{tower} out"
        )
    return groups[: len(groups) - unlocked]


def _freeze(groups: Iterable[Group], spared: Iterable[nn.Module]) -> None:
    kept = set(spared)
    for part in (part for _, parts in groups for part in parts):
        if isinstance(part, nn.Parameter):
            part.requires_grad_(False)
            continue
        for module in part.modules():
            if module not in kept:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)


def _resting(roots: Iterable[nn.Module], unlocked: Iterable[Group]) -> Iterator[nn.Module]:
    """Modules of a tower that hold nothing trainable; dropout between its groups is one of them."""
    awake = {
        module
        for _, parts in unlocked
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
    }
    for module in (m for root in roots for m in root.modules()):
        if awake.isdisjoint(module.modules()):
            yield module

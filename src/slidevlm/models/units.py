"""The parts of a model that are called one after the other, each as a whole."""

from __future__ import annotations

from slidevlm.models.coca import CoCa
from slidevlm.models.language import LanguageModel
from slidevlm.models.mode import Unit


def units(model: CoCa | LanguageModel) -> list[Unit]:
    """Every tower's blocks, inner ones first, and the slide encoder as a whole.

    The slide encoder is called as nothing but a function of bags. Text tower and decoder also
    lend their embeddings, norms and the projection to the vocabulary to the model itself.
    """
    found = [*model.text.units()]
    if model.decoder is not None:
        found += model.decoder.units()
    if isinstance(model, CoCa):
        found += [*model.slide.units(), (model.slide, ())]
    return found

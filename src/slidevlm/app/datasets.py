"""The specimens of a split, read and tokenised as the model wants them."""

from __future__ import annotations

from slidevlm.app.trained import Trained
from slidevlm.config import Config
from slidevlm.data.augment import Augmentation
from slidevlm.data.cases import CaseStore
from slidevlm.data.dataset import BagDataset
from slidevlm.data.splits import Split


def bag_dataset(
    config: Config,
    store: CaseStore,
    split: Split,
    trained: Trained,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
    *,
    training: bool,
) -> BagDataset:
    """The specimens of a split, ready for a loader."""
    return BagDataset(
        store,
        split.cases,
        split.reports,
        trained.tokenizer,
        max_tokens=trained.config.text.context_length,
        # A language model reads no tiles; one keeps the bag from being empty.
        cutoff=1 if trained.config.family == "lm" else config.data.image_features_cutoff,
        seed=config.evaluation.seed,
        training=training,
        augmentation=augmentation,
    )

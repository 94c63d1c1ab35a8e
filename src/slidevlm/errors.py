"""Errors a user can cause and mend. Each message says what, where, and what to do."""

from __future__ import annotations

import os
from urllib.parse import quote

SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
)  # fmt: skip


class SlideVLMError(Exception):
    """Base of every error that the command line prints without a traceback (exit code 2)."""


class ConfigError(SlideVLMError, ValueError):
    """An argument or a combination of arguments that cannot work."""


class DataError(SlideVLMError, ValueError):
    """A file or a specimen that cannot be used."""


class CheckpointError(SlideVLMError, ValueError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class TrainingError(SlideVLMError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


def without_secrets(text: str) -> str:
    """A message of a library, which may repeat what it was given, without the environment's keys.

    >>> os.environ["HF_TOKEN"] = "a key"
    >>> without_secrets("refused: a key, a%20key")
    'refused: <HF_TOKEN>, <HF_TOKEN>'
    >>> del os.environ["HF_TOKEN"]
    """
    for name in SECRETS:
        value = os.environ.get(name, "")
        # As it is, as a message shows odd characters of it, and as it stands in a URL.
        for form in (value, repr(value)[1:-1], quote(value, safe="")):
            if form:
                text = text.replace(form, f"<{name}>")
    return text

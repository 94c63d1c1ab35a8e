"""Errors a user can cause and mend. Each message says what, where, and what to do."""

from __future__ import annotations


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

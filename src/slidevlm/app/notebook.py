"""Training and evaluation from Python: `slidevlm.train` and `slidevlm.evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slidevlm.app.outputs import Outcome
from slidevlm.app.runs import run_all, with_run_settings
from slidevlm.config import Config, given_values, with_values
from slidevlm.flags import read_values, read_yaml

ConfigLike = Config | Mapping[str, Any] | str | os.PathLike[str]


def train(config: ConfigLike, **arguments: Any) -> Outcome:
    """Train (or, with `test=True`, only evaluate) as `slidevlm train` does.

    Examples:
        >>> import slidevlm, slidevlm.testing, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> settings = slidevlm.testing.settings(folder.name)  # data, splits, model, ...
        >>> outcome = slidevlm.train(settings, epochs=1, name="first")
        >>> outcome.folder.name, "test/loss/contrastive" in outcome.metrics
        ('first', True)
        >>> model = slidevlm.load(outcome.folder)
        >>> folder.cleanup()

    Args:
        config: the arguments of `slidevlm train` by name (`batch_size` for `--batch-size`): a
            mapping, a YAML file as `--config` takes it, or a `Config`.
        arguments: more of them, which win.

    Returns:
        `metrics` by `<split>/<task>/<metric>`, those of the test split where there is one, else of
        validation; `folder` of the run; `scores` with intervals of a test split.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    return run_all(config_of(config, **arguments))


def evaluate(
    run: str | os.PathLike[str], config: ConfigLike | None = None, **arguments: Any
) -> Outcome:
    """Evaluate a run's newest checkpoint, or a checkpoint of it, as `slidevlm evaluate RUN` does.

    Examples:
        >>> import slidevlm, slidevlm.testing, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> run = slidevlm.train(slidevlm.testing.settings(folder.name)).folder
        >>> outcome = slidevlm.evaluate(run, eval_metric_bootstraps=20)
        >>> outcome.folder.parent == run
        True
        >>> folder.cleanup()

    Args:
        run: folder of a run, or one of its checkpoints.
        config: arguments that are to be other than the run's, in the forms of `train`.
        arguments: more of them, which win.

    Returns:
        What was found, as of `train`; files are in its `folder`.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    given = config_of({} if config is None else config, **arguments)
    return run_all(with_run_settings(Path(run), given))


def config_of(config: ConfigLike, **arguments: Any) -> Config:
    """A `Config` from any form of it.

    Raises:
        ConfigError: an unknown name, a value of the wrong type, a file that cannot be read.
    """
    if isinstance(config, Config):
        given = given_values(config)
    elif isinstance(config, Mapping):
        given = read_values(config, "config")
    else:
        given = read_yaml(Path(config))
    return with_values(Config(), {**given, **read_values(arguments, "arguments")})

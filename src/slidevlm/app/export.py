"""A trained model as a folder in Hugging Face's form, which --pretrained reads offline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from slidevlm import __version__
from slidevlm.app.pretrained import CONFIG, OURS, TOKENIZER, WEIGHTS, read_pretrained
from slidevlm.app.trained import Trained, restore
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models.lora import merge_lora
from slidevlm.run import write_text


def export(source: str, folder: Path) -> list[Path]:
    """Write weights, configuration and tokenizer; LoRA is merged into its layers.

    Args:
        source: any form of --pretrained that is a whole model: a run, a checkpoint, a folder.
        folder: does not exist yet, or is empty.

    Returns:
        The files.

    Raises:
        ConfigError: the folder is not empty, or a package is missing.
        CheckpointError: the source is not a whole model.
    """
    _check(folder)
    found = read_pretrained(source)
    if found.state is None:
        raise CheckpointError(
            f"{source} comes without a tokenizer of its own; train or evaluate a run with it by "
            "--pretrained, and export the run"
        )
    return write_folder(restore(found.state), folder)


def write_folder(trained: Trained, folder: Path) -> list[Path]:
    """`export` of a model that is in memory, whose LoRA is merged in place; the files."""
    _check(folder)
    from safetensors.torch import save_file

    merge_lora(trained.model)
    state = replace(trained, config=replace(trained.config, lora=())).state()
    settings = {
        "config": state.config,
        "vocab_size": state.vocab_size,
        "siglip": state.siglip,
        "position_unit": state.position_unit,
    }
    config = {
        "model_type": OURS,
        "architectures": [type(trained.model).__name__],
        "torch_dtype": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
        f"{OURS}_version": __version__,
        OURS: settings,
    }
    texts = {CONFIG: json.dumps(config, indent=1) + "\n", TOKENIZER: state.tokenizer}
    texts |= trained.tokenizer.files()
    for name, content in texts.items():
        write_text(folder / name, content)
    # Copies: tied tensors share memory, which the format does not know.
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in state.weights.items()}
    metadata = {"format": "pt", OURS: json.dumps({**settings, "tokenizer": state.tokenizer})}
    save_file(weights, str(folder / WEIGHTS), metadata=metadata)
    return [folder / name for name in (*texts, WEIGHTS)]


def _check(folder: Path) -> None:
    """ConfigError where nothing can be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; choose another folder")
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            "export needs the package safetensors (pip install 'slidevlm[hf]')"
        ) from None

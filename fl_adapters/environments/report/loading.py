"""The line of Python that opens an exported model with its framework's own call."""

from __future__ import annotations

from pathlib import Path

from fl_runtime.text import parse_json

_CONFIG_CHARS = 2**22
_WRITTEN_AS = {
    "adapter_config.json": "PeftModel.from_pretrained(base, {folder!r})  # base: the model before PEFT",
    "model.keras": "keras.saving.load_model({file!r})",
    "model.ckpt": "YourModule.load_from_checkpoint({file!r})",
    "model.ubj": "xgboost.Booster(model_file={file!r})",
    "model.pt": "network.load_state_dict(torch.load({file!r}, weights_only=True))",
    "model.safetensors": "safetensors.numpy.load_file({file!r})  # PyTorch: safetensors.torch.load_model(model, file)",
}
"""What opens a file, for the files that adapters write. The first that is there counts."""


def loading_line(folder: Path, shown: Path | None = None) -> str:
    """Return the line that opens the model in a folder.

    Args:
        folder: Folder that an adapter has exported a model to, such as `runs/<job>/best`.
        shown: Path to write in the line; default `folder`.

    Returns:
        A line of Python, or "" if the folder is not there or holds nothing that is known.
    """
    shown = shown or folder
    if name := _transformers_class(folder):
        return f"transformers.{name}.from_pretrained({str(shown)!r})"
    for file, code in _WRITTEN_AS.items():
        if (folder / file).is_file():
            return code.format(folder=str(shown), file=str(shown / file))
    return ""


def _transformers_class(folder: Path) -> str:
    """The class that config.json names; "" if the folder holds no model of transformers."""
    try:
        names = parse_json((folder / "config.json").read_bytes(), limit_chars=_CONFIG_CHARS)["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) and first.isidentifier() else ""

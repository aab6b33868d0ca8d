"""Models of a run in MLflow's own format, where the framework that made them is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

from fl_adapters.environments.models import FOLDERS, load_model

_KINDS = {folder: which for which, folder in FOLDERS.items()}
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
}
"""How the name of a class of transformers ends -> the task of its pipelines."""


def save_as_mlflow_model(folder: Path, out: Path) -> Path | None:
    """Write an exported model as an MLflow model, such as `mlflow.xgboost.load_model` opens.

    XGBoost, Keras, and models of transformers with their tokenizer or image processor have a flavour of their own. A
    model that is only weights, as of a PyTorch loop or of Lightning, has none: nothing but the script can build its
    module, and MLflow's flavours for PyTorch would pickle it.

    Args:
        folder: Folder of an exported model, `runs/<job>/model` or `runs/<job>/best`.
        out: Folder to make.

    Returns:
        `out`; None if there is no flavour for this model, or if its framework or MLflow could not write it.
    """
    folder = folder.resolve()  # an absolute path cannot be taken for the name of a model at a hub
    save = next((save for file, save in _SAVERS.items() if (folder / file).is_file()), None)
    if save is None:
        return None
    try:
        return out if save(folder, str(out)) else None
    except Exception as error:  # whatever a framework raises, the files themselves are still logged
        print(f"fl-adapters: tracking: {folder} goes to MLflow as plain files: {error!r:.300}", file=sys.stderr)
        return None


def _save_plain(framework: str, folder: Path, out: str) -> bool:
    """Save with the module of MLflow that has the framework's own name."""
    model = load_model(folder.parent, which=_KINDS[folder.name])
    import_module(f"mlflow.{framework}").save_model(model, out, pip_requirements=_requirements(framework))
    return True


def _save_pipeline(folder: Path, out: str) -> bool:
    """Save the parts of a pipeline of transformers; False without one of them, or without a known task."""
    transformers = import_module("transformers")
    with_image = (folder / "preprocessor_config.json").is_file()
    if not with_image and not (folder / "tokenizer_config.json").is_file():
        return False
    model = load_model(folder.parent, which=_KINDS[folder.name])
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), "")
    if not task or with_image != (task == "image-classification"):
        return False
    part, made_by = (
        ("image_processor", transformers.AutoImageProcessor)
        if with_image
        else ("tokenizer", transformers.AutoTokenizer)
    )
    parts = {"model": model, part: made_by.from_pretrained(folder, local_files_only=True, trust_remote_code=False)}
    requirements = _requirements("transformers", "torch")
    import_module("mlflow.transformers").save_model(parts, out, task=task, pip_requirements=requirements)
    return True


def _nothing(folder: Path, out: str) -> bool:
    return False


def _requirements(*frameworks: str) -> list[str]:
    """Frameworks with their versions, which MLflow would otherwise find out by running the model in another process."""
    return [f"{framework}=={sys.modules[framework].__version__}" for framework in frameworks]


_SAVERS: Mapping[str, Callable[[Path, str], bool]] = {
    "model.ubj": partial(_save_plain, "xgboost"),
    "model.keras": partial(_save_plain, "keras"),
    "adapter_config.json": _nothing,  # its base may lie at a hub
    "modules.json": _nothing,  # sentence-transformers asks a hub when it saves
    "config.json": _save_pipeline,
}
"""Name of a file in an exported model -> how that model is saved. The first that is there counts."""

"""Opens what a run has left with transformers, PEFT and sentence-transformers. Code of others is never loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import transformers
from safetensors.torch import load_file
from torch import nn

from fl_adapters.torch import opening
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.text import parse_json

_ADAPTER = "adapter_model.safetensors"
_AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""Task type of a PEFT adapter -> the class that makes its base."""
_SENTENCE_CLASSES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")


def open_model(folder: Path, into: Any = None, *, partial: bool = False) -> Any:
    """Open the folder of a model with `from_pretrained`.

    Args:
        folder: Folder of the model.
        into: Class of the model, where it is not one of transformers; a model, which gets the weights in place; or the
            base of a PEFT adapter. Default: the class that config.json names, on the base that adapter_config.json
            names.
        partial: Whether a module keeps its own values for tensors that did not travel.

    Returns:
        The model, on the CPU, in evaluation mode if it is new.

    Raises:
        ConfigError: The files do not say enough to make the model; the error says what to give.
        StateMismatchError: The weights do not fit the model, which is as it was.
    """
    of_sentences = (folder / "modules.json").is_file()
    if (folder / "adapter_config.json").is_file() and not of_sentences:
        return _adapted(folder, into)
    if not (folder / "config.json").is_file() and not of_sentences:
        return opening.open_model(folder, into, partial=partial)
    if isinstance(into, nn.Module):
        loaded = _sentences(folder, type(into)) if _is_of_sentences(type(into)) else _whole(folder, type(into))
        return opening.load_into(into, loaded.state_dict(), partial=partial)
    if into is None and (name := _sentence_class(folder)):
        import sentence_transformers

        return _sentences(folder, getattr(sentence_transformers, name))
    return _sentences(folder, into) if _is_of_sentences(into) else _whole(folder, into or _named_class(folder))


def _is_of_sentences(given: Any) -> bool:
    return given is not None and any(base.__module__.startswith("sentence_transformers.") for base in given.__mro__)


def _sentence_class(folder: Path) -> str:
    """The class of sentence-transformers that the files name; "" if they are of transformers alone."""
    if not (folder / "modules.json").is_file():  # versions before 6 write none for a CrossEncoder
        return "CrossEncoder" if "sentence_transformers" in _fields(folder / "config.json") else ""
    name = _fields(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    if name not in _SENTENCE_CLASSES:
        raise ConfigError(
            f"the files name the class {name!r}, which is not one of sentence-transformers",
            where=str(folder / "config_sentence_transformers.json"),
            fix="give the class: load(YourModel)",
        )
    return str(name)


def _fields(path: Path) -> dict[str, Any]:
    """Fields of a JSON file; empty if it cannot be read."""
    try:
        fields = parse_json(path.read_bytes())
    except (OSError, ValueError):
        fields = {}
    return fields if isinstance(fields, dict) else {}


def _sentences(folder: Path, model: Any) -> Any:
    return model(str(folder), trust_remote_code=False, device="cpu", model_kwargs={"use_safetensors": True})


def _named_class(folder: Path) -> Any:
    """The class of transformers that config.json names. Raises ConfigError if there is none of that name."""
    file = folder / "config.json"
    names = _fields(file).get("architectures") or [""]
    found = getattr(transformers, str(names[0]), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ConfigError(
            f"config.json names the class {names[0]!r}, which is not one of transformers",
            where=str(file),
            fix=f"give the class: load({names[0] or 'YourModel'})",
        )
    return found


def _whole(folder: Path, model: Any) -> Any:
    """The model that a class of transformers makes of a folder. No tensor of it is made up."""
    try:
        loaded, found = model.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{model.__name__} does not open the files: {' '.join(str(error).split())[:300]}",
            where=str(folder),
            fix="give the class that the sites trained: load(YourModel)",
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise StateMismatchError(
            f"the model of the run has no {', '.join(missing[:8])} of {model.__name__}",
            where=str(folder),
            fix="give the class that the sites trained: load(YourModel)",
        )
    return loaded


def _adapted(folder: Path, into: Any) -> Any:
    """The PEFT model: a given model as its base, a base that the files name, or a given PEFT model with new weights."""
    if not (folder / _ADAPTER).is_file():
        raise ConfigError(f"there is no {_ADAPTER}", where=str(folder), fix="open the files there with PEFT")
    if isinstance(into, peft.PeftModel):
        tensors, own = load_file(folder / _ADAPTER), peft.get_peft_model_state_dict(into)
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: own[name].shape for name in own}:
            raise _unfit(folder, "its adapter has tensors of other names or shapes")
        peft.set_peft_model_state_dict(into, tensors)
        return into
    base = into if isinstance(into, nn.Module) else _base(folder, into)
    try:
        return peft.PeftModel.from_pretrained(base, folder, local_files_only=True)
    except (ValueError, RuntimeError) as error:
        raise _unfit(folder, " ".join(str(error).split())[:300]) from None


def _unfit(folder: Path, reason: str) -> StateMismatchError:
    return StateMismatchError(
        f"the adapter of the run does not fit this model: {reason}",
        where=str(folder / _ADAPTER),
        fix="give the base that the sites began with: load(into=base)",
    )


def _base(folder: Path, model: Any) -> Any:
    """The base that adapter_config.json names, made by `model` or by the class for the adapter's task."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    named = (config.auto_mapping or {}).get("base_model_class", "")
    model = model or _AUTO.get(str(config.task_type)) or getattr(transformers, str(named), None)
    source, fix = config.base_model_name_or_path, "load(into=base), with the model that the adapter was trained on"
    if not source or not callable(getattr(model, "from_pretrained", None)):
        raise ConfigError("the files do not say on which base the adapter goes", where=str(folder), fix=fix)
    print(f"fl-adapters: the base of the adapter is {source!r}, as adapter_config.json says", file=sys.stderr)
    try:
        return model.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the base {source!r} of the adapter does not open: {' '.join(str(error).split())[:300]}",
            where=str(folder / "adapter_config.json"),
            fix=fix,
        ) from None

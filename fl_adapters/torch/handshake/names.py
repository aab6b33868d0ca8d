"""Lists of names that a torch trainer's objects hold: labels of models and data sets, tokenizers, preprocessing.

Nothing here imports a framework. Objects are recognised by the attributes that `transformers`, `datasets`, torchvision
and MONAI give them; what is not recognised is left out, and then not compared.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from fl_runtime.wire.names import Names, names_of, ordered

_PROBE = "The Quick brown fox; Zürich 2024 isn't far."
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
_NAMES_CLASSES = re.compile(r"class|label|categor|vocab|tags$", re.IGNORECASE)
_COUNTS_CLASSES = re.compile(r"(num|n)_?(class|label|categor)", re.IGNORECASE)
_HELD = "classes class_names label_names labels id2label label2id class_to_idx idx_to_class num_classes num_labels"
_PREPROCESSING = "do_rescale rescale_factor do_normalize image_mean image_std size crop_size sampling_rate feature_size"
_MOST_COLUMNS = 100
_DEEPEST = 8  # data sets within data sets, sequences within sequences


def labels_of_config(config: Any) -> dict[str, Names]:
    """Find the label names in a model's configuration.

    Args:
        config: A `transformers.PretrainedConfig`, or any object.

    Returns:
        Lists of names, by what they are. Nothing where the labels have the default names, LABEL_0 and so on.
    """
    found: dict[str, Names] = {}
    for field, what in (("id2label", "labels of the model"), ("label2id", "label2id of the model")):
        entries = ordered(getattr(config, field, None))
        if entries and not all(_DEFAULT_LABEL.fullmatch(entry) for entry in entries):
            found[what] = names_of(entries)
    if isinstance(kind := getattr(config, "problem_type", None), str):
        found["problem_type of the model"] = names_of([kind])
    return found


def names_of_processing(processing: Any) -> dict[str, Names]:
    """Find what a tokenizer or processor makes of texts, images and sounds.

    Args:
        processing: A tokenizer, an image processor, a processor that holds them, or any object.

    Returns:
        Vocabulary, special tokens, chat template and the tokens of a sentence, and settings of preprocessing.
    """
    tokenizer = getattr(processing, "tokenizer", processing)
    found = _names_of_tokenizer(tokenizer) if callable(getattr(tokenizer, "get_vocab", None)) else {}
    parts = (getattr(processing, name, None) for name in ("image_processor", "feature_extractor"))
    settings = next(filter(None, map(_settings_of, (*parts, processing))), [])
    return found | ({"settings of the preprocessing": names_of(settings)} if settings else {})


def names_of_data(dataset: Any) -> dict[str, Names]:
    """Find the names of classes in a training set, also within a subset or a concatenation.

    Args:
        dataset: A data set of `datasets`, torchvision, MONAI or torch, a dict of such, or any object.

    Returns:
        Lists of names, by what they are.
    """
    parts = list(dataset.values())[:_MOST_COLUMNS] if isinstance(dataset, Mapping) else [dataset]
    found: dict[str, Names] = {}
    for part in parts:
        for _ in range(_DEEPEST):
            names = _names_in(part)
            if names or part is None:
                break
            part = getattr(part, "dataset", None) or next(iter(getattr(part, "datasets", None) or ()), None)
        found = {**names, **found}
    return found


def names_of_settings(settings: Mapping[str, Any], holder: str) -> dict[str, Names]:
    """Find settings that name or count classes.

    Args:
        settings: Name -> value, such as the hyperparameters of a module.
        holder: What they belong to, such as "the module".

    Returns:
        Lists of names, by what they are. Other settings are left out: sites may choose them.
    """
    found = {}
    for name, value in settings.items():
        if isinstance(value, int) and not isinstance(value, bool) and _COUNTS_CLASSES.match(name):
            found[f"{name} of {holder}"] = names_of([value])
        elif _NAMES_CLASSES.search(name) and (entries := ordered(value)):
            found[f"{name} of {holder}"] = names_of(entries)
    return found


def names_held_by(owner: Any, holder: str) -> dict[str, Names]:
    """Find names and tokenizers among the hyperparameters and attributes of a module or data module.

    Args:
        owner: The object; None finds nothing.
        holder: What it is, such as "the module".

    Returns:
        Lists of names, by what they are. Properties are not evaluated.
    """
    if owner is None:
        return {}
    hparams = getattr(owner, "hparams", None)
    held = {name: inspect.getattr_static(owner, name, None) for name in _HELD.split()}
    found = names_of_settings({**held, **(hparams if isinstance(hparams, Mapping) else {})}, holder)
    for name in ("tokenizer", "processor"):
        found |= names_of_processing(inspect.getattr_static(owner, name, None))
    return found


def _names_of_tokenizer(tokenizer: Any) -> dict[str, Names]:
    found = {}
    try:
        vocabulary = tokenizer.get_vocab()
    except NotImplementedError:  # slow tokenizers of words that are not listed
        vocabulary = {}
    if vocabulary:
        found["vocabulary of the tokenizer"] = names_of(ordered(vocabulary))
    special = getattr(tokenizer, "special_tokens_map", None)
    for name, token in (special if isinstance(special, Mapping) else {}).items():
        found[f"{name} of the tokenizer"] = names_of(token if isinstance(token, list | tuple) else [token])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["chat template of the tokenizer"] = names_of(template.splitlines())
    if tokens := _tokens_of_probe(tokenizer):
        found[f"tokens of {_PROBE!r}"] = names_of(tokens)
    return found


def _tokens_of_probe(tokenizer: Any) -> list[str]:
    """How the tokenizer splits a sentence: equal vocabularies may be used with other normalisation or merges."""
    try:
        if backend := getattr(tokenizer, "backend_tokenizer", None):
            # not `tokenize`: it runs in threads, and the library then warns at each fork of a data loader
            with _untrimmed(backend):
                return [str(token) for token in backend.encode(_PROBE, add_special_tokens=False).tokens]
        return [str(token) for token in tokenizer.tokenize(_PROBE)]
    except Exception:  # a tokenizer that needs more than a text, such as the boxes of its words
        return []


@contextmanager
def _untrimmed(backend: Any) -> Iterator[None]:
    """Without the padding and truncation of the last call, which a `tokenizers.Tokenizer` keeps.

    A site whose rows come tokenized from a cache has made no such call.
    """
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def _settings_of(processor: Any) -> list[str]:
    values = {name: _plain(getattr(processor, name, None)) for name in _PREPROCESSING.split()}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
    return lines if len(lines) > 1 else []  # one alone is an attribute of something else


def _plain(value: Any) -> Any:
    """A number, list or dict of them as JSON values; None for anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items()) if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float) else None


def _names_in(dataset: Any) -> dict[str, Names]:
    """Class names that a data set itself holds."""
    found: dict[str, Names] = {}
    features = getattr(dataset, "features", None)
    for column, feature in list(features.items() if isinstance(features, Mapping) else ())[:_MOST_COLUMNS]:
        for _ in range(_DEEPEST):
            if entries := ordered(getattr(feature, "names", None)):
                found[f"labels of the column {column!r}"] = names_of(entries)
                break
            feature = getattr(feature, "feature", None)  # of a sequence
    for name in ("class_to_idx", "classes", "class_names"):
        if entries := ordered(getattr(dataset, name, None)):
            found["classes of the training data"] = names_of(entries)
            break
    return found

"""Adapts a preprocessing layer to the data of all sites, by sums and unions alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

import fl_adapters
from fl_adapters.loop import Sums
from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_runtime.errors import ConfigError

from .agreement import LOOKUPS, settings_of

Floats = npt.NDArray[np.float64]

_WHERE = "fl_adapters.keras.adapt"
_ROWS = 1024  # rows of an array that are looked up at once


def adapt(layer: Any, data: Any, *, kit: str | None = None, min_count: int = 1) -> None:
    """Adapt a layer to the data of all sites, in place of `layer.adapt(data)`.

    Every site calls it for the same layers in the same order, before `fit`. The sites sum counts, means and squares
    (`fl_adapters.sums`, a run of its own), so every site's layer holds what Keras would compute on all rows in one
    place. Without a startup kit it is `layer.adapt(data)`.

    Args:
        layer: A `Normalization`, `StringLookup`, `IntegerLookup` or `TextVectorization`, without statistics or a
            vocabulary of its own.
        data: This site's data: an array, a tensor, or batches that can be run over twice, such as a list of arrays, a
            `tf.data.Dataset` or a `PyDataset`. Of batches that are tuples, the first entry counts.
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`.
        min_count: Tokens that this site has less often stay at the site, and are not counted. It may differ between
            sites; layers of numbers have no use for it.

    Raises:
        ConfigError: The layer or the data cannot be adapted over sites.
        HandshakeError: Another site adapts another layer, or one with other settings.

    Example:
        ```python
        import keras
        import numpy as np

        from fl_adapters.keras import adapt

        layer = keras.layers.Normalization()
        adapt(layer, np.array([[1.0], [3.0]], "float32"))
        ```
    """
    is_lookup = isinstance(layer, LOOKUPS)
    if not is_lookup and not isinstance(layer, keras.layers.Normalization):
        raise ConfigError(
            f"a {type(layer).__name__} does not adapt over sites",
            where=_WHERE,
            fix="adapt it to common data, or give it what it needs as an argument; Normalization, StringLookup, "
            "IntegerLookup and TextVectorization adapt over sites",
        )
    _check(layer, data, min_count)
    if current_kit(kit) is None:
        open_session(Options(), framework="Keras")  # says once that there is no kit
        layer.adapt(data)
        return
    agreed = {"layer": type(layer).__name__, "settings": settings_of(layer)}
    with fl_adapters.sums(kit=kit, agree=agreed) as federation:
        if is_lookup:
            _fit_lookup(federation, layer, data, min_count)
        else:
            _fit_normalization(federation, layer, data)


def _check(layer: Any, data: Any, min_count: int) -> None:
    given = [name for name in ("mean", "vocabulary") if layer.get_config().get(name) is not None]
    if given:
        raise ConfigError(
            f"the layer {layer.name} has {given[0]}= of its own",
            where=_WHERE,
            fix=f"make the layer without {given[0]}=, or leave adapt() away",
        )
    if min_count < 1:
        raise ConfigError(f"min_count is {min_count}, and must be at least 1", where=_WHERE, fix="give 1 or more")
    if isinstance(data, Iterator):
        raise ConfigError(
            f"data is a {type(data).__name__}, which can be run over once",
            where=_WHERE,
            fix="give an array, or batches that can be run over twice, such as a list or a tf.data.Dataset",
        )


# -- numbers ---------------------------------------------------------------------------------------------------------


def _fit_normalization(federation: Sums, layer: Any, data: Any) -> None:
    """Mean and variance over all rows of all sites.

    The variance is that of the sites around the common mean plus that within the sites, each summed around a mean, so
    that values far from 0 lose nothing (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances").
    """
    here = _moments(layer, data)
    first = federation.sum({"count": np.array(here.count), "total": here.count * here.mean})
    count = float(first["count"])
    mean = first["total"] / count
    squares = here.squares + here.count * (here.mean - mean) ** 2
    variance = federation.sum({"squares": squares})["squares"] / count
    layer.adapt_mean.assign(mean.astype(np.float32))
    layer.adapt_variance.assign(variance.astype(np.float32))
    layer.finalize_state()


@dataclass(frozen=True)
class _Moments:
    """Running statistics of one site, in the shape of the layer's own.

    Attributes:
        count: Values for each mean.
        mean: Means.
        squares: Sums of squared distances from the means.
    """

    count: float
    mean: Floats
    squares: Floats


def _moments(layer: Any, data: Any) -> _Moments:
    found: _Moments | None = None
    for batch in _batches(data, lists_are_batches=True):  # as Keras takes them, for this layer alone
        values = np.asarray(batch, np.float64)
        if not np.isfinite(values).all():
            raise ConfigError(
                f"the data for the layer {layer.name} hold values that are NaN or infinite",
                where=_WHERE,
                fix="remove or replace them",
            )
        if not layer.built:
            layer.build(values.shape)
        kept = {axis % values.ndim for axis in _axes(layer)}
        rest = tuple(axis for axis in range(values.ndim) if axis not in kept)
        shape = tuple(layer.adapt_mean.shape)
        count = float(np.prod([values.shape[axis] for axis in rest]))
        if not count:
            continue
        mean = values.mean(axis=rest, keepdims=True)
        squares = ((values - mean) ** 2).sum(axis=rest).reshape(shape)
        now = _Moments(count, mean.reshape(shape), squares)
        found = now if found is None else _merged(found, now)
    if found is None:
        raise _no_data(layer)
    return found


def _axes(layer: Any) -> tuple[int, ...]:
    axis = layer.get_config()["axis"]
    return () if axis is None else tuple(axis) if isinstance(axis, list | tuple) else (axis,)


def _merged(one: _Moments, other: _Moments) -> _Moments:
    count = one.count + other.count
    apart = other.mean - one.mean
    mean = one.mean + apart * (other.count / count)
    return _Moments(count, mean, one.squares + other.squares + apart**2 * (one.count * other.count / count))


# -- tokens ----------------------------------------------------------------------------------------------------------


def _fit_lookup(federation: Sums, layer: Any, data: Any, min_count: int) -> None:
    """The vocabulary of all sites in Keras' order: by count, and equal counts by the tokens, both from the largest."""
    config = layer.get_config()
    found, documents = _counted(layer, data)
    here = {token: counts for token, counts in found.items() if counts[0] >= min_count}
    is_integer = _is_integer(layer)
    texts = federation.union([str(token) for token in here])
    tokens: list[Any] = [int(text) for text in texts] if is_integer else texts
    if not tokens:
        raise _no_data(layer)
    counts = np.array([here.get(token, (0.0, 0.0)) for token in tokens], np.float64)
    totals = federation.sum({"counts": counts, "documents": np.array(float(documents))})
    order = np.array(tokens if is_integer else [token.encode() for token in tokens])
    ranked = np.lexsort((order, totals["counts"][:, 0]))[::-1]
    if config.get("max_tokens"):
        ranked = ranked[: config["max_tokens"] - _specials(layer, tokens[0])]
    vocabulary = [tokens[place] for place in ranked]
    if config["output_mode"] != "tf_idf":
        layer.set_vocabulary(vocabulary)
        return
    # the formula of Keras: log(1 + documents / (1 + documents with the token))
    weights = np.log1p(totals["documents"] / (1 + totals["counts"][ranked, 1]))
    layer.set_vocabulary(vocabulary, idf_weights=weights.astype(np.float32))


def _counted(layer: Any, data: Any) -> tuple[dict[Any, tuple[float, float]], int]:
    """Each token of this site -> how often it is there, and in how many documents; and the number of documents."""
    filler = _filler(layer)
    learner = _changed(layer, output_mode="int", max_tokens=None)
    for batch in _batches(data):
        learner.update_state(batch)
    learner.update_state(np.array([filler]))
    learner.finalize_state()
    tokens = list(learner.get_vocabulary(include_special_tokens=False)) or [filler]
    numbered = _changed(layer, output_mode="int", max_tokens=None, vocabulary=tokens)
    size = len(numbered.get_vocabulary())
    counts, holders, documents = np.zeros(size), np.zeros(size), 0
    for rows in _documents(numbered, data):
        documents += len(rows)
        counts += np.bincount(rows.ravel(), minlength=size)
        places = np.repeat(np.arange(len(rows)), rows.shape[1])
        _, numbers = np.unique(np.stack([places, rows.ravel()]), axis=1)
        holders += np.bincount(numbers, minlength=size)
    first = size - len(tokens)
    found = zip(tokens, counts[first:].tolist(), holders[first:].tolist(), strict=True)
    return {token: (count, held) for token, count, held in found}, documents


def _filler(layer: Any) -> Any:
    """A token that means nothing else to a layer: Keras cannot learn an empty vocabulary, nor look up in one."""
    config = layer.get_config()
    if _is_integer(layer):
        return max(config["oov_token"], config["mask_token"] or 0) + 1
    return f"a{config.get('oov_token', '')}{config.get('mask_token') or ''}"


def _documents(numbered: Any, data: Any) -> Iterator[npt.NDArray[np.int64]]:
    """Numbers of the tokens, with a row for each document as Keras takes documents."""
    whole = not _is_batched(data)
    for batch in _batches(data):
        numbers = np.asarray(keras.ops.convert_to_numpy(numbered(batch)))
        if numbers.ndim == 1:  # of an array each entry is a document; of batches each batch
            numbers = numbers[:, None] if whole else numbers[None]
        yield numbers.reshape(len(numbers), -1)


def _is_integer(layer: Any) -> bool:
    return isinstance(layer, keras.layers.IntegerLookup)


def _changed(layer: Any, **changes: Any) -> Any:
    """A layer with the same settings but for these, that writes a number for each token."""
    config = layer.get_config() | {"idf_weights": None, "pad_to_max_tokens": False, "sparse": False} | changes
    if "output_sequence_length" in config:
        config["output_sequence_length"] = None  # a cut would lose tokens
    return type(layer).from_config({key: value for key, value in config.items() if key in layer.get_config()})


def _specials(layer: Any, token: Any) -> int:
    """How many entries the vocabulary has for what is no token: padding, and what is unknown."""
    weights = [1.0] if layer.get_config()["output_mode"] == "tf_idf" else None
    return len(_changed(layer, vocabulary=[token], idf_weights=weights, vocabulary_size=None).get_vocabulary()) - 1


# -- data ------------------------------------------------------------------------------------------------------------


def _is_batched(data: Any, lists_are_batches: bool = False) -> bool:
    """Whether Keras takes data for batches, rather than for rows."""
    if isinstance(data, list | tuple):
        return lists_are_batches
    return not hasattr(data, "shape")


def _batches(data: Any, lists_are_batches: bool = False) -> Iterator[Any]:
    if isinstance(data, keras.utils.PyDataset):
        batches: Iterable[Any] = (data[number] for number in range(len(data)))
    elif _is_batched(data, lists_are_batches):
        batches = data
    else:
        rows = data if hasattr(data, "shape") else np.asarray(data)
        batches = (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
    for batch in batches:
        yield _to_numpy(batch[0] if isinstance(batch, tuple) else batch)


def _to_numpy(batch: Any) -> Any:
    """A batch as an array, unless it holds texts as a tensor of TensorFlow, which layers take as it is."""
    if isinstance(batch, np.ndarray) or str(getattr(batch, "dtype", "")) == "<dtype: 'string'>":
        return batch
    return keras.ops.convert_to_numpy(batch) if keras.ops.is_tensor(batch) else np.asarray(batch)


def _no_data(layer: Any) -> ConfigError:
    return ConfigError(
        f"there are no data for the layer {layer.name}",
        where=_WHERE,
        fix="check what this site reads; with min_count=, lower it",
    )

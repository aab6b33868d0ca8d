"""Federated rounds for MONAI's client algorithms: any `monai.fl.client.ClientAlgo`, such as `MonaiAlgo`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.fl.client import ClientAlgo, ClientAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.networks.utils import copy_model_state, get_state_dict

from fl_adapters.participant.exchange import selected
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.session import Session
from fl_adapters.torch.progress import size_of
from fl_adapters.torch.selection import NamedTensors
from fl_adapters.torch.state import as_array, as_tensor
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task
from fl_runtime.wire.names import facts_of

from .names import channels_of
from .scores import plain_numbers

_FRAMEWORK = "monai client algorithm"


def run_client_algo(
    algo: ClientAlgo,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    rounds: int | None = None,
    stats: ClientAlgoStats | None = None,
    stats_extra: Mapping[str, Any] | None = None,
    kit: str | None = None,
    exchange: str | Sequence[str] | None = None,
    keep_local: Sequence[str] = (),
    evaluate_global: bool | None = None,
    num_examples: int | None = None,
    required: bool = False,
    agree: bool | Mapping[str, Sequence[Any]] = True,
) -> ExchangeObject:
    """Train a MONAI client algorithm through all rounds of the federation.

    Each round the algorithm gets the global weights through `train`, trains for as long as it decides (`local_epochs`
    of `MonaiAlgo`), and gives its own weights, or their difference, through `get_weights`. If it can evaluate, it
    scores each global model. If it has a `trainer`, that ends with the final weights. Outside a federation it trains
    one round alone.

    Args:
        algo: The algorithm. It is initialised here, and finalised at the end, whatever happens.
        initial: Weights to begin with if the job has none, by name. Default: those of `algo.trainer.network`, else
            what `get_weights` gives before training.
        rounds: Number of rounds, if the job does not set it.
        stats: The algorithm that computes statistics. Default: `algo`.
        stats_extra: Argument for one call of `get_data_stats`. All single numbers in its result are sent to the server
            as metrics of the first round. Default: no call, and nothing is sent.
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`.
        exchange: What travels: "all", or a list of name patterns. Default: the job's, else everything.
        keep_local: Name patterns of tensors that never leave this site. They are added to the job's own.
        evaluate_global: Whether the algorithm scores each global model. Default: yes if it can evaluate.
        num_examples: Weight of this site in the average. Default: the size of the training set of `algo.trainer`.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        agree: Whether lists of names that the adapter sees (channels, label names) must be equal at all sites. A dict
            adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.

    Returns:
        The final global weights.

    Raises:
        ConfigError: If the algorithm gives no weights, or the number of its examples is unknown.
        FederationError: If the run has failed.
    """
    options = Options(
        kit=kit,
        exchange=exchange,
        keep_local=keep_local,
        evaluate_global=evaluate_global,
        num_examples=num_examples,
        required=required,
        agree=agree,
    )
    session = open_session(options, framework=_FRAMEWORK, fresh=True)
    extra: dict[str, Any] = {ExtraItems.CLIENT_NAME: session.name if session else "local"}
    parties = [algo] if stats is None or stats is algo else [algo, stats]
    try:
        for party in parties:
            party.initialize(extra)
        if session is None:
            return _alone(algo, initial, extra)
        numbers = {} if stats_extra is None else dict(_numbers((stats or algo).get_data_stats(dict(stats_extra))))
        return _federated(algo, session, options, initial, rounds, numbers, extra)
    except BaseException as error:
        if session is not None:
            session.leave(error)
        algo.abort(extra)
        raise
    finally:
        for party in parties:
            party.finalize(extra)


def _federated(
    algo: ClientAlgo,
    session: Session,
    options: Options,
    initial: Mapping[str, torch.Tensor] | None,
    rounds: int | None,
    numbers: dict[str, float],
    extra: dict[str, Any],
) -> ExchangeObject:
    own = initial if initial is not None else _weights_before_training(algo, extra)
    names = selected(own, session.settings.exchange, session.settings.keep_local)
    first = _arrays(own, [name for name in names if name not in _staying(algo)])
    examples = options.num_examples or _training_examples(algo)
    evaluates = _evaluates(algo, session.settings)
    session.register(
        first,
        agreement=facts_of({"framework": _FRAMEWORK, **_channels(algo)}),
        rounds=rounds,
        evaluates=evaluates,
        cross_evaluates=evaluates,
    )
    task = session.start(lambda: first)
    while task.kind == "train":
        weights = _tensors(task.arrays)
        algo.train(ExchangeObject(weights=weights, weight_type=WeightType.WEIGHTS), extra)
        given = algo.get_weights(extra)
        steps = int((given.statistics or {}).get(FlStatistics.NUM_EXECUTED_ITERATIONS, 0))
        new = _arrays(_new_weights(given, task), task.arrays)
        task = session.exchange(new, LocalResult(examples, steps, numbers))
        numbers = {}
        if evaluates:
            session.report(*_score(algo, task.arrays, extra))
    final = ExchangeObject(weights=_tensors(task.arrays), weight_type=WeightType.WEIGHTS)
    if evaluates:
        session.results.cross_evaluate(lambda arrays: _score(algo, arrays, extra))
    network = getattr(getattr(algo, "trainer", None), "network", None)
    if network is not None:
        copy_model_state(dst=network, src=final.weights)
    session.finish()
    return final


def _staying(algo: ClientAlgo) -> frozenset[str]:
    """Names of tensors that never travel: singular vectors of spectral normalisation."""
    network = getattr(getattr(algo, "trainer", None), "network", None)
    return frozenset() if network is None else NamedTensors.of(network).staying


def _channels(algo: ClientAlgo) -> dict[str, list[str]]:
    """What the metadata of the algorithm's bundle says of channels, if it trains one."""
    parser = getattr(getattr(algo, "train_workflow", None), "parser", None)
    return {} if parser is None else channels_of(parser)


def _alone(algo: ClientAlgo, initial: Mapping[str, torch.Tensor] | None, extra: dict[str, Any]) -> ExchangeObject:
    weights = dict(initial if initial is not None else _weights_before_training(algo, extra))
    algo.train(ExchangeObject(weights=weights, weight_type=WeightType.WEIGHTS), extra)
    given = algo.get_weights(extra)
    if given.weight_type == WeightType.WEIGHT_DIFF:
        given = ExchangeObject(
            weights={name: weights[name] + given.weights[name] for name in given.weights},
            weight_type=WeightType.WEIGHTS,
            statistics=given.statistics,
        )
    return given


def _weights_before_training(algo: ClientAlgo, extra: dict[str, Any]) -> Mapping[str, torch.Tensor]:
    network = getattr(getattr(algo, "trainer", None), "network", None)
    if network is not None:  # `get_weights` might give differences, and there are none yet
        return {name: tensor.detach().cpu().clone() for name, tensor in get_state_dict(network).items()}
    given = algo.get_weights(extra)
    if not given.weights or given.weight_type != WeightType.WEIGHTS:
        raise ConfigError(
            f"get_weights() gives {given.weight_type or 'nothing'} before training, and the algorithm has no trainer",
            where=type(algo).__name__,
            fix="pass the weights to begin with: run_client_algo(algo, initial=network.state_dict())",
        )
    return dict(given.weights)


def _new_weights(given: ExchangeObject, task: Task) -> dict[str, torch.Tensor]:
    """The algorithm's weights after a round. A difference is added to the weights with which the round began."""
    if not given.is_valid_weights():
        raise ConfigError(
            f"get_weights() gave no weights in round {task.round}",
            where="ClientAlgo",
            fix="return ExchangeObject(weights=..., weight_type=WeightType.WEIGHTS or WeightType.WEIGHT_DIFF)",
        )
    weights = {name: torch.as_tensor(tensor).detach().cpu() for name, tensor in given.weights.items()}
    if given.weight_type == WeightType.WEIGHTS:
        return weights
    before = {name: as_tensor(array) for name, array in task.arrays.items()}
    return {name: before[name] + weights[name].to(before[name].dtype) for name in before if name in weights}


def _arrays(weights: Mapping[str, Any], names: Iterable[str]) -> Arrays:
    """Weights by name, as arrays. The server refuses an update if the algorithm does not give all `names`."""
    tensors = {name: torch.as_tensor(weights[name]) for name in names if name in weights}
    return {name: as_array(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Copies as tensors, since the arrays are views of the session's buffer."""
    return {name: as_tensor(array).clone() for name, array in arrays.items()}


def _evaluates(algo: ClientAlgo, settings: SiteSettings) -> bool:
    own = type(algo).evaluate is not ClientAlgo.evaluate
    possible = own and getattr(algo, "evaluator", True) is not None
    if settings.evaluate_global and not possible:
        raise ConfigError(
            "evaluate_global=True, but the algorithm cannot evaluate",
            where=type(algo).__name__,
            fix="give it an evaluation (config_evaluate_filename of MonaiAlgo), or leave evaluate_global out",
        )
    return possible if settings.evaluate_global is None else settings.evaluate_global


def _score(algo: ClientAlgo, arrays: Arrays, extra: dict[str, Any]) -> tuple[dict[str, float], int]:
    score = algo.evaluate(ExchangeObject(weights=_tensors(arrays), weight_type=WeightType.WEIGHTS), extra)
    loader = getattr(getattr(algo, "evaluator", None), "data_loader", None)
    return plain_numbers(score.metrics or {}), size_of(loader, math.inf, 1) or 1


def _training_examples(algo: ClientAlgo) -> int:
    examples = size_of(getattr(getattr(algo, "trainer", None), "data_loader", None), math.inf, 1)
    if not examples:
        raise ConfigError(
            "the number of this site's training examples is unknown",
            where=type(algo).__name__,
            fix="pass num_examples=: it is the weight of this site in the average",
        )
    return examples


def _numbers(given: ExchangeObject) -> Iterator[tuple[str, float]]:
    """Every single number of the statistics, such as ("stats/train/data_count", 12.0). Lists are left out."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, f"{name}/{getattr(key, 'value', key)}")
        elif (isinstance(value, int | float) or getattr(value, "ndim", None) == 0) and math.isfinite(float(value)):
            yield name, float(value)

    yield from walk(given.statistics or {}, "stats")

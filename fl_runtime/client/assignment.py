"""Checks of what a server assigns to a site: the settings of a job, and those in a task.

A site that ran with a setting of another type or of absurd size would end in an error from deep inside its training
framework. Fields that this version does not know pass, since a newer server may send them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fl_runtime.errors import ConfigError, ProtocolError
from fl_runtime.text import parse_json, printable
from fl_runtime.trainings import parsed_name
from fl_runtime.trust.identity import check_name
from fl_runtime.types import LARGEST_SEED, LONGEST_S, MOST_ROUNDS, MOST_SITES, RunSettings
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

_Check = Callable[[Any], bool]

_MAX_CHARS = 2**22
_MAX_TEXT_CHARS = 4_096
_FIX = "ask the server's operator, and run the same version of fl-adapters at server and site"


def checked_settings(reply: pb.JoinReply) -> dict[str, Any]:
    """Read the settings of the job that a site has joined.

    Args:
        reply: The server's answer to the join.

    Returns:
        The settings, with the fields of `RunSettings`. Names in them may become folders at this site.

    Raises:
        ProtocolError: They cannot be those of a job. The message names the field.
    """
    try:
        settings = parse_json(reply.settings_json, limit_chars=_MAX_CHARS)
        training = parsed_name(settings["name"])
        if training is None:
            raise ConfigError("no name")
        check_name(training[0], "job")
        check_name(reply.site, "site")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError):
        raise ProtocolError(
            "the server names a job or a site in a way that this site does not accept as a name",
            fix="ask the server's operator; names have letters, digits, '.', '_', '@' and '-'",
        ) from None
    _check_types(settings)
    _check(settings, _SETTINGS, "settings of the job")
    if not reply.index < reply.count <= MOST_SITES or reply.training > MOST_ROUNDS or not reply.attempt:
        raise ProtocolError(
            f"the server calls this site number {reply.index} of {reply.count}, in attempt {reply.attempt} of training "
            f"{reply.training}",
            fix=_FIX,
        )
    return dict(settings)


def checked_config(header: pb.TaskHeader) -> dict[str, Any]:
    """Read the settings in a task.

    Args:
        header: The header of the task.

    Returns:
        The settings; see `Task.config`.

    Raises:
        ProtocolError: They cannot be those of a task of this kind. The message names the field.
    """
    where = f"{header.kind[:40]} task of round {header.round}"
    try:
        config = parse_json(header.config_json or "{}", limit_chars=_MAX_CHARS)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ProtocolError(
            "the settings in a task are not a JSON object", where=where, fix="ask the server's operator"
        )
    _check(config, _CONFIG, f"settings in a {where}")
    needed = _NEEDED.get(header.kind, "")
    if needed and needed not in config:
        raise ProtocolError(f"the settings in a task do not have {needed!r}", where=where, fix=_FIX)
    return config


def _check_types(settings: dict[str, Any]) -> None:
    """Raise ProtocolError if a setting of the job has another type than this version expects; unknown ones pass."""
    try:
        TypeAdapter(RunSettings).validate_python(settings)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        field = ".".join(map(str, item["loc"]))
        raise ProtocolError(
            f"the server sends settings that this site cannot read: {printable(field, 100)}: {item['msg']}",
            fix="run the same version of fl-adapters at server and site",
        ) from None


def _check(values: Mapping[str, Any], checks: Mapping[str, _Check], what: str) -> None:
    for name, check in checks.items():
        if name in values and not check(values[name]):
            shown = printable(repr(values[name])[:200], 100)
            raise ProtocolError(f"the server sends {what} that cannot be right: {name} is {shown}", fix=_FIX)


def _whole(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> _Check:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT_CHARS


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _sites(value: Any) -> bool:
    return _texts(value) and 0 < len(value) <= MOST_SITES


def _addends(value: Any) -> bool:
    """Whether a value lists the updates of an aggregate: site, number of examples and weight of each."""
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 3 and _text(item[0]) and _COUNT(item[1]) and _WEIGHT(item[2])
        for item in value
    )


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and all(type(item) in (int, float) for item in value.values())


def _optional(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _weights(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_WEIGHT, value.values()))


_ROUNDS, _COUNT = _whole(1, MOST_ROUNDS), _whole(0, 2**53)
_SECONDS = _number(math.ulp(0.0), LONGEST_S)
_WEIGHT = _number(0, 1e300)
_SHARE = _number(math.ulp(0.0), 1)

_SETTINGS: Mapping[str, _Check] = {
    "sites": _sites,
    "min_sites": _whole(1, MOST_SITES),
    "rounds": _optional(_ROUNDS),
    "strategy": _optional(_text),
    "deadline_s": _SECONDS,
    "every": _optional(lambda value: _text(value) or _ROUNDS(value)),
    "keep_local": _optional(_texts),
    "exchange": _optional(lambda value: _text(value) or _texts(value)),
    "best_metric": _optional(_text),
    "seed": _optional(_whole(0, LARGEST_SEED)),
    "rejoin_s": _SECONDS,
    "patience_s": _optional(_SECONDS),
    "join_s": _optional(_number(0, LONGEST_S)),
    "app": _text,
    "submitted_by": _text,
    "fraction": _SHARE,
    "max_share": _optional(_SHARE),
    "site_weights": _weights,
    "patience": _optional(_ROUNDS),
    "min_delta": _number(0, 1e300),
    "trainings": _optional(_ROUNDS),
}

_NEEDED = {"share": "to", "aggregate": "sites", "secure_sum": "step"}
_CONFIG: Mapping[str, _Check] = {
    "to": _text,
    "sites": _addends,
    "members": _sites,
    "turn": _text,
    "model": _text,
    "lora_frozen": _text,
    "held_version": _whole(0, 2**53),
    "proximal_mu": _number(0, 1e300),
    "personal_mu": _optional(_number(0, 1e300)),
    "control_variates": lambda value: isinstance(value, bool),
    "metrics": _scores,
}

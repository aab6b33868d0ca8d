"""Hostile variants: metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from attack_client import Attacker, member
from attack_table import Attack
from attacks_joining import ESCAPES


def metric(value: Any, name: str = "loss") -> Callable[[Attacker], object]:
    return member(lambda attacker: attacker.score(json.dumps({name: value})))


def text(metrics_json: str) -> Callable[[Attacker], object]:
    return member(lambda attacker: attacker.score(metrics_json))


def summary(**fields: Any) -> Callable[[Attacker], object]:
    return metric({"kind": "auc", "value": 0.5, "weight": 1, **fields})


_A = partial(Attack, "metrics")
_TAKEN = "the score is taken"  # of this site alone: it counts in nobody's model
_NUMBERS = "not a JSON object of numbers"

ATTACKS = (
    _A("a square that overflows", "evil", metric({"kind": "root_mean", "value": 1e200, "weight": 1}), _TAKEN),
    _A("a sum that overflows", "evil", metric({"kind": "mean", "value": 1.7e308, "weight": 1e18}), _TAKEN),
    _A("counts that vanish", "evil", summary(histogram=[[0, 5e-324, 5e-324], [1, 1, 5e-324]]), _TAKEN),
    _A("counts of one class", "evil", summary(histogram=[[0, 0, 3]]), _TAKEN),
    _A("NaN", "evil", metric(math.nan), _TAKEN),
    _A("a negative weight", "evil", summary(weight=-1), _NUMBERS),
    _A("a weight of NaN", "evil", summary(weight=math.nan), _NUMBERS),
    _A("an infinite weight", "evil", summary(weight=math.inf), _NUMBERS),
    _A("a negative count", "evil", summary(histogram=[[0, -1, 1]]), _NUMBERS),
    _A("70,000 bins", "evil", summary(histogram=[[n, 1, 1] for n in range(70_000)]), _NUMBERS),
    _A("a bin without a number", "evil", summary(histogram=[["x", 1, 1]]), _NUMBERS),
    _A("a histogram that is none", "evil", summary(histogram=7), _NUMBERS),
    _A("a kind nobody pools", "evil", summary(kind="median"), _NUMBERS),
    _A("a list in place of a number", "evil", metric([1, 2]), _NUMBERS),
    _A("a number of 5,000 digits", "evil", text('{"loss": 1' + "0" * 5000 + "}"), "metrics are not"),
    _A("a list in place of metrics", "evil", text("[1]"), _NUMBERS),
    _A("no JSON", "evil", text("{"), "metrics are not JSON"),
    _A("nested 100,000 deep", "evil", text('{"a":' * 10**5), "metrics are not"),
    _A("a name that steers a terminal", "evil", metric(1, ESCAPES), "a metric cannot be called"),
    _A("a name that is a formula", "evil", metric(1, "=1+1"), "a metric cannot be called"),
    _A("a name of 10,000 characters", "evil", metric(1, "n" * 10_000), "a metric cannot be called"),
    _A("no name", "evil", metric(1, ""), "a metric cannot be called"),
    _A("10,000 names", "evil", text(json.dumps({str(n): 1 for n in range(10_000)})), "10000 metrics"),
    _A("a negative number of examples", "evil", member(lambda a: a.score(num_examples=2**64 - 1)), "num_examples is"),
)

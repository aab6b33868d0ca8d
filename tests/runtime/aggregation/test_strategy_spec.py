"""Strategies as users write them: "name:argument=value", or objects with checked arguments."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from fl_runtime.aggregation import FedAvg, known_strategies, make_strategy
from fl_runtime.aggregation.spec import Described, choice, find, number
from fl_runtime.errors import ConfigError


@dataclass(frozen=True)
class Example(Described):
    """A strategy with every kind of argument."""

    name: ClassVar[str] = "example"
    rate: float = number(0.5, above=0, most=2)
    count: int = number(3, least=1)
    kind: str = choice("plain", "fancy")


def refused(make: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.where == "strategy"
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("example", Example()),
        ("example:", Example()),
        ("Example:rate=1", Example(rate=1.0)),
        (" example : rate = 1e-3 , count=7,kind=fancy", Example(rate=0.001, count=7, kind="fancy")),
    ],
)
def test_a_spec_is_read_and_written(spec: str, expected: Example) -> None:
    actual = find([Example], spec)
    assert actual == expected
    assert find([Example], actual.spec) == expected


def test_a_spec_names_what_differs_from_the_defaults() -> None:
    assert Example().spec == "example"
    assert Example(rate=np.float32(0.25), count=np.int64(3)).spec == "example:rate=0.25"
    assert Example(kind="fancy", count=4).spec == "example:count=4,kind=fancy"


def test_numbers_have_the_type_of_their_argument() -> None:
    actual = Example(rate=1, count=4.0)  # type: ignore[arg-type]
    assert (type(actual.rate), type(actual.count)) == (float, int)
    with pytest.raises(FrozenInstanceError):
        actual.rate = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "problem", "expected"),
    [
        ("rate=0", "rate=0", "a number above 0 and of at most 2"),
        ("rate=2.5", "rate=2.5", "a number above 0 and of at most 2"),
        ("rate=nan", "rate=nan", "a number above 0"),
        ("rate=fast", "rate=fast", "a number above 0"),
        ("rate=", "rate=", "a number above 0"),
        ("count=0", "count=0", "a whole number of at least 1"),
        ("count=1.5", "count=1.5", "a whole number"),
        ("count=many", "count=many", "a whole number"),
        ("count=inf", "count=inf", "a whole number"),
        ("kind=odd", "kind=odd", "one of: plain, fancy"),
        ("speed=1", "no argument 'speed'", "its arguments are: rate, count, kind"),
        ("rate", "'rate', which is not argument=value", "its arguments are: rate, count, kind"),
        ("rate=1,rate=1", "rate twice", "once"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(spec: str, problem: str, expected: str) -> None:
    error = refused(lambda: find([Example], f"example:{spec}"))
    assert "example" in error.what
    assert problem in error.what
    assert expected in error.fix


@pytest.mark.parametrize("fields", [{"rate": True}, {"rate": None}, {"rate": -1.0}, {"count": 1.5}, {"kind": 1}])
def test_an_object_is_checked_like_a_spec(fields: dict[str, Any]) -> None:
    assert next(iter(fields)) in refused(lambda: Example(**fields)).what


@pytest.mark.parametrize("spec", ["fedsgd", "", "fedavg2:x=1"])
def test_an_unknown_strategy_is_refused_with_the_known_ones(spec: str) -> None:
    error = refused(lambda: make_strategy(spec))
    assert "unknown strategy" in error.what
    assert all(name in error.fix for name in known_strategies())


@pytest.mark.parametrize("name", known_strategies())
def test_every_strategy_can_be_had_without_arguments(name: str) -> None:
    assert make_strategy(name) == make_strategy(name.upper())


def test_arguments_of_a_strategy_that_takes_none() -> None:
    assert "write tree-cyclic" in refused(lambda: make_strategy("tree-cyclic:mu=0.1")).fix


def test_fedavg_takes_its_arguments() -> None:
    assert make_strategy("fedavg:weights=equal") == FedAvg(weights="equal")

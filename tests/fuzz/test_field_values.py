"""Every field of jobs, filters, strategies and policies, with values of every type and size: our own errors alone."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fl_adapters.cli.federation.server import read_job
from fl_adapters.job import Job
from fl_runtime import filters
from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import FederationError
from fl_runtime.filters import known_filters
from fl_runtime.trust.policy import Policy, read_policy

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -0.5, 1e308, math.inf, math.nan)
TEXTS = ("", "x", "1", "nan", "1e400", "\x1b[2J", "../x", "a" * 10_000, "1" * 5_000)
TABLES = ([], [1], ["x"], [["x"]], [None], [{}], {}, {"a": 1}, {"name": "x"}, {"north": "x"}, {"north": None})
VALUES: tuple[Any, ...] = (None, True, *NUMBERS, *TEXTS, *TABLES)
STRATEGIES = (
    "fedavg fedavgm fedadam fedyogi fedadagrad fednova cyclic fedbuff median trimmed-mean krum norm-bounding fedprox "
    "scaffold ditto swarm fedit ffa-lora rolora fedsa-lora flora flexlora fedex-lora tree-bagging tree-cyclic "
    "tree-histogram"
).split()


def read(**given: Any) -> None:
    """Read a job that names these fields. Our own errors are the right answer to bad ones."""
    try:
        read_job({"name": "job", "app": "x", "rounds": 3, **given}, ["north", "south"])
    except FederationError as error:
        FederationError.from_wire(error.to_wire())


@pytest.mark.parametrize("field", Job.model_fields)
def test_a_field_of_a_job_takes_no_value_badly(field: str) -> None:
    for value in VALUES:
        read(**{field: value})


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_argument_of_a_strategy_takes_no_value_badly(name: str) -> None:
    for field in fields(make_strategy(name)):  # type: ignore[arg-type]
        for value in VALUES:
            read(strategy=f"{name}:{field.name}={value}")


@pytest.mark.parametrize("name", known_filters())
def test_an_argument_of_a_filter_takes_no_value_badly(name: str) -> None:
    for argument in ("at", "unknown", *(field.name for field in fields(getattr(filters, name)))):
        for value in VALUES:
            read(filters=[{"name": name, argument: value}])


@pytest.mark.parametrize("field", Policy.model_fields)
def test_a_rule_of_a_policy_takes_no_value_badly(field: str, tmp_path: Path) -> None:
    for value in VALUES:
        path = tmp_path / "policy.yml"
        path.write_text(yaml.safe_dump({field: value}))
        try:
            read_policy(path)
        except FederationError as error:
            FederationError.from_wire(error.to_wire())

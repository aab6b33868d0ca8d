"""What sites allow: rules of their policies, refusals by name, and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from threaded_federation import ThreadedFederation, run_sites

from fl_adapters.statistics import Categorical, Numeric, Statistics, describe
from fl_runtime.errors import ConfigError
from fl_runtime.trust.policy import read_policy
from fl_runtime.types import StatisticsRules

OPEN = StatisticsRules()


def described(monkeypatch: pytest.MonkeyPatch, parts: list[Any], rules: list[StatisticsRules], **more: Any) -> Any:
    """Describe the parts at sites with these rules in place of their policies', and return the common result."""
    import threading

    own = threading.local()
    monkeypatch.setattr("fl_adapters.statistics.federated.statistics_rules", lambda kit: own.rules)

    def site(federation: ThreadedFederation) -> Statistics:
        own.rules = rules[federation.site.index]
        return describe(parts[federation.site.index], federation=federation, **more)

    results = run_sites(len(parts), site)
    assert len({result.to_json() for result in results}) == 1
    return results[0]


def people(rows: int, seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    ages = draw.normal(60, 12, rows).clip(18, 95)
    return pd.DataFrame({"age": ages, "secret": draw.normal(size=rows), "sex": draw.choice(["f", "m"], rows)})


def test_sites_that_refuse_are_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [people(100, 1), people(80, 2), people(3, 3), people(50, 4)]
    rules = [OPEN, replace(OPEN, allowed=False), replace(OPEN, smallest_count=10), replace(OPEN, features=("a*",))]
    found = described(monkeypatch, parts, rules)
    assert found.sites == ("site-1", "site-4") and found.rows == 150
    told = {(absence.site, absence.feature): absence.reason for absence in found.absences}
    assert told == {
        ("site-2", ""): "its policy allows no statistics",
        ("site-3", ""): "it has fewer than 10 rows",
        ("site-4", "secret"): "its policy does not allow this column",
        ("site-4", "sex"): "its policy does not allow this column",
    }
    assert found.features["age"].mean == pytest.approx(pd.concat([parts[0], parts[3]])["age"].mean())
    assert found.features["secret"].count == 100 and found.features["secret"].sites == 1


def test_a_site_alone_is_shown_only_where_it_allows_that(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [replace(OPEN, per_site=False), OPEN, OPEN]
    found = described(monkeypatch, [people(30, seed) for seed in range(3)], rules)
    assert list(found.per_site) == ["site-2", "site-3"] and len(found.sites) == 3


def test_a_column_of_too_few_sites_is_told_by_none_that_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [people(30, 1), people(30, 2).drop(columns="secret"), people(30, 3).drop(columns="secret")]
    found = described(monkeypatch, parts, [replace(OPEN, min_cohort=2), OPEN, OPEN])
    assert "secret" not in found.features
    assert {a.reason for a in found.absences if a.site == "site-1"} == {"its policy asks for at least 2 sites"}
    every = described(monkeypatch, parts, [replace(OPEN, min_cohort=4), OPEN, OPEN])
    assert every.sites == ("site-2", "site-3")


def test_noise_is_on_all_counts_and_no_larger_than_epsilon_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 40_000
    parts = [people(rows, 1), people(rows, 2)]
    rare = parts[0].copy()
    rare.loc[0, "sex"] = "named like nobody else"
    rules = replace(OPEN, epsilon=1.0, bounds={"age": (0, 120)})
    found = described(monkeypatch, [rare, parts[1]], [rules, rules])
    assert found.noise == {"site-1": 1.0, "site-2": 1.0}
    reasons = {a.reason for a in found.absences if a.feature == "secret"}
    assert reasons == {"the column has no bounds in its policy, which adds noise"}
    age, sex = found.features["age"], found.features["sex"]
    assert isinstance(age, Numeric) and isinstance(sex, Categorical)
    values = pd.concat(parts)["age"]
    again = described(monkeypatch, [rare, parts[1]], [rules, rules])
    assert again.to_json() != found.to_json() and abs(found.rows - 2 * rows) < 200
    assert abs(age.count - 2 * rows) < 1000
    assert age.mean == pytest.approx(values.mean(), abs=1) and age.std == pytest.approx(values.std(), rel=0.05)
    for level, value in age.quantiles.items():
        assert value == pytest.approx(values.quantile(level), abs=120 / 32)
    assert set(sex.categories) == {"f", "m"} and abs(sex.categories["f"] - (pd.concat(parts)["sex"] == "f").sum()) < 200
    assert found.correlations["age"] == {}


def test_noise_has_the_spread_of_its_epsilon() -> None:
    from fl_adapters.statistics.noise import _noisy

    for scale in (2.0, 20.0):
        drawn = _noisy(np.zeros(200_000), scale)
        ratio = np.exp(-1 / scale)
        assert drawn.var() == pytest.approx(2 * ratio / (1 - ratio) ** 2, rel=0.03) and abs(drawn.mean()) < scale / 50
        assert np.array_equal(drawn, np.round(drawn))


def test_the_policy_file_holds_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "policy.yml"

    def rules(text: str) -> StatisticsRules:
        file.write_text(text)
        policy = read_policy(file)
        return policy.statistics.rules(policy.min_cohort)

    assert rules("") == StatisticsRules(smallest_count=10, per_site=False)
    assert not rules("statistics: false").allowed
    text = "{smallest_count: 5, features: [age], per_site: true, epsilon: 2, bounds: {age: [0, 110]}}"
    expected = StatisticsRules(
        smallest_count=5, features=("age",), per_site=True, min_cohort=3, epsilon=2.0, bounds={"age": (0.0, 110.0)}
    )
    assert rules(f"min_cohort: 3\nstatistics: {text}") == expected
    for wrong in ("{smallest: 3}", "{epsilon: 0}", "{bounds: {age: [5, 5]}}", "{smallest_count: 0}"):
        with pytest.raises(ConfigError, match="statistics"):
            rules(f"statistics: {wrong}")

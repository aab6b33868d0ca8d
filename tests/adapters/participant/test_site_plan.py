"""What the job's strategy requires of a site, parsed once."""

from __future__ import annotations

import logging

import pytest

from fl_adapters.participant.local_work.site_plan import SitePlan
from fl_adapters.participant.options import Options, SiteSettings
from fl_runtime.aggregation import known_strategies


def test_plain_strategies_require_nothing() -> None:
    for spec in (None, "fedavg", "fedadam:lr=0.1", "median"):
        plan = SitePlan.parse(spec)
        assert (plan.phases, plan.relayed, plan.lora, plan.spec) == (1, False, None, spec)


def test_ditto_has_two_phases_and_swarm_is_relayed() -> None:
    assert SitePlan.parse("ditto:lam=0.5").phases == 2
    assert SitePlan.parse("swarm").relayed


def test_lora_strategies_come_as_objects() -> None:
    names = [name for name in known_strategies() if SitePlan.parse(name).lora is not None]
    assert names == ["fedit", "ffa-lora", "rolora", "fedsa-lora", "flora", "flexlora", "fedex-lora"]


@pytest.mark.parametrize("spec", ["strategy-of-a-later-version", "fedavg:new_argument=1"])
def test_an_unknown_strategy_is_logged_and_left_to_the_handshake(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SitePlan.parse(spec) == SitePlan()
    assert spec in caplog.text


def test_the_plan_survives_json() -> None:
    settings = SiteSettings.resolve(Options(), {"strategy": "ditto:lam=0.5"})
    assert SiteSettings.from_json(settings.to_json()) == settings
    assert settings.phases == 2

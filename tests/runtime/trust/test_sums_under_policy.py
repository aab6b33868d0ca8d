"""Sums over mutual TLS: what a site's policy says about them, and what its audit log holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from study import Study, readdressed

import fl_adapters as fl
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.trust.audit import entries


def summed(study: Study, policy: str, call: Callable[[fl.Sums], Any]) -> dict[str, Any]:
    """Make a call at both sites, north under this policy, and return each site's result or error."""
    kits = {name: readdressed(study, name) for name in study.sites}
    for name, kit in kits.items():
        (kit / "policy.yml").write_text(policy if name == "north" else "")
    found: dict[str, Any] = {}

    def work(name: str) -> None:
        try:
            with fl.sums(kit=str(kits[name])) as federation:
                found[name] = call(federation)
        except FederationError as error:
            found[name] = error
        finally:
            close_sessions(
                "the test is over", read_kit(kits[name]), failed=isinstance(found.get(name), FederationError)
            )

    threads = [threading.Thread(target=work, args=(name,)) for name in study.sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(found) == set(study.sites)
    return found


def total(federation: fl.Sums) -> tuple[float, ...]:
    values = federation.sum({"x": np.arange(3) * (federation.site.index + 1)})["x"]
    return tuple(float(value) for value in values)


def test_a_policy_that_names_sums_allows_them_and_they_are_on_record(study: Study) -> None:
    study.job()
    policy = "strategies: [fedavg, sum]\nadapters: [sums]\nexchange: [values, call]\nmin_cohort: 2\n"
    assert summed(study, policy, total) == dict.fromkeys(study.sites, (0.0, 3.0, 6.0))
    assert not list(readdressed(study, "north").rglob("model"))
    actions = [entry["action"] for entry in entries(readdressed(study, "north"))]
    assert actions.count("update") == 2 and (actions[0], actions[-1]) == ("joined", "left")  # a call, and the end


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("strategies: [fedavg]", "strategies: sum is not one of fedavg"),
        ("adapters: [hf]", "adapters: sums is not one of hf"),
        ("exchange: ['lora.*']", "exchange: lora.*"),
        ("min_cohort: 3", "min_cohort: 3"),
        ("max_share: 0.6", "max_share: 0.6"),
        ("exchange: [values, call]", "exchange: values, call"),
    ],
)
def test_what_a_policy_does_not_allow_is_refused_with_its_rule(study: Study, policy: str, rule: str) -> None:
    study.job()
    call = total if "values" not in rule else lambda federation: federation.union(["a"])
    error = summed(study, policy, call)["north"]
    assert isinstance(error, PermissionDeniedError) and rule in str(error)

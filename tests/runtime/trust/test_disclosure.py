"""What a policy keeps from other sites: its site's own weights, updates and trees, and its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, errors_at_once, errors_together, serving
from hostile_server import Hostile, train
from study import Study, readdressed

from fl_adapters import ConfigError, FederationError, PermissionDeniedError
from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_runtime.trust.policy import Policy
from fl_runtime.types import CohortRules, OwnPart, Terms

V = {"w": np.zeros(2)}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north", "south", "west")) as study:
        yield study


def keeping(*parts: OwnPart) -> CohortRules:
    return CohortRules(stays=parts)


def registered(site: Site, rules: CohortRules | None = None, **registration: Any) -> None:
    site.join()
    site.register(V, rules=rules, **registration)


# -- updates and trees ---------------------------------------------------------------------------------------------

SHOWN = {
    "swarm": ("swarm", "sends every site's updates to another site"),
    "tree-bagging": ("trees", "hands every site's own trees or parts of its histograms to the others"),
    "tree-cyclic": ("trees", "hands every site's own trees"),
    "tree-histogram": ("trees", "hands every site's own trees or parts of its histograms"),
}


@pytest.mark.parametrize("strategy", SHOWN)
def test_a_site_refuses_a_strategy_that_shows_its_own_updates_unless_its_policy_allows_it(
    study: Study, strategy: str
) -> None:
    key, what = SHOWN[strategy]
    kit = readdressed(study, "north")  # with the policy that provisioning writes
    study.job(strategy=strategy)
    hostile = Hostile(study, lambda method, message: message)
    with pytest.raises(PermissionDeniedError, match=what) as refusal:
        train(kit)
    assert "rule min_cohort: 2 (the site's policy.yml)" in refusal.value.where
    assert f"write `{key}: true` into the site's policy.yml" in refusal.value.fix
    assert not hostile.received
    job = {"name": "job", "sites": list(study.sites), "min_sites": 3, "strategy": strategy}
    for policy, allowed in ((f"min_cohort: 2\n{key}: true", strategy != "tree-cyclic"), (f"{key}: false", False)):
        (kit / "policy.yml").write_text(policy)
        gate = KitPolicyGate(kit)
        if allowed:
            gate.check_job(job)
            continue
        with pytest.raises(PermissionDeniedError) as refusal:
            gate.check_job(job)
        assert policy.splitlines()[0] in refusal.value.where


@pytest.mark.parametrize("named", [None, "fedavg", "tree-histogram"])
def test_trees_stay_at_home_also_when_a_server_names_another_strategy(study: Study, named: str | None) -> None:
    """The script boosts; whatever the job is said to be, its trees are what would leave."""
    gate = KitPolicyGate(readdressed(study, "north"))
    job = {"name": "job", "sites": list(study.sites), "min_sites": 3, "strategy": named, "submitted_by": ""}

    def boost() -> None:
        gate.check_join(job, "xgboost")
        gate.check_handshake(["trees"], Terms("encoded", "tree-bagging"))

    with pytest.raises(PermissionDeniedError, match="own trees"):
        boost()


@pytest.mark.parametrize(
    ("part", "strategy"), [("updates", "swarm"), ("trees", "tree-bagging"), ("initial", "tree-bagging")]
)
def test_the_server_lets_a_site_leave_at_the_handshake_whose_policy_the_strategy_breaks(
    tmp_path: Path, part: OwnPart, strategy: str
) -> None:
    content = Terms("weights" if strategy == "swarm" else "encoded", strategy)
    capabilities = frozenset({"swarm", "tree-bagging"})
    with serving(tmp_path, 3, rounds=1, min_sites=2, strategy=strategy) as bench:
        sites = [bench.site(name) for name in bench.names]
        for site in sites:
            site.join()

        def register(site: Site) -> None:
            from fl_runtime.wire.manifest import Manifest

            site.client.register(
                Manifest.of(V),
                agreement={},
                info={},
                capabilities=capabilities,
                rounds=0,
                evaluates=False,
                terms=content,
                rules=keeping(part) if site.name == "site-1" else None,
            )

        errors = errors_at_once(sites, register)
        assert [error is None for error in errors] == [False, True, True]
        assert isinstance(errors[0], PermissionDeniedError) and "(policy.yml of site-1)" in errors[0].where


# -- the initial model ---------------------------------------------------------------------------------------------


def test_the_server_asks_a_site_whose_policy_allows_it_for_the_initial_model(study: Study) -> None:
    kits = [readdressed(study, name) for name in study.sites]
    (kits[0] / "policy.yml").write_text("min_cohort: 2\ninitial: false\n")
    study.job(rounds=1)
    hostile = Hostile(study, lambda method, message: message)
    assert errors_at_once(kits, train) == [None] * 3
    assert sorted(header.round for header in hostile.received) == [0, 1, 1, 1]
    received = {entry["site"]: entry["round"] for entry in study.log() if entry["action"] == "task_sent"}
    assert set(received) == set(study.sites)
    asked = [e["site"] for e in study.log() if e["action"] == "task_sent" and e["facts"]["task"] == "initial"]
    assert asked == ["south"]


def test_a_job_that_no_site_may_begin_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench:
        sites = [bench.site(name) for name in bench.names]
        errors = errors_at_once(sites, lambda site: registered(site, keeping("initial")))
        for error in errors:
            assert isinstance(error, PermissionDeniedError) and "no site may give the initial model" in str(error)
            assert "rule initial: false (policy.yml of site-1, site-2)" in error.where
            assert "initial: {job: NAME}" in error.fix


def test_a_job_ends_when_the_last_site_leaves_that_may_give_the_initial_model(tmp_path: Path) -> None:
    with serving(tmp_path, 3, rounds=1, min_sites=1) as bench:
        sites = {name: bench.site(name) for name in bench.names}
        for site in sites.values():
            site.join()
        bench.run(lambda name: sites[name].register(V, rules=keeping("initial") if name != "site-2" else None))
        assert sites["site-2"].client.next_task().kind == "initial"
        sites["site-2"].client.leave("it is ill", early=True)
        errors = errors_together(sites["site-1"].client.next_task, sites["site-3"].client.next_task)
        assert all("no site may give the initial model" in str(error) for error in errors)


# -- results of earlier jobs ---------------------------------------------------------------------------------------


def trained_alone(study: Study) -> None:
    """A job of north alone, whose policy allows that."""
    (readdressed(study, "north") / "policy.yml").write_text("")
    study.job("alone", sites=["north"], rounds=1)
    train(readdressed(study, "north"))
    assert study.server.wait_for_job("alone", 30)


def test_a_model_of_one_site_is_no_beginning_for_others_without_that_site(study: Study) -> None:
    trained_alone(study)
    with pytest.raises(ConfigError, match="made of the updates of north alone, which is no site of this job") as error:
        study.job("next", sites=["south", "west"], initial={"job": "alone"})
    assert "let north take part, so that its policy decides" in error.value.fix


@pytest.mark.parametrize(
    ("policy", "rule"),
    [("min_cohort: 2", "min_cohort: 2"), ("initial: false", "initial: false"), ("min_cohort: 2\ninitial: true", "")],
)
def test_the_site_whose_model_it_is_decides_by_its_policy_of_today(study: Study, policy: str, rule: str) -> None:
    trained_alone(study)
    study.job("next", initial={"job": "alone"}, rounds=1)
    north = readdressed(study, "north")
    (north / "policy.yml").write_text(policy)
    if rule:
        with pytest.raises(PermissionDeniedError, match="made of the updates of this site alone") as refusal:
            train(north)
        assert f"rule {rule} (the site's policy.yml)" in refusal.value.where
    else:
        assert errors_at_once([readdressed(study, name) for name in study.sites], train) == [None] * 3


# -- by itself -----------------------------------------------------------------------------------------------------


def test_what_a_policy_keeps_by_default() -> None:
    assert Policy().rules == CohortRules()
    template = Policy(min_cohort=2, site_weights=10).rules
    assert template == CohortRules(2, None, own_model_stays=True, stays=("trees", "updates"))
    allowing = Policy(min_cohort=2, cross_site=True, swarm=True, trees=True, initial=False)
    assert allowing.rules == CohortRules(2, None, own_model_stays=False, stays=("initial",))


def test_a_mean_of_which_one_site_has_all_the_weight_is_of_one_site(study: Study) -> None:
    """In a swarm the server names the weights. One of zero would make the mean a single site's update."""
    from fl_runtime.types import Task

    gate = KitPolicyGate(readdressed(study, "north"))
    for sites, fits in (
        ([["north", 5, 1.0], ["south", 3, 1.0]], True),
        ([["north", 5, 1.0], ["south", 3, 0.0]], False),
        ([["north", 5, 1.0], ["south", 0, 1.0]], False),
        ([["north", 5, 1.0], ["south"]], False),
        ([["north", 5, 1.0], "south"], False),
    ):
        task = Task("job", 1, "s", "aggregate", 0, {}, config={"sites": sites, "participants": 2})
        if fits:
            gate.cohort.check(task)
        else:
            with pytest.raises(FederationError, match="the updates of 1 site"):
                gate.cohort.check(task)

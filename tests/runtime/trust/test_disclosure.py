"""What a policy keeps from other sites: its site's own weights, updates and trees, and its metrics."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once, errors_at_once, errors_together, serving
from hostile_server import Hostile, train
from server_process import server_process
from study import Study, readdressed

from fl_adapters import ConfigError, FederationError, PermissionDeniedError, connect
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_adapters.participant.registry import close_sessions
from fl_runtime.capabilities import CROSS_EVALUATION
from fl_runtime.client.control import ControlClient
from fl_runtime.server.records.site_metrics import ShownMetrics
from fl_runtime.trust.policy import Policy
from fl_runtime.types import CohortRules, OwnPart, Report, Terms
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

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


# -- metrics -------------------------------------------------------------------------------------------------------

LOSSES, EXAMPLES = (
    {"north": 0.13579, "south": 0.57913, "west": 0.79135},
    {"north": 20031709, "south": 30017093, "west": 50091713},
)


def take_part(kit: Path, name: str) -> None:
    """Train two rounds. North alone reports `f1`, and everybody `loss`."""
    try:
        with connect(kit=str(kit)) as site:
            for task in site.tasks(initial=V):
                metrics = {"loss": LOSSES[name]} | ({"f1": 0.62519} if name == "north" else {})
                task.submit({n: a + 1 for n, a in task.arrays.items()}, num_examples=EXAMPLES[name], metrics=metrics)
    finally:
        close_sessions("its script ended before the last round", read_kit(kit))


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff:k=3"])
def test_nothing_that_others_can_fetch_or_follow_tells_the_metrics_of_one_site(study: Study, strategy: str) -> None:
    kits = {name: readdressed(study, name) for name in study.sites}
    (kits["north"] / "policy.yml").write_text("min_cohort: 2\nsite_metrics: false\n")
    study.job(strategy=strategy, best_metric="loss")
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(lambda: list(study.admin("mina").answers("Watch", job="job")))
        assert errors_at_once(kits, lambda name: take_part(kits[name], name)) == [None] * 3
        assert study.server.wait_for_job("job", 30)
        shown = [json.dumps(watched.result(30))]
    assert '"round_finished"' in shown[0]
    south = ControlClient(study.transport("south"))
    shown += [json.dumps(south.ask("ShowJob", job="job")), json.dumps(south.ask("Status"))]
    folder = study.runs / "job"
    files = [path for path in folder.rglob("*") if path.is_file() and "server" not in path.relative_to(folder).parts]
    shown += [path.read_text(errors="replace") for path in files if path.suffix in (".csv", ".jsonl", ".json")]
    assert {"history.csv", "events.jsonl", "outcome.json"} <= {path.name for path in files}
    secret = [str(number) for number in (*LOSSES.values(), *EXAMPLES.values(), 0.62519, sum(EXAMPLES.values()))]
    assert [n for n in secret if any(re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", text) for text in shown)] == []
    rows = list(csv.DictReader((folder / "history.csv").open()))
    mean = np.average(list(LOSSES.values()), weights=list(EXAMPLES.values()))
    told = [float(row["loss"]) for row in rows if row["site"] == "global" and row["loss"]]
    if strategy == "fedavg":
        assert told == pytest.approx([mean] * 2)
    else:  # a quick site may be in a buffer twice, so the mean is of two sites or of three
        assert len(told) == 2 and all(min(LOSSES.values()) < loss < max(LOSSES.values()) for loss in told)
    assert {row["num_examples"] for row in rows} == {""}
    events = (folder / "events.jsonl").read_text()
    assert "f1 came from too few sites and is in no result" in events


def test_scores_of_one_site_go_to_no_other_also_after_a_kill_of_the_server(tmp_path: Path) -> None:
    """Site-1 alone scores `auc`. Neither the answers to scores, nor events, nor the result have it."""
    with server_process(tmp_path, 2, rounds=2) as server:
        sites = [server.site(name) for name in ("site-1", "site-2")]
        for site in sites:
            site.join()
        rules = {"site-1": keeping("metrics")}
        at_once(sites, lambda site: site.register(V, evaluates=True, rules=rules.get(site.name)))
        tasks = {site.name: site.start(V) for site in sites}

        def scored(site: Site) -> Any:
            metrics = {"loss": 0.25 if site.name == "site-1" else 0.75} | ({"auc": 0.625} if site is sites[0] else {})
            return site.client.report(Report("test", 1, site.name, metrics, 10), wait=True)[0]

        for site in sites:
            site.submit(tasks[site.name], {"w": V["w"] + 1})
        at_once(sites, lambda site: site.client.next_task())
        server.kill()
        server.start()
        assert at_once(sites, scored) == [{"loss": 0.5}] * 2
        for site in sites:
            site.vanish()


def test_a_server_that_would_show_metrics_is_refused(study: Study) -> None:
    study.job()
    north = readdressed(study, "north")
    (north / "policy.yml").write_text("site_metrics: false\n")

    def older(method: str, message: bytes) -> bytes:
        if method != "Join":
            return message
        reply = pb.JoinReply.FromString(message)
        reply.features.remove("stays")
        return reply.SerializeToString()

    hostile = Hostile(study, older)
    with pytest.raises(PermissionDeniedError, match="does not keep to what this site's policy asks") as refusal:
        train(north)
    assert "rule site_metrics: false" in refusal.value.where
    assert not hostile.received


def test_a_site_that_keeps_its_metrics_takes_no_part_in_a_matrix_of_them(study: Study, tmp_path: Path) -> None:
    job = {"name": "job", "sites": list(study.sites), "min_sites": 3, "cross_site": True}
    kit = readdressed(study, "north")
    (kit / "policy.yml").write_text("site_metrics: false\n")
    with pytest.raises(PermissionDeniedError, match="whose cross_site records the metrics of every site"):
        KitPolicyGate(kit).check_job(job)
    with serving(tmp_path, 3, rounds=1, min_sites=2, cross_site=True) as bench:
        sites = [bench.site(name) for name in bench.names]
        fields = {"capabilities": frozenset({CROSS_EVALUATION})}
        for site in sites:
            site.join()
        rules = {"site-1": keeping("metrics")}
        errors = errors_at_once(sites, lambda site: site.register(V, rules=rules.get(site.name), **fields))
        assert isinstance(errors[0], PermissionDeniedError) and "site_metrics: false" in errors[0].where
        assert errors[1:] == [None, None]


def test_a_pooled_metric_is_shown_if_as_many_sites_report_it_as_a_policy_asks_for() -> None:
    rules = {"a": CohortRules(3, stays=("metrics",)), "b": CohortRules(), "c": CohortRules()}
    shown = ShownMetrics(rules)
    assert shown.too_few({"x": {"a", "b", "c"}, "y": {"a", "b"}, "z": {"b", "c"}, "u": {"b"}}) == {"y", "u"}
    assert (shown.newly_hidden(), shown.newly_hidden()) == (["u", "y"], [])
    assert ShownMetrics({"a": CohortRules(3)}).too_few({"y": {"a"}}) == set()


# -- by itself -----------------------------------------------------------------------------------------------------


def test_what_a_policy_keeps_by_default() -> None:
    assert Policy().rules == CohortRules()
    template = Policy(min_cohort=2, site_weights=10).rules
    assert template == CohortRules(2, None, own_model_stays=True, stays=("trees", "updates"))
    allowing = Policy(min_cohort=2, cross_site=True, swarm=True, trees=True, initial=False, site_metrics=False)
    assert allowing.rules == CohortRules(2, None, own_model_stays=False, stays=("initial", "metrics"))


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

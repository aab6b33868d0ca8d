"""What a policy asks of every model that its site's update is in: the site checks it, and the server keeps to it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, Site, at_once, errors_at_once, errors_together, serving
from hostile_server import Hostile, changed_task, train
from server_process import server_process
from study import Study, readdressed

from fl_adapters import PermissionDeniedError
from fl_runtime.capabilities import CROSS_EVALUATION
from fl_runtime.errors import ConfigError, FederationError, ProtocolError, QuorumError
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.types import Arrays, CohortRules, Task
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

W = {"body": np.zeros((4, 3), np.float32), "head": np.ones(3, np.float32)}
V = {"w": np.zeros(2)}
TWO, THREE = CohortRules(min_cohort=2), CohortRules(min_cohort=3)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north", "south", "west")) as study:
        yield study


# -- the site refuses ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a job of one site": ("", {"sites": ["north"]}, "min_cohort: 2"),
    "a factor that drowns the others": ("", {"site_weights": {"south": 1e12}}, "site_weights: 10"),
    "a factor that drowns this one": ("", {"site_weights": {"north": 1e-12}}, "site_weights: 10"),
    "a draw of one site": ("", {"fraction": 0.3}, "min_cohort: 2"),
    "a smaller draw than the policy's": ("fraction: 0.9", {"fraction": 0.6}, "fraction: 0.9"),
    "one site after the other": ("", {"strategy": "cyclic"}, "min_cohort: 2"),
    "a buffer of one update": ("", {"strategy": "fedbuff:k=1"}, "min_cohort: 2"),
    "the models of single sites": ("", {"cross_site": True}, "min_cohort: 2"),
    "a larger cohort": ("min_cohort: 4", {}, "min_cohort: 4"),
    "a cap for more sites": ("max_share: 0.3", {}, "max_share: 0.3"),
    "a cap that no one can keep": ("max_share: 0.5", {"strategy": "tree-histogram"}, "max_share: 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_site_refuses_a_job_whose_settings_show_what_its_policy_forbids(study: Study, case: str) -> None:
    policy, fields, rule = REFUSED[case]
    kit = readdressed(study, "north")  # with the policy that provisioning writes
    if policy:
        (kit / "policy.yml").write_text(policy)
    study.job(**fields)
    hostile = Hostile(study, lambda method, message: message)
    with pytest.raises(PermissionDeniedError, match="may not take part in job") as refusal:
        train(kit)
    assert f"rule {rule} (the site's policy.yml)" in refusal.value.where
    assert not hostile.received


def test_a_krum_of_one_update_is_one_sites_model(tmp_path: Path) -> None:
    with Study(tmp_path, ("north", "south", "west", "east", "middle")) as study:
        study.job(strategy="krum:f=1,m=1")
        with pytest.raises(PermissionDeniedError, match="the updates of 1 site"):
            train(readdressed(study, "north"))


def test_a_silent_policy_asks_for_nothing_and_an_explicit_line_allows(study: Study) -> None:
    kit = readdressed(study, "north")
    for policy, fields in (("", {"cross_site": True}), ("min_cohort: 2\ncross_site: true", {"cross_site": True})):
        (kit / "policy.yml").write_text(policy)
        from fl_adapters.participant.policy_gate import KitPolicyGate

        sites = list(study.sites)
        KitPolicyGate(kit).check_job({"name": "job", "sites": sites, "min_sites": 1, **fields})
    (kit / "policy.yml").write_text("")
    KitPolicyGate(kit).check_job({"name": "job", "sites": ["north"], "min_sites": 1, "strategy": "cyclic"})


def test_in_a_proof_of_concept_any_job_may_be_tried(tmp_path: Path) -> None:
    from fl_adapters.environments.proof_of_concept import _provision
    from fl_adapters.participant.policy_gate import KitPolicyGate

    _provision(tmp_path, ["north"], "127.0.0.1:1", {})
    job = {"name": "job", "sites": ["north"], "min_sites": 1, "strategy": "cyclic", "cross_site": True}
    KitPolicyGate(tmp_path / "north").check_job(job)


@pytest.mark.parametrize(
    "fields",
    [{"sites": None}, {"sites": []}, {"fraction": "a"}, {"site_weights": 7}, {"site_weights": {"north": "inf"}}],
    ids=str,
)
def test_settings_that_cannot_be_read_are_an_error_of_ours(study: Study, fields: dict[str, Any]) -> None:
    from fl_adapters.participant.policy_gate import KitPolicyGate

    job = {"name": "job", "sites": ["north"], "min_sites": 1, **fields}
    with pytest.raises(ProtocolError, match="settings cannot be read"):
        KitPolicyGate(readdressed(study, "north")).check_job(job)


# -- what a hostile server says ------------------------------------------------------------------------------------


def saying(**config: int) -> Callable[[pb.TaskHeader], None]:
    def change(task: pb.TaskHeader) -> None:
        task.config_json = json.dumps({**json.loads(task.config_json), **config})

    return change


def others(study: Study) -> None:
    for name in study.sites[1:]:
        (readdressed(study, name) / "policy.yml").write_text("")


@pytest.mark.parametrize("said", [{"participants": 1}, {"updates": 1}], ids=str)
def test_a_round_of_too_few_sites_gets_no_update(study: Study, said: dict[str, int]) -> None:
    study.job(min_sites=1)
    others(study)
    hostile = Hostile(study, changed_task(saying(**said)))
    errors = errors_together(
        lambda: train(readdressed(study, "north")), *(lambda n=n: train(readdressed(study, n)) for n in study.sites[1:])
    )
    assert isinstance(errors[0], PermissionDeniedError) and "rule min_cohort: 2" in errors[0].where
    assert errors[1] is None and errors[2] is None
    trained = [header for header in hostile.received if header.round > 0]
    assert len(trained) == 4  # two rounds of the other two


@pytest.mark.parametrize(("min_sites", "policy", "fits"), [(1, "", False), (2, "", True), (2, "max_share: 0.9", False)])
def test_a_server_that_knows_no_such_rules_is_refused_unless_its_quorum_is_enough(
    study: Study, min_sites: int, policy: str, fits: bool
) -> None:
    study.job(min_sites=min_sites, rounds=1)
    others(study)
    north = readdressed(study, "north")
    if policy:
        (north / "policy.yml").write_text(policy)

    def older(method: str, message: bytes) -> bytes:
        if method != "Join":
            return message
        reply = pb.JoinReply.FromString(message)
        reply.features.remove("cohort")
        return reply.SerializeToString()

    Hostile(study, older)
    kits = [readdressed(study, name) for name in study.sites]
    errors = errors_at_once(kits, train)
    if fits:
        assert errors == [None] * 3
    else:
        assert isinstance(errors[0], PermissionDeniedError)
        assert "the server's version of fl-adapters does not keep to" in str(errors[0])


# -- the server keeps to it ----------------------------------------------------------------------------------------


def joined(bench: Bench, rules: dict[str, CohortRules], **fields: Any) -> tuple[dict[str, Site], dict[str, Task]]:
    """Register all sites with their rules, and give the initial model; return sites and their first tasks."""
    sites = {name: bench.site(name) for name in bench.names}
    for site in sites.values():
        site.join()
    bench.run(lambda name: sites[name].register(V, rules=rules.get(name), **fields))
    return sites, {name: site.start(V) for name, site in sites.items()}


def plus(task: Task, value: float) -> Arrays:
    return {"w": task.arrays["w"] + value}


def test_a_site_leaves_whose_policy_can_no_longer_be_kept_and_the_others_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, 4, rounds=1, min_sites=2) as bench:
        sites, tasks = joined(bench, {"site-1": CohortRules(min_cohort=4)})
        assert sites["site-1"].submit(tasks["site-1"], plus(tasks["site-1"], 1000.0)) == "used"
        sites["site-4"].client.leave("it is ill", early=True)
        error = errors_together(sites["site-1"].client.next_task)[0]
        assert isinstance(error, PermissionDeniedError)
        assert "rule min_cohort: 4 (policy.yml of site-1)" in error.where
        for name in ("site-2", "site-3"):
            task = sites[name].client.next_task()
            assert (task.kind, task.round, task.config["participants"]) == ("train", 1, 2)
            sites[name].submit(task, plus(task, 1.0))
        final = sites["site-2"].client.next_task()
        assert final.arrays["w"].tolist() == [1.0, 1.0]  # nothing of site-1
        assert final.config["updates"] == 2


def test_a_model_is_never_made_of_fewer_updates_at_the_deadline(tmp_path: Path) -> None:
    with serving(tmp_path, 3, rounds=1, min_sites=1, deadline_s=1.0) as bench:
        sites, tasks = joined(bench, {"site-1": TWO})
        sites["site-1"].submit(tasks["site-1"], plus(tasks["site-1"], 1.0))
        error = errors_together(sites["site-1"].client.next_task)[0]
        assert isinstance(error, QuorumError) and "has 1 of 2 updates" in str(error)


def test_at_the_handshake_a_site_that_asks_for_too_much_leaves_alone(tmp_path: Path) -> None:
    rules = {"site-1": CohortRules(min_cohort=9), "site-2": CohortRules(max_share=1e-300), "site-3": THREE}
    with serving(tmp_path, 5, rounds=1, min_sites=2) as bench:
        sites = {name: bench.site(name) for name in bench.names}
        for site in sites.values():
            site.join()
        errors = dict(
            zip(
                sites,
                errors_at_once(sites, lambda name: sites[name].register(V, rules=rules.get(name))),
                strict=True,
            )
        )
        assert [name for name, error in errors.items() if error] == ["site-1", "site-2"]
        assert all(isinstance(errors[name], PermissionDeniedError) for name in ("site-1", "site-2"))
        again = bench.site("site-1")  # and so does one that comes back later
        again.join()
        with pytest.raises(PermissionDeniedError, match="this run"):
            again.register(V, rules=rules["site-1"])


@pytest.mark.parametrize("killed", ["before it leaves", "after it has left"])
def test_a_server_that_was_killed_keeps_to_it_too(tmp_path: Path, killed: str) -> None:
    """The update of site-1 is in the journal; its policy asks for four, and site-4 goes."""
    with server_process(tmp_path, 4, rounds=1, min_sites=2) as server:
        sites = [server.site(f"site-{i}") for i in (1, 2, 3, 4)]
        for site in sites:
            site.join()
        rules = {"site-1": CohortRules(min_cohort=4)}
        at_once(sites, lambda site: site.register(V, rules=rules.get(site.name)))
        tasks = [site.start(V) for site in sites]
        assert sites[0].submit(tasks[0], plus(tasks[0], 1000.0)) == "used"
        if killed == "after it has left":
            sites[3].client.leave("it is ill", early=True)
        server.kill()
        server.start()
        if killed == "before it leaves":
            sites[3].client.leave("it is ill", early=True)
        error = errors_together(sites[0].client.next_task)[0]
        assert isinstance(error, PermissionDeniedError)
        for site in sites[1:3]:
            task = site.client.next_task()
            site.submit(task, plus(task, 1.0))
        for site in sites[1:3]:
            assert site.client.next_task().kind == "final"
            site.client.leave("done", early=False)
        for site in sites:
            site.vanish()
        np.testing.assert_array_equal(server.finished()["w"], [1.0, 1.0])


def test_a_buffer_waits_for_the_update_of_another_site(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=3, min_sites=1, strategy="fedbuff:k=2,staleness=0") as bench:
        sites, tasks = joined(bench, {"site-1": TWO})
        one, two = sites.values()
        one.submit(tasks["site-1"], plus(tasks["site-1"], 3.0))
        task = one.client.next_task()
        one.submit(task, plus(task, 6.0))  # the buffer is full, with the updates of one site
        two.submit(tasks["site-2"], plus(tasks["site-2"], 9.0))
        bench.watch.wait("round_finished")
        assert bench.server.result().rounds[0].sites == ("site-1", "site-2")
        task = one.client.next_task()
        assert (task.version, task.arrays["w"].tolist(), task.config["updates"]) == (1, [6.0, 6.0], 2)
        two.client.leave("it is ill", early=True)
        error = errors_together(lambda: one.submit(task, plus(task, 1.0)), one.client.next_task)[1]
        assert isinstance(error, FederationError) and "the updates of 1 site" in str(error)
    assert len(bench.watch.all("round_finished")) == 1


def test_the_strictest_cap_of_the_sites_in_a_model_holds(tmp_path: Path) -> None:
    with serving(tmp_path, 3, rounds=1, max_share=0.6) as bench:
        sites, tasks = joined(bench, {"site-1": CohortRules(max_share=0.4), "site-2": CohortRules(max_share=0.5)})
        for (name, site), examples, value in zip(sites.items(), (1, 1, 10**12), (1.0, 10.0, 100.0), strict=True):
            site.submit(tasks[name], plus(tasks[name], value), examples)
        final = sites["site-1"].client.next_task().arrays["w"]
        np.testing.assert_allclose(final, 0.3 * 1 + 0.3 * 10 + 0.4 * 100, rtol=1e-12)
        assert "max_share=0.4" in bench.watch.wait("warning", "site-3").data["text"]


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff:k=2"])
def test_a_tensor_of_one_site_alone_is_not_handed_to_the_others(tmp_path: Path, strategy: str) -> None:
    model = {"w": np.zeros(2), "head": np.zeros(2)}
    with serving(tmp_path, 2, rounds=1, strategy=strategy) as bench:
        sites = {name: bench.site(name) for name in bench.names}
        for site in sites.values():
            site.join()
        bench.run(lambda name: sites[name].register(model, rules=TWO))
        tasks = {name: site.start(model) for name, site in sites.items()}
        sites["site-1"].submit(tasks["site-1"], {"w": np.full(2, 2.0), "head": np.full(2, 7.0)})
        held_back = json.dumps([ExcludeVars(("head",)).settings()])
        sites["site-2"].submit(tasks["site-2"], {"w": np.full(2, 4.0)}, encoding=held_back)
        final = sites["site-2"].client.next_task()
        assert {name: array.tolist() for name, array in final.arrays.items()} == {"w": [3, 3], "head": [0, 0]}
        assert "head came from site-1 alone and keeps its global value" in bench.watch.wait("warning").data["text"]


def test_the_own_model_of_a_site_goes_to_no_other_if_its_policy_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1, cross_site=True) as bench:
        sites, tasks = joined(
            bench, {"site-1": CohortRules(own_model_stays=True)}, capabilities=frozenset({CROSS_EVALUATION})
        )
        for name, site in sites.items():
            site.submit(tasks[name], plus(tasks[name], 1.0))
        bench.run(lambda name: sites[name].client.next_task())
        models = []
        while (task := sites["site-2"].client.next_task(evaluate=True)).kind == "evaluate":
            models.append(task.config["model"])
            from fl_runtime.types import Report

            sites["site-2"].client.report(Report("test", task.version, "site-2", {"loss": 1.0}, 1))
        assert models == ["global", "site-2"]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float) -> None:
    with serving(tmp_path, 1, min_sites=1) as bench:
        site = bench.site("site-1")
        site.join()
        with pytest.raises((ProtocolError, ConfigError), match="share"):
            site.register(V, rules=CohortRules(max_share=share))


def test_a_policy_that_becomes_stricter_holds_from_the_next_round(study: Study) -> None:
    study.job(rounds=3, min_sites=2)
    others(study)
    north = readdressed(study, "north")

    def change(task: pb.TaskHeader) -> None:
        if task.round == 2:
            stricter = north / f"policy-{threading.get_ident()}.yml"
            stricter.write_text("min_cohort: 4\n")
            os.replace(stricter, north / "policy.yml")  # never read half written: an empty file limits nothing

    hostile = Hostile(study, changed_task(change))
    errors = errors_at_once([readdressed(study, name) for name in study.sites], train)
    assert isinstance(errors[0], PermissionDeniedError) and "rule min_cohort: 4" in errors[0].where
    assert errors[1] is None and errors[2] is None
    rounds = [header.round for header in hostile.received]
    assert [rounds.count(number) for number in (1, 2, 3)] == [3, 2, 2]

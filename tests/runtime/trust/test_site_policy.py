"""A site's policy over a real federation: each rule at the site, at the server, and in the audit log."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, readdressed, until

from fl_adapters.cli.site.command import command_for, gpu_environment
from fl_adapters.loop import connect
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.policy_gate import KitPolicyGate, LeaveReason, PolicyGate
from fl_adapters.participant.registry import _transport
from fl_adapters.participant.session import Session
from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError, PrivacyBudgetError
from fl_runtime.filters.ledger import Ledger
from fl_runtime.trust.audit import entries
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.policy import Policy, PolicyFile, read_policy
from fl_runtime.types import Arrays

W: Arrays = {"lora_A": np.zeros((4, 2), np.float32), "head.weight": np.zeros(8, np.float32)}
SITE = Identity("study", "site", "north", "north-hospital")
LENA = Identity("study", "admin", "lena", "north-hospital", "lead")
LARS = Identity("study", "admin", "lars", "south-hospital", "lead")


def take_part(
    kit: Path,
    arrays: Arrays = W,
    *,
    framework: str = "keras",
    num_examples: int = 37,
    step: float = 1.0,
    each_round: Callable[[int], None] = lambda number: None,
) -> Arrays:
    """Take part with a kit as an adapter would; return the final weights."""
    site_kit = read_kit(kit)
    session = Session(site_kit, Options(), framework, _transport(site_kit))
    try:
        session.register(arrays, agreement={}, rounds=None, evaluates=True)
        task = session.start(lambda: arrays)
        while task.kind == "train":
            each_round(task.round)
            session.report({"loss": 0.123456, "patients": 12.0}, 11)
            task = session.exchange(
                {n: a + np.float32(step) for n, a in task.arrays.items()},
                LocalResult(num_examples, 1, {"train_loss": 0.98765, "patients": 12.0}),
            )
        session.report({"loss": 0.123456, "patients": 12.0}, 11)
        final = {n: a.copy() for n, a in task.arrays.items()}
        session.finish()
        return final
    except FederationError as error:
        session.leave(error.what)  # as the end of the script would
        raise


def federated(
    study: Study, policy: str, finals: dict[str, Arrays] | None = None, **north: Any
) -> dict[str, BaseException | None]:
    """Run a job at both sites, north under this policy, and return how each ended; `finals` gets the final weights."""
    kits = {name: readdressed(study, name) for name in study.sites}
    for name, kit in kits.items():
        (kit / "policy.yml").write_text(policy if name == "north" else "")
    ended: dict[str, BaseException | None] = {}

    def work(name: str) -> None:
        try:
            final = take_part(kits[name], **(north if name == "north" else {}))
            if finals is not None:
                finals[name] = final
            ended[name] = None
        except FederationError as error:
            ended[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in study.sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(ended) == set(study.sites)
    return ended


def of_north(study: Study, action: str) -> list[dict[str, Any]]:
    """Return the entries of the server's audit log about this action of north's."""
    return [entry for entry in study.log() if entry["action"] == action and entry.get("site") == "north"]


def test_an_empty_policy_limits_nothing(study: Study) -> None:
    study.job()
    assert federated(study, "") == {"north": None, "south": None}
    update = of_north(study, "update")[0]["facts"]
    assert update["num_examples"] == 37
    assert update["metrics"] == {"train_loss": 0.98765, "patients": 12.0}
    actions = [entry["action"] for entry in entries(readdressed(study, "north"))]
    assert actions[0] == "joined"
    assert actions[-1] == "left"
    assert [actions.count(action) for action in ("update", "report", "task: train", "task: final")] == [3, 3, 2, 1]


REFUSED = [
    ("submitters: {organisations: [south-hospital]}", {}, "submitters: organisation north-hospital is not one of"),
    ("submitters: {roles: [project-admin]}", {}, "submitters: role lead is not one of project-admin"),
    ("submitters: {names: [ada]}", {}, "submitters: name lena is not one of ada"),
    ("strategies: [krum]", {}, "strategies: fedavg is not one of krum"),
    ("adapters: [hf]", {}, "adapters: keras is not one of hf"),
    ("exchange: adapters", {}, "exchange: *lora_*"),
    ("exchange: ['head.*']", {}, "exchange: head.*"),
    ("max_round_bytes: 63", {}, "max_round_bytes: 63"),
]


@pytest.mark.parametrize(("policy", "north", "rule"), REFUSED, ids=[rule for _, _, rule in REFUSED])
def test_what_the_policy_does_not_allow_is_refused_with_its_rule_on_both_sides(
    study: Study, policy: str, north: dict[str, Any], rule: str
) -> None:
    study.job()
    ended = federated(study, policy, **north)
    error = ended["north"]
    assert isinstance(error, PermissionDeniedError)
    assert "site north of north-hospital may not" in error.what
    assert f"rule {rule}" in error.where
    assert "policy" in error.fix

    (refusal,) = [e for e in entries(readdressed(study, "north")) if e["outcome"] == "refused"]
    assert refusal["rule"].startswith(rule)
    assert refusal["who"] == SITE.uri
    assert refusal["error"] == error.what
    (left,) = until(lambda: of_north(study, "left"), "the server to know that north has left")
    assert (left["facts"]["reason"], left["facts"]["early"]) == (error.what, True)
    assert ended["south"] is not None
    assert error.what in str(ended["south"]), "the others hear why"


def test_a_policy_keeps_the_sites_model_from_the_others(study: Study) -> None:
    study.job(cross_site=True)
    error = federated(study, "cross_site: false")["north"]
    assert isinstance(error, PermissionDeniedError)
    assert "sends every site's model to the others" in error.what
    assert "rule cross_site: false" in error.where


def test_own_organisation_means_the_sites_own(study: Study) -> None:
    study.job(by="lena")
    assert federated(study, "submitters: {organisations: own, roles: [lead]}\nexchange: ['*']")["north"] is None


def test_metrics_counts_versions_and_reasons_leave_as_the_policy_says(study: Study) -> None:
    study.job()
    policy = """
        filters:
        - {name: AllowMetrics, names: [loss, train_loss]}
        - {name: RoundMetrics, decimals: 2}
        - {name: Examples, multiple: 25}
        info: false
        reasons: false
    """

    def fail(number: int) -> None:
        if number == 2:
            raise ConfigError("patient Jane Doe was not found")

    ended = federated(study, policy, each_round=fail)
    assert "Jane" in str(ended["north"])
    (update,) = [item["facts"] for item in of_north(study, "update")]
    assert update["num_examples"] == 50
    assert update["metrics"] == {"train_loss": 0.99}
    assert "Jane" in (readdressed(study, "north") / "audit.jsonl").read_text(), "at the site it is on record"
    text = (study.kits / "server/audit.jsonl").read_text() + (study.runs / "job/events.jsonl").read_text()
    assert "Jane" not in text
    assert '"info": {}' in text
    assert "patients" not in [name for e in of_north(study, "update") for name in e["facts"]["metrics"]]


@pytest.mark.parametrize(("rule", "told"), [("", True), ("progress: false", False)])
def test_how_long_a_site_trains_leaves_as_the_policy_says(study: Study, rule: str, told: bool) -> None:
    study.job()
    assert federated(study, f"info: true\n{rule}") == dict.fromkeys(study.sites)
    events = map(json.loads, (study.runs / "job/events.jsonl").read_text().splitlines())
    north = [event["data"] for event in events if event["kind"] == "update" and event["site"] == "north"]
    assert ["train_s" in data for data in north if data["status"] == "used"] == [told] * 2


@pytest.mark.parametrize("shown", [True, False])
def test_labels_in_which_sites_differ_are_shown_as_the_policy_says(study: Study, shown: bool) -> None:
    study.job()
    kits = {name: readdressed(study, name) for name in study.sites}
    (kits["north"] / "policy.yml").write_text(f"names: {str(shown).lower()}")
    labels = {"north": ["Jane Doe", "Jane Roe"], "south": ["a", "b"]}
    ended: dict[str, BaseException] = {}

    def train(name: str) -> None:
        try:
            with connect(kit=kits[name]) as site:
                next(iter(site.tasks(initial=W, agreement={"labels": labels[name]})))
        except FederationError as error:
            ended[name] = error

    threads = [threading.Thread(target=train, args=(name,)) for name in study.sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all("do not agree" in str(ended[name]) and "labels" in str(ended[name]) for name in study.sites)
    assert ("Jane" in str(ended["south"])) == shown
    assert shown or "their text stays at the sites" in str(ended["south"])
    (handshake,) = [entry for entry in entries(kits["north"]) if entry["action"] == "handshake"]
    assert handshake["lists"] == ["labels"]


class UnluckyError(ConfigError):
    """An error of fl-adapters' own kind, raised by a user's code with a name in it."""


@pytest.mark.parametrize("error", [ValueError, PermissionDeniedError, UnluckyError])
@pytest.mark.parametrize("policy", ["", "reasons: false", "reasons: true"])
def test_the_text_of_an_error_stays_at_the_site_unless_its_policy_sends_it(
    study: Study, policy: str, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    study.job()
    kits = {name: readdressed(study, name) for name in study.sites}
    (kits["north"] / "policy.yml").write_text(policy)
    ended: dict[str, BaseException] = {}

    def train(name: str) -> None:
        try:
            with connect(kit=kits[name]) as site:
                for task in site.tasks(initial=W):
                    if name == "north" and task.round == 2:
                        raise error("patient Jane Roe")
                    task.submit(task.arrays, num_examples=1)
        except Exception as caught:
            ended[name] = caught

    with caplog.at_level(logging.DEBUG):
        threads = [threading.Thread(target=train, args=(name,)) for name in study.sites]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    (left,) = until(lambda: of_north(study, "left"), "the server to know that north has left")
    assert "Jane Roe" in str(ended["north"])
    assert [e["reason"] for e in entries(kits["north"]) if e["action"] == "left"] == [
        f"{error.__name__}: {ended['north']}"
    ]
    assert study.server.wait_for_job("job", 60), "all files are written"
    elsewhere = [
        path for place in (study.runs, study.kits, kits["south"]) for path in place.rglob("*") if path.is_file()
    ]
    texts = {path.name: path.read_bytes().decode(errors="replace") for path in elsewhere}
    assert {"events.jsonl", "audit.jsonl", "history.csv"} <= set(texts)
    told = [name for name, text in texts.items() if "Jane" in text]
    assert error.__name__ in left["facts"]["reason"]
    assert error.__name__ in str(ended["south"]), "the others learn what kind of error it was"
    if policy == "reasons: true":
        assert "events.jsonl" in told
        assert "Jane Roe" in str(ended["south"])
    else:
        assert told == []
        assert "Jane" not in str(ended["south"]) + caplog.text


def test_a_plain_text_of_an_adapter_stays_at_the_site_and_its_own_sentence_leaves() -> None:
    assert LeaveReason.of("patient Jane Roe").public == "it left; the reason stays in this site's own log"
    assert LeaveReason.of(LeaveReason.own("step 6 of 12")).public == "step 6 of 12"
    assert PolicyGate().visible_reason(LeaveReason.of(ValueError("Jane"))) == "ValueError: Jane", "in a simulation"


def test_the_sites_own_filters_run_last_whatever_the_job_says_and_only_there(study: Study) -> None:
    job = [{"name": "Examples", "equal": True}, {"name": "Quantize", "to": "fp16"}]
    study.job(filters=job)
    rules = "filters:\n- {name: ExcludeVars, names: ['head.*']}\n- {name: AllowMetrics}\nexchange: ['lora_A', 'head.*']"
    finals: dict[str, Arrays] = {}
    assert federated(study, rules, finals, step=10.0) == {"north": None, "south": None}
    events = [json.loads(line) for line in (study.runs / "job/events.jsonl").read_text().splitlines()]
    updates = {e["site"]: e["data"] for e in events if e["kind"] == "update" and e["round"] == 1}
    ran = {site: [item["name"] for item in data["filters"]] for site, data in updates.items()}
    assert ran == {"north": ["Examples", "ExcludeVars", "AllowMetrics", "Quantize"], "south": ["Examples", "Quantize"]}
    assert (updates["north"]["metrics"], updates["north"]["num_examples"]) == ({}, 1)
    kept = [e["filters"] for e in entries(readdressed(study, "north")) if e["action"] == "update" and e["round"]]
    assert kept == [updates["north"]["filters"]] * 2
    for final in finals.values():  # two rounds; north adds 10, south adds 1
        np.testing.assert_allclose(final["head.weight"], 2 * 1.0, rtol=1e-3)
        np.testing.assert_allclose(final["lora_A"], 2 * 5.5, rtol=1e-3)


@pytest.mark.parametrize("rounds", [2, 5])
def test_the_budget_of_a_policy_that_cannot_hold_ends_the_sites_part_before_round_1(study: Study, rounds: int) -> None:
    pytest.importorskip("dp_accounting")
    study.job(rounds=rounds, min_sites=1, by="ada")
    rules = """
        filters: [{name: GaussianDP, clip: 1.0, noise_multiplier: 4.0}]
        privacy: {epsilon: 3.0, delta: 1.0e-5}
    """
    ended = federated(study, rules)
    assert ended["south"] is None, "the others go on"
    sent = [e for e in of_north(study, "update") if e["round"]]
    if rounds == 2:
        assert ended["north"] is None and len(sent) == 2
    else:
        assert isinstance(ended["north"], PrivacyBudgetError) and "rounds 1 to 5" in str(ended["north"])
        assert entries(readdressed(study, "north"))[-1]["reason"] == ended["north"].what
        assert sent == [], "nothing was trained in vain"
    spent = Ledger(readdressed(study, "north"))
    assert len(spent.entries()) == len(sent)
    spent.close()


def test_equal_weights_hide_the_true_counts(study: Study) -> None:
    study.job()
    assert federated(study, "filters: [{name: Examples, equal: true}]")["north"] is None
    assert {item["facts"]["num_examples"] for item in of_north(study, "update")} == {1}
    assert '"num_examples": 11' in (study.runs / "job/events.jsonl").read_text()  # south's
    reports = [line for line in (study.runs / "job/events.jsonl").read_text().splitlines() if '"report"' in line]
    assert all('"num_examples": 1}' in line for line in reports if '"north"' in line)


def test_a_policy_that_changes_takes_effect_at_the_next_round_and_is_on_record(study: Study) -> None:
    study.job(rounds=3)
    path = readdressed(study, "north") / "policy.yml"

    def change(number: int) -> None:
        if number == 1:
            path.write_text("filters: [{name: AllowMetrics}]")

    assert federated(study, "filters: [{name: RoundMetrics, decimals: 0}]", each_round=change)["north"] is None
    metrics = [item["facts"]["metrics"] for item in of_north(study, "update")]
    assert metrics == [{"train_loss": 1.0, "patients": 12.0}, {}, {}]
    (changed,) = [entry for entry in entries(path.parent) if entry["action"] == "policy changed"]
    assert (changed["round"], changed["policy"]["filters"]) == (2, [{"name": "AllowMetrics"}])


@pytest.mark.parametrize("text", ["filters: [", "exchnage: adapters", "max_round_bytes: many", None])
def test_a_policy_that_cannot_be_read_lets_nothing_leave(study: Study, text: str | None) -> None:
    study.job(rounds=3)
    path = readdressed(study, "north") / "policy.yml"

    def spoil(number: int) -> None:
        if number == 1:
            path.unlink()
            if text is not None:
                path.write_text(text)

    error = federated(study, "", each_round=spoil)["north"]
    assert isinstance(error, ConfigError)
    assert str(path) in error.where
    assert len(of_north(study, "update")) == 1
    with pytest.raises(ConfigError):
        KitPolicyGate(path.parent)


def test_the_processes_of_a_site_are_counted(study: Study, tmp_path: Path) -> None:
    (study.kits / "north/policy.yml").write_text(
        "resources: {processes: 1, gpus: ['2', '3']}\napps: {tumour: 'echo -y'}"
    )
    first, second = KitPolicyGate(study.kits / "north"), KitPolicyGate(study.kits / "north")
    with first.process_slot():
        with pytest.raises(PermissionDeniedError, match="may not run another command") as caught:
            with second.process_slot():
                pass
        assert "resources: processes: 1" in caught.value.where
    with second.process_slot():
        pass
    assert gpu_environment(first.policy) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert command_for(first, "tumour") == ["echo", "-y"]
    with pytest.raises(ConfigError, match="the policy names no command for the app 'other'"):
        command_for(first, "other")
    (refusal,) = [entry for entry in entries(study.kits / "north") if entry["outcome"] == "refused"]
    assert refusal["rule"].startswith("resources: processes: 1")


# -- the rules by themselves ---------------------------------------------------------------------------------------


def test_the_rules_about_jobs() -> None:
    own = Policy.model_validate({"submitters": {"organisations": "own"}})
    own.check_submitter("job", LENA, SITE)
    for submitter in (LARS, None):
        with pytest.raises(PermissionDeniedError):
            own.check_submitter("job", submitter, SITE)
    some = Policy.model_validate({"strategies": ["fedavg"]})
    some.check_strategy("job", "fedavg:weight=equal", SITE)
    with pytest.raises(PermissionDeniedError):
        some.check_strategy("job", "fedprox:mu=1", SITE)


def test_the_template_protects_a_sites_update_and_its_examples_are_good(study: Study, tmp_path: Path) -> None:
    path = study.kits / "north/policy.yml"
    assert read_policy(path) == Policy(min_cohort=2, site_weights=10, share_files=("*",))
    lines = path.read_text().splitlines()
    examples = [line.removeprefix("# ") for line in lines if line.startswith("# ") and ":" in line.split(" ")[1]]
    (tmp_path / "examples.yml").write_text("\n".join(line for line in examples if "`" not in line))
    policy = read_policy(tmp_path / "examples.yml")
    unset = {name for name in Policy.model_fields if getattr(policy, name) == getattr(Policy(), name)}
    assert unset == {"filters", "min_cohort", "site_weights"}


def test_a_file_is_read_again_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "policy.yml"
    path.write_text("max_round_bytes: 3")
    policy = PolicyFile(path)
    assert not policy.refresh()
    os.replace(_written(tmp_path / "new", "max_round_bytes: 4"), path)
    assert policy.refresh()
    assert policy.current.max_round_bytes == 4
    assert until(lambda: not policy.refresh(), "no change")


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path

"""The site daemon, as processes over mutual TLS: jobs in turn and at a time, deaths, stops, kills, approval."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, readdressed

from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_runtime.errors import PermissionDeniedError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust import audit
from fl_runtime.trust.approval import decide

Until = Callable[[Callable[[], Any], str], None]

# Adds the site's number in each round. Waits in a round, and dies, as files in the working directory say.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
import fl_adapters as fl

me = fl.site()
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
for trap in sorted(Path(".").glob(f"die-{me.job}-{me.name}-*")):
    trap.unlink()
    if trap.name.endswith("early"):
        raise ImportError("no such module as 'data'")
    break
else:
    trap = None

def sync(task):
    Path(f"at-{me.job}-{me.name}-{task.round}").touch()
    while Path(f"hold-{me.job}-{task.round}").exists():
        time.sleep(0.01)

signal.signal(signal.SIGTERM, lambda *_: (Path(f"saved-{me.job}-{me.name}").touch(), sys.exit(3)))
with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
        sync(task)
        if trap and trap.name.endswith("bug"):
            raise ValueError("patient 17 has no label")
        if trap and trap.name.endswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        task.submit({"w": task.arrays["w"] + site.index + 1}, num_examples=1)
"""


class Federation:
    """A server in this process, and daemons of its sites."""

    def __init__(self, bench: Any, study: Study, until: Until) -> None:
        self.bench, self.study, self.until = bench, study, until
        self.outputs: dict[str, Path] = {}
        bench.script("train.py", SCRIPT)
        for site in study.sites:
            self.policy(site)

    def kit(self, site: str) -> Path:
        return readdressed(self.study, site)

    def policy(self, site: str, **rules: Any) -> None:
        apps = {"train": f"{sys.executable} train.py"}
        (self.kit(site) / "policy.yml").write_text(json.dumps({"apps": apps, **rules}))

    def daemon(self, site: str, *options: str) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = self.bench.start("site", "--kit", str(self.kit(site)), *options)
        return process

    def daemons(self) -> dict[str, subprocess.Popen[str]]:
        return {site: self.daemon(site) for site in self.study.sites}

    def touch(self, *names: str) -> None:
        for name in names:
            (self.bench.folder / name).touch()

    def release(self, name: str) -> None:
        (self.bench.folder / name).unlink()

    def reached(self, name: str) -> None:
        self.until((self.bench.folder / name).exists, name)

    def outcome(self, job: str) -> Any:
        assert self.study.server.wait_for_job(job, 60), f"{job} did not end"
        return self.study.server.outcome(job)

    def finished(self, job: str, rounds: int = 2) -> None:
        """Check that a job has ended well, with the model of undisturbed rounds."""
        outcome = self.outcome(job)
        assert outcome["error"] is None, outcome["error"]
        model = read_tensors(Path(outcome["folder"]) / "model" / "model.safetensors")
        mean = sum(range(1, len(self.study.sites) + 1)) / len(self.study.sites)
        np.testing.assert_array_equal(model["w"], np.full(3, rounds * mean, np.float32))

    def record(self, site: str, job: str) -> dict[str, Any]:
        return dict(json.loads((self.kit(site) / "jobs" / job / "site.json").read_text()))

    def state(self, site: str, job: str) -> str:
        try:
            return str(self.record(site, job)["state"])
        except FileNotFoundError:
            return ""

    def log(self, site: str, job: str) -> str:
        return (self.kit(site) / "jobs" / job / "log.txt").read_text()


@pytest.fixture
def federation(bench: Any, until: Until, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Study(bench.folder / "study") as study:
        yield Federation(bench, study, until)


def stopped(process: subprocess.Popen[str]) -> str:
    """Stop a daemon with SIGTERM, and return what it has said."""
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return err


def test_jobs_run_one_after_another_and_leave_their_results(federation: Federation) -> None:
    federation.policy("north", resources={"gpus": ["3", "5"]})
    daemons = federation.daemons()
    for job in ("first", "second"):
        federation.study.job(job)
        federation.finished(job)
        for site in ("north", "south"):
            federation.until(lambda s=site, j=job: federation.state(s, j) == "finished", "the end at the site")
            model = read_tensors(federation.kit(site) / "jobs" / job / "model" / "model.safetensors")
            np.testing.assert_array_equal(model["w"], np.full(3, 3.0, np.float32))
        assert federation.log("north", job) == "gpus 3,5\n"
    for site, process in daemons.items():
        said = stopped(process)
        assert "first: job of lead lena of north-hospital for the app train" in said
        assert audit.verify(federation.kit(site), audit.Anchor(kit=federation.kit(site)))[1] == []


def test_two_jobs_at_a_time_divide_the_gpus(federation: Federation) -> None:
    for site in ("north", "south"):
        federation.policy(site, resources={"gpus": ["0", "1"], "processes": 2})
    federation.touch("hold-a-1", "hold-b-1")
    federation.daemons()
    for job in ("a", "b"):
        federation.study.job(job)
    federation.reached("at-a-north-1")
    federation.reached("at-b-north-1")
    assert {federation.log("north", job) for job in ("a", "b")} == {"gpus 0\n", "gpus 1\n"}
    federation.release("hold-b-1")
    federation.finished("b")
    federation.release("hold-a-1")
    federation.finished("a")


def test_a_script_that_dies_is_started_again_and_the_job_ends_as_if_it_had_not(federation: Federation) -> None:
    federation.touch("die-job-north-1-early", "die-job-north-2-bug", "die-job-north-3-kill")
    daemons = federation.daemons()
    federation.study.job()
    federation.finished("job")
    said = stopped(daemons["north"])
    assert "its command ended (exit status 1); started again in 1 s, 1 of 3 times" in said
    assert "its command ended (killed by SIGKILL" in said
    assert not [event for event in left_events(federation, "job") if event["early"]]
    assert "no such module" in federation.log("north", "job")


def test_a_script_that_dies_too_often_leaves_and_its_data_stay(federation: Federation) -> None:
    federation.touch("die-job-north-1-bug", "die-job-north-2-bug")
    federation.daemon("south")
    daemon = federation.daemon("north", "--restarts", "1")
    federation.study.job(min_sites=1)
    error = federation.outcome("job")["error"]
    assert error is None, "the other site makes the quorum"
    federation.until(lambda: federation.state("north", "job") == "left", "the end at the site")
    reasons = [event["reason"] for event in left_events(federation, "job") if event["early"]]
    assert reasons == [
        "its command ended 2 times, the last time with exit status 1; "
        "ValueError (its text stays in this site's own log)"
    ]
    assert "patient 17" in federation.record("north", "job")["reason"]
    federation.study.job("next")
    federation.finished("next")
    stopped(daemon)


def left_events(federation: Federation, job: str) -> list[dict[str, Any]]:
    lines = (federation.study.runs / job / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event.get("data", event) for event in events if event["kind"] == "left"]


def test_a_stopped_daemon_lets_scripts_save_and_goes_on_with_the_same_job(federation: Federation) -> None:
    federation.touch("hold-job-2")
    daemons = federation.daemons()
    federation.study.job()
    federation.reached("at-job-north-2")
    said = stopped(daemons["north"])
    assert "stopping: job may save" in said
    assert (federation.bench.folder / "saved-job-north").exists()
    assert left_events(federation, "job") == []
    federation.release("at-job-north-2")
    federation.release("hold-job-2")
    federation.daemon("north")
    federation.finished("job")


def test_scripts_of_a_killed_daemon_do_not_run_beside_those_of_the_next(federation: Federation) -> None:
    federation.touch("hold-job-2")
    daemons = federation.daemons()
    federation.study.job()
    federation.reached("at-job-north-2")
    second = federation.daemon("north")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"another site daemon runs with this kit (process {daemons['north'].pid})" in err
    os.kill(daemons["north"].pid, signal.SIGKILL)
    daemons["north"].wait()
    federation.release("at-job-north-2")
    federation.daemon("north")
    federation.reached("at-job-north-2")
    assert (federation.bench.folder / "saved-job-north").exists(), "the first script was ended before the second began"
    federation.release("hold-job-2")
    federation.finished("job")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"apps": {"other": "true"}}, "its policy names no command for the app 'train'"),
        ({"apps": {"train": "/nowhere/python train.py"}}, "its command cannot be started"),
        ({"strategies": ["fedprox"]}, "site north of north-hospital may not take part in job"),
        ({"submitters": {"names": ["lars"]}}, "submitted by lead lena"),
    ],
    ids=["unknown app", "no such command", "strategy", "submitter"],
)
def test_a_job_that_the_site_does_not_run_is_refused_at_once(
    federation: Federation, rules: dict[str, Any], told: str
) -> None:
    federation.policy("north", **rules)
    federation.daemon("north")
    federation.study.job(strategy="fedavg")
    error = federation.outcome("job")["error"]
    assert told in error["where"], error
    federation.until(lambda: federation.state("north", "job") == "refused", "the record")


def test_a_job_waits_for_approval_across_a_restart(federation: Federation) -> None:
    kit = str(federation.kit("north"))
    federation.policy("north", approve="ask", exchange=["w"])
    daemons = federation.daemons()
    federation.study.job(exchange=["w"], filters=[{"name": "AllowMetrics", "names": ["loss"]}])
    federation.until(lambda: federation.state("north", "job") == "waits for approval", "the job at the site")
    stopped(daemons["north"])
    daemon = federation.daemon("north")
    unknown = federation.bench.run("site", "approve", "jab", "--kit", kit)
    assert unknown.returncode == 1
    assert "these jobs wait for approval: job" in unknown.stderr
    shown = federation.bench.json("site", "approve", "job", "--kit", kit)
    assert shown["submitted by"] == "lead lena of north-hospital"
    assert (shown["app"], shown["rounds"], shown["partners"], shown["exchange"]) == ("train", "2", "south", "w")
    assert shown["filters"] == "AllowMetrics(names=['loss'])"
    federation.finished("job")
    actions = [entry["action"] for entry in audit.entries(Path(kit))]
    assert "job approved by a person" in actions
    federation.study.job("second")
    federation.until(lambda: federation.state("north", "second") == "waits for approval", "the next job")
    refused = federation.bench.json("site", "refuse", "second", "--kit", kit, "--reason", "no ethics vote")
    assert refused["decision"] == "refused"
    assert "somebody at the site has refused the job: no ethics vote" in federation.outcome("second")["error"]["where"]
    federation.study.job("third")
    federation.until(lambda: federation.state("north", "third") == "waits for approval", "the third job")
    federation.study.admin("ada").ask("AbortJob", job="third")
    federation.bench.json("site", "approve", "third", "--kit", kit)
    federation.until(lambda: federation.state("north", "third") == "ended", "the daemon to see that the job has ended")
    assert not (federation.kit("north") / "jobs" / "third" / "log.txt").exists(), "it was not run"
    stopped(daemon)


def test_a_forgotten_second_run_does_not_take_the_site_out_of_the_job(federation: Federation) -> None:
    federation.touch("hold-job-1")
    federation.study.job()
    federation.bench.start("run", "--kit", str(federation.kit("south")), "--", sys.executable, "train.py")
    forgotten = federation.bench.start("run", "--kit", str(federation.kit("north")), "--", sys.executable, "train.py")
    federation.reached("at-job-north-1")
    federation.release("at-job-north-1")
    federation.bench.start("run", "--kit", str(federation.kit("north")), "--", sys.executable, "train.py")
    federation.reached("at-job-north-1")
    federation.release("hold-job-1")
    _, err = forgotten.communicate(timeout=60)
    assert "attempt 2 has taken over" in err
    federation.finished("job")
    assert not [event for event in left_events(federation, "job") if event["early"]]


def test_an_approval_holds_for_the_settings_that_were_shown(federation: Federation) -> None:
    """A server that sends other settings to the script than to the daemon gets nothing."""
    kit = federation.kit("north")
    federation.policy("north", approve="ask")
    shown = {"name": "job", "rounds": 2, "submitted_by": "", "exchange": ["head"]}
    gate = KitPolicyGate(kit)
    with pytest.raises(PermissionDeniedError, match="which nobody at the site has approved"):
        gate.check_join(shown, "torch")
    decide(kit / "jobs" / "job", shown, approved=True)
    gate.check_join(shown, "torch")
    gate.check_join({**shown, "name": "job/2"}, "torch")
    with pytest.raises(PermissionDeniedError, match="nobody at the site has approved"):
        gate.check_join({**shown, "exchange": ["*"]}, "torch")


def test_a_daemon_waits_for_its_server(federation: Federation) -> None:
    address = federation.study.address
    daemons = federation.daemons()
    federation.touch("hold-job-1")
    federation.study.job()
    federation.reached("at-job-north-1")
    federation.study.server.close()
    federation.study.start(address)
    federation.release("hold-job-1")
    federation.finished("job")
    federation.study.job("next")
    federation.finished("next")
    said = stopped(daemons["north"])
    assert said.count("trying again") == said.count("the server answers again") >= 1


def test_check_shows_the_plan_and_every_rule_that_refuses(federation: Federation) -> None:
    kit, job = str(federation.kit("north")), str(federation.bench.folder / "job.yml")
    Path(job).write_text("app: train\nrounds: 2\nstrategy: fedavg\ncross_site: true\n")
    federation.policy("north", resources={"gpus": ["0", "1"], "processes": 2}, filters=[{"name": "RoundMetrics"}])
    plan = federation.bench.json("site", "check", job, "--kit", kit)
    assert (plan["command"], plan["gpus"], plan["processes"]) == (f"{sys.executable} train.py", "0", 2)
    assert (plan["refusals"], plan["approval"]) == ([], False)
    assert [item["name"] for item in plan["filters"]] == ["RoundMetrics"]
    own = {"organisations": "own"}
    federation.policy("north", cross_site=False, strategies=["median"], apps={}, submitters=own, approve="ask")
    done = federation.bench.run(
        "site", "check", job, "--kit", kit, "--submitter", "lead lars of south-hospital", "--json"
    )
    assert done.returncode == 1
    plan = json.loads(done.stdout)
    refusals = " ".join(item["what"] + item["where"] for item in plan["refusals"])
    for rule in ("organisation south-hospital", "cross_site: false", "strategies: fedavg", "the app 'train'"):
        assert rule in refusals
    assert (len(plan["refusals"]), plan["command"], plan["approval"]) == (4, None, True)
    unknown = json.loads(federation.bench.run("site", "check", job, "--kit", kit, "--json").stdout)
    assert any("--submitter" in text for text in unknown["unchecked"])

"""The site daemon, as a process over mutual TLS: jobs in turn and at a time, deaths, stops, kills, approval.

All tests share one federation. Its site north is a daemon, south a client in this process.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, readdressed, until
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.environments.processes import free_ports
from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_runtime.errors import PermissionDeniedError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust import audit
from fl_runtime.trust.approval import decide

W = {"w": np.zeros(3, np.float32)}

# Adds 1 in each round. Waits in a round, and dies, as files in the working directory say.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
import fl_adapters as fl

me = fl.site()
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
trap = next(iter(sorted(Path(".").glob(f"die-{me.job}-*"))), Path("none"))
trap.unlink(missing_ok=True)
if trap.name.endswith("early"):
    raise ImportError("no such module as 'data'")

signal.signal(signal.SIGTERM, lambda *_: (Path(f"saved-{me.job}").touch(), sys.exit(3)))
with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
        Path(f"at-{me.job}-{task.round}").touch()
        while Path(f"hold-{me.job}-{task.round}").exists():
            time.sleep(0.01)
        if trap.name.endswith("bug"):
            raise ValueError("patient 17 has no label")
        if trap.name.endswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        task.submit({"w": task.arrays["w"] + np.float32(1)}, num_examples=1)
"""


class Federation:
    """A server and the site south in this process, and the daemon of north."""

    def __init__(self, bench: Any, study: Study, threads: ThreadPoolExecutor) -> None:
        self.bench, self.study, self._threads = bench, study, threads
        self.kit = readdressed(study, "north")
        self._metrics_port = free_ports(1)[0]
        bench.script("train.py", SCRIPT)
        self.policy()
        self.daemon = self.start()

    def policy(self, **rules: Any) -> None:
        """Write north's policy, which names the script for the app "train"."""
        apps = {"train": f"{sys.executable} train.py"}
        (self.kit / "policy.yml").write_text(json.dumps({"apps": apps, **rules}))

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start the daemon of north (again)."""
        self.daemon = self.bench.start("site", "--kit", str(self.kit), "--metrics", str(self._metrics_port), *options)
        return self.daemon

    def metrics(self) -> dict[str, float]:
        """What the daemon's page shows, by name and value of the label."""

        def page() -> str | None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as answer:
                    return str(answer.read().decode())
            except OSError:  # the daemon has not begun to listen yet
                return None

        lines = re.findall(r'^(\w+)(?:{\w+="(.*)"})? (\S+)$', until(page, "the daemon's page"), re.MULTILINE)
        return {f"{name}{{{label}}}" if label else name: float(value) for name, label, value in lines}

    def stop(self) -> str:
        """Stop the daemon with SIGTERM once it is at work, and return what it has said."""
        self.metrics()
        self.daemon.terminate()
        _, err = self.daemon.communicate(timeout=60)
        assert self.daemon.returncode == 0, err
        return err

    def job(self, name: str, *sites: str, **fields: Any) -> None:
        """Submit a job of these sites, or of north alone."""
        self.study.job(name, sites=list(sites) or ["north"], **fields)

    def south(self, job: str) -> Future[Any]:
        """Let south take part in a job."""

        def take_part() -> Any:
            site, same = self.study.site("south"), {"every": "epoch", "optimizer_state": "keep"}
            return site.take_part(W, lambda task: {"w": task.arrays["w"] + np.float32(1)}, job=job, **same)

        return self._threads.submit(take_part)

    def touch(self, *names: str) -> None:
        for name in names:
            (self.bench.folder / name).touch()

    def release(self, name: str) -> None:
        (self.bench.folder / name).unlink()

    def reached(self, name: str) -> None:
        until((self.bench.folder / name).exists, name)

    def outcome(self, job: str) -> Any:
        assert self.study.server.wait_for_job(job, 60), f"{job} did not end"
        return self.study.server.outcome(job)

    def finished(self, job: str) -> None:
        """Check that a job has ended well, with the model of two undisturbed rounds."""
        outcome = self.outcome(job)
        assert outcome["error"] is None, outcome["error"]
        model = read_tensors(Path(outcome["folder"]) / "model" / "model.safetensors")
        np.testing.assert_array_equal(model["w"], np.full(3, 2.0, np.float32))

    def record(self, job: str) -> dict[str, Any]:
        """What north has recorded about a job; its state is "" before that."""
        try:
            return dict(json.loads((self.kit / "jobs" / job / "site.json").read_text()))
        except FileNotFoundError:
            return {"state": ""}

    def becomes(self, job: str, state: str) -> None:
        until(lambda: self.record(job)["state"] == state, f"{job}: {state}")

    def log(self, job: str) -> str:
        return (self.kit / "jobs" / job / "log.txt").read_text()

    def events(self, job: str, kind: str) -> list[dict[str, Any]]:
        """Data of a job's events of one kind."""
        lines = (self.study.runs / job / "events.jsonl").read_text().splitlines()
        return [event["data"] for event in map(json.loads, lines) if event["kind"] == kind]

    def left(self, job: str) -> list[str]:
        """Reasons with which sites have left a job early."""
        return [data["reason"] for data in self.events(job, "left") if data["early"]]

    def shared(self, job: str) -> list[str]:
        """The lines of its own log that north has shared."""
        return [data["text"] for data in self.events(job, "log")]


@pytest.fixture(scope="module")
def running(shared_bench: Any) -> Iterator[Federation]:
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setenv("OMP_NUM_THREADS", "1")
        with Study(shared_bench.folder / "study") as study:
            yield Federation(shared_bench, study, threads)


@pytest.fixture
def federation(running: Federation) -> Federation:
    """The federation, with the policy that allows everything."""
    running.policy()
    return running


def site(command: str, *words: str, status: int = 0) -> Any:
    """Run `fl-adapters site COMMAND WORDS --json` in this process, and return what it prints."""
    done = CliRunner().invoke(app, ["site", command, *words, "--json"])
    assert done.exit_code == status, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_jobs_run_at_a_time_or_in_turn_and_leave_their_results(federation: Federation) -> None:
    federation.policy(resources={"gpus": ["3", "5"], "processes": 2})
    federation.touch("hold-a-1", "hold-b-1")
    for name in ("a", "b", "c"):
        federation.job(name, resources={"gpus": 1} if name == "b" else {})
    federation.reached("at-a-1")
    federation.reached("at-b-1")
    assert {federation.log(name) for name in ("a", "b")} == {"gpus 3\n", "gpus 5\n"}
    assert federation.study.server.queue.record("c").state == "queued"
    federation.release("hold-b-1")
    for name in ("b", "c"):
        federation.finished(name)
        federation.becomes(name, "finished")
        model = read_tensors(federation.kit / "jobs" / name / "model" / "model.safetensors")
        np.testing.assert_array_equal(model["w"], np.full(3, 2.0, np.float32))
    federation.policy(resources={"gpus": ["3", "5"]})
    federation.job("d")
    federation.release("hold-a-1")
    federation.finished("a")
    federation.finished("d")
    assert federation.log("d") == "gpus 3,5\n"


def test_the_pages_of_a_daemon_count_what_its_scripts_do(federation: Federation) -> None:
    until(lambda: federation.metrics()["fl_adapters_site_jobs{running}"] == 0, "the end of earlier jobs")
    until(lambda: federation.metrics()["fl_adapters_connected"] == 1, "the daemon to be connected")
    before = federation.metrics()
    federation.policy(resources={"processes": 2})
    federation.touch("hold-counted-2", "die-counted-1-kill")
    federation.job("counted")
    federation.reached("at-counted-2")
    during = federation.metrics()
    assert during["fl_adapters_site_jobs{running}"] == 1
    assert (during["fl_adapters_slots"], during["fl_adapters_slots_free"]) == (2, 1)
    assert during["fl_adapters_script_restarts_total"] - before["fl_adapters_script_restarts_total"] == 1
    federation.release("hold-counted-2")
    federation.finished("counted")
    federation.becomes("counted", "finished")
    after, ended = federation.metrics(), "fl_adapters_site_jobs_ended_total{finished}"
    assert after[ended] - before[ended] == 1
    history = csv.DictReader((federation.study.runs / "counted" / "history.csv").open())
    name = "fl_adapters_site_sent_bytes_total"
    sent = sum(float(row["bytes_up"]) for row in history if row["site"] == "north")
    assert sent <= after[name] - before[name] < 2 * sent
    assert after["fl_adapters_site_received_bytes_total"] > before["fl_adapters_site_received_bytes_total"]


def test_a_script_that_dies_is_started_again_and_the_job_ends_as_if_it_had_not(federation: Federation) -> None:
    federation.touch("die-fragile-1-early", "die-fragile-2-kill")
    federation.job("fragile", "north", "south")
    federation.south("fragile").result(60)
    federation.finished("fragile")
    assert federation.left("fragile") == []
    shared = federation.shared("fragile")
    assert shared[0] == "its command runs"
    assert shared[1] == "its command ended (exit status 1); started again in 1 s, 1 of 3 times"
    assert shared[2].startswith("its command ended (killed by SIGKILL")
    assert "no such module" in federation.log("fragile")


def test_a_script_that_dies_too_often_leaves_and_its_data_stay(federation: Federation) -> None:
    federation.touch("die-broken-1-bug", "die-broken-2-bug")
    federation.policy(share_logs=False)
    federation.stop()
    lines = federation.bench.folder / "logs" / "north.log"
    federation.start("--restarts", "1", "--log-format", "json", "--log-file", str(lines))
    federation.job("broken", "north", "south", min_sites=1)
    federation.south("broken").result(60)
    assert federation.outcome("broken")["error"] is None, "the other site makes the quorum"
    federation.becomes("broken", "left")
    assert federation.left("broken") == [
        "its command ended 2 times, the last time with exit status 1; "
        "ValueError (its text stays in this site's own log)"
    ]
    assert "patient 17" in federation.record("broken")["reason"]
    assert federation.shared("broken") == []
    logged = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {(line["site"], line["job"]) for line in logged} == {("north", ""), ("north", "broken")}
    (died,) = [line for line in logged if line["level"] == "warning" and line["job"]]
    assert died["text"].startswith("its command ended (exit status 1); started again in 1 s, 1 of 1 times")
    assert abs(died["time"] - time.time()) < 120
    federation.job("next")
    federation.finished("next")
    federation.stop()
    federation.start()


def test_a_stopped_daemon_lets_scripts_save_and_goes_on_with_the_same_job(federation: Federation) -> None:
    federation.touch("hold-stopped-2")
    federation.job("stopped")
    federation.reached("at-stopped-2")
    said = federation.stop()
    assert "stopped: job of lead lena of north-hospital for the app train" in said
    assert "stopping: stopped may save" in said
    assert (federation.bench.folder / "saved-stopped").exists()
    assert federation.left("stopped") == []
    assert audit.verify(federation.kit, audit.Anchor(kit=federation.kit))[1] == []
    federation.release("hold-stopped-2")
    federation.start()
    federation.finished("stopped")


def test_scripts_of_a_killed_daemon_do_not_run_beside_those_of_the_next(federation: Federation) -> None:
    federation.touch("hold-killed-2")
    federation.job("killed")
    federation.reached("at-killed-2")
    killed = federation.daemon
    refused = site("--kit", str(federation.kit), status=1)
    assert f"another site daemon runs with this kit (process {killed.pid})" in refused["error"]["what"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    federation.release("at-killed-2")
    federation.start()
    federation.reached("at-killed-2")
    assert (federation.bench.folder / "saved-killed").exists(), "the first script was ended before the second began"
    federation.release("hold-killed-2")
    federation.finished("killed")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"apps": {"other": "true"}}, "its policy names no command for the app 'train'"),
        ({"apps": {"train": "/nowhere/python train.py"}}, "its command cannot be started"),
        ({"strategies": ["fedprox"]}, "site north of north-hospital may not take part in"),
        ({"submitters": {"names": ["lars"]}}, "submitted by lead lena"),
    ],
    ids=["unknown-app", "no-such-command", "strategy", "submitter"],
)
def test_a_job_that_the_site_does_not_run_is_refused_at_once(
    federation: Federation, rules: dict[str, Any], told: str, request: pytest.FixtureRequest
) -> None:
    federation.policy(**rules)
    name = str(request.node.callspec.id)
    federation.job(name, strategy="fedavg")
    error = federation.outcome(name)["error"]
    assert told in error["where"], error
    federation.becomes(name, "refused")
    lines = [line for line in audit.entries(federation.kit) if line.get("job") == name]
    assert [line["outcome"] for line in lines].count("refused") == 1, lines


def test_a_job_waits_for_approval_across_a_restart(federation: Federation) -> None:
    kit = str(federation.kit)
    federation.policy(approve="ask", exchange=["w"])
    filters = [{"name": "AllowMetrics", "names": ["loss"]}]
    federation.job("asked", "north", "south", exchange=["w"], filters=filters)
    south = federation.south("asked")
    federation.becomes("asked", "waits for approval")
    federation.stop()
    federation.start()
    unknown = site("approve", "jab", "--kit", kit, status=1)
    assert "these jobs wait for approval: asked" in unknown["error"]["fix"]
    shown = site("approve", "asked", "--kit", kit)
    assert shown["submitted by"] == "lead lena of north-hospital"
    assert (shown["app"], shown["rounds"], shown["partners"], shown["exchange"]) == ("train", "2", "south", "w")
    assert shown["filters"] == "AllowMetrics(names=['loss'])"
    south.result(60)
    federation.finished("asked")
    assert "job approved by a person" in [entry["action"] for entry in audit.entries(federation.kit)]

    federation.job("second")
    federation.becomes("second", "waits for approval")
    assert site("refuse", "second", "--kit", kit, "--reason", "no ethics vote")["decision"] == "refused"
    assert "somebody at the site has refused the job: no ethics vote" in federation.outcome("second")["error"]["where"]

    federation.job("third")
    federation.becomes("third", "waits for approval")
    federation.study.admin("ada").ask("AbortJob", job="third")
    site("approve", "third", "--kit", kit)
    federation.becomes("third", "ended")
    assert not (federation.kit / "jobs" / "third" / "log.txt").exists(), "it was not run"


def test_an_approval_holds_for_the_settings_that_were_shown(federation: Federation) -> None:
    """A server that sends other settings to the script than to the daemon gets nothing."""
    federation.policy(approve="ask")
    both = {"sites": ["north", "south"], "min_sites": 2}
    shown = {"name": "job", "rounds": 2, "submitted_by": "", "exchange": ["head"], **both}
    gate = KitPolicyGate(federation.kit)
    with pytest.raises(PermissionDeniedError, match="which nobody at the site has approved"):
        gate.check_join(shown, "torch")
    decide(federation.kit / "jobs" / "job", shown, approved=True)
    gate.check_join(shown, "torch")
    gate.check_join({**shown, "name": "job/2"}, "torch")
    with pytest.raises(PermissionDeniedError, match="nobody at the site has approved"):
        gate.check_join({**shown, "exchange": ["*"]}, "torch")


def test_a_daemon_waits_for_its_server(federation: Federation) -> None:
    federation.touch("hold-outage-1")
    federation.job("outage")
    federation.reached("at-outage-1")
    federation.study.server.close()
    federation.study.start(federation.study.address)
    federation.release("hold-outage-1")
    federation.finished("outage")
    federation.job("afterwards")
    federation.finished("afterwards")


def test_a_forgotten_second_run_does_not_take_the_site_out_of_the_job(federation: Federation) -> None:
    south = readdressed(federation.study, "south")
    (south / "policy.yml").write_text("{}")  # that of the template takes part in no job of one site
    command = ("run", "--kit", str(south), "--", sys.executable, "train.py")
    federation.touch("hold-twice-1")
    federation.job("twice", "south")
    forgotten = federation.bench.start(*command)
    federation.reached("at-twice-1")
    federation.release("at-twice-1")
    federation.bench.start(*command)
    federation.reached("at-twice-1")
    federation.release("hold-twice-1")
    _, err = forgotten.communicate(timeout=60)
    assert "attempt 2 has taken over" in err
    federation.finished("twice")
    assert federation.left("twice") == []


def test_check_shows_the_plan_and_every_rule_that_refuses(federation: Federation) -> None:
    kit, job = str(federation.kit), str(federation.bench.folder / "job.yml")
    Path(job).write_text("app: train\nrounds: 2\nstrategy: fedavg\ncross_site: true\n")
    federation.policy(resources={"gpus": ["0", "1"], "processes": 2}, filters=[{"name": "RoundMetrics"}])
    plan = site("check", job, "--kit", kit)
    assert (plan["command"], plan["gpus"], plan["processes"]) == (f"{sys.executable} train.py", "0", 2)
    assert (plan["refusals"], plan["approval"]) == ([], False)
    assert [item["name"] for item in plan["filters"]] == ["RoundMetrics"]
    own = {"organisations": "own"}
    federation.policy(cross_site=False, strategies=["median"], apps={}, submitters=own, approve="ask")
    plan = site("check", job, "--kit", kit, "--submitter", "lead lars of south-hospital", status=1)
    refusals = " ".join(item["what"] + item["where"] for item in plan["refusals"])
    for rule in ("organisation south-hospital", "cross_site: false", "strategies: fedavg", "the app 'train'"):
        assert rule in refusals
    assert (len(plan["refusals"]), plan["command"], plan["approval"]) == (4, None, True)
    unknown = site("check", job, "--kit", kit, status=1)
    assert any("--submitter" in text for text in unknown["unchecked"])

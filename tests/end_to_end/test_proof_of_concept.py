"""One script in three federations: simulated, as a proof of concept, and provisioned with separate processes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_adapters import Job, PermissionDeniedError, Production, ProofOfConcept, SiteFailedError
from fl_adapters.environments.tracking import Begin, End, Metrics, Record
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust import audit
from fl_runtime.trust.kits import read_kit

HF = """
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed

import fl_adapters as fl
from fl_adapters.hf import FederatedCallback


class Config(PretrainedConfig):
    model_type = "tiny"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        self.post_init()

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


me = fl.site()
set_seed(7)
torch.set_num_threads(1)
random = np.random.default_rng(me.index)
rows = [{"x": random.normal(size=8).astype("float32"), "labels": int(i % 2)} for i in range(40 + 16 * me.index)]
trainer = Trainer(
    model=Model(Config()),
    args=TrainingArguments("out", num_train_epochs=3, per_device_train_batch_size=8, learning_rate=0.05, seed=7,
                           report_to=[], logging_strategy="no", save_strategy="no", use_cpu=True),
    train_dataset=rows,
    eval_dataset=rows[:8],
    callbacks=[FederatedCallback()],
)
trainer.train()
"""

PROJECT = """
federation: study
server: {{address: "127.0.0.1:{port}"}}
sites:
  - {{name: site-1, organisation: north-hospital}}
  - {{name: site-2, organisation: south-hospital}}
admins:
  - {{name: lena, organisation: north-hospital, role: lead}}
  - {{name: mina, organisation: north-hospital, role: member}}
"""


CONNECTIONS = """
import os, time

def of_parent():
    files = f"/proc/{os.getppid()}/fd"
    sockets = {os.readlink(f"{files}/{name}")[8:-1] for name in os.listdir(files)}
    return sum(line.split()[9] in sockets for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}"))

end = time.monotonic() + 20  # it is closed by a thread of its own
while of_parent() and time.monotonic() < end:
    time.sleep(0.01)
print("connections:", of_parent())
"""


@pytest.fixture
def here(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the bench's folder the working directory, with one thread for each process."""
    monkeypatch.chdir(bench.folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(audit.__file__).parents[3]))
    return Path(bench.folder)


@pytest.fixture
def federation(bench: Any, here: Path) -> Path:
    """Provisioned kits in `kits`, with a free address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (here / "project.yml").write_text(PROJECT.format(port=port))
    bench.json("provision", "project.yml")
    return here / "kits"


@pytest.mark.slow
def test_the_same_hf_script_gives_the_same_bits_everywhere(bench: Any, federation: Path) -> None:
    bench.script("train.py", HF)
    simulated = bench.json("simulate", "train.py", "--sites", "2", "--name", "simulated")

    proof = Job(app="train.py", name="proof").run(ProofOfConcept(sites=2, quiet=True))

    (bench.folder / "job.yml").write_text("name: real\napp: train.py\n")
    server = bench.start("server", "--kit", "kits/server", "--job", "job.yml", "--data", "server-runs", "--json")
    sites = [bench.start("run", "--kit", f"kits/site-{n}", "--", sys.executable, "train.py") for n in (1, 2)]
    for process in (*sites, server):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    outcome = json.loads(out)

    models = [
        read_tensors(Path(folder) / "model.safetensors")
        for folder in (simulated["model"], proof.model, Path(outcome["folder"]) / "model")
    ]
    assert len(models[0]) == 4
    for other in models[1:]:
        assert other.keys() == models[0].keys()
        for name, array in models[0].items():
            np.testing.assert_array_equal(array.view(np.uint8), other[name].view(np.uint8))
    assert [item["train_loss"] for item in simulated["metrics"]] == [r.metrics["train_loss"] for r in proof.rounds]
    assert (proof.folder / "history.csv").exists()
    assert (proof.folder / "best").exists()
    for kit in ("server", "site-1", "site-2"):
        count, findings = audit.verify(federation / kit, audit.Anchor(kit=federation / kit))
        assert (count > 10, findings) == (True, [])


def test_a_job_is_submitted_over_an_admins_kit_and_status_shows_it(bench: Any, adding: str, federation: Path) -> None:
    server = bench.start("server", "--kit", "kits/server", "--data", "server-runs")
    status = _reached(bench)
    assert (status["federation"], status["running"]) == ("study", None)
    sites = [bench.start("run", "--kit", f"kits/site-{n}", "--", sys.executable, adding) for n in (1, 2)]

    records: list[Record] = []
    production = Production(kit="kits/lena", quiet=True, trackers=[records.append])
    result = Job(app="adding", name="first", rounds=3).run(production)

    assert (result.job, len(result.rounds)) == ("first", 3)
    assert isinstance(records[0], Begin) and records[0].params["rounds"] == "3"
    assert isinstance(records[-1], End) and records[-1].state == "finished"
    points = [point for record in records if isinstance(record, Metrics) for point in record.points]
    tracked = {(point.name, point.round): point.value for point in points if point.name.startswith("round/bytes")}
    assert tracked == {
        (f"round/{name}", item.round): float(getattr(item, name))
        for item in result.rounds
        for name in ("bytes_up", "bytes_down")
    }
    model = read_tensors(Path(result.folder) / "model/model.safetensors")
    np.testing.assert_allclose(model["w"], np.full((4, 3), 3 * (10 + 2 * 20) / 30), rtol=1e-6)
    for process in sites:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "submitted by" in err
    ended = bench.json("status", "--kit", "kits/mina")["ended"]["first"]
    assert ended["submitted_by"] == "lead lena of north-hospital"
    with pytest.raises(PermissionDeniedError, match="member mina of north-hospital may not submit a job"):
        Job(app="adding", name="second").run(Production(kit="kits/mina", quiet=True))
    server.terminate()
    _, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert re.search(f"first: 3 rounds.*; results in {ended['folder']}\n", err)


@pytest.mark.parametrize("command", [["--job", "job.yml"], []], ids=["the same command", "without the job"])
def test_a_killed_server_goes_on_with_its_job(bench: Any, federation: Path, command: list[str]) -> None:
    script = """
import os, time
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
        while task.round == 2 and not os.path.exists("again"):
            time.sleep(0.02)
        task.submit({"w": task.arrays["w"] + site.index + 1}, num_examples=1)
"""
    name = bench.script("waiting.py", script).name
    (bench.folder / "job.yml").write_text("name: long\\napp: waiting\\nrounds: 3\\n".replace("\\n", "\n"))
    first = bench.start("server", "--kit", "kits/server", "--job", "job.yml")
    sites = [bench.start("run", "--kit", f"kits/site-{n}", "--", sys.executable, name) for n in (1, 2)]
    _until(lambda: (_reached(bench)["running"] or {}).get("round") == 2, "round 2")
    first.kill()
    first.wait()
    second = bench.start("server", "--kit", "kits/server", *command)
    (bench.folder / "again").touch()
    for process in sites:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    if not command:
        _until(lambda: "long" in _reached(bench)["ended"], "the end of the job")
        second.terminate()
    assert second.wait(60) == 0
    model = read_tensors(federation / "server-data/long/model/model.safetensors")
    np.testing.assert_array_equal(model["w"], np.full(3, 4.5, np.float32))
    assert audit.verify(federation / "server", audit.Anchor(kit=federation / "server"))[1] == []
    actions = [entry["action"] for entry in audit.entries(federation / "server")]
    assert "job continued" in actions


def test_a_proof_of_concept_shows_the_log_of_a_script_that_fails(bench: Any, here: Path) -> None:
    bench.script(
        "broken.py", "import fl_adapters as fl\nwith fl.connect() as site:\n    raise RuntimeError('no data')\n"
    )
    with pytest.raises(SiteFailedError, match="process ended before round 1: exit status 1") as caught:
        Job(app="broken.py", rounds=1).run(ProofOfConcept(sites=2, quiet=True))
    assert "RuntimeError: no data" in caught.value.where


def test_a_command_that_ends_too_soon_is_said_to_the_others_at_once(bench: Any, federation: Path) -> None:
    (bench.folder / "job.yml").write_text("name: short\napp: x\nrounds: 3\n")
    began = time.monotonic()
    server = bench.start("server", "--kit", "kits/server", "--job", "job.yml")
    site = bench.run("run", "--kit", "kits/site-1", "--", sys.executable, "-c", "print('hello')")
    assert site.returncode == 1
    assert "hello" in site.stdout
    assert "ended before the last round" in site.stderr
    _, err = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "its command ended before the last round (exit status 0)" in err
    assert time.monotonic() - began < 50, "rejoin_s was not waited for"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for connections in /proc")
def test_a_site_has_no_second_connection_while_its_command_runs(bench: Any, federation: Path) -> None:
    (bench.folder / "job.yml").write_text("name: lines\napp: x\nrounds: 3\n")
    (bench.folder / "look.py").write_text(CONNECTIONS)
    server = bench.start("server", "--kit", "kits/server", "--job", "job.yml")
    site = bench.run("run", "--kit", "kits/site-1", "--", sys.executable, "look.py")
    assert "connections: 0" in site.stdout
    server.communicate(timeout=60)


def test_commands_say_what_is_wrong_with_a_kit(bench: Any, federation: Path) -> None:
    assert read_kit(federation / "site-1").identity.kind == "site"
    for line, says in (
        (
            ("server", "--kit", "kits/site-1"),
            "site site-1 of north-hospital, but the kit of a server is needed",
        ),
        (("run", "--kit", "kits/server", "--", "true"), "of study, but the kit of a site is needed"),
        (("status", "--kit", "nowhere"), "there is no startup kit here"),
        (("run", "--kit", "kits/site-1", "--patience-s", "0.1", "--", "true"), "does not answer"),
    ):
        done = bench.run(*line)
        assert done.returncode == 1, line
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def _reached(bench: Any) -> dict[str, Any]:
    """Return the server's status once it answers."""
    done: subprocess.CompletedProcess[str] = bench.run("status", "--kit", "kits/mina", "--json")
    end = time.monotonic() + 30
    while done.returncode and time.monotonic() < end:
        done = bench.run("status", "--kit", "kits/mina", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _until(condition: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited in vain for: {what}"


@pytest.mark.slow
def test_under_swarm_the_same_script_gives_the_bits_of_fedavg(bench: Any, here: Path) -> None:
    """In a simulation, and with certificates whose keys sign the streams between the sites."""
    bench.script("train.py", HF)
    for strategy in ("fedavg", "swarm"):
        bench.json("simulate", "train.py", "--sites", "3", "--name", strategy, "--strategy", strategy)
    Job(app="train.py", name="proof", strategy="swarm").run(ProofOfConcept(sites=3, quiet=True))
    weights = read_tensors(Path("runs/fedavg/model/model.safetensors"))
    for name in ("swarm", "proof"):
        mine = read_tensors(Path("runs") / name / "model" / "model.safetensors")
        assert all(mine[key].tobytes() == weights[key].tobytes() for key in weights)
    events = [json.loads(line) for line in (Path("runs") / "proof" / "events.jsonl").read_text().splitlines()]
    assert len({event["site"] for event in events if event["kind"] == "aggregator"}) == 3

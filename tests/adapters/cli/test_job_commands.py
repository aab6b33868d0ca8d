"""The commands `fl-adapters job ...` and `Production`, against a federation that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once
from study import Study, readdressed, until
from typer.testing import CliRunner

from fl_adapters import Job, Production, open_run
from fl_adapters.cli.app import app
from fl_runtime.errors import AbortedError, ConfigError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.version import VERSION

W = {"w": np.zeros(3, np.float32)}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as running:
        yield running


@pytest.fixture
def job(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `fl-adapters job WORDS --json` as lena; return what it prints as JSON, and check the exit status."""
    monkeypatch.chdir(tmp_path)
    kit = readdressed(study, "lena")

    def run(*words: str, status: int = 0) -> Any:
        done = CliRunner().invoke(app, ["job", *words, "--kit", str(kit), "--json"])
        assert done.exit_code == status, done.output
        return json.loads(done.stdout.splitlines()[-1])

    return run


def whole(study: Study, name: str, amount: float = 1.0) -> None:
    with ThreadPoolExecutor(len(study.sites)) as pool:
        sites = [
            pool.submit(
                study.site(site).take_part, W, lambda task: {"w": task.arrays["w"] + np.float32(amount)}, job=name
            )
            for site in study.sites
        ]
        for site in sites:
            site.result(60)
    assert study.server.wait_for_job(name, 30)


def test_a_day_of_an_admin(study: Study, job: Any, tmp_path: Path) -> None:
    for name, rounds in (("first", 2), ("second", 3)):
        Path(f"{name}.yml").write_text(f"name: {name}\napp: tumour\nrounds: {rounds}\n")
    assert job("submit", "first.yml")["state"] == "running"
    assert job("submit", "second.yml", "--priority", "5")["state"] == "queued"
    assert [(item["job"], item["state"]) for item in job("list")["jobs"]] == [
        ("first", "running"),
        ("second", "queued"),
    ]
    shown = job("show", "second")
    assert (shown["priority"], shown["settings"]["rounds"], shown["sites"]) == (5, 3, ["north", "south"])

    whole(study, "first")
    followed = job("follow", "first")
    assert (followed["job"], len(followed["rounds"])) == ("first", 2)
    assert {"started", "round_finished", "left"} <= {
        json.loads(line)["kind"] for line in (study.runs / "first" / "events.jsonl").read_text().splitlines()
    }
    told = CliRunner().invoke(app, ["job", "follow", "first", "--kit", str(readdressed(study, "lena"))]).stdout
    assert "first" in told and "sites" in told and "in all" in told, "the table of the rounds"
    lines = CliRunner().invoke(app, ["job", "logs", "first", "--kit", str(readdressed(study, "lena"))]).stdout
    assert "first server: round finished in round 2" in lines

    until(lambda: study.server.queue.record("second").state == "running", "the second job to start")
    whole(study, "second", 2.0)
    compared = job("compare", "first", "second")
    assert compared["settings"]["rounds"] == {"first": 2, "second": 3}
    assert compared["states"] == {"first": "finished", "second": "finished"}

    fetched = job("download", "first", "--out", "results")
    model = tmp_path / "results" / "model" / "model.safetensors"
    assert str(Path("results/model/model.safetensors")) in fetched["files"]
    assert model.read_bytes() == (study.runs / "first" / "model" / "model.safetensors").read_bytes()
    told = (
        CliRunner()
        .invoke(app, ["job", "download", "first", "--out", "results", "--kit", str(readdressed(study, "lena"))])
        .stdout
    )
    assert "open     safetensors.numpy.load_file('results/" in told and "again    fl-adapters report results" in told
    curves = (tmp_path / "results" / "tensorboard").is_dir()
    assert curves and f"curves   tensorboard --logdir {Path('results/tensorboard')}" in told
    job("delete", "first")
    assert not (study.runs / "first").exists()
    assert job("show", "first", status=1)["error"]["what"] == "there is no job 'first'"


def test_jobs_that_ended_long_ago_are_listed(study: Study, job: Any) -> None:
    admin, kit = study.admin("ada"), str(readdressed(study, "lena"))
    names = [f"job-{number}" for number in range(1, 24)]
    for name in names:
        study.job(name)
        admin.ask("AbortJob", job=name)
    newest = job("list")
    assert [item["job"] for item in newest["jobs"]] == names[-20:]
    older = job("list", "--before", str(newest["older"]))
    assert ([item["job"] for item in older["jobs"]], older["older"]) == (names[:3], None)
    shown = CliRunner().invoke(app, ["job", "list", "--kit", kit])
    assert f"for older jobs: fl-adapters job list --kit {kit} --before {newest['older']}\n" in shown.stderr
    shown = CliRunner().invoke(app, ["job", "list", "--kit", kit, "--before", "1"])
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "no job is older\n", "")


def test_logs_are_followed_to_the_end_with_the_lines_that_sites_share(study: Study) -> None:
    study.job("early")
    north, kit = study.admin("north"), str(readdressed(study, "lena"))
    north.ask("TellLog", job="early", text="its command ended (exit status 1)\x1b[2J", level="warning")
    with pytest.raises(ConfigError, match="does not run with north"):
        north.ask("TellLog", job="late", text="its command runs")
    until(lambda: "its command" in (study.runs / "early" / "events.jsonl").read_text(), "the line on the disk")
    follow = ["job", "logs", "early", "--kit", kit, "--follow"]
    with ThreadPoolExecutor(1) as pool:
        logs = pool.submit(CliRunner().invoke, app, follow)
        whole(study, "early")
        lines = logs.result(60).stdout.splitlines()
    assert "\x1b" not in "".join(lines)
    shared = "north: warning: its command ended (exit status 1)"
    for once in ("server: round finished in round 1", "server: round finished in round 2", shared):
        assert len([line for line in lines if once in line]) == 1, lines
    assert any("early server: finished" in line for line in lines)


def test_logs_show_every_training_of_a_script(study: Study) -> None:
    study.job("twice", trainings=2)

    def take_part(name: str) -> None:
        for training in (1, 2):
            site = study.site(name)
            site.welcome = site.client.join("twice", training)
            site.register(W)
            task = site.start(W)
            while task.kind == "train":
                site.submit(task, {"w": task.arrays["w"] + np.float32(1)})
                task = site.client.next_task()
            site.client.leave("done", early=False, stays=training == 1)
            site.client.close()

    at_once(study.sites, take_part)
    assert study.server.wait_for_job("twice", 30)
    kit = str(readdressed(study, "lena"))
    told = [
        CliRunner().invoke(app, ["job", "logs", "twice", "--kit", kit, *more]).stdout.splitlines()
        for more in ([], ["--follow"])
    ]
    for number in (1, 2):
        rounds = [line for line in told[0] if f"server: round finished in round {number}" in line]
        assert len(rounds) == 2, "one of each training"
    assert told[0] == sorted(told[0], key=lambda line: line[:19]), "in the order of time"
    assert told[0] == told[1]


def test_a_job_that_was_aborted_is_resumed(study: Study, job: Any) -> None:
    Path("one.yml").write_text("name: one\napp: tumour\nrounds: 2\n")
    job("submit", "one.yml")
    assert job("abort", "one") == {"job": "one", "ended": True}
    assert job("follow", "one", status=1)["error"]["code"] == AbortedError.code
    assert job("resume", "one") == {"job": "one", "state": "running"}
    whole(study, "one")
    shown = job("show", "one")
    assert (shown["state"], shown["versions"]) == ("finished", {"north": VERSION, "south": VERSION})
    text = CliRunner().invoke(app, ["job", "show", "one", "--kit", str(readdressed(study, "lena"))]).stdout
    assert f"  north: has taken part; fl-adapters {VERSION}\n" in text


def test_production_submits_and_attaches(study: Study, tmp_path: Path) -> None:
    production = Production(readdressed(study, "lena"), quiet=True)
    filters = [{"name": "AllowMetrics", "names": ["loss"]}]
    own = {"seed": 3, "keep_local": ("bn.*",), "best_mode": "max", "filters": filters}
    name = production.submit(Job(app="tumour", name="job", rounds=2, **own))
    assert [item["state"] for item in production.jobs()] == ["running"]
    with ThreadPoolExecutor(1) as pool:
        attached = pool.submit(production.attach, name)
        whole(study, name)
        result = attached.result(60)
    assert len(result.rounds) == 2
    final = read_tensors(Path(result.folder) / "model" / "model.safetensors")
    for loaded in (result.load(folder=tmp_path / "got"), open_run(tmp_path / "got").load()):
        assert loaded.keys() == final.keys()
        assert all(np.array_equal(loaded[name], array) for name, array in final.items())
    files = production.download(name, tmp_path / "out")
    assert tmp_path / "out" / "model" / "model.safetensors" in files
    again = Job.from_file(tmp_path / "out" / "job.yml").model_copy(update={"name": "other"})
    second = production.submit(again)
    given = [study.admin("mina").ask("ShowJob", job=each)["settings"] for each in (name, second)]
    assert given[1] == given[0] | {"name": "other"}
    production.abort(second)
    with pytest.raises(AbortedError, match="lena"):
        production.attach(second)
    production.resume(second)
    assert production.jobs()[-1]["state"] == "running"

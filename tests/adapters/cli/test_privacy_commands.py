"""The commands `fl-adapters privacy ...`, against dp-accounting and against the jobs that follow their advice."""

from __future__ import annotations

import html
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from study import Study, readdressed
from typer.testing import CliRunner

from fl_adapters import Job, connect
from fl_adapters.cli.app import app
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.audit import entries

dp_accounting = pytest.importorskip("dp_accounting")


def said(*args: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["privacy", *args])
    assert done.exit_code == status, done.output
    return done.output


def planned(*args: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["privacy", "plan", *args, "--json"])
    assert done.exit_code == 0, done.output
    plan: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return plan


def exact(noise: float, rounds: int, delta: float) -> float:
    """Epsilon by dp-accounting of rounds with sensitivity 2."""
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.GaussianDpEvent(noise / 2), rounds)
    return float(accountant.get_epsilon(delta))


def test_the_plan_is_that_of_dp_accounting() -> None:
    plan = planned("--epsilon", "8", "--delta", "1e-5", "--rounds", "20", "--clip", "0.5")
    assert [row["rounds"] for row in plan["rows"]] == [5, 10, 20, 40, 80]
    for row in plan["rows"]:
        assert exact(row["noise_multiplier"], row["rounds"], 1e-5) == pytest.approx(8, rel=0.01)
        assert exact(row["noise_multiplier"], 1, 1e-5) == pytest.approx(row["epsilon_of_a_round"], rel=0.01)
        assert row["noise_of_a_number"] == pytest.approx(row["noise_multiplier"] * 0.5)
    assert plan["noise_multiplier"] == plan["rows"][2]["noise_multiplier"]


def test_the_table_says_what_epsilon_is_about_and_gives_the_line_for_the_job_file(tmp_path: Path) -> None:
    text = said("plan", "--epsilon", "8", "--delta", "1e-5", "--rounds", "20")
    assert "It protects a site's whole update of a round" in text and "not a single record" in text
    file = tmp_path / "job.yml"
    file.write_text("app: train.py\nrounds: 20\n" + text.splitlines()[-1].strip())
    (item,) = Job.from_file(file).filters
    assert item == {"name": "GaussianDP", "epsilon": 8.0, "delta": 1e-5}


def test_a_multiplier_that_is_copied_from_the_table_holds_and_a_smaller_one_is_refused() -> None:
    sites = ("--sites", "10", "--fraction", "0.3", "--seed", "4")
    noise = planned("--epsilon", "2", "--rounds", "12", *sites)["noise_multiplier"]
    job = {"app": "train.py", "rounds": 12, "sites": 10, "fraction": 0.3, "seed": 4}
    Job(**job, filters=({"name": "GaussianDP", "epsilon": 2, "noise_multiplier": noise},))
    with pytest.raises(ConfigError, match="the budget is 2"):
        Job(**job, filters=({"name": "GaussianDP", "epsilon": 2, "noise_multiplier": noise * 0.99},))


def test_a_job_file_is_planned_and_options_replace_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "job.yml"
    filters = [{"name": "GaussianDP", "epsilon": 4, "clip": 0.1, "at": "server_in"}]
    file.write_text(yaml.safe_dump({"app": "train.py", "rounds": 9, "sites": 4, "fraction": 0.5, "filters": filters}))
    plan = planned("--job", str(file))
    assert plan["rounds"] == 9 and plan["filter"] == filters[0]
    assert exact(plan["noise_multiplier"], 9, 1e-5) == pytest.approx(4, rel=0.01)  # the server adds it in every round
    assert planned("--job", str(file), "--epsilon", "1")["noise_multiplier"] > plan["noise_multiplier"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--rounds", "3"], "give --epsilon"),
        (["--epsilon", "8"], "give --rounds"),
        (["--epsilon", "8", "--rounds", "3", "--delta", "2"], "delta is 2.0"),
        (["--epsilon", "8", "--rounds", "3", "--adjacency", "add"], "adjacency is 'add'"),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_names_the_option(args: list[str], text: str) -> None:
    assert text in said("plan", *args, status=1)


@pytest.mark.parametrize("command", ["show", "plan", "report"])
def test_every_command_has_help_with_an_example_and_json(command: str) -> None:
    text = said(command, "--help")
    assert "--json" in text and f"fl-adapters privacy {command} " in text.partition("Examples:")[2]


def test_a_folder_in_place_of_a_command_shows_its_ledger(tmp_path: Path) -> None:
    assert "there is no privacy ledger in this folder" in said(str(tmp_path), status=1)


# -- the report ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit of a site that took part in a job with noise, and was kept out of another one by its policy."""
    with Study(tmp_path_factory.mktemp("study")) as study:
        kits = {name: readdressed(study, name) for name in study.sites}
        (kits["north"] / "policy.yml").write_text(
            "filters: [{name: GaussianDP, epsilon: 8, clip: 0.5}, {name: AllowMetrics, names: ['<loss>']}]\n"
            "strategies: [fedavg]"
        )
        (kits["south"] / "policy.yml").write_text("")  # so that it trains the second job alone
        study.job("tumour", rounds=3)
        trained(kits)
        study.job("second", by="ada", rounds=1, strategy="median", min_sites=1)
        trained(kits)
    return kits["north"]


def trained(kits: dict[str, Path]) -> None:
    """Let all sites take part in the job that is running, each in a thread."""

    def work(name: str) -> None:
        weights = {"w": np.zeros((4, 5), np.float32), "b": np.zeros(3, np.float32)}
        try:
            with connect(kit=str(kits[name])) as site:
                for task in site.tasks(initial=weights):
                    arrays = {n: a + 1 for n, a in task.arrays.items()}
                    task.submit(arrays, num_examples=37, metrics={"<loss>": 0.5, "patients": 12.0})
        except FederationError:
            assert name == "north"
        finally:
            close_sessions("its script ended before the last round", read_kit(kits[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in kits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def reported(kit: Path, out: Path, *args: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["privacy", "report", str(kit), "--out", str(out), *args, "--json"])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "exit": done.exit_code}


def test_the_report_names_what_left_when_and_to_whom(kit: Path, tmp_path: Path) -> None:
    report = reported(kit, tmp_path)
    assert report["exit"] == 0 and report["log"]["findings"] == []
    assert (report["site"], report["organisation"]) == ("north", "north-hospital")
    log = entries(kit)
    left = [e for e in log if e["action"] in ("handshake", "update", "report", "left") and e["outcome"] == "done"]
    assert [(d["line"], d["time"]) for d in report["departures"]] == [(e["number"], e["time"]) for e in left]

    updates = [d for d in report["departures"] if d["what"] == "weights"]
    assert [d["round"] for d in updates] == [1, 2, 3]
    for update in updates:
        assert (update["tensors"], update["numbers"], update["bytes"]) == (2, 23, 92)
        assert update["metrics"] == {"<loss>": 0.5} and update["num_examples"] == 37
        assert any("GaussianDP(" in f and "spent=" in f and "by the site's policy" in f for f in update["filters"])
    job = report["jobs"][0]
    assert (job["job"], job["rounds"], job["submitted_by"]) == ("tumour", 3, log[0]["submitted_by"])
    sums = [sum(e.get(field, 0) for e in left if e["job"] == "tumour") for field in ("numbers", "bytes")]
    assert [job["numbers"], job["bytes"]] == sums and job["metrics"] == ["<loss>"]
    (spent,) = report["spent"]
    assert (spent["job"], spent["protects"], spent["rounds"]) == ("tumour", "update", 3)
    noise = planned("--epsilon", "8", "--rounds", "3")
    assert spent["epsilon"] == pytest.approx(exact(noise["noise_multiplier"], 3, 1e-5), rel=0.01)
    (refusal,) = report["refused"]
    assert refusal["job"] == "second" and "strategies" in refusal["rule"]


def test_the_page_is_one_file_in_html_and_one_in_text_with_the_same_facts(kit: Path, tmp_path: Path) -> None:
    report = reported(kit, tmp_path)
    page, text = (Path(file).read_text() for file in report["files"])
    assert page.startswith("<!doctype html>") and not re.search("<script|https?:|src=|href=", page)
    assert "&lt;loss&gt;=0.5" in page and "<loss>" not in page
    flat = html.unescape(page)
    for fact in (
        f"To whom: the server {report['server']}",
        "sites' weights on to: south.",
        "intact: no line was edited",
        "a site's whole update of a round",
        "strategies: median is not one of fedavg",
        "What this page does not count",
    ):
        assert fact in flat and fact.split(":")[0] in text, fact
    for departure in report["departures"]:
        assert departure["time"][:19].replace("T", " ") in flat and departure["what"] in flat


def test_a_report_of_one_job_and_one_of_an_unknown_one(kit: Path, tmp_path: Path) -> None:
    report = reported(kit, tmp_path, "--job", "second")
    assert report["spent"] == [] and {d["job"] for d in report["departures"]} <= {"second"}
    assert "nothing is on record about the job third" in said("report", str(kit), "--job", "third", status=1)


def test_a_log_that_was_edited_is_told_and_changes_the_exit_status(kit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in kit.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "audit.jsonl").write_text((kit / "audit.jsonl").read_text().replace('"bytes": 92', '"bytes": 9', 1))
    report = reported(copy, tmp_path / "out")
    assert report["exit"] == 1 and any("edited" in what for what in report["log"]["findings"])
    assert "not intact" in Path(report["files"][1]).read_text()


def test_a_folder_that_is_no_sites_kit_is_refused_in_words(kit: Path, tmp_path: Path) -> None:
    assert "startup kit" in said("report", str(tmp_path), status=1)
    assert "this is the kit of a server" in said("report", str(kit.parents[1] / "kits" / "server"), status=1)

"""The commands `fl-adapters privacy ...`, against dp-accounting and against the jobs that follow their advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fl_adapters import Job
from fl_adapters.cli.app import app
from fl_runtime.errors import ConfigError

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


@pytest.mark.parametrize("command", ["show", "plan"])
def test_every_command_has_help_with_an_example_and_json(command: str) -> None:
    text = said(command, "--help")
    assert "--json" in text and f"fl-adapters privacy {command} " in text.partition("Examples:")[2]


def test_a_folder_in_place_of_a_command_shows_its_ledger(tmp_path: Path) -> None:
    assert "there is no privacy ledger in this folder" in said(str(tmp_path), status=1)

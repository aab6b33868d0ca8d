"""Evaluations in real runs: a simulation of files, the example of the page, and sites whose policies refuse."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documented import Page
from sklearn import metrics as sk
from study import Study, readdressed
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.evaluation import Evaluation, evaluate
from fl_adapters.evaluation.files import predictions
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.errors import ConfigError

SITES = ("north", "south", "west")


def rows(site: int, count: int = 120) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(site)
    signal = rng.normal(size=count)
    truth = (signal + rng.normal(size=count) > 0).astype(int)
    return truth, 1 / (1 + np.exp(-signal)), rng.choice(["f", "m"], count)


def test_files_of_sites_are_scored_in_a_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, site in enumerate(SITES[:2]):
        with open(f"{site}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["sick", "new", "rule", "sex"])
            table.writerows((y, float(p), int(p > 0.7), g) for y, p, g in zip(*rows(number), strict=True))
    options = ["--truth", "sick", "--prediction", "new", "--prediction", "rule", "--group", "sex"]
    done = CliRunner().invoke(app, ["evaluate", "{site}.csv", *options, "--sites", "north,south", "--name", "check"])
    assert done.exit_code == 0, done.output
    found = Evaluation.read("runs/check/evaluation.json")
    truth, probability, sex = (np.concatenate(parts) for parts in zip(rows(0), rows(1), strict=True))
    scores = found.models["new"].overall.metrics
    assert scores["log_loss"] == pytest.approx(sk.log_loss(truth, probability))
    assert found.models["rule"].overall.metrics["f1"] == pytest.approx(sk.f1_score(truth, probability > 0.7))
    group = found.models["new"].groups["sex"]["f"]
    assert group.metrics["brier"] == pytest.approx(sk.brier_score_loss(truth[sex == "f"], probability[sex == "f"]))
    assert (found.sites, found.rows) == (("north", "south"), 240)
    for line in str(found).splitlines():
        assert line in done.output


def test_the_example_of_the_page_runs_alone(tmp_path: Path) -> None:
    script = Page("evaluation.md").files("The shortest example")["score.py"]
    (tmp_path / "score.py").write_text(script)
    done = subprocess.run([sys.executable, "score.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "500 rows of 1 sites: local" in done.stdout and "new, by sex" in done.stdout


def test_sites_whose_policies_refuse_are_named_and_stricter_ones_hold(tmp_path: Path) -> None:
    sites = ("north", "south", "west", "east")
    with Study(tmp_path, sites) as study:
        study.job(sites=sites, min_sites=4)
        kits = {name: readdressed(study, name) for name in sites}
        (kits["north"] / "policy.yml").write_text("evaluation: false\n")
        (kits["south"] / "policy.yml").write_text("evaluation: {smallest_cell: 200}\n")
        (kits["west"] / "policy.yml").write_text("site_metrics: false\nmin_cohort: 2\n")

        def work(number: int) -> Evaluation:
            kit = kits[sites[number]]
            truth, probability, sex = rows(number)
            try:
                return evaluate(truth, probability, groups={"sex": sex}, kit=str(kit))
            finally:
                close_sessions("its script ended", read_kit(kit))

        with ThreadPoolExecutor(len(sites)) as pool:
            found = list(pool.map(work, range(len(sites))))
        assert len({one.to_json() for one in found}) == 1
        reasons = {absence.site: absence.reason for absence in found[0].absences}
        assert reasons == {
            "north": "its policy says evaluation: false",
            "south": "it has fewer than 200 rows",
        }
        assert found[0].sites == ("west", "east") and list(found[0].models["model"].per_site) == ["east"]
        truth = np.concatenate([rows(2)[0], rows(3)[0]])
        probability = np.concatenate([rows(2)[1], rows(3)[1]])
        assert found[0].models["model"].overall.metrics["brier"] == pytest.approx(
            sk.brier_score_loss(truth, probability)
        )
        left = [path.parent for path in tmp_path.rglob("evaluation.json")]
        assert len(left) == len(sites)  # each site has it in its own folder of the job


def test_a_document_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "models": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no evaluation"):
            Evaluation.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Evaluation.read(tmp_path / "none.json")


def test_a_saved_document_is_read_as_it_was(tmp_path: Path) -> None:
    truth, probability, sex = rows(0)
    found = evaluate(truth, probability, groups={"sex": sex})
    assert Evaluation.read(found.save(tmp_path / "here" / "e.json")) == found
    assert json.loads((tmp_path / "here" / "e.json").read_text())["format"] == 1


def test_columns_of_files_are_labels_or_scores() -> None:
    assert predictions(["0", "1"]).dtype.kind == "i" and predictions(["0.0", "1"]).dtype.kind == "f"
    assert predictions(["a", "1"]).tolist() == ["a", "1"]

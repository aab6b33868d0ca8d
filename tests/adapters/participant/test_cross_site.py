"""Cross-site evaluation: after the last round, every site's model is scored on every site's data."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.environments.report import heatmap
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.aggregation import FedAvg
from fl_runtime.errors import ConfigError, HandshakeError
from fl_runtime.server.records.history import write_matrix
from fl_runtime.types import Arrays

CENTRES = np.array([[0.0, 1.0], [4.0, 0.0], [-2.0, 6.0]])
EXAMPLES = (3, 1, 2)


def distance(arrays: Arrays, index: int) -> float:
    return float(((arrays["w"] - CENTRES[index]) ** 2).sum())


def loop(place: Place, extras: bool = False, evaluates: bool = True) -> Arrays:
    """Move half of the way to the site's own target in every round."""

    def evaluate(arrays: Arrays) -> tuple[dict[str, float], int]:
        return {"loss": distance(arrays, place.index)}, 1

    with fl.connect(kit=place.kit) as site:
        tasks = site.tasks(initial={"w": np.zeros(2)}, evaluate=evaluate if evaluates else None)
        for task in tasks:
            moments = {"exp_avg": np.ones(2)} if extras else None
            new = {"w": (task.arrays["w"] + CENTRES[place.index]) / 2}
            task.submit(new, num_examples=EXAMPLES[place.index], extras=moments)
        return site.arrays


def wanted(rounds: int) -> dict[str, dict[str, float]]:
    x = np.zeros(2)
    for _ in range(rounds):
        own = (x + CENTRES) / 2
        x = np.array(EXAMPLES) @ own / sum(EXAMPLES)
    models = {"global": x} | {f"site-{i + 1}": own[i] for i in range(3)}
    return {
        name: {f"site-{i + 1}": float(((w - CENTRES[i]) ** 2).sum()) for i in range(3)} for name, w in models.items()
    }


def matrix_of(federation: LocalFederation) -> dict[str, Any]:
    (event,) = [event for event in federation.events if event.kind == "cross_site"]
    return dict(event.data["matrix"])


@pytest.mark.parametrize("extras", [False, True])
def test_the_matrix_is_that_of_plain_numpy(extras: bool) -> None:
    with LocalFederation(sites=3, rounds=3, cross_site=True) as federation:
        finals = federation.run(lambda place: loop(place, extras=extras))
        rounds = federation.result().rounds
    found = matrix_of(federation)
    assert {m: {s: pytest.approx(v["loss"]) for s, v in row.items()} for m, row in found.items()} == wanted(3)
    # what others have sent leaves no trace in the run's own numbers
    assert [result.round for result in rounds] == [1, 2, 3]
    assert all(np.array_equal(arrays["w"], finals["site-1"]["w"]) for arrays in finals.values())


@dataclass(frozen=True)
class OwnModelsAtHome(FedAvg):
    """A workflow in which every site scores the global model and its own, and receives no other site's."""

    name: ClassVar[str] = "own-models-at-home"

    def scored_by(self, site: str, models: Sequence[str]) -> Sequence[str]:
        return [name for name in models if name in ("global", site)]


def test_a_workflow_says_who_evaluates_what() -> None:
    with LocalFederation(sites=3, rounds=3, cross_site=True, workflow=OwnModelsAtHome()) as federation:
        federation.run(loop)
        federation.result()
    full = wanted(3)
    kept = {m: {s: v for s, v in row.items() if m in ("global", s)} for m, row in full.items()}
    found = matrix_of(federation)
    assert {m: {s: pytest.approx(v["loss"]) for s, v in row.items()} for m, row in found.items()} == kept


def test_a_site_that_was_not_drawn_last_is_there_with_its_last_update() -> None:
    with LocalFederation(sites=3, rounds=4, cross_site=True, fraction=0.3, min_sites=1) as federation:
        federation.run(loop)
        taken = {name for result in federation.result().rounds for name in result.sites}
    assert set(matrix_of(federation)) == {"global", *taken}


def test_without_the_job_asking_nobody_gets_anothers_model() -> None:
    with LocalFederation(sites=2, rounds=2) as federation:
        federation.run(loop)
        federation.result()
    assert not [event for event in federation.events if event.kind in ("cross_site", "cross_score")]


def test_a_site_that_cannot_evaluate_is_refused_before_round_1() -> None:
    with LocalFederation(sites=2, rounds=2, cross_site=True) as federation:
        outcomes = federation.outcomes(
            {place.name: lambda place: loop(place, evaluates=place.index == 0) for place in federation.places},
            check=False,
        )
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError)
        assert "cross-evaluation" in str(outcome.error)
        assert "site-2" in str(outcome.error)


def test_csv_json_and_heat_map(tmp_path: Path) -> None:
    matrix = {
        "global": {"a": {"loss": 0.5, "accuracy": 0.9}, "b": {"loss": 0.25, "accuracy": float("nan")}},
        "a": {"a": {"loss": 0.1}},
    }
    assert heatmap.draw(tmp_path) is None
    write_matrix(tmp_path, matrix)
    with open(tmp_path / "cross_site.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["model"], r["site"], r["metric"]): float(r["value"]) for r in rows}["global", "b", "loss"] == 0.25
    assert json.loads((tmp_path / "cross_site.json").read_text())["a"] == {"a": {"loss": 0.1}}
    pytest.importorskip("matplotlib")
    picture = heatmap.draw(tmp_path)
    assert picture is not None
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_a_site_holds_back_is_that_of_the_global_model() -> None:
    """`ExcludeVars`, and LoRA factors that stay fixed in a round."""
    found: dict[str, list[list[float]]] = {}

    def site(place: Place) -> None:
        def evaluate(arrays: Arrays) -> tuple[dict[str, float], int]:
            if place.index == 0:
                found.setdefault(json.dumps([a.tolist() for a in arrays.values()]), [])
            return {"loss": float(sum(a.sum() for a in arrays.values()))}, 1

        with fl.connect(kit=place.kit) as joined:
            initial = {"w": np.zeros(2), "kept": np.full(2, 7.0)}
            for task in joined.tasks(initial=initial, evaluate=evaluate):
                task.submit({n: a + place.index + 1 for n, a in task.arrays.items()}, num_examples=1)

    filters = ({"name": "ExcludeVars", "names": ["kept"]},)
    with LocalFederation(sites=2, rounds=1, cross_site=True, filters=filters) as federation:
        federation.run(site)
        federation.result()
    assert list(found) == ["[[1.5, 1.5], [7.0, 7.0]]", "[[1.0, 1.0], [7.0, 7.0]]", "[[2.0, 2.0], [7.0, 7.0]]"]
    assert {m: row["site-2"]["loss"] for m, row in matrix_of(federation).items()} == {
        "global": 17,
        "site-1": 16,
        "site-2": 18,
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"filters": [{"name": "Quantize", "to": "int8"}]}, "Quantize"),
        ({"filters": [{"name": "PercentilePrivacy"}]}, "PercentilePrivacy"),
        ({"strategy": "flora"}, "FLoRA"),
        ({"strategy": "tree-bagging"}, "TreeBagging"),
        ({"strategy": "fedbuff"}, "fedbuff"),
    ],
)
def test_jobs_whose_sites_send_no_models_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="cross_site") as caught:
        fl.Job(app="train.py", rounds=2, cross_site=True, **fields)
    assert named in str(caught.value)
    fl.Job(app="train.py", rounds=2, cross_site=True, filters=[{"name": "RoundMetrics"}])


SCRIPT = """
import numpy as np, fl_adapters as fl
index = fl.site().index
with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(2)}, evaluate=lambda a: ({"loss": float(a["w"].sum())}, 1)):
        task.submit({"w": task.arrays["w"] + index}, num_examples=1)
"""


def test_a_simulation_leaves_the_matrix(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    job = fl.Job(app=str(tmp_path / "train.py"), name="crossed", rounds=2, sites=2, cross_site=True)
    result = job.run(fl.Simulation(folder=tmp_path, quiet=True))
    matrix = json.loads((result.folder / "cross_site.json").read_text())
    assert {name: row["site-1"]["loss"] for name, row in matrix.items()} == {"global": 2, "site-1": 1, "site-2": 3}
    assert (result.folder / "cross_site.csv").exists()

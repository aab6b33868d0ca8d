"""A participant with a valid certificate that turns on the others: its own part fails, and theirs goes on."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once, errors_together, registered, started
from study import Study, until

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.errors import HandshakeError, ProtocolError, RoundFailedError, SiteExcludedError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

W = {"w": np.zeros(4, np.float32)}

# Metrics whose pooling overflows, divides by zero, or leaves the domain of a function.
METRICS: dict[str, Any] = {
    "a square that overflows": {"kind": "root_mean", "value": 1e200, "weight": 1},
    "a sum that overflows": {"kind": "mean", "value": 1.7e308, "weight": 1e18},
    "the tiniest counts": {
        "kind": "auc",
        "value": 0.5,
        "weight": 1,
        "histogram": [[0, 5e-324, 5e-324], [1, 1, 5e-324]],
    },
    "lopsided counts": {
        "kind": "aucpr",
        "value": 0.5,
        "weight": 1,
        "histogram": [[0, 1e18, 5e-324], [1, 5e-324, 1e18]],
    },
    "no negatives": {"kind": "auc", "value": 0.5, "weight": 1, "histogram": [[0, 0, 3]]},
    "no positives": {"kind": "aucpr", "value": 0.5, "weight": 1, "histogram": [[0, 3, 0]]},
    "a plain number that is infinite": "inf",
}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as study:
        yield study


def whole_job(study: Study, name: str, metrics: str = "{}") -> None:
    """Run a job of one round to its end. North reports `metrics` of the final model."""
    study.job(name, rounds=1)
    sites = [study.site(site) for site in study.sites]
    tasks = started(sites, W, evaluates=True)

    def take_part(site: Site) -> None:
        site.submit(tasks[site.name], {"w": W["w"] + 1})
        final = site.client.next_task()
        text = metrics if site.name == "north" else '{"loss": 0.5}'
        session = pb.Session(job=name, attempt=site.welcome.attempt)
        request = pb.ScoreRequest(session=session, version=final.version, metrics_json=text, num_examples=1)
        list(site.transport.call("Score", request.SerializeToString()))
        site.client.leave("done", early=False)

    at_once(sites, take_part)
    assert study.server.wait_for_job(name, 30)


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_a_metric_of_any_size_neither_ends_the_job_nor_blocks_the_next(study: Study, metric: str) -> None:
    whole_job(study, "first", json.dumps({"loss": METRICS[metric]}))
    assert study.server.outcome("first")["error"] is None
    whole_job(study, "second")
    assert study.server.outcome("second")["error"] is None


@pytest.mark.parametrize("name", ["current.json", "job.json", "outcome.json", "server", "2"])
def test_no_name_of_a_job_collides_with_a_file_of_the_server(study: Study, name: str) -> None:
    whole_job(study, name)
    whole_job(study, "next")
    study.server.close()
    study.start()
    whole_job(study, "after-a-restart")
    assert (study.runs / name / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("damage", ["no json", "other settings", "no journal"])
def test_a_server_starts_whatever_became_of_its_job_and_names_it(study: Study, damage: str) -> None:
    study.job("lost")
    study.server.close()
    if damage == "no json":
        (study.runs / "lost" / "job.json").write_text("{")
    elif damage == "other settings":
        fields = json.loads((study.runs / "lost" / "job.json").read_text())
        fields["settings"]["a setting of a later version"] = 1
        (study.runs / "lost" / "job.json").write_text(json.dumps(fields))
    else:
        for file in (study.runs / "lost" / "server").glob("journal.sqlite*"):  # the write-ahead log, too
            file.unlink()
        (study.runs / "lost" / "server" / "journal.sqlite").write_bytes(b"not a database" * 1000)
    study.start()
    assert study.server.outcome("lost")["error"]["what"]
    assert any(entry["action"] == "job not continued" and entry["job"] == "lost" for entry in study.log())
    whole_job(study, "next")
    assert study.server.outcome("next")["error"] is None


def test_of_the_updates_of_sites_nothing_is_left_after_the_job(study: Study) -> None:
    whole_job(study, "job")
    folder = study.runs / "job"
    until(lambda: not list((folder / "server" / "blobs").glob("update-*")), "the updates to be deleted")
    tensors = [read_tensors(path) for path in (folder / "server" / "blobs").iterdir() if path.suffix == ".safetensors"]
    assert all(np.array_equal(arrays["w"], W["w"] + 1) for arrays in tensors)  # the model of round 1 alone
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("strategy", ["fedavgm:lr=4", "fedadam:lr=0.1", "fedyogi:lr=0.1", "fedadagrad:lr=0.1"])
def test_updates_whose_sum_is_not_finite_make_no_model(strategy: str) -> None:
    """Each update is finite; the server's step, or its second moment, is not. The round fails and says who it was.

    Two of three sites send such updates, so nobody can say who is right.
    """

    def site(place: Place) -> None:
        with fl.connect(kit=place.kit) as joined:
            for task in joined.tasks(initial=W):
                large = task.round == 2 and place.index > 0
                task.submit({"w": task.arrays["w"] + np.float32(3e38 if large else 1)}, num_examples=1)

    with LocalFederation(sites=3, rounds=3, strategy=strategy) as federation:
        outcomes = federation.outcomes(dict.fromkeys(("site-1", "site-2", "site-3"), site), check=False)
        model = federation.model()
    assert np.isfinite(model["w"]).all()
    for outcome in outcomes.values():
        assert isinstance(outcome.error, RoundFailedError)
        assert "the new global model is not finite" in str(outcome.error)
        assert "site-2 (norm 6e+38), site-3 (norm 6e+38), site-1 (norm" in str(outcome.error)


def test_a_site_whose_finite_updates_make_no_model_is_excluded_and_the_job_goes_on(tmp_path: Path) -> None:
    """The model would be finite after round 1, and the next sums, or the next training, would not."""
    with Study(tmp_path, ("north", "south", "west")) as study:
        study.job("job", strategy="fedavg", min_sites=2)
        sites = {name: study.site(name) for name in study.sites}
        tasks = started(sites.values(), W)

        def take_part(name: str) -> Any:
            task = tasks[name]
            while task.kind == "train":
                value = np.float32(3e38) if name == "west" else task.arrays["w"] + np.float32(len(name))
                sites[name].submit(task, {"w": np.broadcast_to(value, (4,)).copy()})
                task = sites[name].client.next_task()
            final = np.copy(task.arrays["w"])
            sites[name].client.leave("done", early=False)
            return final

        errors = errors_together(*(lambda name=name: take_part(name) for name in study.sites))  # type: ignore[misc]
        assert errors[:2] == [None, None] and isinstance(errors[2], SiteExcludedError)
        with pytest.raises(SiteExcludedError, match="west is excluded from this run: round 1 failed with its updates"):
            study.site("west").join()
        assert study.server.wait_for_job("job", 30)
        assert study.server.outcome("job")["error"] is None
        model = read_tensors(study.runs / "job" / "model" / "model.safetensors")
        np.testing.assert_array_equal(model["w"], np.full(4, 2 * 5, np.float32))  # two rounds of north and south


def test_a_number_of_examples_of_any_size_does_not_take_the_model(tmp_path: Path) -> None:
    with Study(tmp_path, ("north", "south", "west")) as study:
        job = study.job(rounds=1, max_share=0.4)
        sites = [study.site(name) for name in study.sites]
        tasks = started(sites, W)
        examples = {"north": 2**53, "south": 30, "west": 60}
        values = {"north": 1000.0, "south": 1.0, "west": 2.0}
        for site in sites:
            site.submit(tasks[site.name], {"w": W["w"] + values[site.name]}, examples[site.name])
        finals = at_once(sites, lambda site: site.client.next_task().arrays["w"].tolist())
        for site in sites:
            site.client.leave("done", early=False)
        assert study.server.wait_for_job(job, 30)
        events = [json.loads(line) for line in (study.runs / job / "events.jsonl").open(encoding="utf-8")]
    # 0.4 for north; 30 : 60 would be 0.2 and 0.4
    np.testing.assert_allclose(finals, [[0.4 * 1000 + 0.2 * 1 + 0.4 * 2] * 4] * 3, rtol=1e-6)
    (warning,) = [event for event in events if event["kind"] == "warning"]
    assert warning["site"] == "north" and "scaled down to max_share=0.4" in str(warning)


ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\n=cmd()|x!A1\u202e"


@pytest.mark.parametrize("name", [ESCAPES, "=1+1", "@SUM(A1)", "a\nb", "", "x" * 201], ids=repr)
def test_a_metric_has_a_name_that_can_stand_on_a_screen_and_in_a_table(study: Study, name: str) -> None:
    with pytest.raises(ProtocolError, match="a metric cannot be called"):
        whole_job(study, "job", json.dumps({name: 1.0}))


def test_nothing_that_a_site_writes_steers_a_terminal(study: Study) -> None:
    study.job(rounds=1)
    north, south = (study.site(name) for name in study.sites)
    registered([north, south], W, info={"python": ESCAPES}, agreement={"labels": ESCAPES})
    north.client.leave(ESCAPES, early=True)
    until(lambda: [entry for entry in study.log() if entry["action"] == "failed"], "the job to end")
    texts = [str(errors_together(south.client.next_task)[0]), json.dumps(study.server.outcome("job")["error"])]
    texts += [path.read_text("utf-8") for path in study.runs.rglob("*.csv")]
    texts += [
        str(json.loads(line)) for path in study.runs.rglob("events.jsonl") for line in path.open(encoding="utf-8")
    ]
    shown = [text for text in texts if "owned" in text]
    assert shown and all(text.replace("\n", "").isprintable() for text in texts)


def adding_one(model: dict[str, Any], **options: Any) -> Any:
    def work(place: Place) -> Any:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=model, **options):
                task.submit({name: array + 1 for name, array in task.arrays.items()}, num_examples=1)
        return site.arrays

    return work


OTHERS: dict[str, Any] = {
    "another shape": adding_one({"w": np.zeros(5, np.float32)}),
    "another name": adding_one({"v": np.zeros(4, np.float32)}),
    "other labels": adding_one(W, agreement={"labels": ["dog", "cat"]}),
}


@pytest.mark.parametrize("odd", OTHERS)
@pytest.mark.parametrize("which", ["site-1", "site-3"])
def test_a_site_that_does_not_fit_leaves_and_the_others_begin(odd: str, which: str) -> None:
    fits = adding_one(W, agreement={"labels": ["cat", "dog"]}) if odd == "other labels" else adding_one(W)
    with LocalFederation(sites=3, min_sites=2, rounds=2) as federation:
        work = {place.name: OTHERS[odd] if place.name == which else fits for place in federation.places}
        outcomes = federation.outcomes(work, check=False)
        result = federation.result()
    assert isinstance(outcomes.pop(which).error, HandshakeError)
    assert all(len(item.sites) == 2 and which not in item.sites for item in result.rounds) and len(result.rounds) == 2
    for outcome in outcomes.values():
        np.testing.assert_array_equal(outcome.value["w"], np.full(4, 2, np.float32))


@pytest.mark.parametrize("min_sites", [1, 2])
def test_of_two_sites_that_differ_nobody_can_say_which_is_right(min_sites: int) -> None:
    with LocalFederation(sites=2, min_sites=min_sites, rounds=2) as federation:
        work = {"site-1": adding_one(W), "site-2": OTHERS["another shape"]}
        outcomes = federation.outcomes(work, check=False)
    assert all(isinstance(outcome.error, HandshakeError) for outcome in outcomes.values())

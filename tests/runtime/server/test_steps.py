"""How far the sites' local training is within a round: told while it lasts, checked, shown and not kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federation_bench import Site, ended, serving

from fl_adapters import ProtocolError
from fl_adapters.environments.progress import RunView
from fl_runtime.client.local_training import StepCount, TrainingNote
from fl_runtime.server.federation.event_buffer import EventBuffer
from fl_runtime.server.records.history import History
from fl_runtime.types import Arrays, CohortRules, Event, Task
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

WEIGHTS: Arrays = {"w": np.zeros(3, np.float32)}


def begun(site: Site, rules: CohortRules | None = None) -> Task:
    """Join, and take the first task to train."""
    site.join()
    site.register(WEIGHTS, rules=rules)
    return site.start(WEIGHTS)


def say(site: Site, steps: pb.TrainingSteps) -> list[str]:
    """Tell the server of steps as a site of another making might; returns the notices."""
    session = pb.Session(job=site.welcome.settings["name"], attempt=site.welcome.attempt)
    request = pb.SessionRequest(session=session, steps=steps).SerializeToString()
    return [pb.Notice.FromString(message).kind for message in site.transport.call("Attend", request)]


def test_steps_are_shown_while_a_site_trains_and_not_kept(tmp_path: Path) -> None:
    view, history = RunView(), History(tmp_path / "kept")
    with serving(tmp_path, 1, rounds=1) as bench:
        site = bench.site("site-1")
        task = begun(site)
        site.client.training.leave_notes(tmp_path, "bench", 1)
        site.client.training.share(lambda: StepCount(3, 12), lambda: True)
        told = bench.watch.wait("steps", "site-1")
        note = TrainingNote.read(tmp_path)
        assert note == TrainingNote("bench", 1, 1, True, 3, 12, note.train_s if note else 0.0)
        for event in bench.watch.events:
            view(event)
        site.submit(task, WEIGHTS)
        site.client.next_task()
        update = bench.watch.wait("update", "site-1", count=2 if bench.watch.all("update")[0].round == 0 else 1)
        site.client.leave("done", early=False)
        ended(bench.server)
        for event in bench.watch.events:
            history(event)
    history.close()
    assert (told.round, told.data["done"], told.data["total"]) == (1, 3, 12)
    assert 1.0 <= told.data["train_s"] <= update.data["train_s"] <= update.data["seconds"]
    assert (view.sites["site-1"].done, view.done) == (0.25, 0.25)
    assert view.left_s == pytest.approx(told.data["train_s"] * 3, rel=0.01)
    kept = [json.loads(line) for line in (tmp_path / "kept" / "events.jsonl").read_text().splitlines()]
    assert "update" in {item["kind"] for item in kept} and "steps" not in {item["kind"] for item in kept}
    assert ",train_s," in (tmp_path / "kept" / "history.csv").read_text().splitlines()[0]


def test_a_site_whose_policy_keeps_its_progress_tells_neither_steps_nor_seconds(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1, sockets=False) as bench:

        def work(name: str) -> None:
            site = bench.site(name)
            task = begun(site)
            site.client.training.share(lambda: StepCount(3, 12), lambda: name == "site-2")
            bench.watch.wait("steps", "site-2")
            site.submit(task, WEIGHTS)
            site.client.next_task()
            site.client.leave("done", early=False)

        bench.run(work)
        ended(bench.server)
        assert not bench.watch.all("steps", "site-1")
        last = {event.site: event.data for event in bench.watch.all("update") if event.round == 1}
        assert "train_s" not in last["site-1"] and last["site-2"]["train_s"] > 0


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"done": 13, "total": 12}, "13 of 12 steps"),
        ({"done": 2**60}, "the limit is"),
        ({"done": 1, "train_s": float("nan")}, "trained for nan s"),
        ({"done": 1, "train_s": -1.0}, "trained for -1 s"),
    ],
)
def test_steps_that_cannot_be_are_refused(tmp_path: Path, fields: dict[str, float], what: str) -> None:
    with serving(tmp_path, 1, rounds=1, sockets=False) as bench:
        site = bench.site("site-1")
        begun(site)
        with pytest.raises(ProtocolError, match=what):
            say(site, pb.TrainingSteps(round=1, **fields))  # type: ignore[arg-type]
        assert not bench.watch.all("steps")


def test_a_site_is_heard_twice_a_second_at_most_and_on_its_own_round_alone(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=3, sockets=False) as bench:
        site = bench.site("site-1")
        begun(site)
        assert say(site, pb.TrainingSteps(round=2, done=1, total=4)) == ["noted"]
        for done in range(1, 4):
            assert say(site, pb.TrainingSteps(round=1, done=done, total=4)) == ["noted"]
        assert bench.watch.wait("steps").data["done"] == 1
        assert len(bench.watch.all("steps")) == 1


def test_steps_do_not_tell_the_size_of_a_site_whose_metrics_stay(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=1, sockets=False) as bench:
        site = bench.site("site-1")
        task = begun(site, CohortRules(stays=("metrics",)))
        assert say(site, pb.TrainingSteps(round=1, done=1, total=4)) == ["noted"]
        site.submit(task, WEIGHTS)
        bench.watch.wait("round_finished")
        assert not bench.watch.all("steps")


def test_the_screen_of_a_follower_gets_the_newest_steps_of_each_site_and_others_get_none() -> None:
    buffer = EventBuffer()
    buffer.append(Event("round_started", 0.0, 1, data={"sites": ["a", "b"]}))
    for done in range(5):
        for site in "ab":
            buffer.append(Event("steps", 0.0, 1, site, {"done": done, "total": 9, "train_s": 1.0}))
    buffer.close()
    asked = [
        (number, event["kind"], event["data"].get("done")) for number, event in buffer.follow(0, 1, steps=True) if event
    ]
    assert asked == [(0, "round_started", None), (0, "steps", 4), (0, "steps", 4)]
    assert [event["kind"] for _, event in buffer.follow(0, 1) if event] == ["round_started"]

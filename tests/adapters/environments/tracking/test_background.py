"""A tracker that fails, hangs or is slow does not hold up its run, and what was lost is said."""

import threading
import time
from pathlib import Path

from fl_adapters.environments.tracking import Begin, End, Metrics, Point, Record, TrackedRun, Tracking
from fl_adapters.environments.tracking.background import Background
from fl_runtime.types import Event

RUN = TrackedRun("tumour", "id")


def record(number: int) -> Metrics:
    return Metrics(RUN, (Point("loss", float(number), number, 0.0),))


def test_a_tracker_that_hangs_is_given_a_bounded_time(capsys) -> None:
    hang = threading.Event()
    background = Background("mine", lambda record: hang.wait(60) and None, most_records=3)
    began = time.monotonic()
    for number in range(10):
        background.put(record(number))
    assert background.close(0.2) == 10
    assert time.monotonic() - began < 5  # not the minute that the tracker hangs
    hang.set()
    said = capsys.readouterr().err
    assert said.count("records wait; further ones are lost") == 1
    assert "10 records of the run were not sent; the run's own folder has all of them" in said


def test_what_a_server_did_not_take_while_it_was_away_comes_later(capsys) -> None:
    taken: list[Metrics] = []
    tries: list[Metrics] = []

    def tracker(record: Metrics) -> None:
        tries.append(record)
        if len(tries) < 3:
            raise ConnectionRefusedError("server away")
        taken.append(record)

    background = Background("mine", tracker)
    sent = [record(number) for number in range(5)]
    for item in sent:
        background.put(item)
    assert background.close(20) == 0
    assert [point for item in taken for point in item.points] == [point for item in sent for point in item.points]
    assert capsys.readouterr().err.count("server away") == 1


def test_a_record_that_breaks_a_tracker_is_lost_alone(capsys) -> None:
    taken: list[Point] = []

    def tracker(record: Metrics) -> None:
        if any(point.round == 1 for point in record.points):
            raise KeyError("no such metric")
        taken.extend(record.points)

    background = Background("mine", tracker)
    for number in range(3):
        background.put(record(number))
    assert background.close(20) == 1
    assert taken == [*record(0).points, *record(2).points]
    said = capsys.readouterr().err
    assert "no such metric" in said and "1 records of the run were not sent" in said


def test_metrics_of_quick_rounds_go_together() -> None:
    taken: list[Record] = []
    held, begun = threading.Event(), threading.Event()

    def tracker(record: Record) -> None:
        begun.set()
        held.wait(60)
        taken.append(record)

    background = Background("mine", tracker)
    background.put(record(0))
    assert begun.wait(60)
    other = TrackedRun("tumour/2", "id/2")
    second = [Metrics(other, (Point("loss", 1.0, number, 0.0),)) for number in range(2)]
    for item in [record(1), record(2), *second, End(RUN, "finished", Path())]:
        background.put(item)
    held.set()
    assert background.close(20) == 0
    assert taken == [
        record(0),
        Metrics(RUN, record(1).points + record(2).points),
        Metrics(other, second[0].points + second[1].points),
        End(RUN, "finished", Path()),
    ]


def test_events_become_records_of_each_training(tmp_path: Path) -> None:
    taken: list[Record] = []
    tracking = Tracking([taken.append], "tumour", "id", {"rounds": 1, "sites": ["a", "b"], "filters": []})
    for training in (1, 2):
        numbered = {"training": training} if training > 1 else {}
        used = {"status": "used", "metrics": {"train_loss": 2.0}}
        closed = {"metrics": {"train_loss": 2.0}, "seconds": 0.5, "bytes_up": 7, "bytes_down": 9}
        tracking(Event("started", 1.0, data={"rounds": 1, **numbered}))
        tracking(Event("update", 2.0, 1, "a", {**used, **numbered}))
        tracking(Event("update", 2.0, 1, "b", {**used, "status": "late", **numbered}))
        tracking(Event("round_finished", 3.0, 1, data={**closed, **numbered}))
        tracking(Event("report", 4.0, 1, "a", {"metrics": {"loss": 1.0}, **numbered}))
    assert tracking.close("killed", tmp_path) == 0

    first, second = TrackedRun("tumour", "id"), TrackedRun("tumour/2", "id/2")
    params = {"rounds": "1", "sites": '["a", "b"]'}
    assert [item for item in taken if isinstance(item, Begin)] == [Begin(first, params), Begin(second, params)]
    assert [item for item in taken if isinstance(item, End)] == [
        End(first, "finished", tmp_path),
        End(second, "killed", tmp_path / "2"),
    ]
    points = [p for item in taken if isinstance(item, Metrics) and item.run == second for p in item.points]
    assert points == [
        Point("site/a/train_loss", 2.0, 1, 2.0),
        Point("train_loss", 2.0, 1, 3.0),
        Point("round/seconds", 0.5, 1, 3.0),
        Point("round/bytes_up", 7.0, 1, 3.0),
        Point("round/bytes_down", 9.0, 1, 3.0),
        Point("site/a/loss", 1.0, 1, 4.0),
    ]
